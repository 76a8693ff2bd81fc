"""Where the sync finds the policy's weights, and whether they are still there.

Axes: O/I output/input features of a weight, R rank of a LoRA adapter.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quant_formats import SyncError


@dataclass(frozen=True)
class Source:
    """One policy tensor, [O, I] or [O].

    `tensor` is read in place where it is on the engine's device; otherwise `fill(out)` lays it into `out`, a bf16
    tensor of its shape on the engine's device, on whatever stream is current and without waiting for it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: torch.Tensor | None = None
    fill: Callable[[torch.Tensor], None] | None = None
    watched: tuple[torch.Tensor, ...] = ()  # these must stay at their addresses

    def read(self, device: torch.device) -> torch.Tensor:
        """The tensor on `device`: itself, or a new one."""
        if self.tensor is not None:
            return self.tensor
        out = torch.empty(self.shape, dtype=self.dtype, device=device)
        self.fill(out)
        return out

    @staticmethod
    def of(name: str, value: "torch.Tensor | Source", device: torch.device) -> "Source":
        """The source for a policy tensor as it comes: on `device`, in pinned host memory, or a DTensor."""
        if isinstance(value, Source):
            return value
        tensor = value.detach()
        shape, dtype = tuple(tensor.shape), tensor.dtype
        if hasattr(tensor, "full_tensor"):  # a DTensor (FSDP2): gathered when its group is staged, then dropped
            return Source(name, shape, dtype, fill=lambda out: out.copy_(value.detach().full_tensor()))
        if tensor.device == device:
            return Source(name, shape, dtype, tensor, watched=(value,))
        if not tensor.is_pinned():
            raise SyncError(
                f"the policy's {name} is on {tensor.device} and the engine on {device}; move it there, or into pinned "
                "host memory (tensor.pin_memory()) from which it can be streamed"
            )
        return Source(name, shape, dtype, fill=lambda out: out.copy_(tensor, non_blocking=True), watched=(value,))

    @staticmethod
    def lora(
        name: str, base: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
    ) -> "Source":  # fmt: skip
        """base [O, I] + scaling * lora_B [O, R] @ lora_A [R, I], merged as it is staged; `base` is not changed.

        The product is accumulated in fp32 from bf16 factors and rounded once, with the sum, to bf16.
        """
        a, b = (torch.empty_like(t, dtype=base.dtype, requires_grad=False) for t in (lora_A, lora_B))

        def fill(out: torch.Tensor) -> None:
            a.copy_(lora_A.detach())
            b.copy_(lora_B.detach())
            torch.addmm(base.detach(), b, a, alpha=scaling, out=out)

        return Source(name, tuple(base.shape), base.dtype, fill=fill, watched=(base, lora_A, lora_B))

    @staticmethod
    def rounded(name: str, weight: torch.Tensor, bits: int) -> "Source":
        """weight [O, I] on the engine's device, rounded to `bits` bits, symmetric, one scale a row, and back to bf16:
        for an engine in bf16 that samples as if it were quantized. `weight` is not changed."""
        largest = 2 ** (bits - 1) - 1

        def fill(out: torch.Tensor) -> None:
            exact = weight.detach().float()
            scale = exact.abs().amax(1, keepdim=True).clamp(min=1e-30) / largest
            out.copy_((exact / scale).round() * scale)

        return Source(name, tuple(weight.shape), weight.dtype, fill=fill, watched=(weight,))


def rounded_sources(model: torch.nn.Module, bits: int, skip: Sequence[str]) -> "dict[str, torch.Tensor | Source]":
    """The sources of an HF model whose linear layers, but those of `skip`, are to be rounded to `bits` bits."""
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n} - set(skip)
    return {
        name: Source.rounded(name, p, bits) if name.removesuffix(".weight") in linear and p.dim() == 2 else p
        for name, p in model.named_parameters(remove_duplicate=False)
    }


class Watch:
    """Tensors that must stay what and where they are: by identity, where their owner could replace them, and by
    address. Cheap: it is asked at every sync."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._places: list[tuple[Mapping[str, Any], str]] = []
        self._tensors: list[torch.Tensor] = []
        self._addressed: list[torch.Tensor] = []
        self._addresses: list[int] = []

    def add(self, name: str, tensor: torch.Tensor, owner: Mapping[str, Any] | None = None, leaf: str = "") -> None:
        """`owner[leaf]` (a module's `_parameters`, say) must go on being `tensor`."""
        self._names.append(name)
        self._places.append(({leaf: tensor} if owner is None else owner, leaf))
        self._tensors.append(tensor)
        local = tensor.to_local() if hasattr(tensor, "full_tensor") else tensor
        self._addressed.append(local)
        self._addresses.append(local.data_ptr())

    def add_module(self, module: torch.nn.Module) -> None:
        """All parameters, tied ones under each of their names."""
        for path, part in module.named_modules(remove_duplicate=False):
            for leaf, parameter in part._parameters.items():
                if parameter is not None:
                    self.add(f"{path}.{leaf}" if path else leaf, parameter, part._parameters, leaf)

    def moved(self) -> str | None:
        """The name of the first tensor that was replaced or has moved."""
        now = [owner.get(leaf) for owner, leaf in self._places]
        addresses = list(map(torch.Tensor.data_ptr, self._addressed))
        if addresses == self._addresses and all(map(operator.is_, now, self._tensors)):
            return None
        changed = zip(self._names, now, self._tensors, addresses, self._addresses, strict=True)
        return next(name for name, a, b, c, d in changed if a is not b or c != d)
