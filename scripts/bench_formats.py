"""What each rollout format costs and gives on a real model: weight error, mismatch with the policy, speed, size.

Each format gets a process of its own with vLLM's engine and the bf16 HF policy; the sync fills the engine, it samples,
and the policy scores the same tokens. Engines may start at the same time (--jobs), but only one of them is measured at
a time. SQNR is 10 log10(sum w^2 / sum (w - w')^2) over all weights of a kind, in dB; the other figures are those of
docs/metrics.md, over every sampled token. "+kv8" is the same format with an FP8 KV cache.

    python scripts/bench_formats.py --model Qwen/Qwen2.5-0.5B-Instruct --jobs 4 --out formats.json
    python scripts/bench_formats.py --formats none fp8 int8 --samples 4 --prompts 32   # built-in model; a CPU will do
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch and vLLM read at import)

# isort: split
import argparse
import fcntl
import json
import math
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from config import TINY_MODEL
from data import encode_prompts, load_data
from engine_options import QUANTIZATION
from loss import mismatch_metrics, mismatch_sums
from policy import Batch, Policy, load_model
from quant_formats import BLOCK, FP8_BLOCK
from quant_sync import Row, SyncPlan
from rollout import Engine

FORMATS = [*QUANTIZATION, *(f"{q}+kv8" for q in QUANTIZATION)]
SHOWN = ("mismatch/abs_dlogp_mean", "mismatch/kl_k3", "mismatch/ess")


def dequantized(row: Row) -> torch.Tensor:
    """What the engine computes with, fp32 [O, I]."""
    weight = row.dest.float()
    if row.format is FP8_BLOCK:
        scale = row.scale.repeat_interleave(BLOCK, 0)[: weight.shape[0]]
        return weight * scale.repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    return weight * row.scale


def sqnr(plan: SyncPlan) -> dict[str, float]:
    """dB by kind of layer (qkv_proj, o_proj, ...)."""
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    for row in plan.rows:
        if row.scale is None:
            continue
        kind = row.name.split(".")[-2]
        weight = torch.cat([s.tensor for s in row.sources]).float()
        signal[kind] = signal.get(kind, 0.0) + float(weight.double().square().sum())
        noise[kind] = noise.get(kind, 0.0) + float((weight - dequantized(row)).double().square().sum())
    return {kind: 10 * math.log10(signal[kind] / noise[kind]) for kind in signal}


def measure(args: argparse.Namespace) -> dict[str, object]:
    """The figures of one format, in this process."""
    from transformers import AutoTokenizer

    quant, _, kv = args.formats[0].partition("+")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = args.data or ("arithmetic" if args.model == TINY_MODEL else "gsm8k")
    examples, _ = load_data(data, None, 0)
    prompts, _ = encode_prompts(examples, tokenizer, args.max_prompt_len, {})
    prompts = prompts[: args.prompts]
    start = time.perf_counter()
    engine = Engine(
        args.model, tokenizer=tokenizer, quant=quant, max_model_len=args.max_prompt_len + args.max_response_len,
        max_num_seqs=args.max_num_seqs, kv_cache_bytes=int(args.kv_cache_gib * 2**30), memory_fraction=0.1,
        kv_cache_dtype="fp8" if kv else "auto",
    )  # fmt: skip
    started = time.perf_counter() - start
    model = load_model(args.model, device)
    plan = SyncPlan.build(model, engine.model)
    plan.check_formats(quant)
    plan.sync()
    plan.verify(full=True)
    engine.publish(0)
    policy = Policy(model, lr=0.0, weight_decay=0.0, warmup_steps=1, max_grad_norm=1.0, temperature=1.0,
                    checkpointing=False)  # fmt: skip

    def generate() -> list:
        return engine.generate([p.token_ids for p in prompts], n=args.samples, max_tokens=args.max_response_len)

    with open(args.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generate()  # compiles what is compiled late
        start = time.perf_counter()
        groups = generate()
        seconds = time.perf_counter() - start
        samples = [s for group in groups for s in group]
        tokens = sum(len(s.token_ids) for s in samples)
        logprobs = torch.tensor([x for s in samples for x in s.rollout_logprobs], device=device)
        batch = Batch(
            prompt_ids=[p.token_ids for p, group in zip(prompts, groups, strict=True) for _ in group],
            response_ids=[s.token_ids for s in samples],
            rollout_logprobs=logprobs,
            advantages=torch.zeros_like(logprobs),
            mask=torch.ones_like(logprobs, dtype=torch.bool),
        )
        old = policy.compute_logprobs(batch, args.micro_batch_tokens)
    return {
        "format": args.formats[0],
        "model": args.model,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "engine_start_s": started,
        "engine_weight_bytes": plan.bytes_written,
        "sqnr_db": sqnr(plan),
    } | mismatch_metrics(mismatch_sums(old, logprobs, batch.mask, 2.0))


def line(r: dict) -> str:
    """A result as a line of the table."""
    quality = " ".join(f"{kind} {db:.1f}" for kind, db in r["sqnr_db"].items()) or "-"
    cells = [r["format"], f"{r['engine_weight_bytes'] / 2**20:.0f}", quality]
    cells += [f"{r[key]:.5f}" for key in SHOWN] + [f"{r['tokens_per_s']:.0f}"]
    return f"| {' | '.join(cells)} |"


def in_its_own_process(name: str, args: argparse.Namespace, folder: str) -> dict | str:
    """The result, or what the process said before it failed."""
    out, log = Path(folder) / f"{name}.json", Path(folder) / f"{name}.log"
    command = [sys.executable, __file__, "--formats", name, "--lock", f"{folder}/lock", "--child", str(out)]
    passed = {
        k: v for k, v in vars(args).items() if k not in ("formats", "jobs", "out", "lock", "child") and v is not None
    }
    for key, value in passed.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code == 0:
        return json.loads(out.read_text())
    return "\n".join(log.read_text().splitlines()[-25:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY_MODEL)
    parser.add_argument("--data", help="as train.py's --data (default: gsm8k; the built-in model's own sums)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*QUANTIZATION, "fp8+kv8"])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-prompt-len", type=int, default=512)
    parser.add_argument("--max-response-len", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--kv-cache-gib", type=float, default=4.0)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--jobs", type=int, default=1, help="engines that start at the same time")
    parser.add_argument("--out", help="write the figures as JSON")
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        Path(args.child).write_text(json.dumps(measure(args)))
        return
    print(
        "| format | MiB | SQNR, dB | mean abs dlogp | k3 | ESS | tokens/s |\n|---|---|---|---|---|---|---|", flush=True
    )
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda name: in_its_own_process(name, args, folder), args.formats))
    failed = [f"{name}:\n{r}" for name, r in zip(args.formats, results, strict=True) if isinstance(r, str)]
    done = [r for r in results if isinstance(r, dict)]
    if args.out:
        Path(args.out).write_text(json.dumps(done, indent=1) + "\n")
    print("\n".join(map(line, done)), flush=True)
    if failed:
        sys.exit("error: " + "\n".join(failed))


if __name__ == "__main__":
    main()
