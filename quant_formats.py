"""How bf16 weights become an engine's tensors: layouts, scales, rounding. The reference, in plain torch.

Axes: O/I output/input features; a weight here is [O, I], HF's order.

`read_format` finds the format of an engine parameter by looking at its dtype, shape and strides, never at class names.
Layouts as vLLM creates them (0.26 on GPUs, 0.32 on CPUs):

    format       weight                               scale (fp32; real value = weight * scale)
    copy         bf16 [O, I] or [O]                   -
    fp8_tensor   e4m3 [I, O], stride (1, I)           weight_scale (1,): one for the whole fused matrix
    fp8_channel  e4m3 [I, O], stride (1, I)           weight_scale [O, 1]
    fp8_block    e4m3 [O, I]                          weight_scale_inv [ceil(O / 128), ceil(I / 128)]
    int8         int8 [I, O], stride (1, I)           weight_scale [O, 1]

Rows of a padded vocabulary that no policy tensor fills are zero.

Numerics, the operations and their order of vLLM's own quantizers, so that results are bit-identical to its load:

    fp8_tensor   scale = amax / 448; q = x * (1 / scale). All zero: scale 0 and bytes of 448, whose real value is 0
    fp8_channel  scale = max(amax / 448, 1 / (448 * 512)); q = x / scale, a true division
    fp8_block    amax at least 1e-4; scale = amax / 448; q = x * (1 / scale). vLLM has this one from torch.compile; on
                 a GPU its division by 448 is a multiplication, and 1 / scale the GPU's fast division
    int8         scale = amax / 127; q = x * (127 / amax), rounded to nearest even. vLLM has no online INT8 for dense
                 layers: this is its quantizer of activations, applied to rows. A row below 1e-30 becomes zeros

all in fp32, limited to the format's range, FP8 rounded to nearest even.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

E4M3_MAX = 448.0
INT8_MAX = 127.0
CHANNEL_SCALE_MIN = 1.0 / (E4M3_MAX * 512.0)
INT8_AMAX_MIN = 1e-30  # below, 127 / amax would leave fp32's range
BLOCK = 128
BLOCK_AMAX_MIN = 1e-4
CHUNK_ELEMENTS = 1 << 24  # rows are handled in pieces of this many elements: 64 MiB of fp32 scratch


class SyncError(RuntimeError):
    """The plan cannot be built, or the engine does not hold the policy's weights."""


Agree = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Format:
    """One line of the table above.

    Attributes:
        scale_rows: rows of the weight that share a row of the scale; 0: one scale for all of them.
        scales: (sources, each [O_i, I], stacked along O; None or what makes one of several ranks' amax) -> fp32 in the
            engine's shape. The latter (tensor_parallel.shared_amax) takes int32 in place, bits of positive floats:
            their order is that of the numbers, with NaN above all.
        quantize: (rows [R, I], their scale) -> [R, I] of the engine's dtype.
    """

    name: str
    scale_rows: int
    scales: Callable[[Sequence[torch.Tensor], "Agree | None"], torch.Tensor]
    quantize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def scale_of(self, scale: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The part of `scale` that rows start..stop use; start is a multiple of `scale_rows`."""
        return scale[start // self.scale_rows : -(-stop // self.scale_rows)] if self.scale_rows else scale


def _divide(x: torch.Tensor, number: float) -> torch.Tensor:
    """A true division: by a Python number, torch on a GPU multiplies by the reciprocal, one ulp off."""
    return x / torch.full((), number, dtype=torch.float32, device=x.device)


def _amax(x: torch.Tensor, dim: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """max |x| in fp32, without an fp32 copy of x; NaN if there is one. Of nothing it is 0: a rank may have no row of a
    vocabulary."""
    if dim is None and not x.numel():
        return torch.zeros((), dtype=torch.float32, device=x.device)
    return torch.linalg.vector_norm(x, ord=math.inf, dim=dim, dtype=torch.float32)


def _agreed(amax: torch.Tensor, agree: Agree | None) -> torch.Tensor:
    if agree is None:
        return amax
    bits = amax.contiguous().view(torch.int32) & 0x7FFFFFFF
    agree(bits)
    return bits.view(torch.float32)


def _to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Limited, then rounded. fmin/fmax, not clamp: 0 * (1 / 0) becomes 448 as in vLLM's kernel, not NaN."""
    limit = torch.full((), E4M3_MAX, dtype=torch.float32, device=x.device)
    return torch.fmax(torch.fmin(x, limit), -limit).to(torch.float8_e4m3fn)


def _tensor_scales(weights: Sequence[torch.Tensor], agree: Agree | None = None) -> torch.Tensor:
    return _divide(_agreed(torch.stack([_amax(w) for w in weights]).amax().reshape(1), agree), E4M3_MAX)


def _quantize_tensor(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return _to_e4m3(rows.float() * (torch.ones_like(scale) / scale))


def _channel_scales(weights: Sequence[torch.Tensor], agree: Agree | None = None) -> torch.Tensor:
    scale = _divide(_agreed(torch.cat([_amax(w, 1) for w in weights]), agree)[:, None], E4M3_MAX)
    return torch.where(scale < CHANNEL_SCALE_MIN, CHANNEL_SCALE_MIN, scale)


def _quantize_channel(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return _to_e4m3(rows.float() / scale)


def _block_scales(weights: Sequence[torch.Tensor], agree: Agree | None = None) -> torch.Tensor:
    parts = []
    for w in weights:
        pad = (0, -w.shape[1] % BLOCK, 0, -w.shape[0] % BLOCK)
        tiles = torch.nn.functional.pad(w, pad).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        parts.append(_amax(tiles, (1, 3)))
    amax = torch.cat(parts)
    amax = torch.where(amax < BLOCK_AMAX_MIN, BLOCK_AMAX_MIN, amax)
    return amax * (1.0 / E4M3_MAX) if amax.is_cuda else amax / E4M3_MAX


def _quantize_block(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if scale.is_cuda:
        from quant_kernels import reciprocal

        inverse = reciprocal(scale)
    else:
        inverse = torch.ones_like(scale) / scale
    inverse = inverse.repeat_interleave(BLOCK, 0)[: rows.shape[0]].repeat_interleave(BLOCK, 1)[:, : rows.shape[1]]
    return _to_e4m3(rows.float() * inverse)


def _int8_scales(weights: Sequence[torch.Tensor], agree: Agree | None = None) -> torch.Tensor:
    return _divide(torch.cat([_amax(w, 1) for w in weights])[:, None], INT8_MAX)


def _quantize_int8(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`scale` is not used: its reciprocal is one rounding away from 127 / amax."""
    amax = _amax(rows, 1)[:, None]
    inverse = torch.where(amax < INT8_AMAX_MIN, 0.0, torch.full_like(amax, INT8_MAX) / amax)
    return (rows.float() * inverse).nan_to_num(0.0).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


COPY = Format("copy", 0, lambda weights, agree: weights[0].new_empty(0), lambda rows, scale: rows)
FP8_TENSOR = Format("fp8_tensor", 0, _tensor_scales, _quantize_tensor)
FP8_CHANNEL = Format("fp8_channel", 1, _channel_scales, _quantize_channel)
FP8_BLOCK = Format("fp8_block", BLOCK, _block_scales, _quantize_block)
INT8 = Format("int8", 1, _int8_scales, _quantize_int8)
BY_FLAG = {"fp8": FP8_TENSOR, "fp8-channel": FP8_CHANNEL, "fp8-block": FP8_BLOCK, "int8": INT8}  # --rollout-quant

SCALE_NAMES = ("_scale", "_scale_inv")  # the engine's name of a weight's scale is the weight's own and one of these


def read_format(
    name: str, weight: torch.Tensor, scale: torch.Tensor | None
) -> tuple[Format, torch.Tensor, torch.Tensor | None]:
    """(format, [O, I] or [O] view, scale) of an engine parameter. Raises SyncError for a layout that is not in the
    table."""
    if weight.dtype not in (torch.float8_e4m3fn, torch.int8):
        if not weight.dtype.is_floating_point:
            raise SyncError(f"{name}: dtype {weight.dtype} is not one that the sync can write")
        return COPY, weight, None
    if weight.dim() == 2 and scale is not None and scale.dtype == torch.float32 and scale.is_contiguous():
        fp8 = weight.dtype == torch.float8_e4m3fn
        transposed = weight.t()
        if transposed.is_contiguous():
            if fp8 and scale.numel() == 1:
                return FP8_TENSOR, transposed, scale
            if scale.shape == (transposed.shape[0], 1):
                return FP8_CHANNEL if fp8 else INT8, transposed, scale
        blocks = tuple(-(-n // BLOCK) for n in weight.shape)
        if fp8 and weight.is_contiguous() and tuple(scale.shape) == blocks:
            return FP8_BLOCK, weight, scale
    found = "none" if scale is None else f"{scale.dtype} {tuple(scale.shape)} with strides {scale.stride()}"
    raise SyncError(
        f"{name}: a {weight.dtype} layout that the sync does not know: shape {tuple(weight.shape)}, strides "
        f"{weight.stride()}, scale {found}; use --rollout-quant none, or a vLLM version that requirements.txt names"
    )


# ---- the reference: one engine parameter, written and checked by torch


def pieces(weight: torch.Tensor, fmt: Format) -> Iterable[tuple[int, int]]:
    """Row ranges of at most CHUNK_ELEMENTS elements, cut where a scale ends."""
    step = max(1, CHUNK_ELEMENTS // max(1, weight[0].numel() if weight.dim() > 1 else 1))
    if fmt.scale_rows > 1:
        step = max(step // fmt.scale_rows, 1) * fmt.scale_rows
    for start in range(0, weight.shape[0], step):
        yield start, min(start + step, weight.shape[0])


def write(
    fmt: Format,
    dest: torch.Tensor,
    scale: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    agree: Agree | None = None,
) -> bool:
    """Quantize `weights`, stacked along O, into an engine's `dest` and `scale`; the rows beyond them become zero.

    Returns whether all weights are finite. With `agree` (Format.scales) a collective, as are `check` and `agrees`.
    """
    scales = fmt.scales(weights, agree)
    if scale is not None:
        scale.copy_(scales.view_as(scale))
    offset = 0
    for weight in weights:
        for start, stop in pieces(weight, fmt):
            rows = slice(offset + start, offset + stop)
            dest[rows].copy_(fmt.quantize(weight[start:stop], fmt.scale_of(scales, rows.start, rows.stop)))
        offset += weight.shape[0]
    dest[offset:].zero_()
    return all(bool(_amax(w).isfinite()) for w in weights) if scale is None else bool(scales.isfinite().all())


def check(
    fmt: Format,
    dest: torch.Tensor,
    scale: torch.Tensor | None,
    weights: Mapping[str, torch.Tensor],
    agree: Agree | None = None,
) -> str | None:
    """What is wrong with `dest` and `scale` as the image of `weights` (name -> tensor); None if nothing.

    Byte for byte: a tolerance of one rounding error would let a stale layer pass at a small learning rate.
    """
    scales = fmt.scales(list(weights.values()), agree)  # before the first return: other ranks take part in it
    for name, weight in weights.items():
        if not _amax(weight).isfinite():
            return f"the policy's {name} is not finite"
    if scale is not None:
        held = scale.view_as(scales)
        if not torch.equal(held, scales):
            at = int((held != scales).flatten().nonzero()[0])
            entry = f" (entry {at})" if scales.numel() > 1 else ""
            return (
                f"the engine's scale is {held.flatten()[at].item():.9g}, the policy's weights ask for "
                f"{scales.flatten()[at].item():.9g}{entry}"
            )
    wrong: dict[str, int] = {}
    offset = 0
    for name, weight in weights.items():
        for start, stop in pieces(weight, fmt):
            rows = slice(offset + start, offset + stop)
            values = fmt.quantize(weight[start:stop], fmt.scale_of(scales, rows.start, rows.stop))
            wrong[name] = wrong.get(name, 0) + int((_bits(dest[rows]) != _bits(values)).sum())
        offset += weight.shape[0]
    found = ", ".join(f"{n} elements from the policy's {name}" for name, n in wrong.items() if n)
    if found:
        return f"differs in {found}"
    return "padded rows are not zero" if dest[offset:].view(torch.uint8).any() else None


def agrees(
    fmt: Format,
    dest: torch.Tensor,
    scale: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    turn: int,
    every: int,
    agree: Agree | None = None,
) -> bool:
    """The cheap half of the proof: one row of the weights in `every` (of blocks one row of blocks), another one each
    `turn`, with its scale. A scale for a whole matrix is taken as the engine holds it: whether it is the policy's is
    what `check` knows."""
    unit = max(fmt.scale_rows, 1)
    offset, same = 0, True  # no early return: with `agree` other ranks take part to the end
    for weight in weights:
        held, first = dest[offset : offset + weight.shape[0]], turn % every * unit
        spans = [slice(first, None, every)]
        if unit > 1:
            spans = [slice(at, at + unit) for at in range(first, weight.shape[0], every * unit)]
        for span in spans:
            rows = weight[span]
            if rows.shape[0] and fmt.scale_rows:
                entries = scale[offset // unit : -(-(offset + weight.shape[0]) // unit)]
                entries = entries[span] if unit == 1 else entries[span.start // unit : span.start // unit + 1]
                wanted = fmt.scales([rows], agree)
                same = same and torch.equal(entries, wanted)
                rows = fmt.quantize(rows, wanted)
            elif rows.shape[0] and scale is not None:
                rows = fmt.quantize(rows, scale)
            same = same and torch.equal(_bits(held[span]), _bits(rows))
        offset += weight.shape[0]
    return same


def _bits(x: torch.Tensor) -> torch.Tensor:
    """As integers: NaN equals itself, and -0 is not 0."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])
