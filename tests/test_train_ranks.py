"""Whole runs of train.py as several processes, started by torchrun on a CPU: gloo, FSDP2, one vLLM engine a rank or one
for two, the built-in tiny model.

That a step of several ranks is the step of one is test_sharding.py's; here are engines, checkpoints and ends.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config import TINY_MODEL

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(not Path(TINY_MODEL, "model.safetensors").exists(), reason="assets/tiny-adder is not there"),
]
SMALL = ["--prompts-per-step", "8", "--samples-per-prompt", "4", "--eval-size", "16", "--eval-every", "2",
         "--reward-workers", "1", "--save-every", "1", "--keep-last", "9"]  # fmt: skip
LIMIT = 420  # seconds; a process takes 15 to start alone, and several share two cores


def start(world: int, runs: Path, *flags: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [*launcher, str(ROOT / "train.py"), "--runs-dir", str(runs), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"took longer than {LIMIT} s\n{out[-3000:]}\n{err[-3000:]}")
    return process.returncode, out, err


def run(world: int, runs: Path, *flags: str) -> str:
    status, out, err = finish(start(world, runs, *flags))
    assert status == 0, f"{out[-3000:]}\n{err[-5000:]}"
    return out


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_with_other_numbers_of_ranks(tmp_path):
    """2 ranks for two steps, 4 for one more, 1 for another: one run, one voice, checkpoints of all kinds."""
    out = run(2, tmp_path, "--run-name", "r", "--steps", "2", *SMALL)
    folder = tmp_path / "r"
    assert out.count("step 2/2 |") == 1  # rank 0 alone speaks
    first = metrics(folder)
    assert [line["step"] for line in first] == [0, 1, 2]
    for line in first[1:]:
        assert line["sampling/groups_drawn"] >= 8 and line["train/updates_applied"] == 1
        assert line["reward/scored"] >= 16 + 4 * line["sampling/groups_drawn"]  # of both ranks
        assert 0 < line["mismatch/abs_dlogp_mean"] < 0.5
    saved = sorted(p.name for p in (folder / "checkpoints" / "step-000002" / "training").iterdir())
    assert [n for n in saved if n.startswith("optimizer")] == [
        "optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"
    ]  # fmt: skip

    out = run(4, tmp_path, "--resume", str(folder), "--steps", "3")
    assert "goes on after step 2" in out
    run(1, tmp_path, "--resume", str(folder), "--steps", "4")
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4] and lines[:3] == first
    assert lines[4]["reward/scored"] > lines[3]["reward/scored"] > lines[2]["reward/scored"]
    steps = [p.name for p in sorted((folder / "checkpoints").iterdir())]
    assert steps == [f"step-{n:06d}" for n in (1, 2, 3, 4)]

    from transformers import AutoModelForCausalLM

    for step in steps:  # each is a whole model, whatever wrote it
        AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / step)


def test_two_ranks_hold_one_engine(tmp_path):
    """--tp 2: the plan is proved against vLLM's own loader on both, and the log-probs of both are the policy's; weights
    stay whole over several micro-batches."""
    several = ["--reshard-after-forward", "False", "--micro-batch-tokens", "48"]
    out = run(2, tmp_path, "--run-name", "r", "--steps", "2", "--tp", "2", *several, *SMALL)
    assert "sync plan proved" in out
    lines = metrics(tmp_path / "r")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(0 < line["mismatch/abs_dlogp_mean"] < 0.5 for line in lines[1:])
    assert lines[1]["reward/scored"] == 16 + 4 * lines[1]["sampling/groups_drawn"]  # once, not by both


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Processes of the ranks, in the order in which they were started."""
    found = subprocess.run(["pgrep", "-f", "-P", str(process.pid), "train.py"], capture_output=True, text=True).stdout
    return sorted(map(int, found.split()))


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("\n".join(process.communicate())[-5000:])
        time.sleep(0.1)


def test_a_rank_that_dies_ends_the_run_with_one_message_and_a_whole_checkpoint(tmp_path):
    process = start(2, tmp_path, "--run-name", "r", "--steps", "500", *SMALL, "--eval-every", "0", "--keep-last", "2")
    wait_for(tmp_path / "r" / "checkpoints" / "step-000003", process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    status, _, err = finish(process)
    assert status != 0
    said = [line for line in err.splitlines() if line.startswith("error: rank 1 of 2 has ended")]
    assert len(said) == 1 and "python train.py --resume" in said[0]
    assert 'train.py", line' not in err  # no traceback of ours: the launcher has its own
    done = max(int(p.name[5:]) for p in (tmp_path / "r" / "checkpoints").glob("step-*") if p.name[5:].isdigit())

    process = start(2, tmp_path, "--resume", str(tmp_path / "r"), "--steps", str(done + 500))
    wait_for(tmp_path / "r" / "checkpoints" / f"step-{done + 2:06d}", process)
    os.kill(process.pid, signal.SIGTERM)  # the launcher, which passes it on
    status, out, err = finish(process)
    lines = metrics(tmp_path / "r")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) >= done + 2
    assert "go on with: python train.py --resume" in out
