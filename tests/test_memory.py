"""memory.py: sizes counted by hand, the choice of the sleep level, and what a run that cannot fit is told."""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import packing
import parts
import train
from config import Args
from data import Example, Prompt
from lora import LoraSettings
from memory import (
    GIB,
    GRAPHS,
    GRAPHS_LAYER,
    GRAPHS_WIDTH,
    HOST_USABLE,
    LIBRARIES,
    LOGPROB_TOKENS,
    MICRO_BATCH_CHOICES,
    NCCL,
    PREFILL_TOKENS,
    USABLE,
    MemoryLog,
    MemoryPlanError,
    activation_bytes,
    host_memory,
    logprob_tokens,
    model_sizes,
    most_seen,
    plan_memory,
    sequences_at_once,
    sharding_bytes,
    sync_bytes,
)
from policy import Policy
from quant_sync import STAGING_BYTES
from rollout import Group, Sample
from weight_sources import PACK_BYTES

# Qwen2.5-1.5B by hand, from its published config: H 1536, I 8960, 28 layers, 12 heads and 2 KV heads of 128, V 151936.
H, INTERMEDIATE, LAYERS, KV, V = 1536, 8960, 28, 2 * 128, 151936
LINEAR = LAYERS * (H * H + 2 * KV * H + H * H + 3 * H * INTERMEDIATE)  # q, k and v, o, gate up down: 1,310,195,712
SMALL = LAYERS * (H + 2 * KV + 2 * H) + H  # q k v biases, two norms a layer, the last norm
PARAMETERS = V * H + LINEAR + SMALL  # the head is tied: 1,543,714,304
KV_TOKEN = LAYERS * 2 * KV * 2  # bytes: k and v in bf16: 28,672
STATE = PARAMETERS * (2 + 4 + 4 + 4 + 4)  # bf16 weight; fp32 gradient, master, two moments: 25.9 GiB
LENGTH = 512 + 1024
RUN = dict(
    one_byte_weights=LINEAR,
    max_model_len=LENGTH,
    max_num_seqs=128,
    micro_batch_tokens=16384,
    checkpointing=True,
    offload=False,
    sleep="auto",
)
ONE_SEQUENCE = KV_TOKEN * LENGTH
FLAGS = ("--model", "--max-response-len", "--max-num-seqs", "--micro-batch-tokens", "--gradient-checkpointing")


@pytest.fixture(scope="module")
def sizes():
    config = Qwen2Config(
        hidden_size=H,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=V,
        tie_word_embeddings=True,
    )
    return model_sizes(config)


def plan(sizes, gib, **changes):
    return plan_memory(sizes, free=int(gib * GIB), **(RUN | changes))


# ---- counting


def test_sizes_of_qwen_1_5b_by_hand(sizes):
    assert (PARAMETERS, LINEAR, KV_TOKEN) == (1_543_714_304, 1_310_195_712, 28_672)
    assert (sizes.parameters, sum(sizes.linear_layers.values()), sizes.kv_bytes_per_token) == (
        PARAMETERS,
        LINEAR,
        KV_TOKEN,
    )
    assert (sizes.layers, sizes.hidden, sizes.intermediate, sizes.vocab) == (LAYERS, H, INTERMEDIATE, V)
    assert (sizes.query, sizes.key, sizes.norms_of_heads) == (H, KV, False)


SMALL_SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "more"), [(Qwen2Config, {}), (Qwen3Config, {"head_dim": 32}), (LlamaConfig, {})], ids=lambda x: str(x)
)
def test_sizes_are_those_of_the_model_itself(family, more, tied):
    config = family(**SMALL_SHAPE, **more, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    counted = model_sizes(config)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(counted.linear_layers.values()) == sum(m.weight.numel() for m in linear)
    cache = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert counted.kv_bytes_per_token * 5 == held


def test_the_plans_bytes_by_hand(sizes):
    big = plan(sizes, 139)
    assert big.training_state == STATE == 27_786_857_472
    assert big.engine_weights == LINEAR + 2 * (PARAMETERS - LINEAR)  # a byte each in FP8, two for the rest
    assert plan(sizes, 139, one_byte_weights=0).engine_weights == 2 * PARAMETERS
    assert (
        128 * ONE_SEQUENCE <= big.kv_wanted <= 128 * KV_TOKEN * (LENGTH + 128)
    )  # full sequences, rounded up to blocks
    assert (big.policy, big.gradients, big.optimizer) == (2 * PARAMETERS, 4 * PARAMETERS, 12 * PARAMETERS)
    assert big.engine_graphs == GRAPHS + LAYERS * GRAPHS_LAYER + H * GRAPHS_WIDTH
    assert big.engine_workspace == 2 * PREFILL_TOKENS * (3 * INTERMEDIATE + 2 * H)  # more than 128 sequences' logits
    assert plan(sizes, 139, max_num_seqs=2048).engine_workspace == 6 * 2048 * V
    assert big.engine == big.engine_weights + big.engine_graphs + big.engine_workspace + big.kv_cache
    assert plan(sizes, 139, kv_cache_gib=3.5).kv_cache == int(3.5 * GIB)


@pytest.mark.parametrize(
    ("compiled", "tokens", "measured"),
    [(True, 15950, 58.8), (True, 28700, 83.3), (False, 15950, 71.4), (False, 28700, 106.0)],
)
def test_activations_are_what_was_measured_at_the_1_5b_shape(sizes, compiled, tokens, measured):
    """torch's peak on an H200, GiB: weights, gradients and optimizer, and a packed micro-batch of that many tokens."""
    predicted = STATE + activation_bytes(sizes, tokens, checkpointing=False, compiled=compiled)
    assert predicted / GIB == pytest.approx(measured, rel=0.02)


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing(sizes):
    kept = {n: plan(sizes, 400, micro_batch_tokens=n, checkpointing=False).training_peak for n in (4096, 8192, 16384)}
    assert kept[16384] - kept[8192] == 2 * (kept[8192] - kept[4096]) > 0  # linear beside a constant
    recomputed = plan(sizes, 400, micro_batch_tokens=16384).training_peak
    one_hidden_state_a_layer = 16384 * H * 2 * LAYERS
    assert one_hidden_state_a_layer < recomputed < kept[16384] / 2


# ---- choosing


def test_on_139_gib_nothing_sleeps(sizes):
    big = plan(sizes, 139)
    assert big.sleep_level == 0
    assert big.kv_cache == big.kv_wanted
    built = LIBRARIES + big.engine_weights + big.engine_graphs + big.kv_cache
    phases = ("engine", "policy", "rollout", "train")
    assert [big.used(phase) - built - (phase != "engine") * STATE for phase in phases] == [
        0, 0, big.engine_workspace, big.training_peak,
    ]  # fmt: skip
    assert big.peak == big.used("train") <= USABLE * big.free
    assert big.reasons["--sleep"] == "fits: nothing sleeps"


def test_on_40_gib_the_engine_sleeps_at_level_2_and_says_why(sizes):
    small = plan(sizes, 40)
    assert small.sleep_level == 2
    assert small.reasons["--sleep"].startswith(f"saves {(small.engine_weights + small.kv_cache) / GIB:.1f} GiB")
    awake = LIBRARIES + small.engine + small.training_state  # beside weights and optimizer
    asleep = LIBRARIES + small.engine_graphs + small.training_state + small.training_peak  # beside the activations
    assert (small.used("rollout"), small.used("train")) == (awake, asleep)
    assert max(awake, asleep) <= USABLE * small.free


def test_the_kv_cache_shrinks_with_the_memory_but_never_below_one_sequence(sizes):
    caches = {}
    for tenth in range(300, 500):
        try:
            got = plan(sizes, tenth / 10, max_num_seqs=512)
        except MemoryPlanError:
            assert not caches, f"{tenth / 10} GiB does not fit, though less did"
            continue
        caches[tenth / 10] = got.kv_cache
        assert ONE_SEQUENCE <= got.kv_cache <= got.kv_wanted
        assert got.used("rollout") <= USABLE * got.free
    assert list(caches.values()) == sorted(caches.values())
    assert caches[min(caches)] < 512 * ONE_SEQUENCE / 2, "the sweep never reached a shrunken cache"


def test_on_16_gib_it_does_not_fit_and_the_message_names_what_helps(sizes):
    with pytest.raises(MemoryPlanError) as error:
        plan(sizes, 16)
    message = str(error.value)
    assert [flag for flag in FLAGS if flag not in message] == []
    assert "17.3 GiB" in message and "16.0 GiB" in message  # what takes most, and what there is


@pytest.mark.parametrize("level", ["0", "1", "2"])
def test_a_forced_level_is_respected(sizes, level):
    for gib in (139, 50):
        forced = plan(sizes, gib, sleep=level, max_num_seqs=16)
        assert forced.sleep_level == int(level)
        assert forced.reasons["--sleep"] == "asked for"


def test_a_forced_level_0_leaves_room_for_training_or_fails(sizes):
    tight = plan(sizes, 46, sleep="0", max_num_seqs=512)
    assert tight.kv_cache < tight.kv_wanted
    assert tight.used("train") <= USABLE * tight.free
    with pytest.raises(MemoryPlanError, match="--sleep 2"):
        plan(sizes, 35, sleep="0")
    assert plan(sizes, 35, sleep="2").sleep_level == 2


@pytest.mark.parametrize(
    ("gib", "level", "checkpointing", "tokens"),
    [(139, 0, False, 16384), (79, 0, False, 8192), (60, 0, True, 16384), (47, 2, False, 4096), (34, 2, True, 8192)],
)
def test_what_is_left_open_is_chosen_by_what_it_costs(sizes, gib, level, checkpointing, tokens):
    """The README's command on the usual cards: first smaller micro-batches, then recomputing, then sleep."""
    got = plan(sizes, gib, micro_batch_tokens=None, checkpointing=None, max_num_seqs=512)
    assert (got.sleep_level, got.checkpointing, got.micro_batch_tokens) == (level, checkpointing, tokens)
    assert max(got.used("train"), got.used("rollout")) <= USABLE * got.free


def test_what_was_asked_for_is_kept(sizes):
    for tokens, checkpointing in ((2000, True), (LENGTH, False), (100_000, True)):
        got = plan(sizes, 139, micro_batch_tokens=tokens, checkpointing=checkpointing)
        assert (got.checkpointing, got.micro_batch_tokens) == (checkpointing, tokens)


def test_a_micro_batch_holds_a_full_sequence_and_is_counted_with_it(sizes):
    """A budget below one sequence would be refused when the first long response is trained on."""
    got, longest = (plan(sizes, 139, micro_batch_tokens=tokens) for tokens in (LENGTH - 1, LENGTH))
    assert got.micro_batch_tokens == LENGTH and got.training_peak == longest.training_peak
    open_choice = dict(micro_batch_tokens=None, checkpointing=None, max_num_seqs=16)
    chosen = set()
    for tenth in range(300, 1000):
        try:
            chosen.add(plan(sizes, tenth / 10, max_model_len=6000, **open_choice).micro_batch_tokens)
        except MemoryPlanError:
            assert not chosen, f"{tenth / 10} GiB does not fit, though less did"
    assert chosen == {6000, *MICRO_BATCH_CHOICES[:2]}
    assert plan(sizes, 139, max_model_len=20_000, **open_choice).micro_batch_tokens == 20_000


# ---- the printed table


def lines_of(memory_plan) -> tuple[dict[str, float], dict[str, str]]:
    """(GiB of each row, reason of each flag and its value) of a printed plan."""
    lines = memory_plan.table().splitlines()
    rows = {line[:42].strip(): float(line.split()[-2]) for line in lines if line.endswith(" GiB")}
    flags = {line[:34].strip(): line[34:] for line in lines if line.startswith("  --")}
    assert len(lines) == 1 + len(rows) + len(flags)
    return rows, flags


def test_the_table_has_a_row_for_each_part_and_each_choice_has_its_reason(sizes):
    open_choices = dict(micro_batch_tokens=None, checkpointing=None, offload=None, max_num_seqs=512)
    rows, flags = lines_of(plan(sizes, 24, **open_choices))
    assert rows == {
        "engine weights": 1.7,
        "KV cache (wanted 21.2)": 9.6,
        "CUDA graphs, the engine's buffers": 1.1,
        "workspace while generating": 0.9,
        "libraries": 0.6,
        "policy": 2.9,
        "gradients": 5.8,
        "optimizer, on its way from the host": 0.6,
        "activations, logits of a micro-batch": 10.1,
        "most in use: generating": 23.0,
        "training": 21.0,
        "free on the device": 24.0,
    }
    assert flags == {
        "--sleep 2": "saves 11.2 GiB while the policy trains; 20.9 GiB short if the engine stayed, with all of its KV "
        "cache",
        "--offload-optimizer True": "saves 16.7 GiB (17.3 in host memory); 14.7 GiB short without",
        "--gradient-checkpointing False": "fits",
        "--micro-batch-tokens 4096": "saves 7.8 GiB; 5.8 GiB short with 8192",
        "--kv-cache-gib 9.6": "what is left, of 21.2 wanted: room for 230 of 512 sequences at full length",
    }
    rows, flags = lines_of(plan(sizes, 139, **open_choices))
    assert rows["optimizer: master, Adam"] == 17.3
    assert flags == {
        "--sleep 0": "fits: nothing sleeps",
        "--offload-optimizer False": "fits",
        "--gradient-checkpointing False": "fits",
        "--micro-batch-tokens 16384": "fits",
        "--kv-cache-gib 21.2": "fits: 512 sequences at full length",
    }


def test_what_was_asked_for_says_so_unless_it_could_not_be_had(sizes):
    asked = dict(sleep="2", micro_batch_tokens=4000, checkpointing=True, offload=True, kv_cache_gib=3.0)
    assert set(lines_of(plan(sizes, 139, **asked))[1].values()) == {"asked for"}
    flags = lines_of(plan(sizes, 40, **asked | {"micro_batch_tokens": 100, "kv_cache_gib": 60.0}))[1]
    assert flags["--micro-batch-tokens 1536"] == "one full sequence; 100 were asked for"
    assert flags["--kv-cache-gib 24.9"] == (
        "what is left, of 60.0 asked for: room for 128 of 128 sequences at full length"
    )
    eight = lines_of(plan(sizes, 139, optimizer_states="8bit", offload=None))[1]
    assert eight["--offload-optimizer False"] == "8-bit moments stay on the GPU"
    long = lines_of(plan(sizes, 139, max_model_len=20_000, micro_batch_tokens=None, max_num_seqs=16))[1]
    assert long["--micro-batch-tokens 20000"] == "one full sequence"


@pytest.mark.parametrize("gib", [22, 24, 30, 34, 40, 47, 60, 79])
def test_what_a_reason_says_is_short_is_short(sizes, gib):
    """Each choice that costs something taken back by itself: the run then wants as much more as its reason says."""
    open_choices = dict(micro_batch_tokens=None, checkpointing=None, offload=None, max_num_seqs=512)
    got = plan(sizes, gib, **open_choices)
    said = {flag.split()[0]: float(why.split(" GiB short")[0].rsplit(" ", 1)[1])
            for flag, why in lines_of(got)[1].items() if "short" in why}  # fmt: skip
    chosen = {"micro_batch_tokens": got.micro_batch_tokens, "checkpointing": got.checkpointing, "offload": got.offload,
              "sleep": str(got.sleep_level)}  # fmt: skip
    larger = {4096: 8192, 8192: 16384, 16384: None}[got.micro_batch_tokens]
    back = {
        "--sleep": {"sleep": "0", "kv_cache_gib": got.kv_wanted / GIB} if got.sleep_level else None,
        "--offload-optimizer": {"offload": False} if got.offload else None,
        "--gradient-checkpointing": {"checkpointing": False} if got.checkpointing else None,
        "--micro-batch-tokens": {"micro_batch_tokens": larger} if larger else None,
    }
    assert said.keys() == {flag for flag, change in back.items() if change}
    for flag, change in back.items():
        if change is None:
            continue
        run = RUN | open_choices | chosen | change
        enough = next(
            gib + tenth / 10
            for tenth in range(1000)
            if fits_with_all_its_cache(sizes, gib + tenth / 10, run, all_of_it=run["sleep"] == "0")
        )
        assert enough - gib == pytest.approx(said[flag] / USABLE, abs=0.2), flag
        assert said[flag] > 0


def fits_with_all_its_cache(sizes, gib, run, all_of_it) -> bool:
    try:
        got = plan_memory(sizes, free=int(gib * GIB), **run)
    except MemoryPlanError:
        return False
    return got.kv_cache == got.kv_wanted or not all_of_it


# ---- the usual shapes on the usual cards


def shape(name):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
    from make_random_model import shape_config

    return shape_config(name)


@pytest.mark.parametrize(
    ("name", "gib", "chosen"),
    [  # sleep level, offload, recompute, tokens
        ("qwen2.5-0.5b", 24, (0, False, True, 8192)),
        ("qwen2.5-0.5b", 40, (0, False, False, 16384)),
        ("qwen2.5-0.5b", 80, (0, False, False, 16384)),
        ("qwen2.5-0.5b", 139, (0, False, False, 16384)),
        ("qwen2.5-1.5b", 24, (2, True, False, 4096)),
        ("qwen2.5-1.5b", 40, (2, False, False, 4096)),
        ("qwen2.5-1.5b", 80, (0, False, False, 8192)),
        ("qwen2.5-1.5b", 139, (0, False, False, 16384)),
        ("qwen2.5-7b", 24, "32.3 GiB short of 23.0"),
        ("qwen2.5-7b", 40, "17.0 GiB short of 38.4"),
        ("qwen2.5-7b", 80, (2, True, False, 4096)),
        ("qwen2.5-7b", 139, (0, True, False, 4096)),
    ],
)
def test_with_all_choices_open_the_usual_cards_get(name, gib, chosen):
    s = model_sizes(shape(name))
    run = RUN | dict(
        one_byte_weights=sum(s.linear_layers.values()), max_num_seqs=512, micro_batch_tokens=None, checkpointing=None,
        offload=None, host_free=120 * GIB,
    )  # fmt: skip
    if isinstance(chosen, str):
        with pytest.raises(MemoryPlanError, match=chosen):
            plan_memory(s, free=gib * GIB, **run)
        return
    got = plan_memory(s, free=gib * GIB, **run)
    assert (got.sleep_level, got.offload, got.checkpointing, got.micro_batch_tokens) == chosen
    assert all(got.used(phase) <= USABLE * gib * GIB for phase in ("engine", "policy", "rollout", "train"))
    assert got.host <= HOST_USABLE * run["host_free"]


MEASURED = {  # H200, vLLM 0.26: the run; GiB used with the engine built, policy too, generating, training once
    "0.5B": (
        dict(shape="qwen2.5-0.5b", length=768, sequences=512, tokens=16384), (6.8, 14.9, 15.2, 31.6),
    ),
    "0.5B, bf16 rollouts": (
        dict(shape="qwen2.5-0.5b", length=768, sequences=512, tokens=16384, one_byte=False), (7.2, 15.3, 15.8, 32.1),
    ),
    "0.5B, few sequences, asleep": (  # its 32 short samples fill no micro-batch: no figure for training
        dict(shape="qwen2.5-0.5b", length=96, sequences=64, tokens=16384, sleep="2", kv=2.0), (4.1, 12.4, 12.4, None),
    ),
    "1.5B": (
        dict(shape="qwen2.5-1.5b", length=320, sequences=512, tokens=16384), (8.0, 33.9, 34.1, 67.3),
    ),
    "1.5B, 24 GiB": (
        dict(shape="qwen2.5-1.5b", length=320, sequences=512, tokens=4096, sleep="2", offload=True, free=24),
        (7.9, 16.9, 17.2, 20.3),
    ),
    "7B": (
        dict(shape="qwen2.5-7b", length=320, sequences=512, tokens=8192, offload=True), (19.4, 62.6, 62.9, 101.5),
    ),
    # Its weights were made on the GPU before the engine (scripts/train_random.py): 61.0 GiB of 130.3. Its samples have
    # 1,024 tokens and a short prompt, so that three fill a micro-batch of 4,096. It was planned with less beside the
    # KV cache, and used more than is usable here.
    "32B, LoRA 32": (
        dict(shape="qwen3-32b", length=1536, sequences=128, tokens=3150, sleep="2", rank=32, kv=34.0, free=150),
        (130.3 - 61.0, 136.0, 136.2, 119.2),
    ),
    "0.5B, two GPUs": (
        dict(shape="qwen2.5-0.5b", length=768, sequences=512, tokens=16384, world=2), (7.4, 12.3, 12.6, 33.5),
    ),
    "1.5B, two GPUs": (  # 10.6 with the engine built: most of the communicators' memory comes later
        dict(shape="qwen2.5-1.5b", length=512, sequences=512, tokens=16384, world=2), (None, 25.5, 25.8, 70.1),
    ),
    # Its weights, too, were made whole on each GPU before the engine: no figure for that.
    "14B, one engine on two GPUs": (
        dict(shape="qwen3-14b", length=1536, sequences=64, tokens=None, checkpointing=None, states="bf16", world=2,
             tp=2),
        (None, 117.0, 117.0, 130.6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_what_runs_really_used_is_what_their_plans_say(name):
    run, used = MEASURED[name]
    s = model_sizes(shape(run["shape"]), lora=LoraSettings(run["rank"], 64.0) if "rank" in run else None)
    got = plan_memory(
        s, free=int(run.get("free", 139.3) * GIB), max_model_len=run["length"], max_num_seqs=run["sequences"],
        one_byte_weights=sum(s.linear_layers.values()) if run.get("one_byte", True) else 0,
        micro_batch_tokens=run["tokens"], checkpointing=run.get("checkpointing", False),
        offload=run.get("offload", False), sleep=run.get("sleep", "auto"), kv_cache_gib=run.get("kv"),
        optimizer_states=run.get("states", "fp32"), world=run.get("world", 1), tp=run.get("tp", 1),
    )  # fmt: skip
    for phase, most in zip(("engine", "policy", "rollout", "train"), used, strict=True):
        assert most is None or got.used(phase) / GIB == pytest.approx(most, rel=0.06), phase


# ---- parts.py's plan


def test_train_plans_for_the_smaller_of_what_is_free_and_what_it_may_have(sizes, monkeypatch, capsys):
    free = {"now": 139 * GIB}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free["now"], 140 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(parts, "host_memory", lambda: 120 * GIB)

    def planned(**flags):
        args, got, _ = parts.plan_device(Args(max_response_len=1024, **flags).resolved(), shape("qwen2.5-1.5b"))
        chosen = (args.micro_batch_tokens, args.gradient_checkpointing, args.offload_optimizer)
        assert chosen == (got.micro_batch_tokens, got.checkpointing, got.offload)
        assert capsys.readouterr().out == f"a GPU\n{got.table()}\n"
        assert got.peak <= USABLE * got.free
        return got

    assert (planned().free, planned().sleep_level) == (139 * GIB, 0)
    small = planned(memory_gib=24)
    assert (small.free, small.sleep_level, small.offload) == (24 * GIB, 2, True)
    free["now"] = 20 * GIB  # others have the rest
    assert planned(memory_gib=24).free == planned().free == 20 * GIB


# ---- passes without gradient


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tokens", [1536, 4096, 16384, 100_000])
def test_a_pass_without_gradient_is_larger_and_fits_where_a_micro_batch_does(sizes, tokens, checkpointing, compiled):
    many = logprob_tokens(sizes, tokens, checkpointing, compiled)
    assert tokens <= many <= max(tokens, LOGPROB_TOKENS)
    # By hand, at 1.5B: a layer's own, two hidden states and two chunks of logits in bf16.
    layer = 4 * H + 2 * H + 2 * KV + 3 * INTERMEDIATE if compiled else 7 * H + 3 * H + 3 * KV + 4 * INTERMEDIATE
    without = 2 * many * (layer + 2 * H) + 2 * 2 * 2**28
    assert without <= activation_bytes(sizes, tokens, checkpointing, compiled)
    if tokens < LOGPROB_TOKENS:
        assert many >= 2 * tokens
    assert plan(sizes, 400, micro_batch_tokens=tokens, checkpointing=checkpointing).logprob_tokens == (
        logprob_tokens(sizes, tokens, checkpointing, True)
    )


def test_old_log_probs_are_computed_in_passes_of_the_plans_size_and_are_the_same(monkeypatch):
    """Several updates a batch: 12 samples of 20 tokens, at most two of them in a micro-batch that is trained on."""
    config = Qwen2Config(**SMALL_SHAPE, tie_word_embeddings=True, initializer_range=0.1)
    packing.register()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (12, 20), generator=generator).tolist()
    found, passes = [], []
    for budget in (0, 100, 10_000):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=packing.ATTENTION)
        policy = Policy(model, lr=1e-3, logprob_tokens=budget)
        forward, sizes_of = policy._forward, []
        monkeypatch.setattr(
            policy,
            "_forward",
            lambda p, r, fill, forward=forward, seen=sizes_of: (seen.append(len(r)), forward(p, r, fill=fill))[1],
        )
        samples = [Sample(row[5:], [-5.7] * 15, "stop", "") for row in ids]
        prompt = Prompt(Example("made:1", [], "1", "number", {}), ids[0][:5])
        groups = [Group(prompt, samples[i : i + 2], 0, [0.0, 1.0]) for i in range(0, 12, 2)]
        args = Args(
            updates_per_batch=3, micro_batch_tokens=40, max_prompt_len=5, max_response_len=15, samples_per_prompt=2
        ).resolved()
        metrics = train.train_step(policy, groups, args)
        found.append((metrics["mismatch/abs_dlogp_mean"], metrics["train/loss"]))
        passes.append(sizes_of)
    assert [seen[:-6] for seen in passes] == [[2] * 6, [4] * 3, [12]]  # then two micro-batches of each update
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


# ---- an optimizer in host memory


def test_the_optimizer_leaves_the_gpu_when_nothing_else_helps(sizes):
    """12 bytes a parameter less, and three slots more: 1.5B trains on 24 GiB, which it cannot with all of it there."""
    with pytest.raises(MemoryPlanError, match="--offload-optimizer True"):
        plan(sizes, 24, checkpointing=None, micro_batch_tokens=None)
    small = plan(sizes, 24, checkpointing=None, micro_batch_tokens=None, offload=None)
    assert small.offload and small.sleep_level == 0 and small.checkpointing
    assert small.training_state == PARAMETERS * (2 + 4) + 3 * 3 * 4 * 2**24
    assert "(17.3 in host memory)" in small.table() and "optimizer, on its way from the host" in small.table()
    big = plan(sizes, 139, checkpointing=None, micro_batch_tokens=None, offload=None)
    assert not big.offload and big.sleep_level == 0


def test_an_offloaded_optimizer_may_be_asked_for(sizes):
    asked = plan(sizes, 139, offload=True)
    assert asked.offload and asked.sleep_level == 0
    assert asked.training_state < plan(sizes, 139).training_state - 16 * GIB


@pytest.mark.parametrize(("states", "bytes_each"), [("fp32", 18), ("bf16", 14)])
def test_smaller_moments_take_less(sizes, states, bytes_each):
    assert plan(sizes, 139, optimizer_states=states).training_state == PARAMETERS * bytes_each


def test_eight_bit_moments_never_leave_the_gpu(sizes):
    eight = plan(sizes, 139, optimizer_states="8bit", offload=None)
    assert not eight.offload
    assert eight.training_state / PARAMETERS == pytest.approx(6 + 6.03, abs=0.01)
    with pytest.raises(MemoryPlanError):
        plan(sizes, 16, optimizer_states="8bit", offload=None)


def test_an_optimizer_that_the_host_cannot_hold_is_refused(sizes):
    said = str(no_room(sizes, 24, checkpointing=None, micro_batch_tokens=None, offload=None, host_free=10 * GIB))
    assert "17.3 GiB of host memory, 10.0 are available" in said
    assert re.search(r"-\d", said) is None, (
        "the plan that would fit on the GPU is shown, and nothing is short by less than 0"
    )
    assert plan(sizes, 24, checkpointing=None, micro_batch_tokens=None, offload=None, host_free=32 * GIB).offload


def test_a_plan_that_does_not_fit_says_by_how_much(sizes):
    with pytest.raises(MemoryPlanError) as error:
        plan(sizes, 30)
    short = float(str(error.value).split(" GiB short")[0].rsplit(" ", 1)[1])
    assert 0 < short < 10
    assert plan(sizes, 30 + (short + 0.1) / USABLE).sleep_level == 2


def test_the_hosts_memory_is_what_the_system_says():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal")) * 1024
    assert 2**28 < host_memory() < total


# ---- several GPUs


def test_a_world_of_one_has_the_plan_that_it_had(sizes):
    """Its figures are counted by hand above; nothing of several ranks is in it."""
    alone = plan(sizes, 40)
    assert alone == plan(sizes, 40, world=1, tp=1)
    assert (alone.sharding, alone.sync_buffers, alone.libraries) == (0, 0, LIBRARIES)
    said = alone.table() + str(no_room(sizes, 16))
    assert [word for word in ("per GPU", "gathered", "staging", "--tp", "processes", "rank") if word in said] == []


def no_room(sizes, gib, **changes) -> MemoryPlanError:
    with pytest.raises(MemoryPlanError) as error:
        plan(sizes, gib, **changes)
    return error.value


def test_what_each_of_several_gpus_holds_by_hand(sizes):
    """1.5B over 8: the state by 8, the engine by --tp, and FSDP2's gathered weights and gradients on top."""
    got = plan(sizes, 139, world=8, tp=2, reshard=True)
    assert got.training_state * 8 == STATE
    assert got.engine_weights == (LINEAR + 2 * (PARAMETERS - LINEAR)) // 2
    assert got.kv_wanted * 2 == plan(sizes, 139).kv_wanted  # one of the two heads
    root = V * H + H
    layer = (PARAMETERS - root) // LAYERS
    in_bf16 = 2 * (2 * layer + root) + 2 * (2 * layer + H)  # weights; gradients but the head's
    in_fp32 = 4 * (layer + root) + 4 * (layer + root) // 8
    assert got.sharding == sharding_bytes(sizes, 8) == pytest.approx(in_bf16 + in_fp32, abs=8)
    # The embeddings, which are larger than a buffer would be; and what travels together.
    assert got.sync_buffers == 2 * 2 * V * H + PACK_BYTES * 9 // 8
    assert got.training_peak == plan(sizes, 139).training_peak  # a micro-batch is one rank's own
    built = LIBRARIES + NCCL + got.engine_weights + got.engine_graphs + got.kv_cache
    state = got.training_state + got.sync_buffers
    assert got.used("engine") == built and got.used("policy") == built + state
    assert got.used("rollout") == built + state + got.engine_workspace
    assert got.used("train") == built + state + got.training_peak + got.sharding
    assert got.engine_workspace == 2 * PREFILL_TOKENS * (3 * INTERMEDIATE // 2 + 2 * H)


def test_weights_stay_whole_where_there_is_room_and_the_plan_says_what_it_saves(sizes):
    roomy = plan(sizes, 139, world=8)
    assert not roomy.reshard and roomy.reasons["--reshard-after-forward"] == "fits"
    learns = roomy.sharding - (sharding_bytes(sizes, 8) - 2 * (2 * (PARAMETERS - V * H - H) // LAYERS + V * H + H))
    assert learns == pytest.approx((2 + 4) * PARAMETERS, abs=8)  # bf16 weights, fp32 sums
    tight = plan(sizes, 27, world=8)
    assert tight.reshard and "GiB short without" in tight.reasons["--reshard-after-forward"]
    assert plan(sizes, 139, world=8, reshard=True).reasons["--reshard-after-forward"] == "asked for"
    assert "reshard" not in plan(sizes, 139).table()


def test_heads_that_are_fewer_than_the_ranks_of_an_engine_are_held_by_several(sizes):
    assert [sizes.kv_bytes_of_rank(tp) for tp in (1, 2, 4)] == [KV_TOKEN, KV_TOKEN // 2, KV_TOKEN // 2]


@pytest.mark.parametrize(("world", "tp"), [(2, 1), (2, 2), (8, 4)])
def test_the_shares_of_all_ranks_are_the_whole(sizes, world, tp):
    for changes in ({}, {"optimizer_states": "bf16"}, {"offload": True}):
        one, each = plan(sizes, 400, **changes), plan(sizes, 400, world=world, tp=tp, **changes)
        slots = 3 * 3 * 4 * 2**24 if changes.get("offload") else 0
        assert world * (each.training_state - slots) == pytest.approx(one.training_state - slots, abs=world)
        assert world * each.host == pytest.approx(one.host, abs=world)
        assert tp * each.engine_weights == pytest.approx(one.engine_weights, abs=tp)


def test_frozen_weights_are_gathered_and_only_adapters_are_reduced():
    config = Qwen3Config(**SMALL_SHAPE, head_dim=32, tie_word_embeddings=False)
    whole, adapted = model_sizes(config), model_sizes(config, lora=LoraSettings(4, 8.0))
    assert whole.root == adapted.root == 2 * 300 * 64 + 64
    layer = (adapted.parameters - adapted.root) / 2
    reduced = (2 * 2 + 4 * 1.25) * adapted.trained / 2
    assert sharding_bytes(adapted, 4) == int(2 * (2 * layer + adapted.root) + reduced) < sharding_bytes(whole, 4)


def test_the_syncs_buffers_are_there_where_something_is_staged(sizes):
    config = Qwen2Config(**SMALL_SHAPE, tie_word_embeddings=True)
    small, adapted = model_sizes(config), model_sizes(config, lora=LoraSettings(4, 8.0))
    assert [sync_bytes(small, 1), sync_bytes(small, 2)] == [0, 4 * small.parameters + 3 * small.parameters]
    assert sync_bytes(adapted, 1) == 4 * adapted.parameters
    assert sync_bytes(sizes, 1) == 0 < 2 * STAGING_BYTES < sync_bytes(sizes, 2)


def test_more_gpus_never_want_more_of_each_and_fit_what_one_does_not(sizes):
    no_room(sizes, 20)
    used = [plan(sizes, 400, world=world, sleep="2").used("train") for world in (2, 4, 8)]
    assert used == sorted(used, reverse=True)
    eight = plan(sizes, 20, world=8, checkpointing=None, micro_batch_tokens=None, max_num_seqs=32)
    assert not eight.offload and max(eight.used("train"), eight.used("rollout")) <= USABLE * eight.free
    said = str(no_room(sizes, 8, world=2))
    assert "a larger --tp" in said and "more processes" in said and "per GPU, of 2" in said


def test_all_ranks_share_the_hosts_memory(sizes):
    """17.3 GiB of masters and moments in all: what one rank takes of it is a part, and so is what there is for it."""
    choices = dict(checkpointing=None, micro_batch_tokens=None, offload=True)
    got = plan(sizes, 24, world=4, host_free=21 * GIB, **choices)
    assert got.host == PARAMETERS * 12 // 4
    assert (got.optimizer, got.reasons["--offload-optimizer"]) == (3 * 3 * 4 * 2**24, "asked for")
    chosen = plan(sizes, 13, world=4, host_free=21 * GIB, **choices | {"offload": None, "max_num_seqs": 16})
    assert "(4.3 in host memory, 4 times)" in chosen.reasons["--offload-optimizer"]
    said = str(no_room(sizes, 24, world=4, host_free=20 * GIB, **choices))
    assert "4.3 GiB of host memory for each of 4 ranks, 5.0 are available" in said


def test_the_table_of_several_gpus_says_so_and_adds_up(sizes):
    got = plan(sizes, 139, world=8, tp=2)
    lines = got.table().splitlines()
    assert lines[0] == "memory plan, per GPU, of 8"
    sizes_of = {line[:42].strip(): float(line.split()[-2]) for line in lines[1:] if line.endswith(" GiB")}
    assert sizes_of["gathered weights, gradients on their way"] == pytest.approx(got.sharding / GIB, abs=0.05)
    assert sizes_of["the sync's staging buffers"] == pytest.approx(got.sync_buffers / GIB, abs=0.05)
    totals = ("most in use: generating", "training", "free on the device")
    parts = [v for k, v in sizes_of.items() if k not in (*totals, "workspace while generating")]
    assert sum(parts) == pytest.approx(sizes_of["training"], abs=0.05 * (len(parts) + 1))


def test_each_engine_has_room_for_its_share_of_the_sequences():
    assert sequences_at_once(512, 16, 4) == 2 * 16 * 4
    assert sequences_at_once(512, 16, 4, engines=8) == 2 * 2 * 4
    assert sequences_at_once(512, 17, 4, engines=8) == 2 * 3 * 4  # whole groups: one engine has three
    assert sequences_at_once(512, 1024, 5, engines=8) == 512
    assert sequences_at_once(512, 16, 4, dynamic=False) == 16 * 4


def test_the_table_of_what_was_used_takes_the_fullest_gpu_and_lists_all(sizes):
    log = object.__new__(MemoryLog)  # without a GPU
    log.plan = plan(sizes, 139, world=2)
    planned = log.plan.used("train")
    log.seen = {"engine": 3 * GIB, "train": planned}
    other = {"engine": 2 * GIB, "train": planned + planned // 10, "rollout": GIB}
    assert most_seen([log.seen, other]) == {"engine": 3 * GIB, "train": other["train"], "rollout": GIB}
    alone, together = log.table().splitlines(), log.table([log.seen, other]).splitlines()
    assert "by rank" not in "".join(alone) and alone[2].split()[-1] == "+0%"
    assert together[1].endswith("by rank: 3.0 2.0") and "+10%" in together[2]
    assert together[3].endswith("by rank: - 1.0")


class FakeGpu:
    """torch.cuda of a card of 140 GiB, of which others have one; bytes, all taken by hand."""

    def __init__(self, monkeypatch):
        self.used, self.reserved, self.most = GIB, 0, 0
        for name, answer in {
            "mem_get_info": lambda: (140 * GIB - self.used, 140 * GIB),
            "memory_reserved": lambda: self.reserved,
            "max_memory_allocated": lambda: self.most,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch, "empty", self.empty)

    def empty(self, size, **_):
        self.take(size)
        return torch.zeros(1, dtype=torch.uint8).expand(size)

    def take(self, size):
        self.used, self.reserved = self.used + size, self.reserved + size
        self.most = max(self.most, self.reserved)


def test_the_log_tells_this_runs_memory_from_what_others_have_and_from_what_it_occupies(sizes, monkeypatch):
    gpu = FakeGpu(monkeypatch)
    log = MemoryLog(plan(sizes, 40), limit=40 * GIB)
    assert log.occupied == 99 * GIB and gpu.used == 100 * GIB, "139 were free and 40 are left"
    gpu.take(8 * GIB)
    log.mark("engine")
    gpu.take(26 * GIB)
    log.mark("rollout")
    gpu.take(3 * GIB)
    log.mark("train")
    assert {phase: used / GIB for phase, used in log.seen.items()} == {"engine": 8, "rollout": 34, "train": 37}
    gpu.take(-20 * GIB)
    want = {"used_peak": 37, "planned_peak": log.plan.peak / GIB, "torch_peak": 37, "device": 17, "torch_reserved": 17}
    assert log.metrics() == {f"memory/{name}_gib": value for name, value in want.items()}
    for now, peak in ((30, 37), (39, 39), (12, 39)):  # later steps' rollouts
        gpu.take(now * GIB - log.in_use())
        log.mark("rollout")
        found = log.metrics()
        assert (found["memory/device_gib"], found["memory/torch_reserved_gib"]) == (now, now), "each step's own"
        assert found["memory/used_peak_gib"] == peak, "a phase that grows shows"


def test_the_log_without_a_limit_occupies_nothing(sizes, monkeypatch):
    gpu = FakeGpu(monkeypatch)
    log = MemoryLog(plan(sizes, 139))
    assert log.occupied == 0 and gpu.used == GIB
    assert MemoryLog(plan(sizes, 139), limit=200 * GIB).occupied == 0, "more than is free"
    gpu.take(int(log.plan.used("engine") * 1.1))
    log.mark("engine")
    gpu.reserved += 2 * GIB
    lines = log.table().splitlines()
    planned = log.plan.used("engine") / GIB
    assert lines[1].split() == ["engine", "built", f"{planned:.1f}", f"{1.1 * planned:.1f}", "+10%"]
    assert lines[2].split()[-1] == "2.0" and len(lines) == 3
