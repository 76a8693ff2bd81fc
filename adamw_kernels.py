"""AdamW in one pass over memory: a Triton kernel that reads gradient, master and moments once, and writes master,
moments, the bf16 weight and a zero gradient."""

import torch
import triton
import triton.language as tl

BLOCK = 2048  # elements a program


@triton.jit
def _rounded(x, random):
    """fp32 as bf16, up or down with the probability that keeps its mean: a moment in bf16 would otherwise stand still
    where a step of it is below half an ulp. `random` holds 16 bits."""
    bits = x.to(tl.uint32, bitcast=True) + random
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit(do_not_specialize=["seed"])
def _adamw_kernel(
    weight, grad, master, first, second, scale, count, seed, lr, keep, beta1, rest1, beta2, rest2, correction1,
    correction2, eps, BF16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(grad + at, mask=inside, other=0.0) * tl.load(scale)
    m = tl.load(first + at, mask=inside, other=0.0).to(tl.float32) * beta1 + g * rest1
    v = tl.load(second + at, mask=inside, other=0.0).to(tl.float32) * beta2 + g * g * rest2
    p = tl.load(master + at, mask=inside, other=0.0) * keep
    p -= lr / correction1 * m / (tl.sqrt_rn(v) / correction2 + eps)
    tl.store(master + at, p, mask=inside)
    tl.store(weight + at, p.to(tl.bfloat16), mask=inside)
    tl.store(grad + at, tl.zeros_like(g), mask=inside)
    if BF16:
        random = tl.randint(seed, at.to(tl.uint32)).to(tl.uint32)
        tl.store(first + at, _rounded(m, random & 0xFFFF), mask=inside)
        tl.store(second + at, _rounded(v, random >> 16), mask=inside)
    else:
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)


def adamw_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    master: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    scale: torch.Tensor,
    *,
    update: int,
    seed: int,
    lr: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """The `update`-th update (from 1) of dense tensors of one size, in place: weight bf16, grad and master fp32,
    moments both fp32 or both bf16; scale is an fp32 number on the device that multiplies the gradient, which is left
    at 0."""
    for tensor in (weight, grad, master, first, second):
        assert tensor.is_contiguous()
        assert tensor.numel() == weight.numel()
    beta1, beta2 = betas
    _adamw_kernel[(triton.cdiv(weight.numel(), BLOCK),)](
        weight, grad, master, first, second, scale, weight.numel(), seed, lr, 1.0 - lr * decay, beta1, 1.0 - beta1,
        beta2, 1.0 - beta2, 1.0 - beta1**update, (1.0 - beta2**update) ** 0.5, eps,
        BF16=first.dtype == torch.bfloat16, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
