"""The samples of a step that are written down: which ones, and the log-probs that both sides gave their tokens.

Axes: T response tokens of a micro-batch.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ranks import Ranks
from rollout import Group, Sample

if TYPE_CHECKING:
    from policy import Batch

DECIMALS = 4  # of a log-prob in samples.jsonl
CHARACTER_BYTES = 4  # a character has at most so many bytes of UTF-8, and so many tokens


def logged_samples(groups: list[Group], count: int) -> list[tuple[Group, int]]:
    """At most `count` of the groups' samples, the first two of each group: (group, index in it)."""
    return [(group, i) for group in groups for i in range(min(2, len(group.samples)))][:count]


class KeptLogprobs:
    """The trainer's log pi_old of the samples that will be logged, kept while micro-batches pass and read at the end of
    a step: no wait for the device before that, and nothing to do without such samples."""

    def __init__(self, groups: list[Group], count: int):
        self._wanted = {id(g.samples[i].token_ids): g.samples[i] for g, i in logged_samples(groups, count)}
        self._kept: list[tuple[Sample, torch.Tensor]] = []

    def keep(self, micro: "Batch", logprobs: torch.Tensor) -> None:
        """`logprobs` [T] of the micro-batch. It holds the samples' own lists of tokens, by which they are known."""
        if not self._wanted:
            return
        start = 0
        for ids in micro.response_ids:
            sample = self._wanted.get(id(ids))
            if sample is not None:
                self._kept.append((sample, logprobs[start : start + len(ids)]))
            start += len(ids)

    def hand_out(self, ranks: Ranks) -> None:
        """Into `Sample.logprobs`; one copy to the host. Each of several ranks has kept what passed through it."""
        self._hand_out()
        wanted = list(self._wanted.values())
        if ranks.world == 1 or not wanted:
            return
        for everyones in ranks.gather([s.logprobs for s in wanted]):
            for sample, logprobs in zip(wanted, everyones, strict=True):
                sample.logprobs = sample.logprobs or logprobs

    def _hand_out(self) -> None:
        if not self._kept:
            return
        values = torch.cat([logprobs for _, logprobs in self._kept]).tolist()
        start = 0
        for sample, logprobs in self._kept:
            sample.logprobs = values[start : start + len(logprobs)]
            start += len(logprobs)


class TokenTexts:
    """What a reader sees of each token. Texts of single tokens are remembered."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """A text for each token; together they are the response with its special tokens. Of tokens that hold a part of
        a character each, the last has the character and the others nothing."""
        texts, parts = [], []
        for token in token_ids:
            if not parts and "\ufffd" not in self._single(token):
                texts.append(self._single(token))
                continue
            parts.append(token)
            text = self._decode(parts)
            if text.endswith("\ufffd") and len(parts) < CHARACTER_BYTES:
                texts.append("")
            else:
                texts.append(text)
                parts = []
        if parts:  # the response was cut in the middle of a character
            texts[-1] = self._decode(parts)
        return texts

    def _single(self, token: int) -> str:
        if token not in self._known:
            text = self._decode([token])
            piece = self._tokenizer.convert_ids_to_tokens(token)
            if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
                text = " " + text  # SentencePiece drops the space of a first token
            self._known[token] = text
        return self._known[token]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def sample_record(step: int, group: Group, i: int, texts: TokenTexts) -> dict[str, Any]:
    """One sample as a line of samples.jsonl (docs/metrics.md)."""
    sample = group.samples[i]
    return {
        "step": step,
        "version": group.version,
        "id": group.prompt.example.id,
        "prompt": group.prompt.example.messages,
        "answer": group.prompt.example.answer,
        "text": sample.text,
        "reward": group.rewards[i],
        "tokens": len(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "token_texts": texts(sample.token_ids),
        "rollout_logprobs": _rounded(sample.rollout_logprobs),
        "logprobs": _rounded(sample.logprobs),
    }


def _rounded(logprobs: Sequence[float]) -> list[float | None]:
    """To DECIMALS; None where a log-prob is not finite, as JSON has no other way."""
    return [round(x, DECIMALS) if math.isfinite(x) else None for x in logprobs]
