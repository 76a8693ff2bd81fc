"""Corrections for the gap between the quantized sampler mu and the trainer pi_old: a weight for every token.

Axes: N sequences, T packed tokens (sequences one after another).

With delta = log pi_old - log mu of a token, w = exp(delta), W = exp(sum of delta over the trained tokens of a sequence)
and g = exp(mean of them):

    none             1                               (wrong by the whole gap)
    token-tis        min(w, C)                       truncated IS: Yao et al. 2025, FlashRL; Ionides 2008
    sequence-tis     min(W, C)                       the same for whole sequences (TRL: sequence_truncate)
    token-is         w                               plain IS by token: the limit C -> inf of token-tis
    token-mask       w where low <= w <= high, or 0  IcePop, arXiv 2510.18855, eq. 7 (TRL: token_mask)
    sequence-mask    W where low <= W <= high, or 0  Liu et al. 2025, "When Speed Kills Stability" (TRL: sequence_mask)
    geometric-mask   1 where low <= g <= high, or 0  the same authors; unlike W, g does not grow with the length
    ppo-is           1, and PPO's ratio is pi_theta / mu instead of pi_theta / pi_old

All but the last are decoupled (three policies: mu, pi_old and pi_theta; Hilton et al., arXiv 2110.00641): they weight
the loss from outside, the clip keeps pi_theta near pi_old. ppo-is is the direct form (two policies): it clips the gap
itself, and needs no pi_old at all.

A token that a band takes out has the weight 0; it is not taken out of `mask`, so it keeps its place in the loss's
denominator, as in IcePop's equation. (verl and slime take it out of the denominator too: the same gradient, divided by
the share that is left.) If a band takes out every token, the update has gradient zero and is still made.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # nats; e^20 = 4.9e8 keeps exp, its square and exp's gradient finite in float32


class Weights(NamedTuple):
    """Of each token [T]: float32 without gradient; bool, the cap lowered it; bool, the band took it out."""

    is_weights: Tensor
    capped: Tensor
    masked: Tensor


def _of_tokens(delta: Tensor, mask: Tensor, lengths: Tensor | None) -> Tensor:
    return delta


def _of_sequences(delta: Tensor, mask: Tensor, lengths: Tensor | None) -> Tensor:
    """Each token's sequence's sum."""
    return spread(sequence_sums(torch.where(mask, delta, 0.0), lengths), lengths, len(delta))


def _of_means(delta: Tensor, mask: Tensor, lengths: Tensor | None) -> Tensor:
    """Each token's sequence's mean over its trained tokens."""
    count = sequence_sums(mask.double(), lengths).clamp(min=1)
    return spread(sequence_sums(torch.where(mask, delta, 0.0), lengths) / count, lengths, len(delta))


def _ones(log_ratio: Tensor) -> Tensor:
    return torch.ones_like(log_ratio)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


class Kind(NamedTuple):
    """What a correction is made of."""

    log_ratio: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # what is looked at, each token's
    weight: Callable[[Tensor], Tensor]  # of that
    cap: bool = False  # takes a cap
    band: tuple[float, float] | None = None  # takes a band; the default
    sequences: bool = False  # looks at whole sequences
    direct: bool = False


CORRECTIONS = {
    "none": Kind(_of_tokens, _ones),
    "token-tis": Kind(_of_tokens, _ratio, cap=True),
    "sequence-tis": Kind(_of_sequences, _ratio, cap=True, sequences=True),
    "token-is": Kind(_of_tokens, _ratio),
    "token-mask": Kind(_of_tokens, _ratio, band=(0.5, 5.0)),  # IcePop's alpha and beta
    "sequence-mask": Kind(_of_sequences, _ratio, band=(0.0, 3.0), sequences=True),  # TRL's default cap
    # FP8's mean delta is about 0.004; published bands (1 +- 0.001) are for bf16.
    "geometric-mask": Kind(_of_means, _ones, band=(0.98, 1.02), sequences=True),
    "ppo-is": Kind(_of_tokens, _ones, direct=True),
}


@dataclass(frozen=True)
class Correction:
    """One of CORRECTIONS with its thresholds; None takes the default, and fits a correction that has none.

    Raises ValueError for a name that is not known, a threshold that the correction does not have, a cap that is not
    positive and a band out of order.
    """

    name: str = "token-tis"
    cap: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.name not in CORRECTIONS:
            raise ValueError(f"--correction {self.name} is not known; there are {', '.join(CORRECTIONS)}")
        kind = self.kind
        if self.cap is not None and not kind.cap:
            names = ", ".join(name for name, k in CORRECTIONS.items() if k.cap)
            raise ValueError(f"--tis-cap {self.cap} has no meaning with --correction {self.name}; it is for {names}")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(
                f"--tis-cap {self.cap} must be > 0: try 2.0, inf to never truncate, or None for no correction"
            )
        for flag, value in (("--mask-low", self.low), ("--mask-high", self.high)):
            if value is not None and kind.band is None:
                names = ", ".join(name for name, k in CORRECTIONS.items() if k.band)
                raise ValueError(f"{flag} {value} has no meaning with --correction {self.name}; it is for {names}")
        if kind.band:
            low, high = self.band
            if not (0 <= low < high):
                raise ValueError(
                    f"--mask-low {low} and --mask-high {high} are no band: 0 <= low < high is wanted (around 1, where "
                    "sampler and trainer agree)"
                )

    @property
    def kind(self) -> Kind:
        return CORRECTIONS[self.name]

    @property
    def band(self) -> tuple[float, float]:
        """(low, high); everything where the correction has no band."""
        low, high = self.kind.band or (0.0, math.inf)
        return (low if self.low is None else self.low), (high if self.high is None else self.high)

    @property
    def limit(self) -> float:
        """The cap; inf where the correction has none."""
        return (2.0 if self.cap is None else self.cap) if self.kind.cap else math.inf

    @torch.no_grad()
    def weights(
        self, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, lengths_N: Tensor | None = None
    ) -> Weights:
        """The weight of each token, from log pi_old, log mu [T] and the mask of trained tokens [T], bool.

        lengths_N: packed tokens of each sequence, for corrections of whole sequences. What masked-out tokens hold does
        not matter where they are finite.
        """
        kind = self.kind
        if kind.sequences and lengths_N is None:
            raise ValueError(f"--correction {self.name} needs the lengths of the sequences")
        delta = old_logprobs.detach().double() - rollout_logprobs.detach().double()
        log_ratio = kind.log_ratio(delta, mask, lengths_N)
        ratio, is_weights = _ratio(log_ratio), kind.weight(log_ratio)
        capped = mask & (is_weights > self.limit)
        low, high = self.band
        masked = mask & ((ratio < low) | (ratio > high)) if kind.band else torch.zeros_like(mask)
        is_weights = torch.where(masked, 0.0, is_weights.clamp(max=self.limit))
        return Weights(is_weights.float(), capped, masked)


def sequence_sums(values_T: Tensor, lengths_N: Tensor) -> Tensor:
    """Sum [N] of the packed values of each sequence, float64; 0 for an empty one."""
    ends = lengths_N.cumsum(0)
    total = torch.nn.functional.pad(values_T.double().cumsum(0), (1, 0))
    return total[ends] - total[ends - lengths_N]


def spread(values_N: Tensor, lengths_N: Tensor, tokens: int) -> Tensor:
    """Each sequence's value at each of its tokens [tokens]."""
    return torch.repeat_interleave(values_N, lengths_N, output_size=tokens)  # its size given, the GPU is not waited for
