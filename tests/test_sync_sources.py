"""Where the policy's weights come from: staged sources, LoRA, shards, modules, and what has moved since the plan."""

import runtime  # noqa: F401

# isort: split
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import quant_sync
from quant_sync import Source, SyncError, SyncPlan, _balanced, _packed
from ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
QUANTS = ["none", "fp8", "fp8-channel", "fp8-block", "int8"]

# ---- a small engine in vLLM's layouts, and a policy for it. Some parts end inside a 128 x 128 block

TOKENS, PADDED, WIDTH = 51, 64, 128
PARTS = {"q_proj": 128, "k_proj": 128, "v_proj": 72, "gate_proj": 256, "up_proj": 256}  # output features
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def parameter(tensor):
    return nn.Parameter(tensor, requires_grad=False)


def bf16(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


def tree(tensors):
    """A module whose parameters have these dotted names; a tensor that occurs twice is one parameter."""
    root, made = nn.Module(), {}
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, made.setdefault(id(tensor), parameter(tensor)))
    return root


def linear(quant, out, width):
    """Parameters of a linear layer as vLLM creates them."""
    dtype = torch.int8 if quant == "int8" else torch.float8_e4m3fn
    if quant == "none":
        return {"weight": bf16(out, width)}
    if quant == "fp8-block":
        scale = torch.ones(-(-out // 128), -(-width // 128))
        return {"weight": torch.zeros(out, width, dtype=dtype), "weight_scale_inv": scale}
    scale = torch.ones(1) if quant == "fp8" else torch.ones(out, 1)
    return {"weight": torch.zeros(out, width, dtype=dtype).t(), "weight_scale": scale}


def small_engine(quant, tied=False):
    tensors = {"model.embed_tokens.weight": bf16(PADDED, WIDTH), "model.norm.weight": bf16(WIDTH)}
    if not tied:
        tensors["lm_head.weight"] = bf16(PADDED, WIDTH)
    for i in range(2):
        layers = {
            "self_attn.qkv_proj": linear(quant, 328, WIDTH) | {"bias": bf16(328)},
            "self_attn.o_proj": linear(quant, WIDTH, 200),
            "mlp.gate_up_proj": linear(quant, 512, WIDTH),
            "mlp.down_proj": linear(quant, WIDTH, 256),
            "input_layernorm": {"weight": bf16(WIDTH)},
        }
        tensors |= {f"model.layers.{i}.{n}.{leaf}": t for n, ts in layers.items() for leaf, t in ts.items()}
    engine = tree(tensors)
    engine.packed_modules_mapping = PACKED
    for name in ("model.embed_tokens", "lm_head"):
        if name in engine._modules or name.startswith("model"):
            engine.get_submodule(name).num_embeddings_padded = PADDED
    return engine


def small_policy(tied=False):
    shapes = {"model.embed_tokens.weight": (TOKENS, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (TOKENS, WIDTH)
    for i in range(2):
        layer = f"model.layers.{i}"
        for part, rows in PARTS.items():
            block = "mlp" if part in ("gate_proj", "up_proj") else "self_attn"
            shapes[f"{layer}.{block}.{part}.weight"] = (rows, WIDTH)
            if block == "self_attn":
                shapes[f"{layer}.{block}.{part}.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (WIDTH, 200)
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, 256)
        shapes[f"{layer}.input_layernorm.weight"] = (WIDTH,)
    g = torch.Generator().manual_seed(0)
    policy = {name: (torch.randn(shape, generator=g) * 0.1 + 0.05).bfloat16() for name, shape in shapes.items()}
    if tied:
        policy["lm_head.weight"] = policy["model.embed_tokens.weight"]
    return policy


def raw(tensor):
    """A dense tensor's bytes in the order of its memory, whatever its strides: a view."""
    data = tensor.data
    return torch.as_strided(data, (data.numel(),), (1,)).view(torch.uint8)


def snapshot(engine):
    return {name: raw(p).clone() for name, p in engine.named_parameters()}


def poison(engine):
    """NaN in FP8, 3e38 in bf16 and fp32."""
    for p in engine.parameters():
        raw(p).fill_(0x7F)


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def change(tensor, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tensor.add_((torch.randn(tensor.shape, generator=g) * 0.1).to(tensor))


def expected_bytes(quant, policy):
    """Those of a plan that reads every tensor in place."""
    engine = small_engine(quant)
    SyncPlan.build(policy, engine).sync()
    return snapshot(engine)


# ---- staged sources


def staged_source(name, tensor, log):
    """A source without a tensor; `log` takes the name each time it is asked for."""

    def fill(out):
        assert out.shape == tensor.shape and out.dtype == torch.bfloat16 and out.is_contiguous()
        log.append(name)
        out.copy_(tensor)

    return Source(name, tuple(tensor.shape), tensor.dtype, fill=fill)


STAGED = {  # which tensors are not where the engine is; the others are read in place
    "all": lambda name: True,
    "k and up of fused rows": lambda name: name.endswith(("k_proj.weight", "up_proj.weight")),
    "q and v of layer 1": lambda name: re.search(r"layers\.1\.self_attn\.[qv]_proj\.", name) is not None,
    "vectors and the vocabulary": lambda name: name.endswith(("bias", "norm.weight", "embed_tokens.weight")),
}


def staged_plan(quant, policy, engine, which="all"):
    """(plan, the log of what was staged, names that are)."""
    log = []
    names = [n for n in policy if STAGED[which](n)]
    sources = {n: staged_source(n, t, log) if n in names else t for n, t in policy.items()}
    return SyncPlan.build(sources, engine), log, names


def parts_staged(plan):
    """Engine parameter -> its sources that are staged, where there are any."""
    found = {r.name: {s.name for s in r.sources if s.tensor is None} for r in plan.rows}
    return {name: parts for name, parts in found.items() if parts}


@pytest.mark.parametrize("groups", [32, 3, 1])
@pytest.mark.parametrize("which", STAGED)
@pytest.mark.parametrize("quant", QUANTS)
def test_staged_weights_give_the_bytes_of_resident_ones(monkeypatch, quant, which, groups):
    """With one row a wave, several rows a wave, and several waves a group."""
    monkeypatch.setattr(quant_sync, "VERIFY_EVERY", groups)
    monkeypatch.setattr(quant_sync, "STAGING_BYTES", 1)
    policy, engine = small_policy(), small_engine(quant)
    before = {n: t.clone() for n, t in policy.items()}
    addresses = {n: p.data_ptr() for n, p in engine.named_parameters()}
    plan, log, names = staged_plan(quant, policy, engine, which)
    poison(engine)
    plan.sync()
    assert sorted(log) == sorted(names)  # each once
    assert differing(snapshot(engine), expected_bytes(quant, policy)) == []
    assert {n: p.data_ptr() for n, p in engine.named_parameters()} == addresses
    assert plan.verify(full=True) == len(plan.rows)
    assert all(torch.equal(raw(policy[n]), raw(t)) for n, t in before.items())

    for i, tensor in enumerate(policy.values()):  # the next step's weights, through the same plan
        change(tensor, i)
    with pytest.raises(SyncError, match=rf"^{len(plan.rows)} engine parameter"):
        plan.verify(full=True)
    plan.sync()
    assert differing(snapshot(engine), expected_bytes(quant, policy)) == []
    assert plan.verify(full=True) == len(plan.rows)


def test_waves_share_two_buffers_no_larger_than_they_must_be(monkeypatch):
    monkeypatch.setattr(quant_sync, "VERIFY_EVERY", 2)
    plan, _, _ = staged_plan("fp8", small_policy(), small_engine("fp8"))
    largest = max(r.staged_bytes for r in plan.rows)
    assert len(plan._staged) > 4 and max(len(w.rows) for w in plan._staged) > 1
    used = [t.untyped_storage() for w in plan._staged for weights in w.weights for t in weights.values()]
    assert len({s.data_ptr() for s in used}) == 2 and {s.nbytes() for s in used} == {largest}
    for one, other in zip(plan._staged, plan._staged[1:], strict=False):  # one is read while the next one is filled
        first, second = (next(iter(w.weights[0].values())).untyped_storage().data_ptr() for w in (one, other))
        assert first != second


@pytest.mark.parametrize("groups", [32, 3, 1])
def test_sources_are_asked_for_in_one_order(monkeypatch, groups):
    """What gathers shards must be called in the same order on every rank, in every sync and every verification."""
    monkeypatch.setattr(quant_sync, "VERIFY_EVERY", groups)
    policy = small_policy()
    plan, log, _ = staged_plan("fp8-channel", policy, small_engine("fp8-channel"))
    orders = []
    for call in (plan.sync, plan.sync, lambda: plan.verify(full=True), plan.sync):
        log.clear()
        call()
        orders.append(list(log))
    again, log, _ = staged_plan("fp8-channel", {n: t + 1 for n, t in policy.items()}, small_engine("fp8-channel"))
    again.sync()
    assert orders == [log] * 4
    by_turn = []
    for turn in range(quant_sync.VERIFY_EVERY):
        log.clear()
        again.verify(turn)
        by_turn += log
    assert by_turn == orders[0]


@pytest.mark.parametrize("groups", [32, 4])
@pytest.mark.parametrize("which", ["all", "k and up of fused rows"])
@pytest.mark.parametrize("quant", ["fp8", "fp8-block"])
def test_a_staged_row_is_compared_whole_in_one_turn(monkeypatch, quant, which, groups):
    monkeypatch.setattr(quant_sync, "VERIFY_EVERY", groups)
    engine = small_engine(quant)
    plan, log, _ = staged_plan(quant, small_policy(), engine, which)
    plan.sync()
    rows = parts_staged(plan)
    turn_of = {}
    for turn in range(7 * groups, 8 * groups):
        log.clear()
        looked_at = plan.verify(turn)
        seen = [name for name, parts in rows.items() if parts & set(log)]
        assert sorted(log) == sorted(n for name in seen for n in rows[name])  # nothing but these, each once
        assert looked_at == len(plan.rows) - len(rows) + len(seen)
        assert not turn_of.keys() & set(seen)
        turn_of |= dict.fromkeys(seen, turn)
    assert turn_of.keys() == rows.keys()

    for row in (r for r in plan.rows if r.name in rows):
        for at in {0, row.dest.shape[0] // 2 + 1, row.dest.shape[0] - 1}:  # of every part, also the resident ones
            element = row.dest[at].view(-1)[-1:].view(torch.uint8)
            element ^= 1
            for turn in range(8 * groups, 9 * groups):
                if turn % groups == turn_of[row.name] % groups:
                    with pytest.raises(SyncError, match=rf"^1 engine parameter.*{re.escape(row.name)}: "):
                        plan.verify(turn)
                else:
                    plan.verify(turn)
            element ^= 1


@pytest.mark.parametrize("quant", QUANTS)
def test_a_full_verification_stages_everything_and_names_the_fault(quant):
    engine = small_engine(quant)
    plan, log, names = staged_plan(quant, small_policy(), engine)
    plan.sync()
    log.clear()
    assert plan.verify(full=True) == len(plan.rows)
    assert sorted(log) == sorted(names)
    for name in ("model.layers.1.self_attn.qkv_proj", "model.layers.0.mlp.down_proj", "model.layers.0.input_layernorm"):
        data = raw(engine.get_parameter(f"{name}.weight"))
        data[-1] ^= 1
        with pytest.raises(SyncError, match=rf"^1 engine parameter.*: {re.escape(name)}\.weight: differs in 1 element"):
            plan.verify(full=True)
        data[-1] ^= 1
    assert plan.verify(full=True) == len(plan.rows)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight"])
def test_what_a_staged_source_gave_that_is_not_finite_is_found_in_any_turn(name, value):
    policy = small_policy()
    plan, _, _ = staged_plan("fp8", policy, small_engine("fp8"))
    policy[name].view(-1)[5] = value
    plan.sync()
    for turn in range(quant_sync.VERIFY_EVERY):
        with pytest.raises(SyncError, match=rf"the policy's {re.escape(name)} is not finite"):
            plan.verify(turn)


def test_a_source_of_another_shape_or_dtype_is_refused_by_name():
    name = "model.layers.0.mlp.down_proj.weight"
    for shape, dtype in (((WIDTH, 255), torch.bfloat16), ((WIDTH, 256), torch.float32)):
        policy = small_policy() | {name: Source(name, shape, dtype, fill=torch.zero_)}
        with pytest.raises(SyncError, match=re.escape(name)):
            SyncPlan.build(policy, small_engine("fp8"))


def test_a_tensor_of_another_device_is_refused_by_name():
    with pytest.raises(SyncError, match=r"the policy's a\.weight is on meta and the engine on cpu.*pin_memory"):
        Source.of("a.weight", torch.empty(2, 2, device="meta"), CPU)


def test_the_kernels_table_may_be_empty():
    """So it is on a GPU whose every weight is staged."""
    kernels = pytest.importorskip("quant_kernels")
    sweep = kernels.Sweep([], 32, torch.zeros(2, dtype=torch.int32))
    sweep.write()
    for turn in range(32):
        sweep.check(turn, 32)
    sweep.check(0, 1)


# ---- LoRA


ADAPTED = {  # engine parameter -> the policy's matrices of it that have an adapter
    "model.layers.0.self_attn.qkv_proj.weight": ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"],
    "model.layers.1.mlp.down_proj.weight": ["model.layers.1.mlp.down_proj"],
}
SCALING = 1.7


class Adapted:
    """The small policy with adapters of rank 8 on ADAPTED's matrices."""

    def __init__(self, dtype=torch.bfloat16):
        self.base, self.adapters = small_policy(), {}
        g = torch.Generator().manual_seed(3)
        self.policy = dict(self.base)
        for name in (f"{n}.weight" for names in ADAPTED.values() for n in names):
            rows, columns = self.base[name].shape
            a, b = torch.randn(8, columns, generator=g) * 0.1, torch.randn(rows, 8, generator=g) * 0.1
            self.adapters[name] = (nn.Parameter(a.to(dtype)), nn.Parameter(b.to(dtype)))
            self.policy[name] = Source.lora(name, self.base[name], *self.adapters[name], SCALING)

    def merged(self):
        """The policy's tensors as float64 has them, from the factors as bf16."""
        exact = {n: t.double() for n, t in self.base.items()}
        for name, (a, b) in self.adapters.items():
            exact[name] = exact[name] + SCALING * (b.detach().bfloat16().double() @ a.detach().bfloat16().double())
        return exact


def held_parts(plan, engine):
    """Policy's name -> what a bf16 engine holds of it."""
    found = {}
    for row in plan.rows:
        parts = engine.get_parameter(row.name)[: sum(s.shape[0] for s in row.sources)]
        sizes = [s.shape[0] for s in row.sources]
        found |= dict(zip((s.name for s in row.sources), parts.split(sizes), strict=True))
    return found


def assert_rounded_once(held, exact):
    """Within one bf16 ulp everywhere, and the nearest number but for what fp32 sums lose near a tie."""
    for name, value in exact.items():
        ulp = torch.exp2(value.abs().clamp(min=1e-30).log2().floor() - 7)
        error = (held[name].double() - value).abs()
        assert bool((error <= ulp + 1e-6).all()), name
        assert (held[name] != value.bfloat16()).double().mean() < 0.005, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merged_weight_is_rounded_once_from_its_exact_value(dtype):
    adapted, engine = Adapted(dtype), small_engine("none")
    before = {n: t.clone() for n, t in adapted.base.items()}
    plan = SyncPlan.build(adapted.policy, engine)
    for _ in range(2):
        plan.sync()
        held = held_parts(plan, engine)
        assert_rounded_once(held, adapted.merged())
        for name in adapted.adapters:
            assert (held[name] != before[name]).double().mean() > 0.5  # or the adapter could be nothing
        assert plan.verify(full=True) == len(plan.rows)
        for a, b in adapted.adapters.values():  # an optimizer's step, seen by the next sync
            change(a, 7)
            change(b, 8)
        with pytest.raises(SyncError, match=rf"^{len(ADAPTED)} engine parameter"):
            plan.verify(full=True)
    assert all(torch.equal(raw(adapted.base[n]), raw(t)) for n, t in before.items())
    assert all(a.requires_grad and a.grad is None for pair in adapted.adapters.values() for a in pair)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_merged_weight_is_quantized_as_a_resident_one(quant):
    adapted, engine = Adapted(), small_engine(quant)
    plan = SyncPlan.build(adapted.policy, engine)
    plan.sync()
    merged = {n: t.bfloat16() for n, t in adapted.base.items()}
    for name in adapted.adapters:
        merged[name] = torch.empty_like(adapted.base[name])
        with torch.no_grad():
            adapted.policy[name].fill(merged[name])
    assert differing(snapshot(engine), expected_bytes(quant, merged)) == []
    assert plan.verify(full=True) == len(plan.rows)


def test_an_adapter_whose_b_is_zero_is_exactly_the_base():
    adapted, engine = Adapted(torch.float32), small_engine("fp8")
    with torch.no_grad():
        for _, b in adapted.adapters.values():
            b.zero_()
    plan = SyncPlan.build(adapted.policy, engine)
    plan.sync()
    assert differing(snapshot(engine), expected_bytes("fp8", adapted.base)) == []
    for name in adapted.adapters:
        out = torch.empty_like(adapted.base[name])
        with torch.no_grad():
            adapted.policy[name].fill(out)
        assert torch.equal(out, adapted.base[name])


@pytest.mark.parametrize("quant", QUANTS)
def test_an_engine_that_has_the_base_without_the_adapter_is_noticed(quant):
    adapted, engine = Adapted(), small_engine(quant)
    SyncPlan.build(adapted.base, engine).sync()
    plan = SyncPlan.build(adapted.policy, engine)
    with pytest.raises(SyncError) as error:
        plan.verify(full=True)
    assert str(error.value).startswith(f"{len(ADAPTED)} engine parameter(s)")
    assert all(name in str(error.value) for name in ADAPTED)
    turns = []
    for turn in range(quant_sync.VERIFY_EVERY):
        try:
            plan.verify(turn)
        except SyncError:
            turns.append(turn)
    assert len(turns) == len(ADAPTED)  # each row in its turn


# ---- a policy that changed under the plan


def same_bytes_elsewhere(tensor):
    tensor.data = tensor.data.clone()


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("as_module", [False, True])
def test_sync_refuses_a_policy_tensor_that_was_moved(name, as_module):
    policy, engine = small_policy(), small_engine("fp8")
    module = tree(policy) if as_module else None
    plan = SyncPlan.build(module or policy, engine)
    plan.sync()
    tensor = module.get_parameter(name) if as_module else policy[name]
    same_bytes_elsewhere(tensor)
    change(tensor)
    before = snapshot(engine)
    with pytest.raises(SyncError, match=rf"^the policy's {re.escape(name)} was replaced or moved"):
        plan.sync()
    assert differing(snapshot(engine), before) == []  # refused before the first byte


@pytest.mark.parametrize("how", ["setattr", "load_state_dict"])
def test_sync_refuses_a_parameter_that_was_reassigned(how):
    """The plan would go on reading, and verifying against, a tensor that the policy no longer has."""
    name = "model.layers.1.self_attn.k_proj.weight"
    policy, engine = tree(small_policy()), small_engine("fp8")
    plan = SyncPlan.build(policy, engine)
    plan.sync()
    new = policy.get_parameter(name).detach() + 1
    if how == "setattr":
        policy.get_submodule(name.removesuffix(".weight")).weight = parameter(new)
    else:
        policy.load_state_dict({name: new}, strict=False, assign=True)
    with pytest.raises(SyncError, match=re.escape(name)):
        plan.sync()


@pytest.mark.parametrize("which", ["base", "A", "B"])
def test_sync_refuses_an_adapter_or_a_base_that_was_moved(which):
    adapted, engine = Adapted(), small_engine("fp8")
    plan = SyncPlan.build(adapted.policy, engine)
    plan.sync()
    name = "model.layers.1.mlp.down_proj.weight"
    same_bytes_elsewhere(
        {"base": adapted.base[name], "A": adapted.adapters[name][0], "B": adapted.adapters[name][1]}[which]
    )
    with pytest.raises(SyncError, match=rf"^the policy's {re.escape(name)} was replaced or moved"):
        plan.sync()


def test_values_written_in_place_are_no_move():
    policy, engine = tree(small_policy()), small_engine("fp8")
    plan = SyncPlan.build(policy, engine)
    new = {n: t + 1 for n, t in policy.state_dict().items()}
    policy.load_state_dict(new)
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)
    assert differing(snapshot(engine), expected_bytes("fp8", new)) == []


# ---- modules


@pytest.mark.parametrize("quant", QUANTS)
def test_a_module_with_a_tied_head_is_one_source(quant):
    tensors, engine = small_policy(tied=True), small_engine(quant, tied=True)
    policy = tree(tensors)
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    plan = SyncPlan.build(policy, engine)
    plan.sync()
    held = engine.get_parameter("model.embed_tokens.weight")
    assert torch.equal(held[:TOKENS], tensors["lm_head.weight"]) and not held[TOKENS:].any()
    assert plan.verify(full=True) == len(plan.rows) == 14
    other = small_engine(quant, tied=True)
    SyncPlan.build(tensors, other).sync()
    assert differing(snapshot(engine), snapshot(other)) == []


def test_a_head_that_is_not_tied_has_no_place_in_an_engine_that_ties_it():
    tensors = small_policy(tied=True)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    with pytest.raises(SyncError, match=r"^1 policy tensor\(s\) go nowhere in the engine: lm_head\.weight$"):
        SyncPlan.build(tree(tensors), small_engine("fp8", tied=True))


# ---- shards


def sharded(tensor, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    return nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)]))


def in_a_world(rank, size, folder):
    """Runs in a process of its own: DTensors, sharded by rows, into an engine that each rank has."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    for quant in QUANTS:
        policy, engine = small_policy(), small_engine(quant)
        shards = {n: sharded(t, mesh) for n, t in policy.items()}
        assert sum(p.to_local().numel() for p in shards.values()) < sum(t.numel() for t in policy.values()) or size == 1
        source = Source.of("model.norm.weight", shards["model.norm.weight"], CPU)
        assert (source.tensor, source.shape, source.dtype) == (None, (WIDTH,), torch.bfloat16)
        plan = SyncPlan.build(shards, engine)
        assert not any(row.resident for row in plan.rows)
        poison(engine)
        plan.sync()
        assert differing(snapshot(engine), expected_bytes(quant, policy)) == []
        assert plan.verify(full=True) == len(plan.rows)
        with torch.no_grad():
            for shard in shards.values():  # an optimizer's step
                shard.add_(1)
        with pytest.raises(SyncError, match=rf"^{len(plan.rows)} engine parameter"):
            plan.verify(full=True)
        plan.sync()
        assert differing(snapshot(engine), expected_bytes(quant, {n: t + 1 for n, t in policy.items()})) == []
        assert all(plan.verify(turn) <= 1 for turn in range(quant_sync.VERIFY_EVERY))
    tensors = small_policy(tied=True)
    shard = sharded(tensors["lm_head.weight"], mesh)
    policy = tree(tensors | dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), shard))
    engine = small_engine("fp8", tied=True)
    plan = SyncPlan.build(policy, engine)
    plan.sync()
    assert torch.equal(engine.model.embed_tokens.weight[:TOKENS], tensors["lm_head.weight"])
    assert plan.verify(full=True) == len(plan.rows)
    with torch.no_grad():
        gathered_rows(mesh, size)
        merged_and_rounded_shards(mesh)
    by_fsdp(mesh)
    moved_shards(mesh)
    refused_shards(mesh)
    told_to_all(mesh, rank, size)
    dist.barrier()
    dist.destroy_process_group()
    print("every byte is equal")


def gathered_rows(mesh, size):
    """As many rows as ranks, more, fewer (some ranks have none), and counts that ranks do not divide."""
    for rows in (1, 2, size, size + 1, 5 * size - 1, 7):
        for shape in ((rows,), (rows, 3)):
            tensor = torch.randn(shape, generator=torch.Generator().manual_seed(rows)).bfloat16()
            out = torch.full(shape, torch.nan, dtype=torch.bfloat16)
            Source.of("x", sharded(tensor, mesh), CPU).fill(out)
            assert torch.equal(out, tensor)


def merged_and_rounded_shards(mesh):
    """Any of base, A and B in shards; fp32 factors too. The bits are those of plain tensors."""
    for dtype in (torch.bfloat16, torch.float32):
        adapted = Adapted(dtype)
        for name, (a, b) in adapted.adapters.items():
            base = adapted.base[name]
            wanted, out = torch.empty_like(base), torch.empty_like(base)
            adapted.policy[name].fill(wanted)
            for which in range(8):
                kinds = [t if which >> i & 1 else sharded(t.detach(), mesh) for i, t in enumerate((base, a, b))]
                Source.lora(name, *kinds, SCALING).fill(out.fill_(torch.nan))
                assert torch.equal(out, wanted), (name, which)
            Source.rounded(name, base, 4).fill(wanted)
            Source.rounded(name, sharded(base, mesh), 4).fill(out.fill_(torch.nan))
            assert torch.equal(out, wanted) and not torch.equal(out, base)


def by_fsdp(mesh):
    """FSDP2's own shards, padded where ranks do not divide the rows."""
    from torch.distributed.fsdp import fully_shard

    policy, engine = tree(small_policy()), small_engine("fp8")
    fully_shard(policy.get_submodule("model.layers.1"), mesh=mesh)
    fully_shard(policy, mesh=mesh)
    plan = SyncPlan.build(policy, engine)
    assert not any(row.resident for row in plan.rows)
    plan.sync()
    assert differing(snapshot(engine), expected_bytes("fp8", small_policy())) == []


def told_to_all(mesh, rank, size):
    """Each rank has an engine of its own; what is wrong with one, or with all, every rank says in the same words."""
    ranks = Ranks(rank, size)
    engine = small_engine("fp8")
    plan = SyncPlan.build({n: sharded(t, mesh) for n, t in small_policy().items()}, engine, ranks)
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)
    last, every = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"
    raw(engine.get_parameter(every))[0] ^= 1
    raw(engine.get_parameter(last))[0] ^= rank == size - 1
    with pytest.raises(SyncError) as error:
        plan.verify(full=True)
    text = str(error.value)
    assert ranks.gather(text) == [text] * size
    assert text.startswith("2 engine parameter(s) do not hold the policy's weights: ")
    if size > 1:
        both = ", ".join(map(str, range(size)))
        for name, at in ((last, f"rank {size - 1}"), (every, f"ranks {both}")):
            assert re.search(
                rf"{re.escape(name)}: differs in 1 elements from the policy's {re.escape(name)} \({at}\)", text
            )


def moved_shards(mesh):
    """Of a source by itself, and of a module's parameter that goes on being the same object."""
    name = "model.layers.1.self_attn.k_proj.weight"
    for as_module in (False, True):
        shards = {n: sharded(t, mesh) for n, t in small_policy().items()}
        policy = shards
        if as_module:
            policy = tree(small_policy())
            for path, shard in shards.items():
                module, _, leaf = path.rpartition(".")
                setattr(policy.get_submodule(module), leaf, shard)
        plan = SyncPlan.build(policy, small_engine("fp8"))
        plan.sync()
        shards[name]._local_tensor = shards[name]._local_tensor.clone()  # as FSDP2 does when a module is moved
        with pytest.raises(SyncError, match=rf"^the policy's {re.escape(name)} was replaced or moved"):
            plan.sync()


def refused_shards(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    columns = distribute_tensor(torch.zeros(4, 8, dtype=torch.bfloat16), mesh, [Shard(1)])
    with pytest.raises(SyncError, match=r"the policy's a\.weight is a DTensor with placements .*fully_shard\(\)"):
        Source.of("a.weight", columns, CPU)
    with pytest.raises(SyncError, match=r"the policy's a\.weight is sharded on cpu and the engine on meta"):
        Source.of("a.weight", sharded(torch.zeros(4, 8), mesh), torch.device("meta"))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shards_are_gathered_as_they_are_staged(tmp_path, size):
    """A group of processes of their own: the engines of the other tests have one in this process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    code = "import test_sync_sources as t; t.in_a_world({}, {}, {!r})"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [[sys.executable, "-c", code.format(rank, size, str(tmp_path))] for rank in range(size)]
    ranks = [subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) for command in commands]
    try:
        for rank in ranks:
            out, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors[-3000:]
            assert out.splitlines()[-1] == "every byte is equal"
    finally:
        for rank in ranks:
            rank.kill()


# ---- groups and packs


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_balanced_and_always_the_same(seed):
    rng = random.Random(seed)
    sizes = [rng.choice([1, 2, 128, 1536, 1536 * 2048, 1536 * 8960]) * rng.randint(1, 3) for _ in range(340)]
    groups = _balanced(sizes, 32)
    assert groups == _balanced(list(sizes), 32)
    load = [0] * 32
    for size, group in zip(sizes, groups, strict=True):
        load[group] += size
    assert max(load) - min(load) <= max(sizes) + len(sizes)
    assert max(load) <= sum(sizes) / 32 + max(sizes)


def test_groups_of_equal_few_or_empty_sizes():
    for size in (0, 1, 7):
        counts = torch.bincount(torch.tensor(_balanced([size] * 100, 32)), minlength=32)
        assert (int(counts.min()), int(counts.max())) == (3, 4)
    assert sorted(_balanced([5, 9, 1], 32)) == [0, 1, 2]  # each alone
    assert _balanced([5, 9, 1], 1) == [0, 0, 0]
    assert _balanced([], 4) == []
    assert _balanced([1, 1, 10], 2) == [1, 1, 0]  # the largest first, the others where there is room


@pytest.mark.parametrize("size", [1, 100, 256, 1000, 10**6])
def test_packs_are_full_ordered_and_fit(size):
    rng = random.Random(size)
    rows = [SimpleNamespace(name=i, staged_bytes=rng.choice([1, 50, 100, 256, 999])) for i in range(200)]
    packs = list(_packed(rows, size))
    assert [r.name for pack in packs for r in pack] == list(range(200))
    for pack, following in zip(packs, [*packs[1:], None], strict=True):
        used = sum(r.staged_bytes for r in pack)
        assert used <= size or len(pack) == 1
        assert following is None or used + following[0].staged_bytes > size  # no pack is cut too early
    assert list(_packed([], size)) == []
