"""Write a model folder with the shape of a known model and random weights, to measure speed without downloading any.

The tokenizer is the built-in tiny model's: prompts encode, and sampled ids outside its vocabulary decode to nothing.
A model of random weights never ends a response, so every sample has the full length. It learns nothing: pair it with
the coin reward below, which gives every group both outcomes.

    python scripts/make_random_model.py qwen2.5-1.5b /tmp/qwen2.5-1.5b
    python train.py --model /tmp/qwen2.5-1.5b --data arithmetic --reward scripts/make_random_model.py:coin --steps 5
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import argparse
import zlib

import torch

TOKENIZER = Path(__file__).resolve().parent.parent / "assets" / "tiny-adder"

# From the models' published config.json files.
SHAPES = {
    "qwen2.5-0.5b": ("qwen2", dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                     num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)),
    "qwen2.5-1.5b": ("qwen2", dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                     num_attention_heads=12, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)),
    "qwen2.5-7b": ("qwen2", dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                   num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)),
    "qwen3-4b": ("qwen3", dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, head_dim=128,
                 num_attention_heads=32, num_key_value_heads=8, vocab_size=151936, tie_word_embeddings=True)),
    "qwen3-8b": ("qwen3", dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, head_dim=128,
                 num_attention_heads=32, num_key_value_heads=8, vocab_size=151936, tie_word_embeddings=False)),
    "qwen3-14b": ("qwen3", dict(hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, head_dim=128,
                  num_attention_heads=40, num_key_value_heads=8, vocab_size=151936, tie_word_embeddings=False)),
    "qwen3-32b": ("qwen3", dict(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, head_dim=128,
                  num_attention_heads=64, num_key_value_heads=8, vocab_size=151936, tie_word_embeddings=False)),
    "llama-3.2-1b": ("llama", dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
                     num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True)),
}  # fmt: skip


def shape_config(shape: str):
    """The transformers config of a shape, bf16, 4096 positions."""
    from transformers import AutoConfig

    family, sizes = SHAPES[shape]
    return AutoConfig.for_model(family, max_position_embeddings=4096, dtype="bfloat16", **sizes)


def random_model(shape: str, device: str) -> torch.nn.Module:
    """An HF causal LM of that shape in bf16 with random weights; norms and biases are random too."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape_config(shape), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.02)
            elif "norm" in name:
                p.uniform_(0.5, 1.5)
    return model


def random_weights(shape: str, device: str) -> dict[str, torch.Tensor]:
    """The state dict of such a model, bf16, with a tied head listed twice; "tiny": the built-in model's own."""
    if shape == "tiny":
        from policy import load_model

        return load_model(str(TOKENIZER), torch.device(device)).state_dict()
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(shape), dtype=torch.bfloat16)
    made: dict[int, torch.Tensor] = {}
    weights = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) not in made:
            tensor = torch.empty(p.shape, dtype=torch.bfloat16, device=device)
            made[id(p)] = tensor.uniform_(0.5, 1.5) if "norm" in name else tensor.normal_(std=0.02)
        weights[name] = made[id(p)]
    return weights


def save_config(shape: str, folder: str) -> str:
    """Write the shape's config.json, with the architecture's name that vLLM looks for; returns the folder."""
    config = shape_config(shape)
    config.architectures = [
        {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[config.model_type]
    ]
    config.save_pretrained(folder)
    return folder


def coin(completion: str, answer: str, row: dict) -> float:
    """A reward without meaning: 1 for about half of all completions, by a hash of the text and a running count."""
    coin.calls += 1
    return float(zlib.crc32(f"{completion}{coin.calls}".encode()) & 1)


coin.calls = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    torch.manual_seed(args.seed)
    model = random_model(args.shape, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters in {args.out}")


if __name__ == "__main__":
    main()
