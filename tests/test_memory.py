"""memory.py: sizes counted by hand, the choice of the sleep level, and what a run that cannot fit is told."""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from lora import LoraSettings
from memory import (
    GIB,
    GRAPHS,
    LIBRARIES,
    MICRO_BATCH_CHOICES,
    NCCL,
    USABLE,
    MemoryLog,
    MemoryPlanError,
    activation_bytes,
    host_memory,
    model_sizes,
    most_seen,
    plan_memory,
    sequences_at_once,
    sharding_bytes,
    sync_bytes,
)
from quant_sync import STAGING_BYTES

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
    assert big.engine == big.engine_weights + GRAPHS + big.engine_workspace + big.kv_cache
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
    assert big.used("train") == LIBRARIES + big.engine + big.training_state + big.training_peak <= USABLE * big.free
    assert "nothing sleeps" in big.reason


def test_on_40_gib_the_engine_sleeps_at_level_2_and_says_why(sizes):
    small = plan(sizes, 40)
    assert small.sleep_level == 2
    assert "do not fit together" in small.reason and "GiB short" in small.reason
    awake = LIBRARIES + small.engine + small.training_state  # beside weights and optimizer
    asleep = LIBRARIES + GRAPHS + small.training_state + small.training_peak  # beside the activations
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
    assert "25.9 GiB" in message and "16.0 GiB" in message  # what takes most, and what there is


@pytest.mark.parametrize("level", ["0", "1", "2"])
def test_a_forced_level_is_respected(sizes, level):
    for gib in (139, 50):
        forced = plan(sizes, gib, sleep=level, max_num_seqs=16)
        assert forced.sleep_level == int(level)
        assert forced.reason == "asked for"


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


def test_table_prints_each_part_the_choice_and_its_reason(sizes):
    small = plan(sizes, 40)
    table = small.table()
    parts = (
        small.engine_weights,
        GRAPHS + small.engine_workspace + LIBRARIES,
        small.kv_cache,
        small.training_state,
        small.training_peak,
    )
    lines = table.splitlines()
    for part in (*parts, small.free):
        assert any(line.endswith(f" {part / GIB:.1f} GiB") for line in lines), f"{part / GIB:.1f} GiB is in no row"
    assert f"wanted {small.kv_wanted / GIB:.1f}" in table
    assert lines[-1].split(":")[0].strip() == "activations recomputed, 16384 tokens a micro-batch; --sleep 2"
    assert small.reason in lines[-1]


# ---- an optimizer in host memory


def test_the_optimizer_leaves_the_gpu_when_nothing_else_helps(sizes):
    """12 bytes a parameter less, and three slots more: 1.5B trains on 24 GiB, which it cannot with all of it there."""
    with pytest.raises(MemoryPlanError, match="--offload-optimizer True"):
        plan(sizes, 24, checkpointing=None, micro_batch_tokens=None)
    small = plan(sizes, 24, checkpointing=None, micro_batch_tokens=None, offload=None)
    assert small.offload and small.sleep_level == 0 and small.checkpointing
    assert small.training_state == PARAMETERS * (2 + 4) + 3 * 3 * 4 * 2**24
    assert "master and Adam in host memory" in small.table() and "policy, gradients   " in small.table()
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
    with pytest.raises(MemoryPlanError, match=r"17\.3 GiB of host memory, 10\.0 are available"):
        plan(sizes, 24, checkpointing=None, micro_batch_tokens=None, offload=None, host_free=10 * GIB)
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
    got = plan(sizes, 139, world=8, tp=2)
    assert got.training_state * 8 == STATE
    assert got.engine_weights == (LINEAR + 2 * (PARAMETERS - LINEAR)) // 2
    assert got.kv_wanted * 2 == plan(sizes, 139).kv_wanted  # one of the two heads
    root = V * H + H
    layer = (PARAMETERS - root) // LAYERS
    in_bf16 = 2 * (2 * layer + root) + 2 * (2 * layer + H)  # weights; gradients but the head's
    in_fp32 = 4 * (layer + root) + 4 * (layer + root) // 8
    assert got.sharding == sharding_bytes(sizes, 8) == pytest.approx(in_bf16 + in_fp32, abs=8)
    assert got.sync_buffers == 2 * 2 * V * H  # the embeddings, which are larger than a buffer would be
    assert got.training_peak == plan(sizes, 139).training_peak  # a micro-batch is one rank's own
    parts = LIBRARIES + NCCL + got.engine + got.training_state + got.sync_buffers
    assert got.used("rollout") == parts
    assert got.used("train") == parts + got.training_peak + got.sharding
    assert got.used("engine") == LIBRARIES + NCCL + got.engine


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
    assert [sync_bytes(small, 1), sync_bytes(small, 2)] == [0, 4 * small.parameters]  # no larger than the model
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
    assert "in host memory (4.3 GiB, 4 times)" in got.table()
    said = str(no_room(sizes, 24, world=4, host_free=20 * GIB, **choices))
    assert "4.3 GiB of host memory for each of 4 ranks, 5.0 are available" in said


def test_the_table_of_several_gpus_says_so_and_adds_up(sizes):
    got = plan(sizes, 139, world=8, tp=2)
    lines = got.table().splitlines()
    assert lines[0] == "memory plan, per GPU, of 8"
    sizes_of = {line[:42].strip(): float(line.split()[-2]) for line in lines[1:] if line.endswith(" GiB")}
    assert sizes_of["gathered weights, gradients on their way"] == pytest.approx(got.sharding / GIB, abs=0.05)
    assert sizes_of["the sync's staging buffers"] == pytest.approx(got.sync_buffers / GIB, abs=0.05)
    parts = [v for k, v in sizes_of.items() if k not in ("most in use: generating", "training", "free on the device")]
    assert sum(parts) == pytest.approx(sizes_of["training"], abs=0.05 * (len(parts) + 1))


def test_each_engine_has_room_for_its_share_of_the_sequences():
    assert sequences_at_once(512, 16, 4) == 2 * 16 * 4
    assert sequences_at_once(512, 16, 4, engines=8) == 2 * 2 * 4
    assert sequences_at_once(512, 17, 4, engines=8) == 2 * 3 * 4  # whole groups: one engine has three
    assert sequences_at_once(512, 1024, 5, engines=8) == 512


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
