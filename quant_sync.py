"""The policy's weights into the engine's quantized tensors, in place, and the proof that they arrived.

Axes: O/I output/input features of a weight. HF holds a linear weight as [O, I]; vLLM fuses q,k,v and gate,up along O.

Mechanism. `SyncPlan.build` looks at both models once and writes down, for every engine parameter, which policy tensors
it is made of and how it is written. `sync()` runs that list: no loader, no new engine tensors, so every address that a
CUDA graph captured stays valid. `verify()` reads the engine's tensors back and compares them with the policy.

Formats and their arithmetic are quant_formats.py, in plain torch, which is the CPU's path too; on a GPU the same is
done by the Triton kernels of quant_kernels.py, all parameters in a few launches.

Sources. Policy tensors on the engine's device are read where they are. Others (pinned host memory, LoRA, shards) are
first laid into a staging buffer, a group of parameters at a time, on a stream of their own: while one group is
quantized, the next one arrives.

Ranks. Each rank has a plan for its own engine, or its own part of one (tensor_parallel.py). Shards are gathered by all
of them, so all build plans of the same models, call the same methods in the same order, and stage the same sources in
the same order whatever they find: what one rank finds wrong is told to the others before any raises.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

import quant_formats as formats
from quant_formats import COPY, Agree, Format, SyncError, read_format
from ranks import Ranks
from tensor_parallel import cuts_of, shared_amax
from weight_sources import PackedGather, Source, Watch, is_sharded, local, packs_of

VERIFY_EVERY = 32  # verify() compares one piece of the engine's weights in this many, other ones each time
STAGING_BYTES = 256 << 20  # of one of the two staging buffers; a parameter that is larger enlarges them

# Scales of the KV cache, where vLLM keeps them as parameters: load_format "dummy" fills them with noise, sleep level 2
# drops them, and the policy knows nothing of them. Without calibration they are 1.
CONSTANTS = ("attn._q_scale", "attn._k_scale", "attn._v_scale", "attn._prob_scale")

ALONE = Ranks()

FAMILIES = "The families that are mapped are Qwen2, Qwen3 and Llama"


@dataclass(frozen=True)
class Row:
    """One engine parameter: where its bytes lie and what they are made of."""

    name: str
    format: Format
    dest: torch.Tensor  # [O, I] or [O] view of the engine's own memory, rows in the order of `sources`
    scale: torch.Tensor | None  # fp32, the engine's own memory
    sources: tuple[Source, ...]  # their parts are stacked along O
    agree: Agree | None = None  # makes one of the amax that each rank has of its part of the weight

    @property
    def resident(self) -> bool:
        return all(s.tensor is not None and not s.cut_by_columns for s in self.sources)

    @property
    def staged_bytes(self) -> int:
        """The same on every rank, though the last one may hold less of a vocabulary."""
        whole = sum(_aligned(math.prod(s.shape) * s.dtype.itemsize) for s in self.sources if s.tensor is None)
        columns = (s for s in self.sources if s.cut_by_columns)
        return whole + sum(_aligned(math.prod(s.part_shape) * s.dtype.itemsize) for s in columns)


class _Wave:
    """Some rows with all their weights on the device at once: `stage` lays the missing ones into `buffer`, whole, and
    beside them parts that are cut by columns, since the kernels read dense rows.

    `groups[i]` says in which turn rows[i]'s scale is compared with the policy, not only its bytes with the scale.
    `gathers` must be given memory before the first `stage`.
    """

    def __init__(self, rows: Sequence[Row], groups: Sequence[int], flags: torch.Tensor, buffer: torch.Tensor | None):
        self.rows, self.groups, self._flags = rows, groups, flags
        self.weights: list[dict[str, torch.Tensor]] = []
        self._fills: list[Callable[[], object]] = []
        packed: list[tuple[torch.Tensor, torch.Tensor]] = []
        offset = 0

        def take(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            nonlocal offset
            start, size = offset, math.prod(shape) * dtype.itemsize
            offset += _aligned(size)
            return buffer[start : start + size].view(dtype).view(shape)

        for row in rows:
            found = {}
            for source in row.sources:
                whole = source.tensor
                if whole is None:
                    whole = take(source.shape, source.dtype)
                    if source.packs:
                        packed.append((source.shards, whole))
                    elif source.pieces:
                        packed += source.pieces
                        self._fills.append(partial(source.merge, whole))
                    else:
                        self._fills.append(partial(source.fill, whole))
                found[source.name] = source.part(whole)
                if source.cut_by_columns:
                    dense = take(source.part_shape, source.dtype)
                    self._fills.append(partial(dense.copy_, found[source.name]))
                    found[source.name] = dense
            self.weights.append(found)
        self.gathers = [PackedGather(pairs) for pairs in packs_of(packed)]
        self._sweep = None
        if flags.is_cuda:
            from quant_kernels import Item, Sweep

            items = [
                Item(r.format, r.dest, r.scale, tuple(w.values()), g)
                if r.dest.element_size() <= 2
                else Item(r.format, _as_int16(r.dest), None, tuple(map(_as_int16, w.values())), g, bf16=False)
                for r, w, g in zip(rows, self.weights, groups, strict=True)
            ]
            self._sweep = Sweep(items, VERIFY_EVERY, flags, next((r.agree for r in rows if r.agree), None))

    def stage(self) -> None:
        for fill in (*self.gathers, *self._fills):
            fill()

    def write(self) -> None:
        """Into the engine; on a GPU without waiting."""
        if self._sweep is not None:
            self._sweep.write()
            return
        for row, weights in zip(self.rows, self.weights, strict=True):
            self._flags[0] += not formats.write(row.format, row.dest, row.scale, list(weights.values()), row.agree)

    def check(self, turn: int, every: int) -> None:
        """Count what differs; on a GPU without waiting."""
        if self._sweep is not None:
            self._sweep.check(turn, every)
            return
        for row, weights, group in zip(self.rows, self.weights, self.groups, strict=True):
            if every == 1 or group == turn % every:
                self._flags[1] += formats.check(row.format, row.dest, row.scale, weights, row.agree) is not None
            else:
                part = (row.format, row.dest, row.scale, list(weights.values()), turn, every, row.agree)
                self._flags[1] += not formats.agrees(*part)

    def diagnose(self) -> list[str]:
        """What is wrong, by name: slow, and only for the message."""
        found = []
        for row, weights in zip(self.rows, self.weights, strict=True):
            if what := formats.check(row.format, row.dest, row.scale, weights, row.agree):
                found.append(f"{row.name}: {what}")
        return found


class SyncPlan:
    """Every engine parameter, its sources and its format; see the module's docstring.

    Attributes:
        rows: one per engine parameter (a weight and its scale are one row).
        bytes_read, bytes_written: traffic of one sync if every byte moved once.
        bytes_moved: traffic of one sync as it is done: a format with one scale for a matrix reads it twice.
        bytes_held: device memory of the plan itself: tables, and staging buffers where there are such sources.
    """

    def __init__(self, rows: list[Row], engine_model: torch.nn.Module, policy_watch: Watch, ranks: Ranks = ALONE):
        self.rows, self._ranks = rows, ranks
        device = rows[0].dest.device
        self._agreeing = any(r.agree is not None for r in rows)  # quantizing is a collective
        self.bytes_read = sum(math.prod(s.part_shape) * s.dtype.itemsize for r in rows for s in r.sources)
        self.bytes_written = sum(t.numel() * t.dtype.itemsize for r in rows for t in (r.dest, r.scale) if t is not None)
        twice = sum(math.prod(s.part_shape) * 2 for r in rows if r.format is formats.FP8_TENSOR for s in r.sources)
        self.bytes_moved = self.bytes_read + twice + self.bytes_written
        self._engine_model = engine_model
        self._engine_watch, self._policy_watch = Watch(), policy_watch  # what CUDA graphs hold on to; what is read
        self._engine_watch.add_module(engine_model)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self._flags = torch.zeros(2, dtype=torch.int32, device=device)  # (not finite, different), see Sweep
        self._build_waves(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.bytes_held = torch.cuda.memory_allocated(device) - before if device.type == "cuda" else 0

    def _build_waves(self, device: torch.device) -> None:
        groups = _balanced([sum(math.prod(s.shape) for s in r.sources) for r in self.rows], VERIFY_EVERY)
        resident = [(r, g) for r, g in zip(self.rows, groups, strict=True) if r.resident]
        staged = [(r, g) for r, g in zip(self.rows, groups, strict=True) if not r.resident]
        self._resident = _Wave([r for r, _ in resident], [g for _, g in resident], self._flags, None)
        self._staged: list[_Wave] = []
        self._stream = None
        if not staged:
            return
        size = max(STAGING_BYTES if device.type == "cuda" else 0, *(r.staged_bytes for r, _ in staged))
        total = sum(r.staged_bytes for r, _ in staged)
        buffers = [torch.empty(min(size, total), dtype=torch.uint8, device=device) for _ in range(2)]
        # A wave has rows of one group, so that a group can be proved without staging the others.
        for group, members in groupby(sorted(staged, key=lambda pair: pair[1]), key=lambda pair: pair[1]):
            for rows in _packed([r for r, _ in members], buffers[0].numel()):
                buffer = buffers[len(self._staged) % 2]
                self._staged.append(_Wave(rows, [group] * len(rows), self._flags, buffer))
        gathers = [gather for wave in self._staged for gather in wave.gathers]
        scratch = torch.empty(max((g.scratch_bytes for g in gathers), default=0), dtype=torch.uint8, device=device)
        for gather in gathers:  # one after the other, on one stream
            gather.use(scratch)
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._filled = [torch.cuda.Event(), torch.cuda.Event()]  # of the two staging buffers: may be read
            self._free = [torch.cuda.Event(), torch.cuda.Event()]  # has been read

    @classmethod
    def build(
        cls,
        policy: "torch.nn.Module | Mapping[str, torch.Tensor | Source]",
        engine_model: torch.nn.Module,
        ranks: Ranks = ALONE,
    ) -> "SyncPlan":
        """Plan the sync of `policy` into vLLM's `engine_model`.

        `policy` is the HF model, or a mapping from HF's names to tensors that stay where they are, or to Sources. Under
        FSDP2 it must be resharded, here and at every sync: after a forward pass without a backward pass the root is
        not (FSDPModule.reshard). With more than one of `ranks` this, `sync`, `verify` and `prove` are collectives of
        all of them, and where one raises SyncError all raise the same.
        Raises SyncError, naming the parameter, if an engine parameter has no source, if a policy tensor goes nowhere,
        or if shapes or dtypes do not fit. Nothing is written.
        """
        rows, watch, problem = [], Watch(), None
        try:
            rows = cls._rows(policy, engine_model, watch)
        except SyncError as error:
            problem = error
        _raise_on_all(ranks, problem)
        return cls(rows, engine_model, watch, ranks)

    @staticmethod
    def _rows(
        policy: "torch.nn.Module | Mapping[str, torch.Tensor | Source]", engine_model: torch.nn.Module, watch: Watch
    ) -> list[Row]:
        """Of every engine parameter; what is read is added to `watch`."""
        if isinstance(policy, torch.nn.Module):
            watch.add_module(policy)
            policy = dict(policy.named_parameters(remove_duplicate=False))
        packed = getattr(engine_model, "packed_modules_mapping", {})
        engine = dict(engine_model.named_parameters())  # tied parameters are listed once
        quantized = {n for n, p in engine.items() if p.dtype in (torch.float8_e4m3fn, torch.int8)}
        scales = {n + end: engine[n + end] for n in quantized for end in formats.SCALE_NAMES if n + end in engine}
        device = next(iter(engine.values())).device
        rows, uncovered, consumed = [], [], set()
        for name, param in engine.items():
            if name in scales:
                continue  # written together with its weight
            names = _source_names(name, packed)
            missing = [n for n in names if n not in policy]
            if name.endswith(CONSTANTS):
                dest = param.data.reshape(-1)
                rows.append(
                    Row(name, COPY, dest, None, (Source(name, tuple(dest.shape), dest.dtype, torch.ones_like(dest)),))
                )
                continue
            if missing:
                uncovered.append(f"{name} (no {', '.join(missing)} in the policy)")
                continue
            scale = next((scales[name + end].data for end in formats.SCALE_NAMES if name + end in scales), None)
            fmt, dest, scale = read_format(name, param.data, scale)
            module = engine_model.get_submodule(name.rpartition(".")[0])
            cuts = cuts_of(name, module, dest.dim(), len(names))
            sources = [Source.of(n, policy[n], device).with_cut(cut) for n, cut in zip(names, cuts, strict=True)]
            row = Row(name, fmt, dest, scale, tuple(sources), shared_amax(name, fmt, cuts, device))
            _check_shapes(row, module)
            rows.append(row)
            consumed.update(_identity(policy[n]) for n in names)
            for source in row.sources:
                for tensor in source.watched or filter(None.__ne__, (source.tensor,)):
                    watch.add(source.name, tensor)
        if uncovered:
            raise SyncError(
                f"{len(uncovered)} engine parameter(s) have no source in the policy: {_first(uncovered)}. {FAMILIES}"
            )
        unused = [n for n, t in policy.items() if _identity(t) not in consumed]
        if unused:
            raise SyncError(f"{len(unused)} policy tensor(s) go nowhere in the engine: {_first(unused)}")
        return rows

    def formats(self) -> dict[str, int]:
        """Parameters per format, for the start-up line."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.format.name] = counts.get(row.format.name, 0) + 1
        return counts

    def check_formats(self, quant: str, skip: Sequence[str] = ()) -> None:
        """SyncError unless the engine has the format `quant` (--rollout-quant) in every linear layer but those of
        `skip` (HF names), which are bf16: vLLM may leave out layers that it has no kernel for."""
        wrong = []
        for row in self.rows:
            names = [s.name.removesuffix(".weight") for s in row.sources]
            if row.dest.dim() != 2 or names[0].endswith(("embed_tokens", "lm_head")):
                continue
            plain = quant not in formats.BY_FLAG or set(names) <= set(skip)  # none, or simulated in bf16
            wanted = COPY.name if plain else formats.BY_FLAG[quant].name
            if row.format.name != wanted:
                wrong.append(f"{row.name} is {row.format.name}, not {wanted}")
        if wrong:
            raise SyncError(f"--rollout-quant {quant}: vLLM built {len(wrong)} layer(s) otherwise: {_first(wrong)}")

    def check_coverage(self, blocks: Sequence[tuple[int, int]]) -> int:
        """SyncError unless every byte of `blocks` (address, size: what sleep level 2 drops and nobody else restores,
        Engine.weight_blocks) belongs to a tensor that the sync writes. Returns the bytes of blocks."""
        written = [t for row in self.rows for t in (row.dest, row.scale) if t is not None]
        spans = sorted((t.data_ptr(), t.numel() * t.element_size()) for t in written)
        starts = [address for address, _ in spans]
        left = []
        for address, size in blocks:
            inside = spans[bisect_left(starts, address) : bisect_left(starts, address + size)]
            left.append(size - sum(length for _, length in inside))
        lost = [n for n in left if n > 0]
        if lost:
            raise SyncError(
                f"{sum(lost)} bytes of the engine's weights, in {len(lost)} tensor(s), are not written by the sync, "
                "and sleep level 2 would lose them; use --sleep 1 or 0"
            )
        return sum(size for _, size in blocks)

    @torch.no_grad()
    def prove(self, load: Callable[[Iterable[tuple[str, torch.Tensor]]], None]) -> int:
        """The plan against vLLM's own loader: `load` the policy's tensors into the engine through it, then compare all
        bytes with what the plan would write. Returns the parameters compared; raises SyncError naming those where
        mapping, layout or rounding is not vLLM's (which verify() alone cannot know: it reads the same plan).

        INT8 has no such loader: vLLM does not quantize to it.
        """
        sources = {s.name: s for row in self.rows for s in row.sources if not row.name.endswith(CONSTANTS)}
        load((name, source.read(self.rows[0].dest.device)) for name, source in sources.items())
        return self.verify(full=True)

    @torch.no_grad()
    def sync(self) -> None:
        """Write the policy's weights into the engine; on a GPU this launches and does not wait.

        Raises SyncError if a tensor of the engine or the policy has moved since the plan was built (a captured CUDA
        graph would go on reading the old one, the sync would go on reading old weights).
        """
        problem = None
        if name := self._engine_watch.moved():
            problem = SyncError(f"{name} was replaced or moved since the plan was built; build a new engine and plan")
        elif name := self._policy_watch.moved():
            advice = ", or reshard() a policy that FSDP2 has left whole" if self._policy_watch.sharded else ""
            problem = SyncError(
                f"the policy's {name} was replaced or moved since the plan was built; build a new plan{advice}"
            )
        _raise_on_all(self._ranks, problem)
        self._write_resident()
        for wave in self._each_staged(self._staged):
            wave.write()

    def _write_resident(self) -> None:
        """As one CUDA graph, since for a small model launching takes as long as the work; the first call launches one
        by one, for Triton to compile, and captures the graph."""
        if self._graph is not None and not torch.cuda.is_current_stream_capturing():
            self._graph.replay()
            return
        self._flags.zero_()
        self._resident.write()
        if self._agreeing:
            return  # a collective is not captured: a graph would tie NCCL's communicator to its own life
        if self._flags.is_cuda and self._graph is None and not torch.cuda.is_current_stream_capturing():
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._flags.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                self._flags.zero_()
                self._resident.write()
                graph.capture_end()
            self._graph = graph

    @torch.no_grad()
    def verify(self, turn: int = 0, full: bool = False) -> int:
        """Read the engine back and compare with the policy; returns how many parameters were looked at.

        Of every parameter one piece in VERIFY_EVERY is compared byte for byte, another one each `turn` (pass the
        step), and one scale in VERIFY_EVERY is compared with the weights it belongs to; of parameters that must be
        staged, one in VERIFY_EVERY as a whole. `full` compares everything. Raises SyncError naming each parameter that
        is stale, corrupt or not finite; what the last sync read that was not finite is always noticed.
        """
        every = 1 if full else VERIFY_EVERY
        self._flags[1:].zero_()
        self._resident.check(turn, every)
        staged = [w for w in self._staged if full or w.groups[0] == turn % every]
        for wave in self._each_staged(staged):
            wave.check(0, 1)
        if self._ranks.any(any(self._flags.tolist())):
            # On every rank, for diagnosing stages again; a rank with nothing wrong has an empty list.
            wrong = self._resident.diagnose() + [m for w in self._each_staged(self._staged) for m in w.diagnose()]
            told = _told(self._ranks, wrong)
            if not told:
                raise SyncError("the sync's kernels and their torch reference do not agree; this is a fault of theirs")
            names = {text.partition(":")[0] for text in told}  # ranks may differ in what is wrong with one
            raise SyncError(f"{len(names)} engine parameter(s) do not hold the policy's weights: {_first(told)}")
        return len(self._resident.rows) + sum(len(w.rows) for w in staged)

    def _each_staged(self, waves: Sequence[_Wave]) -> Iterator[_Wave]:
        """Each wave once its weights are on the device, the next one on its way meanwhile.

        Gathering on the side stream is safe: torch makes the stream that is current at the call wait for a collective
        (async_op=False), so what comes next there, the event too, comes after the gathered bytes; NCCL reads shards and
        writes buffers no earlier than what the stream had waited for, the optimizer's update and the event that the
        buffer has been read. All ranks call from one thread in one order, so one communicator sees the same sequence.
        """
        if self._stream is None:
            for wave in waves:
                wave.stage()
                yield wave
            return
        stream, main = self._stream, torch.cuda.current_stream()
        stream.wait_stream(main)  # what has just been written into the sources

        def start(i: int) -> None:
            with torch.cuda.stream(stream):
                if i >= 2:
                    stream.wait_event(self._free[i % 2])
                waves[i].stage()
                self._filled[i % 2].record(stream)

        for i, wave in enumerate(waves):
            if i == 0:
                start(0)
            main.wait_event(self._filled[i % 2])
            if i + 1 < len(waves) and not self._agreeing:
                start(i + 1)
            yield wave
            self._free[i % 2].record(main)
            if i + 1 < len(waves) and self._agreeing:
                # The wave's own collectives go by another communicator. Two at once could wait for each other, each
                # holding the multiprocessors that the other needs on another rank.
                stream.wait_stream(main)
                start(i + 1)


def _source_names(engine_name: str, packed: Mapping[str, list[str]]) -> list[str]:
    """HF names of the tensors that vLLM fused into `engine_name` (...qkv_proj.weight -> q_proj, k_proj, v_proj)."""
    path, _, leaf = engine_name.rpartition(".")
    parent, _, module = path.rpartition(".")
    return [".".join(filter(None, (parent, part, leaf))) for part in packed.get(module, [module])]


def _identity(value: "torch.Tensor | Source") -> int:
    """Equal for tied tensors."""
    if isinstance(value, Source):
        return id(value)
    return local(value).data_ptr() or (id(value) if is_sharded(value) else 0)  # a rank may have no row of a tensor


def _raise_on_all(ranks: Ranks, problem: SyncError | None) -> None:
    """Raise where this or another rank has a problem, the same everywhere."""
    if not ranks.any(problem is not None):
        return
    if ranks.world == 1:
        raise problem
    raise SyncError(_first(_told(ranks, [] if problem is None else [str(problem)]))) from problem


def _told(ranks: Ranks, found: list[str]) -> list[str]:
    """What all ranks have found, and which of them."""
    if ranks.world == 1:
        return found
    by_text: dict[str, list[int]] = {}
    for rank, texts in enumerate(ranks.gather(found)):
        for text in texts:
            by_text.setdefault(text, []).append(rank)
    who = {text: f"rank{'s' if len(at) > 1 else ''} {', '.join(map(str, at))}" for text, at in by_text.items()}
    return [f"{text} ({at})" for text, at in who.items()]


def _as_int16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.int16)


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


def _balanced(sizes: Sequence[int], groups: int) -> list[int]:
    """A group for each size, so that their sums are nearly equal: the largest first, each into the emptiest."""
    load, group = [0] * groups, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        group[i] = load.index(min(load))
        load[group[i]] += sizes[i] + 1
    return group


def _packed(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Consecutive rows of at most `size` staged bytes."""
    pack, used = [], 0
    for row in rows:
        if pack and used + row.staged_bytes > size:
            yield pack
            pack, used = [], 0
        pack.append(row)
        used += row.staged_bytes
    if pack:
        yield pack


def _first(items: Iterable[str], n: int = 5) -> str:
    items = list(items)
    return "; ".join(items[:n]) + (f"; and {len(items) - n} more" if len(items) > n else "")


def _check_shapes(row: Row, module: torch.nn.Module) -> None:
    """SyncError unless the sources' parts, stacked, are exactly `dest` (or all but the padded rows of a vocabulary)."""
    parts = [s.part_shape[0] for s in row.sources]
    fused = getattr(module, "output_partition_sizes", None)  # vLLM's own q,k,v or gate,up
    if hasattr(module, "num_embeddings_padded"):
        rows = row.sources[0].shape[0]
        fits = rows == getattr(module, "org_vocab_size", min(rows, row.dest.shape[0]))
        fits = fits and len(parts) == 1 and parts[0] <= row.dest.shape[0]
    else:
        fits = parts == list(fused) if fused is not None and len(parts) > 1 else sum(parts) == row.dest.shape[0]
    fits = fits and all(s.cut is None or s.shape[s.cut.dim] == s.cut.whole for s in row.sources)
    if not fits or {s.part_shape[1:] for s in row.sources} != {tuple(row.dest.shape[1:])}:
        shapes = ", ".join(f"{s.name} {s.shape}" for s in row.sources)
        size = f" as one part of {module.tp_size}" if any(s.cut for s in row.sources) else ""
        raise SyncError(
            f"{row.name} is {tuple(row.dest.shape)} in the engine{size} and does not fit the policy's {shapes}. "
            f"{FAMILIES}"
        )
    if row.format is not COPY and sum(parts) < row.dest.shape[0]:
        raise SyncError(f"{row.name} is {row.format.name} with padded rows, which the sync does not know how to fill")
    cuts = [s.cut for s in row.sources if s.cut]
    if row.format is formats.FP8_BLOCK and any((cut.stop - cut.start) % formats.BLOCK for cut in cuts):
        raise SyncError(
            f"{row.name} is {tuple(row.dest.shape)} on each of {module.tp_size} ranks, and a {formats.BLOCK} x "
            f"{formats.BLOCK} block would lie on two of them; use a smaller --tp, or --rollout-quant fp8 or fp8-channel"
        )
    if row.format is formats.FP8_BLOCK and any(n % formats.BLOCK for n in parts[:-1]):
        raise SyncError(
            f"{row.name} has parts of {parts} rows, and a {formats.BLOCK} x {formats.BLOCK} block would hold rows of "
            "two of them; use --rollout-quant fp8 or fp8-channel"
        )
    for s in row.sources:
        wanted = row.dest.dtype if row.format is COPY else torch.bfloat16
        if s.dtype != wanted:
            raise SyncError(
                f"{row.name} wants {wanted} and the policy's {s.name} is {s.dtype}; load the policy in bf16"
            )
        if s.tensor is not None and s.tensor.is_cuda and not s.tensor.is_contiguous():
            raise SyncError(f"the policy's {s.name} has strides {s.tensor.stride()}; make it contiguous")
