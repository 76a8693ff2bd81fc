"""Sequences of different lengths without padding: one row, attention that stays inside each sequence.

Axes: T tokens of all sequences one after the other, A attention heads, K key/value heads, D head size.

A micro-batch is one row of concatenated sequences with positions that start again at 0 and cumulative lengths. Its
attention is registered with transformers under ATTENTION: on a GPU torch's varlen_attn (FlashAttention on cumulative
lengths), on a CPU the exact attention of one sequence after the other.
"""

import heapq
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

ATTENTION = "packed"  # attn_implementation of a model that is given Packed.model_inputs


class PackingError(RuntimeError):
    """What cannot be packed; the message names the flag to change."""


def pack(lengths: Sequence[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Indices of `lengths` (tokens) for each micro-batch of at most `budget` tokens: nearly as few as possible, and of
    nearly equal size. Their number is a multiple of `multiple`, if there are so many sequences. Raises PackingError if
    one sequence is longer than the budget."""
    longest = max(lengths, default=0)
    if longest > budget:
        raise PackingError(
            f"--micro-batch-tokens {budget} is less than a sequence of {longest} tokens; raise it, or lower "
            "--max-prompt-len or --max-response-len"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = max(1, -(-sum(lengths) // budget), sum(2 * n > budget for n in lengths))  # no two of those go together
    count += -count % multiple
    while True:  # the longest first, each into the emptiest; one more bin if that does not fit
        heap = [(0, b) for b in range(count)]
        bins: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            used, b = heapq.heappop(heap)
            bins[b].append(i)
            heapq.heappush(heap, (used + lengths[i], b))
        if max(used for used, _ in heap) <= budget:
            return [sorted(b) for b in bins if b]
        count += multiple


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host's tensor on `device`, without waiting for what the GPU still has to do, so that the next micro-batch is
    prepared meanwhile. From pinned memory, which torch keeps until it was read."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def model_inputs(sequences: Sequence[Sequence[int]], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of an HF model with the attention ATTENTION for sequences of token ids: one row [1, T]."""
    lengths = torch.tensor([len(s) for s in sequences])
    ends = lengths.cumsum(0)
    total = int(ends[-1])
    starts = torch.repeat_interleave(ends - lengths, lengths)
    cumulative = sent(F.pad(ends, (1, 0)).to(torch.int32), device)
    longest = int(lengths.max())
    return {
        "input_ids": sent(torch.tensor([t for s in sequences for t in s]), device)[None],
        "position_ids": sent(torch.arange(total) - starts, device)[None],
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, A, T, D], key and value [1, K, T, D] -> ([1, T, A, D], None)."""
    if cu_seq_lens_q is None or max_length_q is None or query.shape[0] != 1:
        raise PackingError(
            f"attention '{ATTENTION}' takes one packed row with cumulative lengths (packing.model_inputs)"
        )
    if attention_mask is not None or dropout:
        raise PackingError(f"attention '{ATTENTION}' knows no masks but its own causal one, and no dropout")
    if sliding_window is not None and max_length_q > sliding_window:
        raise PackingError(
            f"this model attends to {sliding_window} tokens at most and a sequence has {max_length_q}; lower "
            "--max-prompt-len or --max-response-len"
        )
    if query.is_cuda:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return _varlen_attn()(q, k, v, *lengths, **_causal(scaling, q.shape[-1]))[None], None
    return _exact(query[0], key[0], value[0], cu_seq_lens_q, scaling)[None], None


def _exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cumulative: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Causal attention [T, A, D] of each sequence by itself; those of one length go together."""
    out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
    starts, lengths = cumulative[:-1].long(), cumulative.diff().long()
    for length in lengths.unique().tolist():
        tokens = starts[lengths == length][:, None] + torch.arange(length, device=starts.device)  # [sequences, length]
        q, k, v = (x[:, tokens].transpose(0, 1) for x in (query, key, value))
        gqa = q.shape[1] != k.shape[1]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
        out = out.index_put((tokens,), attended.transpose(1, 2))
    return out


def _varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise PackingError(
            f"torch {torch.__version__} has no torch.nn.attention.varlen; install the torch that requirements.txt names"
        ) from error
    return varlen_attn


def _causal(scaling: float | None, head_size: int) -> dict[str, Any]:
    """Arguments of varlen_attn for causal attention with shared key/value heads; torch changed their names."""
    known = inspect.signature(_varlen_attn()).parameters
    arguments: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        arguments["enable_gqa"] = True
    if scaling is not None:
        if "scale" in known:
            arguments["scale"] = scaling
        elif abs(scaling - head_size**-0.5) > 1e-9:
            raise PackingError(f"this torch's varlen_attn knows one scale only, and the model wants {scaling}")
    return arguments


def register() -> None:
    """Tell transformers about ATTENTION; idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
