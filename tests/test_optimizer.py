"""AdamW on masters: against torch's own, resident and through the slots, and updates that bf16 alone would lose."""

import pytest
import torch

import optimizer
from optimizer import MasterAdamW

SHAPES = [(7, 5), (3,), (64, 3), (1,), (100,)]


def weights(dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]


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
    for a, b in zip(here._states, there._states, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0 if piece > 192 else 1e-5, atol=0 if piece > 192 else 1e-7)
    assert there.bytes_resident == optimizer.SLOTS * 3 * min(piece, 192) * 4
    assert here.bytes_resident == sum(w.numel() for w in weights()) * 12


@pytest.mark.parametrize("offload", [False, True])
def test_updates_of_lr_1e_6_do_not_vanish(offload):
    """A thousand of them move a weight of 1 by 0.001; in bf16 alone, whose step there is 0.0039, none would move it."""
    (weight,) = ours = [torch.ones(4, 4, dtype=torch.bfloat16)]
    adamw = MasterAdamW(ours, weight_decay=0.0, offload=offload)
    for _ in range(3000):
        adamw.grads[0].fill_(1.0)
        adamw.step(1e-6)
    torch.testing.assert_close(adamw.masters[0], torch.full((4, 4), 0.997), rtol=0, atol=1e-4)
    assert (weight.float() < 1).all()
    assert (torch.ones(4, dtype=torch.bfloat16) - 1e-6 == 1).all()
