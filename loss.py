"""Pure tensor maths of the update: advantages, importance weights, the DAPO loss, mismatch statistics.

Axes: P prompts, G samples per prompt, N = P*G samples, T packed tokens (samples one after another, no padding).

Policies: mu is the quantized sampler (`rollout_logprobs`), pi_old the trainer with the weights of the step's start
(`old_logprobs`), pi_theta the trainer now (`policy_logprobs`, the only tensor that carries gradient). Log-probs are
natural logs of the sampled token's probability (nats). Per-token tensors are float32 [T], `mask` is bool [T], True = a
sampled token that is trained on; what a masked-out token holds (NaN and inf included) never matters.

The loss of a step, summed over its micro-batches (no KL term):

    sum over mask of  min(pi_old/mu, C) * clip_loss(pi_theta/pi_old, A)   /   the update's GLOBAL token count

with other weights by corrections.py, other denominators by `loss_denominators`.

Statistics leave here as sums, counts and maxima, so that micro-batches and ranks add up exactly (`merge_sums`).
Nothing here reads a config, does I/O or writes into its inputs.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from corrections import LOG_RATIO_LIMIT, Correction, sequence_sums, spread

REDUCTIONS = ("token-mean", "sequence-mean", "prompt-mean", "dr-grpo")
ADVANTAGES = ("grpo", "dr-grpo", "rloo")
LOG_RATIO_BIN = 0.01  # nats, of the histogram behind quantiles of the ratio


class TokenStats(NamedTuple):
    """What the clips did to each token: detached [T] tensors, not masked yet."""

    ratio: Tensor  # float32, pi_theta / pi_old
    clipped_low: Tensor  # bool: A < 0 and ratio < 1 - clip_low, no gradient
    clipped_high: Tensor  # bool: A > 0 and ratio > 1 + clip_high, no gradient
    dual_clipped: Tensor  # bool: A < 0 and ratio > dual_clip, no gradient


# ---- rewards to advantages


def group_advantages(rewards_P_G: Tensor, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Advantages [P, G] of rewards [P, G] within each prompt's group: (r - mean) / (std + eps).

    GRPO (arXiv 2402.03300, section 4.1.2), DAPO (arXiv 2503.14476, eq. 9). The std is the sample std (divisor G - 1),
    as in TRL and verl. `normalize_std=False` is Dr. GRPO (arXiv 2503.20783): r - mean, no bias by difficulty. A group
    of equal rewards gives exactly 0, whatever its mean rounds to.
    Raises ValueError if G < 2 or a reward is not finite.
    """
    if rewards_P_G.ndim != 2 or rewards_P_G.shape[1] < 2:
        raise ValueError(
            f"rewards are {tuple(rewards_P_G.shape)}, but advantages need [prompts, samples], 2 samples or more: "
            "set --samples-per-prompt to at least 2"
        )
    if bad := int((~torch.isfinite(rewards_P_G)).sum()):
        raise ValueError(f"{bad} of {rewards_P_G.numel()} rewards are NaN or inf: fix the reward function")
    rewards = rewards_P_G.float()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True, unbiased=True) + eps)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(equal, 0.0, advantages)


def rloo_advantages(rewards_P_G: Tensor) -> Tensor:
    """Advantages [P, G] against the mean reward of the other samples of the prompt: r_i - sum_{j != i} r_j / (G - 1).

    RLOO (arXiv 2402.14740, eq. 8; Kool et al. 2019): unbiased, as a sample is not in its own baseline. It is
    G / (G - 1) times Dr. GRPO's r - mean. Raises ValueError as `group_advantages` does.
    """
    samples = rewards_P_G.shape[-1]
    return group_advantages(rewards_P_G, normalize_std=False) * (samples / max(samples - 1, 1))


def advantages_by(name: str, rewards_P_G: Tensor) -> Tensor:
    """Advantages [P, G] by one of ADVANTAGES. Raises ValueError for another name."""
    if name == "rloo":
        return rloo_advantages(rewards_P_G)
    if name not in ADVANTAGES:
        raise ValueError(f"--advantage {name} is not known; there are {', '.join(ADVANTAGES)}")
    return group_advantages(rewards_P_G, normalize_std=name == "grpo")


def soft_overlong_penalty(response_lengths_N: Tensor, max_response_len: int, buffer: int) -> Tensor:
    """Penalty [N] in [-1, 0] to add to the rewards, from response lengths [N] in tokens (the prompt does not count).

    DAPO (arXiv 2503.14476, eq. 13): 0 up to max_response_len - buffer, then linear down to -1 at max_response_len.
    `buffer=0` means no penalty. Raises ValueError if buffer is negative or larger than max_response_len.
    """
    if not 0 <= buffer <= max_response_len:
        raise ValueError(
            f"--overlong-buffer {buffer} must lie between 0 (off) and --max-response-len {max_response_len}: "
            "lower the buffer or raise the response length"
        )
    lengths = response_lengths_N.float()
    if buffer == 0:
        return torch.zeros_like(lengths)
    return ((max_response_len - buffer - lengths) / buffer).clamp(-1.0, 0.0)


# ---- masks


def overlong_mask(finish_truncated_N: Tensor, lengths_N: Tensor) -> Tensor:
    """Mask [T], False on every token of a truncated sample: overlong filtering (DAPO, arXiv 2503.14476, section 3.4).

    finish_truncated_N: bool [N], True = stopped by the length limit. lengths_N: int [N], packed tokens of each sample,
    T = lengths_N.sum(). AND it with the token mask, and count `total_tokens` afterwards.
    """
    return torch.repeat_interleave(~finish_truncated_N, lengths_N)


def finite_mask(rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """`mask` [T] without the tokens whose sampler log-prob [T] is NaN or inf.

    Apply it before `total_tokens` is counted: such a token leaves the loss and the denominator. The number dropped is
    `mask.sum() - finite_mask(...).sum()`.
    """
    return mask & torch.isfinite(rollout_logprobs)


# ---- the loss


def dapo_token_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
) -> tuple[Tensor, TokenStats]:
    """Clipped surrogate loss [T] (to minimize) and what was clipped; all inputs [T], advantages repeated per token.

    With r = pi_theta / pi_old:  -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A)
    (clip-higher: DAPO, arXiv 2503.14476, eq. 10). `dual_clip=c` bounds it by -c * A where A < 0 (arXiv 1912.09729,
    dual-clip PPO: max(min(...), c * A) of the objective), so that a token whose r exploded cannot dominate.
    The gradient goes through policy_logprobs alone; beyond |log r| = 20 it is 0.
    Raises ValueError if clip_low is outside [0, 1], clip_high < 0 or dual_clip <= 1.
    """
    if not 0 <= clip_low <= 1:
        raise ValueError(
            f"--clip-low {clip_low} must lie in [0, 1], since the ratio is kept above 1 - clip_low: try 0.2"
        )
    if not clip_high >= 0:
        raise ValueError(f"--clip-high {clip_high} must be >= 0, since the ratio is kept below 1 + clip_high: try 0.28")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"--dual-clip {dual_clip} must be > 1, or it clips unchanged tokens: try 10, or none for off")
    advantages = advantages.detach()
    ratio = _ratio(policy_logprobs, old_logprobs.detach())
    token_loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    negative = advantages < 0
    dual_clipped = torch.zeros_like(negative)
    if dual_clip is not None:
        token_loss = torch.where(negative, torch.minimum(token_loss, -dual_clip * advantages), token_loss)
        dual_clipped = negative & (ratio > dual_clip)
    clipped_low = negative & (ratio < 1 - clip_low)
    clipped_high = (advantages > 0) & (ratio > 1 + clip_high)
    return token_loss, TokenStats(ratio.detach(), clipped_low, clipped_high, dual_clipped)


def token_mean(token_loss: Tensor, mask: Tensor, total_tokens: Tensor | int) -> Tensor:
    """Scalar: sum of token_loss [T] over mask [T] / total_tokens (DAPO, arXiv 2503.14476, eq. 12).

    total_tokens: trained tokens of the whole UPDATE (all micro-batches, all ranks), so that the micro-batches' losses
    and gradients add up to its; or [T], each token's denominator (`loss_denominators`). Raises ValueError if the number
    is not positive.
    """
    if isinstance(total_tokens, Tensor):
        return _masked_sum(token_loss / total_tokens, mask)
    if not total_tokens > 0:
        raise ValueError(
            f"total_tokens is {total_tokens}: no token of this step is left to train on; skip the step, or raise "
            "--max-sample-rounds or --max-response-len if groups are dropped or truncated"
        )
    return _masked_sum(token_loss, mask) / total_tokens


def loss_denominators(
    mask: Tensor, lengths_N: Tensor, samples_per_prompt: int, reduction: str, max_response_len: int
) -> Tensor:
    """What each token's loss [T] of an update is divided by, so that its sum over the update is the reduction named.

    mask: bool [T], the update's trained tokens; lengths_N: packed tokens of each sample, whole groups of
    `samples_per_prompt` one after another. With n_i trained tokens in sample i, n_p in the group of prompt p, and N
    samples and P prompts that have any:

    token-mean      sum n_i                every token counts the same (DAPO, arXiv 2503.14476, eq. 12)
    sequence-mean   N * n_i                every response (GRPO, arXiv 2402.03300, eq. 3)
    prompt-mean     P * n_p                every prompt
    dr-grpo         N * max_response_len   no bias by length: a constant budget (Dr. GRPO, arXiv 2503.20783)

    Raises ValueError for another name, and where no token is trained on.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"--loss-reduction {reduction} is not known; there are {', '.join(REDUCTIONS)}")
    trained_N = sequence_sums(mask, lengths_N)
    total = float(trained_N.sum())
    if total == 0:
        raise ValueError(
            "no token of this update is left to train on; skip it, or raise --max-sample-rounds or --max-response-len "
            "if groups are dropped or truncated"
        )
    if reduction == "token-mean":
        each_N = torch.full_like(trained_N, total)
    elif reduction == "sequence-mean":
        each_N = trained_N * (trained_N > 0).sum()
    elif reduction == "prompt-mean":
        trained_P = trained_N.view(-1, samples_per_prompt).sum(1)
        each_N = (trained_P * (trained_P > 0).sum()).repeat_interleave(samples_per_prompt)
    else:
        each_N = torch.full_like(trained_N, max_response_len) * (trained_N > 0).sum()
    return spread(each_N.clamp(min=1).float(), lengths_N, len(mask))


def policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominators: Tensor | int,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    correction: Correction,
    lengths_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The micro-batch's share of the update's loss (scalar), and its sums for `merge_sums` (detached 0-d tensors).

    Tensors are [T]; denominators are `loss_denominators`' of the whole update, or its token count. The correction's
    weight multiplies after the clip and the dual clip, before the reduction; a direct correction puts mu in pi_old's
    place. lengths_N, tokens of each sequence, is for corrections of whole sequences and the counts of them. Masked-out
    tokens are replaced before any arithmetic, because zero times NaN or inf is NaN in the backward pass too.

    Sums: tokens, ratio_sum, is_weights_sum, clipped_low, clipped_high, dual_clipped, is_capped, is_masked (tokens),
    sequences, is_capped_sequences, is_masked_sequences (with such a token); ratio_max, is_weights_max.
    Raises ValueError as `Correction`, `dapo_token_loss` and `token_mean` do.
    """
    inputs = (policy_logprobs, old_logprobs, rollout_logprobs, advantages)
    _assert_packed(mask, *inputs)
    policy, old, rollout, advantages = (torch.where(mask, x, 0.0) for x in inputs)
    reference = rollout if correction.kind.direct else old
    token_loss, stats = dapo_token_loss(policy, reference, advantages, clip_low, clip_high, dual_clip)
    is_weights, capped, masked = correction.weights(old, rollout, mask, lengths_N)
    loss = token_mean(is_weights * token_loss, mask, denominators)
    if lengths_N is None:
        lengths_N = mask.new_tensor([mask.shape[0]], dtype=torch.long)

    def sequences(which: Tensor) -> Tensor:
        return (sequence_sums(which, lengths_N) > 0).sum()

    return loss, {  # no flag is set on a masked-out token: its advantage is 0 here
        "tokens": mask.sum(),
        "ratio_sum": _masked_sum(stats.ratio.double(), mask),
        "is_weights_sum": _masked_sum(is_weights.double(), mask),
        "is_weights_max": _masked_max(is_weights, mask),
        "is_capped": capped.sum(),
        "is_masked": masked.sum(),
        "sequences": sequences(mask),
        "is_capped_sequences": sequences(capped),
        "is_masked_sequences": sequences(masked),
        "clipped_low": stats.clipped_low.sum(),
        "clipped_high": stats.clipped_high.sum(),
        "dual_clipped": stats.dual_clipped.sum(),
        "ratio_max": _masked_max(stats.ratio, mask),
    }


# ---- how far the sampler is from the trainer


@torch.no_grad()
def mismatch_sums(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cap: float | None, lengths_N: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums, counts and maxima (0-d, float64 or int64) of the gap between pi_old and mu; all inputs [T].

    delta = old - rollout, w = exp(clamp(delta, -20, 20)), not truncated: the cap decides `capped` alone (tokens with
    w > cap, none if cap is None). `finite_mask` must have been applied to mask. lengths_N, tokens of each sequence, is
    for sums of W = exp(sum of delta over a sequence); `histogram` [bins] counts delta, LOG_RATIO_BIN nats each.
    `mismatch_metrics` says what the terms estimate. Raises ValueError if cap <= 0 or NaN.
    """
    _check_cap(cap)
    _assert_packed(mask, old_logprobs, rollout_logprobs)
    old, rollout = old_logprobs.double(), rollout_logprobs.double()
    delta = old - rollout
    w_minus_1 = delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).expm1()
    w = w_minus_1 + 1
    lengths_N = mask.new_tensor([mask.shape[0]], dtype=torch.long) if lengths_N is None else lengths_N
    log_w_N = sequence_sums(torch.where(mask, delta, 0.0), lengths_N)
    trained_N = sequence_sums(mask, lengths_N) > 0
    w_N = log_w_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    bins = int(2 * LOG_RATIO_LIMIT / LOG_RATIO_BIN) + 1
    bounded = delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT) + LOG_RATIO_LIMIT
    bin_T = (bounded / LOG_RATIO_BIN + 0.5).long().clamp(0, bins - 1)
    return {
        "histogram": mask.new_zeros(bins, dtype=torch.long).scatter_add_(0, bin_T, mask.long()),
        "w_max": _masked_max(w, mask),
        "sequences": trained_N.sum(),
        "sequence_abs_dlogp_sum": _masked_sum(log_w_N.abs(), trained_N),
        "sequence_w_sum": _masked_sum(w_N, trained_N),
        "sequence_w_sq_sum": _masked_sum(w_N.square(), trained_N),
        "tokens": mask.sum(),
        "abs_dlogp_sum": _masked_sum(delta.abs(), mask),
        "k1_sum": _masked_sum(-delta, mask),
        "k3_sum": _masked_sum(w_minus_1 - delta, mask),
        "w_sum": _masked_sum(w, mask),
        "w_sq_sum": _masked_sum(w.square(), mask),
        "chi2_sum": _masked_sum(w_minus_1.square(), mask),
        "capped": (mask & (w > (float("inf") if cap is None else cap))).sum(),
        "abs_dlogp_max": _masked_max(delta.abs(), mask),
        "dprob_max": _masked_max((old.exp() - rollout.exp()).abs(), mask),
    }


def merge_sums(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of two micro-batches as one: values add, keys that end in `_max` take the larger; {} is neutral."""
    merged = a | b
    for key in a.keys() & b.keys():
        merged[key] = torch.maximum(a[key], b[key]) if key.endswith("_max") else a[key] + b[key]
    return merged


def mismatch_metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """Merged `mismatch_sums` as the step's metrics, means over its trained tokens; w = pi_old / mu.

    abs_dlogp_mean, abs_dlogp_max  |log pi_old - log mu|, nats
    kl_k1, kl_k3   KL(mu || pi_old), nats, samples from mu: k1 = -delta (unbiased, may be negative) and
                   k3 = w - 1 - delta (>= 0, less variance); Schulman, http://joschu.net/blog/kl-approx.html
    ess            effective sample size as a share of the tokens, (sum w)^2 / (n * sum w^2), in (0, 1]
    chi2           chi^2(pi_old || mu) as the mean of (w - 1)^2 (>= 0; E[w^2] - 1 in expectation, since E[w] = 1)
    capped_share   share of tokens whose weight the cap truncated
    ratio_mean     mean w, 1 in expectation; ratio_max the largest; ratio_p99 the 99th percentile, to a bin of 1 %
    dprob_max      largest |pi_old(a) - mu(a)|
    sequence_abs_dlogp_mean, sequence_ess   of whole sequences: mean |sum of delta|, and the ess of W = exp(that sum)

    Raises ValueError if the sums hold no token.
    """
    histogram = sums["histogram"]
    s = {key: float(value) for key, value in sums.items() if key != "histogram"}
    n = s["tokens"]
    if n == 0:
        raise ValueError("no tokens in the mismatch sums: skip the metrics of a step that trains on nothing")
    return {
        "mismatch/abs_dlogp_mean": s["abs_dlogp_sum"] / n,
        "mismatch/abs_dlogp_max": s["abs_dlogp_max"],
        "mismatch/kl_k1": s["k1_sum"] / n,
        "mismatch/kl_k3": s["k3_sum"] / n,
        "mismatch/ess": s["w_sum"] ** 2 / (n * s["w_sq_sum"]),
        "mismatch/chi2": s["chi2_sum"] / n,
        "mismatch/capped_share": s["capped"] / n,
        "mismatch/ratio_mean": s["w_sum"] / n,
        "mismatch/ratio_max": s["w_max"],
        "mismatch/ratio_p99": _quantile(histogram, 0.99),
        "mismatch/sequence_abs_dlogp_mean": s["sequence_abs_dlogp_sum"] / s["sequences"],
        "mismatch/sequence_ess": s["sequence_w_sum"] ** 2 / (s["sequences"] * s["sequence_w_sq_sum"]),
        "mismatch/dprob_max": s["dprob_max"],
    }


# ---- helpers


def _ratio(numerator_logprobs: Tensor, denominator_logprobs: Tensor) -> Tensor:
    log_ratio = numerator_logprobs.float() - denominator_logprobs.float()
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0).sum()


def _masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """Largest masked-in value of a non-negative x; 0 where there is none."""
    return torch.nn.functional.pad(torch.where(mask, x, 0.0), (0, 1)).amax()


def _quantile(histogram: Tensor, share: float) -> float:
    """The ratio below which `share` of the counted log-ratios lie: the middle of the bin."""
    reached = histogram.cumsum(0) >= share * histogram.sum()
    return math.exp(int(reached.int().argmax()) * LOG_RATIO_BIN - LOG_RATIO_LIMIT)


def _check_cap(cap: float | None) -> None:
    if cap is not None and not cap > 0:
        raise ValueError(f"--tis-cap {cap} must be > 0: try 2.0, inf to never truncate, or none for no correction")


def _assert_packed(mask: Tensor, *tensors: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (mask, *tensors)]
    assert mask.ndim == 1 and len(set(shapes)) == 1, f"expected packed [T] tensors of one length, got {shapes}"
    assert mask.dtype == torch.bool, f"mask must be bool, got {mask.dtype}"
