"""The policy's weights into the engine's quantized tensors, in place, and the proof that they arrived.

Axes: O/I output/input features of a weight. HF holds a linear weight as [O, I]; vLLM fuses q,k,v and gate,up along O.

Mechanism. `SyncPlan.build` looks at both models once and writes down, for every engine parameter, which policy tensors
it is made of and how it is written. `sync()` runs that list: no loader, no new engine tensors, so every address that a
CUDA graph captured stays valid. `verify()` reads the engine's tensors back and compares them with the policy.

Layouts, as vLLM creates them (read from 0.26 and 0.32, found here by looking at the tensors, never by class names):

    copy         bf16 as in HF; vocabulary rows padded to a multiple of 64, the padding is zero
    fp8_tensor   weight float8_e4m3fn [I, O] with stride (1, I): its transpose is HF's row-major [O, I];
                 weight_scale float32 (1,): one scale for the whole fused matrix, real value = fp8 * scale

Numerics of fp8_tensor, the same operations in the same order as vLLM's kernel, so that the result is bit-identical to
its own load of the same weights: scale = amax / 448 in fp32 (true division); q = x * (1 / scale) in fp32, limited to
+-448, rounded to nearest even. An all-zero matrix has scale 0 and bytes of 448, as in vLLM: its real value is 0.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

E4M3_MAX = 448.0
CHUNK_ELEMENTS = 1 << 24  # rows are handled in pieces of this many elements: 64 MiB of fp32 scratch
VERIFY_EVERY = 8  # verify() looks at one parameter in this many, another one each time


FAMILIES = "The families that are mapped are Qwen2, Qwen3 and Llama"


class SyncError(RuntimeError):
    """The plan cannot be built, or the engine does not hold the policy's weights."""


@dataclass(frozen=True)
class Source:
    """One policy tensor. `read` returns it, [O, I] or [O], when the sync wants it: today it is resident, later it may
    be streamed from the host, merged with a LoRA update, or gathered from shards."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One engine parameter: where its bytes lie and what they are made of."""

    name: str
    format: "Format"
    dest: torch.Tensor  # [O, I] or [O] view of the engine's own memory, rows in the order of `sources`
    scale: torch.Tensor | None  # fp32, the engine's own memory
    sources: tuple[Source, ...]  # stacked along O

    def parts(self) -> Iterable[tuple[Source, torch.Tensor]]:
        """Each source with the slice of `dest` that it fills."""
        start = 0
        for source in self.sources:
            yield source, self.dest[start : start + source.shape[0]]
            start += source.shape[0]

    @property
    def padding(self) -> torch.Tensor:
        """The rows of `dest` that no source fills (a padded vocabulary)."""
        return self.dest[sum(s.shape[0] for s in self.sources) :]


@dataclass(frozen=True)
class Format:
    """How a row is written, and how what was written is compared with the policy (None, or what is wrong)."""

    name: str
    write: Callable[[Row, torch.Tensor], None]  # (row, fp32 scratch)
    check: Callable[[Row, torch.Tensor], str | None]


def _chunks(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Equal row ranges of tensors with equal shapes, each of at most CHUNK_ELEMENTS elements."""
    first = tensors[0]
    rows = max(1, CHUNK_ELEMENTS // max(1, first[0].numel() if first.dim() else 1))
    for start in range(0, first.shape[0], rows):
        yield tuple(t[start : start + rows] for t in tensors)


def _write_copy(row: Row, scratch: torch.Tensor) -> None:
    for source, dest in row.parts():
        dest.copy_(source.read())
    row.padding.zero_()


def _check_copy(row: Row, scratch: torch.Tensor) -> str | None:
    for source, dest in row.parts():
        weight = source.read()
        if not torch.linalg.vector_norm(weight, ord=math.inf, dtype=torch.float32).isfinite():
            return f"the policy's {source.name} is not finite"
        wrong = int(sum((a != b).sum() for a, b in _chunks(dest, weight)))
        if wrong:
            return f"{wrong} of {dest.numel()} elements differ from the policy's {source.name}"
    if row.padding.any():
        return "padded rows are not zero"
    return None


def _fp8_tensor_scale(row: Row) -> torch.Tensor:
    """amax / 448 over all sources of a fused matrix: fp32, 0-d."""
    amax = [torch.linalg.vector_norm(s.read(), ord=math.inf, dtype=torch.float32) for s in row.sources]
    amax = torch.stack(amax).amax()
    return amax / torch.full_like(amax, E4M3_MAX)  # on a GPU, dividing by a Python number multiplies by its reciprocal


def _fp8_chunks(
    row: Row, scale: torch.Tensor, scratch: torch.Tensor
) -> Iterable[tuple[Source, torch.Tensor, torch.Tensor]]:
    """(source, slice of the engine's weight, fp32 values in +-448 to be rounded into it), by chunk."""
    inverse = torch.ones_like(scale) / scale
    limit = torch.full_like(scale, E4M3_MAX)
    for source, dest_O_I in row.parts():
        for weight, dest in _chunks(source.read(), dest_O_I):
            work = scratch[: weight.numel()].view_as(weight)
            work.copy_(weight)
            work.mul_(inverse)
            # fmin/fmax, not clamp: 0 * (1/0) must become 448, as in vLLM's kernel, not NaN.
            torch.fmin(work, limit, out=work)
            torch.fmax(work, -limit, out=work)
            yield source, dest, work


def _write_fp8_tensor(row: Row, scratch: torch.Tensor) -> None:
    assert row.scale is not None
    scale = _fp8_tensor_scale(row)
    row.scale.copy_(scale)
    for _, dest, values in _fp8_chunks(row, scale, scratch):
        dest.copy_(values)


def _check_fp8_tensor(row: Row, scratch: torch.Tensor) -> str | None:
    """Byte for byte: a tolerance of one rounding error would let a stale layer pass at a small learning rate."""
    assert row.scale is not None
    scale = _fp8_tensor_scale(row)
    held = row.scale.reshape(())
    if not torch.isfinite(scale):
        return f"a weight of the policy is not finite ({', '.join(s.name for s in row.sources)})"
    if held != scale:
        return f"the engine's scale is {held.item():.9g}, the policy's weights ask for {scale.item():.9g}"
    wrong: dict[str, int] = {}
    for source, dest, values in _fp8_chunks(row, scale, scratch):
        different = dest.view(torch.uint8) != values.to(dest.dtype).view(torch.uint8)
        wrong[source.name] = wrong.get(source.name, 0) + int(different.sum())
    found = ", ".join(f"{n} elements from the policy's {name}" for name, n in wrong.items() if n)
    return f"differs in {found}" if found else None


COPY = Format("copy", _write_copy, _check_copy)
FP8_TENSOR = Format("fp8_tensor", _write_fp8_tensor, _check_fp8_tensor)


def _source_names(engine_name: str, packed: Mapping[str, list[str]]) -> list[str]:
    """HF names of the tensors that vLLM fused into `engine_name` (...qkv_proj.weight -> q_proj, k_proj, v_proj)."""
    path, _, leaf = engine_name.rpartition(".")
    parent, _, module = path.rpartition(".")
    return [".".join(filter(None, (parent, part, leaf))) for part in packed.get(module, [module])]


def _read_format(
    name: str, param: torch.Tensor, scales: Mapping[str, torch.Tensor]
) -> tuple[Format, torch.Tensor, torch.Tensor | None]:
    """(format, [O, I] view, scale) of an engine parameter, found from dtype, shape and strides."""
    data = param.data
    if data.dtype == torch.float8_e4m3fn:
        scale = scales.get(f"{name}_scale")
        if scale is not None and scale.numel() == 1 and data.dim() == 2 and data.t().is_contiguous():
            return FP8_TENSOR, data.t(), scale.data
        found = "none" if scale is None else f"{tuple(scale.shape)}"
        raise SyncError(
            f"{name}: a float8 layout that the sync does not know: shape {tuple(data.shape)}, strides {data.stride()}, "
            f"scale {found}; use --rollout-quant none, or a vLLM version that requirements.txt names"
        )
    if not data.dtype.is_floating_point:
        raise SyncError(f"{name}: dtype {data.dtype} is not one that the sync can write")
    return COPY, data, None


class SyncPlan:
    """Every engine parameter, its sources and its format; see the module's docstring.

    Attributes:
        rows: one per engine parameter (a weight and its scale are one row).
        bytes_read, bytes_written: traffic of one sync if every byte moved once.
    """

    def __init__(self, rows: list[Row], engine_model: torch.nn.Module):
        self.rows = rows
        self.bytes_read = sum(math.prod(s.shape) * s.dtype.itemsize for r in rows for s in r.sources)
        self.bytes_written = sum(r.dest.numel() * r.dest.dtype.itemsize for r in rows)
        quantized = [math.prod(s.shape) for r in rows if r.format is not COPY for s in r.sources]
        size = min(max(quantized, default=0), CHUNK_ELEMENTS)
        widest = max((r.dest.shape[1] for r in rows if r.format is not COPY), default=0)  # a chunk is at least one row
        self._scratch = torch.empty(max(size, widest), dtype=torch.float32, device=rows[0].dest.device)
        self._slots = []  # (owner's parameter dict, leaf, parameter, address): what CUDA graphs hold on to
        for name, param in engine_model.named_parameters():
            path, _, leaf = name.rpartition(".")
            owner = engine_model.get_submodule(path)._parameters
            self._slots.append((name, owner, leaf, param, param.data_ptr()))

    @classmethod
    def build(cls, policy: Mapping[str, torch.Tensor], engine_model: torch.nn.Module) -> "SyncPlan":
        """Plan the sync of `policy` (an HF state dict whose tensors stay in place) into vLLM's `engine_model`.

        Raises SyncError, naming the parameter, if an engine parameter has no source, if a policy tensor goes nowhere,
        or if shapes or dtypes do not fit.
        """
        packed = getattr(engine_model, "packed_modules_mapping", {})
        engine = dict(engine_model.named_parameters())  # tied parameters are listed once
        quantized = {n for n, p in engine.items() if p.dtype == torch.float8_e4m3fn}
        scales = {n: p for n, p in engine.items() if n.removesuffix("_scale") in quantized - {n}}
        rows, uncovered, consumed = [], [], set()
        for name, param in engine.items():
            if name in scales:
                continue  # written together with its weight
            names = _source_names(name, packed)
            missing = [n for n in names if n not in policy]
            if missing:
                uncovered.append(f"{name} (no {', '.join(missing)} in the policy)")
                continue
            fmt, dest, scale = _read_format(name, param, scales)
            tensors = [policy[n].detach() for n in names]
            sources = tuple(
                Source(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in zip(names, tensors, strict=True)
            )
            row = Row(name, fmt, dest, scale, sources)
            _check_shapes(row, engine_model.get_submodule(name.rpartition(".")[0]))
            rows.append(row)
            consumed.update(t.data_ptr() for t in tensors)
        if uncovered:
            raise SyncError(
                f"{len(uncovered)} engine parameter(s) have no source in the policy: {_first(uncovered)}. {FAMILIES}"
            )
        unused = [n for n, t in policy.items() if t.data_ptr() not in consumed]
        if unused:
            raise SyncError(f"{len(unused)} policy tensor(s) go nowhere in the engine: {_first(unused)}")
        return cls(rows, engine_model)

    def formats(self) -> dict[str, int]:
        """Parameters per format, for the start-up line."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.format.name] = counts.get(row.format.name, 0) + 1
        return counts

    @torch.no_grad()
    def sync(self) -> None:
        """Write the policy's weights into the engine. Raises SyncError if an engine tensor has moved since the plan
        was built (a captured CUDA graph would go on reading the old one)."""
        for name, owner, leaf, param, address in self._slots:
            if owner.get(leaf) is not param or param.data_ptr() != address:
                raise SyncError(f"{name} was replaced or moved since the plan was built; build a new engine and plan")
        for row in self.rows:
            row.format.write(row, self._scratch)

    @torch.no_grad()
    def verify(self, turn: int = 0, full: bool = False) -> int:
        """Read the engine back and compare with the policy; returns how many parameters were compared.

        One parameter in VERIFY_EVERY is looked at, another set for each `turn` (pass the step); `full` takes all.
        Raises SyncError naming each parameter that is stale, corrupt or not finite.
        """
        rows = self.rows if full else self.rows[turn % VERIFY_EVERY :: VERIFY_EVERY]
        wrong = [f"{row.name}: {what}" for row in rows if (what := row.format.check(row, self._scratch))]
        if wrong:
            raise SyncError(f"{len(wrong)} engine parameter(s) do not hold the policy's weights: {_first(wrong)}")
        return len(rows)


def _first(items: list[str], n: int = 5) -> str:
    return "; ".join(items[:n]) + (f"; and {len(items) - n} more" if len(items) > n else "")


def _check_shapes(row: Row, module: torch.nn.Module) -> None:
    """SyncError unless the sources, stacked, are exactly `dest` (or all but the padded rows of a vocabulary)."""
    parts = [s.shape[0] for s in row.sources]
    fused = getattr(module, "output_partition_sizes", None)  # vLLM's own q,k,v or gate,up
    if hasattr(module, "num_embeddings_padded"):
        fits = parts == [getattr(module, "org_vocab_size", min(parts[0], row.dest.shape[0]))]
    else:
        fits = parts == list(fused) if fused is not None and len(parts) > 1 else sum(parts) == row.dest.shape[0]
    if not fits or {s.shape[1:] for s in row.sources} != {tuple(row.dest.shape[1:])}:
        shapes = ", ".join(f"{s.name} {s.shape}" for s in row.sources)
        raise SyncError(
            f"{row.name} is {tuple(row.dest.shape)} in the engine and does not fit the policy's {shapes}. {FAMILIES}"
        )
    for s in row.sources:
        wanted = row.dest.dtype if row.format is COPY else torch.bfloat16
        if s.dtype != wanted:
            raise SyncError(
                f"{row.name} wants {wanted} and the policy's {s.name} is {s.dtype}; load the policy in bf16"
            )
