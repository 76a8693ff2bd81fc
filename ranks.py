"""One process per GPU: which of them this one is, and what they do together.

`accelerate launch train.py ...` or `torchrun --nproc-per-node N train.py ...` starts N ranks of one node with the same
arguments. The policy is sharded over all of them (FSDP2). The engines form `world // tp` groups: with `--tp 1` each
rank samples for itself, with more the ranks of a group hold one engine together and sample the same. What a step
decides on (groups, advantages, token counts, alarms) is gathered first and computed alike by every rank.

A process that is started by itself is a world of one, and none of this communicates.
"""

import contextlib
import os
import select
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)  # ranks wait for the slowest one's rollouts
GRACE = 5.0  # seconds in which the death of another rank explains an error of this one
BROKEN = ("by peer", "remote process", "Broken pipe")  # words of gloo and NCCL when another rank has gone
CLAIM = "said"
SHOWN = 100  # characters of a value that the ranks do not agree on


class RanksError(RuntimeError):
    """The processes cannot work together; the message names the flag or the launcher's option."""


class Ranks:
    """This process among the run's. Use `Ranks.start()`; `Ranks()` is a world of one.

    Attributes:
        rank, world: of the run.
        tp: ranks that share one engine; they are neighbours.
    """

    def __init__(self, rank: int = 0, world: int = 1, tp: int = 1):
        self.rank, self.world, self.tp = rank, world, tp
        self._cpu: dist.ProcessGroup | None = None  # for numbers and objects; tensors of a GPU go by NCCL
        self._watch: _Watch | None = None

    @classmethod
    def start(cls, tp: int = 1) -> "Ranks":
        """Join the ranks that the launcher's variables tell of, on this rank's GPU where there are any.

        Raises RanksError for a launch that is not one node's, wants DeepSpeed, or does not fit --tp and the GPUs.
        """
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        check_launch(world, tp)
        ranks = cls(rank, world, tp)
        if world == 1:
            return ranks
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
        ranks._cpu = dist.new_group(backend="gloo", timeout=TIMEOUT)
        if rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (one voice; errors go to stderr)
        ranks._watch = _Watch(ranks)
        return ranks

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> int:
        """Which engine this rank is a part of, of `groups`."""
        return self.rank // self.tp

    @property
    def groups(self) -> int:
        return self.world // self.tp

    @property
    def speaks(self) -> bool:
        """True on the rank whose samples stand for its engine."""
        return self.rank % self.tp == 0

    @property
    def store(self) -> Any:
        """The tensors' process group, of all ranks."""
        return dist.group.WORLD

    # -- together ------------------------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """Everyone's value, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._cpu)
        return values

    def from_first(self, value: T) -> T:
        """The first rank's value."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._cpu)
        return values[0]

    def any(self, flag: bool) -> bool:
        if self.world == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._cpu)
        return bool(flags)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self._cpu)

    def merge(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums, counts and maxima (names that end in _max) of all ranks' tensors, as `loss.merge_sums` adds them up;
        every rank has the same names. They come back on the host."""
        if self.world == 1:
            return sums
        merged: dict[str, torch.Tensor] = {}
        for name in sorted(sums):
            value = sums[name].detach().to("cpu", copy=True).contiguous()
            kind = dist.ReduceOp.MAX if name.endswith("_max") else dist.ReduceOp.SUM
            dist.all_reduce(value, op=kind, group=self._cpu)
            merged[name] = value
        return merged

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's items of a list that all ranks hold, every `world`-th."""
        return list(items[self.rank :: self.world])

    def agree(self, what: str, values: dict[str, Any]) -> None:
        """RanksError unless all ranks have the same values; names the first that differs. `what` says whose they
        are: "arguments"."""
        everyone = self.gather(values)
        for name in dict.fromkeys(name for other in everyone for name in other):
            first = everyone[0].get(name)
            for rank, other in enumerate(everyone):
                if other.get(name) != first:
                    raise RanksError(
                        f"the ranks have different {what}: {name} is {_short(first)} on rank 0 and "
                        f"{_short(other.get(name))} on rank {rank}; start every rank with the same command on the same "
                        "files"
                    )

    # -- the end -------------------------------------------------------------------------------------------------

    def watch(self, advice: Callable[[], str]) -> None:
        """From now on the death of a rank ends this one, and the first that is left says so with `advice()`: where the
        run stands and how it goes on. NCCL would wait for a dead rank for minutes."""
        if self._watch is not None:
            self._watch.start(advice)

    def failed(self, message: str) -> None:
        """Say on stderr why this rank cannot go on, unless another rank's end is the reason or says the same."""
        if self._watch is None:
            print(message, file=sys.stderr, flush=True)
            return
        self._watch.failed(message)

    def finish(self) -> None:
        """All ranks have done their work: nobody's end is an accident any more."""
        if self._watch is not None:
            self.barrier()
            self._watch.stop()
            self.barrier()  # nobody goes before the others have stopped watching
            if self.first:
                self._watch.clear()


def check_launch(world: int, tp: int) -> None:
    """RanksError for a launcher's setting that cannot work here."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        raise RanksError(
            "the accelerate config asks for DeepSpeed, which is not supported: the policy is sharded by FSDP2; use "
            "`accelerate launch --multi_gpu` or a config without deepspeed_config"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if local != world:
        raise RanksError(f"{world} processes on several nodes, {local} of them here: one node is supported")
    if torch.cuda.is_available() and local > torch.cuda.device_count():
        raise RanksError(
            f"{world} processes were started and torch sees {torch.cuda.device_count()} GPU(s): one process per GPU; "
            "start fewer (--nproc-per-node, --num_processes) or look at CUDA_VISIBLE_DEVICES"
        )
    if world % tp:
        raise RanksError(
            f"--tp {tp} does not divide the {world} process(es) that were started; one engine takes {tp} of them"
            + (": start this with `accelerate launch` or `torchrun`" if world == 1 else "")
        )


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


class _Watch:
    """Notices the end of another rank's process, also while this one waits inside a collective."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        pids = ranks.gather(os.getpid())
        folder = ranks.from_first(tempfile.mkdtemp(prefix="rollout8-ranks-") if ranks.first else "")
        self._said = Path(folder)  # holds a file once a rank has said why the run ends, so that no other one does
        self._fds = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids) if rank != ranks.rank}
        self._advice: Callable[[], str] | None = None
        self._stopped = threading.Event()
        self._ending = threading.Lock()

    def start(self, advice: Callable[[], str]) -> None:
        self._advice = advice
        threading.Thread(target=self._run, name="ranks", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def clear(self) -> None:
        shutil.rmtree(self._said, ignore_errors=True)

    def _dead(self, seconds: float) -> list[int]:
        """Ranks whose process has ended, waiting for the first so long."""
        poll = select.poll()
        for fd in self._fds:
            poll.register(fd, select.POLLIN)
        return sorted(self._fds[fd] for fd, _ in poll.poll(seconds * 1000))

    def _run(self) -> None:
        while not self._stopped.is_set():
            dead = self._dead(0.5)
            if dead and not self._stopped.is_set():
                self._end(dead)

    def _end(self, dead: list[int]) -> NoReturn:
        try:
            advice = "" if self._advice is None else self._advice()
        except Exception as error:  # whatever it is, this rank must end
            advice = f"What to do now cannot be said: {type(error).__name__}: {error}"
        self._say(
            f"\nerror: rank {dead[0]} of {self._ranks.world} has ended; the run cannot go on without it. {advice}"
        )

    def failed(self, message: str) -> NoReturn:
        with contextlib.suppress(OSError):  # nobody reads them any more; this rank must end
            sys.stdout.flush()
            sys.stderr.flush()
        # The first rank speaks for all that fail alike. It waits only where another's end is the likely reason: a
        # process that dies with much memory loses its connections long before it is gone.
        broken = any(words in message for words in BROKEN)
        deadline = time.monotonic() + (GRACE if self._ranks.rank or broken else 0.0)
        while time.monotonic() < deadline and not self._dead(0.1) and not self._any_said():
            pass
        if dead := self._dead(0.0):
            self._end(dead)
        self._say(message)

    def _say(self, message: str) -> NoReturn:
        """The run's last words, from whichever rank and thread is the first to have some; this process ends."""
        with self._ending:  # the other thread would end the process between the claim and the words
            try:
                if self._claim():
                    os.write(2, f"{message}\n".encode(errors="backslashreplace"))
            finally:
                os._exit(1)

    def _any_said(self) -> bool:
        return (self._said / CLAIM).exists()

    def _claim(self) -> bool:
        """True for one rank alone."""
        try:
            self._said.mkdir(exist_ok=True)  # temporary folders may have been swept
            (self._said / CLAIM).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # a full disk: better said twice than never
            return True
        return True
