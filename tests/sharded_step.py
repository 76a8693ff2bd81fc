"""One training step of small models as `world` ranks, for test_sharding.py: rank 0 writes what came out to a file.

python tests/sharded_step.py OUT CASE...     (RANK, WORLD_SIZE and so on as torchrun sets them; alone: a world of one)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401

# isort: split
import copy

import torch
from small_models import CONFIGS, V
from transformers import AutoModelForCausalLM

import lora
import packing
import train
from config import Args
from data import Example, Prompt
from policy import Policy
from ranks import Ranks
from rollout import Group, Sample
from sharding import LogprobModel, shard, whole
from weight_sources import is_sharded

CASES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "recomputed": {"gradient_checkpointing": True},
    "updates": {"updates_per_batch": 3},
    "sequence-tis": {"correction": "sequence-tis", "loss_reduction": "prompt-mean"},
    "offloaded": {"offload_optimizer": True},
    "bf16-moments": {"optimizer_states": "bf16"},
    "lora": {"lora_rank": 3},
    "few": {},  # fewer samples than ranks
    "clipped": {"max_grad_norm": 0.01},
    "whole": {"reshard_after_forward": False},
    "whole-updates": {"reshard_after_forward": False, "updates_per_batch": 3, "gradient_checkpointing": True},
    "whole-lora": {"reshard_after_forward": False, "lora_rank": 3},
}


def groups_of(count: int) -> list[Group]:
    g = torch.Generator().manual_seed(3)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(V, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()

    groups = []
    for n in range(count):
        prompt = Prompt(Example(f"made:{n}", [{"role": "user", "content": "?"}], "1", "number", {}), ids(1, 6))
        responses = [ids(1, 9) for _ in range(3)]
        samples = [Sample(r, (-torch.rand(len(r), generator=g) * 8).tolist(), "stop", "") for r in responses]
        groups.append(Group(prompt, samples, 0, [1.0, 0.0, float(n % 2)]))
    return groups


def step(case: str, ranks: Ranks) -> dict:
    flags = CASES[case]
    args = Args(
        prompts_per_step=6, samples_per_prompt=3, max_prompt_len=16, max_response_len=8, micro_batch_tokens=24,
        lr=1e-3, warmup_steps=0, log_samples=3, **flags,
    ).resolved()  # fmt: skip
    torch.manual_seed(0)
    packing.register()
    config = copy.deepcopy(CONFIGS.get(case, CONFIGS["qwen2"]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=packing.ATTENTION)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(std=0.15)
    if args.lora is not None:
        lora.add_adapters(model, args.lora)
    root = LogprobModel(model, 0.9)
    if ranks.world > 1:
        shard(root, ranks, torch.device("cpu"), args.reshard_after_forward is not False)
    policy = Policy(
        model, lr=1e-3, temperature=0.9, checkpointing=bool(args.gradient_checkpointing),
        max_grad_norm=args.max_grad_norm, optimizer_states=args.optimizer_states,
        offload_optimizer=bool(args.offload_optimizer), ranks=ranks, root=root,
        reshard=args.reshard_after_forward is not False,
    )  # fmt: skip
    groups = groups_of(1 if case == "few" else 6)
    gradients: list[torch.Tensor] = []
    update = policy.optimizer.step

    def seen(lr, scale=None):
        if not gradients:
            gradients.extend(g.clone() for g in policy.optimizer.grads)
        update(lr, scale)

    policy.optimizer.step = seen
    floor = policy.noise_floor(train.few_sequences(groups))
    metrics = train.train_step(policy, groups, args)
    gathered = {}
    for (name, p), g in zip(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad), gradients, strict=True
    ):  # fmt: skip
        if is_sharded(p):
            with torch.no_grad():
                p.to_local().copy_(g)  # the gradient in the weight's place, to be gathered as it is
            gathered[name] = whole(p, ranks)
        else:
            gathered[name] = g
    policy.load_masters()
    logged = [s.logprobs for g, i in train.logged_samples(groups, 3) for s in [g.samples[i]]]
    after = policy._whole_state() if ranks.world > 1 else {n: t.clone() for n, t in model.state_dict().items()}
    if args.lora is not None:
        after = {n: t for n, t in after.items() if "lora_" in n}
    return {"metrics": metrics, "floor": floor, "gradients": gathered, "weights": after, "logged": logged}


def main() -> None:
    out, cases = sys.argv[1], sys.argv[2:]
    ranks = Ranks.start()
    results = {case: step(case, ranks) for case in cases}
    if ranks.first:
        torch.save(results, out)
    ranks.finish()


if __name__ == "__main__":
    main()
