"""A run that is killed and resumed writes the same metrics, bit for bit, as one that was never ended (timings aside).

Real runs of the tiny model, as processes, on the CPU's engine. The parent process has imported everything; each run is
a fork of it, so that a start costs seconds and not a quarter of a minute.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on a CPU alone: docs/numerics.md")

# Reads commands (JSON: log, flags, Python to run before) from stdin; forks a run for each, and answers its process id,
# then its status.
FORKS = """
import os, sys, json
import runtime
import vllm, transformers, train, cpu_backend, data, run_report
import vllm.v1.engine.llm_engine, vllm.v1.worker.cpu_worker
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        command = json.loads(line)
        out = os.open(command["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1); os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["train.py", *command["flags"]]
        status = 0
        try:
            exec(command["before"])
            train.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if status:
                print(end.code, flush=True)
        except BaseException as error:
            import traceback
            traceback.print_exc()
            status = 99
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(status)
    os.setpgid(pid, pid)  # both do: it may be killed with its children before it comes to that
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Runs:
    """Starts runs one after the other."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def start(self, log: Path, *flags: str, before: str = "") -> int:
        self.process.stdin.write(json.dumps({"log": str(log), "flags": flags, "before": before}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return int(self.process.stdout.readline())

    def run(self, log: Path, *flags: str) -> int:
        self.start(log, *flags)
        return self.wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope="module")
def runs():
    started = Runs()
    yield started
    started.close()


FLAGS = (
    "--prompts-per-step=6", "--samples-per-prompt=4", "--eval-size=16", "--eval-every=3", "--save-every=1",
    "--updates-per-batch=2", "--run-name=x",
)  # fmt: skip


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if not k.startswith(("time/", "speed/", "memory/"))} for m in lines]


def steps_seen(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def never_ended(runs: Runs, tmp_path: Path, steps: int) -> Path:
    log, folder = tmp_path / "whole.log", tmp_path / "whole"
    assert runs.run(log, *FLAGS, f"--steps={steps}", f"--runs-dir={folder}") == 0, read(log)[-3000:]
    return folder / "x"


@pytest.fixture(scope="module")
def six(runs, tmp_path_factory) -> Path:
    """A run of six steps that was never ended."""
    return never_ended(runs, tmp_path_factory.mktemp("six"), 6)


def half_saved(folder: Path) -> bool:
    return bool(list((folder / "checkpoints").glob("*.tmp")))


def until(done: Callable[[], bool], pid: int, log: Path, pause: float = 0.002) -> None:
    """Wait for it, or for the end of the process."""
    deadline = time.monotonic() + 300
    while not done() and Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(pause)


def kill_and_resume(
    runs: Runs, tmp_path: Path, endings: Sequence[str], steps: int, rng: random.Random
) -> tuple[Path, Counter]:
    """(folder of a run that was ended so often and then went on to its end, what the endings hit). The endings are

    start    SIGKILL at any moment from the start of the process to about where it has done a step
    step     SIGKILL at any moment of the steps after this start's first
    save     SIGKILL while a checkpoint is being written
    signals  SIGTERM, and once more when the run has said that it stops
    """
    flags = (*FLAGS, f"--steps={steps}", f"--runs-dir={tmp_path / 'killed'}")
    folder, hit, takes = tmp_path / "killed" / "x", Counter(), 5.0  # seconds from a start to its first step
    for i, ending in enumerate(endings):
        log, before, began = tmp_path / f"{i}.log", steps_seen(folder), time.monotonic()
        pid = runs.start(log, *flags)
        if ending == "start":
            time.sleep(rng.uniform(0.0, 1.1 * takes))
        else:  # a start takes out what came after its checkpoint, and then goes on
            until(lambda before=before, log=log: steps_seen(folder) > before or "\nstep " in read(log), pid, log)
            takes = time.monotonic() - began
            if ending == "save":
                until(lambda: half_saved(folder), pid, log, 0.0005)
            else:
                time.sleep(rng.uniform(0.0, 0.5))
        if ending == "signals":
            os.kill(pid, signal.SIGTERM)
            until(lambda log=log: "stopping:" in read(log), pid, log, 0.0005)
            os.kill(pid, signal.SIGTERM)
            status = runs.wait()
            # 0: it had ended, or nearly. -SIGTERM: it had saved, and was drawing its curves.
            assert status in (130, 0, -signal.SIGTERM), read(log)[-3000:]
            hit[f"signals: {status}"] += 1
        else:
            os.killpg(pid, signal.SIGKILL)
            assert runs.wait() == -signal.SIGKILL, f"it ended by itself: {read(log)[-3000:]}"
            hit["SIGKILL"] += 1
            hit["before a step"] += "\nstep " not in read(log)
            hit["before it went on"] += "run folder" not in read(log)
        hit["in a save"] += half_saved(folder)
    assert runs.run(tmp_path / "last.log", *flags) == 0, read(tmp_path / "last.log")[-3000:]
    return folder, hit


def read(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def assert_same(whole: Path, killed: Path, steps: int) -> None:
    assert [m["step"] for m in metrics_of(whole)] == list(range(steps + 1))
    assert metrics_of(killed) == metrics_of(whole)
    name = f"step-{steps:06d}"
    for file in ("model.safetensors", "training/optimizer.safetensors"):
        ours, theirs = (load_file(folder / "checkpoints" / name / file) for folder in (killed, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), file
    samples = [(folder / "samples.jsonl").read_text() for folder in (killed, whole)]
    assert samples[0] == samples[1]


def test_killed_and_resumed_is_the_same_run(runs, six, tmp_path):
    killed, hit = kill_and_resume(runs, tmp_path, ["save", "start", "step"], 6, random.Random(0))
    assert_same(six, killed, 6)
    assert hit["SIGKILL"] == 3 and hit["in a save"] >= 1, "the first kill came while a checkpoint was being written"
    assert not [p for p in (killed / "checkpoints").iterdir() if p.name.endswith((".tmp", ".old"))]


@pytest.mark.slow
def test_killed_at_many_moments_and_resumed_is_the_same_run(runs, tmp_path):
    """24 times with SIGKILL, and 4 times with two signals."""
    rng = random.Random(1)
    endings = ["start"] * 10 + ["step"] * 7 + ["save"] * 7 + ["signals"] * 4
    rng.shuffle(endings)
    killed, hit = kill_and_resume(runs, tmp_path, endings, 60, rng)
    print(f"endings: {dict(hit)}")
    assert_same(never_ended(runs, tmp_path, 60), killed, 60)
    assert hit["SIGKILL"] == 24 and hit["before a step"] >= 5 and hit["in a save"] >= 5


# ---- signals

SLOW_DISK = """
import run_folder, time
flush = run_folder._flush
run_folder._flush = lambda folder: (time.sleep(2), flush(folder))
"""


@pytest.mark.parametrize("when", ["it has said that it stops", "it saves"])
def test_a_second_signal_ends_at_once_and_the_checkpoint_before_is_whole(runs, six, tmp_path, when):
    """A flush to the disk takes 2 s here: the second signal surely comes before what the first asks for is saved."""
    flags = (*FLAGS, "--steps=6", f"--runs-dir={tmp_path}")
    folder, log = tmp_path / "x", tmp_path / "log"
    pid = runs.start(log, *flags, before=SLOW_DISK)
    until(lambda: (folder / "checkpoints" / "step-000001").is_dir() and steps_seen(folder) > 2, pid, log)
    os.kill(pid, signal.SIGTERM)
    until(lambda: "stopping:" in read(log), pid, log)
    if when == "it saves":
        until(lambda: half_saved(folder), pid, log)
    os.kill(pid, signal.SIGTERM)
    began = time.monotonic()
    assert runs.wait() == 130, read(log)[-3000:]
    assert time.monotonic() - began < 30
    said = read(log)
    assert f"run folder {folder}; go on with: python train.py --resume {folder}" in said and "Traceback" not in said
    whole = [p for p in (folder / "checkpoints").iterdir() if not p.name.endswith((".tmp", ".old"))]
    assert whole and {read_checkpoint(p).loop.step for p in whole} == {int(p.name[5:]) for p in whole}
    assert max(int(p.name[5:]) for p in whole) < 6, "it had more to do"
    assert runs.run(log, *flags) == 0, read(log)[-3000:]
    assert_same(six, folder, 6)


def test_a_signal_saves_and_the_resumed_run_is_the_same(runs, tmp_path):
    """--resume alone, with more steps than the run was to have."""
    flags = (*FLAGS, "--steps=50", f"--runs-dir={tmp_path}")
    folder, log = tmp_path / "x", tmp_path / "log"
    pid = runs.start(log, *flags, "--save-every=0")
    deadline = time.monotonic() + 120
    while steps_seen(folder) < 3:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert runs.wait() == 0, log.read_text()[-3000:]
    done = metrics_of(folder)[-1]["step"]
    text = log.read_text()
    assert f"stopped after {done} of 50" in text and f"go on with: python train.py --resume {folder}" in text
    checkpoint = read_checkpoint(folder / "checkpoints" / f"step-{done:06d}")
    assert checkpoint.loop.step == done
    AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    assert runs.run(log, f"--resume={folder}", f"--steps={done + 2}") == 0, log.read_text()[-3000:]
    whole = tmp_path / "whole"
    assert runs.run(tmp_path / "log2", *flags, f"--steps={done + 2}", f"--runs-dir={whole}") == 0
    ours, theirs = metrics_of(folder), metrics_of(whole / "x")
    del ours[-1]["eval/accuracy"], theirs[-1]["eval/accuracy"]  # the last step of a run is evaluated
    assert ours[:-1] == theirs[:-1] and ours[-1].keys() == theirs[-1].keys()
    resumed = [
        e for e in map(json.loads, (folder / "events.jsonl").read_text().splitlines()) if e["event"] == "resumed"
    ]
    assert [e["step"] for e in resumed] == [done]
    assert runs.run(log, f"--resume={folder}", "--lr=1e-2") == 1
    assert "--lr 0.01 would change the result" in log.read_text().splitlines()[-1]
    assert runs.run(log, f"--resume={folder}", f"--steps={done + 2}") == 1
    assert "has done all of its" in log.read_text().splitlines()[-1]
