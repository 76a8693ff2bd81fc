"""Timing the phases of a step, stopping a run, and what it goes on from."""

import copy
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from checkpoint import Checkpoint, LoopState, random_states
from ranks import Ranks

if TYPE_CHECKING:
    from alarms import Alarms
    from data import PromptStream
    from policy import Policy
    from reward_pool import RewardPool
    from run_folder import RunFolder


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


class Stopped(Exception):
    """A signal came in a part of a step that may be given up."""


class StopRequest:
    """Ctrl-C and SIGTERM: the first asks the loop to save at the next point where it may, a second one ends at once.

    Of several ranks each may get the signal at another moment, or one of them alone; `agreed` is what all go by.
    Launchers pass on a signal that the ranks have got themselves: there the second one must be SECOND seconds later.
    """

    SECOND = 5.0

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.requested = False
        self._may_stop = False
        self._ranks = ranks or Ranks()
        self._first = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """`check` raises in here: what is done of this step may be given up, a resumed run does it again."""
        self._may_stop = True
        try:
            yield
        finally:
            self._may_stop = False

    def check(self) -> None:
        """Stopped, if a signal has come."""
        if self.requested and self._may_stop:
            raise Stopped

    def agreed(self) -> bool:
        """Whether a signal has come to any rank; all of them ask at the same point."""
        self.requested = self._ranks.any(self.requested)
        return self.requested

    def check_together(self) -> None:
        """Stopped, if a signal has come to any rank."""
        if self._may_stop and self.agreed():
            raise Stopped

    def _handle(self, signum: int, frame: Any) -> None:
        if self.requested:
            if self._ranks.world > 1 and time.monotonic() < self._first + self.SECOND:
                return
            raise KeyboardInterrupt
        self.requested, self._first = True, time.monotonic()
        if not self._ranks.first:
            return
        # os.write: print would raise if the signal came in the middle of another write to stderr.
        os.write(2, b"\nstopping: the policy is saved as soon as it is whole; once more ends at once\n")


class Progress:
    """What a run goes on from: all of its state as it was when the last finished step ended.

    A step that is not finished leaves it as it is, so a run that is stopped in the middle of one does that step again.
    """

    def __init__(
        self, run: "RunFolder", policy: "Policy", tokenizer: Any, stream: "PromptStream", rewards: "RewardPool",
        alarms: "Alarms",
    ):  # fmt: skip
        self._run, self._policy, self._tokenizer = run, policy, tokenizer
        self._stream, self._rewards, self._alarms = stream, rewards, alarms
        self._random: dict[str, torch.Tensor] = {}
        self.loop = LoopState()
        self.save_failed = False  # the last one that was asked for raised: to try it again would be no better

    def finished(self, step: int, **changes: Any) -> None:
        """Step `step` has ended; `changes` are fields of LoopState."""
        plain, self._random = random_states(self._run.ranks)
        self.loop = dataclasses.replace(
            self.loop, step=step, stream=self._stream.state_dict(), rewards=self._counts(),
            alarms=copy.deepcopy(self._alarms.state), policy=self._policy.numbers(), random=plain, **changes,
        )  # fmt: skip

    def _counts(self) -> dict[str, int]:
        """Of all engines' rewards."""
        ranks = self._run.ranks
        counts = ranks.gather(self._rewards.counts())[:: ranks.tp]
        return {name: sum(c[name] for c in counts) for name in counts[0]}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from it; the policy and its optimizer have their part already. Raises CheckpointError, DataError."""
        ranks = self._run.ranks
        self.loop = checkpoint.loop
        self._stream.load_state_dict(self.loop.stream)
        self._rewards.set_counts({name: n if ranks.first else 0 for name, n in self.loop.rewards.items()})
        self._alarms.state = copy.deepcopy(self.loop.alarms)
        if not checkpoint.restore_random(ranks):
            message = (
                f"a checkpoint of {_who(checkpoint.world, checkpoint.tp)} goes on as {_who(ranks.world, ranks.tp)}: "
                "the policy is the same, sampling goes on with new random numbers"
            )
            print(message, flush=True)
            self._run.log_event({"step": self.loop.step, "event": "other_ranks", "message": message})
        _, self._random = random_states(ranks)

    def ahead(self) -> bool:
        """True if the policy was updated since the last finished step."""
        return bool(self.loop.policy) and self._policy.numbers() != self.loop.policy

    def save(self, wait: bool = True) -> Path:
        """A checkpoint of the last finished step. Raises RunFolderError."""
        self.save_failed = True
        if self.ahead():  # a failure after an update, before its step was written down
            self.finished(self.loop.step + 1)
        snapshot = self._policy.snapshot(self._tokenizer, self.loop, self._random)
        folder = self._run.save_checkpoint(self.loop.step, snapshot, wait, self.loop.best_step)
        self.save_failed = False
        return folder


def _who(world: int, tp: int) -> str:
    return f"{world} rank{'s' if world > 1 else ''}" + (f" (--tp {tp})" if tp > 1 else "")
