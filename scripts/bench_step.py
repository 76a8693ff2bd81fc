"""A training step from end to end, as a user runs it: samples/s, tokens/s, where the seconds go, memory, trainer's MFU.

Every model and rollout format gets train.py in a process of its own, one after the other. A step is all that lies
between two step lines of train.py, logging included; the phases are those of the run's metrics.jsonl (docs/metrics.md).
Figures are medians over all steps but the first, which is warm-up. Prompts are drawn once: each is sampled once in a
run, by every run, and dynamic sampling is off, so that every step has the same number of samples. "neither" is the
share of a step that is neither generating nor training: all but time/rollout and time/train, and what PART_OF names of
these two. MFU is bench_trainer.py's arithmetic over time/train, with responses of the run's mean length; 100 % is
--peak-tflops. Memory is the whole device's, read five times a second through NVML.

A shape gets random weights, and a reward without meaning that gives groups both outcomes. Such a model ends about one
response in 600 (256 tokens) by chance and gives all others the full length; the mean is in the JSON. A --model is
scored by its data's own reward.

    python scripts/bench_step.py --shape qwen2.5-0.5b qwen2.5-1.5b --quant none fp8 --out step.json      # one GPU
    python scripts/bench_step.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k --max-response-len 1024
    python scripts/bench_step.py --shape qwen2.5-1.5b --quant fp8 --ranks 1 2    # then two GPUs; memory: the first's
    python scripts/bench_step.py --shape tiny                                                            # a CPU will do
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # first: it sets what torch reads at import

# isort: split
import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from bench_trainer import model_flops
from make_random_model import SHAPES, TOKENIZER

from config import TINY_MODEL
from data import DataError, encode_prompts, load_data
from engine_options import QUANTIZATION

ROOT = Path(__file__).resolve().parent.parent
COIN = f"{ROOT / 'scripts' / 'make_random_model.py'}:coin"
SIZES = {"prompts": 64, "samples": 8, "max_prompt_len": 256, "max_response_len": 256}
TINY_SIZES = {"prompts": 8, "samples": 4, "max_prompt_len": 64, "max_response_len": 16}
PART_OF = {"score": "rollout", "pack": "train"}  # phases that are timed inside another one
STEP_LINE = re.compile(r"step (\d+)/\d+ \|")


class BenchError(RuntimeError):
    """A run that failed, or figures that do not fit together; the message has the end of the run's log."""


class OutOfMemory(BenchError):
    """A run that ended because the device's memory did."""


OUT_OF_MEMORY = 3  # exit status


# ---- what is trained


@dataclass(frozen=True)
class Workload:
    """The same for every run that is compared."""

    name: str
    model: str
    """Folder or Hub name."""
    data: str
    """A jsonl file with prompts * steps rows."""
    reward: str | None
    """file.py:function; None: the data's own."""
    prompts: int
    samples: int
    max_prompt_len: int
    max_response_len: int
    steps: int
    prompt_tokens: list[int]
    """Length of each prompt of the file."""

    @property
    def samples_per_step(self) -> int:
        return self.prompts * self.samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that decide the workload, and where things go."""
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES, "tiny"], default=[], help="models of random weights")
    parser.add_argument("--model", nargs="+", default=[], help="folders or Hub names of real models")
    parser.add_argument("--tokenizer", default=str(TOKENIZER), help="folder of the tokenizer that shapes get")
    parser.add_argument("--data", default="arithmetic", help="as train.py's; a .jsonl with question and answer")
    parser.add_argument("--prompts", type=int, help="prompts a step (64; tiny: 8)")
    parser.add_argument("--samples", type=int, help="samples a prompt (8; tiny: 4)")
    parser.add_argument("--max-prompt-len", type=int, help="tokens; longer prompts are left out (256; tiny: 64)")
    parser.add_argument("--max-response-len", type=int, help="tokens (256; tiny: 16)")
    parser.add_argument("--steps", type=int, default=4, help="the first one is warm-up")
    parser.add_argument("--work", help="folder for models, prompts, logs and runs; none: a temporary one")
    parser.add_argument("--out", help="write the figures as JSON, after every run")


def make_workloads(args: argparse.Namespace, folder: Path) -> list[Workload]:
    """A workload for each --shape and --model; model and prompts are written to `folder` where they are not there."""
    if args.steps < 2:
        raise BenchError(f"--steps {args.steps}: give at least 2, since the first one is warm-up")
    if not args.shape and not args.model:
        raise BenchError("give --shape or --model")
    names = [Path(name).name for name in [*args.shape, *args.model]]
    if len(set(names)) < len(names):
        raise BenchError(f"--shape and --model: two of {', '.join(names)} have the same name; run them one by one")
    workloads = []
    for name in [*args.shape, *args.model]:
        tiny, random_weights = name == "tiny", name in SHAPES
        sizes = {k: getattr(args, k) or v for k, v in (TINY_SIZES if tiny else SIZES).items()}
        if tiny:
            model = TINY_MODEL
        elif random_weights:
            model = random_model_folder(name, args.tokenizer, folder)
        else:
            model = str(Path(name).resolve()) if Path(name).exists() else name
        data = folder / f"{Path(name).name}-prompts.jsonl"
        lengths = draw_prompts(args.data, sizes["prompts"] * args.steps, model, sizes["max_prompt_len"], data)
        reward = COIN if random_weights or tiny else None
        workloads.append(
            Workload(Path(name).name, model, str(data), reward, **sizes, steps=args.steps, prompt_tokens=lengths)
        )
    return workloads


def random_model_folder(shape: str, tokenizer: str, folder: Path) -> str:
    """make_random_model.py's model of `shape`, with `tokenizer`; made in a process of its own, so that this one leaves
    the GPU alone."""
    from transformers import AutoTokenizer

    final = folder / f"{shape}-{Path(tokenizer).name}"
    if final.exists():
        return str(final)
    aside = final.with_name(final.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    script = Path(__file__).with_name("make_random_model.py")
    subprocess.run([sys.executable, str(script), shape, str(aside)], check=True)
    if Path(tokenizer).resolve() != TOKENIZER:
        chosen = AutoTokenizer.from_pretrained(tokenizer)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (aside / file).unlink()
        chosen.save_pretrained(aside)
        for file in ("config.json", "generation_config.json"):
            settings = json.loads((aside / file).read_text())
            (aside / file).write_text(json.dumps(settings | {"eos_token_id": chosen.eos_token_id}, indent=1) + "\n")
    aside.rename(final)
    return str(final)


def draw_prompts(data: str, count: int, model: str, max_prompt_len: int, out: Path) -> list[int]:
    """Write `count` prompts of `data` that are not too long, in a fixed order; returns their lengths in tokens."""
    from transformers import AutoTokenizer

    examples, _ = load_data(data, None, 0)
    prompts, _ = encode_prompts(examples, AutoTokenizer.from_pretrained(model), max_prompt_len, {})
    if len(prompts) < count:
        raise BenchError(
            f"--data {data} has {len(prompts)} prompts of at most {max_prompt_len} tokens, and --prompts times --steps "
            f"is {count}; give other data, --max-prompt-len or --steps"
        )
    chosen = random.Random(0).sample(prompts, count)
    rows = []
    for prompt in chosen:
        example = prompt.example
        answer = f"#### {example.answer}" if example.reward == "gsm8k" else example.answer
        rows.append({"prompt": example.messages, "answer": answer})
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return [len(prompt.token_ids) for prompt in chosen]


# ---- running it


@dataclass
class Timed:
    """A finished process: when its step lines came (seconds), and the device's memory (GiB; None without a GPU)."""

    step_ends: list[float]
    idle_gib: float | None
    peak_gib: float | None

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of every step but the first."""
        return [b - a for a, b in zip(self.step_ends, self.step_ends[1:], strict=False)]


class DeviceMemory:
    """GiB in use on the device by everything, read five times a second while the context is open; nothing without a
    GPU. It is read through NVML, which needs no CUDA context here."""

    def __init__(self) -> None:
        self.readings: list[float] = []
        self._ended = threading.Event()

    def __enter__(self) -> "DeviceMemory":
        if runtime.has_gpu():
            from vllm.third_party import pynvml

            pynvml.nvmlInit()
            device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
            by_index = device.isdecimal()
            handle = (pynvml.nvmlDeviceGetHandleByIndex if by_index else pynvml.nvmlDeviceGetHandleByUUID)(
                int(device) if by_index else device
            )
            self._read = lambda: self.readings.append(pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30)
            self._read()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self.readings:
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self._read()


def run_timed(command: Sequence[str], log: Path, steps: int, to_the_end: bool = True) -> Timed:
    """Run `command`, its output to `log`, and note when each of its step lines comes. Without `to_the_end` it is killed
    after the last of them. Raises BenchError if it fails, OutOfMemory if that is why."""
    print(f"{shlex.join(command)}\n  log: {log}", flush=True)
    ends: list[float] = []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with open(log, "w", encoding="utf-8") as sink, DeviceMemory() as memory:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=sink, text=True, env=environment, cwd=ROOT
        )
        try:
            for line in process.stdout:
                if STEP_LINE.match(line):
                    ends.append(time.perf_counter())
                    print(f"  {line.rstrip()}", flush=True)
                sink.write(line)
                sink.flush()
                if not to_the_end and len(ends) == steps:
                    break
            status = process.wait() if to_the_end or len(ends) < steps else 0
        finally:
            process.kill()
            process.wait()
    if status != 0 or len(ends) != steps:
        text = log.read_text(encoding="utf-8", errors="replace")
        end = "\n".join(text.splitlines()[-40:])
        what = f"ended with status {status} after {len(ends)} of {steps} steps"
        raise (OutOfMemory if status == OUT_OF_MEMORY else BenchError)(f"{shlex.join(command)}\n{what}; {log}:\n{end}")
    idle, peak = (memory.readings[0], max(memory.readings)) if memory.readings else (None, None)
    return Timed(ends, idle, peak)


def train_command(work: Workload, quant: str, runs: Path, flags: Sequence[str] = (), ranks: int = 1) -> list[str]:
    """train.py on `work`, with the defaults of a user's run otherwise, in `ranks` processes."""
    reward = ["--reward", work.reward] if work.reward else []
    several = (  # an address, since not every host can resolve its own name
        ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    return [
        sys.executable, *several, str(ROOT / "train.py"), "--model", work.model, "--data", work.data, *reward,
        "--rollout-quant", quant, "--prompts-per-step", str(work.prompts), "--samples-per-prompt", str(work.samples),
        "--max-prompt-len", str(work.max_prompt_len), "--max-response-len", str(work.max_response_len),
        "--steps", str(work.steps), "--no-dynamic-sampling", "--eval-every", "0",
        "--runs-dir", str(runs), "--run-name", run_name(work, quant, ranks), *flags,
    ]  # fmt: skip


def run_name(work: Workload, quant: str, ranks: int) -> str:
    return f"{work.name}-{quant}" + (f"-{ranks}" if ranks > 1 else "")


def run_train(
    work: Workload, quant: str, folder: Path, flags: Sequence[str] = (), peak_tflops: float = 790.0, ranks: int = 1
) -> dict[str, Any]:
    """The figures of one run of train.py."""
    run = folder / "runs" / run_name(work, quant, ranks)
    shutil.rmtree(run, ignore_errors=True)  # of an earlier run in the same --work
    command = train_command(work, quant, run.parent, flags, ranks)
    # One process is ended before it writes its checkpoint; a launcher that is killed would leave its ranks behind.
    timed = run_timed(command, run.parent.parent / f"{run.name}.log", work.steps, to_the_end=ranks > 1)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    found = {"command": shlex.join(command[1:])} | figures(work, timed, run, peak_tflops)
    return found | {"ranks": ranks, "mfu": found["mfu"] and found["mfu"] / ranks}


# ---- figures


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without the evaluation before training."""
    with open(run / "metrics.jsonl", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [record for record in records if record["step"] > 0]


def phases(record: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase of a step: every time/ key, whatever its name, and "other", the rest of time/step. That is
    negative where a phase lies inside another one and PART_OF does not name it."""
    times = {k.removeprefix("time/"): v for k, v in record.items() if k.startswith("time/") and k != "time/step"}
    return times | {"other": record["time/step"] - sum(v for k, v in times.items() if k not in PART_OF)}


def neither(times: dict[str, float], seconds: float) -> float:
    """Share of a step of `seconds` that is neither generating nor training."""
    inside = sum(v for k, v in times.items() if k in PART_OF)
    return 1 - (times["rollout"] + times["train"] - inside) / seconds


def flops_per_step(work: Workload, response_len: int) -> float:
    """Forward and backward of a step's mean batch, every response of `response_len` tokens."""
    from transformers import AutoConfig

    batch = SimpleNamespace(
        prompt_ids=[range(n) for n in work.prompt_tokens], response_ids=[range(response_len)] * len(work.prompt_tokens)
    )
    return model_flops(AutoConfig.from_pretrained(work.model), batch) * work.samples / work.steps


def median(values: Iterator[float] | Sequence[float]) -> float:
    return round(statistics.median(values), 5)


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """None where one of the values is missing."""
    return None if None in values else statistics.mean(values)


def rates(seconds: Sequence[float], samples: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
    """Medians over steps of these seconds, samples and response tokens each."""
    return {
        "step_s": median(seconds),
        "samples_per_s": median(n / s for n, s in zip(samples, seconds, strict=True)),
        "tokens_per_s": median(n / s for n, s in zip(tokens, seconds, strict=True)),
    }


def figures(work: Workload, timed: Timed, run: Path, peak_tflops: float) -> dict[str, Any]:
    """What a run of train.py comes to, from its step lines and its run folder."""
    records = read_metrics(run)
    if [r["step"] for r in records] != list(range(1, work.steps + 1)):
        raise BenchError(f"{run / 'metrics.jsonl'} has steps {[r['step'] for r in records]}, not 1 to {work.steps}")
    records, seconds = records[1:], timed.step_seconds
    times = [
        phases(record) | {"between steps": max(wall - record["time/step"], 0.0)}
        for record, wall in zip(records, seconds, strict=True)
    ]
    config, env = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("config.json", "env.json"))
    names = list(dict.fromkeys(name for t in times for name in t))
    length = statistics.mean(r["response/length_mean"] for r in records)
    on_gpu = bool(env["gpus"])
    flops = flops_per_step(work, round(length)) if on_gpu else 0.0
    mfu = flops / statistics.median(t["train"] for t in times) / 1e12 / peak_tflops if on_gpu else None
    return rates(
        seconds,
        [r["sampling/groups_trained"] * work.samples for r in records],
        [r["response/tokens"] for r in records],
    ) | {
        "rollout_tokens_per_s": median(r["speed/rollout_tokens_per_s"] for r in records),
        "train_tokens_per_s": median(r["speed/train_tokens_per_s"] for r in records),
        "mfu": mfu,
        "neither_share": median(neither(t, s) for t, s in zip(times, seconds, strict=True)),
        "phases_s": {name: median(t.get(name, 0.0) for t in times) for name in names},
        "all_step_s": [round(s, 4) for s in seconds],
        "device_idle_gib": timed.idle_gib,
        "device_peak_gib": timed.peak_gib,
        "torch_peak_gib": records[-1].get("memory/torch_peak_gib"),
        "response_len": length,
        "abs_dlogp": mean_or_none([r.get("mismatch/abs_dlogp_mean") for r in records]),
        "micro_batch_tokens": config["micro_batch_tokens"],
        "gradient_checkpointing": config["gradient_checkpointing"],
        "device": env["gpus"][0] if on_gpu else "CPU",
        "versions": env["versions"],
        "git_commit": env["git_commit"],
    }  # fmt: skip


# ---- tables


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same or different columns as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = [names, *[[cell(row.get(name)) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in texts) for i in range(len(names))]
    lines = [" | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in texts]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def summary(results: Sequence[dict[str, Any]]) -> str:
    """The figures, and the seconds of each phase, as two tables."""
    rows = [
        {
            "model": r["model"], "rollouts": r["quant"], "GPUs": r.get("ranks", 1),
            "s/step": r["step_s"], "samples/s": r["samples_per_s"],
            "tokens/s": r["tokens_per_s"], "rollout tokens/s": r["rollout_tokens_per_s"],
            "MFU": percent(r["mfu"]), "neither": percent(r["neither_share"]), "device GiB": r["device_peak_gib"],
        }
        for r in results
    ]  # fmt: skip
    named = [{"model": r["model"], "rollouts": r["quant"], "GPUs": r.get("ranks", 1)} | r["phases_s"] for r in results]
    inside = ", ".join(f"{part} is part of {whole}" for part, whole in PART_OF.items())
    text = f"{table(rows)}\n\nSeconds of each phase ({inside}):\n\n{table(named)}"
    if any(r["phases_s"]["other"] < -0.01 * r["step_s"] for r in results):
        text += "\n\nThe phases are longer than their step: one lies inside another; add it to PART_OF in bench_step.py"
    return text


@contextlib.contextmanager
def work_folder(path: str | None) -> Iterator[Path]:
    """`path`, made if need be and kept; or a temporary folder."""
    if path:
        Path(path).mkdir(parents=True, exist_ok=True)
        yield Path(path).resolve()
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def write_json(out: str | None, result: dict[str, Any]) -> None:
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--quant", nargs="+", choices=QUANTIZATION, default=["none", "fp8"])
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=[1], help="processes, one per GPU; each number is a run"
    )
    parser.add_argument("--flags", default="", help="more flags of train.py, in one string")
    parser.add_argument("--peak-tflops", type=float, default=790.0)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    try:
        with work_folder(args.work) as folder:
            for work in make_workloads(args, folder):
                for quant, ranks in itertools.product(args.quant, args.ranks):
                    found = run_train(work, quant, folder, shlex.split(args.flags), args.peak_tflops, ranks)
                    results.append({"model": work.name, "quant": quant} | found)
                    write_json(args.out, {"arguments": vars(args), "results": results})
    except (BenchError, DataError) as error:
        sys.exit(f"error: {error}")
    print(f"\n{summary(results)}")


if __name__ == "__main__":
    main()
