"""The sync against vLLM's own load, byte for byte, and every way in which an engine's weights can be wrong."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import quant_formats
import quant_sync
from quant_sync import VERIFY_EVERY, SyncError, SyncPlan

FP8 = torch.float8_e4m3fn
LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def raw(tensor):
    """A dense tensor's bytes in the order of its memory, whatever its strides: a view."""
    data = tensor.data
    return torch.as_strided(data, (data.numel(),), (1,)).view(torch.uint8)


def snapshot(engine_model):
    return {name: raw(p).clone() for name, p in engine_model.named_parameters()}


def poison(engine_model):
    """NaN in FP8, 3e38 in bf16 and fp32: nothing that a sync leaves behind can look right."""
    for p in engine_model.parameters():
        raw(p).fill_(0x7F)


def noise(like):
    """Standard normal numbers, the same in every run."""
    g = torch.Generator().manual_seed(like.numel())
    return torch.randn(like.shape, generator=g).to(like)


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


# ---- the real engine


class Rig:
    """A policy, vLLM's engine of the same shape, and the plan between them."""

    def __init__(self, model, engine):
        self.policy, self.engine = model.state_dict(), engine
        self.plan = SyncPlan.build(self.policy, engine.model)

    def vllm_load(self):
        """Through vLLM's own loader. It has no online INT8, so there it is given a checkpoint that is INT8 already:
        names, fusion and layout are vLLM's then, the rounding is not."""
        weights = self.policy.items()
        if self.engine.quant == "int8":
            weights = list(int8_checkpoint(self.policy))
        self.engine.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=iter(weights)))


def int8_checkpoint(policy):
    for name, weight in policy.items():
        if ".layers." not in name or not name.endswith("proj.weight"):
            yield name, weight
            continue
        amax = weight.float().abs().amax(1, keepdim=True)
        inverse = torch.where(amax < 1e-30, 0.0, torch.tensor(127.0) / amax)
        yield name, (weight.float() * inverse).round().clamp(-127, 127).to(torch.int8)
        yield f"{name}_scale", amax / torch.tensor(127.0)


CASES = [
    ("qwen2", True, "fp8"),
    ("qwen3", False, "fp8"),
    ("llama", True, "fp8"),
    ("llama", False, "none"),
    ("qwen2", True, "fp8-channel"),
    ("qwen3", True, "fp8-block"),
    ("qwen2", False, "int8"),
]


@pytest.fixture(scope="module", params=CASES, ids=[f"{f}-{'tied' if t else 'untied'}-{q}" for f, t, q in CASES])
def rig(request, make_model, start_engine):
    family, tied, quant = request.param
    # 128-row blocks must not straddle q, k and v
    model, folder = make_model(family, tied=tied, **({"head_dim": 64} if quant == "fp8-block" else {}))
    return Rig(model, start_engine(folder, quant=quant))


@pytest.fixture
def weights(rig):
    """The policy's tensors, put back after the test."""
    before = {name: t.clone() for name, t in rig.policy.items()}
    yield rig.policy
    for name, t in rig.policy.items():
        t.copy_(before[name])


def test_bytes_are_vllms_own_and_stay_where_they_are(rig):
    model = rig.engine.model
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    poison(model)
    rig.plan.sync()
    ours = snapshot(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
    assert rig.plan.verify(full=True) == len(rig.plan.rows)
    poison(model)
    assert len(differing(snapshot(model), ours)) == len(ours)
    rig.vllm_load()
    assert differing(snapshot(model), ours) == []


SCALES = {  # of the engine's parameter [I, O] or, for blocks, [O, I]
    "fp8": lambda shape: ("_scale", (1,)),
    "fp8-channel": lambda shape: ("_scale", (shape[1], 1)),
    "fp8-block": lambda shape: ("_scale_inv", (-(-shape[0] // 128), -(-shape[1] // 128))),
    "int8": lambda shape: ("_scale", (shape[1], 1)),
}


def test_linear_layers_have_the_layout_that_the_table_says(rig):
    quant = rig.engine.quant
    held = dict(rig.engine.model.named_parameters())
    linear = {n: p for n, p in held.items() if n.split(".")[-2] in LINEARS and n.endswith(".weight")}
    assert len(linear) == 2 * len(LINEARS)
    rig.plan.check_formats(quant)
    for name, p in linear.items():
        if quant == "none":
            assert p.dtype == torch.bfloat16 and p.is_contiguous() and f"{name}_scale" not in held
            continue
        suffix, shape = SCALES[quant](p.shape)
        assert p.dtype == (torch.int8 if quant == "int8" else FP8)
        assert p.stride() == ((p.shape[1], 1) if quant == "fp8-block" else (1, p.shape[0]))
        assert held[name + suffix].dtype == torch.float32 and held[name + suffix].shape == shape
    wanted = {"none": set()}.get(quant, set(linear))
    assert {r.name for r in rig.plan.rows if r.format.name != "copy"} == wanted
    other = {"fp8": "fp8-channel"}.get(quant, "fp8")
    with pytest.raises(SyncError, match=rf"--rollout-quant {other}: vLLM built 8 layer\(s\) otherwise: model.layers.0"):
        rig.plan.check_formats(other)


def test_vocabulary_padding_is_zero_and_the_rest_is_the_policys(rig):
    poison(rig.engine.model)
    rig.plan.sync()
    names = [n for n, _ in rig.engine.model.named_parameters() if n in ("model.embed_tokens.weight", "lm_head.weight")]
    tied = rig.policy["lm_head.weight"].data_ptr() == rig.policy["model.embed_tokens.weight"].data_ptr()
    assert len(names) == (1 if tied else 2)
    for name in names:
        held = rig.engine.model.get_parameter(name)
        assert held.shape[0] == 256 and not held[200:].any()
        assert torch.equal(held[:200], rig.policy[name])


def test_changed_policy_is_seen_then_synced(rig, weights):
    rig.plan.sync()
    before = snapshot(rig.engine.model)
    with torch.no_grad():
        for tensor in {t.data_ptr(): t for t in weights.values()}.values():
            tensor.add_(noise(tensor), alpha=0.3)
    with pytest.raises(SyncError, match=rf"^{len(rig.plan.rows)} engine parameter"):
        rig.plan.verify(full=True)
    rig.plan.sync()
    after = snapshot(rig.engine.model)
    assert len(differing(before, after)) == len(after)
    assert rig.plan.verify(full=True) == len(rig.plan.rows)
    rig.vllm_load()
    assert differing(snapshot(rig.engine.model), after) == []


def test_all_zero_matrices_are_vllms_bytes(rig, weights):
    for name in ("self_attn.k_proj", "mlp.down_proj", "self_attn.o_proj"):
        weights[f"model.layers.1.{name}.weight"].zero_()
    poison(rig.engine.model)
    rig.plan.sync()
    ours = snapshot(rig.engine.model)
    rig.plan.verify(full=True)
    rig.vllm_load()
    assert differing(snapshot(rig.engine.model), ours) == []
    if rig.engine.quant == "fp8":
        down = rig.engine.model.get_submodule("model.layers.1.mlp.down_proj")
        assert down.weight_scale.item() == 0 and bool((down.weight.float() == 448).all())


def test_unrepresentable_magnitudes_are_vllms_bytes(rig, weights):
    """A matrix over 2^100, one near 1e-30, and one of bf16 subnormals, where 1 / scale is infinite."""
    down = weights["model.layers.0.mlp.down_proj.weight"]
    down.mul_(torch.exp2(noise(down).float() * 20))
    weights["model.layers.0.self_attn.o_proj.weight"].mul_(1e-30)
    weights["model.layers.1.self_attn.o_proj.weight"].mul_(1e-38)
    rig.plan.sync()
    ours = snapshot(rig.engine.model)
    rig.vllm_load()
    assert differing(snapshot(rig.engine.model), ours) == []


def mapping(*swapped):
    """_source_names with two parts of a fused layer in each other's place."""
    names = quant_sync._source_names

    def wrong(engine_name, packed):
        found = names(engine_name, packed)
        order = dict(zip(swapped, reversed(swapped), strict=True))
        return [".".join(order.get(part, part) for part in name.split(".")) for name in found]

    return wrong


@pytest.mark.parametrize("swapped", [("k_proj", "v_proj"), ("gate_proj", "up_proj")], ids=" and ".join)
def test_a_plan_that_is_wrong_itself_is_proved_wrong_by_vllms_loader(rig, monkeypatch, swapped):
    """sync and verify read the same plan, and agree about it; vLLM's loader does not."""
    if rig.engine.quant == "int8":
        pytest.skip("vLLM does not quantize to INT8")
    assert rig.plan.prove(rig.engine.load_by_vllm) == len(rig.plan.rows)
    monkeypatch.setattr(quant_sync, "_source_names", mapping(*swapped))
    plan = SyncPlan.build(rig.policy, rig.engine.model)
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)
    with pytest.raises(SyncError, match="qkv_proj" if "k_proj" in swapped else "gate_up_proj") as error:
        plan.prove(rig.engine.load_by_vllm)
    assert "norm" not in str(error.value)


# ---- the quantizer against a table of all FP8 numbers


E4M3 = np.array([m / 512 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127])


def reference_fp8(weight, scale):
    """Bytes of fp8(x * (1 / scale)) in float32: the nearest of the 127 magnitudes, ties to the even code."""
    with np.errstate(all="ignore"):
        x = weight.float().numpy() * (np.float32(1) / scale)
    x = np.where(np.isnan(x), np.float32(448), x)  # 0 * (1 / 0), as vLLM's kernel has it
    table = E4M3.astype(np.float32)
    magnitude = np.minimum(np.abs(x), np.float32(448))
    low = np.minimum(np.searchsorted(table, magnitude, side="right") - 1, 125)
    middle = (table[low] + table[low + 1]) / 2  # exact
    up = (magnitude > middle) | ((magnitude == middle) & (low % 2 == 1))
    return (low + up).astype(np.uint8) | (np.signbit(x).astype(np.uint8) << 7)


def test_the_reference_knows_every_fp8_number():
    codes = torch.arange(127, dtype=torch.uint8)
    np.testing.assert_array_equal(codes.view(FP8).float().numpy(), E4M3)
    ties = torch.tensor([[0.9375 + 0.125, 2.0**-10, 3 * 2.0**-10, -460.0]])  # between 1 and 1.125, 0 and 1, 1 and 2
    assert reference_fp8(ties, np.float32(1)).tolist() == [[0x38, 0, 2, 0xFE]]


def matrix(kind, rows=48, columns=64):
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=g)
    if kind == "huge range":
        x *= torch.exp2(torch.randint(-40, 40, x.shape, generator=g).float())
    elif kind == "fp8 subnormal":  # one large element pushes all others below the smallest normal number
        x *= 2.0**-9
        x[0, 0] = 448.0
    elif kind == "ties":  # scale 1, and every value half-way between two FP8 numbers
        middles = torch.from_numpy((E4M3[1:] + E4M3[:-1]) / 2).float()
        x = middles[torch.randint(0, len(middles), x.shape, generator=g)]
        x *= torch.randint(0, 2, x.shape, generator=g) * 2 - 1
        x[0, 0] = 448.0
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "bf16 subnormal":
        x *= 1e-39
    elif kind == "zero":
        x.zero_()
    return x.bfloat16()


KINDS = ["random", "huge range", "fp8 subnormal", "ties", "tiny", "bf16 subnormal", "zero"]


@pytest.mark.parametrize(
    "chunk", [1 << 24, 200, 1], ids=["one chunk", "three rows a chunk", "a row wider than a chunk"]
)
@pytest.mark.parametrize("second", ["random", "zero", None])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_scale_equal_the_reference(monkeypatch, kind, second, chunk):
    monkeypatch.setattr(quant_formats, "CHUNK_ELEMENTS", chunk)
    gate, up = matrix(kind), matrix(second or kind, rows=32)
    engine = nn.Module()
    engine.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    engine.gate_up_proj = fp8_linear(gate.shape[0] + up.shape[0], gate.shape[1])
    poison(engine)
    SyncPlan.build({"gate_proj.weight": gate, "up_proj.weight": up}, engine).sync()
    fused = torch.cat([gate, up])
    scale = np.float32(fused.float().abs().max().item()) / np.float32(448)
    assert engine.gate_up_proj.weight_scale.item() == scale
    np.testing.assert_array_equal(engine.gate_up_proj.weight.t().view(torch.uint8).numpy(), reference_fp8(fused, scale))


def test_the_reciprocal_is_multiplied_where_a_division_would_round_elsewhere():
    """Every bf16 number of 14 binades under every mantissa of the largest: exact ties of x * 448 / amax, which the two
    orders of operations put on different sides."""
    numbers = (torch.arange(128) / 128 + 1)[:, None] * torch.exp2(torch.arange(-13.0, 1.0))
    different = 0
    for amax in numbers[:, -1]:
        weight = torch.where(numbers <= amax, numbers, -amax).bfloat16()
        engine = nn.Module()
        engine.proj = fp8_linear(*weight.shape)
        SyncPlan.build({"proj.weight": weight}, engine).sync()
        scale = np.float32(amax.item()) / np.float32(448)
        held = engine.proj.weight.t()
        np.testing.assert_array_equal(held.view(torch.uint8).numpy(), reference_fp8(weight, scale))
        different += int((held.float() != (weight.float() / torch.tensor(scale)).to(FP8).float()).sum())
    assert different > 0  # or the test could not tell


# ---- a small engine without vLLM: the same names, layouts and fusions

HIDDEN, INNER, TOKENS, PADDED = 32, 48, 50, 64
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def parameter(tensor):
    return nn.Parameter(tensor, requires_grad=False)


def holder(**parameters):
    module = nn.Module()
    for name, tensor in parameters.items():
        module.register_parameter(name, parameter(tensor))
    return module


def fp8_linear(out, width, bias=False):
    """vLLM's per-tensor layout: [I, O] float8 with stride (1, I), and one scale."""
    tensors = {"weight": torch.zeros(out, width, dtype=FP8).t(), "weight_scale": torch.ones(1)}
    return holder(**tensors, **({"bias": torch.zeros(out, dtype=torch.bfloat16)} if bias else {}))


def bf16_holder(*shape):
    return holder(weight=torch.zeros(*shape, dtype=torch.bfloat16))


def vocabulary():
    module = bf16_holder(PADDED, HIDDEN)
    module.num_embeddings_padded = PADDED
    return module


def small_engine():
    """Untied, two layers; q and k have equal shapes, so that swapping them is possible."""
    engine = nn.Module()
    engine.packed_modules_mapping = PACKED
    engine.model, engine.lm_head = nn.Module(), vocabulary()
    engine.model.embed_tokens, engine.model.norm = vocabulary(), bf16_holder(HIDDEN)
    engine.model.layers = nn.ModuleList()
    for _ in range(2):
        layer = nn.Module()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        layer.self_attn.qkv_proj = fp8_linear(3 * HIDDEN, HIDDEN, bias=True)
        layer.self_attn.o_proj = fp8_linear(HIDDEN, HIDDEN)
        layer.mlp.gate_up_proj = fp8_linear(2 * INNER, HIDDEN)
        layer.mlp.down_proj = fp8_linear(HIDDEN, INNER)
        layer.input_layernorm = bf16_holder(HIDDEN)
        engine.model.layers.append(layer)
    return engine


def small_policy():
    g = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (TOKENS, HIDDEN), "lm_head.weight": (TOKENS, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for i in range(2):
        layer = f"model.layers.{i}"
        for part in "qkv":
            shapes[f"{layer}.self_attn.{part}_proj.weight"] = (HIDDEN, HIDDEN)
            shapes[f"{layer}.self_attn.{part}_proj.bias"] = (HIDDEN,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
    return {name: (torch.randn(shape, generator=g) * 0.2 + 0.3).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def small():
    """(policy, engine, plan), not yet synced."""
    policy, engine = small_policy(), small_engine()
    return policy, engine, SyncPlan.build(policy, engine)


QKV = "model.layers.0.self_attn.qkv_proj"
GATE_UP = "model.layers.1.mlp.gate_up_proj"
DOWN = "model.layers.1.mlp.down_proj"
NORM = "model.layers.0.input_layernorm.weight"


def swap(rows, size, first=0, second=1):
    """Exchange two blocks of `size` rows, as bytes."""
    rows = rows.view(torch.uint8)
    a, b = (rows[i * size : (i + 1) * size] for i in (first, second))
    a[:], b[:] = b.clone(), a.clone()


def stale_scale(policy, engine, plan):
    scale = engine.get_parameter(f"{DOWN}.weight_scale")
    scale.copy_(torch.nextafter(scale, torch.ones(1)))


def wrong_byte(policy, engine, plan):
    rows = raw(engine.get_parameter(f"{GATE_UP}.weight"))
    rows[-1] = (
        0x00 if rows[-1] & 0x7F > 0x10 else 0x7E
    )  # the last element of up_proj: zero, or 448 if it was nearly zero


def sign_flipped(policy, engine, plan):
    rows = raw(engine.get_parameter(f"{QKV}.weight"))
    largest = int((rows & 0x7F).argmax())
    rows[largest] ^= 0x80


def nan_byte(policy, engine, plan):
    raw(engine.get_parameter(f"{DOWN}.weight"))[5] = 0x7F


def layer_skipped(policy, engine, plan):
    """The policy has moved and one matrix, with its scale, was not written."""
    names = (f"{DOWN}.weight", f"{DOWN}.weight_scale")
    old = {name: raw(engine.get_parameter(name)).clone() for name in names}
    for tensor in policy.values():
        tensor.add_(noise(tensor), alpha=0.1)
    plan.sync()
    for name, data in old.items():
        raw(engine.get_parameter(name)).copy_(data)


def layer_skipped_same_scale(policy, engine, plan):
    """As above, but the largest weight has not moved, so that the old scale is also the new one."""
    weight = policy[f"{DOWN}.weight"]
    weight[3, 3] = 4.0
    plan.sync()
    old = raw(engine.get_parameter(f"{DOWN}.weight")).clone()
    weight.neg_()
    plan.sync()
    raw(engine.get_parameter(f"{DOWN}.weight")).copy_(old)


def gate_and_up_swapped(policy, engine, plan):
    swap(engine.get_parameter(f"{GATE_UP}.weight").data.t(), INNER)


def q_and_k_swapped(policy, engine, plan):
    swap(engine.get_parameter(f"{QKV}.weight").data.t(), HIDDEN)


def matrix_transposed(policy, engine, plan):
    held = engine.get_parameter("model.layers.0.self_attn.o_proj.weight").data  # square
    held.copy_(held.t().clone())


def head_not_written(policy, engine, plan):
    """As if the engine had a head of its own beside the tied embedding."""
    engine.get_parameter("lm_head.weight").copy_(engine.get_parameter("model.embed_tokens.weight"))


def k_and_v_bias_swapped(policy, engine, plan):
    swap(engine.get_parameter(f"{QKV}.bias").data.view(-1, 1), HIDDEN, 1, 2)


def bias_not_written(policy, engine, plan):
    engine.get_parameter(f"{QKV}.bias").zero_()


def norm_not_written(policy, engine, plan):
    engine.get_parameter(NORM).fill_(1)


def one_ulp_of_a_norm(policy, engine, plan):
    engine.get_parameter(NORM).view(torch.int16)[7] += 1


def padding_not_zero(policy, engine, plan):
    engine.get_parameter("lm_head.weight")[TOKENS + 1, 3] = 1e-6


def padding_nan(policy, engine, plan):
    engine.get_parameter("model.embed_tokens.weight")[-1, -1] = float("nan")


def token_row_lost(policy, engine, plan):
    engine.get_parameter("model.embed_tokens.weight")[TOKENS - 1] = 0


def not_finite(name, value):
    def fault(policy, engine, plan):
        policy[name].view(-1)[11] = value
        plan.sync()

    return fault


INF, NAN = float("inf"), float("nan")
FAULTS = {
    "stale scale, by one ulp": (stale_scale, f"{DOWN}.weight"),
    "one byte wrong": (wrong_byte, f"{GATE_UP}.weight"),
    "one sign wrong": (sign_flipped, f"{QKV}.weight"),
    "one byte NaN": (nan_byte, f"{DOWN}.weight"),
    "layer skipped": (layer_skipped, f"{DOWN}.weight"),
    "layer skipped, same scale": (layer_skipped_same_scale, f"{DOWN}.weight"),
    "gate and up swapped": (gate_and_up_swapped, f"{GATE_UP}.weight"),
    "q and k swapped": (q_and_k_swapped, f"{QKV}.weight"),
    "a matrix transposed": (matrix_transposed, "model.layers.0.self_attn.o_proj.weight"),
    "head not written": (head_not_written, "lm_head.weight"),
    "k and v bias swapped": (k_and_v_bias_swapped, f"{QKV}.bias"),
    "bias not written": (bias_not_written, f"{QKV}.bias"),
    "norm not written": (norm_not_written, NORM),
    "norm, by one ulp": (one_ulp_of_a_norm, NORM),
    "padded row not zero": (padding_not_zero, "lm_head.weight"),
    "padded row NaN": (padding_nan, "model.embed_tokens.weight"),
    "last token lost": (token_row_lost, "model.embed_tokens.weight"),
    "NaN in an fp8 row": (not_finite("model.layers.0.self_attn.v_proj.weight", NAN), f"{QKV}.weight"),
    "inf in an fp8 row": (not_finite("model.layers.0.self_attn.v_proj.weight", -INF), f"{QKV}.weight"),
    "NaN in a copy row": (not_finite("model.norm.weight", NAN), "model.norm.weight"),
    "inf in a copy row": (not_finite("model.norm.weight", INF), "model.norm.weight"),
}


@pytest.mark.parametrize(("fault", "name"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found_and_named(small, fault, name):
    policy, engine, plan = small
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)
    with torch.no_grad():
        fault(policy, engine, plan)
    with pytest.raises(SyncError, match=r"^1 engine parameter\(s\) do not hold the policy's weights") as error:
        plan.verify(full=True)
    assert f"{name}: " in str(error.value)
    for tensor in policy.values():
        tensor.nan_to_num_(0.5, 0.5, 0.5)
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)


@pytest.mark.parametrize("value", [NAN, INF])
def test_the_message_says_which_weight_is_not_finite(small, value):
    policy, _, plan = small
    policy["model.layers.0.self_attn.v_proj.weight"][0, 0] = value
    plan.sync()
    with pytest.raises(SyncError, match=r"model\.layers\.0\.self_attn\.v_proj\.weight is not finite"):
        plan.verify(full=True)


def test_a_sync_leaves_no_byte_behind(small):
    _, engine, plan = small
    plan.sync()
    expected = snapshot(engine)
    poison(engine)
    plan.sync()
    assert differing(snapshot(engine), expected) == []


def test_an_engine_that_was_never_synced_fails_everywhere(small):
    _, _, plan = small
    with pytest.raises(SyncError, match=rf"^{len(plan.rows)} engine parameter.*and {len(plan.rows) - 5} more$"):
        plan.verify(full=True)


# ---- verify's rotation


def caught(plan, turn):
    try:
        plan.verify(turn=turn)
    except SyncError:
        return True
    return False


def test_every_byte_has_its_turn(small):
    """One element wrong, in the first, a middle and the last row of every parameter: found in one turn at least of any
    VERIFY_EVERY in a row, and by name."""
    _, _, plan = small
    plan.sync()
    for row in plan.rows:
        for at in {0, row.dest.shape[0] // 2 + 1, row.dest.shape[0] - 1}:
            element = row.dest[at].view(-1)[-1:].view(torch.uint8)
            element ^= 1
            turns = [t for t in range(100, 100 + VERIFY_EVERY) if caught(plan, t)]
            assert len(turns) >= 1, (row.name, at)
            with pytest.raises(SyncError, match=re.escape(row.name)):
                plan.verify(turn=turns[0])
            element ^= 1
    assert not any(caught(plan, t) for t in range(VERIFY_EVERY))


def test_a_stale_layer_is_found_in_any_turn(small):
    """Not in its turn only: every matrix has a row to compare in each, even with a scale of its own time."""
    policy, _, plan = small
    plan.sync()
    with torch.no_grad():
        policy[f"{DOWN}.weight"].add_(noise(policy[f"{DOWN}.weight"]), alpha=0.3)
    assert all(caught(plan, t) for t in range(VERIFY_EVERY))


def test_a_scale_that_its_bytes_agree_with_is_found_in_its_turn(small):
    """All bytes are right under the engine's scale, which is not the policy's: too large by an overlooked maximum."""
    _, _, plan = small
    plan.sync()
    row = next(r for r in plan.rows if r.name == f"{DOWN}.weight")
    weight = row.sources[0].tensor
    row.scale.mul_(2)
    row.dest.copy_(quant_formats.FP8_TENSOR.quantize(weight, row.scale))
    assert sum(caught(plan, t) for t in range(VERIFY_EVERY)) == 1
    with pytest.raises(SyncError, match=r"the engine's scale is .* ask for"):
        plan.verify(full=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_in_any_turn(small, value):
    policy, _, plan = small
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.norm.weight", "model.embed_tokens.weight"):
        before = policy[name].clone()
        policy[name].view(-1)[3] = value
        plan.sync()
        for turn in range(VERIFY_EVERY):
            with pytest.raises(SyncError, match=rf"the policy's {re.escape(name)} is not finite"):
                plan.verify(turn=turn)
        policy[name].copy_(before)
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)


# ---- what cannot be planned


def refused(policy, engine, *words):
    with pytest.raises(SyncError) as error:
        SyncPlan.build(policy, engine)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("missing", "parameter_name"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.qkv_proj.weight"),
        ("model.layers.0.self_attn.v_proj.bias", "model.layers.0.self_attn.qkv_proj.bias"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_build_names_a_missing_tensor(missing, parameter_name):
    policy = small_policy()
    del policy[missing]
    refused(policy, small_engine(), f"{parameter_name} (no {missing} in the policy)", "1 engine parameter(s)")


def test_build_names_an_extra_tensor():
    policy = small_policy()
    policy["model.layers.0.self_attn.q_norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    refused(policy, small_engine(), "1 policy tensor(s)", "model.layers.0.self_attn.q_norm.weight")


def test_tied_names_of_one_tensor_are_not_extra():
    """An HF state dict lists a tied head twice; the engine holds it once."""
    engine, policy = small_engine(), small_policy()
    del engine.lm_head
    policy["lm_head.weight"] = policy["model.embed_tokens.weight"]
    plan = SyncPlan.build(policy, engine)
    plan.sync()
    assert torch.equal(engine.model.embed_tokens.weight[:TOKENS], policy["lm_head.weight"])
    policy["lm_head.weight"] = policy["lm_head.weight"].clone()  # no longer tied: its own values would be lost
    refused(policy, engine, "1 policy tensor(s)", "lm_head.weight")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.k_proj.weight", (HIDDEN // 2, HIDDEN)),  # too few rows: not a padded vocabulary
        ("model.layers.0.mlp.down_proj.weight", (INNER, HIDDEN)),
        ("model.layers.0.mlp.up_proj.weight", (INNER, HIDDEN + 1)),
        ("model.embed_tokens.weight", (PADDED + 1, HIDDEN)),
        ("model.norm.weight", (HIDDEN + 1,)),
        ("model.norm.weight", (HIDDEN - 1,)),
    ],
)
def test_build_names_a_wrong_shape(name, shape):
    policy = small_policy()
    policy[name] = torch.ones(shape, dtype=torch.bfloat16)
    refused(policy, small_engine(), f"{name} {shape}", "does not fit")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_build_names_a_wrong_dtype(name, dtype):
    policy = small_policy()
    policy[name] = policy[name].to(dtype)
    refused(policy, small_engine(), name, str(dtype), "bf16")


def replace_weight(module, **tensors):
    for name, tensor in tensors.items():
        if tensor is None:
            delattr(module, name)
        else:
            setattr(module, name, parameter(tensor))


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight_scale": torch.ones(HIDDEN // 2, 1)},
        {"weight_scale": torch.ones(HIDDEN, 1, dtype=torch.bfloat16)},
        {"weight_scale": None},
        {"weight": torch.zeros(INNER, HIDDEN, dtype=FP8)},  # not transposed in memory
        {"weight": torch.zeros(INNER, HIDDEN, dtype=torch.int8)},
    ],
    ids=["a scale for two channels", "a bf16 scale", "no scale", "row-major", "int8"],
)
def test_build_names_an_unknown_layout(tensors):
    engine = small_engine()
    replace_weight(engine.get_submodule(DOWN), **tensors)
    refused(small_policy(), engine, f"{DOWN}.weight")


# ---- an engine that changed under the plan


def by_setattr(module, leaf):
    setattr(module, leaf, parameter(getattr(module, leaf).data.clone()))


def by_data(module, leaf):
    getattr(module, leaf).data = getattr(module, leaf).data.clone()


def by_deleting(module, leaf):
    delattr(module, leaf)


@pytest.mark.parametrize("replace", [by_setattr, by_data, by_deleting])
@pytest.mark.parametrize("name", [f"{QKV}.weight", f"{QKV}.weight_scale", f"{QKV}.bias", NORM])
def test_sync_refuses_a_parameter_that_was_replaced(small, replace, name):
    policy, engine, plan = small
    plan.sync()
    path, _, leaf = name.rpartition(".")
    replace(engine.get_submodule(path), leaf)
    before = snapshot(engine)
    for tensor in policy.values():
        tensor.add_(1)
    with pytest.raises(SyncError, match=rf"^{name.replace('.', '[.]')} was replaced or moved"):
        plan.sync()
    assert differing(snapshot(engine), before) == []  # refused before the first byte
