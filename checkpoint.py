"""A run's state on disk: all that decides what it does next, in safetensors and JSON; nothing is pickled.

    step-000020/
        config.json, model.safetensors, tokenizer.json, ...  the policy in HF layout: transformers and vLLM open it
        training/optimizer.safetensors                        fp32 master weights and AdamW's moments, by parameter
        training/random.safetensors                           torch's generators
        training/state.json                                   counters, cursors and sizes of all files; written last

Weights and optimizer are read from where they live while the run goes on to sample; it waits before it changes them
(`Snapshot.wait`). What is on the GPU is copied to the host first, what is in host memory already is written from there.
"""

import json
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

TRAINING = "training"


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


def random_states() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """States of the generators of Python and NumPy (for JSON) and of torch, on the host and on each GPU."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    plain = {"python": [version, list(numbers), gauss], "numpy": [name, keys.tolist(), *rest]}
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
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


class Snapshot:
    """A checkpoint to be written: `write(folder)`, in any thread.

    Args:
        model_state: tensors of the policy, live, by HF name; a tied head may be listed twice.
        optimizer_state: tensors of the optimizer, live.
        write_model: writes the HF layout from copies of `model_state` into a folder.
        loop: of the moment; with it go the generators' states of now.
    """

    def __init__(
        self,
        model_state: Mapping[str, torch.Tensor],
        optimizer_state: Mapping[str, torch.Tensor],
        write_model: Callable[[Path, dict[str, torch.Tensor]], None],
        loop: LoopState,
        random_tensors: Mapping[str, torch.Tensor],
        offloaded: bool = False,
    ):
        self._model_state, self._optimizer_state = model_state, optimizer_state
        self._write_model, self._offloaded = write_model, offloaded
        self._loop, self._random = asdict(loop), dict(random_tensors)
        self._released = threading.Event()
        cuda = any(t.is_cuda for t in model_state.values())
        self._ready = torch.cuda.Event() if cuda else None
        if self._ready is not None:
            self._ready.record()

    def wait(self) -> None:
        """Until weights and optimizer state may change."""
        self._released.wait()

    def write(self, folder: Path) -> None:
        """Raises OSError or SafetensorError; `wait` returns in any case."""
        try:
            (folder / TRAINING).mkdir()
            if self._ready is not None:
                device = next(iter(self._model_state.values())).device
                stream = torch.cuda.Stream(device)
                stream.wait_event(self._ready)
                with torch.cuda.device(device), torch.cuda.stream(stream):
                    model, optimizer = self._copies()
            else:
                model, optimizer = self._copies()
            if self._offloaded:  # there may be no room for a copy
                save_file(optimizer, folder / TRAINING / "optimizer.safetensors")
        finally:
            self._released.set()
        self._write_model(folder, model)
        if not self._offloaded:
            save_file(optimizer, folder / TRAINING / "optimizer.safetensors")
        save_file(self._random, folder / TRAINING / "random.safetensors")
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        text = json.dumps({"loop": self._loop, "files": sizes}, indent=1)
        (folder / TRAINING / "state.json").write_text(text + "\n", encoding="utf-8")

    def _copies(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        copies: dict[tuple[int, torch.Size], torch.Tensor] = {}  # a tied head stays one tensor
        model = {}
        for name, tensor in self._model_state.items():
            key = (tensor.data_ptr(), tensor.shape)
            if key not in copies:
                copies[key] = tensor.detach().to("cpu", copy=True)
            model[name] = copies[key]
        optimizer = {
            name: tensor.detach() if self._offloaded else tensor.detach().to("cpu", copy=True)
            for name, tensor in self._optimizer_state.items()
        }
        return model, optimizer


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole."""

    folder: Path
    loop: LoopState

    def load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill the optimizer's live tensors. Raises CheckpointError where names, shapes or types are others."""
        path = self.folder / TRAINING / "optimizer.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if names != set(tensors):
                    odd = sorted(names ^ set(tensors))
                    raise CheckpointError(
                        f"{path} is of another model or another --optimizer-states: {len(odd)} tensors are in one of "
                        f"the two alone, the first is {odd[0]}"
                    )
                for name, there in tensors.items():
                    saved = file.get_tensor(name)
                    if saved.shape != there.shape or saved.dtype != there.dtype:
                        raise CheckpointError(
                            f"{path} is of another model: {name} is {tuple(saved.shape)} {saved.dtype} there, "
                            f"{tuple(there.shape)} {there.dtype} here"
                        )
                    there.copy_(saved)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(torn(self.folder, f"training/optimizer.safetensors: {error}")) from error

    def restore_random(self) -> None:
        """The generators' states, as they were when the next step began."""
        tensors = {}
        try:
            with safe_open(self.folder / TRAINING / "random.safetensors", framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(torn(self.folder, f"training/random.safetensors: {error}")) from error
        set_random_states(self.loop.random, tensors)


def read_checkpoint(folder: Path) -> Checkpoint:
    """CheckpointError if a file is missing or has another size than it was written with."""
    path = folder / TRAINING / "state.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        loop, sizes = LoopState(**content["loop"]), dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(torn(folder, f"training/state.json: {type(error).__name__}: {error}")) from error
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            was = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(torn(folder, f"{name} {was}, {size} were written"))
    return Checkpoint(folder, loop)


def torn(folder: Path, what: str) -> str:
    return f"the checkpoint {folder} is damaged: {what}. Move it away to go on from the one before it"
