"""Where the time of a sleep goes: sleep, wake for the weights, sync, wake for the KV cache, and what in it is vLLM's.

The engine is rollout.Engine with random weights of a known shape, at sleep level 2 (the weights are dropped; the sync
writes all of them). Both ways of sleeping are timed in one process: vLLM's own call, and Engine.sleep, which keeps the
garbage collector from searching the whole heap. The parts of vLLM's call are timed by wrapping its functions here.

    python scripts/bench_sleep.py --shape qwen2.5-1.5b --out sleep.json        # GPU only
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch and vLLM read at import)

# isort: split
import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from make_random_model import SHAPES, random_weights, save_config

from engine_options import QUANTIZATION
from quant_sync import SyncPlan
from rollout import Engine


class Stopwatch:
    """Milliseconds by name, a list for each cycle."""

    def __init__(self):
        self.times: dict[str, list[float]] = {}
        self.parts: dict[str, float] = {}

    def run(self, name: str, function: Callable[[], object]) -> None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        self.times.setdefault(name, []).append((time.perf_counter() - start) * 1e3)

    def wrap(self, owner: object, attribute: str, name: str) -> None:
        """Add the time of every call of owner.attribute to the present cycle's figure."""
        inner = getattr(owner, attribute)

        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.parts[name] = self.parts.get(name, 0.0) + (time.perf_counter() - start) * 1e3

        setattr(owner, attribute, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--quant", choices=QUANTIZATION, default="fp8")
    parser.add_argument("--kv-cache-gib", type=float, default=16.0)
    parser.add_argument("--cycles", type=int, default=6)
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: sleep mode needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            save_config(args.shape, folder), tokenizer=None, quant=args.quant, max_model_len=1024, max_num_seqs=256,
            kv_cache_bytes=int(args.kv_cache_gib * 2**30), sleep_level=2, memory_fraction=0.5,
        )  # fmt: skip
    policy = random_weights(args.shape, "cuda")
    plan = SyncPlan.build(policy, engine.model)
    plan.sync()
    plan.verify(full=True)
    engine.publish(0)
    from vllm.device_allocator import cumem

    watch = Stopwatch()
    watch.wrap(cumem, "unmap_and_release", "unmap")
    watch.wrap(cumem, "create_and_map", "map")
    watch.wrap(gc, "collect", "garbage collection")
    watch.wrap(torch.cuda, "empty_cache", "empty_cache")
    watch.wrap(engine.llm, "reset_prefix_cache", "reset_prefix_cache")
    prompts = [[i % 1000 + 1] * 64 for i in range(64)]
    parts: dict[str, list[float]] = {}

    def note(phase: str) -> None:
        for name, value in watch.parts.items():
            parts.setdefault(f"{phase}: {name}", []).append(value)
        watch.parts.clear()

    def by_vllm() -> None:
        engine.llm.sleep(level=2)
        engine.asleep, engine.version = True, None

    def by_us() -> None:
        engine.sleep()

    for way, sleep in (("vLLM's sleep(2)", by_vllm), ("Engine.sleep", by_us)):
        for cycle in range(args.cycles):
            engine.generate(prompts, n=4, max_tokens=16)
            watch.parts.clear()
            free = torch.cuda.mem_get_info()[0]
            watch.run(way, sleep)
            note(way)
            freed = torch.cuda.mem_get_info()[0] - free
            watch.run(f"after {way}: wake weights", lambda: engine.wake("weights"))
            note(f"after {way}: wake weights")
            watch.run(f"after {way}: sync", plan.sync)
            watch.run(f"after {way}: verify", lambda c=cycle: plan.verify(turn=c))
            engine.publish(cycle + 1)
            watch.parts.clear()
            watch.run(f"after {way}: wake KV cache", lambda: engine.wake("kv_cache"))
            note(f"after {way}: wake KV cache")
    result = {
        "device": torch.cuda.get_device_name(), "shape": args.shape, "quant": args.quant,
        "kv_cache_gib": args.kv_cache_gib, "freed_gib": freed / 2**30, "objects": len(gc.get_objects()),
        "first_ms": {k: round(v[0], 2) for k, v in (watch.times | parts).items()},
        "median_ms": {k: round(statistics.median(v[1:]), 2) for k, v in (watch.times | parts).items()},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
