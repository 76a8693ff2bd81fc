"""A run of a small sharded policy that saves beside an update, and one that goes on from it: test_checkpoint_ranks.py.

PYTHONPATH=.:tests python tests/checkpoint_run.py FOLDER     (RANK, WORLD_SIZE and so on as torchrun sets them)
"""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from small_models import CONFIGS
from test_checkpoint_ranks import Rewards, Stream, draw, seed
from transformers import AutoModelForCausalLM

import lora
import packing
from loop_control import Progress
from policy import Policy, load_model
from ranks import Ranks
from run_folder import RunFolder
from sharding import LogprobModel, shard


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def build(source: Path | None, kind: str, ranks: Ranks) -> Policy:
    packing.register()
    if source is None or kind == "adapters":
        torch.manual_seed(0)
        config = copy.deepcopy(CONFIGS["qwen2"])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=packing.ATTENTION)
        if kind == "adapters":
            lora.add_adapters(model, lora.LoraSettings(3, 6.0))
    else:
        model = load_model(str(source), torch.device("cpu"))
    root = LogprobModel(model, 1.0)
    if ranks.world > 1:
        shard(root, ranks, torch.device("cpu"))
    return Policy(model, lr=0.01, ranks=ranks, root=root)


def update(policy: Policy, number: int) -> None:
    """The same gradient on every rank's rows, whatever the world."""
    for i, (name, grad) in enumerate(zip(policy._names, policy.optimizer.grads, strict=True)):
        g = torch.Generator().manual_seed(number * 1000 + i)
        first, _ = policy._spans.get(name, (0, 0))
        grad.copy_(0.001 * torch.randn(policy._parameters[i].shape, generator=g)[first : first + len(grad)])
    policy.update()  # the norm is below the clip: its sum over ranks has another order


def run(folder: Path, kind: str, ranks: Ranks, resume: bool = False) -> dict[str, Any]:
    """An update, a checkpoint beside the next one; resumed, that next update alone. What came of it."""
    run = RunFolder(str(folder), kind, {}, resume=resume, ranks=ranks)
    policy = build(run.checkpoint.folder if run.checkpoint else None, kind, ranks)
    rewards = Rewards(10)
    progress = Progress(run, policy, Tokenizer(), Stream(), rewards, SimpleNamespace(state={}))
    if run.checkpoint:
        policy.load_training(run.checkpoint)
        progress.resume(run.checkpoint)
    else:
        update(policy, 1)
        seed(ranks.rank)
        progress.finished(1)
        progress.save(wait=False)
    drawn = ranks.gather(draw())
    run.wait_for_copies()
    update(policy, 2)
    run.close()
    state = policy._whole_state()
    state = {name: tensor.clone() for name, tensor in state.items() if name in policy._names}
    return {"drawn": drawn, "state": state, "numbers": policy.numbers(), "calls": rewards.counts()["calls"]}


def main() -> None:
    folder, ranks = Path(sys.argv[1]), Ranks.start()
    for kind in ("whole", "adapters"):
        for resume in (False, True):
            found = run(folder, kind, ranks, resume)
            if ranks.first:
                torch.save(found, folder / f"{kind}-{'resume' if resume else 'begin'}.pt")
    ranks.finish()


if __name__ == "__main__":
    main()
