"""Log-probs in chunks against the plain computation, and the GPU's kernels in Triton's interpreter and compiler."""

import pytest
import torch

import head_logprobs
from head_logprobs import head_logprobs as chunked

T, H, V = 37, 16, 301


def inputs(dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(0)
    hidden = (torch.randn(T, H, generator=g) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,), generator=g)
    return hidden, weight, labels, torch.randn(2, T, generator=g)


def plain(hidden, weight, labels, temperature):
    logp = ((hidden @ weight.t()).float() / temperature).log_softmax(-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def gradients(function, use, hidden, weight, labels, upstream, *more):
    """(log-probs, entropy, gradient of hidden, of weight) under sums weighted by `upstream`."""
    logprobs, entropy = function(hidden, weight, labels, *more)
    loss = sum((x * u).sum() for x, u, name in zip((logprobs, entropy), upstream, "le", strict=True) if name in use)
    found = torch.autograd.grad(loss, (hidden, weight))
    return logprobs.detach(), entropy.detach(), *found


@pytest.mark.parametrize("rows", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("use", ["l", "e", "le"])
def test_chunks_equal_the_plain_computation(rows, temperature, use):
    """Log-prob, entropy and both gradients, whichever of the two the loss uses."""
    ours = gradients(chunked, use, *inputs(), temperature, rows * V)
    for a, b in zip(ours, gradients(plain, use, *inputs(), temperature), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_large_logits_stay_finite():
    """Logits in the hundreds: probabilities of exactly 0 and 1."""
    ours = gradients(chunked, "le", *inputs(scale=100.0), 1.0, 5 * V)
    assert all(x.isfinite().all() for x in ours)
    assert (ours[1] < 1e-3).any()
    for a, b in zip(ours[:2], plain(*inputs(scale=100.0)[:3], 1.0), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-3)


def test_bf16_gradients_of_the_weight_are_summed_in_fp32():
    """A token a chunk: summed in bf16, the error would grow with the number of chunks."""
    hidden, weight, labels, upstream = inputs(torch.bfloat16)
    exact = gradients(
        plain, "l", *(t.detach().double().requires_grad_() for t in (hidden, weight)), labels, upstream, 1.0
    )
    one, many = (gradients(chunked, "l", hidden, weight, labels, upstream, 1.0, rows * V) for rows in (1000, 1))
    for found in (one, many):
        error = (found[3].double() - exact[3]).norm() / exact[3].norm()
        assert found[3].dtype == torch.bfloat16 and error < 0.01
    assert torch.equal(one[0], many[0])


def test_logits_never_exist_for_more_tokens_than_a_chunk(monkeypatch):
    seen = []
    statistics, gradient = head_logprobs._statistics, head_logprobs._logits_gradient
    monkeypatch.setattr(head_logprobs, "_statistics", lambda x, *a: seen.append(x.shape) or statistics(x, *a))
    monkeypatch.setattr(head_logprobs, "_logits_gradient", lambda x, *a: seen.append(x.shape) or gradient(x, *a))
    gradients(chunked, "l", *inputs(), 1.0, 10 * V + V - 1)
    assert [shape[0] for shape in seen] == [10, 10, 10, 7] * 2 and {shape[1] for shape in seen} == {V}


def test_only_what_is_asked_for_is_computed():
    hidden, weight, labels, _ = inputs()
    chunked(hidden, weight.detach(), labels)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        logprobs, entropy = chunked(hidden, weight, labels)
    assert not logprobs.requires_grad and entropy.shape == (T,)


INTERPRETED = """
import torch
import head_kernels as kernels, head_logprobs as reference
torch.manual_seed(0)
for columns, block in ((301, 64), (64, 64), (5, 64), (257, 256)):
    kernels.BLOCK = block
    logits = torch.randn(9, columns) * 6
    logits[1] += 300
    logits[2] -= 300
    labels = torch.randint(0, columns, (9,))
    for temperature in (0.7, 1.0):
        ours, theirs = (m(logits, labels, temperature) for m in (kernels.statistics, reference._statistics))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        logprobs, entropy, logz = theirs
        upstream = torch.randn(2, 9)
        for with_entropy in (True, False):
            wanted = reference._logits_gradient(logits, labels, logz, entropy, *upstream, temperature, with_entropy)
            found = logits.clone()
            kernels.gradient_(found, labels, logz, entropy, *upstream, temperature, with_entropy)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
print("compared")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import head_kernels as kernels

for kernel, constants in ((kernels._statistics_kernel, {}), (kernels._gradient_kernel, {"WITH_ENTROPY": True})):
    constants = {**constants, "COLUMNS": 151936, "BLOCK": kernels.BLOCK}
    names = kernel.arg_names
    types = {"logits": "*bf16", "labels": "*i64", "inverse_temperature": "fp32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    assert "ld.global.v4" in ptx, "narrow loads"
print("compiled")
"""


@pytest.mark.parametrize(
    ("script", "word"), [(INTERPRETED, "compared"), (COMPILED, "compiled")], ids=["run", "compile"]
)
def test_the_gpus_kernels(run_with_triton, script, word):
    assert run_with_triton(script, interpreted=word == "compared").split() == [word]
