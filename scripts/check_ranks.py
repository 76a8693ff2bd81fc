"""One training step on several GPUs against the same step on one: loss, gradient norm, gradients and weights after it.

Samples are random tokens, equal everywhere; there is no engine. The policy is bf16 with fp32 masters, as in a run. The
gradients of micro-batches are bf16 and are summed in another order and other groups by several ranks, so they agree as
two bf16 computations do: the relative distance |a - b| / |b| of each is printed, and held to TOLERANCE.

--repeat makes the step so many times more and prints the seconds of each; --profile makes one under torch's profiler:
how long the first rank's GPU was at work, the longest times in which it waited, the dearest operators of both sides.

    python scripts/check_ranks.py --shape qwen2.5-0.5b --out one.pt
    torchrun --standalone --nproc-per-node 2 scripts/check_ranks.py --shape qwen2.5-0.5b --compare one.pt
    torchrun ... --no-reshard-after-forward                                       # as train.py does where there is room
    torchrun ... --no-reshard-after-forward --prompts 128 --micro-batch-tokens 16384 --repeat 3 --profile
    python scripts/check_ranks.py --shape tiny --out one.pt                                         # a CPU will do
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from make_random_model import SHAPES, random_model

import packing
import train
from config import TINY_MODEL, Args
from data import Example, Prompt
from policy import Policy, load_model
from ranks import Ranks
from rollout import Group, Sample
from sharding import LogprobModel, shard

TOLERANCE = 0.02  # relative, of gradients and of the change of weights; of loss and gradient norm a tenth of it


def random_groups(vocab: int, prompts: int, samples: int, prompt_len: int, response_len: int) -> list[Group]:
    """Groups of random tokens with lengths from a half to the whole, rewards by turns, and log-probs near uniform."""
    g = torch.Generator().manual_seed(0)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(longest // 2, longest + 1, (1,), generator=g))
        return torch.randint(vocab, (length,), generator=g).tolist()

    groups = []
    for n in range(prompts):
        prompt = Prompt(Example(f"made:{n}", [{"role": "user", "content": "?"}], "1", "number", {}), ids(prompt_len))
        responses = [ids(response_len) for _ in range(samples)]
        drawn = [Sample(r, (-12 + torch.randn(len(r), generator=g)).tolist(), "stop", "") for r in responses]
        groups.append(Group(prompt, drawn, 0, [float(i % 2) for i in range(samples)]))
    return groups


def step(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """What a step of this world comes to; tensors on the first rank's host."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    packing.register()
    torch.manual_seed(0)
    if args.model or args.shape == "tiny":
        model = load_model(args.model or TINY_MODEL, device)
    else:
        model = random_model(args.shape, device.type)
    model.set_attn_implementation(packing.ATTENTION)
    flags = Args(
        prompts_per_step=args.prompts, samples_per_prompt=args.samples, max_prompt_len=args.prompt_len,
        max_response_len=args.response_len, lr=1e-5, warmup_steps=0, log_samples=0, save_every=0,
        micro_batch_tokens=max(args.micro_batch_tokens, args.prompt_len + args.response_len),
    ).resolved()  # fmt: skip
    root = LogprobModel(model, 1.0)
    if ranks.world == 1:
        model.to(device)
    else:
        shard(root, ranks, device, args.reshard_after_forward)
    compiled = device.type == "cuda"
    policy = Policy(
        model, lr=flags.lr, weight_decay=0.0, compile=compiled, ranks=ranks, root=root,
        reshard=args.reshard_after_forward,
    )  # fmt: skip
    compared = args.out or args.compare
    before = weights_of(policy) if compared else {}
    gradients: dict[str, torch.Tensor] = {}
    update = policy.optimizer.step

    def seen(lr: float, scale: torch.Tensor | None = None) -> None:
        for name, total in zip(policy._names, policy.optimizer.grads, strict=True):
            gathered = ranks.gather(total.cpu()) if args.compare and ranks.world > 1 else [total.cpu()]
            gradients[name] = torch.cat(gathered) if ranks.first else gathered[0][:0]
        update(lr, scale)

    if compared:
        policy.optimizer.step = seen
    groups = random_groups(model.config.vocab_size, args.prompts, args.samples, args.prompt_len, args.response_len)
    start = time.perf_counter()
    metrics = train.train_step(policy, groups, flags)
    seconds = time.perf_counter() - start
    after = weights_of(policy) if compared else {}
    policy.optimizer.step = update

    def again() -> float:
        start = time.perf_counter()
        train.train_step(policy, groups, flags)  # it ends with figures on the host: the GPU is done
        return time.perf_counter() - start

    for i in range(args.repeat):
        took = again()
        if ranks.first:
            print(f"once more, {i + 1}: {took:.3f} s", flush=True)
    if args.profile:
        profile(again, ranks)
    return {
        "metrics": metrics, "gradients": gradients, "before": before, "after": after, "seconds": seconds
    }  # fmt: skip


def profile(call: Callable[[], float], ranks: Ranks) -> None:
    """`call` on all ranks, and what the first one's took."""
    if not ranks.first:
        call()
        return
    with torch.profiler.profile() as profiler:
        seconds = call()
    on_gpu = [e.time_range for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy, waits, end = 0.0, [], None
    for span in sorted(on_gpu, key=lambda span: span.start):
        if end is not None and span.start > end:
            waits.append(span.start - end)
        busy += max(0.0, span.end - max(span.start, end or span.start))
        end = max(span.end, end or span.end)
    longest = ", ".join(f"{wait / 1000:.1f}" for wait in sorted(waits, reverse=True)[:20])
    gpu = f"GPU at work {busy / 1e6:.3f} s; its longest waits, ms: {longest}" if on_gpu else "no GPU"
    print(f"profiled: {seconds:.3f} s; {gpu}")
    totals = profiler.key_averages()
    for key in ("self_cpu_time_total", *(["self_device_time_total"] if on_gpu else [])):
        print(totals.table(sort_by=key, row_limit=15, max_name_column_width=50))


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    """All of them, copied to the host of the first rank."""
    if policy.ranks.world > 1:
        return policy._whole_state()
    return {name: t.to("cpu", copy=True) for name, t in policy.model.state_dict().items()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def compare(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Prints the distances; returns what is beyond the tolerance."""
    wrong = []
    for key in ("train/loss", "train/grad_norm", "train/tokens", "train/entropy", "mismatch/abs_dlogp_mean"):
        a, b = found["metrics"][key], expected["metrics"][key]
        off = abs(a - b) / max(abs(b), 1e-12)
        print(f"{key:<26} {a:.8g}  on one: {b:.8g}  relative difference {off:.2e}")
        # The loss is a sum of terms of both signs near zero: it is measured against the gradient norm's scale instead.
        limit = TOLERANCE / 10 if key != "train/loss" else TOLERANCE / 10 / max(abs(b), 1e-12)
        wrong += [key] if off > limit else []
    far = {n: distance(g, expected["gradients"][n]) for n, g in found["gradients"].items()}
    worst = max(far, key=far.get)
    print(
        f"gradients: relative distance, median {sorted(far.values())[len(far) // 2]:.2e}, most {far[worst]:.2e} {worst}"
    )
    wrong += [f"gradient of {n}" for n, d in far.items() if d > TOLERANCE]
    same = sum(int((found["after"][n] == t).sum()) for n, t in expected["after"].items())
    total = sum(t.numel() for t in expected["after"].values())
    moved = sum(int((t != expected["before"][n]).sum()) for n, t in expected["after"].items())
    print(f"weights after the update: {same / total:.6%} equal, bit for bit; {moved / total:.2%} had changed")
    if not all(torch.equal(t, found["before"][n]) for n, t in expected["before"].items()):
        wrong.append("the weights before the step")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=[*SHAPES, "tiny"])
    which.add_argument("--model", help="folder or Hub name")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--response-len", type=int, default=256)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--reshard-after-forward", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeat", type=int, default=0, help="make the step so many times more, and time each")
    parser.add_argument("--profile", action="store_true", help="once more, under torch's profiler")
    parser.add_argument("--out", type=Path, help="write this world's step")
    parser.add_argument("--compare", type=Path, help="compare with a step that --out wrote")
    args = parser.parse_args()
    ranks = Ranks.start()
    found = step(args, ranks)
    wrong: list[str] = []
    if ranks.first:
        tokens, seconds = found["metrics"]["train/tokens"], found["seconds"]
        print(f"{args.shape or args.model}, {ranks.world} rank(s): step of {tokens:.0f} tokens, {seconds:.1f} s")
        if args.out:
            torch.save(found, args.out)
        if args.compare:
            wrong = compare(found, torch.load(args.compare, weights_only=True))
            more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            print(f"beyond the tolerance: {', '.join(wrong[:5])}{more}" if wrong else "within the tolerance")
    ranks.finish()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
