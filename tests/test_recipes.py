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

from config import Args

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
    "gsm8k_qwen2.5_0.5b_fp8": SKYRL_GSM8K | {"model": "Qwen/Qwen2.5-0.5B-Instruct", "rollout_quant": "fp8"},
    "gsm8k_qwen2.5_0.5b_int8": SKYRL_GSM8K | {"model": "Qwen/Qwen2.5-0.5B-Instruct", "rollout_quant": "int8"},
    "dapo_math_qwen3_32b_fp8": SKYRL_GSM8K
    | {"model": "Qwen/Qwen3-32B", "rollout_quant": "fp8", "data": "dapo-math", "eval_data": "aime-2024"}
    | {"prompts_per_step": 16, "samples_per_prompt": 4, "updates_per_batch": 1},
    "dapo_math_qwen3_32b_lora_fp8": SKYRL_GSM8K
    | {"model": "Qwen/Qwen3-32B", "rollout_quant": "fp8", "data": "dapo-math", "eval_data": "aime-2024"}
    | {"prompts_per_step": 16, "samples_per_prompt": 4, "updates_per_batch": 1, "lr": 1e-5}
    | {"lora_rank": 32, "lora_alpha": 32.0, "lora_targets": "all-linear"},
    "dapo_repro_qwen2.5_32b_int8": SKYRL_GSM8K
    | {"model": "Qwen/Qwen2.5-32B", "rollout_quant": "int8", "data": "dapo-math", "eval_data": "aime-2024"}
    | {"prompts_per_step": 128, "samples_per_prompt": 16, "max_prompt_len": 2048, "max_response_len": 20480}
    | {"overlong_buffer": 4096, "tis_cap": 8.0},
}


def flags(recipe: Path, *more: str) -> list[str]:
    """What the script gives to train.py, with a python that prints it."""
    fake = 'python() { printf \'%s\\0\' "$@"; }; exec() { "$@"; }'
    command = ["bash", "-c", f"{fake}; source {shlex.quote(str(recipe))}", str(recipe), *more]
    script, *given = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    assert script == "train.py"
    return given


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
    assert args.dynamic_sampling and args.max_sample_rounds == 30


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
        assert re.match(r"(?:[SFVDL]\b|own choice|all of|the whole)", source), line
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
    assert ("several GPUs, which train.py does not use yet" in text) == (
        "32b" in recipe.stem and "lora" not in recipe.stem
    )
    for source in set(re.findall(r"\b([SFVD])\b(?=[,\s])", " ".join(head))):
        assert f"# {source}: " in text


def test_train_is_what_a_recipe_starts():
    """The working folder is the repository's, wherever it is called from; --help is answered without a GPU."""
    command = ["bash", str(RECIPES[0]), "--help"]
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    shown = subprocess.run(command, cwd="/", env=path, check=True, capture_output=True, text=True).stdout
    assert "--prompts-per-step" in shown
