"""trackers.py: the keys and steps of metrics.jsonl, samples, a config without secrets; a failure that ends no run."""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import json
import math
import sys
import types

import pytest

import trackers
from keys import without_secrets
from run_folder import RunFolder
from trackers import TrackerError, Trackers, check_trackers

METRICS = [{"step": 0, "eval/accuracy": 0.25}, {"step": 1, "reward/mean": 0.5, "train/grad_norm": math.nan}]
SAMPLE = {
    "step": 1,
    "id": "made:1",
    "prompt": [{"role": "user", "content": "1 + 1?\nSay."}],
    "answer": "2",
    "text": "# 2 <b>\n2",
    "reward": 1.0,
    "tokens": 3,
    "finish_reason": "stop",
    "token_texts": ["2"],
    "logprobs": [-0.5],
}


class FakeWandb(types.ModuleType):
    """Writes down what it is given; raises from call `breaks_at` on, counted over log and finish."""

    def __init__(self, breaks_at: int = 99):
        super().__init__("wandb")
        self.given, self.logged, self.calls, self.breaks_at = None, [], 0, breaks_at

    def init(self, **given):
        self.given = given
        return self

    def Table(self, columns, data):
        return [dict(zip(columns, row, strict=True)) for row in data]

    def log(self, values, step):
        self._count()
        self.logged.append((step, values))

    def finish(self):
        self._count()
        self.logged.append("finished")

    def _count(self):
        self.calls += 1
        if self.calls >= self.breaks_at:
            raise ConnectionError("the network\nis gone")


@pytest.fixture
def wandb(monkeypatch):
    def make(**options):
        fake = FakeWandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return make


def test_wandb_has_the_config_the_metrics_and_a_table_of_samples(wandb, tmp_path):
    fake = wandb()
    run = RunFolder(str(tmp_path), "a", {"lr": 1.0}, use_wandb=True)
    for metrics in METRICS:
        run.log(metrics)
    run.log_samples([SAMPLE])
    run.log_samples([])
    run.close()
    assert (fake.given["name"], fake.given["config"], fake.given["dir"]) == ("a", {"lr": 1.0}, str(tmp_path / "a"))
    assert fake.logged[:2] == [(0, METRICS[0]), (1, METRICS[1])]
    step, values = fake.logged[2]
    (row,) = values["samples"]
    assert step == 1 and row["prompt"] == "user: 1 + 1?\nSay." and row["text"] == SAMPLE["text"]
    assert row.keys() == set(trackers.SAMPLE_COLUMNS) and fake.logged[3:] == ["finished"]


def test_a_tracker_that_fails_is_said_once_counted_and_ends_nothing(wandb, tmp_path, capsys):
    fake = wandb(breaks_at=2)
    run = RunFolder(str(tmp_path), "a", {}, use_wandb=True)
    for step in range(4):
        run.log({"step": step})
    run.log_samples([SAMPLE])
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 4
    warning = capsys.readouterr().err
    assert warning == "warning: --wandb failed and the run goes on: ConnectionError: the network\n"
    run.close()
    assert fake.logged == [(0, {"step": 0})]
    assert capsys.readouterr().err == "--wandb failed 5 times; the run folder has everything\n"


def test_a_tracker_that_fails_with_a_key_does_not_say_it(wandb, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "marker-of-wandb")

    def denied(*args, **options):
        raise ConnectionError("https://api:marker-of-wandb@host: 401 for marker-of-wandb")

    monkeypatch.setattr(wandb(), "log", denied)
    run = RunFolder(str(tmp_path), "a", {}, use_wandb=True)
    run.log({"step": 1})
    said = capsys.readouterr().err
    assert said == (
        "warning: --wandb failed and the run goes on: ConnectionError: https://***@host: 401 for [WANDB_API_KEY]\n"
    )


def test_ctrl_c_in_a_tracker_is_not_its_failure(wandb, tmp_path, monkeypatch):
    fake = wandb()
    run = Trackers(True, False, "a", {}, tmp_path)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.log(METRICS[0])
    assert run.failures == {}


def test_a_tracker_that_does_not_start_says_what_to_do(wandb, tmp_path, monkeypatch):
    def no_key(**options):
        raise RuntimeError("no API key")

    monkeypatch.setattr(wandb(), "init", no_key)
    with pytest.raises(TrackerError, match=r"no API key.*WANDB_MODE=offline"):
        Trackers(True, False, "a", {}, tmp_path)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_package_that_is_missing_is_named_with_its_flag(monkeypatch, name):
    check_trackers(wandb=False, tensorboard=False)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrackerError, match=f"--{name} needs the package {name}: pip install {name}"):
        check_trackers(wandb=name == "wandb", tensorboard=name == "tensorboard")


def test_wandb_itself_runs_offline_and_keeps_everything_in_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = RunFolder(str(tmp_path), "a", {"model": "m"}, use_wandb=True)
    for metrics in METRICS:
        run.log(metrics)
    run.log_samples([SAMPLE])
    run.close()
    assert list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    (table,) = (run.path / "wandb").glob("offline-run-*/files/media/table/*.table.json")
    assert json.loads(table.read_text())["data"][0][1] == "made:1"


# ---- TensorBoard


def test_tensorboard_has_the_keys_and_steps_of_the_metrics(tmp_path, monkeypatch):
    """The writer is torch's; what it is given is what counts here."""
    given = []

    class Writer:
        def __init__(self, log_dir):
            given.append(log_dir)

        def __getattr__(self, name):
            return lambda *values: given.append((name, *values))

    monkeypatch.setattr(trackers, "_import_writer", lambda: Writer)
    run = RunFolder(str(tmp_path), "a", {"lr": 1.0}, use_tensorboard=True)
    for metrics in METRICS:
        run.log(metrics)
    run.log_samples([SAMPLE])
    run.close()
    assert given[0] == str(run.path / "tensorboard") and given[1][:2] == ("add_text", "config")
    scalars = [(key, step) for name, key, _, step in (g for g in given if len(g) == 4) if name == "add_scalar"]
    assert scalars == [("eval/accuracy", 0), ("reward/mean", 1), ("train/grad_norm", 1)]
    (text,) = [g for g in given if g[:2] == ("add_text", "samples")]
    assert "    # 2 <b>\n" not in text[2] and "    text: # 2 <b>\n    2" in text[2], "as code, not as Markdown"
    assert text[3] == 1 and given[-1] == ("close",)


def test_tensorboards_own_files_can_be_read_back(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(str(tmp_path), "a", {"lr": 1.0}, use_tensorboard=True)
    for metrics in METRICS:
        run.log(metrics)
    run.log_samples([SAMPLE])
    run.close()
    read = EventAccumulator(str(run.path / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {k for m in METRICS for k in m} - {"step"}
    assert [(e.step, e.value) for e in read.Scalars("reward/mean")] == [(1, 0.5)]


# ---- secrets


def test_secrets_are_taken_out_wherever_they_are(wandb, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "MY_SECRET", "DB_PASSWORD"):
        monkeypatch.setenv(name, f"value-of-{name}")
    monkeypatch.setenv("SHORT_KEY", "fp8")
    monkeypatch.setenv("LONGER_TOKEN", "value-of-HF_TOKEN-and-more")
    config = {
        "model": "https://me:word@host/m?x=a@b",
        "data": "value-of-HF_TOKEN-and-more",
        "rollout_quant": "fp8",
        "micro_batch_tokens": 16384,
        "nested": ["say value-of-OPENAI_API_KEY", {"k": "value-of-MY_SECRET value-of-DB_PASSWORD"}],
        "none": None,
    }
    cleaned = {
        "model": "https://***@host/m?x=a@b",
        "data": "[LONGER_TOKEN]",
        "rollout_quant": "fp8",
        "micro_batch_tokens": 16384,
        "nested": ["say [OPENAI_API_KEY]", {"k": "[MY_SECRET] [DB_PASSWORD]"}],
        "none": None,
    }
    assert without_secrets(config) == cleaned
    fake = wandb()
    Trackers(True, False, "a", config, tmp_path)
    assert fake.given["config"] == cleaned
