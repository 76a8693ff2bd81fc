"""On a GPU only: every format in a real engine through sleep level 2 and CUDA graphs; the sync's kernels at size."""

import runtime  # noqa: F401

# isort: split
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import quant_formats as formats
from quant_sync import VERIFY_EVERY, Source, SyncError, SyncPlan

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent
QUANT = ["fp8", "fp8-channel", "fp8-block", "int8"]


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("quant", ["none", *QUANT])
def test_engine_after_sleep_level_2_and_under_cuda_graphs(quant, kv):
    """One process each: vLLM's sleep mode allows one engine a process."""
    command = [sys.executable, "scripts/check_engine.py", "--quant", quant, "--kv-cache-dtype", kv]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert [line.split()[1] for line in run.stdout.splitlines() if line.startswith("ok ")] == [
        "coverage", "sentinel", "addresses", "scales", "graphs",
    ]  # fmt: skip


# ---- the kernels, without vLLM's engine

HIDDEN, INNER, VOCABULARY = 1536, 8960, 3000


def parameter(tensor):
    return nn.Parameter(tensor, requires_grad=False)


def linear(quant, out, width):
    """An empty layer of vLLM's layout."""
    module = nn.Module()
    dtype = torch.int8 if quant == "int8" else torch.float8_e4m3fn
    weight = torch.zeros(out, width, device="cuda").to(dtype)
    shape = {"fp8": (1,), "fp8-block": (-(-out // 128), -(-width // 128))}.get(quant, (out, 1))
    scale = torch.zeros(shape, device="cuda")
    module.weight = parameter(weight if quant == "fp8-block" else weight.t())
    setattr(module, "weight_scale_inv" if quant == "fp8-block" else "weight_scale", parameter(scale))
    return module


def make(quant):
    """(policy, engine) of two layers with the widths of a 1.5B model; norms and a padded vocabulary beside them."""
    engine = nn.Module()
    engine.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    policy = {}
    g = torch.Generator("cuda").manual_seed(0)

    def weight(*shape):
        return (torch.randn(shape, generator=g, device="cuda") * 0.02).bfloat16()

    for i in range(2):
        layer = nn.Module()
        layer.qkv_proj, layer.gate_up_proj = linear(quant, HIDDEN + 512, HIDDEN), linear(quant, 2 * INNER, HIDDEN)
        layer.down_proj, layer.norm = linear(quant, HIDDEN, INNER), nn.Module()
        layer.norm.weight = parameter(torch.zeros(HIDDEN, device="cuda", dtype=torch.bfloat16))
        engine.add_module(f"layer{i}", layer)
        shapes = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (256, HIDDEN), "v_proj": (256, HIDDEN), "norm": (HIDDEN,)}
        shapes |= {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
        policy |= {f"layer{i}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
    engine.embed = nn.Module()
    engine.embed.weight = parameter(torch.ones(VOCABULARY + 72, HIDDEN, device="cuda", dtype=torch.bfloat16))
    engine.embed.num_embeddings_padded = VOCABULARY + 72
    policy["embed.weight"] = weight(VOCABULARY, HIDDEN)
    return policy, engine


def raw(tensor):
    return torch.as_strided(tensor.data, (tensor.numel(),), (1,)).view(torch.uint8)


def snapshot(engine):
    return {name: raw(p).clone() for name, p in engine.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def reference(plan):
    for row in plan.rows:
        formats.write(row.format, row.dest, row.scale, [s.tensor for s in row.sources])


@pytest.mark.parametrize("quant", QUANT)
def test_kernels_write_the_references_bytes(quant):
    policy, engine = make(quant)
    policy["layer1.k_proj.weight"].zero_()
    policy["layer0.down_proj.weight"] *= 1e-30
    plan = SyncPlan.build(policy, engine)
    for p in engine.parameters():
        raw(p).fill_(0xFF)
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)
    ours = snapshot(engine)
    for p in engine.parameters():
        raw(p).fill_(0xFF)
    reference(plan)
    assert same(ours, snapshot(engine))


@pytest.mark.parametrize("quant", QUANT)
def test_kernels_write_the_bytes_of_vllms_quantizer(quant):
    """Of the functions that vLLM's load calls; INT8 has none for weights: there its quantizer of activations."""
    from vllm import _custom_ops as ops
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    quantize = {
        "fp8": lambda w: ops.scaled_fp8_quant(w),
        "fp8-channel": lambda w: ops.scaled_fp8_quant(w, use_per_token_if_dynamic=True),
        "fp8-block": lambda w: per_block_cast_to_fp8(w, [128, 128], False),
        "int8": lambda w: ops.scaled_int8_quant(w)[:2],
    }[quant]
    policy, engine = make(quant)
    plan = SyncPlan.build(policy, engine)
    plan.sync()
    for row in plan.rows:
        if row.scale is None:
            continue
        q, scale = quantize(torch.cat([s.tensor for s in row.sources]))
        assert torch.equal(row.scale.view(-1), scale.view(-1)), row.name
        assert torch.equal(raw(q.contiguous()), raw(row.dest.contiguous())), row.name


@pytest.mark.parametrize("quant", QUANT)
def test_a_sync_allocates_nothing_and_can_be_captured(quant):
    policy, engine = make(quant)
    plan = SyncPlan.build(policy, engine)
    plan.sync()
    plan.verify(turn=1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan.sync()
    plan.verify(turn=2)
    assert torch.cuda.max_memory_allocated() == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.sync()
    for tensor in policy.values():
        tensor.mul_(1.25)
    with pytest.raises(SyncError):
        plan.verify(full=True)
    graph.replay()
    assert plan.verify(full=True) == len(plan.rows)


@pytest.mark.parametrize("quant", QUANT)
def test_a_wrong_byte_is_found_in_its_turn(quant):
    policy, engine = make(quant)
    plan = SyncPlan.build(policy, engine)
    plan.sync()
    for row in (plan.rows[0], plan.rows[-1]):
        element = row.dest[row.dest.shape[0] // 3].view(-1)[5:6].view(torch.uint8)
        element ^= 1
        caught = 0
        for turn in range(VERIFY_EVERY):
            try:
                plan.verify(turn=turn)
            except SyncError as error:
                caught += 1
                assert row.name in str(error)
        assert caught >= 1
        element ^= 1
    policy["layer0.v_proj.weight"][3, 3] = float("nan")
    plan.sync()
    with pytest.raises(SyncError, match=r"layer0\.v_proj\.weight is not finite"):
        plan.verify(turn=5)


@pytest.mark.parametrize("quant", QUANT)
def test_pinned_host_weights_give_the_same_bytes(quant, monkeypatch):
    """Streamed through staging buffers that hold a part of the model; the sources change between two syncs."""
    monkeypatch.setattr("quant_sync.STAGING_BYTES", 60 << 20)
    policy, engine = make(quant)
    resident = SyncPlan.build(policy, engine)
    host = {name: t.cpu().pin_memory() for name, t in policy.items()}
    streamed = SyncPlan.build(host, engine)
    assert len(streamed._staged) > 2
    for factor in (1.0, 1.25):
        for name in policy:
            policy[name].mul_(factor)
            host[name].copy_(policy[name])
        resident.sync()
        wanted = snapshot(engine)
        for p in engine.parameters():
            raw(p).fill_(0xFF)
        streamed.sync()
        assert same(wanted, snapshot(engine))
        assert streamed.verify(full=True) == len(streamed.rows)
        assert sum(streamed.verify(turn=t) for t in range(VERIFY_EVERY)) == len(streamed.rows)


@pytest.mark.parametrize("quant", QUANT)
def test_lora_is_merged_on_the_way_and_the_base_is_untouched(quant):
    policy, engine = make(quant)
    g = torch.Generator("cuda").manual_seed(1)
    mixed, merged = dict(policy), dict(policy)
    for name, base in policy.items():
        if base.dim() == 2 and name != "embed.weight":
            a = torch.randn(16, base.shape[1], generator=g, device="cuda") * 0.02
            b = torch.randn(base.shape[0], 16, generator=g, device="cuda") * 0.02
            mixed[name] = Source.lora(name, base, a, b, 2.0)
            merged[name] = torch.addmm(base, b.bfloat16(), a.bfloat16(), alpha=2.0)
    before = {name: t.clone() for name, t in policy.items()}
    SyncPlan.build(merged, engine).sync()
    wanted = snapshot(engine)
    plan = SyncPlan.build(mixed, engine)
    plan.sync()
    assert same(wanted, snapshot(engine))
    assert plan.verify(full=True) == len(plan.rows)
    assert all(torch.equal(policy[name], before[name]) for name in policy)
