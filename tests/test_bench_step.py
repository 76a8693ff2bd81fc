"""scripts/bench_step.py and bench_vs_trl.py: figures by hand, what both sides are given, and a whole run of the first.

TRL itself is not needed: its arguments are checked against GRPOConfig only where it is installed.
"""

import runtime

# isort: split
import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from config import TINY_MODEL
from data import load_data

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_step  # noqa: E402
import bench_vs_trl  # noqa: E402
from bench_step import BenchError, OutOfMemory, Timed, Workload  # noqa: E402
from bench_trainer import model_flops  # noqa: E402

from memory import GIB  # noqa: E402

WORK = Workload("tiny", TINY_MODEL, "prompts.jsonl", None, 2, 4, 64, 16, 3, [10, 20, 30, 10, 20, 30])
needs_tiny_model = pytest.mark.skipif(
    not Path(TINY_MODEL, "model.safetensors").exists(), reason="assets/tiny-adder is not there"
)
needs_engine = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def record(step: int, rollout: float, train: float, **more: float) -> dict:
    """A line of metrics.jsonl; sync and verify take a tenth of a second together."""
    times = {"rollout": rollout, "score": 0.1, "train": train, "sync": 0.06, "verify": 0.04} | more
    return {f"time/{k}": v for k, v in times.items()} | {
        "step": step, "time/step": rollout + train + 0.2, "sampling/groups_trained": 2, "response/tokens": 80,
        "response/length_mean": 10.0, "speed/rollout_tokens_per_s": 100.0, "speed/train_tokens_per_s": 200.0,
        "mismatch/abs_dlogp_mean": 0.01 * step,
    }  # fmt: skip


def write_run(folder: Path, records: list[dict], gpus: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": 0, "eval/accuracy": 0.5, "time/eval": 1.0}, *records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"micro_batch_tokens": 4096, "gradient_checkpointing": False}))
    (folder / "env.json").write_text(json.dumps({"gpus": gpus, "versions": {"torch": "2"}, "git_commit": "abc"}))
    return folder


# ---- figures


def test_phases_of_a_step():
    times = bench_step.phases(record(1, 2.0, 1.0, pack=0.3, brew=0.05))
    assert times["brew"] == 0.05  # a phase that nobody has heard of
    assert times["other"] == pytest.approx(0.2 - 0.06 - 0.04 - 0.05)  # score and pack are inside others
    assert "step" not in times


def test_neither_leaves_out_what_waits_inside_a_phase():
    assert bench_step.neither({"rollout": 5.0, "train": 4.0, "score": 0.5, "sync": 0.2}, 10.0) == pytest.approx(0.15)


def test_figures_are_medians_without_the_first_step(tmp_path):
    run = write_run(tmp_path, [record(1, 50.0, 50.0), record(2, 2.0, 1.0), record(3, 2.0, 1.0)], [])
    found = bench_step.figures(WORK, Timed([100.0, 104.0, 108.0], None, None), run, 790.0)
    assert found["step_s"] == 4.0 and found["samples_per_s"] == 2.0 and found["tokens_per_s"] == 20.0
    assert found["phases_s"]["rollout"] == 2.0
    assert found["phases_s"]["other"] == pytest.approx(0.1)
    assert found["phases_s"]["between steps"] == pytest.approx(0.8)
    assert found["neither_share"] == pytest.approx(1 - (3.0 - 0.1) / 4)
    assert found["abs_dlogp"] == pytest.approx(0.025) and found["response_len"] == 10.0
    assert found["mfu"] is None and found["torch_peak_gib"] is None and found["device"] == "CPU"


@needs_tiny_model
def test_mfu_is_the_trainers_arithmetic_over_the_training_time(tmp_path):
    run = write_run(tmp_path, [record(i, 2.0, 1.0) | {"memory/torch_peak_gib": float(i)} for i in (1, 2, 3)], ["a GPU"])
    found = bench_step.figures(WORK, Timed([1.0, 5.0, 9.0], 0.5, 7.0), run, peak_tflops=1e-3)
    step = SimpleNamespace(prompt_ids=[range(n) for n in (10, 20, 30) for _ in range(4)], response_ids=[range(10)] * 12)
    whole = model_flops(AutoConfig.from_pretrained(TINY_MODEL), step) * 2 / 3  # 3 steps have 6 prompts, one has 2
    assert found["mfu"] == pytest.approx(whole / 1.0 / 1e9)
    assert (found["device_idle_gib"], found["device_peak_gib"], found["torch_peak_gib"]) == (0.5, 7.0, 3.0)


def test_a_step_without_metrics_is_an_error(tmp_path):
    run = write_run(tmp_path, [record(1, 2.0, 1.0), record(3, 2.0, 1.0)], [])
    with pytest.raises(BenchError, match=r"steps \[1, 3\]"):
        bench_step.figures(WORK, Timed([1.0, 2.0, 3.0], None, None), run, 790.0)


def test_table_and_summary(tmp_path):
    text = bench_step.table([{"a": 1.23456, "b": "x"}, {"a": 1234.5, "c": None}])
    assert text.splitlines() == [
        "| a     | b | c |",
        "| ----- | - | - |",
        "| 1.235 | x | - |",
        "| 1234  | - | - |",
    ]
    run = write_run(tmp_path, [record(i, 2.0, 1.0) for i in (1, 2, 3)], [])
    timed = Timed([1.0, 5.0, 9.0], None, None)
    result = {"model": "tiny", "quant": "fp8"} | bench_step.figures(WORK, timed, run, 790.0)
    assert "PART_OF" not in bench_step.summary([result])
    run = write_run(tmp_path, [record(i, 2.0, 1.0, generate=1.9) for i in (1, 2, 3)], [])
    result = {"model": "tiny", "quant": "fp8"} | bench_step.figures(WORK, timed, run, 790.0)
    assert "add it to PART_OF" in bench_step.summary([result])  # "generate" lies inside rollout


# ---- running


def test_step_lines_are_timed_and_failures_show_the_log(tmp_path):
    lines = "import sys, time\nfor i in (1, 2):\n    print(f'step {i}/2 | x')\n    time.sleep(0.2)\n"
    timed = bench_step.run_timed([sys.executable, "-c", lines], tmp_path / "log", 2)
    assert len(timed.step_ends) == 2 and 0.15 < timed.step_seconds[0] < 5
    for to_the_end in (True, False):  # what comes after the last step can be left out
        after = tmp_path / f"after-{to_the_end}"
        bench_step.run_timed(
            [sys.executable, "-c", f"{lines}open({str(after)!r}, 'w')"], tmp_path / "log", 2, to_the_end
        )
        assert after.exists() == to_the_end
    with pytest.raises(BenchError, match=r"status 0 after 2 of 3 steps[\s\S]*step 2/2"):
        bench_step.run_timed([sys.executable, "-c", lines], tmp_path / "log", 3)
    with pytest.raises(BenchError, match=r"status 1[\s\S]*ZeroDivisionError"):
        bench_step.run_timed([sys.executable, "-c", "1 / 0"], tmp_path / "log", 2)
    with pytest.raises(OutOfMemory):
        bench_step.run_timed([sys.executable, "-c", "exit(3)"], tmp_path / "log", 2)


@needs_engine
@pytest.mark.parametrize("visible", ["1,0", "GPU-3f"])
def test_device_memory_is_read_while_the_process_runs(tmp_path, monkeypatch, visible):
    from vllm.third_party import pynvml

    readings = iter([1, 2, 4])
    memory = lambda handle: SimpleNamespace(used=next(readings, 3) * GIB)  # noqa: E731
    asked = []
    monkeypatch.setattr(runtime, "has_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", asked.append)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", asked.append)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
    code = "import time; time.sleep(1); print('step 1/1 |')"
    timed = bench_step.run_timed([sys.executable, "-c", code], tmp_path / "log", 1)
    assert (timed.idle_gib, timed.peak_gib) == (1.0, 4.0)
    assert asked == [1 if visible == "1,0" else "GPU-3f"]


# ---- the workload


@needs_tiny_model
@pytest.mark.parametrize("layout", ["arithmetic", "gsm8k"])
def test_prompts_survive_the_file(tmp_path, layout):
    """What both sides read is what the source says: same messages, answer and reward."""
    source = layout
    if layout == "gsm8k":
        source = str(tmp_path / "in.jsonl")
        rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(8)]
        Path(source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    lengths = bench_step.draw_prompts(source, 6, TINY_MODEL, 200, out)
    assert len(lengths) == 6 and all(0 < n <= 200 for n in lengths)
    originals = {json.dumps(e.messages): e for e in load_data(source, None, 0)[0]}
    for example in load_data(str(out), None, 0)[0]:
        original = originals[json.dumps(example.messages)]
        assert (example.answer, example.reward) == (original.answer, original.reward)
    before = out.read_text()
    assert bench_step.draw_prompts(source, 6, TINY_MODEL, 200, out) == lengths and out.read_text() == before


@needs_tiny_model
def test_workload_errors_name_the_flag(tmp_path):
    parser = argparse.ArgumentParser()
    bench_step.add_arguments(parser)
    for flags, message in (
        ([], "--shape or --model"),
        (["--shape", "tiny", "--steps", "1"], "--steps 1"),
        (["--shape", "tiny", "--model", "a/tiny"], "same name"),
        (["--shape", "tiny", "--prompts", "9000"], "9000|36000"),
    ):
        with pytest.raises(BenchError, match=message):
            bench_step.make_workloads(parser.parse_args(flags), tmp_path)
    work = bench_step.make_workloads(parser.parse_args(["--shape", "tiny", "--samples", "2"]), tmp_path)[0]
    assert (work.prompts, work.samples, work.max_response_len, work.steps) == (8, 2, 16, 4)
    command = bench_step.train_command(work, "fp8", tmp_path, ["--sleep", "2"])
    assert command[command.index("--samples-per-prompt") + 1] == "2" and command[-2:] == ["--sleep", "2"]
    assert command[command.index("--reward") + 1].endswith("make_random_model.py:coin")


# ---- TRL's side


CHOICES = bench_vs_trl.Choices(micro_batch=4, dtype="float32", sleep=False, liger=False, compile=False, vllm=True)


def test_trl_takes_as_many_samples_and_updates():
    given = bench_vs_trl.trl_arguments(WORK, CHOICES, 0.2, True, "out")
    assert given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] == WORK.samples_per_step == 8
    assert given["steps_per_generation"] == given["gradient_accumulation_steps"] and given["num_iterations"] == 1
    assert given["num_generations"] == 4 and given["max_completion_length"] == 16 and given["max_steps"] == 3
    assert given["vllm_max_model_length"] == 80 and given["vllm_gpu_memory_utilization"] == 0.2
    without = bench_vs_trl.trl_arguments(WORK, dataclasses.replace(CHOICES, vllm=False), 0.2, False, "out")
    assert without["use_cpu"] and not any(k.startswith("vllm_") for k in without)
    with pytest.raises(BenchError, match="--trl-micro-batch 3 does not divide the 8"):
        bench_vs_trl.trl_arguments(WORK, dataclasses.replace(CHOICES, micro_batch=3), 0.2, True, "out")


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl_knows_the_arguments(tmp_path):
    from trl import GRPOConfig

    config = GRPOConfig(**bench_vs_trl.trl_arguments(WORK, CHOICES, 0.2, False, str(tmp_path)))
    assert config.generation_batch_size == WORK.samples_per_step


def test_trl_memory_share():
    sizes = SimpleNamespace(parameters=GIB, kv_bytes_per_token=2**20)  # 2 GiB of weights, 1 MiB a token
    work = dataclasses.replace(WORK, prompts=64, samples=4, max_prompt_len=40, max_response_len=200)
    assert bench_vs_trl.trl_memory_share(sizes, work, 156 * GIB) == 0.5  # 2 + 256 x 256 / 1024 + 12 = 78


@needs_tiny_model
def test_trl_scores_with_the_same_function(tmp_path):
    bench_step.draw_prompts("arithmetic", 3, TINY_MODEL, 64, tmp_path / "p.jsonl")
    examples, _ = load_data(str(tmp_path / "p.jsonl"), None, 0)
    reward = bench_vs_trl.trl_reward(WORK, examples)
    right = [[{"role": "assistant", "content": e.answer}] for e in examples]
    assert reward(completions=right, row=[0, 1, 2], prompts=None) == [1.0, 1.0, 1.0]
    assert reward(completions=right[:1], row=[1]) == [float(examples[0].answer == examples[1].answer)]
    (tmp_path / "bad.py").write_text("def score(completion, answer, row):\n    return 1 / 0\n")
    reward = bench_vs_trl.trl_reward(dataclasses.replace(WORK, reward=f"{tmp_path / 'bad.py'}:score"), examples)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        reward(completions=right, row=[0, 1, 2])


FOUND = {
    "phases": [{"rollout": 9.0, "sync": 9.0}, {"rollout": 2.0, "sync": 0.5}, {"rollout": 2.0, "sync": 0.5}],
    "logs": [{"completions/mean_length": 5.0, "sampling/sampling_logp_difference/mean": 0.1}] * 3,
    "arguments": {}, "importance_sampling": {}, "parameter_dtypes": [], "torch_peak_gib": None, "device": "CPU",
    "versions": {"trl": "1.16.0"},
}  # fmt: skip


def test_trl_figures_and_the_ratio(tmp_path):
    trl = bench_vs_trl.trl_figures(WORK, Timed([10.0, 18.0, 26.0], None, None), FOUND)
    assert (trl["step_s"], trl["samples_per_s"], trl["tokens_per_s"]) == (8.0, 1.0, 5.0)
    assert trl["phases_s"] == {"rollout": 2.0, "sync": 0.5, "training and all else": 5.5}
    run = write_run(tmp_path, [record(i, 2.0, 1.0) for i in (1, 2, 3)], [])
    ours = bench_step.figures(WORK, Timed([1.0, 5.0, 9.0], None, None), run, 790.0)
    lines = bench_vs_trl.summary({"trl": trl, "fp8": ours}).splitlines()
    assert lines[2].startswith("| TRL 1.16.0, bf16") and lines[2].endswith("1.000             |")
    assert lines[3].startswith("| Rollout8, fp8") and lines[3].endswith("2.000             |")
    with pytest.raises(BenchError, match="logged 3 steps"):
        bench_vs_trl.trl_figures(WORK, Timed([1.0, 2.0], None, None), FOUND)


def test_smaller_micro_batches_are_tried_where_memory_runs_out(tmp_path, monkeypatch):
    tried = []

    def run_timed(command, log, steps):
        spec = Path(command[-1])
        tried.append(json.loads(spec.read_text())["choices"]["micro_batch"])
        if tried[-1] > fits:
            raise OutOfMemory("no room")
        spec.with_suffix(".result.json").write_text(json.dumps(FOUND))
        return Timed([1.0, 2.0, 3.0], None, None)

    monkeypatch.setattr(bench_vs_trl, "run_timed", run_timed)
    args = argparse.Namespace(
        trl_micro_batch=[64, 32, 4, 2],
        trl_dtype="float32",
        trl_sleep=False,
        trl_liger=True,
        trl_compile=False,
        no_vllm=False,
    )
    fits = 4
    found = bench_vs_trl.run_trl(WORK, args, tmp_path)
    assert tried == [8, 4] and found["out_of_memory_at"] == [8]  # 64 and 32 are the whole step, 8
    fits = 1
    with pytest.raises(OutOfMemory):
        bench_vs_trl.run_trl(WORK, args, tmp_path)


# ---- a whole run


@needs_tiny_model
@needs_engine
def test_bench_step_from_end_to_end(tmp_path):
    command = [sys.executable, str(SCRIPTS / "bench_step.py"), "--shape", "tiny", "--quant", "fp8", "--steps", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out.json"), "--work", str(tmp_path / "work")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| tiny  | fp8" in done.stdout
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["step_s"] == pytest.approx(result["all_step_s"][0], abs=1e-4)
    assert result["samples_per_s"] == pytest.approx(32 / result["step_s"], rel=1e-3)
    assert {"rollout", "train", "sync", "verify", "other", "between steps"} <= set(result["phases_s"])
    assert not (tmp_path / "work" / "runs" / "tiny-fp8" / "checkpoints").exists()


def test_trl_missing_is_one_clear_error(tmp_path):
    if importlib.util.find_spec("trl") is not None:
        pytest.skip("TRL is installed")
    command = [sys.executable, str(SCRIPTS / "bench_vs_trl.py"), "--shape", "tiny", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "pip install trl==1.16.0" in done.stderr and "Traceback" not in done.stderr
