"""How fast the policy trains: tokens/s, model FLOP/s used (MFU), memory, and where an update's time goes.

A random model of a known shape, a batch of samples whose lengths are drawn once, packed into micro-batches as train.py
packs them, one update. MFU counts the model's own arithmetic, forward and backward (6 a weight and token, attention's
12 x hidden x context, the head for response tokens alone), not what is computed a second time; 100 % is --peak-tflops.

    python scripts/bench_trainer.py --shape qwen2.5-1.5b --out trainer.json
    python scripts/bench_trainer.py --shape qwen2.5-1.5b --padded          # rows padded to the longest, for comparison
    python scripts/bench_trainer.py --shape tiny --samples 64 --max-response-len 8    # a CPU will do
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import argparse
import json
import statistics
import time
from typing import Any

import torch
from make_random_model import SHAPES, TOKENIZER, random_model

import packing
from corrections import Correction
from loss import policy_loss
from policy import Batch, Policy, load_model


def draw_batch(args: argparse.Namespace, vocab: int, device: torch.device) -> Batch:
    """Samples with prompts of half to full --max-prompt-len, and responses whose lengths spread as real ones do: a
    quarter of the limit in the median, some cut at the limit."""
    g = torch.Generator().manual_seed(0)
    n, longest = args.samples, args.max_response_len
    prompts = torch.randint(max(1, args.max_prompt_len // 2), args.max_prompt_len + 1, (n,), generator=g).tolist()
    spread = torch.randn(n, generator=g).mul(0.8).exp() * longest / 4
    responses = [longest] * n if args.full_length else spread.clamp(1, longest).int().tolist()
    total = sum(responses)
    draw = lambda count: torch.randint(0, vocab, (count,), generator=g).tolist()  # noqa: E731
    return Batch(
        prompt_ids=[draw(k) for k in prompts],
        response_ids=[draw(k) for k in responses],
        rollout_logprobs=torch.full((total,), -2.0, device=device),
        advantages=torch.randn(total, generator=g).to(device),
        mask=torch.ones(total, dtype=torch.bool, device=device),
    )


def model_flops(config: Any, batch: Batch) -> float:
    """Forward and backward of one batch, without any recomputation."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = config.hidden_size * head_dim * (2 * heads + 2 * kv)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    lengths = [len(p) + len(r) for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)]
    dense = 6 * config.num_hidden_layers * layer * sum(lengths)
    context = 6 * config.num_hidden_layers * heads * head_dim * sum(n * n for n in lengths)  # causal: half of 12
    head = 6 * config.vocab_size * config.hidden_size * sum(map(len, batch.response_ids))
    return float(dense + context + head)


def padded_micro_batches(batch: Batch, budget: int) -> list[list[int]]:
    """As trainers without packing have them: sorted by length, rows times the longest at most `budget`."""
    lengths = [len(p) + len(r) for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)]
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def pad(batch: Batch) -> Batch:
    """Responses lengthened to the longest sequence of the micro-batch; what is added is not trained on."""
    width = max(len(p) + len(r) for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True))
    added = [width - len(p) - len(r) for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)]
    lengths = [len(r) for r in batch.response_ids]

    def stretch(tensor: torch.Tensor) -> torch.Tensor:
        pieces = zip(tensor.split(lengths), added, strict=True)
        return torch.cat([x for piece, more in pieces for x in (piece, piece.new_zeros(more))])

    return Batch(
        batch.prompt_ids, [r + [0] * more for r, more in zip(batch.response_ids, added, strict=True)],
        stretch(batch.rollout_logprobs), stretch(batch.advantages), stretch(batch.mask),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="qwen2.5-1.5b")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--max-prompt-len", type=int, default=256)
    parser.add_argument("--max-response-len", type=int, default=1024)
    parser.add_argument("--full-length", action="store_true", help="every response has the full length")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile each layer, train.py's default on a GPU")
    parser.add_argument(
        "--liger", action="store_true", help="Liger's kernels for norms, SwiGLU and RoPE (liger-kernel)"
    )
    parser.add_argument("--padded", action="store_true", help="rows padded to their micro-batch's longest")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, default=790.0)
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    packing.register()
    tiny = args.shape == "tiny"
    model = load_model(str(TOKENIZER), device) if tiny else random_model(args.shape, str(device))
    model.set_attn_implementation(packing.ATTENTION)
    if args.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False)
    policy = Policy(model, lr=1e-6, checkpointing=args.gradient_checkpointing, compile=args.compile)
    batch = draw_batch(args, model.config.vocab_size, device)
    budget = args.micro_batch_tokens
    rows = padded_micro_batches(batch, budget) if args.padded else batch.micro_batches(budget)
    total = int(batch.mask.sum())

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def update() -> tuple[float, float]:
        """Seconds of the forward and backward passes, and of the optimizer."""
        start = clock()
        for chosen in rows:
            micro = pad(batch.select(chosen)) if args.padded else batch.select(chosen)
            logprobs, _ = policy.logprobs(micro)
            loss, _ = policy_loss(
                logprobs, logprobs.detach(), micro.rollout_logprobs, micro.advantages, micro.mask, total,
                clip_low=0.2, clip_high=0.28, dual_clip=None, correction=Correction(),
            )  # fmt: skip
            loss.backward()
        middle = clock()
        policy.update()
        return middle - start, clock() - middle

    update()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [update() for _ in range(args.repeat)]
    passes, optimizer = (statistics.median(t) for t in zip(*times, strict=True))
    flops = model_flops(model.config, batch)
    tokens = sum(len(p) + len(r) for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True))
    result = {
        "device": torch.cuda.get_device_name() if cuda else "CPU", "torch": torch.__version__, **vars(args),
        "micro_batches": len(rows), "tokens": tokens, "response_tokens": total,
        "passes_s": passes, "optimizer_s": optimizer, "tokens_per_s": tokens / (passes + optimizer),
        "tflops_per_s": flops / passes / 1e12, "mfu_passes": flops / passes / 1e12 / args.peak_tflops,
        "mfu_update": flops / (passes + optimizer) / 1e12 / args.peak_tflops,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
