"""Make the model that the default run trains: a Qwen2 of 1.9 M parameters, right on one two-digit sum in three.

Its tokenizer is Qwen2's, with a vocabulary learned from the arithmetic prompts: one token a digit, one a word; any
other text still encodes, as bytes. Supervised training on the train split of `arithmetic:add2` stops at the first check
in which sampling at T=1 is right on at least --target of the held-out problems, so that reinforcement learning has a
signal from its first step and far to go. What it leaves out: anything but two-digit sums.

    python scripts/make_tiny_model.py                      # writes assets/tiny-adder; about five minutes on two cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import argparse
import json
import time

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed

from data import Example, arithmetic_examples
from rewards import number_reward

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's own pre-tokenizer (one token a digit), ChatML specials, and the prompts' words as whole tokens.

    It must be Qwen2's: transformers and vLLM pick the tokenizer class by the model's architecture.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    levels = ("add2", "sub2", "mul")
    phrases = [e.messages[0]["content"] for level in levels for e in arithmetic_examples(level, "train")]
    phrases += ["user\n", "assistant\n", "system\n"] * 1000
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        phrases,
        trainers.BpeTrainer(vocab_size=384, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=256,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode(tokenizer: Qwen2Tokenizer, examples: list[Example]) -> tuple[list[list[int]], list[list[int]]]:
    """(prompt ids, answer ids ending in <|im_end|>) of each example."""
    prompts = [
        tokenizer.apply_chat_template(e.messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        for e in examples
    ]
    answers = [[*tokenizer.encode(e.answer), tokenizer.eos_token_id] for e in examples]
    return prompts, answers


@torch.no_grad()
def sampled_accuracy(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, examples: list[Example]) -> float:
    """Share right when sampling one answer each at T=1."""
    prompts, _ = encode(tokenizer, examples)
    ids = torch.tensor(prompts)
    out = model.generate(ids, max_new_tokens=5, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return sum(number_reward(t, e.answer) for t, e in zip(texts, examples, strict=True)) / len(examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="assets/tiny-adder")
    parser.add_argument("--target", type=float, default=1 / 3, help="held-out accuracy at T=1 to stop at")
    parser.add_argument("--batch", type=int, default=256, help="problems a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--first-check", type=int, default=150, help="step of the first check; then every 5 steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=384,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
    held_out = arithmetic_examples("add2", "eval")
    prompts, answers = encode(tokenizer, arithmetic_examples("add2", "train"))
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    labels = torch.full((len(prompts), width), -100)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(p) + len(a)] = torch.tensor(p + a)
        labels[row, len(p) : len(p) + len(a)] = torch.tensor(a)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    start, step, accuracy = time.time(), 0, 0.0
    while accuracy < args.target:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 50)
        rows = torch.randint(len(ids), (args.batch,))
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 5 == 0 and step >= args.first_check:
            model.eval()
            accuracy = sampled_accuracy(model, tokenizer, held_out)
            model.train()
            print(
                f"step {step}: loss {loss.item():.3f}, held-out at T=1 {accuracy:.3f}, {time.time() - start:.0f} s",
                flush=True,
            )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
