"""The policy over several ranks: FSDP2 (torch's fully_shard), one forward pass from token ids to log-probs.

Axes: T response tokens of a micro-batch, S its tokens with prompts, H hidden size, V vocabulary.

Each decoder layer is gathered when it computes and given up after it; embeddings, last norm and head are the root's and
stay gathered from the forward to the end of the backward pass. That wants one root whose forward reads the head's
weight: LogprobModel. Gradients are summed over ranks, not averaged, in fp32: a loss is divided by the tokens of the
whole update already.

Where there is room (`reshard=False`), weights stay gathered from an update's first micro-batch to its last, and each
rank sums its gradients, whole and in fp32, to be reduced once: what travels between the GPUs does not grow with the
number of micro-batches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import packing
from head_logprobs import CHUNK_ELEMENTS, head_logprobs
from ranks import Ranks


class TokenLists:
    """Prompts and responses of sequences as one object. In lists, as in tuples, dicts and dataclasses, FSDP2 looks at
    every token id, for tensors to move and tensors with gradient: 28 ms in a micro-batch of 16,384 tokens, in which the
    GPU waits."""

    def __init__(self, prompt_ids: Sequence[list[int]], response_ids: Sequence[list[int]]):
        self.prompt_ids, self.response_ids = prompt_ids, response_ids


class LogprobModel(nn.Module):
    """An HF causal LM as a function from sequences to the log-probs of their responses."""

    def __init__(self, model: nn.Module, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(
        self, tokens: TokenLists, device: torch.device, plain: bool = False, fill: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(log pi of every response token [T], entropy [T]), fp32; all sequences in one row without padding, but with
        sequences behind them that nobody asks about, to `fill` tokens in all.

        `plain`: transformers' own way instead, each sequence by itself with sdpa and fp32 logits, and no entropy.
        """
        prompt_ids, response_ids = tokens.prompt_ids, tokens.response_ids
        if plain:
            return self._plain(prompt_ids, response_ids, device), torch.empty(0)
        sequences = [p + r for p, r in zip(prompt_ids, response_ids, strict=True)]
        # The hidden state at position t predicts token t + 1: response tokens are predicted from prompt_len - 1 on.
        where, start = [], 0
        for prompt, sequence in zip(prompt_ids, sequences, strict=True):
            where += range(start + len(prompt) - 1, start + len(sequence) - 1)
            start += len(sequence)
        positions_T = packing.sent(torch.tensor(where), device)
        labels_T = packing.sent(torch.tensor([t for r in response_ids for t in r]), device)
        longest = max(map(len, sequences))
        sequences += [[0] * min(longest, fill - n) for n in range(start, fill, longest)]
        inputs = packing.model_inputs(sequences, device)
        hidden_1_S_H = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        hidden_T_H = hidden_1_S_H[0, positions_T]
        weight_V_H = self.model.get_output_embeddings().weight
        return head_logprobs(hidden_T_H, weight_V_H, labels_T, self.temperature, CHUNK_ELEMENTS)

    def _plain(
        self, prompt_ids: Sequence[list[int]], response_ids: Sequence[list[int]], device: torch.device
    ) -> Tensor:
        pieces = []
        self.model.set_attn_implementation("sdpa")
        try:
            with torch.compiler.set_stance("force_eager"):
                for prompt, response in zip(prompt_ids, response_ids, strict=True):
                    ids = torch.tensor([prompt + response], device=device)
                    logits = self.model(ids, use_cache=False, logits_to_keep=len(response) + 1).logits[0, :-1].float()
                    logprobs = (logits / self.temperature).log_softmax(-1)
                    pieces.append(logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0])
        finally:
            self.model.set_attn_implementation(packing.ATTENTION)
        return torch.cat(pieces)


def shard(root: LogprobModel, ranks: Ranks, device: torch.device, reshard: bool = True) -> None:
    """Over all ranks, in place: parameters become DTensors, each rank with its rows of them on `device`. Every rank
    must hold the same weights. With `reshard` False call `begin_micro_batch` before each micro-batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (ranks.world,)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    layers = list(root.model.base_model.layers)
    for layer in layers:
        fully_shard(layer, **options, reshard_after_forward=reshard)
    fully_shard(root, **options, reshard_after_forward=False)
    for module in (*layers, root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # a factor of 1 would else be a multiplication, and NCCL's alone
    for name, buffer in root.named_buffers():
        if buffer.device != device:
            owner, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(owner), leaf, buffer.to(device))


def begin_micro_batch(root: LogprobModel, last: bool) -> None:
    """Before the forward pass of a micro-batch: only after the `last` of an update are gradients reduced and weights
    given up."""
    root.set_requires_gradient_sync(last)
    root.set_reshard_after_backward(last)


def give_up(root: LogprobModel) -> None:
    """Whatever weights are still gathered: after a pass without a backward pass, or one that was not the last."""
    from torch.distributed.fsdp import FSDPModule

    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def span(parameter: Tensor, ranks: Ranks) -> tuple[int, int]:
    """(first row that this rank has of a sharded parameter, rows of the whole)."""
    rows = parameter.shape[0]
    return min(ranks.rank * -(-rows // ranks.world), rows), rows


def whole(parameter: Tensor, ranks: Ranks) -> Tensor | None:
    """A sharded parameter gathered to the host of the first rank; None on the others. All ranks must call."""
    full = parameter.detach().full_tensor()
    return full.cpu() if ranks.first else None
