"""Triton kernels of head_logprobs.py: one program a row of logits, which it reads once.

Axes: T tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # logits of a row at a time


@triton.jit
def _statistics_kernel(
    logits, labels, logprobs, entropy, logz, inverse_temperature, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    # Running maximum m, sum of exp(x - m) and sum of exp(x - m) * (x - m), for each lane by itself.
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        inside = start + at < COLUMNS
        x = tl.load(logits + row * COLUMNS + start + at, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
        new_top = tl.where(inside, tl.maximum(top, x), top)
        down = tl.where(top == -float("inf"), 0.0, top - new_top)
        above = tl.where(inside, x - new_top, 0.0)
        add = tl.where(inside, tl.exp(above), 0.0)
        weighted = tl.exp(down) * (weighted + down * total) + add * above
        total = tl.exp(down) * total + add
        top = new_top
    highest = tl.max(top, 0)
    down = tl.where(top == -float("inf"), 0.0, top - highest)
    sum_exp = tl.sum(total * tl.exp(down), 0)
    z = highest + tl.log(sum_exp)
    label = tl.load(labels + row)
    chosen = tl.load(logits + row * COLUMNS + label).to(tl.float32) * inverse_temperature
    tl.store(logprobs + row, chosen - z)
    tl.store(logz + row, z)
    tl.store(entropy + row, tl.log(sum_exp) - tl.sum(tl.exp(down) * (weighted + down * total), 0) / sum_exp)


@triton.jit
def _gradient_kernel(
    logits, labels, logz, entropy, grad_logprobs, grad_entropy, inverse_temperature, COLUMNS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    z = tl.load(logz + row)
    grad = tl.load(grad_logprobs + row)
    for start in range(0, COLUMNS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        pointer = logits + row * COLUMNS + at
        x = tl.load(pointer, mask=at < COLUMNS, other=0.0).to(tl.float32)
        logp = x * inverse_temperature - z
        p = tl.exp(logp)
        d = tl.where(at == label, grad, 0.0) - p * grad
        if WITH_ENTROPY:
            d -= p * (logp + tl.load(entropy + row)) * tl.load(grad_entropy + row)
        tl.store(pointer, (d * inverse_temperature).to(logits.dtype.element_ty), mask=at < COLUMNS)


def statistics(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-prob of the label, entropy, log-sum-exp) of each row of logits [T, V], fp32."""
    out = torch.empty(3, logits.shape[0], dtype=torch.float32, device=logits.device)
    _statistics_kernel[(logits.shape[0],)](
        logits.contiguous(), labels, out[0], out[1], out[2], 1.0 / temperature,
        COLUMNS=logits.shape[1], BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return out[0], out[1], out[2]


def gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logz: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor,
    temperature: float,
    with_entropy: bool,
) -> None:
    """d loss / d logits over the logits [T, V], contiguous; the formula is head_logprobs._logits_gradient's."""
    assert logits.is_contiguous()
    _gradient_kernel[(logits.shape[0],)](
        logits, labels, logz, entropy, grad_logprobs.contiguous(), grad_entropy.contiguous(), 1.0 / temperature,
        COLUMNS=logits.shape[1], WITH_ENTROPY=with_entropy, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
