"""Safety: code of a model's folder does not run unasked, keys stay out of what a run writes and tells its rewards, and
what a model writes is parsed within bounds of time and memory."""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import keys
import parts
import reward_pool
import run_folder
import train
from config import TINY_MODEL, Args, ConfigError
from data import DataError, Example, encode_prompts
from reward_pool import RewardPool
from rewards import RewardError
from run_folder import RunFolder

ROOT = Path(train.__file__).resolve().parent
TINY = Path(TINY_MODEL)
needs_tiny_model = pytest.mark.skipif(
    not (TINY / "model.safetensors").exists(), reason="assets/tiny-adder is not there"
)
needs_engine = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
HUGE = 10_000_000  # characters


# ---- code of the model's folder

CODE = """
open({marker!r}, "w").write("ran")
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
class Config(Qwen2Config):
    model_type = {family!r}
class Model(Qwen2ForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(tmp_path: Path, family: str, part: str) -> tuple[Path, Path]:
    """(folder, marker): the tiny model with code of its own for its config and model, or for its tokenizer; the code
    would write the marker."""
    folder, marker = Path(shutil.copytree(TINY, tmp_path / "model")), tmp_path / "marker"
    (folder / "own.py").write_text(CODE.format(marker=str(marker), family=family))
    name = "config.json" if part == "model" else "tokenizer_config.json"
    content = json.loads((folder / name).read_text())
    if part == "model":
        content |= {"model_type": family, "architectures": ["Model"]}
        content["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    else:
        content |= {"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (folder / name).write_text(json.dumps(content))
    return folder, marker


def flags_of(folder: Path, trusted: bool = False) -> Args:
    sizes = {"max_prompt_len": 32, "max_response_len": 8, "data": "arithmetic:add1"}
    return Args(model=str(folder), trust_remote_code=trusted, **sizes).resolved()


@needs_tiny_model
def test_code_of_an_unknown_architecture_is_refused_by_the_flags_name(tmp_path):
    folder, marker = with_code(tmp_path, "brand_new", "model")
    with pytest.raises(ConfigError, match=r"--model .*config\.json.*code of its own; --trust-remote-code"):
        parts.load_config(flags_of(folder))
    assert not marker.exists()


@needs_tiny_model
@pytest.mark.parametrize("family, part", [("qwen2", "model"), ("qwen2", "tokenizer")])
def test_code_of_a_known_architecture_is_left_alone(tmp_path, family, part):
    folder, marker = with_code(tmp_path, family, part)
    config, _ = parts.load_config(flags_of(folder))
    parts.load_model(str(folder), torch.device("cpu"))
    parts.plan_device(flags_of(folder), config)
    assert not marker.exists() and type(config).__module__.startswith("transformers.")


@needs_tiny_model
def test_code_runs_if_asked_for(tmp_path, monkeypatch):
    """Or the tests above would prove nothing."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = with_code(tmp_path, "brand_new", "model")
    config, _ = parts.load_config(flags_of(folder, trusted=True))
    assert marker.exists() and config.model_type == "brand_new"


@needs_tiny_model
@pytest.mark.parametrize("given, expected", [([], False), (["--trust-remote-code"], True)])
def test_the_engine_is_told_what_the_flag_says(tmp_path, monkeypatch, given, expected):
    told = []

    def engine(*_, trust_remote_code, **__):
        told.append(trust_remote_code)
        raise RewardError("enough")

    monkeypatch.setattr(parts, "Engine", engine)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--runs-dir={tmp_path}", "--reward-workers=1", *given])
    with pytest.raises(SystemExit, match="enough"):
        train.main()
    assert told == [expected]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_chat_template_is_run_in_a_sandbox(template):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.chat_template = template
    asked = Example("made:1", [{"role": "user", "content": "1 + 1?"}], "2", "number", {})
    with pytest.raises(DataError, match="made:1: the chat template of --model refuses"):
        encode_prompts([asked], tokenizer, 32)


# ---- keys

KEYS = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_ACCESS_KEY_ID", "APIKEY_TOKEN",
        "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DB_PASSWORD", "MY_SECRET", "GOOGLE_APPLICATION_CREDENTIALS",
        "azure_api_key", "SSH_PRIVATE_KEY", "SECRET_KEY", "TOKEN"]  # fmt: skip
NO_KEYS = ["PATH", "HOME", "TOKENIZERS_PARALLELISM", "MODEL_KEY", "KEYBOARD", "MONKEY", "CUDA_VISIBLE_DEVICES",
           "HF_HOME", "SECRETARY", "OMP_NUM_THREADS", "PYTHONPATH", "LD_LIBRARY_PATH", "WANDB_MODE"]  # fmt: skip


def test_which_variables_hold_keys():
    assert [name for name in KEYS if not keys.is_key(name)] == []
    assert [name for name in NO_KEYS if keys.is_key(name)] == []


@pytest.fixture
def planted(monkeypatch) -> dict[str, str]:
    """Keys in the environment, each with a value of its own."""
    values = {name: f"planted-{i}-{name.lower()[::-1]}" for i, name in enumerate(KEYS)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


def test_values_of_keys_are_replaced_by_their_names_and_short_ones_stay(planted, monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "true")
    text = f"before {planted['HF_TOKEN']}{planted['DB_PASSWORD']} after, true"
    assert keys.redacted(text) == "before [HF_TOKEN][DB_PASSWORD] after, true"


TELL = """
import json, os
def f(completion, answer, row):
    return float(completion in os.environ)
"""


def test_rewards_are_told_no_key_but_what_is_kept_by_name(planted, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(TELL)
    asked = Example("x", [{"role": "user", "content": "?"}], "4", "number", {})

    def told() -> set[str]:
        with RewardPool(f"{tmp_path / 'mine.py'}:f", 1, 5.0) as pool:
            for name in [*KEYS, "PATH", "TOKENIZERS_PARALLELISM"]:
                pool.submit(name, asked, name)
            return {name for name, found in pool.collect().items() if found}

    assert told() == {"PATH", "TOKENIZERS_PARALLELISM"}
    monkeypatch.setenv(reward_pool.KEEP, "OPENAI_API_KEY, MY_SECRET")
    assert told() == {"PATH", "TOKENIZERS_PARALLELISM", "OPENAI_API_KEY", "MY_SECRET"}
    monkeypatch.setenv(reward_pool.KEEP, "OPENAI_API_KEY,NOT_SET_KEY")
    with pytest.raises(RewardError, match="ROLLOUT8_REWARD_ENV names NOT_SET_KEY, which is not set"):
        RewardPool(None, 1, 5.0)


def test_a_key_in_the_diff_is_not_written(planted, monkeypatch, tmp_path):
    diff = f'+os.environ["HF_TOKEN"] = "{planted["HF_TOKEN"]}"'
    monkeypatch.setattr(run_folder, "_git", lambda *_: diff)
    run = RunFolder(str(tmp_path), "a", {})
    env = json.loads((run.path / "env.json").read_text())
    assert env["git_diff"] == '+os.environ["HF_TOKEN"] = "[HF_TOKEN]"'


@pytest.mark.parametrize("flag", ["model", "data", "run_name", "reward", "chat_template_kwargs", "runs_dir"])
def test_a_key_in_a_flag_is_refused_and_not_repeated(planted, flag):
    value = f'{{"note": "{planted["HF_TOKEN"]}"}}' if flag == "chat_template_kwargs" else planted["HF_TOKEN"]
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} holds the value of HF_TOKEN") as error:
        Args(**{flag: value}).resolved()
    assert planted["HF_TOKEN"] not in str(error.value)


@pytest.mark.parametrize("kind", [ConfigError, KeyError])
def test_an_error_does_not_repeat_a_key(planted, monkeypatch, kind):
    """Nor does the traceback of one that has no message of its own."""

    def fails(args, ranks):
        try:
            raise ValueError(f"first {planted['DB_PASSWORD']}")
        except ValueError as error:
            raise kind(f"https://user:{planted['HF_TOKEN']}@host refused {planted['MY_SECRET']}") from error

    monkeypatch.setattr(train, "train", fails)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        train.main()
    if kind is ConfigError:
        assert end.value.code == "error: https://***@host refused [MY_SECRET]"
        return
    lines = end.value.code.splitlines()
    assert "Traceback" in lines[0] and "ValueError: first [DB_PASSWORD]" in lines
    assert lines[-1] == "KeyError: 'https://***@host refused [MY_SECRET]'"
    assert [name for name, value in planted.items() if value in end.value.code] == []


def test_an_event_and_a_lost_checkpoint_do_not_repeat_a_key(planted, tmp_path, capsys):
    class Denied:
        def write(self, folder):
            raise OSError(f"s3://{planted['AWS_ACCESS_KEY_ID']}:{planted['AWS_SECRET_ACCESS_KEY']}@host is full")

        def wait(self):
            pass

    run = RunFolder(str(tmp_path), "a", {})
    run.save_checkpoint(1, Denied(), wait=False)
    run._join_writer()
    train.report_lost_checkpoint(run, 2)
    run.log_event({"step": 2, "event": "x", "message": f"told {planted['HF_TOKEN']}", "n": 1.5})
    lost, told = (json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines())
    assert lost["event"] == "checkpoint_failed" and "s3://***@host is full" in lost["message"]
    assert told == {"step": 2, "event": "x", "message": "told [HF_TOKEN]", "n": 1.5}
    said = capsys.readouterr().err
    assert "s3://***@host is full" in said and not any(value in said for value in planted.values())


SPILL = """
import os
def f(completion, answer, row):
    raise ValueError(f"all that I know: {dict(os.environ)}")
"""


@needs_tiny_model
@needs_engine
def test_a_whole_run_writes_and_prints_no_key(planted, tmp_path):
    """With the trackers' files, a checkpoint, and a reward that tells everything that it was told, one key among it."""
    (tmp_path / "mine.py").write_text(SPILL)
    known = [f"--{name}" for name in ("wandb", "tensorboard") if importlib.util.find_spec(name)]
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", reward_pool.KEEP: "OPENAI_API_KEY"}
    done = subprocess.run(
        [sys.executable, "train.py", "--steps=1", "--prompts-per-step=2", "--samples-per-prompt=2", "--eval-size=4",
         "--no-dynamic-sampling", f"--reward={tmp_path / 'mine.py'}:f", f"--runs-dir={tmp_path / 'runs'}",
         "--run-name=x", "--alarms.reward-errors=0", *known],
        cwd=ROOT, env=os.environ | quiet, capture_output=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:].decode()
    assert b"all that I know" in done.stderr and b"[OPENAI_API_KEY]" in done.stderr
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"config.json", "env.json", "metrics.jsonl", "samples.jsonl", "model.safetensors"} <= names
    assert "--wandb" not in known or any(name.endswith(".wandb") for name in names)
    assert "--tensorboard" not in known or any(name.startswith("events.out.tfevents") for name in names)
    places = {"stdout": done.stdout, "stderr": done.stderr} | {str(path): path.read_bytes() for path in written}
    spilled = [(place, name) for place, content in places.items() for name, value in planted.items()
               if value.encode() in content]  # fmt: skip
    assert spilled == []


# ---- what a model writes


def scored(gold: str, marker: str = "answer-line", i: int = 0) -> Example:
    return Example(f"made:{i}", [{"role": "user", "content": "?"}], gold, "math-verify", {}, marker)


HOSTILE = [
    "9**9**9", "9^{9^{9}}", "10^{10^{10}}", "1e999999999", "1E999999999", "10^{999999999}", "10^{-10^{9}}", "9!!!!!!!!",
    r"\binom{10^9}{5\cdot 10^8}", r"\sum_{i=1}^{10^9} i", r"\prod_{i=1}^{999999} i", r"\lfloor 10^{10^9} \rfloor",
    r"\frac{" * 60, r"\frac12" * 60, r"\sqrt{" * 60, r"\sqrt{" * 30 + "2" + "}" * 30, "x^{" * 60 + "2" + "}" * 60,
    "(" * 140 + "3" + ")" * 140, r"\left(" * 20 + "1" + r"\right)" * 20, r"\int_0^1 " * 30 + "x", "1/" * 140 + "1",
    "+".join("x" * 140), r"\{" + ",".join(map(str, range(80))) + r"\}", "|" * 200, "1 or " * 60 + "2", r"\cup" * 60,
    r"\begin{matrix}" + "1&" * 80 + r"\end{matrix}", 
    "(x+1)^{9999999}", "x^{1000000}", "a_{b_{c_{d_{e_{f}}}}}" * 10, "x=y=z=w=" * 20, "%" * 200,
    "٣", "\N{MATHEMATICAL BOLD DIGIT THREE}", "\N{FULLWIDTH DIGIT THREE}", "\N{ROMAN NUMERAL THREE}", "\u202e3",
    "3\u200b", "\x00", "\ud800", "__import__('os').system('true')",
    "1" * HUGE, "x" * HUGE, r"\boxed{" * (HUGE // 7), "1," * (HUGE // 2), r"\text{" * (HUGE // 6), " " * HUGE + "3",
]  # fmt: skip
GOLDS = ["3", r"\sqrt{2}", "(1, 2)"]


def test_hostile_answers_are_0_in_bounded_time_and_memory():
    """All of them against golds of all kinds; what gets as far as math-verify may run into the time limit."""
    pytest.importorskip("math_verify")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with RewardPool(None, 2, 5.0, ["math_verify"]) as pool:
        for g, gold in enumerate(GOLDS):
            for i, text in enumerate(HOSTILE):
                for marker in ("box", "answer-line") if len(text) < 1_000 else ("box",):
                    completion = f"\\boxed{{{text}}}" if marker == "box" else f"Answer: {text}"
                    pool.submit((g, i, marker), scored(gold, marker), completion)
            pool.submit((g, "right"), scored(gold), f"Answer: {gold}")
        found = pool.collect()
        assert time.monotonic() - start < 60
        assert [key for key, value in found.items() if value != float(key[-1] == "right")] == []
        assert pool.timeouts <= 2, "nearly all are refused before any algebra"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, "KiB, in this process"


def test_a_worker_is_bounded_and_goes_before_the_trainer(tmp_path):
    """What a user's file may need is not bounded; memory that runs out takes a worker first either way."""
    (tmp_path / "mine.py").write_text("def f(completion, answer, row):\n    return 1.0\n")
    for spec, limit in ((None, str(reward_pool.MEMORY_LIMIT)), (f"{tmp_path / 'mine.py'}:f", None)):
        with RewardPool(spec, 1, 5.0) as pool:
            process = Path(f"/proc/{pool._workers[0].process.pid}")
            (line,) = (s for s in (process / "limits").read_text().splitlines() if s.startswith("Max address space"))
            assert (line.split()[3] == limit) == (limit is not None)
            if os.access("/proc/self/oom_score_adj", os.W_OK):
                assert (process / "oom_score_adj").read_text().strip() == "1000"


def test_algebra_that_takes_memory_without_end_does_not_get_it():
    """math-verify expands (x + 1)^9999999; a process with little memory says no and goes on with the next."""
    pytest.importorskip("math_verify")
    with RewardPool(None, 1, 30.0, ["math_verify"]) as pool:
        worker = pool._workers[0]
        resource.prlimit(worker.process.pid, resource.RLIMIT_AS, (2**28, resource.RLIM_INFINITY))
        pool.submit(0, scored(r"\frac{x^2+1}{2} + x^{99999}"), "Answer: (x+1)^{9999999}")
        pool.submit(1, scored(r"\sqrt{12}"), r"Answer: $2\sqrt{3}$")
        assert pool.collect() == {0: 0.0, 1: 1.0}
        assert pool.timeouts == 0 and pool._workers == [worker]


def test_a_reward_that_hangs_does_not_outlive_a_trainer_that_is_killed(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completion, answer, row):\n    while True:\n        pass\n")
    script = (
        "import reward_pool, data, sys, time\n"
        f"pool = reward_pool.RewardPool({str(tmp_path / 'mine.py')!r} + ':f', 1, 600.0)\n"
        "pool.submit(0, data.Example('x', [], '4', 'number', {}), 'x')\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = Path(f"/proc/{int(trainer.stdout.readline())}/stat")
    assert worker.exists()
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 10
    while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < deadline
        time.sleep(0.05)
