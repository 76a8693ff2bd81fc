"""Rewards in processes of their own, while the engine generates.

A reward may be slow, hang, crash or print; none of it may touch the trainer. Each worker is a fresh Python process that
imports rewards.py and the user's file, which the trainer never does, and nothing of torch. It is given one completion
at a time; one that is not scored within the time limit is scored 0.0 and counted, and its worker is killed and
replaced. What a reward prints goes to stderr. A worker answers in JSON, so that nothing it says can run in the trainer.

A worker is not told any keys (keys.py): HF_TOKEN, WANDB_API_KEY and the like are taken out of its environment, so that
neither a careless line of the user's nor a package of it sends them anywhere. A reward that needs one, such as a judge
model's, gets it by name: ROLLOUT8_REWARD_ENV=OPENAI_API_KEY,OTHER_KEY. That is no sandbox: the user's file may read
what the user may read. What a model wrote is never run.

If memory runs out, the kernel ends a worker before the trainer. The built-in rewards, math-verify's algebra among them,
have MEMORY_LIMIT; the user's own have none, since a model in them may map any amount.

Run as a program (python reward_pool.py FD SPEC MODULES) this file is the worker.
"""

import contextlib
import ctypes
import importlib
import json
import math
import os
import resource
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
from keys import redacted, without_keys
from rewards import REWARDS, RewardError, check_reward, resolve_reward, score

START_LIMIT = 60.0  # seconds that importing the user's file may take
MEMORY_LIMIT = 2 * 2**30  # bytes of address space of a worker that runs nothing of the user's
KEEP = "ROLLOUT8_REWARD_ENV"  # variable: names of keys that the rewards are told, by comma
_LONGEST_MESSAGE = 2**20  # bytes
_LONGEST_PROBLEM = 20_000  # characters of a traceback, its end
_NO_RESULT = "its process sent what is no result: does the reward write to descriptors that are not its own?"


class _Worker:
    """One process, its connection, and what it is doing."""

    def __init__(self, spec: str | None, modules: Sequence[str]):
        environment = without_keys(os.environ, _kept_keys())
        ours, theirs = socket.socketpair()
        command = [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno()), spec or "", ",".join(modules)]
        try:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2,
                env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError:
            ours.close()
            raise
        finally:
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
    (`rewards.required_modules`). `submit` never waits for a reward; `collect` waits for all that was submitted. The
    first worker is waited for, so that a file of the user's that cannot be used is a RewardError at once. Use as a
    context manager, or call `close`.

    Attributes:
        calls, errors, timeouts: completions scored; scored 0.0 because the reward raised or returned no number; because
            it ran too long or its process died (these are errors too).
    """

    def __init__(self, spec: str | None, workers: int, time_limit: float, modules: Sequence[str] = ()):
        check_reward(spec)
        self._spec, self._limit, self._modules = spec, time_limit, modules
        self._queue: deque[tuple[Hashable, Example, str]] = deque()
        self._done: dict[Hashable, float] = {}
        self._outstanding = 0
        self._workers: list[_Worker] = []
        self.calls = self.errors = self.timeouts = 0
        try:
            for _ in range(workers):
                self._workers.append(self._new_worker())
            while not any(worker.ready for worker in self._workers):
                self._pump(None)
        except BaseException:
            self.close()
            raise

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

    def poll(self) -> None:
        """Hand waiting work to workers that have become idle, without waiting: called again and again while the engine
        generates, so that a worker does not rest until the next group ends."""
        if self._outstanding > len(self._done):
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

    def _new_worker(self) -> _Worker:
        try:
            return _Worker(self._spec, self._modules)
        except OSError as error:
            raise RewardError(
                f"--reward-workers: with {len(self._workers)} of them running, another cannot be started "
                f"({error.strerror}); ask for fewer"
            ) from error

    def _pump(self, timeout: float | None) -> None:
        """Give work to idle workers, take results, replace workers that are late or dead; wait for the first event."""
        self._assign()
        busy = [w for w in self._workers if w.key is not None or not w.ready]
        if timeout is None:
            timeout = max(0.0, min((w.deadline for w in busy), default=time.monotonic()) - time.monotonic())
        ready = wait([w.connection for w in busy], timeout)
        for worker in [w for w in busy if w.connection in ready]:
            try:
                message = worker.connection.recv_bytes(_LONGEST_MESSAGE)
            except (EOFError, ConnectionError):
                self._replace(worker, worker.ending())
                continue
            except OSError:  # a length beyond the limit
                self._replace(worker, _NO_RESULT)
                continue
            if not worker.ready:
                worker.ready = True
                if message != b"ready":
                    raise RewardError(message.decode(errors="replace"))
                continue
            result = _read_result(message)
            if result is None:
                self._replace(worker, _NO_RESULT)
            else:
                self._finish(worker, *result)
        now = time.monotonic()
        for worker in [
            w for w in busy if w in self._workers and w.deadline < now and (w.key is not None or not w.ready)
        ]:
            self._replace(worker, f"it took longer than {self._limit if worker.ready else START_LIMIT:g} s")
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
                except Exception as error:  # of pickle, before a byte is sent: lists in lists too deep, odd objects
                    self._finish(worker, 0.0, f"its row cannot be sent: {type(error).__name__}: {error}")

    def _finish(self, worker: _Worker, reward: float, problem: str | None) -> None:
        (key,) = worker.key
        self._done[key] = reward
        if problem is not None:
            self.errors += 1
            if self.errors == 1:
                said = f"[reward] failed on {worker.example.id}; scored 0.0. Later errors are only counted.\n{problem}"
                print(redacted(said), file=sys.stderr, flush=True)
        worker.key = worker.example = None

    def _replace(self, worker: _Worker, why: str) -> None:
        """A new process for one that is lost; what it was doing is scored 0.0."""
        worker.stop()
        if not worker.ready:
            raise RewardError(f"--reward {self._spec or 'of the data'}: a reward process did not start: {why}")
        self.timeouts += 1
        self._finish(worker, 0.0, why)
        self._workers[self._workers.index(worker)] = self._new_worker()


def _kept_keys() -> tuple[str, ...]:
    """Names in ROLLOUT8_REWARD_ENV. Raises RewardError for one that is not set."""
    names = tuple(name.strip() for name in os.environ.get(KEEP, "").split(",") if name.strip())
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise RewardError(f"{KEEP} names {', '.join(missing)}, which is not set; set it, or leave it out")
    return names


def _read_result(message: bytes) -> tuple[float, str | None] | None:
    """(reward, problem) of a worker's message; None if it is something else."""
    try:
        reward, problem = json.loads(message)
    except (ValueError, TypeError, RecursionError):
        return None
    right = isinstance(reward, float) and math.isfinite(reward) and isinstance(problem, str | None)
    return (reward, problem) if right else None


def _serve(descriptor: int, spec: str, modules: str) -> None:
    connection = Connection(descriptor)
    _limit_itself(spec)
    with contextlib.suppress(EOFError, ConnectionError):  # the trainer has ended
        try:
            reward = resolve_reward(spec or None)
            for module in filter(None, modules.split(",")):
                importlib.import_module(module)
        except (RewardError, ImportError) as error:
            connection.send_bytes(str(error)[:_LONGEST_PROBLEM].encode(errors="replace"))
            return
        connection.send_bytes(b"ready")
        while True:
            example, completion = connection.recv()
            value, problem = score(reward, example, completion)
            connection.send_bytes(json.dumps((value, problem and problem[-_LONGEST_PROBLEM:])).encode())


def _limit_itself(spec: str) -> None:
    """End with the trainer, before it where memory runs out, and take no more than MEMORY_LIMIT of it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a reward that hangs does not outlive the trainer
    with contextlib.suppress(OSError):  # no /proc, or one that cannot be written
        Path("/proc/self/oom_score_adj").write_text("1000")
    if not spec or spec in REWARDS:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(hard, MEMORY_LIMIT)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), *sys.argv[2:])
