"""Timing the phases of a step, and stopping a run between them."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Seconds of each phase of a step: on a GPU between two events of its stream, so that timing waits for nothing."""

    def __init__(self) -> None:
        self._start = _Mark()
        self._phases: list[tuple[str, _Mark, _Mark]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = _Mark()
        yield
        self._phases.append((phase, begin, _Mark()))

    def metrics(self) -> dict[str, float]:
        """`time/PHASE` and `time/step`, the whole step so far; waits for the device."""
        end = _Mark()
        end.wait()
        seconds: dict[str, float] = {}
        for phase, begin, stop in self._phases:
            seconds[phase] = seconds.get(phase, 0.0) + stop.since(begin)
        return {f"time/{k}": v for k, v in seconds.items()} | {"time/step": end.since(self._start)}


class _Mark:
    """A moment in the device's stream; without a GPU in the process."""

    def __init__(self) -> None:
        self._event = None
        if torch.cuda.is_available():
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._host = time.perf_counter()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def since(self, other: "_Mark") -> float:
        """Seconds from `other` to this one; both have passed."""
        if self._event is None:
            return self._host - other._host
        return other._event.elapsed_time(self._event) / 1e3


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
