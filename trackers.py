"""Mirrors of a run: Weights & Biases, TensorBoard. The run folder has everything without them.

Each takes the metrics under the keys and at the steps of metrics.jsonl, the samples and the config. One that fails in
the middle of a run does not end it: that is said once and counted. What the environment or an address holds as a secret
is taken out of the config first (keys.without_secrets).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keys import redacted, without_secrets

SAMPLE_COLUMNS = ("step", "id", "prompt", "text", "answer", "reward", "tokens", "finish_reason")


class TrackerError(RuntimeError):
    """A tracker that was asked for is missing or does not start; the message names the flag and what to do."""


def check_trackers(wandb: bool, tensorboard: bool) -> None:
    """Raises TrackerError for a package that is missing: asked before anything large is built."""
    if wandb:
        _import_wandb()
    if tensorboard:
        _import_writer()


class Trackers:
    """The trackers of a run, which may be none. Raises TrackerError if one does not start.

    Attributes:
        failures: what each tracker could not take so far, by its name.
    """

    def __init__(self, wandb: bool, tensorboard: bool, name: str, config: dict[str, Any], folder: Path):
        config = without_secrets(config)
        self.failures: dict[str, int] = {}
        self._trackers: list[_Wandb | _TensorBoard] = []
        if wandb:
            self._trackers.append(_Wandb(name, config, folder))
        if tensorboard:
            self._trackers.append(_TensorBoard(config, folder))

    def log(self, metrics: dict[str, float]) -> None:
        """One step's metrics, `step` among them."""
        self._each(lambda tracker: tracker.log(metrics))

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        """One step's lines of samples.jsonl."""
        if samples:
            self._each(lambda tracker: tracker.log_samples(samples))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        for flag, count in self.failures.items():
            print(f"{flag} failed {count} times; the run folder has everything", file=sys.stderr, flush=True)

    def _each(self, call: Callable[[Any], None]) -> None:
        for tracker in self._trackers:
            try:
                call(tracker)
            except Exception as error:
                if tracker.flag not in self.failures:
                    what = redacted(f"{type(error).__name__}: {error}").splitlines()[0]
                    print(f"warning: {tracker.flag} failed and the run goes on: {what}", file=sys.stderr, flush=True)
                self.failures[tracker.flag] = self.failures.get(tracker.flag, 0) + 1


class _Wandb:
    flag = "--wandb"

    def __init__(self, name: str, config: dict[str, Any], folder: Path):
        self._wandb = _import_wandb()
        try:
            self._run = self._wandb.init(project="rollout8", name=name, config=config, dir=str(folder))
        except Exception as error:
            raise TrackerError(
                f"--wandb could not start: {error}. Run `wandb login`, set WANDB_MODE=offline, or leave --wandb out"
            ) from error

    def log(self, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=int(metrics["step"]))

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        rows = [[_as_text(sample.get(column)) for column in SAMPLE_COLUMNS] for sample in samples]
        table = self._wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)
        self._run.log({"samples": table}, step=int(samples[0]["step"]))

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    flag = "--tensorboard"

    def __init__(self, config: dict[str, Any], folder: Path):
        try:
            self._writer = _import_writer()(log_dir=str(folder / "tensorboard"))
            self._writer.add_text("config", _code(json.dumps(config, indent=2, default=str)), 0)
        except OSError as error:
            raise TrackerError(f"--tensorboard could not start: {error}") from error

    def log(self, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(metrics["step"]))
        self._writer.flush()

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        shown = (_code("\n".join(f"{c}: {_as_text(s.get(c))}" for c in SAMPLE_COLUMNS)) for s in samples)
        self._writer.add_text("samples", "\n\n---\n\n".join(shown), int(samples[0]["step"]))

    def close(self) -> None:
        self._writer.close()


def _as_text(value: Any) -> Any:
    """A cell of a table: numbers as they are; a chat's messages one below the other."""
    if isinstance(value, list):
        return "\n\n".join(f"{m.get('role')}: {m.get('content')}" if isinstance(m, dict) else str(m) for m in value)
    return value


def _code(text: str) -> str:
    """Text as TensorBoard's Markdown shows it unchanged."""
    return "\n".join("    " + line for line in text.split("\n"))


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise TrackerError("--wandb needs the package wandb: pip install wandb") from error
    return wandb


def _import_writer() -> Any:
    try:
        import tensorboard  # noqa: F401
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrackerError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter
