"""scripts/recipes: every flag exists and is accepted, its value is the one that the head gives a source for."""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from transformers import AutoConfig

from config import Args, check_ranks
from memory import GIB, MemoryPlan, MemoryPlanError, model_sizes, plan_memory, sequences_at_once

FOLDER = Path(__file__).parent.parent / "scripts" / "recipes"
RECIPES = sorted(FOLDER.glob("*.sh"))
SKYRL_GSM8K = {
    "data": "gsm8k",
    "prompts_per_step": 1024,
    "updates_per_batch": 4,
    "samples_per_prompt": 5,
    "max_prompt_len": 512,
    "max_response_len": 1024,
    "overlong_filter": True,
    "overlong_buffer": 512,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 10.0,
    "tis_cap": 2.0,
    "lr": 1e-6,
    "weight_decay": 0.1,
}
WANTED = {
    "gsm8k_qwen2.5_1.5b_fp8": SKYRL_GSM8K | {"model": "Qwen/Qwen2.5-1.5B-Instruct", "rollout_quant": "fp8"},
    "gsm8k_qwen2.5_1.5b_fp8_node": SKYRL_GSM8K
    | {"model": "Qwen/Qwen2.5-1.5B-Instruct", "rollout_quant": "fp8", "tp": 1},
    "gsm8k_qwen2.5_0.5b_fp8": SKYRL_GSM8K | {"model": "Qwen/Qwen2.5-0.5B-Instruct", "rollout_quant": "fp8"},
    "gsm8k_qwen2.5_0.5b_int8": SKYRL_GSM8K | {"model": "Qwen/Qwen2.5-0.5B-Instruct", "rollout_quant": "int8"},
    "dapo_math_qwen3_32b_fp8": SKYRL_GSM8K
    | {"model": "Qwen/Qwen3-32B", "rollout_quant": "fp8", "data": "dapo-math", "eval_data": "aime-2024"}
    | {"prompts_per_step": 16, "samples_per_prompt": 4, "updates_per_batch": 1, "tp": 2},
    "dapo_math_qwen3_32b_lora_fp8": SKYRL_GSM8K
    | {"model": "Qwen/Qwen3-32B", "rollout_quant": "fp8", "data": "dapo-math", "eval_data": "aime-2024"}
    | {"prompts_per_step": 16, "samples_per_prompt": 4, "updates_per_batch": 1, "lr": 1e-5}
    | {"lora_rank": 32, "lora_alpha": 32.0, "lora_targets": "all-linear"},
    "dapo_repro_qwen2.5_32b_int8": SKYRL_GSM8K
    | {"model": "Qwen/Qwen2.5-32B", "rollout_quant": "int8", "data": "dapo-math", "eval_data": "aime-2024"}
    | {"prompts_per_step": 128, "samples_per_prompt": 16, "max_prompt_len": 2048, "max_response_len": 20480}
    | {"overlong_buffer": 4096, "tis_cap": 8.0, "tp": 2},
    "gsm8k_qwen2.5_coder_0.5b_fp8": {"model": "Qwen/Qwen2.5-Coder-0.5B-Instruct", "rollout_quant": "fp8"}
    | {"data": "gsm8k", "prompts_per_step": 64, "samples_per_prompt": 8, "max_prompt_len": 256, "max_response_len": 512}
    | {"lr": 2e-6, "max_num_seqs": 960, "tis_cap": 2.0, "max_sample_rounds": 4},
}
WIDE = dict(hidden_size=5120, num_hidden_layers=64, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)
SHAPES = {  # from the models' published config.json files
    "Qwen/Qwen3-32B": ("qwen3", WIDE | dict(intermediate_size=25600, num_attention_heads=64, vocab_size=151936)),
    "Qwen/Qwen2.5-32B": ("qwen2", WIDE | dict(intermediate_size=27648, num_attention_heads=40, vocab_size=152064)),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    )),
}  # fmt: skip
FREE = {"80 GB": 78, "141 GB": 139}  # GiB that a card of that name leaves
PLANNED = [  # recipe, ranks, card
    ("dapo_math_qwen3_32b_fp8", 8, "141 GB"),
    ("dapo_math_qwen3_32b_fp8", 8, "80 GB"),
    ("dapo_math_qwen3_32b_lora_fp8", 1, "141 GB"),
    ("dapo_repro_qwen2.5_32b_int8", 8, "141 GB"),
    ("dapo_repro_qwen2.5_32b_int8", 8, "80 GB"),
    ("gsm8k_qwen2.5_1.5b_fp8_node", 8, "80 GB"),
]


def started(recipe: Path, *more: str) -> tuple[list[str], list[str]]:
    """(the launcher with what is its own, what is given to train.py), with a python and a torchrun that print it."""
    fakes = " ".join(f"{name}() {{ printf '%s\\0' {name} \"$@\"; }};" for name in ("python", "torchrun"))
    command = ["bash", "-c", f'{fakes} exec() {{ "$@"; }}; source {shlex.quote(str(recipe))}', str(recipe), *more]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    return words[: words.index("train.py")], words[words.index("train.py") + 1 :]


def flags(recipe: Path, *more: str) -> list[str]:
    """What the script gives to train.py."""
    return started(recipe, *more)[1]


def of_several_gpus(recipe: Path) -> bool:
    return started(recipe)[0][0] == "torchrun"


def parse(given: list[str]) -> Args:
    return tyro.cli(Args, args=given).resolved()


def test_there_are_the_recipes_that_the_tests_know():
    assert {recipe.stem for recipe in RECIPES} == WANTED.keys()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_flags_are_accepted(recipe):
    args = parse(flags(recipe))
    wanted = WANTED[recipe.stem]
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert (args.correction, args.loss_reduction, args.advantage) == ("token-tis", "token-mean", "grpo")
    assert args.dynamic_sampling and args.max_sample_rounds == wanted.get("max_sample_rounds", 30)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_flags_of_the_command_line_come_last(recipe):
    args = parse(flags(recipe, "--steps", "3", "--data", "two words.jsonl"))
    assert (args.steps, args.data) == (3, "two words.jsonl")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_head_gives_every_flag_its_value_and_a_source(recipe):
    head = [
        line[1:].strip() for line in recipe.read_text().split("set -euo")[0].splitlines() if line.startswith("#   --")
    ]
    said = {}
    for line in head:
        values, source = re.split(r" {2,}", line, maxsplit=1)
        assert re.match(r"(?:[SFVDLR]\b|own choice|all of|the whole)", source), line
        for flag, value in re.findall(r"(--[a-z-]+)(?: (?!--)(\S+))?", values):
            said[flag] = value
    passed = {}
    for word in flags(recipe):
        if word.startswith("--"):
            passed[flag := word] = ""
        else:
            passed[flag] = word
    assert said.pop("--chat-template-kwargs", None) is None or "--chat-template-kwargs" in passed
    passed.pop("--chat-template-kwargs", None)
    assert said == passed
    text = recipe.read_text()
    assert "has not been run" in text and "Hardware: " in text
    assert ("one node of" in text) == of_several_gpus(recipe)
    for source in set(re.findall(r"\b([SFVDR])\b(?=[,;\s])", " ".join(head))):
        assert f"# {source}: " in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_for_several_gpus_starts_a_process_for_each(recipe):
    launcher, given = started(recipe)
    several = recipe.stem.endswith("_node") or ("32b" in recipe.stem and "lora" not in recipe.stem)
    assert launcher in (
        [["torchrun", "--standalone", "--nproc-per-node", n] for n in ("8", "gpu")] if several else [["python"]]
    )
    assert ("--tp" in given) == several


def test_the_recipe_of_a_node_is_that_of_one_gpu():
    one, node = (parse(flags(FOLDER / f"gsm8k_qwen2.5_1.5b_fp8{end}.sh")) for end in ("", "_node"))
    assert one == node


@pytest.mark.parametrize(("name", "world", "card"), PLANNED, ids=str)
def test_what_a_head_says_of_memory_is_what_the_plan_says(name, world, card):
    recipe, free = FOLDER / f"{name}.sh", FREE[card]
    head = " ".join(line.lstrip("# ") for line in recipe.read_text().split("set -euo")[0].splitlines())
    hardware = re.search(r"Hardware: (.*?)This script", head)[1]
    assert "By the plan, not run: " in hardware
    said = hardware.split(f"on {world} x {card}")[1].split(" on 8 x ")[0] if world > 1 else hardware
    short = re.search(r"it is ([\d.]+) GiB short, and fits with (--\S+ \d+):", said)
    if short:
        with pytest.raises(MemoryPlanError, match=f"{re.escape(short[1])} GiB short"):
            planned(parse(flags(recipe)), free, world)
    args = parse(flags(recipe, *(short[2].split() if short else ())))
    plan = planned(args, free, world)
    assert f"{plan.peak / GIB:.0f} of {free} GiB" in said
    assert (f"in host memory, {world * plan.host / GIB:.0f} GiB in all" in said) == plan.offload
    if plan.kv_cache < plan.kv_wanted and world > 1:
        assert f"{plan.kv_cache / GIB:.0f} of them KV cache" in said
    assert ("nothing sleeps" in said) == (plan.sleep_level == 0)


def planned(args: Args, free: int, world: int) -> MemoryPlan:
    """The plan of a recipe's flags on `world` GPUs of `free` GiB each."""
    family, sizes_of = SHAPES[args.model]
    config = AutoConfig.for_model(family, **sizes_of)
    check_ranks(args, config, world)
    sizes = model_sizes(config, lora=args.lora)
    return plan_memory(
        sizes, free=free * GIB, one_byte_weights=sum(sizes.linear_layers.values()), max_model_len=args.max_model_len,
        max_num_seqs=sequences_at_once(
            args.max_num_seqs, args.prompts_per_step, args.samples_per_prompt, world // args.tp, args.dynamic_sampling
        ),
        micro_batch_tokens=args.micro_batch_tokens, checkpointing=args.gradient_checkpointing,
        offload=args.offload_optimizer, sleep=args.sleep, host_free=1000 * GIB, world=world, tp=args.tp,
    )  # fmt: skip


def test_train_is_what_a_recipe_starts():
    """The working folder is the repository's, wherever it is called from; --help is answered without a GPU."""
    recipe = next(recipe for recipe in RECIPES if not of_several_gpus(recipe))
    command = ["bash", str(recipe), "--help"]
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    shown = subprocess.run(command, cwd="/", env=path, check=True, capture_output=True, text=True).stdout
    assert "--prompts-per-step" in shown
