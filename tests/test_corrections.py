"""corrections.py and the reductions and advantages of loss.py: by hand, and their limits against each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loss
from config import Args, ConfigError
from corrections import CORRECTIONS, Correction, sequence_sums

INF = math.inf
LENGTHS = torch.tensor([3, 2])
MASK = torch.tensor([True, True, False, True, True])
RATIOS = torch.tensor([4.0, 0.6, 9.0, 0.25, 1.6])  # pi_old / mu; the third token is not trained on
# Whole sequences: W = 4 * 0.6 = 2.4 and 0.25 * 1.6 = 0.4; their geometric means 1.55 and 0.63.


def weights(correction, ratios=RATIOS, mask=MASK, lengths=LENGTHS):
    return correction.weights(ratios.log(), torch.zeros(len(ratios)), mask, lengths)


@pytest.mark.parametrize(
    ("correction", "expected", "capped", "masked"),
    [
        (Correction("none"), [1, 1, 1, 1], 0, 0),
        (Correction("token-tis"), [2, 0.6, 0.25, 1.6], 1, 0),
        (Correction("token-tis", 1.0), [1, 0.6, 0.25, 1], 2, 0),
        (Correction("sequence-tis", 1.5), [1.5, 1.5, 0.4, 0.4], 2, 0),
        (Correction("token-is"), [4, 0.6, 0.25, 1.6], 0, 0),
        (Correction("token-mask"), [4, 0.6, 0, 1.6], 0, 1),
        (Correction("token-mask", low=0.2, high=3.0), [0, 0.6, 0.25, 1.6], 0, 1),
        (Correction("sequence-mask"), [2.4, 2.4, 0.4, 0.4], 0, 0),
        (Correction("sequence-mask", low=0.5), [2.4, 2.4, 0, 0], 0, 2),
        (Correction("sequence-mask", high=1.9), [0, 0, 0.4, 0.4], 0, 2),
        (Correction("geometric-mask"), [0, 0, 0, 0], 0, 4),
        (Correction("geometric-mask", low=0.6, high=1.4), [0, 0, 1, 1], 0, 2),
        (Correction("ppo-is"), [1, 1, 1, 1], 0, 0),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_weights_by_hand(correction, expected, capped, masked):
    found = weights(correction)
    torch.testing.assert_close(found.is_weights[MASK], torch.tensor(expected).float())
    assert (int(found.capped.sum()), int(found.masked.sum())) == (capped, masked)
    assert found.is_weights.dtype == torch.float32 and not found.is_weights.requires_grad


ratio = st.floats(-3, 3)
sequences = st.lists(st.lists(st.tuples(ratio, st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5)


def packed(rows):
    delta = torch.tensor([d for row in rows for d, _ in row])
    mask = torch.tensor([m for row in rows for _, m in row])
    return delta.exp(), mask, torch.tensor([len(row) for row in rows])


@settings(max_examples=60, deadline=None)
@given(sequences)
def test_limits_meet(rows):
    """No cap and a band wide open are plain importance sampling, by token and by sequence."""
    ratios, mask, lengths = packed(rows)
    find = lambda *a, **k: weights(Correction(*a, **k), ratios, mask, lengths).is_weights[mask]  # noqa: E731
    plain = find("token-is")
    torch.testing.assert_close(find("token-tis", INF), plain)
    torch.testing.assert_close(find("token-mask", low=0.0, high=INF), plain)
    torch.testing.assert_close(find("sequence-tis", INF), find("sequence-mask", low=0.0, high=INF))
    torch.testing.assert_close(find("geometric-mask", low=0.0, high=INF), find("none"))
    assert (find("token-tis", 1.5) <= 1.5).all()
    one_each = weights(Correction("sequence-tis", 1.5), ratios, mask, torch.ones_like(lengths[:1]).expand(len(mask)))
    torch.testing.assert_close(one_each.is_weights[mask], find("token-tis", 1.5))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_equal_policies_make_all_of_them_equal(name):
    """Sampler and trainer agree: every weight is 1, and loss and gradient are those without a correction."""
    g = torch.Generator().manual_seed(0)
    old, advantages = -torch.rand(5, generator=g), torch.randn(5, generator=g)

    def run(correction):
        policy = (old + 0.1).requires_grad_()
        value, sums = loss.policy_loss(policy, old, old, advantages, MASK, 4, 0.2, 0.28, None, correction, LENGTHS)
        value.backward()
        return value.detach(), policy.grad, sums

    value, grad, sums = run(Correction(name))
    plain, plain_grad, _ = run(Correction("none"))
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(grad, plain_grad)
    assert float(sums["is_weights_sum"]) == 4 and int(sums["is_masked"]) == int(sums["is_capped"]) == 0


def test_the_direct_form_clips_the_gap_itself():
    """pi_theta = pi_old; mu is half or twice as likely: PPO's clip sees 2 and 0.5, no weight is left outside."""
    policy = torch.zeros(2, requires_grad=True)
    rollout = torch.tensor([0.5, 2.0]).log()
    arguments = (torch.zeros(2), rollout, torch.ones(2), torch.ones(2, dtype=torch.bool), 2, 0.2, 0.28, None)
    value, sums = loss.policy_loss(policy, *arguments, Correction("ppo-is"))
    torch.testing.assert_close(value.detach(), torch.tensor(-(1.28 + 0.5) / 2))
    value.backward()
    torch.testing.assert_close(policy.grad, torch.tensor([0.0, -0.25]))
    assert int(sums["clipped_high"]) == 1
    decoupled, _ = loss.policy_loss(policy, *arguments, Correction("token-is"))
    torch.testing.assert_close(decoupled.detach(), torch.tensor(-(2.0 + 0.5) / 2))


def test_sequences_with_a_masked_or_capped_token_are_counted():
    value, sums = loss.policy_loss(
        torch.zeros(5), torch.zeros(5), -RATIOS.log(), torch.ones(5), MASK, 4, 0.2, 0.28, None,
        Correction("token-mask"), LENGTHS,
    )  # fmt: skip
    assert [int(sums[k]) for k in ("sequences", "is_masked", "is_masked_sequences", "is_capped")] == [2, 1, 1, 0]
    torch.testing.assert_close(value, torch.tensor(-6.2 / 4))


def test_a_huge_gap_stays_finite():
    ratios = torch.tensor([1e-30, 1e30, 1.0, 1e30, 1e30])
    for name in CORRECTIONS:
        assert weights(Correction(name), ratios).is_weights.isfinite().all()


def test_a_token_that_a_band_takes_out_stays_in_the_denominator():
    """Three tokens of advantage 1, the second beyond the band: two terms of -1, divided by 3, not by 2."""
    old = torch.tensor([0.0, 2.0, 0.0])
    mask, ones = torch.ones(3, dtype=torch.bool), torch.ones(3)
    arguments = (old, old, torch.zeros(3), ones, mask, 3, 0.2, 0.28, None)
    value, sums = loss.policy_loss(*arguments, Correction("token-mask"), torch.tensor([3]))
    assert float(value) == pytest.approx(-2 / 3)
    assert (int(sums["tokens"]), int(sums["is_masked"])) == (3, 1)


def test_sequence_sums_of_empty_sequences_are_zero():
    sums = sequence_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0, 1, 0]))
    assert sums.tolist() == [0, 3, 0, 4, 0]


# ---- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "tis"}, ["--correction tis", "token-tis", "ppo-is"]),
        ({"name": "token-mask", "cap": 3.0}, ["--tis-cap 3.0", "token-mask", "token-tis, sequence-tis"]),
        ({"name": "token-tis", "low": 0.5}, ["--mask-low 0.5", "token-mask"]),
        ({"name": "none", "high": 2.0}, ["--mask-high 2.0", "none"]),
        ({"name": "token-mask", "low": 2.0, "high": 1.0}, ["--mask-low 2.0", "--mask-high 1.0", "low < high"]),
        ({"name": "token-mask", "low": 6.0}, ["--mask-low 6.0", "--mask-high 5.0"]),
        ({"name": "geometric-mask", "low": -1.0}, ["--mask-low -1.0"]),
        ({"name": "token-mask", "high": math.nan}, ["--mask-high nan"]),
        ({"name": "token-tis", "cap": 0.0}, ["--tis-cap 0.0", "> 0"]),
    ],
)
def test_bad_thresholds_name_the_flag(options, words):
    with pytest.raises(ValueError) as error:
        Correction(**options)
    assert [w for w in words if w not in str(error.value)] == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, Correction("token-tis", 2.0)),
        ({"tis_cap": 8.0}, Correction("token-tis", 8.0)),
        ({"tis_cap": None}, Correction("none")),
        ({"correction": "sequence-tis", "tis_cap": None}, Correction("none")),
        ({"correction": "token-mask"}, Correction("token-mask")),
        ({"correction": "token-mask", "mask_high": 2.0}, Correction("token-mask", high=2.0)),
        ({"correction": "none"}, Correction("none")),
        ({"correction": "ppo-is", "tis_cap": None}, Correction("ppo-is")),
    ],
)
def test_flags_make_the_correction(flags, expected):
    assert Args(**flags).resolved().gap_correction == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"correction": "token-mask", "tis_cap": 4.0}, "--tis-cap 4.0 has no meaning"),
        (
            {"correction": "none", "tis_cap": 2.0},
            "--tis-cap 2.0 has no meaning",
        ),  # the default's value too
        ({"correction": "ppo-is", "tis_cap": 2.0}, "--tis-cap 2.0 has no meaning"),
        ({"tis_cap": None, "mask_low": 0.5}, "--mask-low 0.5 has no meaning"),
        ({"correction": "mis"}, "--correction mis is not known"),
        ({"advantage": "gae"}, "--advantage gae is not known; there are grpo"),
        ({"loss_reduction": "mean"}, "--loss-reduction mean is not known; there are token-mean"),
    ],
)
def test_bad_flags_are_one_clear_error(flags, words):
    with pytest.raises(ConfigError, match=words):
        Args(**flags).resolved()


# ---- reductions


def reduced(reduction, values, mask, lengths, samples, budget=10):
    denominators = loss.loss_denominators(mask, lengths, samples, reduction, budget)
    return float(loss.token_mean(values, mask, denominators))


VALUES = torch.tensor([1.0, 2.0, 99.0, 4.0, 8.0, 16.0, 32.0, 64.0])
TOKENS = torch.tensor([True, True, False, True, True, True, True, True])
OF = torch.tensor([3, 1, 2, 2])  # two prompts with two samples each; trained: 2, 1, 2, 2 tokens


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token-mean", (3 + 4 + 24 + 96) / 7),
        ("sequence-mean", (3 / 2 + 4 + 24 / 2 + 96 / 2) / 4),
        ("prompt-mean", ((3 + 4) / 3 + (24 + 96) / 4) / 2),
        ("dr-grpo", (3 + 4 + 24 + 96) / (4 * 10)),
    ],
)
def test_reductions_by_hand(reduction, expected):
    assert reduced(reduction, VALUES, TOKENS, OF, 2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", loss.REDUCTIONS)
def test_reductions_of_equal_lengths_are_one(reduction):
    values, mask, lengths = torch.arange(12.0), torch.ones(12, dtype=torch.bool), torch.full((6,), 2)
    assert reduced(reduction, values, mask, lengths, 3, budget=2) == pytest.approx(5.5)


@pytest.mark.parametrize("reduction", loss.REDUCTIONS)
def test_samples_without_a_trained_token_do_not_count(reduction):
    mask = TOKENS.clone()
    mask[4:] = False  # the second prompt's
    whole = reduced(reduction, VALUES, mask, OF, 2)
    assert whole == pytest.approx(reduced(reduction, VALUES[:4], TOKENS[:4], OF[:2], 2))


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="no token of this update"):
        loss.loss_denominators(torch.zeros(3, dtype=torch.bool), torch.tensor([3]), 1, "token-mean", 4)


# ---- advantages


def test_rloo_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 0.0, 0.0, 1.0]])
    expected = [[1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3], [3 - 1 / 3, -4 / 3, -4 / 3, 1 - 3 / 3]]
    torch.testing.assert_close(loss.advantages_by("rloo", rewards), torch.tensor(expected))


@pytest.mark.parametrize("name", loss.ADVANTAGES)
def test_advantages_sum_to_zero_and_keep_the_order(name):
    rewards = torch.rand(7, 5, generator=torch.Generator().manual_seed(0))
    advantages = loss.advantages_by(name, rewards)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(7), rtol=0, atol=1e-5)
    assert torch.equal(advantages.argsort(1), rewards.argsort(1))
    assert torch.equal(loss.advantages_by(name, torch.ones(2, 3)), torch.zeros(2, 3))


def test_rloo_is_dr_grpo_times_g_over_g_minus_1():
    rewards = torch.rand(4, 6)
    torch.testing.assert_close(loss.advantages_by("rloo", rewards), loss.advantages_by("dr-grpo", rewards) * 6 / 5)
