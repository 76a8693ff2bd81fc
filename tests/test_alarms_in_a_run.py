"""The faults that alarms.py is for, planted in train.py's loop: each is a line of events.jsonl with its numbers; those
that make a run worthless end it with a checkpoint, and the flag that the message names turns it off."""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import copy
from pathlib import Path

import pytest
import torch
from fake_run import FakeEngine, FakePlan, install, one_or_two, read_lines, run_main

import parts
import train
from config import TINY_MODEL
from policy import Policy
from rollout import Sample

pytestmark = pytest.mark.skipif(
    not Path(TINY_MODEL, "model.safetensors").exists(), reason="assets/tiny-adder is not there"
)


class CopyEngine(FakeEngine):
    """Gives the log-probs of the weights that the last sync wrote, in FP8: `CopyPlan.copy`."""

    def generate(self, prompts, *, n, on_finished=lambda i, samples: None, **options):
        groups = super().generate(prompts, n=n, **options)
        for i, (prompt, samples) in enumerate(zip(prompts, groups, strict=True)):
            for sample in samples:
                sample.rollout_logprobs = self._logprobs(prompt, sample.token_ids)
            on_finished(i, samples)
        return groups

    @torch.no_grad()
    def _logprobs(self, prompt: list[int], response: list[int]) -> list[float]:
        logits = CopyPlan.copy(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float()
        at = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return at.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()


class CopyPlan(FakePlan):
    """The sync as a copy in FP8; `fault(number of syncs so far, copy)` may do something else, and says so by True."""

    copy: torch.nn.Module
    policy: torch.nn.Module
    fault = staticmethod(lambda n, weights: False)

    @classmethod
    def build(cls, policy, engine_model, ranks=None):
        plan, plan.syncs = cls(), 0
        cls.policy, cls.copy = policy, copy.deepcopy(policy)
        cls.copy.set_attn_implementation("sdpa")
        return plan

    @torch.no_grad()
    def sync(self):
        self.syncs += 1
        if type(self).fault(self.syncs, self.copy):
            return
        for mine, its in zip(self.copy.parameters(), self.policy.parameters(), strict=True):
            mine.copy_(its.to(torch.float8_e4m3fn) if its.dim() == 2 else its)


def stale(n: int, weights: torch.nn.Module) -> bool:
    """From the fifth step's sync on nothing is written."""
    return n > 5


@torch.no_grad()
def corrupt(n: int, weights: torch.nn.Module) -> bool:
    """From then on one layer has its rows in another order, as by a wrong offset."""
    if n > 5:
        weight = weights.model.layers[0].mlp.down_proj.weight
        weight.copy_(weight.roll(1, 0))
    return n > 5


@pytest.fixture
def fake(monkeypatch):
    return install(monkeypatch)


@pytest.fixture
def run(fake, tmp_path, monkeypatch, capsys):
    """run(event, *flags) -> (its lines in events.jsonl, how the run ended: None or its error, the run folder)."""

    def started(event: str, *flags: str, right: str = "1"):
        standard = ["--steps=9", "--eval-every=0", "--save-every=0", "--lr=1e-5", "--run-name=x", "--reward-workers=1"]
        try:
            run_main(monkeypatch, *one_or_two(tmp_path, right), *standard, *flags)
            end = None
        except SystemExit as error:
            said = [str(error.code), *capsys.readouterr().err.splitlines()]
            end = next((line for line in said if line.startswith("error: ")), f"exit {error.code}")
        folder = tmp_path / "runs" / "x"
        events = read_lines(folder / "events.jsonl") if (folder / "events.jsonl").exists() else []
        return [e for e in events if e["event"] == event], end, folder

    return started


def stopped_after(step: int, end: str | None, folder: Path) -> bool:
    """By an alarm, with what was learned on the disk and the last step's line written."""
    metrics = read_lines(folder / "metrics.jsonl")
    saved = [p.name for p in (folder / "checkpoints").iterdir()]
    assert end is not None and end.startswith(f"error: stopped after step {step}: "), end
    assert metrics[-1]["step"] == step and saved == [f"step-{step:06d}"]
    return (folder / "checkpoints" / saved[0] / "training" / "state.json").is_file()


def went_on(end: str | None, folder: Path) -> bool:
    return end is None and read_lines(folder / "metrics.jsonl")[-1]["step"] == 9


@pytest.fixture
def copying(run, monkeypatch):
    """An engine whose samples are those of what the sync wrote."""
    monkeypatch.setattr(parts, "Engine", CopyEngine)
    monkeypatch.setattr(parts, "SyncPlan", CopyPlan)


@pytest.mark.parametrize(("fault", "lr"), [(stale, "1e-3"), (corrupt, "1e-5")])
def test_a_sync_that_writes_nothing_or_other_weights(run, copying, monkeypatch, fault, lr):
    """`verify` sees nothing here, the mismatch does: in the next step's samples; one more such step ends the run."""
    monkeypatch.setattr(CopyPlan, "fault", staticmethod(fault))
    events, end, folder = run("mismatch", f"--lr={lr}")
    first, last = (e["step"] for e in (events[0], events[-1]))
    assert first >= 6 and last == first + 1 and stopped_after(last, end, folder)
    gaps = {m["step"]: m["mismatch/abs_dlogp_mean"] for m in read_lines(folder / "metrics.jsonl")}
    assert [e["steps"] for e in events] == [1, 2] and events[-1]["threshold"] == 4
    assert all(e["abs_dlogp_mean"] == gaps[e["step"]] > 4 * e["level"] > 0 for e in events)
    assert "stale or corrupt weights" in end and "--alarms.mismatch 4" in end


@pytest.mark.parametrize("flags", [(), ("--alarms.mismatch=0",)])
def test_a_sync_that_works_says_nothing_and_neither_does_an_alarm_that_is_off(run, copying, monkeypatch, flags):
    if flags:
        monkeypatch.setattr(CopyPlan, "fault", staticmethod(corrupt))
    events, end, folder = run("mismatch", *flags)
    gaps = [m["mismatch/abs_dlogp_mean"] for m in read_lines(folder / "metrics.jsonl")]
    assert events == [] and went_on(end, folder) and min(gaps) > 0
    assert (gaps[-1] > 4 * gaps[2]) == bool(flags), "the fault is one that would be seen"


@pytest.fixture
def nan_gradients(monkeypatch):
    """From the second step on."""
    loss, begun = train.policy_loss, []

    def broken(*args):
        begun.append(1)
        value, stats = loss(*args)
        return value * (float("nan") if len(begun) > 1 else 1.0), stats

    monkeypatch.setattr(train, "policy_loss", broken)


def test_gradients_that_are_not_finite(run, nan_gradients):
    events, end, folder = run("nonfinite")
    assert [e["step"] for e in events] == [2, 6], "said when it begins, and when it ends the run"
    assert [(e["steps"], e["skipped"], e["applied"]) for e in events] == [(1, 1, 0), (5, 1, 0)]
    assert stopped_after(6, end, folder) and "--alarms.skipped-updates 5" in end
    metrics = read_lines(folder / "metrics.jsonl")
    assert [m["train/skipped_total"] for m in metrics] == [0, 1, 2, 3, 4, 5] and metrics[-1]["train/grad_norm"] is None


def test_gradients_that_are_not_finite_are_said_alone_where_the_alarm_is_off(run, nan_gradients):
    events, end, folder = run("nonfinite", "--alarms.skipped-updates=0")
    assert [e["step"] for e in events] == [2] and went_on(end, folder)


def test_groups_that_are_all_equal(run):
    (event,), end, folder = run("equal_groups", "--max-sample-rounds=1", right="3")
    assert (event["step"], event["steps"], event["solved_share"], event["failed_share"]) == (5, 5, 0.0, 1.0)
    assert stopped_after(5, end, folder) and "--alarms.equal-groups 0" in end


def test_groups_that_are_all_equal_go_on_where_the_alarm_is_off(run):
    events, end, folder = run("equal_groups", "--max-sample-rounds=1", "--alarms.equal-groups=0", right="3")
    assert events == [] and went_on(end, folder)


BROKEN = "def f(completion, answer, row):\n    return float(completion) / (completion == answer)\n"  # raises for "2"


@pytest.mark.parametrize(("limit", "stops"), [(0.4, True), (0.6, False), (0, False)])
def test_a_reward_function_that_fails(run, tmp_path, limit, stops):
    """Every second response; the others have their reward."""
    (tmp_path / "mine.py").write_text(BROKEN)
    events, end, folder = run("reward_errors", f"--reward={tmp_path / 'mine.py'}:f", f"--alarms.reward-errors={limit}")
    if not stops:
        assert events == [] and went_on(end, folder)
        return
    (event,) = events
    assert event["step"] == 1 and event["threshold"] == limit and event["scored"] == 2 * event["errors"] > 0
    assert stopped_after(1, end, folder) and f"--alarms.reward-errors {limit:g}" in end


@pytest.mark.parametrize("limit", [0.1, 0])
def test_a_policy_that_collapses(run, monkeypatch, limit):
    """In the fifth step its logits are 30 times as large; the master weights undo that with the step's update."""
    logprobs = Policy.logprobs

    def collapsed(policy, batch):
        if policy.updates != 4:
            return logprobs(policy, batch)
        norm = policy.model.model.norm.weight
        norm.data.mul_(30)
        return logprobs(policy, batch)

    monkeypatch.setattr(Policy, "logprobs", collapsed)
    events, end, folder = run("entropy", "--alarms.mismatch=0", f"--alarms.entropy={limit}")
    assert went_on(end, folder), "it is said, and stops nothing"
    assert [e["step"] for e in events] == ([5] if limit else [])
    entropies = [m["train/entropy"] for m in read_lines(folder / "metrics.jsonl")]
    assert entropies[4] < 0.1 * sum(entropies[:3]) / 3
    for event in events:
        assert event["entropy"] == entropies[4] and event["threshold"] == 0.1
        assert event["first"] == pytest.approx(sum(entropies[:3]) / 3)


@pytest.mark.parametrize("limit", [0.9, 0])
def test_responses_that_run_to_their_limit(run, monkeypatch, limit):
    made = FakeEngine._sample

    def cut(engine):
        sample = made(engine)
        return (
            Sample(sample.token_ids, sample.rollout_logprobs, "length", sample.text) if engine.version > 2 else sample
        )

    monkeypatch.setattr(FakeEngine, "_sample", cut)
    events, end, folder = run("length", f"--alarms.length={limit}")
    assert went_on(end, folder), "it is said, and stops nothing"
    assert [(e["step"], e["truncated_share"], e["threshold"]) for e in events] == ([(4, 1.0, 0.9)] if limit else [])
