"""A run's state on disk: all that decides what it does next, in safetensors and JSON; nothing is pickled.

    step-000020/
        config.json, model.safetensors, tokenizer.json, ...  the policy in HF layout: transformers and vLLM open it
        training/optimizer.safetensors                        fp32 master weights and AdamW's moments, by parameter
        training/random.safetensors                           torch's generators
        training/state.json                                   counters, cursors and sizes of all files; written last

Of several ranks each writes its rows of the optimizer and its own generators (optimizer-00001-of-00004.safetensors,
random-00001-of-00004.safetensors), the first one all else. Any number of ranks reads that, each the rows it has.

Weights and optimizer are read from where they live while the run goes on to sample; it waits before it changes them
(`Snapshot.wait`). What is on the GPU is copied to the host first, what is in host memory already is written from there.
"""

import json
import os
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ranks import Ranks

TRAINING = "training"
RESEED = 8_191  # begins the seeds of a run that other ranks go on with
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16}  # of a sharded optimizer, as safetensors names them


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or does not belong to this run; the message names the file and what to do."""


@dataclass
class LoopState:
    """What the loop carries from one step to the next, beside weights and optimizer. All of it fits JSON."""

    step: int = 0
    """Steps done."""
    expected_share: float = 1.0
    """Share of mixed groups that the next step draws for."""
    accuracy: float | None = None
    """The last evaluation's."""
    best_accuracy: float | None = None
    best_step: int | None = None
    stream: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, int] = field(default_factory=dict)
    alarms: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, int] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)


def random_states(ranks: Ranks | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """States of the generators of Python and NumPy (for JSON) and of torch, on the host and on each GPU; of several
    ranks each has those of its own GPU."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    plain = {"python": [version, list(numbers), gauss], "numpy": [name, keys.tolist(), *rest]}
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        if ranks is not None and ranks.world > 1:
            tensors["cuda"] = torch.cuda.get_rng_state()
        else:
            tensors |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return plain, tensors


def set_random_states(plain: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """As `random_states` gave them; GPUs that are not there any more are left out."""
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda:{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda:{i}"], i)
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def reseed(step: int, group: int) -> None:
    """All generators anew, from the steps done and the number of the engine: its ranks draw the same."""
    seeds = [int(n) for n in np.random.SeedSequence((RESEED, step, group)).generate_state(3)]
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.manual_seed(seeds[2])


def shard_names(rank: int, world: int) -> tuple[str, str]:
    """A rank's own files in a checkpoint, in the order of writing: optimizer, generators."""
    which = "" if world == 1 else f"-{rank:05d}-of-{world:05d}"
    return f"{TRAINING}/optimizer{which}.safetensors", f"{TRAINING}/random{which}.safetensors"


class Snapshot:
    """A checkpoint to be written: `write(folder)`, in any thread. Of several ranks each has one, of the same moment.

    Args:
        model_state: tensors of the policy, live, by HF name; a tied head may be listed twice. Of several ranks the
            first has them all, as copies on the host, and the others nothing.
        optimizer_state: tensors of the optimizer, live; this rank's rows of them.
        write_model: writes the HF layout from copies of `model_state` into a folder.
        loop: of the moment; with it go the generators' states of now.
        spans: name -> (first row, rows of the whole) of the tensors in `optimizer_state` that are sharded.
    """

    def __init__(
        self,
        model_state: Mapping[str, torch.Tensor],
        optimizer_state: Mapping[str, torch.Tensor],
        write_model: Callable[[Path, dict[str, torch.Tensor]], None],
        loop: LoopState,
        random_tensors: Mapping[str, torch.Tensor],
        offloaded: bool = False,
        spans: Mapping[str, tuple[int, int]] | None = None,
        ranks: Ranks | None = None,
    ):
        ranks = ranks or Ranks()
        self._rank, self._world, self._tp = ranks.rank, ranks.world, ranks.tp
        self._model_state, self._optimizer_state, self._spans = model_state, optimizer_state, dict(spans or {})
        self._write_model, self._offloaded = write_model, offloaded
        self._loop, self._random = asdict(loop), dict(random_tensors)
        self._released = threading.Event()
        devices = (t.device for t in (*model_state.values(), *optimizer_state.values()) if t.is_cuda)
        self._device = next(devices, None)
        self._ready = torch.cuda.Event() if self._device else None
        if self._ready is not None:
            self._ready.record()

    def wait(self) -> None:
        """Until weights and optimizer state may change."""
        self._released.wait()

    def write(self, folder: Path) -> None:
        """All of it; of several ranks this one's part, to which the first adds `write_state` once every part is there.

        Raises OSError or SafetensorError; `wait` returns in any case.
        """
        try:
            (folder / TRAINING).mkdir(exist_ok=True)
            if self._ready is not None:
                stream = torch.cuda.Stream(self._device)
                stream.wait_event(self._ready)
                with torch.cuda.device(self._device), torch.cuda.stream(stream):
                    model, optimizer = self._copies()
            else:
                model, optimizer = self._copies()
            if self._offloaded:  # there may be no room for a copy
                self._save_optimizer(folder, optimizer)
        finally:
            self._released.set()
        if self._rank == 0:
            self._write_model(folder, model)
        if not self._offloaded:
            self._save_optimizer(folder, optimizer)
        if self._world > 1:
            own = {"plain": json.dumps(self._loop["random"])}
            _save_whole(self._random, folder / shard_names(self._rank, self._world)[1], own)
        else:
            save_file(self._random, folder / TRAINING / "random.safetensors")
            self.write_state(folder)

    def write_state(self, folder: Path) -> None:
        """state.json, which makes a checkpoint of the files in the folder."""
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        content: dict[str, Any] = {"loop": self._loop, "files": sizes}
        if self._world > 1:
            content["ranks"] = {"world": self._world, "tp": self._tp}
        text = json.dumps(content, indent=1)
        (folder / TRAINING / "state.json").write_text(text + "\n", encoding="utf-8")

    def _save_optimizer(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        path = folder / shard_names(self._rank, self._world)[0]
        if self._world > 1:
            _save_whole(tensors, path, {"spans": json.dumps(self._spans)})
        else:
            save_file(tensors, path)

    def _copies(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        copies: dict[tuple[int, torch.Size], torch.Tensor] = {}  # a tied head stays one tensor
        model = {}
        for name, tensor in self._model_state.items():
            key = (tensor.data_ptr(), tensor.shape)
            if key not in copies:
                copies[key] = tensor if self._world > 1 else tensor.detach().to("cpu", copy=True)
            model[name] = copies[key]
        optimizer = {
            name: tensor.detach() if self._offloaded else tensor.detach().to("cpu", copy=True)
            for name, tensor in self._optimizer_state.items()
        }
        return model, optimizer


def _save_whole(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A file that bears its name only once it is whole and on the disk: another process waits for that."""
    aside = path.with_name(path.name + ".part")
    save_file(tensors, aside, metadata)
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole; `world` ranks wrote it, `tp` of them to an engine."""

    folder: Path
    loop: LoopState
    world: int = 1
    tp: int = 1

    def load_optimizer(
        self, tensors: Mapping[str, torch.Tensor], spans: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        """Fill the optimizer's live tensors, however many ranks wrote them; `spans` as of Snapshot, empty where the
        tensors are whole. Raises CheckpointError where names, shapes or types are others."""
        spans, done = spans or {}, dict.fromkeys(tensors, 0)
        for rank in range(self.world):
            name, _ = shard_names(rank, self.world)
            path = self.folder / name
            try:
                with safe_open(path, framework="pt") as file:
                    names = set(file.keys())
                    if names != set(tensors):
                        odd = sorted(names ^ set(tensors))
                        raise CheckpointError(
                            f"{path} is of another model or another --optimizer-states: {len(odd)} tensors are in one "
                            f"of the two alone, the first is {odd[0]}"
                        )
                    saved = json.loads((file.metadata() or {}).get("spans", "{}"))
                    for key, there in tensors.items():
                        done[key] = _fill(path, file, key, there, saved.get(key), spans.get(key), done[key])
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(torn(self.folder, f"{name}: {error}")) from error
        for key, rows in done.items():
            if rows < (len(tensors[key]) if tensors[key].dim() else 1):
                raise CheckpointError(torn(self.folder, f"no file of training/ has all rows of {key}"))

    def restore_random(self, ranks: Ranks | None = None) -> bool:
        """The generators' states, as they were when the next step began. False if other ranks or engines had them than
        go on now: these are seeded anew."""
        ranks = ranks or Ranks()
        if (self.world, self.tp) != (ranks.world, ranks.tp):
            reseed(self.loop.step, ranks.group)
            return False
        _, name = shard_names(ranks.rank, ranks.world)
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dict)
                plain = self.loop.random if self.world == 1 else json.loads((file.metadata() or {})["plain"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(torn(self.folder, f"{name}: {error}")) from error
        set_random_states(plain, tensors)
        return True


def _fill(
    path: Path, file: Any, key: str, there: torch.Tensor, saved: list[int] | None, here: tuple[int, int] | None,
    done: int,
) -> int:  # fmt: skip
    """Copy the rows that a file has of tensor `key` into `there`, of which the first `done` are filled already; how
    many are filled now. `saved`, `here`: (first row, rows of the whole) in the file and in `there`, None: all rows."""
    if saved is None and here is None:
        tensor = file.get_tensor(key)
        _check_same(path, key, (tuple(tensor.shape), tensor.dtype), (tuple(there.shape), there.dtype))
        there.copy_(tensor)
        return len(tensor) if tensor.dim() else 1
    piece = file.get_slice(key)
    rows, *width = piece.get_shape()
    first, total = saved or (0, rows)
    begin, whole = here or (0, len(there))
    kind = TYPES.get(piece.get_dtype(), piece.get_dtype())
    _check_same(path, key, ((total, *width), kind), ((whole, *there.shape[1:]), there.dtype))
    start, stop = begin + done, min(first + rows, begin + len(there))
    if start < first or start >= stop:
        return done
    there[done : stop - begin].copy_(piece[start - first : stop - first])
    return stop - begin


def _check_same(path: Path, key: str, saved: tuple[tuple[int, ...], Any], here: tuple[tuple[int, ...], Any]) -> None:
    if saved != here:
        raise CheckpointError(
            f"{path} is of another model: {key} is {saved[0]} {saved[1]} there, {here[0]} {here[1]} here"
        )


def read_checkpoint(folder: Path) -> Checkpoint:
    """CheckpointError if a file is missing or has another size than it was written with."""
    path = folder / TRAINING / "state.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        loop, sizes = LoopState(**content["loop"]), dict(content["files"])
        ranks = {"world": 1, "tp": 1} | content.get("ranks", {})
        world, tp = int(ranks["world"]), int(ranks["tp"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(torn(folder, f"training/state.json: {type(error).__name__}: {error}")) from error
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            was = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(torn(folder, f"{name} {was}, {size} were written"))
    return Checkpoint(folder, loop, world, tp)


def torn(folder: Path, what: str) -> str:
    return f"the checkpoint {folder} is damaged: {what}. Move it away to go on from the one before it"
