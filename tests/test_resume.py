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
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on a CPU alone: docs/numerics.md")

# Reads commands (JSON lists of flags) from stdin; forks a run for each, and answers its process id, then its status.
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

    def start(self, log: Path, *flags: str) -> int:
        self.process.stdin.write(json.dumps({"log": str(log), "flags": flags}) + "\n")
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


def kill_and_resume(runs: Runs, tmp_path: Path, kills: int, steps: int, rng: random.Random) -> tuple[Path, Path, int]:
    """(folder never ended, folder killed `kills` times, how often while a checkpoint was being written)"""
    flags = (*FLAGS, f"--steps={steps}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert runs.run(tmp_path / "whole.log", *flags, f"--runs-dir={whole}") == 0, (tmp_path / "whole.log").read_text()
    log, folder, writing = tmp_path / "killed.log", killed / "x", 0
    for i in range(kills):
        before = steps_seen(folder)
        pid = runs.start(log, *flags, f"--runs-dir={killed}")
        deadline = time.monotonic() + 120
        # Until this start has done something; then at any moment of the next steps, every third time in a save.
        while steps_seen(folder) <= before if before else not folder.exists():
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.005)
            if not Path(f"/proc/{pid}").exists():
                break
        if i % 3 == 0:
            while not list((folder / "checkpoints").glob("*.tmp")) and Path(f"/proc/{pid}").exists():
                assert time.monotonic() < deadline
                time.sleep(0.0005)
        else:
            time.sleep(rng.uniform(0.0, 0.5))
        if i % 3 == 1:  # two signals: the second one ends it at once
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGTERM)
            assert runs.wait() in (0, 130), log.read_text()[-3000:]
        else:
            os.killpg(pid, signal.SIGKILL)
            assert runs.wait() == -signal.SIGKILL, f"it ended by itself: {log.read_text()[-3000:]}"
        writing += bool(list((folder / "checkpoints").glob("*.tmp")))
    assert runs.run(log, *flags, f"--runs-dir={killed}") == 0, log.read_text()[-3000:]
    return whole / "x", folder, writing


def assert_same(whole: Path, killed: Path, steps: int) -> None:
    assert [m["step"] for m in metrics_of(whole)] == list(range(steps + 1))
    assert metrics_of(killed) == metrics_of(whole)
    name = f"step-{steps:06d}"
    for file in ("model.safetensors", "training/optimizer.safetensors"):
        ours, theirs = (load_file(folder / "checkpoints" / name / file) for folder in (killed, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), file
    samples = [(folder / "samples.jsonl").read_text() for folder in (killed, whole)]
    assert samples[0] == samples[1]


def test_killed_and_resumed_is_the_same_run(runs, tmp_path):
    whole, killed, writing = kill_and_resume(runs, tmp_path, kills=3, steps=6, rng=random.Random(0))
    assert_same(whole, killed, 6)
    assert writing >= 1, "the first kill came while a checkpoint was being written"
    assert not [p for p in (killed / "checkpoints").iterdir() if p.name.endswith((".tmp", ".old"))]


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_is_the_same_run(runs, tmp_path):
    whole, killed, writing = kill_and_resume(runs, tmp_path, kills=21, steps=40, rng=random.Random(1))
    assert_same(whole, killed, 40)
    assert writing >= 5


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
