"""Prove on this GPU that an engine's weights are the policy's: after a sync, a sleep at level 2, under CUDA graphs.

One engine, one format. Every check prints a line; the first that fails ends the script with status 1.

    coverage   all memory that sleep level 2 drops is written by the sync, or restored by vLLM or by Engine.wake
    sentinel   asleep and awake again, that memory is filled with NaN; a sync leaves the same tokens as before
    addresses  no tensor moved, so that captured CUDA graphs go on reading the right ones
    graphs     graphs captured before a change of the policy sample from the changed one: log-probs follow HF's
    scales     the KV cache's scales are what they were

    python scripts/check_engine.py --quant fp8
    python scripts/check_engine.py --quant int8 --kv-cache-dtype fp8 --model Qwen/Qwen2.5-0.5B-Instruct
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch and vLLM read at import)

# isort: split
import argparse

import torch

import packing
from config import TINY_MODEL
from engine_options import QUANTIZATION, EngineError
from policy import load_model
from quant_sync import SyncPlan
from rollout import Engine

SCALES = ("_q_scale", "_k_scale", "_v_scale")


def passed(name: str, what: str) -> None:
    print(f"ok    {name:<10}{what}", flush=True)


def require(condition: bool, name: str, what: str) -> None:
    if not condition:
        sys.exit(f"FAILED {name}: {what}")


def poison(engine: Engine) -> int:
    """NaN (0xFF: in bf16, fp32 and float8_e4m3fn; -1 in int8) into all that the sync must write; the bytes."""
    from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary

    library, blocks = CudaRTLibrary(), engine.weight_blocks()
    for address, size in blocks:
        library.cudaMemset(address, 0xFF, size)
    torch.cuda.synchronize()
    return sum(size for _, size in blocks)


def gap(engine: Engine, model: torch.nn.Module, prompts: list[list[int]]) -> float:
    """Mean |log-prob of the engine - log-prob of HF's model| of sampled tokens."""
    groups = engine.generate(prompts, n=4, max_tokens=12)
    total, count = 0.0, 0
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            inputs = packing.model_inputs([prompt + sample.token_ids], torch.device("cuda"))
            logprobs = model(**inputs).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            ours = logprobs.gather(1, inputs["input_ids"][0, len(prompt) :, None])[:, 0]
            total += float((ours - torch.tensor(sample.rollout_logprobs, device="cuda")).abs().sum())
            count += len(sample.token_ids)
    return total / count


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY_MODEL)
    parser.add_argument("--quant", choices=QUANTIZATION, default="fp8")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--limit", type=float, default=0.25, help="largest mean |dlogp| that counts as the same policy")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: sleep mode and CUDA graphs need a GPU")
    engine = Engine(
        args.model, tokenizer=None, quant=args.quant, max_model_len=128, max_num_seqs=64, kv_cache_bytes=2**28,
        sleep_level=2, memory_fraction=0.2, kv_cache_dtype=args.kv_cache_dtype,
    )  # fmt: skip
    model = load_model(args.model, torch.device("cuda"))
    plan = SyncPlan.build(model, engine.model)
    plan.check_formats(args.quant)
    covered = plan.check_coverage(engine.weight_blocks())
    others = sum(size for size, _ in engine._others.values())
    passed("coverage", f"{covered / 2**20:.1f} MiB in {len(engine.weight_blocks())} tensors; beside them buffers, and "
           f"{others / 2**20:.1f} MiB in {len(engine._others)} others that are restored")  # fmt: skip

    prompts = [[1, 260 + i, 265, 270 + i, 2] for i in range(16)]

    def greedy() -> list[list[int]]:
        return [g[0].token_ids for g in engine.generate(prompts, n=1, max_tokens=12, greedy=True)]

    def scales() -> list[float]:
        found = [getattr(m, s, None) for m in engine.model.modules() for s in SCALES]
        return [float(t) for t in found if t is not None]

    plan.sync()
    plan.verify(full=True)
    engine.publish(0)
    before, kv_scales = greedy(), scales()
    addresses = [t.data_ptr() for t in [*engine.model.parameters(), *engine.model.buffers()]]
    engine.sleep()
    try:
        greedy()
        require(False, "sentinel", "an engine without weights generated")
    except EngineError:
        pass
    engine.wake("weights")
    size = poison(engine)
    plan.sync()
    plan.verify(full=True)
    engine.publish(1)
    engine.wake("kv_cache")
    require(greedy() == before, "sentinel", "other tokens after sleep level 2 and a sync")
    passed("sentinel", f"{size / 2**20:.1f} MiB of NaN overwritten; {len(before)} greedy samples as before")
    now = [t.data_ptr() for t in [*engine.model.parameters(), *engine.model.buffers()]]
    require(now == addresses, "addresses", "a tensor moved")
    passed("addresses", f"{len(now)} tensors where they were")
    require(scales() == kv_scales and set(kv_scales) <= {1.0}, "scales", f"{kv_scales} became {scales()}")
    passed("scales", f"{len(kv_scales)} of the KV cache, all 1")

    first = gap(engine, model, prompts)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            noise = torch.randn(parameter.shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
            parameter.add_(noise * parameter.float().std() * 0.5)
    stale = gap(engine, model, prompts)
    plan.sync()
    plan.verify(full=True)
    engine.publish(2)
    fresh = gap(engine, model, prompts)
    require(max(first, fresh) < args.limit < stale, "graphs", f"|dlogp| {first:.4f}, {stale:.4f} stale, {fresh:.4f}")
    passed("graphs", f"mean |dlogp| {first:.4f}; policy changed: {stale:.4f} before the sync, {fresh:.4f} after it")


if __name__ == "__main__":
    main()
