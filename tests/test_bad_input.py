"""Bad input: one clear error that names the flag or the file, before an engine is built; or a note, and it is taken.

docs/bad_input.md is the table of all of it, and names a test for each line; the last tests here hold it to that.
"""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import parts
import reward_pool
import rewards
import run_folder
import train
from config import TINY_MODEL
from data import Example
from reward_pool import RewardPool
from rewards import RewardError
from rollout import Engine, EngineError
from run_folder import RunFolder, RunFolderError

ROOT = Path(train.__file__).resolve().parent
TABLE = ROOT / "docs" / "bad_input.md"
TINY = Path(TINY_MODEL)
LONG = "a" * 5_000
pytestmark = pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="assets/tiny-adder is not there")


# ---- what the cases are made of


class EngineWanted(BaseException):  # no failure of the program, which it would report
    """Everything was taken as good: the next thing would be to build the engine."""


@pytest.fixture
def start(tmp_path, monkeypatch, capfd):
    """start(*flags) -> what train.py says before it ends, and how: its exit code or EngineWanted."""

    def no_engine(*_, **__):
        raise EngineWanted

    def started(*flags: str) -> tuple[str, object]:
        monkeypatch.setattr(parts, "Engine", no_engine)
        monkeypatch.setattr(sys, "argv", ["train.py", f"--runs-dir={tmp_path / 'runs'}", "--reward-workers=1", *flags])
        try:
            train.main()
        except EngineWanted:
            end = EngineWanted
        except SystemExit as error:
            end = error.code
        said = capfd.readouterr()
        return said.out + said.err, end

    return started


def model(folder: Path, *, config=None, tokenizer=None, drop=(), files=None, weights=None) -> list[str]:
    """Flags of a run on the tiny model with something wrong: keys of its JSON files (None takes one away), files that
    are not there or hold something else, and weights through a function."""
    made = Path(shutil.copytree(TINY, folder / "model"))
    for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        content = json.loads((made / name).read_text()) | (changes or {})
        kept = {k: v for k, v in content.items() if v is not None or name != "config.json"}
        (made / name).write_text(json.dumps(kept))
    for name in drop:
        (made / name).unlink()
    for name, content in (files or {}).items():
        (made / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if weights:
        tensors = weights(load_file(made / "model.safetensors"))
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    sizes = ("--max-prompt-len=32", "--max-response-len=8", "--steps=1", "--eval-every=0")
    return [f"--model={made}", "--data=arithmetic:add1", *sizes]


def rows(folder: Path, *lines, name="rows.jsonl") -> list[str]:
    content = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    (folder / name).write_bytes(content)
    return [f"--data={folder / name}"]


def reward(folder: Path, source: str) -> list[str]:
    (folder / "mine.py").write_text(source)
    return [f"--reward={folder / 'mine.py'}:f"]


def taken(folder: Path) -> list[str]:
    """Flags of a run whose folder exists, with a file that must stay as it is."""
    (folder / "runs" / "a").mkdir(parents=True)
    (folder / "runs" / "a" / "metrics.jsonl").write_text("kept\n")
    return ["--run-name=a"]


def without(name: str):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def _pickled_weights() -> bytes:
    file = io.BytesIO()
    torch.save(load_file(TINY / "model.safetensors"), file)
    return file.getvalue()


GOOD = {"question": "1 + 1?", "answer": "2"}
DOWN = "model.layers.1.mlp.down_proj.weight"
INDEX = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
PICKLE = b"cos\nsystem\n(S'touch executed'\ntR."
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3746248\n"

REFUSED = {  # name: (flags from the test's folder, words of the error)
    # flags
    "seed beyond 32 bits": (lambda d: [f"--seed={2**32}"], ["--seed", "2**32"]),
    "temperature that vLLM would raise": (lambda d: ["--temperature=0.001"], ["--temperature", "0.001", "0.01"]),
    "a million reward workers": (lambda d: ["--reward-workers=1000000"], ["--reward-workers", "1024"]),
    "template kwargs nested too deeply": (lambda d: ["--chat-template-kwargs=" + "[" * 50_000], ["JSON object"]),
    "template kwargs that the template has itself": (
        lambda d: ['--chat-template-kwargs={"messages": 3}'],
        ["--chat-template-kwargs", "messages", "--model"],
    ),
    "run name with ..": (lambda d: ["--run-name=../x"], ["--run-name '../x'", "one folder"]),
    "run name with a slash": (lambda d: ["--run-name=a/b"], ["--run-name 'a/b'", "--runs-dir"]),
    "run name that is a path": (lambda d: [f"--run-name={d}/x"], ["--run-name", "one folder"]),
    "run name that is empty": (lambda d: ["--run-name="], ["--run-name ''"]),
    "run name with a line break": (lambda d: ["--run-name=a\nb"], [r"--run-name 'a\nb'"]),
    "run name of 300 characters": (lambda d: ["--run-name=" + "a" * 300], ["--run-name", "200"]),
    "run name that exists": (taken, ["--run-name", "is no run that could go on"]),
    "flag that is no UTF-8": (lambda d: ["--run-name=a\udcff"], ["--run-name", "UTF-8"]),
    "runs dir that is a file": (lambda d: [f"--runs-dir={shutil.copy(TABLE, d / 'f')}"], ["--runs-dir", "no writable"]),
    "runs dir with a name too long": (lambda d: [f"--runs-dir={LONG}"], ["--runs-dir", "too long"]),
    "data path too long": (lambda d: [f"--data={LONG}.jsonl"], ["--data", "too long"]),
    "data of a user that there is not": (lambda d: ["--data=~no-such-user/x.jsonl"], ["--data", "home directory"]),
    "KV cache below one sequence": (lambda d: ["--kv-cache-gib=1e-5"], ["--kv-cache-gib 1e-05", "one sequence"]),
    "layer that there is not": (lambda d: ["--quant-skip=layers.9"], ["--quant-skip layers.9", "layers.0"]),
    # the model's folder
    "model name that is none": (lambda d: ["--model=a b c"], ["--model a b c", "neither a folder"]),
    "model path too long": (lambda d: [f"--model={LONG}", "--run-name=a"], ["--model", "neither a folder"]),
    "model that is a file": (lambda d: [f"--model={TABLE}"], ["--model", "bad_input.md"]),
    "config.json broken": (lambda d: model(d, files={"config.json": "{"}), ["--model", "config.json", "JSON"]),
    "config.json a list": (lambda d: model(d, files={"config.json": "[]"}), ["--model", "config.json", "model_type"]),
    "config.json nested too deeply": (
        lambda d: model(d, files={"config.json": "[" * 99_999}),
        ["--model", "config.json", "RecursionError"],
    ),
    "config.json without model_type": (lambda d: model(d, config={"model_type": None}), ["--model", "model_type"]),
    "architecture unknown": (lambda d: model(d, config={"model_type": "newest9"}), ["--model", "newest9"]),
    "family not known here": (lambda d: model(d, config={"model_type": "bert"}), ["--model", "bert", "Qwen2", "Llama"]),
    "quantized model": (
        lambda d: model(d, config={"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ["--model", "quantized already", "--rollout-quant"],
    ),
    "config with a word for a number": (
        lambda d: model(d, config={"hidden_size": "wide"}),
        ["--model", "hidden_size", "wide"],
    ),
    "config without heads": (lambda d: model(d, config={"num_attention_heads": 0}), ["--model", "cannot be trained"]),
    "activation unknown": (lambda d: model(d, config={"hidden_act": "zzz"}), ["--model", "zzz"]),
    "positions too few": (
        lambda d: model(d, config={"max_position_embeddings": 16}),
        ["--max-prompt-len 32", "--max-response-len 8", "16 positions"],
    ),
    "no end-of-sequence token": (
        lambda d: model(d, config={"eos_token_id": None}, tokenizer={"eos_token": None}),
        ["--model", "end-of-sequence", "tokenizer_config.json"],
    ),
    "tokenizer missing": (
        lambda d: model(d, drop=["tokenizer.json", "tokenizer_config.json"]),
        ["--model", "no tokens", "tokenizer.json"],
    ),
    "tokenizer.json missing": (
        lambda d: model(d, drop=["tokenizer.json"]),
        ["--model", "same tokens", "tokenizer.json"],
    ),
    "tokenizer broken": (lambda d: model(d, files={"tokenizer.json": "{"}), ["--model", "its tokenizer"]),
    "no chat template": (lambda d: model(d, drop=["chat_template.jinja"]), ["--model", "chat_template", "instruct"]),
    "template with a mistake": (
        lambda d: model(d, files={"chat_template.jinja": "{% for m in %}"}),
        ["--model", "chat template", "Expected an expression"],
    ),
    "template that makes nothing": (
        lambda d: model(d, files={"chat_template.jinja": "{# nothing #}"}),
        ["--model", "chat template", "no tokens"],
    ),
    "template that leaves the question out": (
        lambda d: model(d, files={"chat_template.jinja": "<|im_start|>user\nhi<|im_end|>\n"}),
        ["--model", "chat template", "same tokens"],
    ),
    "vocabulary smaller than the tokenizer's": (
        lambda d: model(d, config={"vocab_size": 8}),
        ["token", "the model's 8", "--model"],
    ),
    "no weights": (lambda d: model(d, drop=["model.safetensors"]), ["--model", "model.safetensors"]),
    "weights cut short": (
        lambda d: model(d, files={"model.safetensors": (TINY / "model.safetensors").read_bytes()[:-1_000]}),
        ["--model", "model.safetensors is torn", "copy it again"],
    ),
    "weights that are a Git LFS pointer": (
        lambda d: model(d, files={"model.safetensors": LFS}),
        ["--model", "model.safetensors", "Git LFS"],
    ),
    "weights of which a file is missing": (
        lambda d: model(d, drop=["model.safetensors"], files={"model.safetensors.index.json": INDEX}),
        ["--model", "model-00001-of-00002.safetensors"],
    ),
    "weights without a tensor": (lambda d: model(d, weights=without(DOWN)), ["--model", f"{DOWN} is missing"]),
    "weights of another shape": (
        lambda d: model(d, weights=lambda t: t | {"model.norm.weight": torch.zeros(2)}),
        ["--model", "model.norm.weight is [2], not [256]"],
    ),
    "weights of another model": (
        lambda d: model(d, weights=lambda t: {f"other.{k}": v for k, v in t.items()}),
        ["--model", "is missing", "others like it"],
    ),
    "more layers than weights": (
        lambda d: model(d, config={"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}),
        ["--model", "model.layers.3.", "is missing", "config.json"],
    ),
    "untied head that is missing": (
        lambda d: model(d, config={"tie_word_embeddings": False}),
        ["--model", "lm_head.weight is missing"],
    ),
    "weights in a pickle that runs something": (
        lambda d: model(d, drop=["model.safetensors"], files={"pytorch_model.bin": PICKLE}),
        ["--model", "pytorch_model.bin is a pickle, which is not read", "save_pretrained"],
    ),
    "weights in a pickle of tensors alone": (
        lambda d: model(d, drop=["model.safetensors"], files={"pytorch_model.bin": _pickled_weights()}),
        ["--model", "pytorch_model.bin is a pickle, which is not read", "save_pretrained"],
    ),
    # rewards
    "reward path too long": (lambda d: [f"--reward={LONG}.py:f"], ["--reward", "too long"]),
    "reward of a user that there is not": (lambda d: ["--reward=~no-such-user/r.py:f"], ["--reward", "home directory"]),
    "reward with a syntax error": (
        lambda d: reward(d, "def f(a, b, c):\n    return 1 +\n"),
        ["--reward", "mine.py", "line 2", "SyntaxError"],
    ),
    "reward that ends the process when imported": (lambda d: reward(d, "raise SystemExit"), ["--reward", "SystemExit"]),
    "reward that kills its process when imported": (
        lambda d: reward(d, "import os\nos._exit(7)"),
        ["--reward", "mine.py", "status 7"],
    ),
    "reward with two arguments": (
        lambda d: reward(d, "def f(completion, answer):\n    return 1.0\n"),
        ["--reward", "'f'", "too many positional arguments", "def f(completion, answer, row)"],
    ),
    "reward that is async": (
        lambda d: reward(d, "async def f(completion, answer, row):\n    return 1.0\n"),
        ["--reward", "'f' is async", "def f(completion, answer, row)"],
    ),
    # rows that only the tokenizer can judge
    "row with a role that the template refuses": (
        lambda d: [
            *model(d, files={"chat_template.jinja": "{{ raise_exception('no ' ~ messages[0].role) }}"}),
            *rows(d, {"prompt": [{"role": "judge", "content": "?"}], "answer": "2"}),
        ],
        ["rows.jsonl:1", "chat template", "no judge"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a pickle would touch
    make_flags, words = REFUSED[name]
    flags = make_flags(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    said, error = start(*flags)
    assert isinstance(error, str) and error.startswith("error: ") and len(error.splitlines()) == 1, (error, said)
    assert [w for w in words if w not in error] == [], error
    assert len(error) < 1_000 and "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written, and nothing lost"


ACCEPTED = {  # name: (flags from the test's folder, words that are printed)
    "no pad token": (lambda d: model(d, config={"pad_token_id": None}, tokenizer={"pad_token": None}), []),
    "pad token that is the end token": (
        lambda d: model(d, config={"pad_token_id": 2}, tokenizer={"pad_token": "<|im_end|>"}),
        [],
    ),
    "weights in fp32": (lambda d: model(d, weights=lambda t: {k: v.float() for k, v in t.items()}), []),
    "weights in fp16": (lambda d: model(d, weights=lambda t: {k: v.half() for k, v in t.items()}), []),
    "weights that the model has no place for": (
        lambda d: model(d, weights=lambda t: t | {"v_head.weight": torch.zeros(2)}),
        ["left out 1 tensors", "v_head.weight"],
    ),
    "code in the folder of a family that is known": (
        lambda d: model(d, config={"auto_map": {"AutoConfig": "own.C"}}, files={"own.py": "raise SystemExit('ran')"}),
        [],
    ),
    "rows that repeat a prompt": (
        lambda d: rows(d, GOOD, {"question": "2 + 2?", "answer": "4"}, GOOD, GOOD | {"answer": "3"}),
        ["rows.jsonl: 2 of 4 rows repeat an earlier row's prompt, 1 of them with another answer"],
    ),
    "one row alone": (lambda d: rows(d, GOOD), ["0 of its 1 prompts are held out"]),
    "text of all kinds": (
        lambda d: rows(
            d, *({"question": f"{x}?", "answer": x} for x in ("\x00", "a\u2028b", "\u202eabc", "𝟛٣", "\ufeff1", "é"))
        ),
        ["prompts to train on"],
    ),
    "a number too long to be one": (lambda d: rows(d, GOOD, {"question": "big?", "answer": "9" * 10_000}), []),
    "memory of a GPU where there is none": (lambda d: ["--memory-gib=8"], ["--memory-gib 8.0 has no effect"]),
    "shards of one process": (lambda d: ["--reshard-after-forward=False"], ["--reshard-after-forward has no effect"]),
    "reward that prints when imported": (
        lambda d: reward(d, "print('hello')\ndef f(completion, answer, row):\n    return 1.0\n"),
        ["hello"],
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name, start, tmp_path, device):
    if name.startswith("memory of a GPU") and device.type != "cpu":
        pytest.skip("there is a GPU")
    make_flags, words = ACCEPTED[name]
    said, end = start("--eval-size=4", *make_flags(tmp_path))
    assert end is EngineWanted, end
    assert [w for w in words if w not in said] == [], said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "flag, words", [("--learning-rate=1", ["--learning-rate"]), ("--steps=ten", ["--steps", "ten"]),
                    ("--rollout-quant=fp7", ["--rollout-quant", "fp7", "fp8"]), ("--compile", ["--compile"])]
)  # fmt: skip
def test_a_flag_that_cannot_be_read_is_said_by_the_parser(start, flag, words):
    said, end = start(flag)
    assert end == 2 and "Traceback" not in said
    assert [w for w in words if w not in said] == [], said


def test_the_process_says_it_in_one_line_and_ends_with_1(tmp_path):
    """As a user sees it: the last line is the error, and the weights are read before the engine is built."""
    flags = model(tmp_path, files={"model.safetensors": LFS})
    done = subprocess.run(
        [sys.executable, "train.py", *flags, f"--runs-dir={tmp_path / 'runs'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and lines[-1].startswith("error: --model") and "Git LFS" in lines[-1]
    assert sum(line.startswith("error") for line in lines) == 1 and "Traceback" not in done.stderr
    assert "engine ready" not in done.stdout and not (tmp_path / "runs").exists()


# ---- what only vLLM can judge


def test_what_vllm_says_is_one_line_with_the_flags():
    """More sequences than tokens in a step is a matter of vLLM's own; pydantic says it in five lines."""
    pytest.importorskip("vllm")
    sizes = {"max_model_len": 64, "max_num_seqs": 10**9, "kv_cache_bytes": 1 << 27}
    with pytest.raises(EngineError, match=r"max_num_seqs.*--max-num-seqs") as error:
        Engine(TINY_MODEL, tokenizer=None, quant="none", **sizes)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1_000


def test_an_engine_that_finds_no_memory_is_one_line_with_the_flags(tmp_path, monkeypatch, capfd):
    """What vLLM allocates itself may be too much after every plan; torch says it in a page."""
    vllm = pytest.importorskip("vllm")
    asked = []

    def no_memory(**options):
        asked.append(options)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has\na page of numbers")

    monkeypatch.setattr(vllm, "LLM", no_memory)
    runs = tmp_path / "runs"
    monkeypatch.setattr(sys, "argv", ["train.py", f"--runs-dir={runs}", "--reward-workers=1", "--steps=1"])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert len(asked) == 1 and end.value.code != 0
    said = f"{end.value.code}\n" + capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "could not build the engine" in line and "Tried to allocate 9.00 GiB" in line and "--kv-cache-gib" in line
    assert "--max-num-seqs" in line and "Traceback" not in said and not runs.exists()


def test_a_prompt_that_vllm_refuses_ends_the_run_as_an_engine_error():
    class Refusing:
        def enqueue(self, *_, **__):
            raise ValueError("The decoder prompt\n cannot be empty")

    engine = object.__new__(Engine)
    engine.llm, engine.version, engine.sleep_level, engine.asleep, engine.temperature = Refusing(), 0, 0, False, 1.0
    engine._sampling_params = dict
    with pytest.raises(EngineError, match=r"refuses a prompt: The decoder prompt cannot be empty; .*--data") as error:
        engine.generate([[]], n=1, max_tokens=1)
    assert isinstance(error.value, RuntimeError), "so the run saves what it has learned"


# ---- rows


def test_a_date_that_python_has_not_is_said_of_the_file(tmp_path):
    days = pyarrow.array([date(2024, 1, 1).toordinal(), 10**9], pyarrow.int32()).cast(pyarrow.date32())
    table = pyarrow.table({"question": ["1?", "2?"], "answer": ["1", "2"], "day": days})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(data.DataError, match=r"rows\.parquet: not a readable parquet file") as error:
        data.load_data(str(tmp_path / "rows.parquet"), None, 0)
    assert len(str(error.value).splitlines()) == 1


def test_the_columns_found_are_named_in_one_short_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({f"column\n{i}" * 10: 1 for i in range(5_000)}))
    with pytest.raises(data.DataError, match="'prompt' or 'question'") as error:
        data.load_data(str(path), None, 0)
    assert len(str(error.value)) < 800 and len(str(error.value).splitlines()) == 1


# ---- rewards in their processes


def example(i=0, **row) -> Example:
    return Example(f"row-{i}", [{"role": "user", "content": "?"}], "4", "number", row)


ODD = """
import os, struct, sys

class Liar:
    def __repr__(self):
        raise RuntimeError("no repr either")

def f(completion, answer, row):
    if completion == "raise at length":
        raise ValueError("x" * 5_000_000)
    if completion == "odd object":
        return Liar()
    if completion == "tensor":
        return __import__("array").array("d", [1.0])
    if completion == "numpy bool":
        return __import__("numpy").bool_(True)
    if completion == "recursion":
        return f(completion, answer, row)
    if completion == "interrupt":
        raise KeyboardInterrupt
    if completion == "garbage":
        os.write(int(sys.argv[1]), struct.pack("!i", 6) + b"[1, 2]")
    if completion == "nan in json":
        os.write(int(sys.argv[1]), struct.pack("!i", 11) + b"[NaN, null]")
    if completion == "endless":
        os.write(int(sys.argv[1]), struct.pack("!i", 2**31 - 1))
    if completion == "close":
        os.close(int(sys.argv[1]))
    return 1.0
"""


def test_whatever_a_reward_does_is_0_and_the_rest_is_scored(tmp_path, capfd):
    (tmp_path / "mine.py").write_text(ODD)
    bad = ["raise at length", "odd object", "tensor", "numpy bool", "recursion", "interrupt", "garbage", "nan in json",
           "endless", "close"]  # fmt: skip
    with RewardPool(f"{tmp_path / 'mine.py'}:f", 2, 5.0) as pool:
        for i, completion in enumerate([x for word in bad for x in (word, "good")]):
            pool.submit(i, example(i), completion)
        assert pool.collect() == {i: float(i % 2) for i in range(2 * len(bad))}
        assert pool.errors == len(bad) and pool.calls == 2 * len(bad)
    err = capfd.readouterr().err
    assert err.count("scored 0.0") == 1 and len(err) < 100_000, "a message of any length is cut"


def test_a_row_that_cannot_be_sent_is_0_and_the_rest_is_scored(tmp_path, capfd):
    (tmp_path / "mine.py").write_text("def f(completion, answer, row):\n    return 1.0\n")
    deep = json.loads("[" * 900 + "]" * 900)
    with RewardPool(f"{tmp_path / 'mine.py'}:f", 1, 5.0) as pool:
        for i, row in enumerate([{}, {"deep": deep}, {"odd": lambda: 0}, {}]):
            pool.submit(i, example(i, **row), "x")
        found = pool.collect()
        assert (found[0], found[2], found[3]) == (1.0, 0.0, 1.0)
        assert pool.errors == 2 - int(found[1]), "a later Python may send the deep one"
    assert "its row cannot be sent" in capfd.readouterr().err


def test_the_users_file_is_not_run_in_the_trainer_and_may_take_its_time(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        f"import os, time\nopen({str(tmp_path)!r} + '/by-' + str(os.getpid()), 'w')\ntime.sleep(0.5)\n"
        "def f(completion, answer, row):\n    return 1.0\n"
    )
    with RewardPool(f"{tmp_path / 'mine.py'}:f", 1, 0.2) as pool:
        pool.submit(0, example(), "x")
        assert pool.collect() == {0: 1.0} and pool.timeouts == 0
    assert [p.name for p in tmp_path.glob("by-*")] != [] and not (tmp_path / f"by-{os.getpid()}").exists()
    monkeypatch.setattr(reward_pool, "START_LIMIT", 0.1)
    with pytest.raises(RewardError, match=r"--reward .*mine\.py:f: .* did not start: it took longer than 0.1 s"):
        RewardPool(f"{tmp_path / 'mine.py'}:f", 1, 5.0)


def test_processes_that_cannot_be_started_are_an_error_and_the_others_end(monkeypatch):
    started, popen = [], subprocess.Popen

    def limited(*args, **options):
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", limited)
    with pytest.raises(RewardError, match=r"--reward-workers: with 2 of them running.*temporarily unavailable"):
        RewardPool(None, 3, 1.0)
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_a_worker_says_nothing_when_the_trainer_is_gone(tmp_path):
    """A run that ends early, by one error line, leaves no traceback of its workers behind that line."""
    script = "import reward_pool, os\nreward_pool._Worker(None, [])\nos._exit(0)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30)
    time.sleep(0.5)
    assert (done.returncode, done.stderr) == (0, "")


# ---- the run folder


def test_a_file_of_the_run_folder_that_cannot_be_written_is_an_error_that_saves(tmp_path):
    run = RunFolder(str(tmp_path), "a", {})
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl cannot be written: Is a directory") as error:
        run.log({"step": 1})
    assert isinstance(error.value, RuntimeError), "train.saved_on_failure takes these"


def test_a_runs_dir_that_cannot_be_written_is_refused_before_anything_is_built(start, tmp_path, monkeypatch):
    """os.access is asked; who runs the tests may be root, to whom every folder is writable."""
    (tmp_path / "locked").mkdir()
    real, wanted = os.access, str(tmp_path / "locked")

    def access(path, mode, **options):
        return real(path, mode, **options) and not (str(path) == wanted and mode & os.W_OK)

    monkeypatch.setattr(os, "access", access)
    _, error = start(f"--runs-dir={tmp_path / 'locked' / 'runs'}")
    assert re.fullmatch(rf"error: --runs-dir \S+ cannot be written: {wanted} is no writable folder", error)
    assert not any((tmp_path / "locked").iterdir())


def test_two_runs_with_one_name_that_start_together_do_not_share_a_folder(tmp_path, monkeypatch):
    """Both found the name free; the second to make the folder is refused, and writes nothing."""
    first = RunFolder(str(tmp_path), "a", {"lr": 1.0})
    monkeypatch.setattr(run_folder, "check_free", lambda runs_dir, name: Path(runs_dir) / name)
    with pytest.raises(RunFolderError, match="--run-name"):
        RunFolder(str(tmp_path), "a", {"lr": 2.0})
    assert json.loads((first.path / "config.json").read_text()) == {"lr": 1.0}


def test_wandb_that_is_missing_is_said_before_anything_is_built(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    _, error = start("--wandb")
    assert error == "error: --wandb needs the package wandb: pip install wandb"


# ---- the table


def entries() -> list[tuple[str, str, list[str]]]:
    """(input, what is seen, tests) of every line of the table."""
    lines = [line.strip().strip("|").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [(c[0], c[1], re.findall(r"`(test_[^`]+)`", c[2])) for c in cells if c[0] != "input"]


def test_the_table_is_long_enough_and_every_line_says_what_is_seen():
    table = entries()
    assert len(table) >= 40 and len({name for name, *_ in table}) == len(table)
    assert all(len(seen) > 10 and tests for _, seen, tests in table)


def test_every_test_that_the_table_names_exists():
    functions = {}
    for file in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(file.read_text())
        functions[file.name] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for name, _, tests in entries():
        for test in tests:
            file, function, parameter = re.fullmatch(r"(test_\w+\.py)::(\w+)(?:\[(.+)\])?", test).groups()
            assert function in functions.get(file, ()), f"{name}: there is no {test}"
            if parameter:
                assert f'"{parameter}"' in (ROOT / "tests" / file).read_text(), f"{name}: no case {test}"


def test_every_case_here_is_in_the_table():
    named = {test for *_, tests in entries() for test in tests}
    cases = [f"test_refused[{name}]" for name in REFUSED] + [f"test_accepted[{name}]" for name in ACCEPTED]
    assert [case for case in cases if f"test_bad_input.py::{case}" not in named] == []


def test_every_reward_by_name_is_0_for_an_empty_response():
    for name in rewards.REWARDS:
        assert rewards.score(name, example(), "") == (0.0, None)
        assert rewards.score(name, Example("x", [], "4", "number", {}, marker="answer-line"), "") == (0.0, None)
