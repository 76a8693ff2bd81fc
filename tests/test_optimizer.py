"""AdamW on masters: against torch's own, resident and through the slots, in every format of its moments, updates that
bf16 alone would lose, and the GPU's kernel in Triton's interpreter and compiler."""

import sys

import pytest
import torch

import optimizer
from optimizer import STATE_BYTES, MasterAdamW, OptimizerError

SHAPES = [(7, 5), (3,), (64, 3), (1,), (100,)]


def weights(dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]


def held(adamw):
    """Masters and moments."""
    return [*adamw.masters, *(t for pair in adamw._moments for t in pair)]


def run(optimizers, steps=6, lr=1e-2):
    """The same gradients into each of them."""
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        for i, shape in enumerate(SHAPES):
            grad = torch.randn(shape, generator=g)
            for each in optimizers:
                each.grads[i].copy_(grad)
        for each in optimizers:
            each.step(lr * (step + 1) / steps)


@pytest.mark.parametrize("offload", [False, True])
def test_it_is_torchs_adamw(monkeypatch, offload):
    monkeypatch.setattr(optimizer, "PIECE_ELEMENTS", 10)
    ours, plain = weights(), [w.float() for w in weights()]
    groups = [
        {"params": [p for p in plain if p.dim() >= 2], "weight_decay": 0.3},
        {"params": [p for p in plain if p.dim() < 2], "weight_decay": 0.0},
    ]
    torchs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-6)
    adamw = MasterAdamW(ours, weight_decay=0.3, betas=(0.9, 0.95), eps=1e-6, offload=offload)
    g = torch.Generator().manual_seed(1)
    for _ in range(6):
        for p, grad in zip(plain, adamw.grads, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            grad.copy_(p.grad)
        torchs.step()
        adamw.step(1e-2)
        for p, master, weight in zip(plain, adamw.masters, ours, strict=True):
            torch.testing.assert_close(master, p, rtol=1e-5, atol=1e-6)
            assert torch.equal(weight, master.bfloat16()), "the weights are the masters, rounded"


@pytest.mark.parametrize("piece", [1, 3, 10, 35, 1 << 24])
def test_pieces_change_nothing(monkeypatch, piece):
    """Masters in host memory, in pieces of any size, are what they are on the device: to the last bit in whole tensors;
    in parts, torch's CPU kernel rounds the elements that fill no vector otherwise."""
    monkeypatch.setattr(optimizer, "PIECE_ELEMENTS", piece)
    here, there = (MasterAdamW(weights(), weight_decay=0.1, offload=offload) for offload in (False, True))
    run([here, there])
    for a, b in zip(held(here), held(there), strict=True):
        torch.testing.assert_close(a, b, rtol=0 if piece > 192 else 1e-5, atol=0 if piece > 192 else 1e-7)
    assert there.bytes_resident == optimizer.SLOTS * 3 * min(piece, 192) * 4
    assert here.bytes_resident == sum(w.numel() for w in weights()) * 12


@pytest.mark.parametrize(("states", "offload"), [("fp32", False), ("fp32", True), ("bf16", False), ("8bit", False)])
def test_updates_of_lr_1e_6_do_not_vanish(states, offload, without_compiler):
    """A thousand of them move a weight of 1 by 0.001; in bf16 alone, whose step there is 0.0039, none would move it."""
    (weight,) = ours = [torch.ones(64, 64, dtype=torch.bfloat16)]
    adamw = MasterAdamW(ours, weight_decay=0.0, offload=offload, states=states)
    for _ in range(3000):
        adamw.grads[0].fill_(1.0)
        adamw.step(1e-6)
    torch.testing.assert_close(adamw.masters[0].detach(), torch.full((64, 64), 0.997), rtol=0, atol=2e-4)
    assert (weight.float() < 1).all()
    assert (torch.ones(4, dtype=torch.bfloat16) - 1e-6 == 1).all()


@pytest.fixture
def without_compiler():
    """torchao compiles its update for each shape; what it computes is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
def test_the_gradient_is_scaled_and_left_at_zero(states, without_compiler):
    a, b = (MasterAdamW(weights(), weight_decay=0.1, states=states) for _ in range(2))
    g = torch.Generator().manual_seed(1)
    for x, y in zip(a.grads, b.grads, strict=True):
        x.copy_(torch.randn(x.shape, generator=g))
        y.copy_(x * 0.125)
    a.step(1e-2, torch.tensor(0.125))
    b.step(1e-2)
    assert all(torch.equal(x, y) for x, y in zip(a.masters, b.masters, strict=True))
    assert not any(x.any() for each in (a, b) for x in each.grads)


def test_bf16_moments_follow_the_exact_ones_in_the_mean():
    """Of 64k elements with one gradient: the second moment changes by a thousandth a step, a quarter of bf16's step
    there; rounded to nearest it would stand still."""
    exact, rounded = (
        MasterAdamW([torch.ones(256, 256).bfloat16()], weight_decay=0.0, states=s) for s in ("fp32", "bf16")
    )
    for step in range(300):
        for each in (exact, rounded):
            each.grads[0].fill_(1.0 if step < 200 else 0.5)
            each.step(1e-4)
    for a, b in zip(exact._moments[0], rounded._moments[0], strict=True):
        assert b.dtype == torch.bfloat16
        assert float(b.float().mean()) == pytest.approx(float(a.mean()), rel=2e-3)
        assert float(b.float().std()) > 0
    moved = [float((1 - each.masters[0]).mean()) for each in (exact, rounded)]
    assert moved[1] == pytest.approx(moved[0], rel=2e-3)
    assert rounded.bytes_resident == STATE_BYTES["bf16"] * 256 * 256


def test_eight_bit_moments_stay_near_the_exact_ones(without_compiler):
    exact, small = (
        MasterAdamW([torch.zeros(64, 256).bfloat16()], weight_decay=0.0, states=s) for s in ("fp32", "8bit")
    )
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        grad = torch.randn(64, 256, generator=g)
        for each in (exact, small):
            each.grads[0].copy_(grad)
            each.step(1e-3)
    a, b = exact.masters[0].flatten(), small.masters[0].detach().flatten()
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.99
    held = small._eight_bit.state[small.masters[0]]
    codes = sum(held[k].codes.numel() + held[k].scale.numel() * 4 for k in ("exp_avg", "exp_avg_sq"))
    assert codes + 4 * 64 * 256 == small.bytes_resident


def test_what_cannot_be_combined_says_so(monkeypatch):
    with pytest.raises(OptimizerError, match=r"8bit stays on the GPU.*--offload-optimizer"):
        MasterAdamW(weights(), weight_decay=0.0, states="8bit", offload=True)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(OptimizerError, match="pip install torchao"):
        MasterAdamW(weights(), weight_decay=0.0, states="8bit")


INTERPRETED = """
import torch
import adamw_kernels
from optimizer import MasterAdamW
adamw_kernels.BLOCK = 64
for states in ("fp32", "bf16"):
    g = torch.Generator().manual_seed(0)
    for shape in ((7, 9), (64,), (1,), (300,)):
        weight = torch.randn(shape, generator=g).bfloat16()
        ours = MasterAdamW([weight.clone()], weight_decay=0.3, betas=(0.9, 0.95), states=states)
        theirs = MasterAdamW([weight.clone()], weight_decay=0.3, betas=(0.9, 0.95), states=states)
        for update in range(1, 5):
            grad = torch.randn(shape, generator=g)
            for each in (ours, theirs):
                each.grads[0].copy_(grad)
            scale = torch.tensor(0.5)
            theirs.step(1e-2, scale)
            adamw_kernels.adamw_(
                ours._weights[0], ours.grads[0], ours.masters[0], *ours._moments[0], scale, update=update, seed=update,
                lr=1e-2, decay=0.3 if weight.dim() == 2 else 0.0, betas=(0.9, 0.95), eps=1e-8,
            )
            near = {"rtol": 1e-5, "atol": 1e-6} if states == "fp32" else {"rtol": 0.02, "atol": 0.02}
            torch.testing.assert_close(ours.masters[0], theirs.masters[0], **near)
            for a, b in zip(ours._moments[0], theirs._moments[0]):
                torch.testing.assert_close(a, b, **near)
            # The interpreter cuts bf16's bits off where a GPU rounds; the GPU's own test wants them equal.
            torch.testing.assert_close(ours._weights[0].float(), ours.masters[0], rtol=2**-7, atol=0)
            assert not ours.grads[0].any()
x = torch.full((4096,), 1 + 2**-10)
first, second = torch.zeros(2, 4096).bfloat16()
adamw_kernels.adamw_(x.bfloat16(), x.clone(), x.clone(), first, second, torch.ones(()), update=1, seed=3, lr=0.0,
                     decay=0.0, betas=(0.0, 0.0), eps=1e-8)
for moment, exact in ((first, 1 + 2**-10), (second, (1 + 2**-10) ** 2)):
    assert len(moment.unique()) == 2, "rounded both ways"
    assert abs(float(moment.float().mean()) - exact) < 3e-4
assert not torch.equal(first > 1, second > 1), "each by its own number"
print("compared")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import adamw_kernels as kernels

for moments in ("*fp32", "*bf16"):
    constants = {"BF16": moments == "*bf16", "BLOCK": kernels.BLOCK}
    names = kernels._adamw_kernel.arg_names
    types = {"weight": "*bf16", "first": moments, "second": moments, "count": "i32", "seed": "i32"}
    types |= dict.fromkeys(("grad", "master", "scale"), "*fp32")
    signature = {n: "constexpr" if n in constants else types.get(n, "fp32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] in "*" or n == "count"}
    source = ASTSource(kernels._adamw_kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    assert "ld.global.v4" in ptx, "narrow loads"
print("compiled")
"""


@pytest.mark.parametrize(
    ("script", "word"), [(INTERPRETED, "compared"), (COMPILED, "compiled")], ids=["run", "compile"]
)
def test_the_gpus_kernel(run_with_triton, script, word):
    assert run_with_triton(script, interpreted=word == "compared").split() == [word]
