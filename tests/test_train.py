"""train.py: a batch by hand, the update against plain torch, the loop's order, whole runs, and what goes wrong.

Whole runs are processes of their own with the real CPU engine and the built-in tiny model; they skip where that model
or vLLM is missing. The order of the loop is tested in this process with an engine that only writes down what it does.
"""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import copy
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_run import FakeEngine, FakePlan, install, one_or_two, read_lines, run_main
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen2Config

import packing
import parts
import run_report
import train
from checkpoint import Snapshot
from config import TINY_MODEL, Args
from corrections import CORRECTIONS
from data import Example, Prompt
from loss import REDUCTIONS
from policy import Batch, Policy
from rollout import Group, Sample
from run_folder import RunFolder, RunFolderError

ROOT = Path(train.__file__).resolve().parent
DOCUMENTED = ROOT / "docs" / "metrics.md"
CPU = torch.device("cpu")
V = 40
needs_tiny_model = pytest.mark.skipif(
    not Path(TINY_MODEL, "model.safetensors").exists(), reason="assets/tiny-adder is not there"
)
needs_engine = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


# ---- what the tests are made of


def make_args(**changes) -> Args:
    sizes = dict(prompts_per_step=4, samples_per_prompt=2, max_prompt_len=16, max_response_len=8, micro_batch_tokens=64)
    return Args(**(sizes | dict(lr=1e-3, warmup_steps=0) | changes)).resolved()


def make_policy(seed: int = 0, **options) -> Policy:
    """A small fp32 Qwen2 with log-probs far from uniform."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    packing.register()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=packing.ATTENTION)
    return Policy(model, **({"lr": 1e-3, "weight_decay": 0.0} | options))


def make_prompt(ids: list[int]) -> Prompt:
    example = Example("made:1", [{"role": "user", "content": "?"}], "1", "number", {})
    return Prompt(example, ids)


def make_group(samples: list[tuple[list[int], list[float], str]], rewards: list[float], prompt=(1, 2)) -> Group:
    """Samples are (tokens, rollout log-probs, finish reason)."""
    return Group(make_prompt(list(prompt)), [Sample(t, lp, why, "") for t, lp, why in samples], 0, rewards)


def random_groups(policy: Policy, groups: int = 4, samples: int = 2, off_policy: float = 0.1) -> list[Group]:
    """Groups of random tokens whose rollout log-probs are the policy's own plus noise (what FP8 does)."""
    g = torch.Generator().manual_seed(3)

    def ids(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(V, (n,), generator=g).tolist()

    made = []
    for _ in range(groups):
        prompt = ids(1, 6)
        responses = [ids(1, 8) for _ in range(samples)]
        tokens = sum(map(len, responses))
        batch = Batch([prompt] * samples, responses, *(torch.zeros(tokens),) * 2, torch.ones(tokens).bool())
        noisy = policy.compute_logprobs(batch, 1000) + off_policy * torch.randn(tokens, generator=g)
        parts = noisy.split([len(r) for r in responses])
        drawn = [(r, lp.tolist(), "stop") for r, lp in zip(responses, parts, strict=True)]
        made.append(make_group(drawn, [float(i % 2) for i in range(samples)], prompt))
    return made


def assert_same_weights(a: Policy, b: Policy, lr: float = 1e-3) -> None:
    """Equal but for Adam's sign of a gradient that is zero up to rounding: at most 1 % of a tensor may differ."""
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert ((p - q).abs() > lr / 50).float().mean() < 0.01, name


def weights_of(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.model.parameters()]


# ---- split_groups, build_batch


@pytest.mark.parametrize(
    ("groups", "samples", "parts"), [(8, 4, 1), (8, 4, 2), (7, 3, 3), (5, 2, 5), (2, 2, 4), (1, 2, 3)]
)
def test_split_groups_covers_every_row_once_in_whole_groups(groups, samples, parts):
    mini = list(train.split_groups(groups, samples, parts))
    assert [row for rows in mini for row in rows] == list(range(groups * samples))
    assert len(mini) == min(parts, groups), "no empty mini-batch"
    for rows in mini:
        assert rows[0] % samples == 0 and len(rows) % samples == 0
    sizes = [len(rows) // samples for rows in mini]
    assert max(sizes) - min(sizes) <= 1


TWO_GROUPS = [  # rewards 1, 0 and 0, 1: advantages +-1 / sqrt(2) (the sample std of 0 and 1 is 1 / sqrt(2))
    ([([5, 6], [-0.1, -0.2], "stop"), ([7], [-0.3], "stop")], [1.0, 0.0], (1, 2)),
    ([([8, 9, 10], [-0.4, -0.5, -0.6], "length"), ([11], [-0.7], "stop")], [0.0, 1.0], (3,)),
]
UP, DOWN = math.sqrt(0.5), -math.sqrt(0.5)


def two_groups() -> list[Group]:
    return [make_group(*copy.deepcopy(g)) for g in TWO_GROUPS]


def test_build_batch_by_hand():
    batch, metrics = train.build_batch(two_groups(), make_args(), CPU)
    assert batch.prompt_ids == [[1, 2], [1, 2], [3], [3]]
    assert batch.response_ids == [[5, 6], [7], [8, 9, 10], [11]]
    assert batch.rollout_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7])
    assert batch.advantages.tolist() == pytest.approx([UP, UP, DOWN, DOWN, DOWN, DOWN, UP], abs=1e-5)
    assert batch.mask.all() and batch.old_logprobs is None
    assert metrics == {"train/tokens_filtered": 0, "train/tokens_nonfinite": 0, "reward/overlong_penalty_mean": 0.0}


def test_build_batch_without_std_is_dr_grpo():
    batch, _ = train.build_batch(two_groups(), make_args(advantage="dr-grpo"), CPU)
    assert batch.advantages.tolist() == [0.5, 0.5, -0.5, -0.5, -0.5, -0.5, 0.5]


def test_overlong_filter_masks_the_truncated_sample_alone():
    batch, metrics = train.build_batch(two_groups(), make_args(overlong_filter=True), CPU)
    assert batch.mask.tolist() == [True, True, True, False, False, False, True]
    assert metrics["train/tokens_filtered"] == 3 and metrics["train/tokens_nonfinite"] == 0
    # its reward still counts in the others' baseline
    assert batch.advantages[-1] == pytest.approx(UP, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_rollout_log_prob_that_is_not_finite_is_masked_and_counted(bad):
    groups = two_groups()
    groups[0].samples[0].rollout_logprobs[1] = bad
    batch, metrics = train.build_batch(groups, make_args(), CPU)
    assert batch.mask.tolist() == [True, False, True, True, True, True, True]
    assert metrics["train/tokens_nonfinite"] == 1 and metrics["train/tokens_filtered"] == 0
    groups[1].samples[0].rollout_logprobs[0] = bad  # in a sample that the filter removes: counted once, as filtered
    _, metrics = train.build_batch(groups, make_args(overlong_filter=True), CPU)
    assert metrics["train/tokens_nonfinite"] == 1 and metrics["train/tokens_filtered"] == 3


def test_the_overlong_penalty_changes_advantages_but_not_which_groups_were_chosen():
    """Limit 4, buffer 2: 3 tokens cost 0.5. The second group's rewards become -0.5 and 1: same signs, another gap."""
    args = make_args(max_response_len=4, overlong_buffer=2, advantage="dr-grpo")
    groups = two_groups()
    batch, metrics = train.build_batch(groups, args, CPU)
    assert batch.advantages.tolist() == pytest.approx([0.5, 0.5, -0.5, -0.75, -0.75, -0.75, 0.75])
    assert metrics["reward/overlong_penalty_mean"] == pytest.approx(-0.5 / 4)
    assert [g.rewards for g in groups] == [[1.0, 0.0], [0.0, 1.0]], "raw rewards are what is logged and filtered on"
    equal = make_group([([5, 6, 7], [-0.1] * 3, "stop"), ([8], [-0.1], "stop")], [1.0, 1.0])
    assert not equal.mixed, "a penalty must not turn a solved group into a mixed one"


# ---- train_step


def plain_update(policy: Policy, batch: Batch, old: torch.Tensor, cap: float = 2.0) -> None:
    """One update of the clipped, importance-weighted loss, in one forward pass."""
    logprobs, _ = policy.logprobs(batch)
    ratio = (logprobs - old).exp()
    surrogate = torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.28) * batch.advantages)
    weights = (old - batch.rollout_logprobs).exp().clamp(max=cap)
    (-(weights * surrogate).sum() / len(surrogate)).backward()
    policy.update()


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_train_step_equals_plain_torch_with_old_log_probs_of_the_steps_start(updates):
    policy, plain = make_policy(), make_policy()
    groups = random_groups(policy)
    args = make_args(updates_per_batch=updates, micro_batch_tokens=20, max_prompt_len=8)
    metrics = train.train_step(policy, groups, args)
    batch, _ = train.build_batch(groups, args, CPU)
    batch.old_logprobs = plain.compute_logprobs(batch, 1000)
    for rows in train.split_groups(4, 2, updates):
        mini = batch.select(rows)
        plain_update(plain, mini, mini.old_logprobs)
    assert_same_weights(policy, plain)
    assert policy.updates == metrics["train/updates_applied"] == updates
    assert metrics["train/tokens"] == len(batch.mask)
    assert metrics["train/ratio_max"] == 1.0 if updates == 1 else metrics["train/ratio_max"] > 1.0


@pytest.mark.parametrize(("updates", "forwards"), [(1, 0), (2, 1), (3, 1)])
def test_old_log_probs_are_recomputed_once_and_only_for_several_updates(updates, forwards, monkeypatch):
    policy, calls = make_policy(), []
    groups = random_groups(policy)
    compute = policy.compute_logprobs
    monkeypatch.setattr(policy, "compute_logprobs", lambda *a: (calls.append(policy.updates), compute(*a))[1])
    train.train_step(policy, groups, make_args(updates_per_batch=updates))
    assert calls == [0] * forwards, "before the first update"


def test_the_micro_batch_budget_does_not_change_weights_or_metrics():
    results, passes = {}, {}
    for budget in (12, 20, 10_000):  # 12: one sequence of full length
        policy, seen = make_policy(), []
        groups = random_groups(policy, groups=6)
        policy.model.get_input_embeddings().register_forward_hook(lambda *_, seen=seen: seen.append(1))
        args = make_args(micro_batch_tokens=budget, updates_per_batch=2, max_prompt_len=5, max_response_len=7)
        metrics = train.train_step(policy, groups, args)
        results[budget], passes[budget] = (policy, metrics), len(seen)
    assert passes[10_000] == 1 + 2 and passes[12] > passes[20] > passes[10_000]  # old log-probs, two updates
    whole, expected = results.pop(10_000)
    for policy, metrics in results.values():
        assert_same_weights(policy, whole)
        assert metrics.keys() == expected.keys()
        for key, value in expected.items():
            assert metrics[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize(
    "flags",
    [{"correction": name} for name in CORRECTIONS] + [{"loss_reduction": name} for name in REDUCTIONS],
    ids=lambda flags: "-".join(flags.values()),
)
def test_micro_batches_change_nothing_under_any_correction_and_reduction(flags):
    results = []
    for budget in (12, 10_000):
        policy = make_policy()
        groups = random_groups(policy, groups=6, off_policy=0.5)
        args = make_args(micro_batch_tokens=budget, max_prompt_len=5, max_response_len=7, **flags)
        results.append((policy, train.train_step(policy, groups, args)))
    (small, found), (whole, expected) = results
    assert_same_weights(small, whole)
    for key, value in expected.items():
        assert math.isfinite(value) and found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    assert expected["train/updates_applied"] == 1 and expected["mismatch/abs_dlogp_mean"] > 0.3


def test_the_direct_form_needs_no_old_logprobs():
    policy, seen = make_policy(), []
    groups = random_groups(policy)
    policy.model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    train.train_step(policy, groups, make_args(correction="ppo-is", updates_per_batch=2))
    assert len(seen) == 2, "two updates, no pass before them"


def test_mismatch_metrics_are_those_of_the_gap_that_was_put_in():
    policy = make_policy()
    groups = random_groups(policy, off_policy=0.0)
    for group in groups:
        for sample in group.samples:
            sample.rollout_logprobs = [x - 1.0 for x in sample.rollout_logprobs]  # pi_old / mu = e everywhere
    metrics = train.train_step(policy, groups, make_args(tis_cap=2.0))
    assert metrics["mismatch/abs_dlogp_mean"] == pytest.approx(1, abs=1e-4)
    assert metrics["mismatch/ratio_mean"] == pytest.approx(math.e, rel=1e-3)
    assert metrics["mismatch/capped_share"] == 1.0
    assert metrics["train/is_weight_mean"] == pytest.approx(2.0)


def test_no_groups_is_a_skipped_step(capsys):
    policy = make_policy()
    before = weights_of(policy)
    metrics = train.train_step(policy, [], make_args())
    assert metrics["train/updates_applied"] == 0 and policy.updates == policy.skipped == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(policy), strict=True))
    assert "skipped" in capsys.readouterr().out


def test_a_batch_whose_every_token_is_filtered_changes_nothing():
    policy = make_policy()
    before = weights_of(policy)
    groups = [make_group([(t, lp, "length") for t, lp, _ in g[0]], *g[1:]) for g in TWO_GROUPS]
    metrics = train.train_step(policy, groups, make_args(overlong_filter=True))
    assert metrics["train/updates_applied"] == 0 and metrics["train/tokens_filtered"] == 7
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(policy), strict=True))


def test_a_filtered_mini_batch_is_left_out_and_the_other_one_is_trained_on():
    """The first group is all truncated: its mini-batch has no token, and no update either."""
    policy = make_policy()
    groups = two_groups()
    for sample in groups[0].samples:
        sample.finish_reason = "length"
    metrics = train.train_step(policy, groups, make_args(overlong_filter=True, updates_per_batch=2))
    assert metrics["train/updates_applied"] == 1 and metrics["train/tokens"] == 1


def test_a_nan_of_the_sampler_does_not_reach_the_weights():
    policy, plain = make_policy(), make_policy()
    groups = two_groups()
    groups[0].samples[0].rollout_logprobs[1] = math.nan
    metrics = train.train_step(policy, groups, make_args())
    assert metrics["train/updates_applied"] == 1 and metrics["train/tokens"] == 6
    assert metrics["train/tokens_nonfinite"] == 1
    groups[0].samples[0].rollout_logprobs[1] = 0.0
    train.train_step(plain, groups, make_args())
    assert all(p.isfinite().all() for p in weights_of(policy))
    assert any(not torch.equal(a, b) for a, b in zip(weights_of(policy), weights_of(plain), strict=True))


def logged(groups: list[Group]) -> list[list[float]]:
    return [s.logprobs for g in groups for s in g.samples]


@pytest.mark.parametrize(("updates", "correction"), [(1, "token-tis"), (2, "token-tis"), (4, "none"), (1, "ppo-is")])
def test_the_trainers_log_probs_of_logged_samples_are_those_of_the_steps_start(updates, correction):
    policy = make_policy()
    groups = random_groups(policy)
    batch, _ = train.build_batch(groups, make_args(), CPU)
    expected = policy.compute_logprobs(batch, 1000).split(batch.lengths.tolist())
    args = make_args(updates_per_batch=updates, correction=correction, micro_batch_tokens=20, max_prompt_len=8)
    train.train_step(policy, groups, dataclasses.replace(args, log_samples=3))
    found = logged(groups)
    assert [len(f) > 0 for f in found] == [True] * 3 + [False] * 5, "two of the first group, one of the second"
    for logprobs, wanted in zip(found[:3], expected, strict=False):
        assert logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


def test_without_logged_samples_nothing_is_kept_and_filtered_ones_have_no_log_probs():
    policy = make_policy()
    groups = two_groups()
    train.train_step(policy, groups, make_args(log_samples=0))
    assert logged(groups) == [[]] * 4
    for sample in groups[0].samples:
        sample.finish_reason = "length"
    train.train_step(policy, groups, make_args(log_samples=4, overlong_filter=True, updates_per_batch=2))
    assert [len(x) for x in logged(groups)] == [0, 0, 3, 1], "the first group's mini-batch had no token to train on"


def test_a_bandit_learns_its_token():
    """One prompt, one-token answers, reward 1 for one token of 40. Forty steps of samples drawn from the policy."""
    policy, prompt, target = make_policy(lr=3e-3), [1, 2, 3], 7
    every_token = Batch([prompt] * V, [[t] for t in range(V)], torch.zeros(V), torch.zeros(V), torch.ones(V).bool())
    args = make_args(samples_per_prompt=32, prompts_per_step=2)
    torch.manual_seed(0)
    history = []
    for _ in range(40):
        logp = policy.compute_logprobs(every_token, 10_000)
        history.append(float(logp[target].exp()))
        groups = []
        for _ in range(2):
            drawn = torch.multinomial(logp.exp(), 32, replacement=True).tolist()
            samples = [([t], [float(logp[t])], "stop") for t in drawn]
            group = make_group(samples, [float(t == target) for t in drawn], prompt)
            groups += [group] if group.mixed else []
        train.train_step(policy, groups, args)
    assert history[0] < 0.2 and history[-1] > 0.9, history


# ---- the loop, with an engine that writes down what it does


@pytest.fixture
def fake(monkeypatch):
    return install(monkeypatch)


@needs_tiny_model
def test_the_loop_in_order(fake, tmp_path, monkeypatch, capsys):
    flags = ("--steps=4", "--eval-every=3", "--save-every=2", "--run-name=a", "--eval-size=2")
    run_main(monkeypatch, *one_or_two(tmp_path), *flags)
    step = ["wake kv_cache", "sample", "sleep", "wake weights", "sync"]
    expected = ["build", "formats fp8", "coverage []", "prove", "sync", "verify full", "publish 0", "greedy"]
    for n in (1, 2, 3, 4):
        expected += [*step, f"verify {n}", f"publish {n}"]
        expected += ["wake kv_cache", "greedy"] if n in (3, 4) else []  # every third, and the last
    assert fake == expected
    folder = tmp_path / "runs" / "a"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    assert (folder / "best").resolve().name == "step-000003", "of equal evaluations the first"
    metrics = read_lines(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert [m["step"] for m in metrics if "eval/accuracy" in m] == [0, 3, 4]
    assert [m["policy/version"] for m in metrics[1:]] == [1, 2, 3, 4]
    assert capsys.readouterr().out.splitlines()[-1] == f"run folder {folder}"


@needs_tiny_model
def test_a_run_that_never_draws_a_mixed_group_ends_with_the_weights_it_began_with(fake, tmp_path, monkeypatch, capsys):
    flags = ("--steps=2", "--eval-every=0", "--run-name=a", "--max-sample-rounds=3")
    run_main(monkeypatch, *one_or_two(tmp_path, right="3"), *flags)
    assert fake.count("sample") == 2 * 3, "three rounds a step, then the step goes on"
    folder = tmp_path / "runs" / "a"
    for line in read_lines(folder / "metrics.jsonl"):
        assert line["sampling/groups_trained"] == line["train/updates_applied"] == 0
        assert line["reward/failed_share"] == 1.0
    assert capsys.readouterr().out.count("step skipped") == 2
    saved = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step-000002", dtype=torch.bfloat16)
    start = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.bfloat16)
    assert all(torch.equal(t, start.state_dict()[k]) for k, t in saved.state_dict().items())


@needs_tiny_model
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("when", ["first step's rollouts", "second step's training"])
def test_a_stop_gives_up_the_step_and_saves_what_is_done(fake, tmp_path, monkeypatch, capsys, when, updates):
    """The signal comes while a phase runs; nothing is lost, and no checkpoint claims a step that was not made."""
    if when == "first step's rollouts":
        generate = FakeEngine.generate

        def interrupted(self, *args, **options):
            os.kill(os.getpid(), signal.SIGINT)
            return generate(self, *args, **options)

        monkeypatch.setattr(FakeEngine, "generate", interrupted)
    else:
        step = train.train_step

        def interrupted(policy, *args):
            if policy.updates == updates:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(policy, *args)

        monkeypatch.setattr(train, "train_step", interrupted)
    flags = ("--steps=50", "--eval-every=0", "--run-name=a", f"--updates-per-batch={updates}")
    run_main(monkeypatch, *one_or_two(tmp_path), *flags)
    out, folder = capsys.readouterr().out, tmp_path / "runs" / "a"
    assert out.splitlines()[-1] == f"run folder {folder}"
    assert f"go on with: python train.py --resume {folder}" in out.splitlines()
    if when == "first step's rollouts":
        assert "stopped after 0 of 50" in out
        assert sorted(p.name for p in folder.iterdir()) == [".lock", "config.json", "env.json"]
    else:
        assert (folder / "report.html").is_file() and (folder / "curves.png").read_bytes() == b"drawn"
        assert "stopped after 1 of 50" in out, "the second step is given up at its first micro-batch"
        assert [m["step"] for m in read_lines(folder / "metrics.jsonl")] == [1]
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000001"]


@needs_tiny_model
def test_a_stop_after_the_first_of_several_updates_finishes_the_step(fake, tmp_path, monkeypatch, capsys):
    update = Policy.update

    def interrupted(policy):
        if policy.updates == 2:  # the second step's first
            os.kill(os.getpid(), signal.SIGTERM)
        return update(policy)

    monkeypatch.setattr(Policy, "update", interrupted)
    flags = ("--steps=50", "--eval-every=0", "--run-name=a", "--updates-per-batch=2")
    run_main(monkeypatch, *one_or_two(tmp_path), *flags)
    folder = tmp_path / "runs" / "a"
    assert "stopped after 2 of 50" in capsys.readouterr().out
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert fake[-1] == "publish 2", "the engine holds what was saved"


@needs_tiny_model
@pytest.mark.parametrize(
    ("flag", "expected"), [("--dynamic-sampling", [1.0, 0.9, 0.9]), ("--no-dynamic-sampling", [1.0] * 3)]
)
def test_a_step_draws_for_the_share_of_the_step_before(fake, tmp_path, monkeypatch, flag, expected):
    shares, sample_groups = [], train.sample_groups

    def recorded(*args, expected_share, **options):
        shares.append(expected_share)
        return sample_groups(*args, expected_share=expected_share, **options)

    monkeypatch.setattr(train, "sample_groups", recorded)
    run_main(monkeypatch, *one_or_two(tmp_path), "--steps=3", "--eval-every=0", "--run-name=x", flag)
    assert shares == expected  # every group of the fake engine is mixed


@pytest.mark.parametrize("phase", ["sync", "train", "a mistake in the code"])
def test_a_failure_in_the_middle_saves_what_was_learned(fake, tmp_path, monkeypatch, capsys, phase):
    """And says where the run stands and how it goes on, whatever the failure is."""

    def verify(self, turn=0, full=False):
        if turn == 2:
            raise train.SyncError("layer 1 is stale") if phase == "sync" else ValueError("no such layer")

    real_step, calls = train.train_step, []

    def out_of_memory(*args):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no more")
        return real_step(*args)

    if phase == "train":
        monkeypatch.setattr(train, "train_step", out_of_memory)
    else:
        monkeypatch.setattr(FakePlan, "verify", verify)
    words = {"sync": "layer 1 is stale", "train": "--micro-batch-tokens"}.get(phase, "ValueError: no such layer$")
    with pytest.raises(SystemExit, match=words):
        run_main(monkeypatch, *one_or_two(tmp_path), "--steps=5", "--eval-every=0", "--run-name=x")
    folder = tmp_path / "runs" / "x"
    assert (folder / "checkpoints" / "step-000002" / "model.safetensors").is_file()
    assert (folder / "report.html").is_file()
    said = capsys.readouterr().err.splitlines()
    assert said.count(f"checkpoint {folder / 'checkpoints' / 'step-000002'}") == 1
    assert said.count(f"run folder {folder}; go on with: python train.py --resume {folder}") == 1


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
def test_a_line_that_cannot_be_written_does_not_cost_what_was_learned(fake, tmp_path, monkeypatch, capsys, file):
    """Half of the third step's line is written, with no save due for long; the run goes on after that step."""
    append = RunFolder._append

    def full(self, name, line):
        if name == file and line["step"] == 3:
            with open(self.path / name, "a") as f:
                f.write('{"step": 3, "ha')
            raise RunFolderError(f"{self.path / name} cannot be written: No space left on device")
        append(self, name, line)

    flags = [*one_or_two(tmp_path), "--eval-every=0", "--save-every=100", "--run-name=x"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"{file} cannot be written: No space left"):
        patch.setattr(RunFolder, "_append", full)
        run_main(monkeypatch, *flags, "--steps=5")
    folder = tmp_path / "runs" / "x"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000003"]
    assert f"--resume {folder}" in capsys.readouterr().err
    fake.clear()
    run_main(monkeypatch, *flags, "--steps=5")
    steps = [m["step"] for m in read_lines(folder / "metrics.jsonl")]
    assert steps == ([1, 2, 4, 5] if file == "metrics.jsonl" else [1, 2, 3, 4, 5])
    assert [e for e in fake if e.startswith("publish")] == ["publish 3", "publish 4", "publish 5"]


@pytest.mark.parametrize("where", ["the end", "beside the run"])
def test_a_save_that_failed_is_not_tried_again(fake, tmp_path, monkeypatch, capsys, where):
    """The error is the save's own; one that fails on the way out does not stand in the way of the first error."""
    asked, snapshot = [], Policy.snapshot

    def fails(policy, *args):
        asked.append(1)
        if where == "the end" or len(asked) == 2:
            raise ValueError("no copy")
        return snapshot(policy, *args)

    monkeypatch.setattr(Policy, "snapshot", fails)
    every = 0 if where == "the end" else 1
    with pytest.raises(SystemExit, match="ValueError: no copy"):
        run_main(
            monkeypatch, *one_or_two(tmp_path), "--steps=3", "--eval-every=0", f"--save-every={every}", "--run-name=x"
        )
    assert len(asked) == (1 if where == "the end" else 2)
    folder = tmp_path / "runs" / "x"
    said = capsys.readouterr().err
    assert f"go on with: python train.py --resume {folder}" in said and "no checkpoint" not in said


def test_a_save_on_the_way_out_that_fails_does_not_hide_the_first_error(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "marker-of-hf-token")

    def stale(self, turn=0, full=False):
        if turn == 2:
            raise train.SyncError("layer 1 is stale")

    def no_room(self, folder):
        raise OSError(28, "No space left on device: marker-of-hf-token")

    monkeypatch.setattr(FakePlan, "verify", stale)
    monkeypatch.setattr(Snapshot, "write", no_room)
    with pytest.raises(SystemExit, match=r"^error: layer 1 is stale"):
        run_main(monkeypatch, *one_or_two(tmp_path), "--steps=3", "--eval-every=0", "--run-name=x")
    said = capsys.readouterr().err
    assert said.count("could not be written") == 1 and "error: no checkpoint: RunFolderError" in said
    assert "[HF_TOKEN]" in said and "marker-of-hf-token" not in said


def test_a_second_signal_does_not_wait_for_a_save(fake, tmp_path, monkeypatch, capsys):
    """Interrupted, a run saves nothing: it ends, and says how it goes on."""

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, *one_or_two(tmp_path), "--steps=3", "--eval-every=0", "--run-name=x")
    folder = tmp_path / "runs" / "x"
    assert end.value.code == 130 and not (folder / "checkpoints").exists()
    assert f"run folder {folder}; go on with: python train.py --resume {folder}" in capsys.readouterr().err


def test_a_resumed_run_whose_engine_cannot_be_built_says_how_it_goes_on(fake, tmp_path, monkeypatch, capsys):
    flags = [*one_or_two(tmp_path), "--eval-every=0", "--run-name=x"]
    run_main(monkeypatch, *flags, "--steps=1")
    folder = tmp_path / "runs" / "x"
    before = (folder / "metrics.jsonl").read_bytes()

    def no_room(self, *args, **options):
        raise train.EngineError("the engine has no room")

    monkeypatch.setattr(FakeEngine, "__init__", no_room)
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^error: the engine has no room$"):
        run_main(monkeypatch, *flags, "--steps=2")
    line = f"run folder {folder}; go on with: python train.py --resume {folder}"
    assert capsys.readouterr().err.splitlines().count(line) == 1
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_report_that_cannot_be_made_does_not_cost_the_run(fake, tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no ink")

    monkeypatch.setattr(run_report, "draw", broken)
    monkeypatch.setattr(run_report, "write_page", broken)
    run_main(monkeypatch, *one_or_two(tmp_path), "--steps=1", "--eval-every=0", "--run-name=x")
    folder = tmp_path / "runs" / "x"
    lines = capsys.readouterr().out.splitlines()
    later = f"was not written (RuntimeError: no ink); later: python scripts/plot_run.py {folder}"
    assert f"{folder / 'report.html'} {later}" in lines and f"{folder / 'curves.png'} {later}" in lines
    assert lines[-1] == f"run folder {folder}" and (folder / "checkpoints" / "step-000001").is_dir()


@pytest.mark.parametrize("then", ["goes on", "fails"])
def test_a_checkpoint_that_a_thread_could_not_write_does_not_cost_the_run(fake, tmp_path, monkeypatch, capsys, then):
    """The first save, beside the run, finds a full disk; the run says so and goes on, and the next one is made. So it
    is where the run fails of itself after that."""
    write, calls = Snapshot.write, []

    def full_at_first(self, folder):
        calls.append(1)
        write(self, folder)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Snapshot, "write", full_at_first)
    if then == "fails":

        def stale(self, turn=0, full=False):
            if turn == 3:
                raise train.SyncError("layer 1 is stale")

        monkeypatch.setattr(FakePlan, "verify", stale)
    flags = (*one_or_two(tmp_path), "--steps=3", "--save-every=1", "--eval-every=0", "--run-name=x")
    if then == "fails":
        with pytest.raises(SystemExit, match="layer 1 is stale"):
            run_main(monkeypatch, *flags)
    else:
        run_main(monkeypatch, *flags)
    folder, said = tmp_path / "runs" / "x", capsys.readouterr().err
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000003"]
    assert "step-000001 could not be written" in said and "No space left" in said
    (event,) = read_lines(folder / "events.jsonl")
    assert event["event"] == "checkpoint_failed"


def test_a_second_signal_ends_at_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = train.StopRequest()
    with pytest.raises(KeyboardInterrupt), stop.watching():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ---- what cannot work: one line, the flag's name, no folder, and no engine built


def test_8_bit_moments_without_torchao_are_refused_before_anything_is_built(fake, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(SystemExit, match="pip install torchao"):
        run_main(monkeypatch, *one_or_two(tmp_path), "--optimizer-states=8bit")
    assert fake == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_built(fake, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"error: --{name} needs .* pip install {name}"):
        run_main(monkeypatch, *one_or_two(tmp_path), f"--{name}")
    assert fake == [] and not (tmp_path / "runs").exists()


def gpt2_folder(path: Path) -> Path:
    """A model of a family that is not mapped, with a tokenizer and a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    config = GPT2Config(vocab_size=384, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


BAD = {  # name: (flags from the test's folder, words of the message)
    "model path": (lambda d: [f"--model={d}/nowhere"], ["--model", "nowhere"]),
    "model folder without config": (lambda d: [f"--model={d}"], ["--model"]),
    "data missing": (lambda d: [f"--data={d}/rows.jsonl"], ["rows.jsonl", "--data"]),
    "data empty": (lambda d: [f"--data={write(d, 'rows.jsonl', '')}"], ["rows.jsonl", "empty"]),
    "data lacks its answer": (
        lambda d: [f"--data={write(d, 'rows.jsonl', json.dumps({'question': '1?'}))}"],
        ["rows.jsonl", "row 1", "answer"],
    ),
    "data level": (lambda d: ["--data=arithmetic:add9"], ["--data arithmetic:add9", "add2"]),
    "eval data missing": (lambda d: [f"--eval-data={d}/held.jsonl"], ["held.jsonl", "--eval-data"]),
    "top-p": (lambda d: ["--top-p=0.9"], ["--top-p 0.9"]),
    "tis-cap": (lambda d: ["--tis-cap=0"], ["--tis-cap", "0"]),
    "samples per prompt": (lambda d: ["--samples-per-prompt=1"], ["--samples-per-prompt", "at least 2"]),
    "micro-batch below a sequence": (
        lambda d: ["--micro-batch-tokens=39"],
        ["--micro-batch-tokens 39", "--max-prompt-len 32", "--max-response-len 8"],
    ),
    "prompts too long": (lambda d: ["--max-prompt-len=3"], ["--max-prompt-len 3", "shortest"]),
    "more positions than the model has": (
        lambda d: ["--max-response-len=5000"],
        ["--max-prompt-len 32", "--max-response-len 5000", "512"],
    ),
    "reward file missing": (lambda d: [f"--reward={d}/r.py:f"], ["--reward", "r.py"]),
    "reward function missing": (lambda d: [f"--reward={write(d, 'r.py', 'x = 1')}:f"], ["--reward", "'f'", "r.py"]),
}


@needs_tiny_model
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_anything_is_built(name, fake, tmp_path, monkeypatch, capsys):
    make_flags, words = BAD[name]
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, f"--runs-dir={runs}", *make_flags(tmp_path))
    message = end.value.code  # a string: Python prints it to stderr and exits with 1
    assert isinstance(message, str) and message.startswith("error: ") and len(message.splitlines()) == 1, message
    assert [w for w in words if w not in message] == [], message
    assert "Traceback" not in capsys.readouterr().err
    assert fake == [], "no engine before the inputs are known to be good"
    assert not runs.exists()


@needs_tiny_model
def test_a_folder_that_is_no_run_is_refused_and_its_files_are_left(fake, tmp_path, monkeypatch):
    old = tmp_path / "runs" / "a"
    old.mkdir(parents=True)
    (old / "metrics.jsonl").write_text("kept\n")
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, *one_or_two(tmp_path), "--run-name=a", "--steps=1")
    assert re.fullmatch(r"error: .*--run-name.*", end.value.code)
    assert [p.name for p in old.iterdir()] == ["metrics.jsonl"] and (old / "metrics.jsonl").read_text() == "kept\n"


@needs_tiny_model
def test_a_window_smaller_than_a_sequence_ends_in_one_line_that_names_the_flags(fake, tmp_path, monkeypatch):
    """A model that attends to fewer tokens than a sequence has cannot be trained here."""
    folder = shutil.copytree(TINY_MODEL, tmp_path / "windowed")
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    config["layer_types"] = ["sliding_attention"] * len(config["layer_types"])
    (folder / "config.json").write_text(json.dumps(config))
    flags = (f"--model={folder}", "--max-prompt-len=32", "--max-response-len=8", "--steps=1", "--eval-every=0")
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, *one_or_two(tmp_path), *flags)
    assert re.fullmatch(r"error: --max-prompt-len 32 .*--max-response-len 8 .*window of 4 tokens.*", end.value.code)


def test_without_a_gpu_a_micro_batch_holds_a_full_sequence(device):
    if device.type != "cpu":
        pytest.skip("a CPU's plan")
    config = Qwen2Config(vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    sizes = {"max_prompt_len": 4000, "kv_cache_gib": 0.1}
    for response, tokens in ((1000, 16384), (30_000, 34_000)):
        args, _, _ = parts.plan_device(Args(max_response_len=response, **sizes).resolved(), config)
        assert args.micro_batch_tokens == tokens


# ---- whole runs


def start(*flags: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_train(*flags: str, timeout: float = 150) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]


@needs_tiny_model
def test_a_process_with_a_bad_flag_exits_non_zero_with_one_error_line(tmp_path):
    done = run_train("--top-p", "0.9", "--runs-dir", str(tmp_path / "runs"))
    assert done.returncode != 0
    assert len(error_lines(done.stderr)) == 1 and "--top-p 0.9" in error_lines(done.stderr)[0]
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    runs = tmp_path_factory.mktemp("runs")
    done = run_train(
        *("--steps=3", "--prompts-per-step=8", "--samples-per-prompt=4", "--eval-size=32", "--eval-every=3"),
        *("--run-name=x", f"--runs-dir={runs}"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done, runs / "x"


OPEN_IN_VLLM = """
import json, sys
import runtime
from engine_options import check_platform
if not check_platform("none"):
    import cpu_backend
    cpu_backend.prepare()
import vllm
llm = vllm.LLM(model=sys.argv[1], max_model_len=64, kv_cache_memory_bytes=1 << 27, gpu_memory_utilization=0.1,
               enforce_eager=True)
chats = [[{"role": "user", "content": f"{11 + i} + {42 + i}"}] for i in range(32)]
outputs = llm.chat(chats, vllm.SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
print(json.dumps([o.outputs[0].text.strip() for o in outputs]))
"""


GPU_ONLY = {  # metrics that a run without a GPU has not
    "memory/device_gib", "memory/planned_peak_gib", "memory/torch_peak_gib", "memory/torch_reserved_gib",
    "memory/used_peak_gib",
}  # fmt: skip


def documented_keys(text: str) -> set[str]:
    """The keys in the first columns of the tables of metrics, before the section on events."""
    lines = text[: text.index("## Events")].splitlines()
    return {k for line in lines if line.startswith("| `") for k in re.findall(r"`([^`]+)`", line.split("|")[1])}


def test_the_events_that_can_be_written_are_those_that_are_documented():
    """With their numbers: what alarms.py and the others put into an event beside step, event and message."""
    text = DOCUMENTED.read_text()
    table = text[text.index("## Events") : text.index("## Samples")]
    documented = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            cells = line.split(" | ")
            documented[cells[0].strip("| `")] = set(re.findall(r"`([^`]+)`", cells[-1]))
    source = (ROOT / "alarms.py").read_text()
    alarms = set(re.findall(r'Event\(step, "(\w+)"', source))
    others = {e for path in ROOT.glob("*.py") for e in re.findall(r'"event": "(\w+)"', path.read_text())}
    assert alarms and others and set(documented) == alarms | others
    for name in alarms:
        method = next(m for m in source.split("\n    def ") if f'Event(step, "{name}"' in m)
        numbers = re.search(r"numbers = \{(.+)\}|message, \{(.+)\}", method)
        assert documented[name] == set(re.findall(r'"(\w+)": ', numbers[0])), name
    assert all(documented[name] == set() for name in others)


@needs_tiny_model
@needs_engine
class TestFinishedRun:
    def test_it_says_where_everything_is(self, finished_run):
        done, folder = finished_run
        lines = done.stdout.splitlines()
        assert lines[-1] == f"run folder {folder}" and lines[-2].startswith("checkpoint ")
        assert sum(line.startswith("step ") for line in lines) == 3
        assert not error_lines(done.stderr) and "Traceback" not in done.stderr

    def test_metrics(self, finished_run):
        metrics = read_lines(finished_run[1] / "metrics.jsonl")
        assert [m["step"] for m in metrics] == [0, 1, 2, 3]
        for m in metrics[1:]:
            assert m["policy/version"] == m["step"], "the engine sampled from other weights than the step's"
            assert 0.005 < m["mismatch/abs_dlogp_mean"] < 0.3, "0 would be no FP8 at all, more would be stale weights"
            assert m["train/updates_applied"] == 1 and m["train/tokens_nonfinite"] == 0
            assert m["train/ratio_max"] == 1.0 and m["train/grad_norm"] > 0
            assert m["sampling/groups_trained"] <= 8 <= m["sampling/groups_drawn"]
            assert all(v is None or math.isfinite(v) for v in m.values())
        assert [m["step"] for m in metrics if "eval/accuracy" in m] == [0, 3]
        assert 0.2 < metrics[0]["eval/accuracy"] < 0.9, "the tiny model starts with room to learn"

    @pytest.mark.skipif(not DOCUMENTED.exists(), reason="docs/metrics.md is not there")
    def test_what_is_logged_is_what_is_documented(self, finished_run):
        logged = {k for m in read_lines(finished_run[1] / "metrics.jsonl") for k in m}
        documented = documented_keys(DOCUMENTED.read_text())
        assert logged & GPU_ONLY == set() and sorted(logged ^ (documented - GPU_ONLY)) == []
        in_the_code = set(re.findall(r'"(memory/\w+)"', (ROOT / "memory.py").read_text()))
        assert documented >= GPU_ONLY >= in_the_code

    def test_samples(self, finished_run):
        samples = read_lines(finished_run[1] / "samples.jsonl")
        assert {s["step"] for s in samples} == {1, 2, 3} and len(samples) == 3 * 4
        for s in samples:
            assert s["version"] == s["step"] - 1, "on-policy: sampled from the step's own weights"
            a, b = map(int, re.search(r"(\d+) \+ (\d+)", s["prompt"][0]["content"]).groups())
            assert s["answer"] == str(a + b)
            assert s["reward"] == float(s["text"].strip() == s["answer"])
            assert s["finish_reason"] in ("stop", "length") and 1 <= s["tokens"] <= 8

    def test_logged_tokens_have_their_text_and_both_sides_log_probs(self, finished_run):
        gaps = []
        for s in read_lines(finished_run[1] / "samples.jsonl"):
            assert len(s["token_texts"]) == len(s["rollout_logprobs"]) == len(s["logprobs"]) == s["tokens"]
            assert "".join(s["token_texts"]).startswith(s["text"])
            assert s["token_texts"][-1].startswith("<|") == (s["finish_reason"] == "stop")
            assert all(x <= 0 and round(x, 4) == x for x in s["rollout_logprobs"] + s["logprobs"])
            gaps += [abs(a - b) for a, b in zip(s["rollout_logprobs"], s["logprobs"], strict=True)]
        assert 0.002 < sum(gaps) / len(gaps) < 0.3, "of FP8 and bf16; 0 would be one side twice"

    def test_it_can_be_read(self, finished_run):
        done, folder = finished_run
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert f"report {folder / 'report.html'}" in done.stdout.splitlines()
        page = (folder / "report.html").read_text(encoding="utf-8")
        for word in ("held-out accuracy", "3 of 3", "token_texts", "What is", "tiny-adder"):
            assert word in page, word

    def test_config_and_environment(self, finished_run):
        config = json.loads((finished_run[1] / "config.json").read_text())
        assert (config["steps"], config["rollout_quant"], config["tis_cap"]) == (3, "fp8", 2.0)
        assert json.loads((finished_run[1] / "env.json").read_text())["versions"]["torch"]

    def test_the_checkpoint_opens_and_was_trained(self, finished_run):
        folder = finished_run[1] / "checkpoints" / "step-000003"
        assert [p.name for p in folder.parent.iterdir()] == ["step-000003"]
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        begun = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype="auto").state_dict()
        state = saved.state_dict()
        assert state.keys() == begun.keys()
        for name, tensor in state.items():
            if tensor.dim() == 2:
                change = (tensor.float() - begun[name].float()).abs()
                assert 0 < change.max() < 0.02, f"{name}: three updates at lr 3e-4 move it, but not far"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False)

    def test_the_checkpoint_opens_in_vllm(self, finished_run):
        """By its own loader, as somebody else would serve it; in a process of its own, as that somebody would."""
        done = subprocess.run(
            [sys.executable, "-c", OPEN_IN_VLLM, str(finished_run[1] / "checkpoints" / "step-000003")],
            cwd=ROOT, capture_output=True, text=True, timeout=150,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        answers = json.loads(done.stdout.splitlines()[-1])
        assert len(answers) == 32 and sum(a.isdigit() for a in answers) >= 24, "it answers sums with numbers"


@needs_tiny_model
@needs_engine
def test_ctrl_c_in_a_long_run_saves_and_exits_with_0(tmp_path):
    flags = ("--steps=5000", "--prompts-per-step=4", "--samples-per-prompt=4", "--eval-every=0", "--run-name=x")
    process = start(*flags, f"--runs-dir={tmp_path}")
    metrics = tmp_path / "x" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline, "no step was made"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    assert out.splitlines()[-1] == f"run folder {tmp_path / 'x'}"
    last = read_lines(metrics)[-1]["step"]
    checkpoints = list((tmp_path / "x" / "checkpoints").iterdir())
    assert [p.name for p in checkpoints] == [f"step-{last:06d}"]
    AutoModelForCausalLM.from_pretrained(checkpoints[0])
    assert "Traceback" not in err and "stopping" in err


@needs_tiny_model
@needs_engine
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the bound was measured on a CPU")
def test_host_memory_does_not_grow_with_steps_and_checkpoints(tmp_path):
    """A checkpoint every ten steps. What their threads would keep of the copies is 26 MiB each for two of them."""
    done = run_train(
        *("--steps=200", "--save-every=10", "--prompts-per-step=4", "--samples-per-prompt=4", "--eval-every=0"),
        *("--lr=1e-5", "--run-name=x", f"--runs-dir={tmp_path}"),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    held = [m["memory/host_gib"] for m in read_lines(tmp_path / "x" / "metrics.jsonl")]
    before, middle, late = (statistics.median(held[i:j]) for i, j in ((5, 10), (50, 100), (150, 200)))
    assert late - middle < 0.008 and late - before < 0.02, (before, middle, late)


@needs_tiny_model
@needs_engine
def test_a_reward_that_always_raises_is_shown_once_counted_and_ends_the_run(tmp_path):
    reward = write(tmp_path, "broken.py", "def f(completion, answer, row):\n    return row['no such column']\n")
    done = run_train(
        *("--steps=3", "--prompts-per-step=4", "--samples-per-prompt=2", "--eval-every=0", "--no-dynamic-sampling"),
        *(f"--reward={reward}:f", "--run-name=x", f"--runs-dir={tmp_path / 'runs'}"),
    )
    (step,) = read_lines(tmp_path / "runs" / "x" / "metrics.jsonl")
    assert (step["reward/mean"], step["reward/errors"], step["sampling/groups_trained"]) == (0.0, 8, 4)
    assert step["train/loss"] == 0.0 and step["train/grad_norm"] == 0.0, "equal rewards have no gradient"
    assert done.stderr.count("Traceback") == 1 and "KeyError: 'no such column'" in done.stderr
    assert all(s["reward"] == 0.0 for s in read_lines(tmp_path / "runs" / "x" / "samples.jsonl"))
    (error,) = error_lines(done.stderr)
    assert done.returncode == 1 and "8 of 8 rewards failed" in error and "--reward" in error
    assert (tmp_path / "runs" / "x" / "checkpoints" / "step-000001").is_dir()


@needs_tiny_model
@needs_engine
def test_a_family_that_is_not_mapped_is_an_error_that_says_what_is_not(tmp_path):
    model = gpt2_folder(tmp_path / "other")
    done = run_train(
        *("--data=arithmetic", "--max-prompt-len=32", "--max-response-len=8", "--steps=1", "--eval-every=0"),
        *(f"--model={model}", f"--runs-dir={tmp_path / 'runs'}"),
    )
    assert done.returncode != 0 and not (tmp_path / "runs").exists()
    assert len(error_lines(done.stderr)) == 1, done.stderr[-1500:]
    # a parameter that has no place, or the family by its name, with those that work
    assert re.search(r"transformer\.|gpt2|GPT2", error_lines(done.stderr)[0])
    assert "Qwen2" in error_lines(done.stderr)[0]
