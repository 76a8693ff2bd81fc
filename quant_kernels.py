"""The weight sync's Triton kernels: every parameter of a model in a handful of launches.

A table on the device says what there is to do; no Python runs per tensor. A *segment* is one policy tensor's place in
one engine parameter (or the zero rows of a padded vocabulary); a *tile* is the piece of a segment that one program
handles. Arithmetic is that of quant_formats.py, bit for bit.

    amax       one matrix, one scale: max |x| over all of its tiles (reads 2 bytes a weight)
    flat       the second pass of fp8_tensor (reads 2, writes 1), and copies (reads 2, writes 2)
    rows       fp8_channel and int8 in one pass: whole rows stay in registers (reads 2, writes 1)
    blocks     fp8_block in one pass, 128 x 128

max |x| is taken over the integers under bf16's bits: exact, and a NaN is larger than everything. With CHECK the same
kernels compare with what the engine holds, and write nothing but a count of differences.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import triton
import triton.language as tl

import quant_formats as formats

FLAT_TILE = 16384  # elements
ROWS_TILE = 8192  # elements, at least; more where one row is longer
MIN_CHANNEL_SCALE = tl.constexpr(formats.CHANNEL_SCALE_MIN)
INT8_AMAX_MIN = tl.constexpr(formats.INT8_AMAX_MIN)
MIN_BLOCK_AMAX = tl.constexpr(formats.BLOCK_AMAX_MIN)
E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
INT8_MAX = tl.constexpr(formats.INT8_MAX)
INF_BITS = tl.constexpr(0x7F80)  # bf16
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a small fp32 to an integer, ties to even
EXACT = {"enable_fp_fusion": False}  # a product and a sum made one would round once where vLLM rounds twice


@triton.jit
def _fp32(bits):
    """bf16 bits (int16 or int32) as fp32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(x):
    return tl.maximum(tl.minimum(x, E4M3_MAX), -E4M3_MAX).to(tl.float8e4nv)


@triton.jit
def _field(segments, segment, field: tl.constexpr, ALIGNED: tl.constexpr):
    value = tl.load(segments + segment * 8 + field)
    return tl.multiple_of(value, 16) if ALIGNED else value


@triton.jit
def _pointer(segments, segment, field: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = _field(segments, segment, field, ALIGNED).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit(do_not_specialize=["first"])
def _amax_kernel(tiles, segments, amax, first, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    tile = first + tl.program_id(0)
    segment = tl.load(tiles + 2 * tile)
    start = tl.load(tiles + 2 * tile + 1).to(tl.int64) * TILE
    source = _pointer(segments, segment, 0, tl.int16, ALIGNED) + start
    left = _field(segments, segment, 2, ALIGNED) - start
    at = tl.arange(0, TILE)
    x = tl.load(source + at, mask=at < left, other=0)
    slot = tl.load(segments + segment * 8 + 4)
    tl.atomic_max(amax + slot, tl.max((x & 0x7FFF).to(tl.int32), 0), sem="relaxed")


@triton.jit
def _copy(segments, segment, start, TILE: tl.constexpr, ALIGNED: tl.constexpr, CHECK: tl.constexpr):
    """A tile as it is, or zeros where there is no source. How many elements differ, or whether one is not finite."""
    at = tl.arange(0, TILE)
    inside = at < _field(segments, segment, 2, ALIGNED) - start
    exists = tl.load(segments + segment * 8) != 0
    x = tl.load(_pointer(segments, segment, 0, tl.int16, ALIGNED) + start + at, mask=inside & exists, other=0)
    dest = _pointer(segments, segment, 1, tl.int16, ALIGNED) + start + at
    if CHECK:
        held = tl.load(dest, mask=inside, other=0)
        return tl.sum((held != x).to(tl.int32), 0)
    else:
        tl.store(dest, x, mask=inside)
        is_bf16 = tl.load(segments + segment * 8 + 5).to(tl.int32)
        return is_bf16 * (tl.max((x & 0x7FFF).to(tl.int32), 0) >= INF_BITS).to(tl.int32)


@triton.jit
def _scale(segments, segment, start, scale, TILE: tl.constexpr, ALIGNED: tl.constexpr, CHECK: tl.constexpr):
    """A tile in FP8 under a given scale; how many elements differ."""
    at = tl.arange(0, TILE)
    inside = at < _field(segments, segment, 2, ALIGNED) - start
    x = tl.load(_pointer(segments, segment, 0, tl.int16, ALIGNED) + start + at, mask=inside, other=0)
    q = _e4m3(_fp32(x) * tl.div_rn(1.0, scale)).to(tl.int8, bitcast=True)
    dest = _pointer(segments, segment, 1, tl.int8, ALIGNED) + start + at
    if CHECK:
        held = tl.load(dest, mask=inside, other=0)
        return tl.sum(((held != q) & inside).to(tl.int32), 0)
    else:
        tl.store(dest, q, mask=inside)
        return 0


@triton.jit(do_not_specialize=["first", "stride", "stop", "scaled_first", "scaled_count"])
def _flat_kernel(
    tiles, segments, flag, first, stride, stop, amax, scaled, scaled_first, scaled_count,
    TILE: tl.constexpr, ALIGNED: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if CHECK and pid < scaled_count:  # the scale of one matrix, against the amax that was just taken anew
        owner = tl.load(scaled + scaled_first + pid)
        held = tl.load(tl.load(segments + owner * 8 + 3).to(tl.pointer_type(tl.float32)))
        bits = tl.load(amax + tl.load(segments + owner * 8 + 4))
        wanted = tl.div_rn(_fp32(bits), E4M3_MAX)
        if (bits >= INF_BITS) | (held.to(tl.int32, bitcast=True) != wanted.to(tl.int32, bitcast=True)):
            tl.atomic_add(flag, 1, sem="relaxed")
    tile = first + pid * stride
    if tile >= stop:
        return
    segment = tl.load(tiles + 2 * tile)
    start = tl.load(tiles + 2 * tile + 1).to(tl.int64) * TILE
    scale_address = tl.load(segments + segment * 8 + 3)
    if scale_address == 0:
        wrong = _copy(segments, segment, start, TILE, ALIGNED, CHECK)
    else:
        scale_pointer = scale_address.to(tl.pointer_type(tl.float32))
        wrong = 0
        if CHECK:
            scale = tl.load(scale_pointer)
        else:
            bits = tl.load(amax + tl.load(segments + segment * 8 + 4))
            scale = tl.div_rn(_fp32(bits), E4M3_MAX)
            if (start == 0) & (tl.load(segments + segment * 8 + 5) != 0):
                tl.store(scale_pointer, scale)
                wrong = (bits >= INF_BITS).to(tl.int32)
        wrong += _scale(segments, segment, start, scale, TILE, ALIGNED, CHECK)
    if wrong > 0:
        tl.atomic_add(flag, 1, sem="relaxed")


@triton.jit
def _divide(x, y, inverse):
    """x / y, where inverse is 1 / y rounded to nearest: the quotient and one residual. Not always the last bit, but
    always the one FP8 number that the true division gives (all pairs of mantissas are in the tests), several times
    faster than the division instruction. The residual is q * y - x, and negation a product, for the sign of a zero.
    """
    q = x * inverse
    return tl.fma(tl.fma(q, y, x * -1.0), inverse * -1.0, q)


@triton.jit
def _load_columns(pointer, row, row_inside, columns, FIRST: tl.constexpr, COUNT: tl.constexpr):
    column = FIRST + tl.arange(0, COUNT)
    inside = row_inside[:, None] & (column < columns)[None, :]
    return tl.load(pointer + (row[:, None].to(tl.int64) * columns + column[None, :]), mask=inside, other=0)


@triton.jit
def _finish_columns(
    x, scale, inverse, dest, row, row_inside, columns,
    FIRST: tl.constexpr, COUNT: tl.constexpr, INT8: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Quantize and store, or count what differs."""
    if INT8:
        value = (_fp32(x) * inverse[:, None] + ROUND) - ROUND
        q = tl.maximum(tl.minimum(value, INT8_MAX), -INT8_MAX).to(tl.int8)
    else:
        q = _divide(_fp32(x), scale[:, None], inverse[:, None]).to(tl.float8e4nv).to(tl.int8, bitcast=True)
    column = FIRST + tl.arange(0, COUNT)
    inside = row_inside[:, None] & (column < columns)[None, :]
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    if CHECK:
        held = tl.load(dest + at, mask=inside, other=0)
        return tl.sum(tl.sum(((held != q) & inside).to(tl.int32), 1), 0)
    else:
        tl.store(dest + at, q, mask=inside)
        return 0


@triton.jit(do_not_specialize=["first", "stride"])
def _rows_kernel(
    tiles, segments, flag, first, stride, ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    INT8: tl.constexpr, ALIGNED: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    tile = first + tl.program_id(0) * stride
    segment = tl.load(tiles + 2 * tile)
    row = tl.load(tiles + 2 * tile + 1) * ROWS + tl.arange(0, ROWS)
    columns = _field(segments, segment, 7, ALIGNED)
    row_inside = row < tl.load(segments + segment * 8 + 6)
    source = _pointer(segments, segment, 0, tl.int16, ALIGNED)
    dest = _pointer(segments, segment, 1, tl.int8, ALIGNED)
    # A power of two and the rest, so that few lanes idle where the row is no power of two.
    head = _load_columns(source, row, row_inside, columns, 0, HEAD)
    bits = tl.max((head & 0x7FFF).to(tl.int32), 1)
    if TAIL > 0:
        tail = _load_columns(source, row, row_inside, columns, HEAD, TAIL)
        bits = tl.maximum(bits, tl.max((tail & 0x7FFF).to(tl.int32), 1))
    amax = _fp32(bits)
    if INT8:
        scale = tl.div_rn(amax, INT8_MAX)
        inverse = tl.where(amax < INT8_AMAX_MIN, 0.0, tl.div_rn(INT8_MAX, amax))
    else:
        scale = tl.div_rn(amax, E4M3_MAX)
        scale = tl.where(scale < MIN_CHANNEL_SCALE, MIN_CHANNEL_SCALE, scale)
        inverse = tl.div_rn(1.0, scale)
    wrong = _finish_columns(head, scale, inverse, dest, row, row_inside, columns, 0, HEAD, INT8, CHECK)
    if TAIL > 0:
        wrong += _finish_columns(tail, scale, inverse, dest, row, row_inside, columns, HEAD, TAIL, INT8, CHECK)
    scale_pointer = tl.load(segments + segment * 8 + 3).to(tl.pointer_type(tl.float32)) + row
    if CHECK:
        held = tl.load(scale_pointer, mask=row_inside, other=0.0)
        off = held.to(tl.int32, bitcast=True) != scale.to(tl.int32, bitcast=True)
        wrong += tl.sum((off & row_inside).to(tl.int32), 0)
    else:
        tl.store(scale_pointer, scale, mask=row_inside)
        wrong += (tl.max(bits, 0) >= INF_BITS).to(tl.int32)
    if wrong > 0:
        tl.atomic_add(flag, 1, sem="relaxed")


@triton.jit(do_not_specialize=["first", "stride"])
def _blocks_kernel(
    tiles, segments, flag, first, stride, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, CHECK: tl.constexpr
):
    tile = first + tl.program_id(0) * stride
    segment = tl.load(tiles + 2 * tile)
    index = tl.load(tiles + 2 * tile + 1)
    columns = _field(segments, segment, 7, ALIGNED)
    across = ((columns + (BLOCK - 1)) // BLOCK).to(tl.int32)
    row = (index // across) * BLOCK + tl.arange(0, BLOCK)
    column = (index % across) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < tl.load(segments + segment * 8 + 6))[:, None] & (column < columns)[None, :]
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    source = _pointer(segments, segment, 0, tl.int16, ALIGNED)
    x = tl.load(source + at, mask=inside, other=0)
    bits = tl.max(tl.max((x & 0x7FFF).to(tl.int32), 1), 0)
    amax = _fp32(bits)
    amax = tl.where(amax < MIN_BLOCK_AMAX, MIN_BLOCK_AMAX, amax)
    scale = amax * (1.0 / E4M3_MAX)
    q = _e4m3(_fp32(x) * (1.0 / scale))
    dest = _pointer(segments, segment, 1, tl.int8, ALIGNED) + at
    scale_pointer = tl.load(segments + segment * 8 + 3).to(tl.pointer_type(tl.float32)) + index
    if CHECK:
        held = tl.load(dest, mask=inside, other=0)
        wrong = tl.sum(tl.sum(((held != q.to(tl.int8, bitcast=True)) & inside).to(tl.int32), 1), 0)
        held_scale = tl.load(scale_pointer)
        wrong += (held_scale.to(tl.int32, bitcast=True) != scale.to(tl.int32, bitcast=True)).to(tl.int32)
    else:
        tl.store(dest, q.to(tl.int8, bitcast=True), mask=inside)
        tl.store(scale_pointer, scale)
        wrong = (bits >= INF_BITS).to(tl.int32)
    if wrong > 0:
        tl.atomic_add(flag, 1, sem="relaxed")


@triton.jit
def _reciprocal_kernel(x, out, count, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + at, 1.0 / tl.load(x + at, mask=at < count, other=1.0), mask=at < count)


def reciprocal(x: torch.Tensor) -> torch.Tensor:
    """1 / x as the blocks kernel and torch.compile have it: the GPU's fast division, which torch itself never uses."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _reciprocal_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), TILE=1024)
    return out


@dataclass(frozen=True)
class Item:
    """One engine parameter, and its weights where the kernels find them."""

    fmt: formats.Format
    dest: torch.Tensor  # [O, I] or [O], dense
    scale: torch.Tensor | None
    weights: tuple[torch.Tensor, ...]  # stacked along O; dense bf16
    group: int  # in this group's turn, check() also takes the scale's amax anew
    bf16: bool = True  # False: a copy of some other dtype, whose tensors are given as int16


class _Segment(NamedTuple):
    """A line of the table, as the kernels read it."""

    source: int  # address; 0: zeros
    dest: int
    numel: int
    scale: int  # address of the segment's first entry; 0: a copy
    slot: int  # of the matrix's amax
    owner: int  # 1: the first segment of its matrix, which writes the scale; of a copy: bf16, so that inf is known
    rows: int
    columns: int


def _segments(item: Item, slot: int) -> Iterator[_Segment]:
    row, width = 0, item.dest.shape[1] if item.dest.dim() == 2 else 1
    entry = 0 if item.fmt.scale_rows == 0 else item.scale[0].numel()
    for weight in item.weights:
        dest = item.dest[row : row + weight.shape[0]]
        at = row // max(item.fmt.scale_rows, 1) * entry
        scale = 0 if item.scale is None else item.scale.data_ptr() + at * item.scale.element_size()
        source = (weight.data_ptr(), dest.data_ptr(), dest.numel(), scale)
        owner = row == 0 if item.scale is not None else item.bf16
        yield _Segment(*source, slot, owner, dest.shape[0], width)
        row += weight.shape[0]
    padding = item.dest[row:]
    if padding.numel():
        yield _Segment(0, padding.data_ptr(), padding.numel(), 0, slot, 0, padding.shape[0], width)


class _Kernel(NamedTuple):
    """Which kernel handles an item, and in what pieces. Items with equal ones share a launch."""

    name: str
    rows: int  # of a tile
    columns: int
    tail: int = 0  # more columns of it
    int8: bool = False

    @classmethod
    def of(cls, item: Item) -> "_Kernel":
        if item.fmt in (formats.FP8_TENSOR, formats.COPY):
            return cls("flat", 1, FLAT_TILE)
        if item.fmt is formats.FP8_BLOCK:
            return cls("blocks", formats.BLOCK, formats.BLOCK)
        width = item.dest.shape[1]
        head = max(triton.next_power_of_2(width + 1) // 2, 16)
        tail = triton.next_power_of_2(max(width - head, 16)) if width > head else 0
        rows = triton.next_power_of_2(max(1, ROWS_TILE // (head + tail)) + 1) // 2
        return cls("rows", rows, head, tail, item.fmt is formats.INT8)

    def tiles(self, segment: _Segment) -> int:
        if self.name == "flat":
            return triton.cdiv(segment.numel, self.columns)
        rows = triton.cdiv(segment.rows, self.rows)
        return rows * triton.cdiv(segment.columns, self.columns) if self.name == "blocks" else rows

    def aligned(self, segment: _Segment) -> bool:
        """Whether loads and stores of 16 bytes never straddle anything."""
        length = segment.numel if self.name == "flat" else segment.columns
        return segment.source % 16 == segment.dest % 16 == length % 16 == 0

    @property
    def warps(self) -> int:
        if self.name != "rows":
            return 4
        lanes = self.rows * (self.columns + self.tail)
        return min(max(triton.next_power_of_2(lanes) // 4096, 4), 16)


class Sweep:
    """The table of some items, and the launches over it.

    Args:
        items: what to write; the plan has checked that tensors are dense and sources bf16.
        groups: in how many groups the items are.
        flags: int32 (2,) on the device, shared by sweeps: [0] counts what write() found not finite, [1] what check()
            found different.
        agree: what makes one of several ranks' amax of FP8_TENSOR's matrices, in place (tensor_parallel.shared_amax);
            a matrix of which every rank has the whole has one already.

    `write` and `check` only launch: they allocate nothing, wait for nothing, and can be captured in a CUDA graph
    (without `agree`, which is a collective).
    """

    def __init__(self, items: Sequence[Item], groups: int, flags: torch.Tensor, agree: formats.Agree | None = None):
        self._items, self._agree = items, agree  # the table holds their addresses
        self._not_finite, self._different = flags[0:1], flags[1:2]
        ordered = sorted(items, key=lambda i: (_Kernel.of(i), i.fmt is formats.COPY, i.group))
        matrices = [i for i in ordered if i.fmt is formats.FP8_TENSOR]
        segments: list[_Segment] = []
        counts: list[int] = []
        owners: list[int] = []
        ends: list[int] = []  # of the tiles of each matrix
        self._launches: list[tuple[_Kernel, bool, int, int]] = []  # (kernel, aligned, tiles first..stop)
        for kernel, members in groupby(ordered, key=_Kernel.of):
            first, start = sum(counts), len(segments)
            for item in members:
                if item.fmt is formats.FP8_TENSOR:
                    owners.append(len(segments))
                    ends = ends or [first]
                for segment in _segments(item, len(owners) - 1):
                    segments.append(segment)
                    counts.append(kernel.tiles(segment))
                if item.fmt is formats.FP8_TENSOR:
                    ends.append(sum(counts))
            aligned = all(kernel.aligned(s) for s in segments[start:])
            self._launches.append((kernel, aligned, first, sum(counts)))
        groups_of = [i.group for i in matrices]
        self._turns = [(bisect_left(groups_of, g), bisect_right(groups_of, g)) for g in range(groups)]
        self._ends = ends
        device = flags.device
        self._segments = torch.tensor(segments, dtype=torch.int64, device=device).view(-1, len(_Segment._fields))
        self._owners = torch.tensor(owners or [0], dtype=torch.int32, device=device)
        per_segment = torch.tensor(counts, dtype=torch.int64, device=device)
        segment_of = torch.repeat_interleave(torch.arange(len(counts), device=device), per_segment)
        tile_of = torch.arange(len(segment_of), device=device) - (per_segment.cumsum(0) - per_segment)[segment_of]
        self._tiles = torch.stack([segment_of, tile_of], 1).int().contiguous()
        self._amax = torch.zeros(max(len(matrices), 1), dtype=torch.int32, device=device)  # of the last write()
        self._amax_again = torch.zeros_like(self._amax)  # of the last check()

    def write(self) -> None:
        """Launch the quantization of all items."""
        if self._ends:
            self._amax.zero_()
            self._find_amax(self._amax, 0, len(self._ends) - 1)
        for kernel, aligned, first, stop in self._launches:
            self._launch(kernel, aligned, first, stop, 1, self._not_finite, self._amax, (0, 0), check=False)

    def check(self, turn: int, every: int) -> None:
        """Launch the comparison of one tile in `every`, starting at `turn`, and of the scales whose turn it is; with
        every = 1 of everything."""
        low, high = self._turns[turn % every] if every > 1 else (0, len(self._ends) - 1)
        if self._ends and high > low:
            self._amax_again.zero_()
            self._find_amax(self._amax_again, low, high)
        for kernel, aligned, first, stop in self._launches:
            start = first + turn % every
            self._launch(
                kernel, aligned, start, stop, every, self._different, self._amax_again, (low, high), check=True
            )

    def _find_amax(self, amax: torch.Tensor, low: int, high: int) -> None:
        """Of matrices low..high, as bits of bf16 in int32."""
        first, stop = self._ends[low], self._ends[high]
        aligned = next(a for k, a, *_ in self._launches if k.name == "flat")
        _amax_kernel[(stop - first,)](
            self._tiles, self._segments, amax, first, TILE=FLAT_TILE, ALIGNED=aligned, num_warps=4
        )
        if self._agree is not None:
            self._agree(amax[low:high])

    def _launch(
        self, kernel: _Kernel, aligned: bool, first: int, stop: int, stride: int, flag: torch.Tensor,
        amax: torch.Tensor, scales: tuple[int, int], check: bool,
    ) -> None:  # fmt: skip
        programs = max(0, triton.cdiv(stop - first, stride))
        table = (self._tiles, self._segments, flag, first, stride)
        constants = {"ALIGNED": aligned, "CHECK": check, "num_warps": kernel.warps, **EXACT}
        if kernel.name == "flat":
            low, high = scales
            programs = max(programs, high - low)
            if programs:
                _flat_kernel[(programs,)](
                    *table, stop, amax, self._owners, low, high - low, TILE=kernel.columns, **constants
                )
        elif programs and kernel.name == "rows":
            _rows_kernel[(programs,)](*table, *kernel[1:], **constants)
        elif programs:
            _blocks_kernel[(programs,)](*table, BLOCK=kernel.rows, **constants)
