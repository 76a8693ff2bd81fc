"""Timing the phases of a step, and stopping a run between them."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Seconds of each phase of a step; the device is synchronized at both ends of a phase."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        _synchronize()
        start = time.perf_counter()
        yield
        _synchronize()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """`time/PHASE` and `time/step`, the whole step so far."""
        total = time.perf_counter() - self._start
        return {f"time/{k}": v for k, v in self._seconds.items()} | {"time/step": total}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class StopRequest:
    """Ctrl-C and SIGTERM: the first asks the loop to finish its phase and save, a second one ends at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # os.write: print would raise if the signal came in the middle of another write to stderr.
        os.write(2, b"\nstopping: this phase is finished and the policy saved; once more ends at once\n")
