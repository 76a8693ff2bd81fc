"""A whole model of a LoRA checkpoint, in HF layout, which vLLM and transformers open.

The adapters are merged as the sync merges them: product in fp32, one rounding of the sum to bf16; so with
--rollout-quant none the run's engine sampled from these very weights, and with a quantized one from their rounding.

    python scripts/merge_lora.py runs/NAME/checkpoints/step-000100 merged
    python scripts/merge_lora.py runs/NAME/best merged --base Qwen/Qwen3-32B      # another copy of the same base
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import argparse

import torch

from lora import LoraError, check_peft, load_adapters, merged_weights
from policy import PolicyError, load_model


def merge(checkpoint: Path, out: Path, base: str | None) -> None:
    """Raises LoraError for a folder without adapters or a base that they do not fit, PolicyError for a bad base."""
    from transformers import AutoTokenizer

    if out.exists():
        raise LoraError(f"{out} exists already; name a new folder")
    check_peft()
    found = base or base_of(checkpoint)
    model = load_model(found, torch.device("cpu"))
    load_adapters(model, checkpoint)
    state = dict(merged_weights(model))
    whole = load_model(found, torch.device("cpu"))
    whole.load_state_dict(state)
    whole.save_pretrained(out, safe_serialization=True)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(out)


def base_of(checkpoint: Path) -> str:
    import json

    path = checkpoint / "adapter_config.json"
    if not path.is_file():
        raise LoraError(f"{checkpoint} has no adapter_config.json: it is no LoRA checkpoint, and needs no merging")
    return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder with adapters that train.py saved")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--base", help="folder or Hub name (default: what the adapters were trained on)")
    args = parser.parse_args()
    try:
        merge(args.checkpoint, args.out, args.base)
    except (LoraError, PolicyError) as error:
        sys.exit(f"error: {error}")
    print(args.out)


if __name__ == "__main__":
    main()
