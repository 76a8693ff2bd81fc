"""The sync on several ranks: a policy in FSDP2's shards, a tensor-parallel engine, and what ranks tell each other."""

import runtime  # noqa: F401

# isort: split
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lora
import quant_formats as formats
import tensor_parallel
from quant_sync import VERIFY_EVERY, SyncError, SyncPlan
from ranks import Ranks
from tensor_parallel import Cut, cuts_of
from weight_sources import Source

ROOT = Path(__file__).resolve().parent.parent
TP = 2


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


# ---- which part: modules with vLLM's attributes


def column(rank, size, outputs, width=64, **more):
    """ColumnParallelLinear and its kin: `outputs` are those of all ranks together."""
    parts = [n // size for n in outputs]
    return SimpleNamespace(
        tp_rank=rank, tp_size=size, input_size=width, input_size_per_partition=width, output_size=sum(outputs),
        output_partition_sizes=parts, **more,
    )  # fmt: skip


def qkv(rank, size, heads, kv_heads, head):
    """QKVParallelLinear counts a head of k and v once for every rank that has it."""
    replicas = max(1, size // kv_heads)
    outputs = [heads * head, kv_heads * replicas * head, kv_heads * replicas * head]
    return column(rank, size, outputs, num_kv_head_replicas=replicas)


def row(rank, size, width, out=64):
    """RowParallelLinear."""
    return SimpleNamespace(
        tp_rank=rank, tp_size=size, input_size=width, input_size_per_partition=width // size, output_size=out,
        output_partition_sizes=[out],
    )  # fmt: skip


def vocabulary(rank, size, tokens, padded):
    """VocabParallelEmbedding and ParallelLMHead; in vLLM 0.26 without tp_rank."""
    start, stop = (min(padded // size * at, tokens) for at in (rank, rank + 1))
    indices = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=stop)
    return SimpleNamespace(tp_size=size, shard_indices=indices, org_vocab_size=tokens, num_embeddings_padded=padded)


def spans(cuts):
    return [None if c is None else (c.dim, c.start, c.stop, c.whole) for c in cuts]


def spans_of_ranks(make, size, dims=2, parts=1):
    return [spans(cuts_of("x.weight", make(rank, size), dims, parts)) for rank in range(size)]


def test_q_k_and_v_are_cut_by_heads():
    def make(rank, size):
        return qkv(rank, size, heads=8, kv_heads=4, head=16)

    assert spans_of_ranks(make, 2, parts=3) == [
        [(0, 0, 64, 128), (0, 0, 32, 64), (0, 0, 32, 64)],
        [(0, 64, 128, 128), (0, 32, 64, 64), (0, 32, 64, 64)],
    ]
    assert spans_of_ranks(make, 4, parts=3)[3] == [(0, 96, 128, 128), (0, 48, 64, 64), (0, 48, 64, 64)]
    assert spans_of_ranks(make, 2, dims=1, parts=3) == spans_of_ranks(make, 2, dims=2, parts=3)  # biases


@pytest.mark.parametrize(("size", "kv_heads", "owner"), [(2, 1, [0, 0]), (4, 1, [0] * 4), (4, 2, [0, 0, 1, 1])])
def test_neighbours_share_a_head_of_k_and_v_where_there_are_fewer_than_ranks(size, kv_heads, owner):
    found = spans_of_ranks(lambda rank, n: qkv(rank, n, 8, kv_heads, 16), size, parts=3)
    for rank, (q, k, v) in enumerate(found):
        assert q == (0, rank * 128 // size, (rank + 1) * 128 // size, 128)
        assert k == v == (0, owner[rank] * 16, owner[rank] * 16 + 16, kv_heads * 16)


@pytest.mark.parametrize("size", [2, 4])
def test_gate_and_up_are_cut_by_rows_o_and_down_by_columns(size):
    gate_up = spans_of_ranks(lambda rank, n: column(rank, n, [96, 96]), size, parts=2)
    down = spans_of_ranks(lambda rank, n: row(rank, n, 96), size)
    for rank in range(size):
        start, stop = rank * 96 // size, (rank + 1) * 96 // size
        assert gate_up[rank] == [(0, start, stop, 96)] * 2
        assert down[rank] == [(1, start, stop, 96)]
    assert spans_of_ranks(lambda rank, n: row(rank, n, 96), size, dims=1) == [[None]] * size  # a bias is whole


def test_the_vocabulary_is_cut_by_its_padded_rows():
    two = spans_of_ranks(lambda rank, n: vocabulary(rank, n, 200, 256), 2)
    assert two == [[(0, 0, 128, 200)], [(0, 128, 200, 200)]]
    four = spans_of_ranks(lambda rank, n: vocabulary(rank, n, 130, 256), 4)
    assert four == [[(0, 0, 64, 130)], [(0, 64, 128, 130)], [(0, 128, 130, 130)], [(0, 130, 130, 130)]]


def test_what_every_rank_has_is_not_cut():
    assert spans(cuts_of("norm.weight", nn.LayerNorm(4), 1, 1)) == [None]
    replicated = column(1, 2, [64])
    replicated.output_partition_sizes = [64]
    assert spans(cuts_of("x.weight", replicated, 2, 1)) == [None]
    assert spans(cuts_of("x.weight", qkv(0, 1, 8, 4, 16), 2, 3)) == [None] * 3
    with pytest.raises(SyncError, match=r"^x\.weight has 2 parts in the engine and is made of 1 policy"):
        cuts_of("x.weight", column(1, 2, [96, 96]), 2, 1)


# ---- the parts of an engine without vLLM, one rank after the other

HEADS, KV_HEADS, HEAD, WIDTH, INNER, TOKENS, PADDED = 8, 2, 16, 64, 96, 50, 64
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
FP8 = torch.float8_e4m3fn


def holder(attributes, **tensors):
    module = nn.Module()
    for name, value in vars(attributes).items():
        setattr(module, name, value)
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def linear(quant, attributes, bias=False):
    out, width = sum(attributes.output_partition_sizes), attributes.input_size_per_partition
    tensors = {"weight": torch.zeros(out, width, dtype=torch.bfloat16)}
    if quant == "fp8-block":
        scale = torch.ones(-(-out // 128), -(-width // 128))
        tensors = {"weight": torch.zeros(out, width, dtype=FP8), "weight_scale_inv": scale}
    elif quant != "none":
        weight = torch.zeros(out, width, dtype=torch.int8 if quant == "int8" else FP8).t()
        tensors = {"weight": weight, "weight_scale": torch.ones(1) if quant == "fp8" else torch.ones(out, 1)}
    if bias:
        tensors["bias"] = torch.zeros(out, dtype=torch.bfloat16)
    return holder(attributes, **tensors)


def small_engine(quant, rank, size):
    engine = nn.Module()
    engine.packed_modules_mapping = PACKED
    engine.qkv_proj = linear(quant, qkv(rank, size, HEADS, KV_HEADS, HEAD), bias=True)
    engine.o_proj = linear(quant, row(rank, size, HEADS * HEAD, WIDTH), bias=True)
    engine.o_proj.bias = nn.Parameter(torch.zeros(WIDTH, dtype=torch.bfloat16), requires_grad=False)
    engine.gate_up_proj = linear(quant, column(rank, size, [INNER, INNER]))
    engine.down_proj = linear(quant, row(rank, size, INNER, WIDTH))
    engine.norm = holder(SimpleNamespace(), weight=torch.zeros(WIDTH, dtype=torch.bfloat16))
    for name in ("embed_tokens", "lm_head"):
        rows = torch.zeros(PADDED // size, WIDTH, dtype=torch.bfloat16)
        setattr(engine, name, holder(vocabulary(rank, size, TOKENS, PADDED), weight=rows))
    return engine


def small_policy():
    shapes = {"q_proj": HEADS * HEAD, "k_proj": KV_HEADS * HEAD, "v_proj": KV_HEADS * HEAD}
    shapes |= {"gate_proj": INNER, "up_proj": INNER, "embed_tokens": TOKENS, "lm_head": TOKENS}
    shapes = {name: (rows, WIDTH) for name, rows in shapes.items()}
    shapes |= {"o_proj": (WIDTH, HEADS * HEAD), "down_proj": (WIDTH, INNER), "norm": (WIDTH,)}
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()}
    shapes |= {f"{n}.bias": shapes[f"{n}.weight"][:1] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    g = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=g) * 0.1 + 0.05).bfloat16() for name, shape in shapes.items()}


def part_by_hand(name, tensor, rank, size):
    """What vLLM's loaders put on a rank."""
    layer = name.partition(".")[0]
    if layer in ("q_proj", "gate_proj", "up_proj"):
        return tensor.chunk(size)[rank]
    if layer in ("k_proj", "v_proj"):
        return tensor.chunk(min(size, KV_HEADS))[rank // max(1, size // KV_HEADS)]
    if name in ("o_proj.weight", "down_proj.weight"):
        return tensor.chunk(size, 1)[rank].contiguous()
    if layer in ("embed_tokens", "lm_head"):
        padded = torch.cat([tensor, tensor.new_zeros(PADDED - TOKENS, WIDTH)])
        return padded.chunk(size)[rank]
    return tensor


def staged(name, tensor, log):
    """A source without a tensor, that says when it is asked for."""

    def fill(out):
        assert out.shape == tensor.shape and out.is_contiguous()
        log.append(name)
        out.copy_(tensor)

    return Source(name, tuple(tensor.shape), tensor.dtype, fill=fill)


@pytest.fixture
def own_amax(monkeypatch):
    """vLLM 0.26's rule: no rank knows another's amax."""
    monkeypatch.setattr(tensor_parallel, "_vllm_shares_amax", lambda: False)


@pytest.mark.parametrize("lies", ["where the engine is", "elsewhere"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("quant", ["none", "fp8", "fp8-channel", "int8"])
def test_a_rank_holds_its_part_of_every_weight(own_amax, quant, size, lies):
    policy = small_policy()
    for rank in range(size):
        engine, log = small_engine(quant, rank, size), []
        sources = policy if lies == "where the engine is" else {n: staged(n, t, log) for n, t in policy.items()}
        plan = SyncPlan.build(sources, engine)
        poison(engine)
        plan.sync()
        assert plan.verify(full=True) == len(plan.rows)
        by_hand = {n: part_by_hand(n, t, rank, size) for n, t in policy.items()}
        for row in plan.rows:
            parts = [by_hand[s.name] for s in row.sources]
            dest, scale = torch.empty_like(row.dest), None if row.scale is None else torch.empty_like(row.scale)
            assert sum(p.shape[0] for p in parts) == dest.shape[0]
            formats.write(row.format, dest, scale, parts)
            assert torch.equal(raw(dest), raw(row.dest)), row.name
            assert scale is None or torch.equal(scale, row.scale)
        for turn in range(VERIFY_EVERY):
            plan.verify(turn)
        policy["o_proj.weight"][3] += 1  # seen by each rank that has a part of it
        with pytest.raises(SyncError, match=r"^1 engine parameter.*o_proj\.weight"):
            plan.verify(full=True)
        policy["o_proj.weight"][3] -= 1


def test_parts_are_read_where_they_are_but_for_columns(own_amax):
    policy, engine = small_policy(), small_engine("fp8", 1, 2)
    plan = SyncPlan.build(policy, engine)
    assert {r.name for r in plan.rows if not r.resident} == {"o_proj.weight", "down_proj.weight"}
    read = {name: t for wave in [plan._resident] for weights in wave.weights for name, t in weights.items()}
    assert read["q_proj.weight"].data_ptr() == policy["q_proj.weight"][64:].data_ptr()
    assert plan.bytes_read < sum(t.numel() * 2 for t in policy.values())


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_ask_for_the_same_sources_in_the_same_order(own_amax, monkeypatch, size):
    """Gathering is a collective: also where the last ranks hold less of a vocabulary than the others, or none."""
    monkeypatch.setattr("quant_sync.STAGING_BYTES", 1)
    policy, orders = small_policy(), []
    for rank in range(size):
        log = []
        plan = SyncPlan.build({n: staged(n, t, log) for n, t in policy.items()}, small_engine("fp8", rank, size))
        calls = [plan.sync, lambda plan=plan: plan.verify(full=True)]
        calls += [lambda plan=plan, turn=turn: plan.verify(turn) for turn in range(VERIFY_EVERY)]
        calls += [lambda plan=plan: plan.prove(list), plan.sync]
        orders.append([])
        for call in calls:
            log.clear()
            call()
            orders[-1].append(list(log))
    assert all(order == orders[0] for order in orders)
    assert sorted(orders[0][0]) == sorted(policy) and len(orders[0][-2]) == 2 * len(policy)


def test_build_names_what_does_not_fit_a_part(own_amax):
    wrong = {"k_proj.weight": (16, WIDTH), "down_proj.weight": (WIDTH, 48), "lm_head.weight": (51, WIDTH)}
    for name, shape in wrong.items():
        policy = small_policy() | {name: torch.zeros(shape, dtype=torch.bfloat16)}
        with pytest.raises(SyncError, match=rf"as one part of 2 and does not fit the policy's.*{re.escape(name)}"):
            SyncPlan.build(policy, small_engine("fp8", 0, 2))
    with pytest.raises(SyncError, match=r"would lie on two of them; use a smaller --tp"):
        SyncPlan.build(small_policy(), small_engine("fp8-block", 0, 2))


# ---- one amax of several ranks


def test_the_rule_is_that_of_this_vllm(monkeypatch):
    quant_utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils")
    here = hasattr(quant_utils, "amax_for_tp_weight_quant")
    assert tensor_parallel._vllm_shares_amax() is here
    monkeypatch.delattr(quant_utils, "amax_for_tp_weight_quant", raising=False)
    assert tensor_parallel._vllm_shares_amax() is False


def test_which_scales_ranks_share(monkeypatch):
    import vllm.distributed.parallel_state as state

    monkeypatch.setattr(tensor_parallel, "_vllm_shares_amax", lambda: True)
    monkeypatch.setattr(state, "get_tp_group", lambda: SimpleNamespace(device_group=None))
    rows, columns, cpu, cuda = Cut(0, 0, 1, 2), Cut(1, 0, 1, 2), torch.device("cpu"), torch.device("cuda", 0)
    shared = tensor_parallel.shared_amax
    for fmt in (formats.COPY, formats.FP8_BLOCK, formats.INT8):
        assert shared("x", fmt, [rows, columns], cpu) is None
    assert shared("x", formats.FP8_TENSOR, [None], cpu) is None
    assert shared("x", formats.FP8_TENSOR, [rows], cuda) and shared("x", formats.FP8_TENSOR, [columns], cuda)
    assert shared("x", formats.FP8_CHANNEL, [rows], cuda) is None
    assert shared("x", formats.FP8_CHANNEL, [columns], cpu)
    with pytest.raises(SyncError, match=r"^x: this vLLM gives.*--rollout-quant fp8, --tp 1"):
        shared("x", formats.FP8_CHANNEL, [columns], cuda)


def together(*amax):
    """An `agree` for one rank, given each other rank's amax in fp32."""

    def agree(bits):
        assert bits.dtype == torch.int32 and int(bits.min()) >= 0
        for other in amax:
            bits.copy_(torch.maximum(bits, other.view(torch.int32)))

    return agree


@pytest.mark.parametrize(("fmt", "dim"), [(formats.FP8_TENSOR, 0), (formats.FP8_TENSOR, 1), (formats.FP8_CHANNEL, 1)])
def test_parts_with_one_amax_are_the_parts_of_the_whole(fmt, dim):
    whole = small_policy()["down_proj.weight"]
    scale = torch.empty(1) if fmt is formats.FP8_TENSOR else torch.empty(WIDTH, 1)
    dest = torch.empty(WIDTH, INNER, dtype=FP8)
    formats.write(fmt, dest, scale, [whole])
    amax = whole.float().abs().amax().reshape(1) if fmt is formats.FP8_TENSOR else whole.float().abs().amax(1)
    for i, part in enumerate(whole.chunk(2, dim)):
        part, own, agree = part.contiguous(), torch.empty_like(scale), together(amax)
        held = torch.empty_like(part, dtype=FP8)
        assert formats.write(fmt, held, own, [part], agree)
        assert torch.equal(raw(held), raw(dest.chunk(2, dim)[i].contiguous())) and torch.equal(own, scale)
        assert formats.check(fmt, held, own, {"x": part}, agree) is None
        for turn in range(8):
            rows_agree = agree if fmt is formats.FP8_TENSOR else together(amax[turn::8])
            assert formats.agrees(fmt, held, own, [part], turn, 8, rows_agree)
        own *= 2
        assert formats.check(fmt, held, own, {"x": part}, agree).startswith("the engine's scale is")


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_what_is_not_finite_on_another_rank_is_noticed(bad):
    """A maximum of floats could lose it."""
    part = small_policy()["down_proj.weight"]
    agree = together(torch.tensor([bad]).abs())
    assert not formats.write(formats.FP8_TENSOR, torch.empty_like(part, dtype=FP8), torch.empty(1), [part], agree)
    part[3, 3] = bad
    agree = together(torch.ones(1))
    assert not formats.write(formats.FP8_TENSOR, torch.empty_like(part, dtype=FP8), torch.empty(1), [part], agree)


def test_a_check_takes_part_to_the_end_whatever_it_finds():
    """Else the other ranks would wait."""
    part, calls = small_policy()["down_proj.weight"], []
    scale, dest = torch.empty(WIDTH, 1), torch.empty(WIDTH, INNER, dtype=FP8)
    formats.write(formats.FP8_CHANNEL, dest, scale, [part])
    right = formats.agrees(formats.FP8_CHANNEL, dest, scale, [part], 0, 8, calls.append)
    raw(dest).zero_()
    wrong = formats.agrees(formats.FP8_CHANNEL, dest, scale, [part], 0, 8, calls.append)
    assert (right, wrong, len(calls)) == (True, False, 2)
    part[0, 0] = torch.nan
    assert "not finite" in formats.check(formats.FP8_CHANNEL, dest, scale, {"x": part}, calls.append)
    assert len(calls) == 3


# ---- two processes and vLLM itself


class World:
    """In one of the processes: the engine's part that this rank has, a policy in shards, and the same one whole."""

    def __init__(self, folder):
        from torch.distributed.device_mesh import init_device_mesh

        import cpu_backend
        from policy import load_model

        self.folder, self.ranks = folder, Ranks.start(tp=TP)
        cpu_backend.prepare()
        self.whole, self.sharded = (load_model(folder, torch.device("cpu")) for _ in range(2))
        self.mesh = init_device_mesh("cpu", (self.ranks.world,))
        self.shard(self.sharded)
        self._alive = []

    def shard(self, model):
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)

    def start(self, quant):
        import vllm

        from engine_options import quantization_options

        self.llm = vllm.LLM(
            model=self.folder, skip_tokenizer_init=True, dtype="bfloat16", **quantization_options(quant, ()),
            load_format="dummy", max_model_len=128, max_num_seqs=64, kv_cache_memory_bytes=1 << 26, enforce_eager=True,
            logprobs_mode="processed_logprobs", seed=0, disable_log_stats=True, use_tqdm_on_load=False,
            distributed_executor_backend="external_launcher", tensor_parallel_size=TP,
        )  # fmt: skip
        self._alive.append(self.llm)
        self.engine = self.llm.apply_model(lambda module: module)[0]

    def load_by_vllm(self, weights):
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    def error(self, call):
        """The text that every rank raises."""
        with pytest.raises(SyncError) as found:
            call()
        texts = self.ranks.gather(str(found.value))
        assert len(set(texts)) == 1, texts
        return texts[0]

    def tokens(self):
        import vllm

        assert self.llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": ids} for ids in ([5, 17, 42], [9, 150, 3, 77], [60])]
        params = vllm.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [(p["prompt_token_ids"], list(o.outputs[0].token_ids)) for p, o in zip(prompts, outputs, strict=True)]


def in_a_world(folder, quants):
    """Runs in a process of its own, one of TP."""
    world = World(folder)
    for quant in quants:
        world.start(quant)
        check_bytes(world, quant)
        check_faults(world)
        check_tokens(world, quant)
        if quant == "fp8":
            check_training(world)
            for rank in (3, 1):  # 2 ranks do not divide A's rows; one of them has none
                check_adapters(world, rank)
    world.ranks.barrier()
    sys.stderr.write("every rank agrees\n")
    sys.stderr.flush()
    os._exit(0)  # vLLM's finalizers end process groups that the other rank may still use


def check_bytes(world, quant):
    engine = world.engine
    plan = SyncPlan.build(world.whole, engine, world.ranks)
    plan.check_formats(quant)
    poison(engine)
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)
    expected, addresses = snapshot(engine), {n: p.data_ptr() for n, p in engine.named_parameters()}
    assert plan.prove(world.load_by_vllm) == len(plan.rows)

    plan = SyncPlan.build(world.sharded, engine, world.ranks)
    world.plan = plan
    assert all(source.tensor is None for row in plan.rows for source in row.sources if "attn._" not in row.name)
    poison(engine)
    plan.sync()
    assert differing(snapshot(engine), expected) == []
    assert plan.verify(full=True) == len(plan.rows)
    poison(engine)
    assert plan.prove(world.load_by_vllm) == len(plan.rows)
    assert differing(snapshot(engine), expected) == []
    assert {n: p.data_ptr() for n, p in engine.named_parameters()} == addresses
    for turn in range(VERIFY_EVERY):
        plan.verify(turn)
    scales = {n: p for n, p in engine.named_parameters() if n.endswith("_scale") and "attn._" not in n}
    for name, scale in scales.items():  # the rule of this vLLM, whichever it is, and not only of both paths here
        everyone = world.ranks.gather(scale.tolist())
        by_columns = name.split(".")[-2] in ("o_proj", "down_proj")
        if quant == "fp8" or (quant == "fp8-channel" and by_columns):
            assert (everyone[0] == everyone[1]) == tensor_parallel._vllm_shares_amax(), name


def check_faults(world):
    """On one rank only: the other one says it too."""
    engine, plan, rank = world.engine, world.plan, world.ranks.rank
    name = "model.layers.1.mlp.down_proj.weight"
    turn = next(w.groups[0] for w in plan._staged if name in [r.name for r in w.rows])
    for bad in range(TP):
        data = raw(engine.get_parameter(name))
        data[7] ^= rank == bad
        for call in (lambda: plan.verify(full=True), lambda: plan.verify(turn)):
            text = world.error(call)
            assert re.match(
                rf"1 engine parameter\(s\) do not hold.*{re.escape(name)}: differs in 1 ele.*rank {bad}\)", text
            )
        data[7] ^= rank == bad
    assert plan.verify(full=True) == len(plan.rows)

    shard = world.sharded.get_parameter("model.layers.0.self_attn.k_proj.weight").to_local()
    kept = shard.detach().clone()
    with torch.no_grad():
        shard[1, 1] = torch.nan if rank == 1 else shard[1, 1]
    plan.sync()
    text = world.error(lambda: plan.verify(turn=3))
    assert "the policy's model.layers.0.self_attn.k_proj.weight is not finite" in text
    with torch.no_grad():
        shard.copy_(kept)
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)

    norm = world.engine.get_submodule("model.norm")
    weight = norm.weight
    if rank == 1:
        norm.weight = nn.Parameter(weight.data.clone(), requires_grad=False)
    assert world.error(plan.sync) == (
        "model.norm.weight was replaced or moved since the plan was built; build a new engine and plan (rank 1)"
    )
    norm.weight = weight
    policy = dict(world.whole.named_parameters(remove_duplicate=False))
    if rank == 0:
        policy["extra.weight"] = torch.ones(3, dtype=torch.bfloat16)
    text = world.error(lambda: SyncPlan.build(policy, engine, world.ranks))
    assert text == "1 policy tensor(s) go nowhere in the engine: extra.weight (rank 0)"
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)


def check_training(world):
    """Forward and backward passes of FSDP2 and a step on each rank's shards leave every tensor where the plan reads it;
    a root that was left whole is refused on every rank."""
    ids = torch.tensor([[5, 17, 42, 9]])
    world.sharded.set_attn_implementation("sdpa")
    world.sharded(ids).logits.float().square().mean().backward()
    whole = dict(world.whole.named_parameters())
    with torch.no_grad():
        for name, p in world.sharded.named_parameters():
            assert p.grad is not None, name
            p.to_local().add_(1e-2)
            whole[name].add_(1e-2)
    stale = world.error(lambda: world.plan.verify(full=True))
    assert stale.startswith(f"{sum('attn._' not in r.name for r in world.plan.rows)} engine parameter(s) do not hold")
    world.plan.sync()
    held = snapshot(world.engine)
    assert world.plan.verify(full=True) == len(world.plan.rows)
    SyncPlan.build(world.whole, world.engine, world.ranks).sync()
    assert differing(snapshot(world.engine), held) == []
    with torch.no_grad():
        world.sharded(ids)
    assert re.match(r"the policy's .* was replaced or moved .* or reshard\(\) a policy", world.error(world.plan.sync))
    world.sharded.reshard()
    world.plan.sync()


def check_adapters(world, rank):
    """The whole model that adapters make of a base, from shards of all of them."""
    from policy import load_model

    models = [load_model(world.folder, torch.device("cpu")) for _ in range(2)]
    for model in models:
        lora.add_adapters(model, lora.LoraSettings(rank, alpha=5.0))
        with torch.no_grad():
            g = torch.Generator().manual_seed(2)
            for p in (p for name, p in model.named_parameters() if "lora_" in name):
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    whole, sharded = models
    world.shard(sharded)
    plan = SyncPlan.build(lora.sources(whole), world.engine, world.ranks)
    plan.sync()
    held = snapshot(world.engine)
    plan = SyncPlan.build(lora.sources(sharded), world.engine, world.ranks)
    merges = [s for row in plan.rows for s in row.sources if s.merge is not None]
    assert merges and all(len(s.pieces) == 2 for s in merges)
    poison(world.engine)
    plan.sync()
    assert differing(snapshot(world.engine), held) == []
    with torch.no_grad():
        for model in models:  # shards are read where they lie, at every sync
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    (p.to_local() if model is sharded else p).mul_(2.0)
    SyncPlan.build(lora.sources(whole), world.engine, world.ranks).sync()
    doubled = snapshot(world.engine)
    assert differing(doubled, held)
    poison(world.engine)
    plan.sync()
    assert differing(snapshot(world.engine), doubled) == []
    assert plan.verify(full=True) == plan.prove(world.load_by_vllm) == len(plan.rows)
    merged = dict(lora.merged_weights(sharded))
    for name, tensor in lora.merged_weights(whole):
        assert torch.equal(merged[name], tensor), name


def check_tokens(world, quant):
    pairs = world.tokens()
    everyone = world.ranks.gather(pairs)
    assert everyone[0] == everyone[1]
    if quant != "none":
        return
    world.whole.set_attn_implementation("sdpa")
    for prompt, response in pairs:  # bf16: no token is much worse than the policy's best
        with torch.no_grad():
            logits = world.whole(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert bool((logits.amax(1) - chosen < 0.1).all())


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(call, cwd, size=TP, limit=300):
    """`call` of this module in `size` processes, as torchrun starts them; returns what they wrote to stderr."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    shared = {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(size):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        environment = os.environ | shared | {k: str(v) for k, v in own.items()}
        command = [sys.executable, "-c", f"import test_sync_ranks as t; t.{call}"]
        with open(cwd / f"rank-{rank}.log", "w") as log:
            ranks.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank in ranks:
            rank.wait(timeout=limit)
    finally:
        for rank in ranks:
            rank.kill()
    texts = [(cwd / f"rank-{rank}.log").read_text() for rank in range(size)]
    assert all(rank.returncode == 0 for rank in ranks), "\n----\n".join(t[-4000:] for t in texts)
    return texts


def one_head_of_k_and_v(folder, to):
    """The model in `folder` with fewer heads of k and v than ranks, saved at `to`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.num_key_value_heads = 1
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    model.save_pretrained(to)
    return str(to)


@pytest.fixture
def left_by_a_killed_run():
    """The shared memory of vLLM's CPU communicator, under its own names: where it uses that (with AVX-512), it fails at
    what it did not make."""
    shared = Path("/dev/shm")
    made = [shared / f"-tp:0-[{'-'.join(map(str, range(TP)))}]-cpushm_{rank}" for rank in range(TP)]
    made = [path for path in made if not path.exists()]
    for path in made:
        path.touch()
    yield
    for path in made:
        path.unlink()


@pytest.mark.usefixtures("left_by_a_killed_run")
def test_shards_into_an_engine_of_two_ranks(make_model, tmp_path):
    """Biases, and a head tied to the embeddings; 200 tokens, of which the second rank has 72."""
    _, folder = make_model("qwen2", tied=True)
    texts = run_ranks(f"in_a_world({folder!r}, ['none', 'fp8', 'fp8-channel'])", tmp_path)
    assert all("every rank agrees" in text for text in texts)


def test_shards_into_an_engine_whose_ranks_hold_the_same_head(make_model, tmp_path):
    """Norms of q and k, a head of its own; parts are whole blocks of 128 x 128."""
    _, folder = make_model("qwen3", tied=False, head_dim=128)
    folder = one_head_of_k_and_v(folder, tmp_path / "model")
    texts = run_ranks(f"in_a_world({folder!r}, ['none', 'fp8', 'fp8-channel', 'fp8-block'])", tmp_path)
    assert all("every rank agrees" in text for text in texts)
