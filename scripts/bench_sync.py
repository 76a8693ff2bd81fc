"""Time the weight sync beside vLLM's own reload in one process, and compare bit by bit what the two leave behind.

Both read the same bf16 weights, already on the device, and write the same engine. Before each comparison the engine's
tensors are overwritten with a poison byte, so that nothing can be right by having been right before. What it leaves
out: the weights' way from another process or the host.

    python scripts/bench_sync.py                                   # Qwen2.5-1.5B shape
    python scripts/bench_sync.py --shape qwen3-32b --out sync.json
    python scripts/bench_sync.py --shape tiny                      # the built-in model; a CPU is enough
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch and vLLM read at import)

# isort: split
import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from make_random_model import SHAPES, TOKENIZER, random_model, shape_config

from policy import load_model
from quant_sync import SyncPlan
from rollout import Engine

POISON = 0x7F  # NaN in float8_e4m3fn; 0x7F7F is NaN in bf16


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object], repeat: int) -> dict[str, float]:
    """Host milliseconds of a call that ends with the device idle: first call, then median, min and max of `repeat`."""
    times = []
    for _ in range(repeat + 1):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    rest = times[1:]
    return {"first": times[0], "median": statistics.median(rest), "min": min(rest), "max": max(rest)}


def engine_bytes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's memory as bytes, in storage order (a view)."""
    views = {}
    for name, p in model.named_parameters():
        data = p.data if p.data.is_contiguous() else p.data.t()
        views[name] = data.reshape(-1).view(torch.uint8)
    return views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="qwen2.5-1.5b")
    parser.add_argument("--quant", choices=["fp8", "none"], default="fp8")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if args.shape != "tiny":
            shape_config(args.shape).save_pretrained(folder)
            config = json.loads((Path(folder) / "config.json").read_text())
            family = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
            config["architectures"] = [family[config["model_type"]]]
            (Path(folder) / "config.json").write_text(json.dumps(config))
        engine = Engine(
            str(TOKENIZER) if args.shape == "tiny" else folder,
            tokenizer=None,
            quant=args.quant,
            max_model_len=256,
            max_num_seqs=64,
            kv_cache_bytes=2**30,
            memory_fraction=0.5,
        )
    model = (
        load_model(str(TOKENIZER), torch.device(device)) if args.shape == "tiny" else random_model(args.shape, device)
    )
    state = model.state_dict()
    plan = SyncPlan.build(state, engine.model)
    addresses = {n: p.data_ptr() for n, p in engine.model.named_parameters()}

    def reload() -> None:
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(state.items())})

    def poison() -> None:
        for view in engine_bytes(engine.model).values():
            view.fill_(POISON)

    results: dict[str, object] = {
        "shape": args.shape,
        "quant": args.quant,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "engine_parameters": len(addresses),
        "formats": plan.formats(),
    }
    poison()
    reload()
    theirs = {n: v.clone() for n, v in engine_bytes(engine.model).items()}
    poison()
    plan.sync()
    differ = {n: int((v != theirs[n]).sum()) for n, v in engine_bytes(engine.model).items()}
    results["bytes_compared"] = sum(v.numel() for v in theirs.values())
    results["bytes_different"] = sum(differ.values())
    results["parameters_different"] = [n for n, d in differ.items() if d]
    del theirs
    results["verified"] = plan.verify(full=True)
    for name, function in (
        ("sync_ms", plan.sync),
        ("vllm_reload_ms", reload),
        ("verify_ms", lambda: plan.verify(turn=0)),
        ("verify_full_ms", lambda: plan.verify(full=True)),
    ):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        results[name] = milliseconds(function, args.repeat)
        if device == "cuda":
            results[name.replace("_ms", "_extra_mib")] = (torch.cuda.max_memory_allocated() - before) / 2**20
    moved = [n for n, p in engine.model.named_parameters() if p.data_ptr() != addresses[n]]
    results["addresses_changed"] = moved
    results["sync_gb_per_s"] = (plan.bytes_read + plan.bytes_written) / results["sync_ms"]["median"] / 1e6
    print(json.dumps(results, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=2) + "\n")
    if results["bytes_different"] or moved:
        sys.exit("error: the sync and vLLM's reload do not agree; see bytes_different and addresses_changed above")


if __name__ == "__main__":
    main()
