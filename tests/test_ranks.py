"""ranks.py: processes that talk over gloo, what they agree on, and that the end of one is the end of all, said once."""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ranks import Ranks, RanksError, check_launch

ROOT = Path(__file__).resolve().parent.parent
FORK = """
import json, os, signal, sys, tempfile, time
import torch, torch.distributed as dist, ranks  # once for all: nothing runs here, so that a rank may be forked
for line in sys.stdin:
    request = json.loads(line)
    pids = []
    for environment, out in request["ranks"]:
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ |= environment
            tempfile.tempdir = None
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for fd in (1, 2):
                os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
            exec(request["script"], {"__name__": "__main__"})
            sys.exit()
    begin, codes = time.monotonic(), {}
    while len(codes) < len(pids):
        time.sleep(0.02)
        late = time.monotonic() - begin > request["timeout"]
        for pid in set(pids) - set(codes):
            if late:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if done:
                codes[pid] = "late" if late else os.waitstatus_to_exitcode(status)
    print(json.dumps([[codes[pid] for pid in pids], time.monotonic() - begin]), flush=True)
"""
START = """
import os, signal, sys, time
import torch
import torch.distributed as dist
from ranks import Ranks, RanksError
ranks = Ranks.start(int(os.environ["TP"]))
rank, world = ranks.rank, ranks.world

def say(*what):
    print("says", *what, file=sys.stderr, flush=True)
"""
RUN = """
ranks.watch(lambda: "go on with: THIS")
try:
    work()
    ranks.finish()
except Exception as error:
    ranks.failed(f"error: {type(error).__name__}: {error}")
"""
ENDED = "has ended; the run cannot go on without it. go on with: THIS"


class Ended:
    """What each rank left behind: exit codes, stderr lines without empty ones, seconds until the last one ended."""

    def __init__(self, codes, lines, seconds, left):
        self.codes, self.lines, self.seconds, self.left = codes, lines, seconds, left

    @property
    def said(self) -> list[str]:
        return [line for lines in self.lines for line in lines]


@pytest.fixture(scope="module")
def forking():
    """A process that has imported torch, which takes seconds, and forks ranks."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("PYTHONUNBUFFERED", None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", FORK], cwd=ROOT, env=environment, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def launch(forking, tmp_path):
    """launch(script, world, tp) -> Ended. Each rank runs the script as a launcher would start it."""
    (tmp_path / "tmp").mkdir()

    def launched(script: str, world: int = 2, tp: int = 1, timeout: float = 90.0) -> Ended:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "TP": tp, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": port, "TMPDIR": tmp_path / "tmp"}  # fmt: skip
        files = [tmp_path / f"rank-{rank}" for rank in range(world)]
        ranks = [
            ({k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}, str(file))
            for rank, file in enumerate(files)
        ]
        print(
            json.dumps({"script": START + script, "ranks": ranks, "timeout": timeout}), file=forking.stdin, flush=True
        )
        codes, seconds = json.loads(forking.stdout.readline())
        lines = [[line for line in file.read_text().splitlines() if line.strip()] for file in files]
        return Ended(codes, lines, seconds, list((tmp_path / "tmp").glob("rollout8-*")))

    return launched


# ---- what they do together


def test_what_is_gathered_shared_and_merged_is_the_same_on_all_ranks(launch):
    ended = launch("""
assert (ranks.groups, ranks.group, ranks.speaks, ranks.first) == (2, rank // 2, rank in (0, 2), rank == 0)
assert ranks.gather({"rank": rank}) == [{"rank": i} for i in range(4)]
assert ranks.from_first(("of", rank)) == ("of", 0)
assert ranks.any(rank == 3) is True and ranks.any(False) is False
parts = ranks.gather(ranks.share(list("abcdefghij")))
assert sorted(sum(parts, [])) == list("abcdefghij") and [len(p) for p in parts] == [3, 3, 2, 2]
assert ranks.gather(ranks.share("ab")) == [["a"], ["b"], [], []]
sums = {
    "tokens": torch.tensor(rank + 1), "ratio_max": torch.tensor([0.5, -3.0 - rank]),
    "gap_sum": torch.tensor(2.0**-30 * (rank + 1), dtype=torch.float64),
}
before = {k: v.clone() for k, v in sums.items()}
for _ in range(2):
    merged = ranks.merge(sums)
    assert merged["tokens"] == 10 and merged["tokens"].dtype == torch.int64
    assert merged["ratio_max"].tolist() == [0.5, -3.0]
    assert merged["gap_sum"] == 10 * 2.0**-30 and merged["gap_sum"].dtype == torch.float64
    assert all(torch.equal(sums[k], before[k]) for k in sums), "its own sums are as they were"
print("only the first is heard", rank, flush=True)
ranks.finish()
""", world=4, tp=2)  # fmt: skip
    assert ended.codes == [0] * 4, ended.said
    assert ended.lines == [["only the first is heard 0"], [], [], []]


def test_a_world_of_one_needs_no_launcher_and_changes_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = torch.distributed.is_initialized()  # by an engine of another test
    ranks, out = Ranks.start(), sys.stdout
    assert (ranks.rank, ranks.world, ranks.groups, ranks.first, ranks.speaks) == (0, 1, 1, True, True)
    sums = {"a_max": torch.ones(1)}
    assert ranks.merge(sums) is sums and ranks.gather(3) == [3] and ranks.share([1, 2]) == [1, 2]
    ranks.watch(lambda: "")
    ranks.finish()
    assert sys.stdout is out and torch.distributed.is_initialized() == before


def test_what_the_ranks_do_not_agree_on_is_named_with_rank_and_value(launch):
    ended = launch("""
same = {"lr": 1e-6, "cap": float("inf"), "none": None, "list": ["a"]}
ranks.agree("arguments", same)
try:
    ranks.agree("arguments", same | {"lr": 1e-6 if rank != 1 else 2e-6})
    say("agreed")
except RanksError as error:
    say(error)
try:
    ranks.agree("data", {"prompts": 7} if rank == 0 else {"prompts": 7, "held out": 3})
    say("agreed")
except RanksError as error:
    say(error)
try:
    ranks.agree("data", {"rows": [["a\\n"] * 100_000, rank]})
except RanksError as error:
    say(error)
ranks.finish()
""", world=3)  # fmt: skip
    assert ended.codes == [0, 0, 0], ended.said
    first = (
        "says the ranks have different arguments: lr is 1e-06 on rank 0 and 2e-06 on rank 1; start every rank with the "
        "same command on the same files"
    )
    second = "says the ranks have different data: held out is None on rank 0 and 3 on rank 1; "
    for lines in ended.lines:  # every rank says the same, so that none goes on alone
        assert lines[0] == first and lines[1].startswith(second)
        assert len(lines) == 3 and "rows is [['a" in lines[2] and len(lines[2]) < 500, "whatever the values are"


# ---- a launch that cannot work


@pytest.mark.parametrize(
    ("world", "tp", "environment", "words"),
    [
        (4, 3, {}, ["--tp 3", "4 process"]),
        (2, 4, {}, ["--tp 4", "2 process"]),
        (1, 2, {}, ["--tp 2", "accelerate launch", "torchrun"]),
        (16, 1, {"LOCAL_WORLD_SIZE": "8"}, ["several nodes", "16", "8", "one node"]),
        (2, 1, {"ACCELERATE_USE_DEEPSPEED": "true"}, ["DeepSpeed", "not supported", "--multi_gpu"]),
        (1, 1, {"ACCELERATE_USE_DEEPSPEED": "1"}, ["DeepSpeed", "not supported"]),
    ],
    ids=["tp does not divide", "tp above the world", "tp without a launcher", "several nodes", "deepspeed", "alone"],
)
def test_a_launch_that_cannot_work_is_refused(monkeypatch, world, tp, environment, words):
    for name in ("LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksError) as error:
        check_launch(world, tp)
    assert [w for w in words if w not in str(error.value)] == [] and len(str(error.value).splitlines()) == 1


def test_a_config_of_accelerate_without_deepspeed_is_taken(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_launch(4, 2)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("too late to refuse"))
    with pytest.raises(RanksError, match=r"3 processes .* 2 GPU\(s\): one process per GPU; .*CUDA_VISIBLE_DEVICES"):
        Ranks.start()


# ---- the end


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("waits", ["collective", "sleep"])
def test_a_rank_that_is_killed_ends_the_others_with_one_message(launch, killed, waits):
    """In a collective gloo notices it too, in words that help nobody; asleep (or in NCCL) nothing else would."""
    wait = "dist.all_reduce(torch.ones(3))" if waits == "collective" else "time.sleep(50)"
    ended = launch(f"""
def work():
    ranks.barrier()
    if rank == {killed}:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    {wait}
{RUN}""")
    assert ended.codes[killed] == -signal.SIGKILL and ended.codes[1 - killed] == 1
    assert ended.said == [f"error: rank {killed} of 2 {ENDED}"]
    assert ended.seconds < 20


def test_of_four_ranks_one_speaks_for_one_that_is_killed(launch):
    ended = launch(f"""
def work():
    ranks.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(3))
{RUN}""", world=4)  # fmt: skip
    assert ended.codes == [1, 1, -signal.SIGKILL, 1]
    assert ended.said == [f"error: rank 2 of 4 {ENDED}"]


def test_a_rank_that_loses_its_connections_before_it_is_gone_is_the_one_that_is_named(launch):
    """As a process of many GiB does; what gloo says of it in the meantime is not the message."""
    ended = launch(f"""
def work():
    ranks.barrier()
    if rank == 0:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
{RUN}""")
    assert ended.codes == [1, -signal.SIGKILL]
    assert ended.said == [f"error: rank 1 of 2 {ENDED}"]


@pytest.mark.parametrize("raises", [0, 1])
def test_a_rank_that_raises_says_why_and_the_other_is_silent(launch, raises):
    ended = launch(f"""
def work():
    ranks.barrier()
    if rank == {raises}:
        raise ValueError("its own reason")
    dist.all_reduce(torch.ones(3))
{RUN}""")
    assert ended.codes == [1, 1]
    assert ended.said == ["error: ValueError: its own reason"]
    assert ended.lines[raises] == ended.said and ended.seconds < 25


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_all_fail_alike_say_it_once(launch, world):
    ended = launch(f"""
def work():
    time.sleep(0.05 * rank)
    raise ValueError("a bad row")
{RUN}""", world)  # fmt: skip
    assert ended.codes == [1] * world
    assert ended.said == ["error: ValueError: a bad row"]


def test_ranks_that_fail_alike_while_the_first_waits_say_it_once(launch):
    """Nobody hears the first one then, and the others give up waiting for it at the same time."""
    ended = launch(f"""
def work():
    ranks.barrier()
    if rank == 0:
        time.sleep(50)
    raise ValueError("not on the first")
{RUN}""", world=4)  # fmt: skip
    assert ended.codes == [1] * 4
    assert ended.said == ["error: ValueError: not on the first"]


def test_what_was_printed_before_a_failure_is_not_lost(launch):
    ended = launch(f"""
def work():
    print("unflushed")
    raise ValueError("then")
{RUN}""")
    assert sorted(ended.said) == ["error: ValueError: then", "unflushed"]


def test_advice_that_cannot_be_given_does_not_keep_a_rank_alive(launch):
    ended = launch("""
def advice():
    raise OSError("no folder")
ranks.watch(advice)
ranks.barrier()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(50)
""")
    assert ended.codes == [1, -signal.SIGKILL] and ended.seconds < 20
    assert len(ended.said) == 1 and "rank 1 of 2 has ended" in ended.said[0] and "no folder" in ended.said[0]


def test_who_has_finished_may_leave_early_or_late(launch):
    ended = launch(f"""
def work():
    ranks.any(rank == 1)
{RUN}
if rank == 1:
    time.sleep(2)
os._exit(0) if rank == 0 else None
""")
    assert (ended.codes, ended.said) == ([0, 0], [])
    assert ended.left == [], "nothing stays in the temporary folder"


def test_a_rank_that_leaves_at_once_is_no_accident_for_one_that_is_slow_to_hear_of_it(launch):
    """The barrier of finish() lets one go before the other has stopped watching."""
    ended = launch("""
ranks.watch(lambda: "")
if rank == 1:
    stop = ranks._watch.stop
    ranks._watch.stop = lambda: (time.sleep(1.5), stop())
ranks.finish()
os._exit(0)
""")
    assert (ended.codes, ended.said) == ([0, 0], [])


def test_finish_waits_for_a_rank_that_is_still_at_work_and_notices_its_death(launch):
    ended = launch(f"""
def work():
    ranks.barrier()
    if rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
{RUN}""")
    assert ended.codes == [1, -signal.SIGKILL]
    assert ended.said == [f"error: rank 1 of 2 {ENDED}"]
