"""LoRA policies (Hu et al., arXiv 2106.09685): a frozen bf16 base and small trained factors, peft's layers.

Axes: O/I output/input features of a weight, R rank.

Factors are bf16 with fp32 masters, as all weights here. The sampler gets base + alpha/R * B A, merged and quantized in
the sync's sweep, a few layers at a time: nothing holds the merged model in bf16, and the trainer's base is the only
bf16 copy. Checkpoints are adapters in peft's layout; scripts/merge_lora.py makes a whole model of one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from weight_sources import Source

ALL = "all-linear"


class LoraError(RuntimeError):
    """Adapters cannot be put into this model; the message names --lora-targets or the package."""


@dataclass(frozen=True)
class LoraSettings:
    """rank R, alpha, and names of the linear layers (all of them: "all-linear"), separated by comma."""

    rank: int
    alpha: float
    targets: str = ALL


def check_peft() -> None:
    """LoraError if the package is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise LoraError(f"--lora-rank needs the package peft ({error}): pip install -r requirements.txt") from error


def add_adapters(model: torch.nn.Module, settings: LoraSettings) -> None:
    """Put factors beside the target layers of an HF model, in place; all else is frozen. A is random, B is zero, so the
    model computes what it did. Raises LoraError for targets that match nothing."""
    from peft import LoraConfig

    names = [t.strip() for t in settings.targets.split(",") if t.strip()]
    unknown = [] if names == [ALL] else [n for n in names if not any(_named(p, n) for p in _linear(model))]
    if unknown or not names:
        known = sorted({path.rpartition(".")[2] for path in _linear(model)})
        raise LoraError(
            f"--lora-targets {settings.targets}: no linear layer is named {', '.join(unknown) or 'so'}; there are "
            f"{', '.join(known)}, or {ALL}"
        )
    where = ALL if names == [ALL] else names
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=where, bias="none", task_type="CAUSAL_LM"
    )
    model.add_adapter(config)


def load_adapters(model: torch.nn.Module, folder: Path) -> None:
    """Adapters of a checkpoint into an HF model that has none. Raises LoraError where they do not fit it."""
    import peft

    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        model.add_adapter(config)
        result = peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise LoraError(f"the adapters in {folder} do not fit this model: {str(error).splitlines()[0]}") from error
    if result.unexpected_keys:
        raise LoraError(f"the adapters in {folder} do not fit this model: it has no {result.unexpected_keys[0]}")


def _linear(model: torch.nn.Module) -> list[str]:
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]


def _named(path: str, name: str) -> bool:
    """As peft matches: the whole path, or its end."""
    return path == name or path.endswith("." + name)


def trained(model: torch.nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def has_adapters(model: torch.nn.Module) -> bool:
    return any(hasattr(m, "lora_A") for m in model.modules())


def sources(model: torch.nn.Module) -> dict[str, torch.Tensor | Source]:
    """What the sync reads: every weight under the name that it has without adapters, merged where there are some."""
    found: dict[str, torch.Tensor | Source] = {}
    adapted = {path: m for path, m in model.named_modules() if hasattr(m, "lora_A")}
    for path, layer in adapted.items():
        weight = layer.base_layer.weight
        (a,), (b,), (scaling,) = layer.lora_A.values(), layer.lora_B.values(), layer.scaling.values()
        found[f"{path}.weight"] = Source.lora(f"{path}.weight", weight, a.weight, b.weight, scaling)
        if layer.base_layer.bias is not None:
            found[f"{path}.bias"] = layer.base_layer.bias
    inside = tuple(f"{path}." for path in adapted)
    others = model.named_parameters(remove_duplicate=False)
    return found | {name: p for name, p in others if not name.startswith(inside or ("\0",))}


@torch.no_grad()
def merged_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name without adapters, weight), merged as the sync does it, one at a time. Of a sharded model every rank must
    take all of them."""
    device = next(model.parameters()).device
    for name, value in sources(model).items():
        yield name, Source.of(name, value, device).read(device)
