"""Rewards in processes of their own, while the engine generates.

A reward may be slow, hang, crash or print; none of it may touch the trainer. Each worker is a fresh Python process that
imports rewards.py and the user's file, and nothing of torch. It is given one completion at a time; one that is not
scored within the time limit is scored 0.0 and counted, and its worker is killed and replaced. What a reward prints goes
to stderr. A worker answers in JSON, so that nothing it says can run in the trainer, and is not told any keys
(variables that end in _TOKEN or _API_KEY).

Run as a program (python reward_pool.py FD SPEC MODULES) this file is the worker.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from data import Example
from rewards import RewardError, resolve_reward, score

START_LIMIT = 60.0  # seconds that importing the user's file may take


class _Worker:
    """One process, its connection, and what it is doing."""

    def __init__(self, spec: str | None, modules: Sequence[str]):
        ours, theirs = socket.socketpair()
        command = [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno()), spec or "", ",".join(modules)]
        environment = {k: v for k, v in os.environ.items() if not k.endswith(("_TOKEN", "_API_KEY"))}
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2,
            env=environment, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self.connection = Connection(ours.detach())
        self.key: Hashable | None = None
        self.example: Example | None = None
        self.deadline = time.monotonic() + START_LIMIT
        self.ready = False

    def stop(self) -> None:
        """Kill it, and whatever it has started."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):  # it has ended, and was its group's last
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ending(self) -> str:
        """How a process that hung up came to its end."""
        try:
            return f"its process ended with status {self.process.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            return "its process closed the connection"


class RewardPool:
    """Scores completions in `workers` processes, at most `time_limit` seconds each.

    `spec` is --reward; `modules` are imported before a worker's first reward, outside its time limit
    (`rewards.required_modules`). `submit` never waits for a reward; `collect` waits for all that was submitted. Raises
    RewardError if the user's file cannot be used. Use as a context manager, or call `close`.

    Attributes:
        calls, errors, timeouts: completions scored; scored 0.0 because the reward raised or returned no number; because
            it ran too long or its process died (these are errors too).
    """

    def __init__(self, spec: str | None, workers: int, time_limit: float, modules: Sequence[str] = ()):
        resolve_reward(spec)  # a spec that cannot work is an error now, in this process
        self._spec, self._limit, self._modules = spec, time_limit, modules
        self._queue: deque[tuple[Hashable, Example, str]] = deque()
        self._done: dict[Hashable, float] = {}
        self._outstanding = 0
        self._workers = [_Worker(spec, modules) for _ in range(workers)]
        self.calls = self.errors = self.timeouts = 0

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def counts(self) -> dict[str, int]:
        """Plain numbers of the run so far, which a resumed one goes on from."""
        return {"calls": self.calls, "errors": self.errors, "timeouts": self.timeouts}

    def set_counts(self, counts: dict[str, int]) -> None:
        self.calls, self.errors, self.timeouts = counts["calls"], counts["errors"], counts["timeouts"]

    def submit(self, key: Hashable, example: Example, completion: str) -> None:
        """Score `completion` some time; `key` names the result in `collect`."""
        self._queue.append((key, example, completion))
        self._outstanding += 1
        self.calls += 1
        self._pump(0.0)

    def collect(self) -> dict[Hashable, float]:
        """key -> reward of everything submitted since the last call."""
        while len(self._done) < self._outstanding:
            self._pump(None)
        done, self._done, self._outstanding = self._done, {}, 0
        return done

    def close(self) -> None:
        """End the workers; what was not collected is lost."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def _pump(self, timeout: float | None) -> None:
        """Give work to idle workers, take results, replace workers that are late or dead; wait for the first event."""
        self._assign()
        busy = [w for w in self._workers if w.key is not None or not w.ready]
        if timeout is None:
            timeout = max(0.0, min((w.deadline for w in busy), default=time.monotonic()) - time.monotonic())
        ready = wait([w.connection for w in busy], timeout)
        for worker in [w for w in busy if w.connection in ready]:
            try:
                message = json.loads(worker.connection.recv_bytes())
            except (EOFError, OSError):
                self._replace(worker, worker.ending())
                continue
            if not worker.ready:
                worker.ready = True
                if message != "ready":
                    raise RewardError(message)
            else:
                self._finish(worker, *message)
        now = time.monotonic()
        for worker in [
            w for w in busy if w in self._workers and w.deadline < now and (w.key is not None or not w.ready)
        ]:
            self._replace(worker, f"it took longer than {self._limit:g} s")
        self._assign()

    def _assign(self) -> None:
        for worker in self._workers:
            if worker.ready and worker.key is None and self._queue:
                key, example, completion = self._queue.popleft()
                worker.key, worker.example = (key,), example
                worker.deadline = time.monotonic() + self._limit
                try:
                    worker.connection.send((example, completion))
                except OSError:
                    self._replace(worker, worker.ending())

    def _finish(self, worker: _Worker, reward: float, problem: str | None) -> None:
        (key,) = worker.key
        self._done[key] = reward
        if problem is not None:
            self.errors += 1
            if self.errors == 1:
                print(f"[reward] failed on {worker.example.id}; scored 0.0. Later errors are only counted.\n{problem}",
                      file=sys.stderr, flush=True)  # fmt: skip
        worker.key = worker.example = None

    def _replace(self, worker: _Worker, why: str) -> None:
        """A new process for one that is lost; what it was doing is scored 0.0."""
        worker.stop()
        if not worker.ready:
            raise RewardError(
                f"--reward {self._spec}: a reward process did not start within {START_LIMIT:g} s, or died"
            )
        self.timeouts += 1
        self._finish(worker, 0.0, why)
        self._workers[self._workers.index(worker)] = _Worker(self._spec, self._modules)


def _serve(descriptor: int, spec: str, modules: str) -> None:
    connection = Connection(descriptor)
    try:
        reward = resolve_reward(spec or None)
        for module in filter(None, modules.split(",")):
            importlib.import_module(module)
    except (RewardError, ImportError) as error:
        connection.send_bytes(json.dumps(str(error)).encode())
        return
    connection.send_bytes(b'"ready"')
    while True:
        try:
            example, completion = connection.recv()
        except (EOFError, ConnectionResetError):  # the trainer has ended
            return
        connection.send_bytes(json.dumps(score(reward, example, completion)).encode())


if __name__ == "__main__":
    _serve(int(sys.argv[1]), *sys.argv[2:])
