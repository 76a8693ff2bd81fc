"""config.py: every flag that cannot work is refused by name, defaults follow the model, explicit values survive."""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import ast
import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import config
import train
from config import Args, ConfigError

NAN, INF = math.nan, math.inf
SOURCE = Path(config.__file__)

REJECTED = [  # (flags that differ from the defaults, words the message must hold)
    ({"top_p": 0.9}, ["--top-p", "0.9", "--temperature"]),
    ({"top_p": 0.0}, ["--top-p", "0.0"]),
    ({"top_p": NAN}, ["--top-p", "nan"]),
    ({"top_k": 5}, ["--top-k", "5"]),
    ({"top_k": -1}, ["--top-k", "-1"]),
    ({"tis_cap": 0.0}, ["--tis-cap", "0.0", "greater than 0", "inf", "None"]),
    ({"tis_cap": -1.0}, ["--tis-cap", "-1.0"]),
    ({"tis_cap": NAN}, ["--tis-cap", "nan"]),
    ({"samples_per_prompt": 1}, ["--samples-per-prompt", "1", "at least 2"]),
    ({"samples_per_prompt": 0}, ["--samples-per-prompt", "0"]),
    ({"dual_clip": 1.0}, ["--dual-clip", "1.0", "greater than 1"]),
    ({"dual_clip": -3.0}, ["--dual-clip", "-3.0"]),
    ({"dual_clip": NAN}, ["--dual-clip", "nan"]),
    ({"clip_low": 1.0}, ["--clip-low", "1.0"]),
    ({"overlong_buffer": 9, "max_response_len": 8}, ["--overlong-buffer 9", "--max-response-len 8"]),
    ({"overlong_buffer": 9}, ["--overlong-buffer 9", "--max-response-len 8"]),  # against the model's default
    ({"updates_per_batch": 5, "prompts_per_step": 4}, ["--updates-per-batch 5", "--prompts-per-step", "4"]),
    (
        {"micro_batch_tokens": 19, "max_prompt_len": 12, "max_response_len": 8},
        ["--micro-batch-tokens 19", "--max-prompt-len 12", "--max-response-len 8", "20 tokens"],
    ),
    ({"micro_batch_tokens": 39}, ["--micro-batch-tokens 39", "--max-prompt-len 32", "--max-response-len 8"]),
    (
        {"micro_batch_tokens": 1535, "model": "Qwen/Qwen2.5-1.5B-Instruct"},
        ["--micro-batch-tokens 1535", "--max-prompt-len 512", "--max-response-len 1024"],
    ),
    ({"kv_cache_gib": 0.0}, ["--kv-cache-gib", "0.0"]),
    ({"kv_cache_gib": NAN}, ["--kv-cache-gib", "nan"]),
    ({"temperature": 0.0}, ["--temperature", "0.0"]),
    ({"temperature": INF}, ["--temperature", "inf"]),
]
REJECTED += [({name: bad}, [config._flag(name)]) for name in config.POSITIVE for bad in (0, -1, NAN, INF)]
REJECTED += [({name: bad}, [config._flag(name)]) for name in config.AT_LEAST_ZERO for bad in (-1, NAN)]


@pytest.mark.parametrize(("flags", "words"), REJECTED, ids=[str(flags) for flags, _ in REJECTED])
def test_a_flag_that_cannot_work_is_refused_by_name(flags, words):
    with pytest.raises(ConfigError) as error:
        Args(**flags).resolved()
    assert [w for w in words if w not in str(error.value)] == []


@pytest.mark.parametrize("name", ["kv_cache_gib", "mask_low", "mask_high", "weight_decay"])
def test_an_infinite_size_or_decay_is_refused(name):
    with pytest.raises(ConfigError, match=config._flag(name)):
        Args(**{name: INF}).resolved()


@pytest.mark.parametrize(
    "flags",
    [
        {"tis_cap": None},
        {"tis_cap": INF},
        {"tis_cap": 0.5},
        {"dual_clip": 10.0},
        {"overlong_buffer": 8, "max_response_len": 8},
        {"updates_per_batch": 4, "prompts_per_step": 4},
        {"samples_per_prompt": 2},
        {"micro_batch_tokens": 20, "max_prompt_len": 12, "max_response_len": 8},
        {"eval_every": 0, "eval_size": 0, "save_every": 0, "warmup_steps": 0, "weight_decay": 0.0, "clip_low": 0.0},
        {"kv_cache_gib": 0.25},
    ],
    ids=str,
)
def test_the_last_value_before_a_refusal_is_accepted(flags):
    args = Args(**flags).resolved()
    assert {k: getattr(args, k) for k in flags} == flags


def test_every_number_is_checked_from_below():
    """A numeric flag that is in no list of checks would take -1 in silence."""
    checked = {*config.POSITIVE, *config.AT_LEAST_ZERO}
    own_check = {
        "tis_cap",
        "top_p",
        "top_k",
        "kv_cache_gib",
        "memory_gib",
        "mask_low",
        "mask_high",
        "samples_per_prompt",
        "dual_clip",
        "clip_high",
    }
    numeric = {f.name for f in dataclasses.fields(Args) if re.search(r"\b(int|float)\b", str(f.type))}
    assert numeric - checked - own_check == set()
    for name in numeric:
        with pytest.raises(ConfigError, match=config._flag(name)):
            Args(**{name: -1}).resolved()


# ---- defaults


def test_unset_flags_take_the_tiny_models_values_or_a_real_ones():
    tiny, real = Args().resolved(), Args(model="Qwen/Qwen2.5-1.5B-Instruct").resolved()
    assert {k: getattr(tiny, k) for k in config.TINY_DEFAULTS} == config.TINY_DEFAULTS
    assert {k: getattr(real, k) for k in config.REAL_DEFAULTS} == config.REAL_DEFAULTS
    assert (tiny.data, real.data, real.lr) == ("arithmetic", "gsm8k", 1e-6)
    assert config.TINY_DEFAULTS.keys() == config.REAL_DEFAULTS.keys()
    assert real.samples_per_step == real.prompts_per_step * real.samples_per_prompt
    assert real.max_model_len == real.max_prompt_len + real.max_response_len


def test_the_tiny_model_is_known_by_its_folder_however_it_is_written(monkeypatch):
    monkeypatch.chdir(SOURCE.parent)
    assert Args(model="./assets/../assets/tiny-adder/").resolved().data == "arithmetic"
    assert Args(model="assets/tiny-adder-2").resolved().data == "gsm8k"


@pytest.mark.parametrize("model", [config.TINY_MODEL, "Qwen/Qwen2.5-1.5B-Instruct"])
def test_explicit_values_survive(model):
    explicit = {
        "data": "rows.jsonl",
        "steps": 7,
        "prompts_per_step": 3,
        "samples_per_prompt": 5,
        "tp": 2,
        "max_prompt_len": 11,
        "max_response_len": 13,
        "lr": 0.5,
        "eval_size": 0,  # zero is a value, not "unset"
        "eval_every": 0,
        "save_every": 0,
    }
    assert explicit.keys() == config.REAL_DEFAULTS.keys()
    args = Args(model=model, **explicit).resolved()
    assert {k: getattr(args, k) for k in explicit} == explicit
    assert args.resolved() == args


def test_what_does_not_depend_on_the_model_is_never_none_after_resolving():
    args = Args().resolved()
    nones = {k for k, v in dataclasses.asdict(args).items() if v is None}
    chosen = {"micro_batch_tokens", "gradient_checkpointing", "offload_optimizer", "reshard_after_forward", "compile"}
    chosen |= {"mask_low", "mask_high"}  # by the correction
    chosen |= {"lora_alpha"}  # by the rank
    assert nones == {"eval_data", "reward", "memory_gib", "kv_cache_gib", "dual_clip", "run_name", "resume"} | chosen


def test_args_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Args().lr = 1.0


# ---- several ranks


def shape(**fields):
    """Qwen3-32B's config, with other fields."""
    sizes = dict(num_attention_heads=64, num_key_value_heads=8, hidden_size=5120, head_dim=128)
    return SimpleNamespace(**(sizes | dict(intermediate_size=25600, vocab_size=151936) | fields))


QWEN_05B = dict(num_attention_heads=14, num_key_value_heads=2, hidden_size=896, head_dim=None, intermediate_size=4864)
REJECTED_RANKS = {  # name: (world, flags, fields of the model's config, words)
    "heads that do not divide": (4, {"tp": 4}, QWEN_05B, ["--tp 4", "14 attention heads", "--tp may be 1, 2"]),
    "key and value heads that do not divide": (
        6, {"tp": 6}, dict(num_attention_heads=12, num_key_value_heads=4, hidden_size=768),
        ["--tp 6", "4 key and value heads", "--tp may be 1"],
    ),
    "width that does not divide": (
        8, {"tp": 8}, dict(intermediate_size=25604), ["--tp 8", "intermediate size of 25604", "--tp may be 1, 2, 4"]
    ),
    "vocabulary that does not divide": (
        3, {"tp": 3}, dict(num_attention_heads=12, num_key_value_heads=3, intermediate_size=768, vocab_size=100),
        ["--tp 3", "a vocabulary of 128"],
    ),
    "blocks of FP8 that parts would cut": (
        2, {"tp": 2, "rollout_quant": "fp8-block"}, QWEN_05B, ["fp8-block", "--tp 2", "448 rows of the queries"]
    ),
    "blocks of FP8 in a narrow part of the MLP": (
        8, {"tp": 8, "rollout_quant": "fp8-block"}, dict(intermediate_size=25600 + 512), ["3264 rows of the MLP"]
    ),
    "fewer prompts than engines": (
        8, {"tp": 2, "prompts_per_step": 3}, {}, ["--prompts-per-step 3", "4 engines", "--tp 2"]
    ),
    "8-bit moments on several ranks": (2, {"optimizer_states": "8bit"}, {}, ["--optimizer-states 8bit", "2", "bf16"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED_RANKS)
def test_what_several_ranks_cannot_do_is_refused_by_name(name):
    world, flags, fields, words = REJECTED_RANKS[name]
    with pytest.raises(ConfigError) as error:
        config.check_ranks(Args(**flags).resolved(), shape(**fields), world)
    assert [w for w in words if w not in str(error.value)] == [] and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("world", "flags", "fields"),
    [
        (8, {"tp": 8, "rollout_quant": "fp8-block"}, {}),
        (16, {"tp": 16}, {}),  # each key and value head on two ranks
        (2, {"tp": 2, "rollout_quant": "int4-sim"}, QWEN_05B),
        (8, {"tp": 2, "prompts_per_step": 4}, {}),
        (7, {"tp": 7}, QWEN_05B | dict(num_key_value_heads=14, intermediate_size=7 * 64, vocab_size=7 * 64)),
        (1, {"optimizer_states": "8bit", "prompts_per_step": 1}, dict(num_attention_heads=0)),
    ],
    ids=str,
)
def test_what_several_ranks_can_do_is_accepted(world, flags, fields):
    config.check_ranks(Args(**flags).resolved(), shape(**fields), world)


@pytest.mark.parametrize(("asked", "taken"), [(None, 4), (1, 1), (2, 2)])
def test_a_resumed_run_may_have_another_tp(asked, taken):
    """--resume takes the run's own unless it is said, 1 too: the next machine may have a single GPU."""
    saved = train.config_of(Args(tp=4).resolved())
    assert Args(tp=asked).resumed(saved, by_name=False).tp == taken
    assert Args(tp=asked).resumed(saved, by_name=True).resolved().tp == (asked or 1)
    assert Args(tp=asked).resumed({k: v for k, v in saved.items() if k != "tp"}, False).resolved().tp == (asked or 1)


# ---- documentation


def test_every_field_has_a_docstring_and_there_are_few_enough_to_hold_in_the_head():
    body = next(n for n in ast.parse(SOURCE.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args").body
    undocumented = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            text = following.value.value if isinstance(following, ast.Expr) else None
            if not (isinstance(text, str) and text.strip().endswith(".")):
                undocumented.append(node.target.id)
    fields = [n.target.id for n in body if isinstance(n, ast.AnnAssign)]
    assert undocumented == []
    assert fields == [f.name for f in dataclasses.fields(Args)]
    assert len(fields) <= 66


def test_docstrings_of_unset_flags_say_both_defaults():
    """`None: 100; 80.` is the real model's and the tiny model's value; text and tables must not drift apart."""
    lines = SOURCE.read_text().splitlines()
    for name, real in config.REAL_DEFAULTS.items():
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {name}:"))
        text = " ".join(lines[at + 1 : at + 3]).split('"""')[1]
        said = text.rpartition("None: ")[2].rstrip(".").split("; ")
        tiny = config.TINY_DEFAULTS[name]
        wanted = [real] if real == tiny else [real, tiny]
        assert [type(real)(s) for s in said] == wanted, f"{name}: {text!r}"


def test_help_is_grouped_by_fields_that_stand_in_that_order():
    fields = [f.name for f in dataclasses.fields(Args)]
    firsts = list(config.GROUPS.values())
    assert firsts[0] == fields[0] and [f for f in fields if f in firsts] == firsts


def flags(monkeypatch, *given: str) -> Args:
    monkeypatch.setattr("sys.argv", ["train.py", *given])
    return config.read_flags("What it does.")


def test_help_has_every_flag_with_its_default_under_its_title(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        flags(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert end.value.code == 0 and "What it does." in text
    places = [text.index(f" {title} options ") for title in config.GROUPS]
    assert places == sorted(places)
    for field in dataclasses.fields(Args):
        assert re.search(rf"\W{config._flag(field.name)}\W", text), field.name
    assert "None: " not in text and "default: None" not in text
    said = " ".join(text.replace("│", " ").split())
    for default in ("(default: 100; built-in model: 60)", "(default: 512)", "(default: off)", "(default: token-tis)"):
        assert default in said
    assert text.index("--tis-cap ") > text.index("correction and loss options") > text.index("--rollout-quant ")


def test_flags_are_the_fields_without_prefixes(monkeypatch):
    assert flags(monkeypatch) == Args()
    given = ("--lr", "1", "--no-prove-sync", "--tis-cap=None", "--sleep=2", "--compile", "False", "--tensorboard")
    expected = Args(lr=1.0, prove_sync=False, tis_cap=None, sleep="2", compile=False, tensorboard=True)
    assert flags(monkeypatch, *given) == expected
    with pytest.raises(SystemExit):
        flags(monkeypatch, "--optimizer.lr=1")


# ---- config.json


@pytest.mark.parametrize("cap", [INF, None, 2.0])
def test_config_of_is_strict_json(cap):
    args = Args(tis_cap=cap, clip_high=INF).resolved()
    text = json.dumps(train.config_of(args), allow_nan=False)
    read = json.loads(text)
    assert read.keys() == {f.name for f in dataclasses.fields(Args)}
    assert read["tis_cap"] == ("inf" if cap == INF else cap)
    assert (read["lr"], read["steps"], read["dynamic_sampling"]) == (args.lr, args.steps, True)
    assert float(read["clip_high"]) == INF
