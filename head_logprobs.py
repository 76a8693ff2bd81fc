"""Log-probs and entropies of tokens from hidden states, without [T, V] in memory.

Axes: T tokens, H hidden size, V vocabulary.

The head's logits exist for a chunk of tokens at a time, in bf16, and are made again in the backward pass; memory does
not grow with T. Softmax statistics are fp32, as in vLLM's sampler. On a GPU two Triton kernels read each chunk once
forward (log-sum-exp, entropy) and write its gradient over it backward; on a CPU the same in torch, which is also the
reference.
"""

import torch

CHUNK_ELEMENTS = 1 << 28  # logits in memory at a time: 512 MiB in bf16


def head_logprobs(
    hidden_T_H: torch.Tensor,
    weight_V_H: torch.Tensor,
    labels_T: torch.Tensor,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log softmax(hidden @ weight.T / temperature)[label] [T], its entropy in nats [T]), both fp32 and differentiable.

    Gradients of the weight are summed over the chunks in fp32.
    """
    rows = max(1, chunk_elements // weight_V_H.shape[0])
    return _HeadLogprobs.apply(hidden_T_H, weight_V_H, labels_T, temperature, rows)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, rows):
        pieces = [_statistics(h @ weight.t(), label, temperature) for h, label in _chunks(rows, hidden, labels)]
        logprobs, entropy, logz = (torch.cat(p) for p in zip(*pieces, strict=True))
        ctx.save_for_backward(hidden, weight, labels, logz, entropy)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, labels, logz, entropy = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(logz)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        start = 0
        per_token = (
            labels,
            logz,
            entropy,
            grad_logprobs,
            torch.zeros_like(logz) if grad_entropy is None else grad_entropy,
        )
        for h, *token in _chunks(ctx.rows, hidden, *per_token):
            d_logits = _logits_gradient(h @ weight.t(), *token, ctx.temperature, grad_entropy is not None)
            if grad_hidden is not None:
                torch.mm(d_logits, weight, out=grad_hidden[start : start + h.shape[0]])
            if grad_weight is not None:
                grad_weight += d_logits.t() @ h
            start += h.shape[0]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(rows, *tensors):
    return zip(*(t.split(rows) for t in tensors), strict=True)


def _statistics(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-prob of the label, entropy, log-sum-exp) of each row of logits [T, V], fp32."""
    if logits.is_cuda:
        import head_kernels

        return head_kernels.statistics(logits, labels, temperature)
    scaled = logits.float() / temperature
    logz = scaled.logsumexp(-1)
    logp = scaled - logz[:, None]
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1), logz


def _logits_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logz: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor,
    temperature: float,
    with_entropy: bool,
) -> torch.Tensor:
    """d loss / d logits [T, V] in the logits' dtype, written over them on a GPU.

    d logp / d z_i = (1[i = label] - p_i) / temperature;  d H / d z_i = -p_i (log p_i + H) / temperature.
    """
    if logits.is_cuda:
        import head_kernels

        head_kernels.gradient_(logits, labels, logz, entropy, grad_logprobs, grad_entropy, temperature, with_entropy)
        return logits
    logp = logits.float() / temperature - logz[:, None]
    p = logp.exp()
    d = -p * grad_logprobs[:, None]
    d.scatter_add_(1, labels[:, None], grad_logprobs[:, None])
    if with_entropy:
        d -= p * (logp + entropy[:, None]) * grad_entropy[:, None]
    return (d / temperature).to(logits.dtype)
