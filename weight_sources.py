"""Where the sync finds the policy's weights, and whether they are still there.

Axes: O/I output/input features of a weight, R rank of a LoRA adapter.

Shards. Under FSDP2 each rank holds some rows of a tensor, a DTensor. They are gathered when their group is staged, into
the staging buffer itself: a collective, which every rank must enter in the same order. Small tensors travel together
(PackedGather), since a collective costs the host more than their bytes do; adapters among them, into buffers of their
own, which stay. What is merged or rounded is so after it was gathered and before a tensor-parallel engine's part is cut
out of it: the bits are those of a policy that is not sharded.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from quant_formats import SyncError
from tensor_parallel import Cut

PACK_BYTES = 64 << 20  # of tensors that are gathered together; one of more than a quarter of that travels alone


@dataclass(frozen=True)
class Source:
    """One policy tensor, [O, I] or [O].

    `tensor` is read in place where it is on the engine's device; otherwise `fill(out)` lays it into `out`, a bf16
    tensor of its shape on the engine's device, on whatever stream is current and without waiting for it. Both are the
    whole tensor; `cut` is the part of it that this rank's engine holds, None: all.

    Attributes:
        pieces: (DTensor, whole) pairs that are gathered with others before `merge`; () where `fill` does all.
        merge: (out) what is left of `fill` once they are whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: torch.Tensor | None = None
    fill: Callable[[torch.Tensor], None] | None = None
    watched: tuple[torch.Tensor, ...] = ()  # these must stay at their addresses
    cut: Cut | None = None
    shards: torch.Tensor | None = None  # the DTensor, where all that `fill` does is to gather it
    pieces: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    merge: Callable[[torch.Tensor], None] | None = None

    @property
    def packs(self) -> bool:
        """Whether it is itself gathered together with others."""
        return self.shards is not None and _is_small(self.shape, self.dtype)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of what this rank's engine holds."""
        return self.shape if self.cut is None else self.cut.shape(self.shape)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """A view; of columns not dense."""
        return whole if self.cut is None else self.cut.of(whole)

    def with_cut(self, cut: Cut | None) -> "Source":
        return self if cut is None else replace(self, cut=cut)

    @property
    def cut_by_columns(self) -> bool:
        return self.cut is not None and self.cut.dim == 1

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
        if is_sharded(tensor):
            check_sharding(name, value)
            if tensor.device != device:
                raise SyncError(
                    f"the policy's {name} is sharded on {tensor.device} and the engine on {device}; shard it there "
                    "(fully_shard without CPUOffloadPolicy)"
                )
            shards = None if value.placements[0].is_replicate() else value
            return Source(name, shape, dtype, fill=lambda out: gather(value, out), watched=(value,), shards=shards)
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
        """base [O, I] + scaling * lora_B [O, R] @ lora_A [R, I], merged as it is staged; `base` is not changed. Each of
        them may be a DTensor.

        The product is accumulated in fp32 from bf16 factors and rounded once, with the sum, to bf16.
        """
        for tensor in (base, lora_A, lora_B):
            check_sharding(name, tensor)
        pieces = []  # what must be gathered or cast; the others are read where they lie

        def whole(factor: torch.Tensor) -> torch.Tensor:
            if not is_sharded(factor) and factor.dtype == base.dtype:
                return factor.detach()
            pieces.append((factor, torch.empty(factor.shape, dtype=base.dtype, device=factor.device)))
            return pieces[-1][1]

        a, b = whole(lora_A), whole(lora_B)

        def merge(out: torch.Tensor) -> None:
            torch.addmm(gathered(base, out), b, a, alpha=scaling, out=out)

        def fill(out: torch.Tensor) -> None:
            for factor, into in pieces:
                gather(factor, into)
            merge(out)

        together = all(
            is_sharded(t) and t.placements[0].is_shard() and t.dtype == base.dtype and _is_small(t.shape, t.dtype)
            for t, _ in pieces
        )
        return Source(
            name, tuple(base.shape), base.dtype, fill=fill, watched=(base, lora_A, lora_B),
            pieces=tuple(pieces) if together else (), merge=merge,
        )  # fmt: skip

    @staticmethod
    def rounded(name: str, weight: torch.Tensor, bits: int) -> "Source":
        """weight [O, I] on the engine's device, rounded to `bits` bits, symmetric, one scale a row, and back to bf16:
        for an engine in bf16 that samples as if it were quantized. `weight` is not changed."""
        largest = 2 ** (bits - 1) - 1
        check_sharding(name, weight)

        def fill(out: torch.Tensor) -> None:
            exact = gathered(weight, out).float()
            scale = exact.abs().amax(1, keepdim=True).clamp(min=1e-30) / largest
            out.copy_((exact / scale).round() * scale)

        return Source(name, tuple(weight.shape), weight.dtype, fill=fill, watched=(weight,))


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a DTensor; a plain tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def check_sharding(name: str, tensor: torch.Tensor) -> None:
    """SyncError for a DTensor that is not FSDP2's: whole rows, over one dimension of ranks."""
    if not is_sharded(tensor):
        return
    placements = tensor.placements
    if len(placements) != 1 or not (placements[0].is_shard(0) or placements[0].is_replicate()):
        raise SyncError(
            f"the policy's {name} is a DTensor with placements {placements}; the sync gathers rows that are sharded "
            "over one mesh dimension, as fully_shard() does with a one-dimensional mesh"
        )


def gather(tensor: torch.Tensor, out: torch.Tensor) -> None:
    """All of `tensor` into `out`, which is dense and may have another dtype. Of a DTensor a collective of its mesh:
    rank r of W has rows r * c .. (r + 1) * c, c = ceil(rows / W), as far as there are any."""
    part = local(tensor.detach())
    if not is_sharded(tensor) or tensor.placements[0].is_replicate():
        out.copy_(part)
        return
    part = part.to(out.dtype)
    ranks, rows = tensor.device_mesh.size(), out.shape[0]
    group = tensor.device_mesh.get_group()
    if rows % ranks == 0:
        dist.all_gather_into_tensor(out, part.contiguous(), group=group)
        return
    most = -(-rows // ranks)
    padded = part.new_zeros(most, *part.shape[1:])
    padded[: part.shape[0]] = part
    everyone = part.new_empty(most * ranks, *part.shape[1:])
    dist.all_gather_into_tensor(everyone, padded, group=group)
    out.copy_(everyone[:rows])


class PackedGather:
    """Some DTensors in one collective, each into its `whole`: dense, of its shape and dtype. All are sharded alike.

    `use` gives it `scratch_bytes` for what is sent and received, which others may use between calls. Shards are read
    where they lay then.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        self._pairs = pairs
        self._ranks, self._group = pairs[0][0].device_mesh.size(), pairs[0][0].device_mesh.get_group()
        self._rank_bytes = [  # of a whole that every rank but the last ones has
            -(-whole.shape[0] // self._ranks) * (_bytes_of(whole).numel() // whole.shape[0]) for _, whole in pairs
        ]
        self._places = [-(-size // 256) * 256 for size in self._rank_bytes]
        self.scratch_bytes = (self._ranks + 1) * sum(self._places)

    def use(self, scratch: torch.Tensor) -> None:
        sent = sum(self._places)
        self._send, self._received = scratch[:sent], scratch[sent : self.scratch_bytes]
        received = self._received.view(self._ranks, sent)
        self._copies_in: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])  # to, from
        self._copies_out: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        start = 0
        for (tensor, whole), each, place in zip(self._pairs, self._rank_bytes, self._places, strict=True):
            mine, out = _bytes_of(local(tensor.detach())), _bytes_of(whole)
            if mine.numel():  # the last ranks may have no row
                self._copies_in[0].append(self._send[start : start + mine.numel()])
                self._copies_in[1].append(mine)
            for rank in range(-(-out.numel() // each)):
                part = out[rank * each : (rank + 1) * each]
                self._copies_out[0].append(part)
                self._copies_out[1].append(received[rank, start : start + part.numel()])
            start += place

    def __call__(self) -> None:
        if self._copies_in[0]:
            torch._foreach_copy_(*self._copies_in)
        dist.all_gather_into_tensor(self._received, self._send, group=self._group)
        torch._foreach_copy_(*self._copies_out)


def packs_of(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(DTensor, whole) in groups for PackedGather of at most PACK_BYTES each, the same on every rank."""
    pack: list[tuple[torch.Tensor, torch.Tensor]] = []
    for pair in pairs:
        if pack and sum(_bytes_of(whole).numel() for _, whole in (*pack, pair)) > PACK_BYTES:
            yield pack
            pack = []
        pack.append(pair)
    if pack:
        yield pack


def _is_small(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a tensor travels together with others."""
    return math.prod(shape) * dtype.itemsize <= PACK_BYTES // 4


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a dense tensor."""
    return tensor.view(-1).view(torch.uint8)


def gathered(tensor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """All of `tensor` to be read: itself where it is plain, else `out`, which then holds it."""
    if not is_sharded(tensor):
        return tensor.detach()
    gather(tensor, out)
    return out


def rounded_sources(model: torch.nn.Module, bits: int, skip: Sequence[str]) -> "dict[str, torch.Tensor | Source]":
    """The sources of an HF model whose linear layers, but those of `skip`, are to be rounded to `bits` bits."""
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n} - set(skip)
    return {
        name: Source.rounded(name, p, bits) if name.removesuffix(".weight") in linear and p.dim() == 2 else p
        for name, p in model.named_parameters(remove_duplicate=False)
    }


class Watch:
    """Tensors that must stay what and where they are: by identity, where their owner could replace them, and by
    address (of a DTensor that of this rank's shard). Cheap: it is asked at every sync.

    Attributes:
        sharded: some are DTensors.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._places: list[tuple[Mapping[str, Any], str]] = []
        self._tensors: list[torch.Tensor] = []
        self.sharded = False
        self._addresses: list[int] = []

    def add(self, name: str, tensor: torch.Tensor, owner: Mapping[str, Any] | None = None, leaf: str = "") -> None:
        """`owner[leaf]` (a module's `_parameters`, say) must go on being `tensor`."""
        self._names.append(name)
        self._places.append(({leaf: tensor} if owner is None else owner, leaf))
        self._tensors.append(tensor)
        self.sharded |= is_sharded(tensor)
        self._addresses.append(local(tensor).data_ptr())

    def add_module(self, module: torch.nn.Module) -> None:
        """All parameters, tied ones under each of their names."""
        for path, part in module.named_modules(remove_duplicate=False):
            for leaf, parameter in part._parameters.items():
                if parameter is not None:
                    self.add(f"{path}.{leaf}" if path else leaf, parameter, part._parameters, leaf)

    def moved(self) -> str | None:
        """The name of the first tensor that was replaced or has moved."""
        now = [owner.get(leaf) for owner, leaf in self._places]
        held = map(local, self._tensors) if self.sharded else self._tensors
        addresses = list(map(torch.Tensor.data_ptr, held))
        if addresses == self._addresses and all(map(operator.is_, now, self._tensors)):
            return None
        changed = zip(self._names, now, self._tensors, addresses, self._addresses, strict=True)
        return next(name for name, a, b, c, d in changed if a is not b or c != d)
