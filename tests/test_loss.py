"""The maths of loss.py against numbers worked out by hand, and the ways in which an RL loss goes wrong unnoticed."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loss as L
from corrections import Correction

INF, NAN = float("inf"), float("nan")
PLAIN = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None, "correction": Correction("none")}
FULL = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "correction": Correction(cap=2.0)}


def logs(*probs):
    return torch.tensor(probs).log()


def close(actual, expected, **tolerance):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), check_dtype=False, **tolerance)


def tis(old, rollout, cap):
    """Weights of token-tis, or of no correction."""
    correction = Correction("none") if cap is None else Correction("token-tis", cap)
    return correction.weights(old, rollout, torch.ones(len(old), dtype=torch.bool)).is_weights


def each_its_own(mask):
    """Lengths of sequences of one token each."""
    return torch.ones(len(mask), dtype=torch.long)


def random_tokens(T, seed=0):
    """policy, old, rollout, advantages, mask: gaps wide enough that every clip and the cap are hit."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(T, generator=g)
    policy = old + 0.7 * torch.randn(T, generator=g)
    rollout = old + 0.7 * torch.randn(T, generator=g)
    return policy, old, rollout, torch.randn(T, generator=g), torch.rand(T, generator=g) < 0.8


def loss_and_grad(policy, old, rollout, advantages, mask, total_tokens, **options):
    policy = policy.clone().requires_grad_()
    options = {"lengths_N": each_its_own(mask)} | options
    value, sums = L.policy_loss(policy, old, rollout, advantages, mask, total_tokens, **options)
    value.backward()
    return value.detach(), policy.grad, sums


# ---- advantages and penalties


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 0.0, 0.0, 1.0]])
    # Row 0: deviations ±0.5, sample variance 4 * 0.25 / 3. Row 1: deviations 2 -1 -1 0, sample variance 6 / 3.
    a, b = 0.5 / math.sqrt(1 / 3), 1 / math.sqrt(2)
    close(L.group_advantages(rewards), [[a, -a, -a, a], [2 * b, -b, -b, 0.0]], rtol=1e-5, atol=1e-5)
    close(L.group_advantages(rewards, normalize_std=False), [[0.5, -0.5, -0.5, 0.5], [2.0, -1.0, -1.0, 0.0]])


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.7, 1e6 + 0.3])
@pytest.mark.parametrize("G", [2, 3, 7])
def test_equal_rewards_give_exactly_zero(reward, G, normalize_std):
    """0.1 is not its own mean in float32: a rounding error over a std of 1e-9 must not become an advantage."""
    advantages = L.group_advantages(torch.full((2, G), reward), normalize_std)
    assert torch.equal(advantages, torch.zeros(2, G))


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([[1.0, 0.0], [100.0, 50.0]])
    close(L.group_advantages(rewards)[0], L.group_advantages(rewards[:1])[0])


def test_soft_overlong_three_regimes():
    lengths = torch.tensor([0, 80, 81, 90, 100, 120])
    close(L.soft_overlong_penalty(lengths, 100, 20), [0.0, 0.0, -0.05, -0.5, -1.0, -1.0])
    close(L.soft_overlong_penalty(lengths, 100, 0), torch.zeros(6))
    close(L.soft_overlong_penalty(torch.tensor([0, 25, 100]), 100, 100), [0.0, -0.25, -1.0])


def test_overlong_mask_drops_every_token_of_a_truncated_sample():
    mask = L.overlong_mask(torch.tensor([False, True, False]), torch.tensor([2, 3, 1]))
    assert mask.tolist() == [True, True, False, False, False, True]


# ---- importance weights


def test_tis_is_capped_above_only():
    old, rollout = logs(0.8, 0.3, 0.1, 0.5), logs(0.2, 0.2, 0.4, 0.5)  # ratios 4, 1.5, 0.25, 1
    close(tis(old, rollout, 2.0), [2.0, 1.5, 0.25, 1.0])
    close(tis(old, rollout, INF), [4.0, 1.5, 0.25, 1.0])
    assert torch.equal(tis(old, rollout, None), torch.ones(4))


def test_tis_is_finite_detached_float32():
    old = torch.tensor([0.0, -500.0], requires_grad=True)
    weights = tis(old, torch.tensor([-500.0, 0.0]), INF)
    close(weights, [math.exp(20), math.exp(-20)])
    assert not weights.requires_grad
    for cap in (2.0, None):
        weights = tis(old.bfloat16(), old.bfloat16(), cap)
        assert weights.dtype == torch.float32 and not weights.requires_grad


def test_tis_uses_old_not_current_logprobs():
    """Where old == rollout the weight is 1, however far policy is: pi_theta / mu would count its move twice."""
    old = logs(0.4, 0.4)
    policy, advantages, mask = logs(0.44, 0.36), torch.tensor([1.0, -1.0]), torch.ones(2, dtype=torch.bool)
    value, _, sums = loss_and_grad(policy, old, old, advantages, mask, 2, **FULL)
    close(value, (-1.1 + 0.9) / 2)
    close(sums["is_weights_sum"], 2.0)


# ---- the clipped loss


def test_reinforce_by_hand_on_two_tokens():
    """At r = 1 the gradient is REINFORCE's, -w * A / tokens, although the two branches of the min tie there."""
    old = logs(0.5, 0.25)
    rollout, advantages = logs(0.4, 0.5), torch.tensor([2.0, -1.0])  # w = 1.25, 0.5
    value, grad, _ = loss_and_grad(old, old, rollout, advantages, torch.tensor([True, True]), 2, **FULL)
    close(value, (1.25 * -2.0 + 0.5 * 1.0) / 2)
    close(grad, [-1.25, 0.25])
    reinforce = old.clone().requires_grad_()
    (-(torch.tensor([1.25, 0.5]) * advantages * reinforce).sum() / 2).backward()
    close(grad, reinforce.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope", "low", "high"),
    [
        (1.25, 1.0, -1.25, -1.25, False, False),  # inside clip-higher: a symmetric 0.2 would have clipped it
        (1.50, 1.0, -1.28, 0.0, False, True),
        (0.50, 1.0, -0.50, -0.5, False, False),  # the min is pessimistic: no floor for A > 0
        (0.85, -1.0, 0.85, 0.85, False, False),
        (0.75, -1.0, 0.80, 0.0, True, False),  # a symmetric 0.28 would have kept it
        (1.50, -1.0, 1.50, 1.5, False, False),  # no ceiling for A < 0
        (1.50, 0.0, 0.0, 0.0, False, False),
        (0.50, 0.0, 0.0, 0.0, False, False),
    ],
)
def test_clip_higher_is_asymmetric(ratio, advantage, expected, slope, low, high):
    policy = torch.tensor([math.log(ratio)], requires_grad=True)
    token_loss, stats = L.dapo_token_loss(policy, torch.zeros(1), torch.tensor([advantage]))
    token_loss.sum().backward()
    close(token_loss, [expected])
    close(policy.grad, [slope])  # d ratio / d log-prob = ratio
    assert (stats.clipped_low.item(), stats.clipped_high.item()) == (low, high)
    assert not stats.dual_clipped.item()


def test_dual_clip_only_for_negative_advantages():
    policy = torch.tensor([5.0, 5.0, 2.0, 0.5]).log().requires_grad_()
    advantages = torch.tensor([-2.0, 2.0, -2.0, -2.0])
    token_loss, stats = L.dapo_token_loss(policy, torch.zeros(4), advantages, dual_clip=3.0)
    token_loss.sum().backward()
    close(token_loss, [6.0, -2.56, 4.0, 1.6])
    close(policy.grad, [0.0, 0.0, 4.0, 0.0])
    assert stats.dual_clipped.tolist() == [True, False, False, False]
    assert stats.clipped_high.tolist() == [False, True, False, False]
    assert stats.clipped_low.tolist() == [False, False, False, True]
    without, _ = L.dapo_token_loss(policy, torch.zeros(4), advantages)
    close(without[0], 10.0)


def test_tis_goes_on_after_the_dual_clip():
    """w * (c * |A|), not min(w * r * |A|, c * |A|)."""
    policy, old, rollout = torch.tensor([math.log(5.0)]), torch.zeros(1), torch.tensor([-math.log(1.5)])
    value, _, _ = loss_and_grad(policy, old, rollout, torch.tensor([-1.0]), torch.tensor([True]), 1, **FULL)
    close(value, 1.5 * 3.0)


def test_exploded_ratio_keeps_loss_and_gradient_finite():
    """A clipped token has zero gradient, but 0 * exp(inf) would be NaN."""
    policy = torch.tensor([0.0, 0.0, -200.0, -INF], requires_grad=True)
    old = torch.tensor([-200.0, -200.0, 0.0, 0.0])
    token_loss, _ = L.dapo_token_loss(policy, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), dual_clip=10.0)
    token_loss.sum().backward()
    close(token_loss, [-1.28, 10.0, 0.0, 0.8], rtol=1e-5, atol=1e-5)
    close(policy.grad, torch.zeros(4))


def test_gradient_goes_through_policy_logprobs_only():
    policy, old, rollout, advantages, mask = random_tokens(50)
    leaves = [x.clone().requires_grad_() for x in (policy, old, rollout, advantages)]
    value, sums = L.policy_loss(*leaves, mask, 40, **FULL)
    value.backward()
    assert leaves[0].grad.abs().sum() > 0
    assert all(leaf.grad is None for leaf in leaves[1:])
    assert not any(x.requires_grad for x in sums.values())


def test_gradient_survives_old_being_the_attached_policy():
    """One update per batch: old is the policy's own log-prob. Without a detach r's gradient cancels to zero."""
    policy = logs(0.5, 0.25).requires_grad_()
    mask = torch.tensor([True, True])
    L.policy_loss(policy, policy, policy, torch.tensor([2.0, -1.0]), mask, 2, **FULL)[0].backward()
    close(policy.grad, [-1.0, 0.5])


def test_inputs_are_not_written_to():
    inputs = random_tokens(30)
    before = [x.clone() for x in inputs]
    L.policy_loss(*inputs, 30, **FULL)
    L.mismatch_sums(inputs[1], inputs[2], inputs[4], 2.0)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


# ---- reduction: splits and masks


@settings(max_examples=60, deadline=None)
@given(T=st.integers(1, 64), cuts=st.lists(st.integers(0, 64), max_size=5), seed=st.integers(0, 2**16))
def test_micro_batches_change_nothing(T, cuts, seed):
    inputs = random_tokens(T, seed)
    inputs[-1][0] = True
    total_tokens = int(inputs[-1].sum())
    value, grad, sums = loss_and_grad(*inputs, total_tokens, **FULL)
    edges = sorted({0, T, *(c for c in cuts if c < T)})
    part_values, part_grads, part_sums, part_mismatch = [], [], {}, {}
    for start, stop in pairwise(edges):
        part = [x[start:stop] for x in inputs]
        v, g, s = loss_and_grad(*part, total_tokens, **FULL)
        part_values.append(v)
        part_grads.append(g)
        part_sums = L.merge_sums(part_sums, s)
        part_mismatch = L.merge_sums(
            part_mismatch, L.mismatch_sums(part[1], part[2], part[4], 2.0, each_its_own(part[4]))
        )
    close(sum(part_values), value, rtol=1e-6, atol=1e-6)
    close(torch.cat(part_grads), grad, rtol=1e-6, atol=1e-6)
    assert part_sums.keys() == sums.keys()
    for key, expected in sums.items():
        close(part_sums[key], expected)
    metrics = L.mismatch_metrics(L.mismatch_sums(inputs[1], inputs[2], inputs[4], 2.0, each_its_own(inputs[4])))
    assert L.mismatch_metrics(part_mismatch) == pytest.approx(metrics, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("poison", [0.0, NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("where", ["policy", "old", "rollout", "advantages", "all"])
@pytest.mark.parametrize("options", [PLAIN, FULL])
def test_masked_tokens_equal_removed_tokens(poison, where, options):
    """One poisoned input at a time as well: 0 * inf in the backward of a product can hide behind another clamp."""
    policy, old, rollout, advantages, mask = random_tokens(40)
    kept = [x[mask] for x in (policy, old, rollout, advantages, mask)]
    expected, expected_grad, expected_sums = loss_and_grad(*kept, int(mask.sum()), **options)
    inputs = {"policy": policy, "old": old, "rollout": rollout, "advantages": advantages}
    poisoned = [torch.where(mask, x, poison) if where in (name, "all") else x for name, x in inputs.items()]
    value, grad, sums = loss_and_grad(*poisoned, mask, int(mask.sum()), **options)
    close(value, expected)
    close(grad[mask], expected_grad)
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
    for key in expected_sums:
        close(sums[key], expected_sums[key])
    for key, whole in L.mismatch_sums(kept[1], kept[2], kept[4], 2.0).items():
        close(L.mismatch_sums(poisoned[1], poisoned[2], mask, 2.0)[key], whole)


def test_token_mean_ignores_masked_nan():
    token_loss = torch.tensor([1.0, NAN, 3.0, INF], requires_grad=True)
    value = L.token_mean(token_loss, torch.tensor([True, False, True, False]), 8)
    value.backward()
    close(value, 0.5)
    close(token_loss.grad, [0.125, 0.0, 0.125, 0.0])


@pytest.mark.parametrize("T", [0, 3])
def test_micro_batch_without_a_trained_token_adds_zero(T):
    inputs = (*random_tokens(T)[:4], torch.zeros(T, dtype=torch.bool))
    value, grad, sums = loss_and_grad(*inputs, 10, **FULL)
    assert value == 0 and torch.equal(grad, torch.zeros(T))
    assert all(x == 0 for x in sums.values())
    assert all(not x.any() for x in L.mismatch_sums(inputs[1], inputs[2], inputs[4], 2.0).values())


def test_non_finite_sampler_logprobs_leave_loss_and_denominator():
    rollout = torch.tensor([-1.0, NAN, -INF, INF, -2.0])
    mask = torch.tensor([True, True, True, True, False])
    assert L.finite_mask(rollout, mask).tolist() == [True, False, False, False, False]
    kept = L.finite_mask(rollout, mask)
    value, _, _ = loss_and_grad(rollout[0].expand(5), rollout[0].expand(5), rollout, torch.ones(5), kept, 1, **FULL)
    close(value, -1.0)


def test_policy_loss_sums_by_hand():
    policy = torch.tensor([1.5, 0.5, 5.0, 1.0, 9.0]).log()
    rollout = -torch.tensor([4.0, 0.5, 1.0, 1.0, 9.0]).log()  # old = 0: w = 4 -> 2, 0.5, 1, 1
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    mask = torch.tensor([True, True, True, True, False])
    value, _, sums = loss_and_grad(policy, torch.zeros(5), rollout, advantages, mask, 4, **FULL)
    close(value, (2 * -1.28 + 0.5 * 0.8 + 1 * 3.0 + 1 * -1.0) / 4)
    expected = {"tokens": 4, "ratio_sum": 8.0, "is_weights_sum": 4.5, "ratio_max": 5.0}
    expected |= {"clipped_low": 1, "clipped_high": 1, "dual_clipped": 1, "is_weights_max": 2.0, "is_capped": 1}
    expected |= {"is_masked": 0, "sequences": 4, "is_capped_sequences": 1, "is_masked_sequences": 0}
    assert {key: float(x) for key, x in sums.items()} == pytest.approx(expected, rel=1e-6)


# ---- mismatch statistics


def test_mismatch_by_hand_on_three_tokens():
    old, rollout = logs(0.6, 0.1, 0.5), logs(0.2, 0.2, 0.5)  # w = 3, 1/2, 1
    old, rollout = torch.cat([old, logs(0.9)]), torch.cat([rollout, logs(0.1)])
    mask = torch.tensor([True, True, True, False])
    metrics = L.mismatch_metrics(L.mismatch_sums(old, rollout, mask, 2.0, torch.tensor([2, 2])))  # W = 3/2, 1
    log2, log3 = math.log(2), math.log(3)
    expected = {
        "mismatch/abs_dlogp_mean": (log3 + log2) / 3,
        "mismatch/abs_dlogp_max": log3,
        "mismatch/kl_k1": (log2 - log3) / 3,
        "mismatch/kl_k3": ((3 - 1 - log3) + (0.5 - 1 + log2)) / 3,
        "mismatch/ess": 4.5**2 / (3 * (9 + 0.25 + 1)),
        "mismatch/chi2": (4 + 0.25) / 3,
        "mismatch/capped_share": 1 / 3,
        "mismatch/ratio_mean": 1.5,
        "mismatch/ratio_max": 3.0,
        "mismatch/ratio_p99": pytest.approx(3.0, rel=0.01),
        "mismatch/sequence_abs_dlogp_mean": (log3 - log2) / 2,
        "mismatch/sequence_ess": 2.5**2 / (2 * (2.25 + 1)),
        "mismatch/dprob_max": 0.4,
    }
    assert metrics.pop("mismatch/ratio_p99") == expected.pop("mismatch/ratio_p99")
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert list(metrics) == list(expected)


def test_kl_estimators_and_chi2_have_the_stated_direction():
    """Exact expectations over three letters, drawn from mu: both estimators give KL(mu || pi), not the reverse."""
    mu, pi = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    draws = torch.tensor([0, 0, 1, 2])  # in proportion to mu
    mask = torch.ones(4, dtype=torch.bool)
    metrics = L.mismatch_metrics(L.mismatch_sums(pi.log()[draws], mu.log()[draws], mask, None))
    kl = float((mu * (mu / pi).log()).sum())
    assert metrics["mismatch/kl_k1"] == pytest.approx(kl, rel=1e-6)
    assert metrics["mismatch/kl_k3"] == pytest.approx(kl, rel=1e-6)
    assert metrics["mismatch/chi2"] == pytest.approx(float((pi.square() / mu).sum() - 1), rel=1e-6)
    assert metrics["mismatch/ratio_mean"] == pytest.approx(1.0)
    assert metrics["mismatch/capped_share"] == 0.0


@pytest.mark.parametrize("cap", [0.5, 2.0, INF, None])
def test_equal_logprobs_are_no_mismatch(cap):
    old, mask = random_tokens(20)[1], torch.ones(20, dtype=torch.bool)
    metrics = L.mismatch_metrics(L.mismatch_sums(old, old.clone(), mask, cap))
    ones = {"ess", "ratio_mean", "ratio_max", "ratio_p99", "sequence_ess"}
    ones = {f"mismatch/{name}" for name in ones} | ({"mismatch/capped_share"} if cap == 0.5 else set())
    assert metrics == {key: float(key in ones) for key in metrics}


def test_mismatch_survives_an_extreme_gap():
    sums = L.mismatch_sums(torch.tensor([0.0, -400.0]), torch.tensor([-400.0, 0.0]), torch.tensor([True, True]), 2.0)
    metrics = L.mismatch_metrics(sums)
    assert all(math.isfinite(x) for x in metrics.values())
    assert metrics["mismatch/abs_dlogp_max"] == 400.0  # the log gap is reported as it is, only w is bounded
    assert metrics["mismatch/ess"] == pytest.approx(0.5)


def test_merge_adds_and_takes_the_larger_max():
    a = {"tokens": torch.tensor(2), "ratio_max": torch.tensor(3.0)}
    b = {"tokens": torch.tensor(5), "ratio_max": torch.tensor(1.0)}
    assert L.merge_sums(a, b) == L.merge_sums(b, a) == {"tokens": 7, "ratio_max": 3.0}
    assert L.merge_sums({}, a) == L.merge_sums(a, {}) == {"tokens": 2, "ratio_max": 3.0}
    assert a["tokens"] == 2


# ---- bad inputs


X, M = torch.zeros(2), torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "flag"),
    [
        (lambda: tis(X, X, 0.0), "--tis-cap 0.0"),
        (lambda: tis(X, X, -1.0), "--tis-cap -1.0"),
        (lambda: tis(X, X, NAN), "--tis-cap nan"),
        (lambda: L.mismatch_sums(X, X, M, 0.0), "--tis-cap 0.0"),
        (lambda: L.policy_loss(X, X, X, X, M, 2, 0.2, 0.28, None, Correction(cap=0.0)), "--tis-cap 0.0"),
        (lambda: L.dapo_token_loss(X, X, X, clip_low=1.5), "--clip-low 1.5"),
        (lambda: L.dapo_token_loss(X, X, X, clip_low=NAN), "--clip-low nan"),
        (lambda: L.dapo_token_loss(X, X, X, clip_high=-0.1), "--clip-high -0.1"),
        (lambda: L.dapo_token_loss(X, X, X, dual_clip=1.0), "--dual-clip 1.0"),
        (lambda: L.token_mean(X, M, 0), "total_tokens is 0"),
        (lambda: L.token_mean(X, M, -3), "total_tokens is -3"),
        (lambda: L.soft_overlong_penalty(X, 100, 101), "--overlong-buffer 101"),
        (lambda: L.soft_overlong_penalty(X, 100, -1), "--overlong-buffer -1"),
        (lambda: L.group_advantages(torch.zeros(4, 1)), "--samples-per-prompt"),
        (lambda: L.group_advantages(torch.zeros(4)), "--samples-per-prompt"),
        (lambda: L.group_advantages(torch.tensor([[1.0, NAN]])), "1 of 2 rewards"),
        (lambda: L.mismatch_metrics(L.mismatch_sums(X, X, ~M, 2.0)), "no tokens"),
    ],
)
def test_bad_inputs_are_named(call, flag):
    with pytest.raises(ValueError, match=flag):
        call()


def test_a_shape_that_would_broadcast_is_refused():
    """[T, 1] against [T] would quietly become a T x T loss."""
    with pytest.raises(AssertionError, match="packed"):
        L.policy_loss(X, X, X, X[:, None], M, 2, **FULL)
    with pytest.raises(AssertionError, match="bool"):
        L.mismatch_sums(X, X, M.float(), 2.0)
