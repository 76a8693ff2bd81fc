"""Pure tensor maths of the update: advantages, importance weights, the DAPO loss, mismatch statistics.

Axes: P prompts, G samples per prompt, N = P*G samples, T packed tokens (samples one after another, no padding).

Policies: mu is the quantized sampler (`rollout_logprobs`), pi_old the trainer with the weights of the step's start
(`old_logprobs`), pi_theta the trainer now (`policy_logprobs`, the only tensor that carries gradient). Log-probs are
natural logs of the sampled token's probability (nats). Per-token tensors are float32 [T], `mask` is bool [T], True = a
sampled token that is trained on; what a masked-out token holds (NaN and inf included) never matters.

The loss of a step, summed over its micro-batches (no KL term):

    sum over mask of  min(pi_old/mu, C) * clip_loss(pi_theta/pi_old, A)   /   the step's GLOBAL token count

Statistics leave here as sums, counts and maxima, so that micro-batches and ranks add up exactly (`merge_sums`).
Nothing here reads a config, does I/O or writes into its inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # nats; e^20 = 4.9e8 keeps exp, its square and exp's gradient finite in float32


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


def truncated_importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float | None) -> Tensor:
    """`is_weights` [T] = min(exp(clamp(old - rollout, -20, 20)), cap): detached float32, an upper cap only.

    Truncated importance sampling (Ionides 2008, J. Comput. Graph. Stat. 17(2)), applied to each token's gap between
    trainer and sampler (TIS: Yao et al. 2025, "On the Rollout-Training Mismatch in Modern RL Systems"). It uses old,
    not current, log-probs: the clip in `dapo_token_loss` already accounts for pi_theta / pi_old.
    `cap=None` corrects nothing (all ones); `cap=inf` never truncates. Raises ValueError if cap <= 0 or NaN.
    """
    _check_cap(cap)
    if cap is None:
        return torch.ones_like(old_logprobs, dtype=torch.float32)
    return _ratio(old_logprobs.detach(), rollout_logprobs.detach()).clamp(max=cap)


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


def token_mean(token_loss: Tensor, mask: Tensor, total_tokens: int) -> Tensor:
    """Scalar: sum of token_loss [T] over mask [T] / total_tokens (DAPO, arXiv 2503.14476, eq. 12).

    total_tokens: trained tokens of the whole STEP (all micro-batches, all ranks), so that the micro-batches' losses and
    gradients add up to the step's. Raises ValueError if it is not positive.
    """
    if not total_tokens > 0:
        raise ValueError(
            f"total_tokens is {total_tokens}: no token of this step is left to train on; skip the step, or raise "
            "--max-sample-rounds or --max-response-len if groups are dropped or truncated"
        )
    return _masked_sum(token_loss, mask) / total_tokens


def policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    total_tokens: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    tis_cap: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The micro-batch's share of the step's loss (scalar), and its sums for `merge_sums` (detached 0-d tensors).

    Tensors are [T]; total_tokens is the step's (see `token_mean`), counted from masks that went through `finite_mask`.
    The importance weight multiplies after the clip and the dual clip, before the reduction. Masked-out tokens are
    replaced before any arithmetic, because zero times NaN or inf is NaN in the backward pass too.

    Sums: tokens, ratio_sum, is_weights_sum, clipped_low, clipped_high, dual_clipped (token counts); ratio_max.
    Raises ValueError as `truncated_importance_weights`, `dapo_token_loss` and `token_mean` do.
    """
    inputs = (policy_logprobs, old_logprobs, rollout_logprobs, advantages)
    _assert_packed(mask, *inputs)
    policy, old, rollout, advantages = (torch.where(mask, x, 0.0) for x in inputs)
    token_loss, stats = dapo_token_loss(policy, old, advantages, clip_low, clip_high, dual_clip)
    is_weights = truncated_importance_weights(old, rollout, tis_cap)
    loss = token_mean(is_weights * token_loss, mask, total_tokens)
    return loss, {  # no flag is set on a masked-out token: its advantage is 0 here
        "tokens": mask.sum(),
        "ratio_sum": _masked_sum(stats.ratio.double(), mask),
        "is_weights_sum": _masked_sum(is_weights.double(), mask),
        "clipped_low": stats.clipped_low.sum(),
        "clipped_high": stats.clipped_high.sum(),
        "dual_clipped": stats.dual_clipped.sum(),
        "ratio_max": _masked_max(stats.ratio, mask),
    }


# ---- how far the sampler is from the trainer


@torch.no_grad()
def mismatch_sums(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cap: float | None) -> dict[str, Tensor]:
    """Sums, counts and maxima (0-d, float64 or int64) of the gap between pi_old and mu; all inputs [T].

    delta = old - rollout, w = exp(clamp(delta, -20, 20)), not truncated: the cap decides `capped` alone (tokens with
    w > cap, none if cap is None). `finite_mask` must have been applied to mask.
    `mismatch_metrics` says what the terms estimate. Raises ValueError if cap <= 0 or NaN.
    """
    _check_cap(cap)
    _assert_packed(mask, old_logprobs, rollout_logprobs)
    old, rollout = old_logprobs.double(), rollout_logprobs.double()
    delta = old - rollout
    w_minus_1 = delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).expm1()
    w = w_minus_1 + 1
    return {
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
    ratio_mean     mean w, 1 in expectation
    dprob_max      largest |pi_old(a) - mu(a)|

    Raises ValueError if the sums hold no token.
    """
    s = {key: float(value) for key, value in sums.items()}
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


def _check_cap(cap: float | None) -> None:
    if cap is not None and not cap > 0:
        raise ValueError(f"--tis-cap {cap} must be > 0: try 2.0, inf to never truncate, or none for no correction")


def _assert_packed(mask: Tensor, *tensors: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (mask, *tensors)]
    assert mask.ndim == 1 and len(set(shapes)) == 1, f"expected packed [T] tensors of one length, got {shapes}"
    assert mask.dtype == torch.bool, f"mask must be bool, got {mask.dtype}"
