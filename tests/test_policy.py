"""policy.py against the obvious way of doing the same: one sequence at a time, no padding, whole logits, plain AdamW.

Tolerances. fp32 weights: 1e-5. bf16 weights: a logit of size about 1 is rounded to 2^-9 and the hidden states before
it too, so two orders of the same sums differ by up to 0.02 nats (BF16); gradients are compared by their direction and
length, since single elements near zero carry no information in bf16.
"""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import copy
import importlib.util
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from small_models import CONFIGS, V
from transformers import AutoModelForCausalLM, Qwen2Config

import head_logprobs
import packing
import policy as policy_module
import sharding
from checkpoint import LoopState, random_states, read_checkpoint
from packing import PackingError
from policy import Batch, Policy, PolicyError, load_model

BF16 = 0.02  # nats
FP32 = dict(rtol=1e-5, atol=1e-5)


def make_model(
    family: str = "qwen2", dtype: torch.dtype = torch.float32, seed: int = 0, attention: str = "sdpa"
) -> torch.nn.Module:
    """Random weights large enough that the log-probs are far from uniform; norms and biases are random too."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(std=0.1)
            else:
                p.normal_(std=0.15)
    return model.to(dtype)


def make_policy(family: str = "qwen2", dtype: torch.dtype = torch.float32, **options) -> Policy:
    packing.register()
    return Policy(make_model(family, dtype, attention=packing.ATTENTION), **options)


def make_batch(lengths: list[tuple[int, int]], seed: int = 1) -> Batch:
    """Random samples of (prompt length, response length)."""
    g = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(V, (n,), generator=g).tolist()

    total = sum(r for _, r in lengths)
    return Batch(
        prompt_ids=[ids(p) for p, _ in lengths],
        response_ids=[ids(r) for _, r in lengths],
        rollout_logprobs=torch.randn(total, generator=g),
        advantages=torch.randn(total, generator=g),
        mask=torch.rand(total, generator=g) > 0.3,
    )


RAGGED = [(3, 5), (1, 9), (12, 2), (7, 1), (1, 1), (4, 20)]  # 66 tokens, at most 24 a sample


def reference(model: torch.nn.Module, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs, entropies): one sequence at a time through the model's own forward and attention, softmax in fp32."""
    logprobs, entropies = [], []
    for prompt, response in zip(batch.prompt_ids, batch.response_ids, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float() / temperature
        log_p = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        logprobs.append(log_p[torch.arange(len(response)), torch.tensor(response)])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies).detach()


def gradients(policy: Policy, batch: Batch) -> list[torch.Tensor]:
    """The accumulated fp32 gradients of sum(advantage * log-prob), then cleared."""
    logprobs, _ = policy.logprobs(batch)
    (logprobs * batch.advantages).sum().backward()
    got = [g.clone() for g in policy.optimizer.grads]
    for g in policy.optimizer.grads:
        g.zero_()
    return got


def cosine_and_length(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[float, float]:
    x, y = (torch.cat([t.flatten().double() for t in ts]) for ts in (a, b))
    return float(x @ y / (x.norm() * y.norm())), float(x.norm() / y.norm())


def accumulate(policy: Policy, value: float = 1.0) -> None:
    """Put the same gradient on every weight, without a forward pass."""
    for grad in policy.optimizer.grads:
        grad.fill_(value)


def snapshot(policy: Policy) -> list[torch.Tensor]:
    """Copies of weights, masters and optimizer state."""
    states = [*policy.optimizer.masters, *(t for pair in policy.optimizer._moments for t in pair)]
    return [t.detach().clone() for t in (*policy._weights, *states)]


def bitwise_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", CONFIGS)
def test_fp32_log_probs_entropy_and_gradients_equal_one_sequence_at_a_time(family, temperature):
    policy, batch = make_policy(family, temperature=temperature), make_batch(RAGGED)
    plain = make_model(family)
    expected, entropy = reference(plain, batch, temperature)
    got, got_entropy = policy.logprobs(batch)
    assert got.dtype == got_entropy.dtype == torch.float32
    torch.testing.assert_close(got, expected, **FP32)
    torch.testing.assert_close(got_entropy, entropy, **FP32)
    (expected * batch.advantages).sum().backward()
    for (name, p), g in zip(plain.named_parameters(), gradients(policy, batch), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", CONFIGS)
def test_bf16_log_probs_and_gradients_equal_one_sequence_at_a_time(family):
    policy, batch = make_policy(family, torch.bfloat16), make_batch(RAGGED)
    plain = make_model(family, torch.bfloat16)
    expected, entropy = reference(plain, batch, 1.0)
    got, got_entropy = policy.logprobs(batch)
    assert expected.std() > 0.5, "a uniform model would pass with any token order"
    assert (got - expected).abs().mean() < BF16 / 4 and (got - expected).abs().max() < BF16 * 4
    assert (got_entropy - entropy).abs().max() < BF16 * 4
    (expected * batch.advantages).sum().backward()
    cosine, length = cosine_and_length(gradients(policy, batch), [p.grad for p in plain.parameters()])
    assert cosine > 0.999 and abs(length - 1) < 0.01


def test_gradients_of_bf16_weights_add_up_in_fp32():
    """Ones summed in bf16 stop at 256: 256 + 1 rounds back to 256."""
    model = SimpleModel(torch.ones(2, 2))
    policy = Policy(model)
    for _ in range(600):
        model.weight.sum().backward()
        assert model.weight.grad is None, "the bf16 gradient must be freed at once"
    assert policy.optimizer.grads[0].tolist() == [[600.0, 600.0]] * 2


@pytest.mark.parametrize("family", CONFIGS)
def test_a_longer_sample_changes_nobody_elses_log_probs(family):
    short, long = make_batch(RAGGED), make_batch([(30, 60)], seed=5)
    both = Batch(
        short.prompt_ids + long.prompt_ids,
        short.response_ids + long.response_ids,
        *(torch.cat([getattr(short, k), getattr(long, k)]) for k in ("rollout_logprobs", "advantages", "mask")),
    )
    tokens = len(short.mask)
    fp32, bf16 = make_policy(family), make_policy(family, torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(fp32.logprobs(both)[0][:tokens], fp32.logprobs(short)[0], **FP32)
        difference = (bf16.logprobs(both)[0][:tokens] - bf16.logprobs(short)[0]).abs()
    assert difference.mean() < BF16 / 4 and difference.max() < BF16 * 4


def test_log_probs_follow_the_rows_when_rows_are_reordered():
    policy, batch = make_policy(), make_batch(RAGGED)
    order = [4, 2, 5, 0, 3, 1]
    with torch.no_grad():
        logprobs = policy.logprobs(batch)[0].split([r for _, r in RAGGED])
        shuffled = policy.logprobs(batch.select(order))[0]
    torch.testing.assert_close(shuffled, torch.cat([logprobs[i] for i in order]), **FP32)


def test_probabilities_of_the_whole_vocabulary_sum_to_one_at_every_temperature():
    """log-prob of every possible one-token answer: the temperature is inside the softmax, not multiplied after it."""
    prompt = [3, 1, 4, 1, 5]
    batch = Batch([prompt] * V, [[t] for t in range(V)], torch.zeros(V), torch.zeros(V), torch.ones(V).bool())
    spread = {}
    for temperature in (0.5, 1.0, 2.0):
        with torch.no_grad():
            logprobs, entropy = make_policy(temperature=temperature).logprobs(batch)
        assert float(logprobs.exp().sum()) == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(entropy, -(logprobs.exp() * logprobs).sum().expand(V), rtol=1e-4, atol=1e-4)
        spread[temperature] = logprobs.max() - logprobs.min()
    assert float(spread[0.5]) == pytest.approx(2 * float(spread[1.0]), rel=1e-4)
    assert float(spread[2.0]) == pytest.approx(0.5 * float(spread[1.0]), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_chunked_head_equals_the_whole_one(rows, monkeypatch):
    policy, batch = make_policy(), make_batch(RAGGED)
    whole, whole_entropy = policy.logprobs(batch)
    whole_gradients = gradients(policy, batch)
    monkeypatch.setattr(sharding, "CHUNK_ELEMENTS", rows * V + 1)
    sizes, statistics = [], head_logprobs._statistics
    monkeypatch.setattr(
        head_logprobs, "_statistics", lambda logits, *a: (sizes.append(logits.shape[0]), statistics(logits, *a))[1]
    )
    chunked, entropy = policy.logprobs(batch)
    assert max(sizes) == rows and len(sizes) == math.ceil(38 / rows)
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, whole_entropy, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(policy, batch), whole_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_vocabulary_larger_than_a_chunk_still_goes_row_by_row(monkeypatch):
    policy, batch = make_policy(), make_batch(RAGGED)
    with torch.no_grad():
        whole = policy.logprobs(batch)[0]
        monkeypatch.setattr(sharding, "CHUNK_ELEMENTS", 1)
        torch.testing.assert_close(policy.logprobs(batch)[0], whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [67, 100, 500])
def test_the_first_pass_is_filled_up_and_nothing_else_is_different(monkeypatch, tokens):
    rows = []
    inputs = packing.model_inputs
    monkeypatch.setattr(packing, "model_inputs", lambda s, device: rows.append(s) or inputs(s, device))
    filled, plain, batch = make_policy(first_tokens=tokens), make_policy(), make_batch(RAGGED)
    found = []
    for policy in (filled, plain):
        with torch.no_grad():
            policy.logprobs(batch)  # has no gradient and is not the first one
        for _ in range(2):
            logprobs, entropy = policy.logprobs(batch)
            (logprobs * batch.advantages).sum().backward()
        found.append((logprobs.detach(), entropy.detach(), *policy.optimizer.grads))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **FP32)
    sizes = [sum(map(len, row)) for row in rows]
    assert sizes == [66, tokens, 66, 66, 66, 66] and max(map(len, rows[1])) == 24


@pytest.mark.parametrize("family", CONFIGS)
def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less(family):
    batch = make_batch(RAGGED)
    plain, recomputing = make_policy(family), make_policy(family, checkpointing=True)
    kept = {}
    for policy in (plain, recomputing):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            policy.logprobs(batch)
        kept[policy] = sum(sizes)
    assert kept[recomputing] < kept[plain] / 2
    for a, b in zip(gradients(recomputing, batch), gradients(plain, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [24, 30, 64, 10_000])
def test_compute_logprobs_gives_the_batchs_order_whatever_the_micro_batches(budget):
    policy, batch = make_policy(temperature=0.8), make_batch(RAGGED)
    expected = policy.logprobs(batch)[0].detach()
    got = policy.compute_logprobs(batch, budget)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, **FP32)


# ---- batches


@pytest.mark.parametrize(("budget", "count"), [(48, 3), (72, 2), (123, 2), (124, 1), (10_000, 1)])
def test_micro_batches_cover_each_row_once_within_the_budget(budget, count):
    """Prompts count: the samples have 124 tokens with them and 71 without."""
    batch = make_batch([*RAGGED, (3, 5), (1, 1), (20, 28)])
    lengths = [len(p) + len(r) for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)]
    micro = batch.micro_batches(budget)
    assert sorted(i for rows in micro for i in rows) == list(range(len(batch)))
    assert all(sum(lengths[i] for i in rows) <= budget for rows in micro)
    assert len(micro) == count, "what fits together goes together"


def test_a_sample_longer_than_the_budget_is_refused_wherever_one_is_given():
    policy, batch = make_policy(), make_batch(RAGGED)
    for split in (batch.micro_batches, lambda budget: policy.compute_logprobs(batch, budget)):
        with pytest.raises(PackingError, match=r"--micro-batch-tokens 23 .* 24 tokens"):
            split(23)


def test_the_model_is_given_the_samples_tokens_and_no_others():
    """Samples of very different lengths: padded to the longest of a micro-batch they would be up to twice as many."""
    policy, batch = make_policy(), make_batch([(2, 2), (30, 30)] * 8)
    seen = []
    policy.model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    policy.compute_logprobs(batch, 480)
    assert [ids.shape for ids in seen] == [(1, 256), (1, 256)], "512 tokens in two halves"
    sequences = [p + r for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)]
    given = [[t for i in rows for t in sequences[i]] for rows in batch.micro_batches(480)]
    assert [ids[0].tolist() for ids in seen] == given


def test_select_keeps_tokens_with_their_sample():
    lengths = [2, 1, 3]
    tokens = torch.tensor([0.0, 0.1, 1.0, 2.0, 2.1, 2.2])  # sample.position
    mask = torch.tensor([True, False, True, False, True, True])
    batch = Batch([[9], [8, 8], [7]], [[0] * n for n in lengths], tokens, tokens * 2, mask, tokens * 3)
    got = batch.select([2, 0])
    assert got.prompt_ids == [[7], [9]] and [len(r) for r in got.response_ids] == [3, 2]
    wanted = torch.tensor([2.0, 2.1, 2.2, 0.0, 0.1])
    assert torch.equal(got.rollout_logprobs, wanted)
    assert torch.equal(got.advantages, wanted * 2) and torch.equal(got.old_logprobs, wanted * 3)
    assert got.mask.tolist() == [False, True, True, True, False]
    assert Batch([[1]], [[1]], tokens[:1], tokens[:1], mask[:1]).select([0]).old_logprobs is None
    assert len(batch) == 3 and torch.equal(batch.rollout_logprobs, tokens), "the batch itself is left as it was"


# ---- updates


def test_tiny_updates_are_not_lost():
    """lr 1e-6 on weights of 1 and a constant gradient: AdamW moves lr * g / (|g| + eps) = 1e-6 a step."""
    lr, steps = 1e-6, 2500
    model = SimpleModel(torch.ones(4, 4))
    policy = Policy(model, lr=lr, weight_decay=0.0, max_grad_norm=1e9)
    naive = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    naive_adam = torch.optim.AdamW([naive], lr=lr, weight_decay=0.0)
    moved_at = None
    for step in range(1, steps + 1):
        accumulate(policy, 1.0)
        policy.update()
        naive.grad = torch.ones_like(naive)
        naive_adam.step()
        if moved_at is None and not torch.equal(model.weight, torch.ones(4, 4, dtype=torch.bfloat16)):
            moved_at = step
    # fp32 below 1 has steps of 2^-24, so each update is off by 2^-25 at most.
    torch.testing.assert_close(
        policy.optimizer.masters[0], torch.full((4, 4), 1 - lr * steps), rtol=0, atol=steps * 2**-25
    )
    assert torch.equal(naive, torch.ones(4, 4, dtype=torch.bfloat16)), "bf16 alone never moves"
    # bf16 below 1 has steps of 2^-8; rounding turns over at half of one: 2^-9 / 1e-6 = 1953 updates.
    assert moved_at == pytest.approx(2**-9 / lr, rel=2**-25 / lr)
    assert torch.equal(model.weight, torch.full((4, 4), 1 - 2**-8, dtype=torch.bfloat16))


class SimpleModel(torch.nn.Module):
    """The least that Policy asks of a model: parameters and a config."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.to(dtype))
        if bias is not None:
            self.bias = torch.nn.Parameter(bias.to(dtype))
        self.config = SimpleNamespace(use_cache=True, model_type="llama")


def backward(policy: Policy, batch: Batch) -> None:
    logprobs, _ = policy.logprobs(batch)
    (logprobs * batch.advantages).sum().backward()


def test_weights_are_the_masters_rounded_to_bf16_bit_for_bit():
    policy, batch = make_policy("qwen3", torch.bfloat16, lr=1e-3), make_batch(RAGGED)
    for _ in range(3):
        backward(policy, batch)
        policy.update()
        for weight, master in zip(policy._weights, policy.optimizer.masters, strict=True):
            assert torch.equal(weight.view(torch.int16), master.to(torch.bfloat16).view(torch.int16))
    assert any(not torch.equal(w.float(), m) for w, m in zip(policy._weights, policy.optimizer.masters, strict=True))


def test_updates_follow_plain_adamw_on_an_fp32_model():
    """The same three updates by torch's loop over a model of its own: clip, then AdamW with decay on matrices."""
    batch = make_batch(RAGGED)
    policy = make_policy("qwen2", lr=1e-3, weight_decay=0.1, warmup_steps=2, max_grad_norm=0.5)
    plain = make_model("qwen2")
    matrices = [p for p in plain.parameters() if p.dim() >= 2]
    vectors = [p for p in plain.parameters() if p.dim() < 2]
    adam = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}])
    for lr in (0.5e-3, 1e-3, 1e-3):
        for group in adam.param_groups:
            group["lr"] = lr
        adam.zero_grad()
        (reference(plain, batch, 1.0)[0] * batch.advantages).sum().backward()
        expected_norm = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
        adam.step()
        backward(policy, batch)
        norm, applied = policy.update()
        assert applied and norm == pytest.approx(expected_norm, rel=1e-3)
    for (name, p), w in zip(plain.named_parameters(), policy.model.parameters(), strict=True):
        # AdamW's first steps are lr * sign(g): where g is noise, its sign may differ, by 2 lr a step at most.
        far = (p - w).abs() > 1e-4
        assert far.float().mean() < 0.01 and (p - w).abs().max() < 6e-3, name


def test_state_is_live_and_stays_in_place():
    policy, batch = make_policy("qwen2", torch.bfloat16, lr=0.01), make_batch(RAGGED)
    state = policy.model.state_dict()
    before = {k: (t.data_ptr(), t.clone()) for k, t in state.items()}
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr(), "tied"
    for _ in range(2):
        backward(policy, batch)
        policy.update()
    for name, tensor in policy.model.state_dict().items():
        assert tensor.data_ptr() == before[name][0], name
        assert not torch.equal(tensor, before[name][1]), f"{name} did not change with the update"
        assert torch.equal(state[name], tensor), f"{name}: an old state dict must show the new weights"


@pytest.mark.parametrize("budget", [24, 30, 64])
def test_micro_batches_add_up_to_the_big_batch(budget):
    batch = make_batch(RAGGED)
    whole, split = make_policy("qwen3", lr=1e-3), make_policy("qwen3", lr=1e-3)
    backward(whole, batch)
    parts = batch.micro_batches(budget)
    assert len(parts) > 1
    for rows in parts:
        backward(split, batch.select(rows))
    for a, b in zip(whole.optimizer.grads, split.optimizer.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert whole.update()[0] == pytest.approx(split.update()[0], rel=1e-5)
    assert all(not g.any() for g in split.optimizer.grads), "gradients are cleared for the next step"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_skips_the_update_and_nothing_else(bad):
    policy, batch = make_policy("qwen2", torch.bfloat16, lr=0.01), make_batch(RAGGED)
    backward(policy, batch)
    policy.update()  # so that there is optimizer state to spoil
    before = snapshot(policy)
    backward(policy, batch)
    policy.optimizer.grads[3].view(-1)[0] = bad
    norm, applied = policy.update()
    assert not applied and not math.isfinite(norm)
    assert (policy.updates, policy.skipped) == (1, 1)
    assert bitwise_equal(snapshot(policy), before)
    backward(policy, batch)
    norm, applied = policy.update()
    assert applied and math.isfinite(norm)
    assert (policy.updates, policy.skipped) == (2, 1)
    after = snapshot(policy)
    assert all(t.isfinite().all() for t in after) and not bitwise_equal(after, before)


def test_a_nan_in_the_loss_is_caught_too():
    policy, batch = make_policy("qwen2", torch.bfloat16), make_batch(RAGGED)
    before = snapshot(policy)
    batch.advantages[4] = math.nan
    backward(policy, batch)
    assert policy.update()[1] is False
    assert bitwise_equal(snapshot(policy), before)


def test_warm_up_by_hand():
    policy = Policy(SimpleModel(torch.ones(2, 2)), lr=8e-4, warmup_steps=4, weight_decay=0.0)
    lrs = []
    for _ in range(7):
        lrs.append(policy.current_lr())
        before = policy.optimizer.masters[0].clone()
        accumulate(policy)
        policy.update()
        moved = (before - policy.optimizer.masters[0]).flatten().tolist()  # equal gradients move Adam by its lr
        assert moved == pytest.approx([lrs[-1]] * 4, rel=1e-3), "the lr that was announced is applied"
    assert lrs == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 8e-4, 8e-4, 8e-4])
    assert Policy(SimpleModel(torch.ones(2, 2)), lr=8e-4, warmup_steps=0).current_lr() == 8e-4


def test_weight_decay_acts_on_matrices_alone():
    model = SimpleModel(torch.full((2, 2), 2.0), bias=torch.full((2,), 2.0))
    policy = Policy(model, lr=0.1, weight_decay=0.5)
    accumulate(policy, 0.0)
    assert policy.update()[1]
    assert policy.optimizer.masters[0].tolist() == [[pytest.approx(2 * (1 - 0.1 * 0.5))] * 2] * 2
    assert policy.optimizer.masters[1].tolist() == [2.0, 2.0]


def test_clipping_by_hand():
    """Gradients (3, 4) have norm 5; clipped to 1 they are (0.6, 0.8). Adam's first moment shows what it was given."""
    model = SimpleModel(torch.zeros(1, 1), bias=torch.zeros(1))
    policy = Policy(model, lr=0.1, max_grad_norm=1.0, betas=(0.9, 0.999))
    policy.optimizer.grads[0].fill_(3.0)
    policy.optimizer.grads[1].fill_(4.0)
    norm, _ = policy.update()
    assert norm == pytest.approx(5.0), "the norm is reported before clipping"
    moments = [float(first) for first, _ in policy.optimizer._moments]
    assert moments == pytest.approx([0.1 * 0.6, 0.1 * 0.8], rel=1e-4)
    below = Policy(SimpleModel(torch.zeros(1, 1)), lr=0.1, max_grad_norm=1.0)
    below.optimizer.grads[0].fill_(0.25)
    below.update()
    assert float(below.optimizer._moments[0][0]) == pytest.approx(0.1 * 0.25, rel=1e-4)


def test_an_update_raises_the_log_prob_of_what_was_rewarded():
    policy, batch = make_policy("llama", torch.bfloat16, lr=1e-3), make_batch([(4, 3), (5, 3)])
    batch.advantages = torch.tensor([1.0] * 3 + [-1.0] * 3)
    before = policy.compute_logprobs(batch, 1000)
    for _ in range(5):
        logprobs, _ = policy.logprobs(batch)
        (-logprobs * batch.advantages).mean().backward()
        policy.update()
    change = policy.compute_logprobs(batch, 1000) - before
    assert change[:3].mean() > 0.1 and change[3:].mean() < -0.1


# ---- files


class NoTokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_policy_opens_with_the_same_weights(family, tmp_path):
    policy, batch = make_policy(family, torch.bfloat16, lr=0.01, checkpointing=True), make_batch(RAGGED)
    backward(policy, batch)
    policy.update()
    policy.snapshot(NoTokenizer(), LoopState(), {}).write(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    state = policy.model.state_dict()
    assert opened.keys() == state.keys()
    for name, tensor in state.items():
        assert opened[name].dtype == torch.bfloat16 and torch.equal(opened[name], tensor), name
    assert packing.ATTENTION not in (tmp_path / "config.json").read_text(), "others must be able to open it"


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("offload", [False, True])
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(states, offload, tmp_path):
    if states == "8bit" and (offload or not importlib.util.find_spec("torchao")):
        pytest.skip("8-bit moments stay on the GPU" if offload else "torchao is not installed")
    options = dict(lr=0.01, warmup_steps=3, optimizer_states=states, offload_optimizer=offload)
    make_model("llama").save_pretrained(tmp_path / "begin")
    through, batch = Policy(load_model(str(tmp_path / "begin"), torch.device("cpu")), **options), make_batch(RAGGED)

    def go_on(policy: Policy) -> list[torch.Tensor]:
        for _ in range(3):
            backward(policy, batch)
            policy.update()
        return [p.detach() for p in policy.model.parameters()]

    go_on(through)
    loop = LoopState(step=3, policy=through.numbers(), random=random_states()[0])
    (tmp_path / "middle").mkdir()
    through.snapshot(NoTokenizer(), loop, {}).write(tmp_path / "middle")
    other = Policy(load_model(str(tmp_path / "middle"), torch.device("cpu")), **options)
    other.load_training(read_checkpoint(tmp_path / "middle"))
    assert other.numbers() == through.numbers() and other.current_lr() == through.current_lr()
    assert all(torch.equal(a, b) for a, b in zip(go_on(other), go_on(through), strict=True))
    ours, theirs = other.optimizer_state(), through.optimizer_state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_weights_may_change_once_a_snapshot_has_its_copies(tmp_path):
    """The loop waits for that, and the checkpoint has the weights of its own time."""
    policy, batch = make_policy("qwen2", torch.bfloat16, lr=0.01), make_batch(RAGGED)
    snapshot = policy.snapshot(NoTokenizer(), LoopState(), {})
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    writing, go = threading.Event(), threading.Event()
    inner = snapshot._write_model

    def slow(folder, state):
        writing.set()
        assert go.wait(10)
        inner(folder, state)

    snapshot._write_model = slow
    thread = threading.Thread(target=snapshot.write, args=(tmp_path,))
    thread.start()
    snapshot.wait()
    assert writing.wait(10)
    backward(policy, batch)
    policy.update()
    go.set()
    thread.join()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert all(torch.equal(opened[k], before[k]) for k in before)
    assert not all(torch.equal(v, before[k]) for k, v in policy.model.state_dict().items())


def test_load_model_gives_bf16_weights_of_the_folder(tmp_path):
    model = make_model("qwen3", torch.float32)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), torch.device("cpu"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16)), name


@torch.no_grad()
def test_a_loaded_model_attends_inside_each_sample(tmp_path):
    make_model("qwen3", torch.bfloat16).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="sdpa")
    loaded, batch = load_model(str(tmp_path), torch.device("cpu")), make_batch(RAGGED)
    assert loaded.config._attn_implementation == packing.ATTENTION
    difference = (Policy(loaded).logprobs(batch)[0] - reference(plain, batch, 1.0)[0]).abs()
    assert difference.mean() < BF16 / 4 and difference.max() < BF16 * 4


def test_load_model_names_the_flag_where_there_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(PolicyError) as error:
            load_model(str(path), torch.device("cpu"))
        assert f"--model {path}" in str(error.value)


def test_load_model_names_the_flag_where_the_weights_are_broken(tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PolicyError, match="--model"):
        load_model(str(tmp_path), torch.device("cpu"))


def test_a_family_with_other_logits_is_refused():
    """Granite scales its logits after the head: its names map, its log-probs would be wrong in silence."""
    from transformers import GraniteConfig

    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=8.0,
    )  # fmt: skip
    with pytest.raises(PolicyError, match="granite"):
        Policy(AutoModelForCausalLM.from_config(config))


def test_dropout_is_off():
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, attention_dropout=0.5,
    )  # fmt: skip
    packing.register()
    policy = Policy(AutoModelForCausalLM.from_config(config, attn_implementation=packing.ATTENTION))
    empty = torch.zeros(3)
    batch = Batch([[1, 2]], [[3, 4, 5]], empty, empty, empty.bool())
    assert torch.equal(policy.logprobs(batch)[0], policy.logprobs(batch)[0])


@pytest.mark.parametrize("family", CONFIGS)
def test_the_noise_floor_is_rounding_alone(family):
    """Nothing in fp32, at most a rounding error in bf16, and the whole gap where the two paths really differ."""
    sequences = [([1, 2, 3], [4, 5, 6, 7]), ([8], [9, 10]), ([11, 12], [13])]
    exact = make_policy(family, temperature=0.7)
    assert exact.noise_floor(sequences) < 1e-5
    rounded = make_policy(family, torch.bfloat16)
    assert rounded.noise_floor(sequences) < BF16
    assert rounded.model.config._attn_implementation == packing.ATTENTION
    whole = exact.logprobs

    def shifted(batch):
        logprobs, entropy = whole(batch)
        return logprobs + 0.25, entropy

    exact.logprobs = shifted
    assert exact.noise_floor(sequences) == pytest.approx(0.25, abs=1e-4)


def test_layers_that_multiply_in_fp32_give_what_bf16_products_give(monkeypatch):
    """What a processor without bf16 products takes instead: the same within the rounding of bf16."""
    batch, found = make_batch(RAGGED), []
    for supported in (True, False):
        monkeypatch.setattr(policy_module, "_multiplies_bf16", lambda supported=supported: supported)
        policy = make_policy("qwen2", torch.bfloat16)
        layer = policy.model.base_model.layers[0].self_attn.q_proj
        assert ("forward" in vars(layer)) is not supported
        found.append((*policy.logprobs(batch), gradients(policy, batch)))
    (plain, plain_entropy, plain_gradients), (wide, wide_entropy, wide_gradients) = found
    assert (plain - wide).abs().max() < 5 * BF16 and (plain_entropy - wide_entropy).abs().max() < 5 * BF16
    for a, b in zip(plain_gradients, wide_gradients, strict=True):
        if a.norm() > 1e-3:
            assert torch.nn.functional.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0) > 0.98
