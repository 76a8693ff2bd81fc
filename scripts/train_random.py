"""train.py on a model of random weights that never lie on a disk: for shapes too large to write down first.

The weights are made on the GPU where the policy will train them; all else is train.py, with its plan, its steps and its
metrics. Such a model learns nothing: the reward is a coin (make_random_model.py), every response has the full length.

    python scripts/train_random.py qwen3-32b --lora-rank 32 --steps 2 --prompts-per-step 16 --samples-per-prompt 4 \\
        --max-prompt-len 512 --max-response-len 1024 --no-dynamic-sampling --no-prove-sync
    python scripts/train_random.py qwen2.5-0.5b --steps 1 --prompts-per-step 2 --samples-per-prompt 2 \\
        --max-prompt-len 64 --max-response-len 8                                                   # a CPU will do
    torchrun --standalone --nproc-per-node 2 scripts/train_random.py qwen3-32b --tp 2 --lora-rank 32 ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch and vLLM read at import)

# isort: split
import contextlib
import os
import tempfile
from typing import Any

import torch
from make_random_model import SHAPES, TOKENIZER, random_model, save_config

import packing
import parts
import train

COIN = f"{Path(__file__).resolve().parent / 'make_random_model.py'}:coin"


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: train_random.py SHAPE [flags of train.py]; shapes: {', '.join(SHAPES)}\n{__doc__}")
    shape, flags = sys.argv[1], sys.argv[2:]

    def load_model(model: str, device: torch.device, trust_remote_code: bool = False) -> torch.nn.Module:
        packing.register()
        torch.manual_seed(0)
        made: Any = random_model(shape, "cuda" if torch.cuda.is_available() else "cpu")
        made.set_attn_implementation(packing.ATTENTION)
        return made

    parts.load_model = load_model
    with tempfile.TemporaryDirectory() as aside:
        folder = model_folder(shape, Path(aside))
        data = ["--data", "arithmetic", "--reward", COIN, "--eval-every", "0", "--save-every", "0"]
        sys.argv = ["train.py", "--model", str(folder), *data, "--run-name", f"{shape}-random", *flags]
        train.main()


def model_folder(shape: str, aside: Path) -> Path:
    """Config and tokenizer, in `aside`; of several ranks in one folder that all name alike, by their launcher."""
    from transformers import AutoTokenizer

    made = aside / shape
    save_config(shape, str(made))
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(made)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return made
    shared = Path(tempfile.gettempdir()) / f"rollout8-{shape}-{os.getppid()}"
    with contextlib.suppress(OSError):  # another rank was first
        made.rename(shared)
    return shared


if __name__ == "__main__":
    main()
