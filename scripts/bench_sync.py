"""Time the weight sync beside what a user would run instead, in one process, and compare the bytes they leave behind.

For each shape and format vLLM's own model is built (its layers and kernels, without the engine's scheduler and CUDA
graphs, which a sync does not touch), and one random bf16 policy, both on the device. Then, with everything resident:

    ours     SyncPlan.sync
    +verify  the same and SyncPlan.verify behind it, as each training step has them
    eager    the sync's kernels launched one by one, not as the CUDA graph that it makes of them
    vllm     what LLM.reload_weights does: vLLM's layerwise reload from the same tensors
    loop     one parameter at a time, vLLM's quantizer into a new tensor, copied over the engine's
    torch    the plain torch reference of the sync
    floor    the plan's traffic at the speed of a large copy measured here

Before each comparison the engine's tensors are overwritten with a poison byte, so that nothing can be right by having
been right before. What it leaves out: the weights' way from another process or the host.

    python scripts/bench_sync.py                                       # Qwen2.5-1.5B shape, every format
    python scripts/bench_sync.py --shape qwen2.5-0.5b qwen3-32b --quant fp8 fp8-channel --out sync.json
    python scripts/bench_sync.py --shape tiny                          # the built-in model; a CPU is enough
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch and vLLM read at import)

# isort: split
import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from make_random_model import SHAPES, TOKENIZER, random_weights, save_config

import quant_formats as formats
from engine_options import QUANTIZATION, check_platform, quantization_options
from quant_sync import SyncPlan

POISON = 0x7F  # NaN in float8_e4m3fn; 0x7F7F is 3.4e38 in bf16
HEAD = "| shape | format | GB | ours | +verify | eager | vLLM reload | loop | torch | floor | of copy | different |"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(function: Callable[[], object], repeat: int) -> dict[str, float]:
    """Host milliseconds of a call that ends with the device idle (first; median, min, max of `repeat` others), and the
    most memory that one of the others held beyond what was there before, MiB."""
    times = []
    for i in range(repeat + 1):
        if i == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    rest = times[1:]
    result = {"first": times[0], "median": statistics.median(rest), "min": min(rest), "max": max(rest)}
    if torch.cuda.is_available():
        result["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {k: round(v, 4) for k, v in result.items()}


def copy_bandwidth() -> float:
    """GB/s of copying 4 GiB from and to device memory, read and written bytes together; the best of ten."""
    size = 2**32 if torch.cuda.is_available() else 2**28
    source, dest = (torch.ones(size, dtype=torch.uint8, device=device()) for _ in range(2))
    best = measure(lambda: dest.copy_(source), 10)["min"]
    return 2 * size / best / 1e6


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def vllm_model(folder: str, quant: str) -> tuple[torch.nn.Module, Callable[[dict[str, torch.Tensor]], None]]:
    """vLLM's model as its engine builds it, with dummy weights, and its reload."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    options = {"dtype": "bfloat16", "load_format": "dummy", "max_model_len": 256, "skip_tokenizer_init": True}
    args = EngineArgs(model=folder, enforce_eager=True, **options, **quantization_options(quant, ()))
    config = args.create_engine_config()
    if device() == "cpu":
        torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker has it
    with set_current_vllm_config(config):
        init = f"file://{tempfile.mkdtemp()}/init"
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        init_distributed_environment(1, 0, init, 0, backend)
        ensure_model_parallel_initialized(1, 1)
        model = get_model(vllm_config=config)

    def reload(weights: dict[str, torch.Tensor]) -> None:
        with set_current_vllm_config(config):
            initialize_layerwise_reload(model)
            model.load_weights(iter(weights.items()))
            finalize_layerwise_reload(model, config.model_config)

    return model, reload


def quantizer(fmt: formats.Format) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """vLLM's own function from a bf16 matrix to (weight, scale)."""
    from vllm import _custom_ops as ops
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    return {
        formats.FP8_TENSOR: lambda w: ops.scaled_fp8_quant(w),
        formats.FP8_CHANNEL: lambda w: ops.scaled_fp8_quant(w, use_per_token_if_dynamic=True),
        formats.FP8_BLOCK: lambda w: per_block_cast_to_fp8(w, [128, 128], False),
        formats.INT8: lambda w: ops.scaled_int8_quant(w)[:2],
    }[fmt]


def loop(plan: SyncPlan) -> None:
    """Parameter by parameter, as integrations do it that quantize one tensor and copy it."""
    for row in plan.rows:
        weights = [s.tensor for s in row.sources]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        if row.scale is None:
            row.dest[: weight.shape[0]].copy_(weight)
            continue
        q, scale = quantizer(row.format)(weight)
        row.dest.copy_(q)
        row.scale.copy_(scale.view_as(row.scale))


def eager(plan: SyncPlan) -> None:
    plan._flags.zero_()
    plan._resident.write()


def by_torch(plan: SyncPlan) -> None:
    for row in plan.rows:
        formats.write(row.format, row.dest, row.scale, [s.tensor for s in row.sources])


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's bytes in the order of its memory (a view)."""
    return torch.as_strided(tensor.data, (tensor.numel(),), (1,)).view(torch.uint8)


def checksum(view: torch.Tensor) -> int:
    """Of bytes and their places, exact in integers; a difference goes unnoticed once in 2^64."""
    total = 0
    for part in view.split(1 << 26):
        words = torch.nn.functional.pad(part, (0, -part.numel() % 8)).view(torch.int64)
        place = torch.arange(1, words.numel() + 1, device=view.device) * 0x9E3779B97F4A7C1
        total = total * 31 + int((words * place).sum())
    return total


def compare(plan: SyncPlan, model: torch.nn.Module, other: Callable[[], object]) -> dict[str, object]:
    """Bytes that `other` leaves in the engine and the sync leaves otherwise; where a copy of the engine does not fit,
    parameters whose checksums differ."""
    tensors = {n: raw(p) for n, p in model.named_parameters()}
    total = sum(v.numel() for v in tensors.values())
    fits = device() == "cpu" or total * 1.5 < torch.cuda.mem_get_info()[0]
    for view in tensors.values():
        view.fill_(POISON)
    other()
    theirs = {n: v.clone() if fits else checksum(v) for n, v in tensors.items()}
    for view in tensors.values():
        view.fill_(POISON)
    plan.sync()
    differ = {n: int((v != theirs[n]).sum()) if fits else int(checksum(v) != theirs[n]) for n, v in tensors.items()}
    return {
        "compared": total, "by": "bytes" if fits else "checksums of parameters", "different": sum(differ.values()),
        "in": [n for n, d in differ.items() if d][:10],
    }  # fmt: skip


def bench(shape: str, quant: str, policy: dict[str, torch.Tensor], repeat: int, bandwidth: float) -> dict[str, object]:
    """All figures of one shape and format."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model, reload = vllm_model(str(TOKENIZER) if shape == "tiny" else save_config(shape, folder), quant)
    addresses = {n: p.data_ptr() for n, p in model.named_parameters()}
    built = time.perf_counter()
    plan = SyncPlan.build(policy, model)
    plan.check_formats(quant)
    result: dict[str, object] = {
        "shape": shape, "quant": quant, "parameters": plan.bytes_read // 2,
        "formats": plan.formats(), "bytes_moved": plan.bytes_moved, "engine_bytes": plan.bytes_written,
        "plan_bytes": plan.bytes_held, "build_model_s": round(built - start, 1),
        "build_plan_s": round(time.perf_counter() - built, 2),
    }  # fmt: skip
    few = max(2, repeat // 5)
    result["ours"] = measure(plan.sync, repeat)
    result["with_verify"] = measure(lambda: (plan.sync(), plan.verify(turn=3)), repeat)
    result["verify"] = measure(lambda: plan.verify(turn=3), repeat)
    result["verified"] = plan.verify(full=True)
    result["verify_full"] = measure(lambda: plan.verify(full=True), few)
    if device() == "cuda":
        result["eager"] = measure(lambda: eager(plan), repeat)
    if device() == "cuda":  # vLLM's CPU build has no INT8 quantizer
        result["loop"] = measure(lambda: loop(plan), few)
        result["loop_bytes"] = compare(plan, model, lambda: loop(plan))
    result["torch"] = measure(lambda: by_torch(plan), few)
    result["torch_bytes"] = compare(plan, model, lambda: by_torch(plan))
    if quant != "int8":  # vLLM has no online INT8 to reload into
        result["vllm_bytes"] = compare(plan, model, lambda: reload(policy))
        result["vllm"] = measure(lambda: reload(policy), few)
    result["floor_ms"] = round(plan.bytes_moved / bandwidth / 1e6, 3)
    result["gb_per_s"] = round(plan.bytes_moved / result["ours"]["median"] / 1e6, 1)
    result["of_copy_bandwidth"] = round(result["gb_per_s"] / bandwidth, 3)
    result["addresses_changed"] = [n for n, p in model.named_parameters() if p.data_ptr() != addresses[n]]
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.new_empty(0)  # vLLM keeps its models; their memory is wanted for the next one
    return result


def line(r: dict) -> str:
    """A result as a line of the table; times in ms."""
    times = [
        f"{r[k]['median']:.2f}" if k in r else "-" for k in ("ours", "with_verify", "eager", "vllm", "loop", "torch")
    ]
    different = r.get("vllm_bytes", {}).get("different", "-")
    cells = [r["shape"], r["quant"], f"{r['bytes_moved'] / 1e9:.2f}", *times, f"{r['floor_ms']:.2f}"]
    cells += [f"{r['of_copy_bandwidth']:.0%}", str(different)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES, "tiny"], default=["qwen2.5-1.5b"])
    parser.add_argument("--quant", nargs="+", choices=QUANTIZATION, default=list(QUANTIZATION))
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    for quant in args.quant:
        if not check_platform(quant):
            import cpu_backend

            cpu_backend.prepare()
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    bandwidth = copy_bandwidth()
    name = torch.cuda.get_device_name() if device() == "cuda" else "CPU"
    report: dict[str, object] = {"device": name, "torch": torch.__version__, "copy_gb_per_s": round(bandwidth, 1)}
    report["results"] = results = []
    print(f"{name}, torch {torch.__version__}, copy {bandwidth:.0f} GB/s; milliseconds\n{HEAD}", flush=True)
    print("|---" * HEAD.count(" | ") + "|---|", flush=True)
    failed = []
    for shape in args.shape:
        policy = random_weights(shape, device())
        for quant in args.quant:
            held = sum(t.numel() for t in policy.values()) * 2
            if quant == "none" and device() == "cuda" and 2.6 * held > torch.cuda.mem_get_info()[1]:
                print(f"| {shape} | {quant} | left out: two bf16 copies do not fit |", flush=True)
                continue
            result = bench(shape, quant, policy, args.repeat, bandwidth)
            results.append(result)
            print(line(result), flush=True)
            if args.out:
                Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
            if result["addresses_changed"] or result.get("vllm_bytes", {}).get("different"):
                failed.append(f"{shape} {quant}")
            gc.collect()
            if device() == "cuda":
                torch.cuda.empty_cache()
        del policy
        gc.collect()
        if device() == "cuda":
            torch.cuda.empty_cache()
    if failed:
        sys.exit(f"error: the sync and vLLM's reload do not agree ({', '.join(failed)}); see vllm_bytes in --out")


if __name__ == "__main__":
    main()
