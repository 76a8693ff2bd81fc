"""Held-out accuracy of checkpoints: one greedy answer to each prompt, by vLLM in bf16 unless --quant says otherwise.

train.py evaluates with the engine that it samples from, so a run's own figure is that of its quantized sampler. This
asks the policy itself. All checkpoints go through one engine, one sync each; they must have one architecture.

    python scripts/evaluate.py runs/NAME/checkpoints/step-000100 --data gsm8k --out accuracy.json
    python scripts/evaluate.py runs/*/checkpoints/step-000060                     # of the built-in model; a CPU will do
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch and vLLM read at import)

# isort: split
import argparse
import json
import math
from typing import Any

import torch

from config import Args, ConfigError
from data import DataError, encode_prompts, load_data
from engine_options import QUANTIZATION, EngineError
from memory import model_sizes
from parts import load_config
from policy import PolicyError, load_model
from quant_sync import SyncError, SyncPlan
from reward_pool import RewardPool
from rewards import RewardError, required_modules
from rollout import Engine


def evaluate(checkpoints: list[str], flags: Args) -> list[dict[str, Any]]:
    """Accuracy of each folder; prints a line for each. `flags` are resolved, for the first of them."""
    config, tokenizer = load_config(flags)
    sizes = model_sizes(config)
    sequences = min(flags.max_num_seqs, flags.eval_size)
    kv_cache = max(sizes.kv_bytes_per_token * (flags.max_model_len + 128) * sequences, 2**27)
    _, examples = load_data(flags.data, flags.eval_data, flags.eval_size)
    held_out, _ = encode_prompts(examples, tokenizer, flags.max_prompt_len, json.loads(flags.chat_template_kwargs))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(
        flags.model, tokenizer=tokenizer, quant=flags.rollout_quant, max_model_len=flags.max_model_len,
        max_num_seqs=flags.max_num_seqs, kv_cache_bytes=kv_cache,
        memory_fraction=0.05,  # that much must be free at start; what is taken is weights and KV cache
    )  # fmt: skip
    results = []
    modules = required_modules(flags.reward, examples)
    with RewardPool(flags.reward, flags.reward_workers, flags.reward_time_limit, modules) as rewards:
        for version, folder in enumerate(checkpoints):
            model = load_model(folder, device)
            plan = SyncPlan.build(model, engine.model)
            plan.check_formats(flags.rollout_quant)
            plan.sync()
            plan.verify(full=True)
            engine.publish(version)
            prompts = [p.token_ids for p in held_out]
            answers = engine.generate(prompts, n=1, max_tokens=flags.max_response_len, greedy=True)
            for i, (prompt, answer) in enumerate(zip(held_out, answers, strict=True)):
                rewards.submit(i, prompt.example, answer[0].text)
            accuracy = sum(rewards.collect().values()) / len(held_out)
            error = math.sqrt(max(accuracy * (1 - accuracy), 0.0) / len(held_out))
            cut = sum(a[0].finish_reason == "length" for a in answers) / len(answers)
            results.append({"checkpoint": folder, "accuracy": accuracy, "standard_error": error, "truncated": cut,
                            "prompts": len(held_out), "quant": flags.rollout_quant})  # fmt: skip
            print(f"{folder}: {accuracy:.4f} +- {error:.4f} ({len(held_out)} prompts, {cut:.1%} cut)", flush=True)
            del model, plan
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders in HF layout")
    parser.add_argument(
        "--data", help="as train.py's (default: arithmetic for the tiny model's shape, gsm8k otherwise)"
    )
    parser.add_argument("--eval-data", help="as train.py's")
    parser.add_argument("--eval-size", type=int, default=512)
    parser.add_argument("--quant", choices=QUANTIZATION, default="none")
    parser.add_argument("--reward", help="as train.py's")
    parser.add_argument("--max-prompt-len", type=int)
    parser.add_argument("--max-response-len", type=int)
    parser.add_argument("--chat-template-kwargs", default="{}")
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    missing = [folder for folder in args.checkpoints if not (Path(folder) / "config.json").exists()]
    if missing:
        sys.exit(f"error: {', '.join(missing)}: no folder with a config.json; give checkpoints that train.py saved")
    tiny = json.loads((Path(args.checkpoints[0]) / "config.json").read_text()).get("hidden_size", 0) <= 256
    lengths = (32, 8) if tiny else (512, 1024)
    try:
        flags = Args(
            model=args.checkpoints[0], data=args.data or ("arithmetic" if tiny else "gsm8k"), eval_data=args.eval_data,
            eval_size=args.eval_size, rollout_quant=args.quant, reward=args.reward, sleep="0",
            max_prompt_len=args.max_prompt_len or lengths[0], max_response_len=args.max_response_len or lengths[1],
            chat_template_kwargs=args.chat_template_kwargs,
        ).resolved()  # fmt: skip
        results = evaluate(args.checkpoints, flags)
    except (ConfigError, DataError, EngineError, PolicyError, RewardError, SyncError) as error:
        sys.exit(f"error: {error}")
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
