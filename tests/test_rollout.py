"""The sampler: log-probs of the distribution that was sampled, never of old weights; which groups are trained on."""

import contextlib
import gc
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import engine_options
import rollout
from data import Example, Prompt
from quant_sync import SyncPlan
from ranks import Ranks
from rollout import EngineError, Group, Sample, sample_groups

TINY_ADDER = Path(__file__).resolve().parent.parent / "assets" / "tiny-adder"
LONG = 200  # tokens: more than a block of the prefix cache on any backend


# ---- the real engine


@pytest.fixture(scope="module", params=["none", "fp8"])
def rig(request, make_model, start_engine, device):
    """An engine that holds the policy's weights as version 3, the policy, and what was seen on the way there."""
    tokenizer = None
    if TINY_ADDER.is_dir():
        folder, tokenizer = str(TINY_ADDER), AutoTokenizer.from_pretrained(TINY_ADDER)
        model = AutoModelForCausalLM.from_pretrained(TINY_ADDER, dtype=torch.bfloat16).eval().to(device)
    else:
        model, folder = make_model("qwen2", tied=True)
    return build(model, folder, start_engine, quant=request.param, tokenizer=tokenizer, max_model_len=256)


@pytest.fixture(scope="module")
def padded_rig(make_model, start_engine):
    """A random model with 200 tokens and 256 rows in the engine's head, so that padding could leak into the softmax."""
    model, folder = make_model("qwen3", tied=False)
    return build(model, folder, start_engine, quant="none")


def build(model, folder, start_engine, *, tokenizer=None, **options):
    torch.manual_seed(1234)
    rng = torch.random.get_rng_state()
    engine = start_engine(folder, tokenizer=tokenizer, **options)
    rng_kept = torch.equal(torch.random.get_rng_state(), rng)
    try:
        before_publish = engine.generate([[5, 6, 7]], n=1, max_tokens=1)
    except EngineError as error:
        before_publish = error
    plan = SyncPlan.build(model.state_dict(), engine.model)
    plan.sync()
    engine.publish(3)
    return SimpleNamespace(
        engine=engine, model=model, plan=plan, tokenizer=tokenizer, rng_kept=rng_kept, before_publish=before_publish
    )


@pytest.fixture
def policy(rig):
    """The HF model; its weights, and with them the engine's, are put back after the test."""
    before = {name: t.clone() for name, t in rig.model.state_dict().items()}
    yield rig.model
    rig.model.load_state_dict(before)
    rig.plan.sync()
    rig.engine.version = None  # or an older version than the test's would be refused
    rig.engine.publish(3)


def prompts_of(rig, count, length=12):
    g = torch.Generator().manual_seed(length)
    return torch.randint(3, rig.model.config.vocab_size, (count, length), generator=g).tolist()


@torch.no_grad()
def hf_logprobs(model, prompt, tokens, temperature=1.0):
    """log softmax(logits / T) of the HF model in bf16 at each of `tokens`."""
    ids = torch.tensor([prompt + tokens], device=model.device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()


def gaps(rig, prompts, groups, temperature=1.0):
    """|engine's log-prob - HF's| of every sampled token."""
    return torch.cat(
        [
            (torch.tensor(s.rollout_logprobs) - hf_logprobs(rig.model, prompt, s.token_ids, temperature)).abs()
            for prompt, group in zip(prompts, groups, strict=True)
            for s in group
        ]
    )


def test_building_leaves_torchs_generator_alone(rig):
    assert rig.rng_kept


def test_generate_before_publish_is_refused(rig):
    assert isinstance(rig.before_publish, EngineError)
    assert "publish" in str(rig.before_publish)


def test_generate_while_asleep_is_refused(rig, monkeypatch):
    monkeypatch.setattr(rig.engine, "asleep", True)
    with pytest.raises(EngineError, match="wake"):
        rig.engine.generate([[5, 6, 7]], n=1, max_tokens=1)


def test_samples_are_complete(rig):
    prompts = prompts_of(rig, 3)
    groups = rig.engine.generate(prompts, n=5, max_tokens=20)
    assert [len(g) for g in groups] == [5, 5, 5]
    end = rig.model.config.eos_token_id
    for sample in (s for g in groups for s in g):
        assert 1 <= len(sample.token_ids) == len(sample.rollout_logprobs) <= 20
        assert all(math.isfinite(p) and p <= 0 for p in sample.rollout_logprobs)
        assert sample.finish_reason == ("length" if sample.token_ids[-1] != end else "stop")
        assert sample.finish_reason == "stop" or len(sample.token_ids) == 20
        assert end not in sample.token_ids[:-1]
    assert len({tuple(s.token_ids) for s in groups[0]}) > 1  # samples, not copies


def test_texts_are_the_decoded_samples(rig):
    if rig.tokenizer is None:
        pytest.skip("assets/tiny-adder is missing: no tokenizer")
    problem = [{"role": "user", "content": "What is 23 + 45? Answer with a number."}]
    ids = rig.tokenizer.apply_chat_template(problem, add_generation_prompt=True)["input_ids"]
    samples = rig.engine.generate([ids], n=16, max_tokens=12)[0]
    for s in samples:
        assert s.text == rig.tokenizer.decode(s.token_ids, skip_special_tokens=True)
    ended = [s for s in samples if s.finish_reason == "stop"]
    assert ended and all(s.token_ids[-1] == rig.tokenizer.eos_token_id for s in ended)
    assert all(rig.tokenizer.eos_token not in s.text for s in ended)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampled_distribution(rig, monkeypatch, temperature):
    """At the run's temperature, over the whole vocabulary; FP8 moves them, by a bounded amount."""
    monkeypatch.setattr(rig.engine, "temperature", temperature)
    prompts = prompts_of(rig, 8)
    groups = rig.engine.generate(prompts, n=8, max_tokens=16)
    mean = gaps(rig, prompts, groups, temperature).mean()
    other = gaps(rig, prompts, groups, 1.7 - temperature).mean()
    assert other > 2 * mean  # or the temperature could be ignored without anyone noticing
    if rig.engine.quant == "none":
        assert mean < 0.02
    else:
        assert 0.005 < mean < 0.2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_padded_vocabulary_is_no_part_of_the_distribution(padded_rig, monkeypatch, temperature):
    monkeypatch.setattr(padded_rig.engine, "temperature", temperature)
    prompts = prompts_of(padded_rig, 8)
    groups = padded_rig.engine.generate(prompts, n=8, max_tokens=16)
    assert max(t for g in groups for s in g for t in s.token_ids) < 200
    # 56 padded logits of zero in the softmax would lower every log-prob by more than 0.1.
    assert gaps(padded_rig, prompts, groups, temperature).mean() < 0.04


def test_sampled_frequencies_follow_the_policy(rig):
    """4096 first tokens of one prompt: each token's share within five standard errors of the HF model's probability,
    plus what rounding may move it by."""
    prompt, n = prompts_of(rig, 1)[0], 4096
    tokens = torch.tensor([s.token_ids[0] for s in rig.engine.generate([prompt], n=n, max_tokens=1)[0]])
    vocabulary = rig.model.config.vocab_size
    every = hf_logprobs_of_next(rig.model, prompt).exp()
    share = torch.bincount(tokens, minlength=vocabulary) / n
    slack = 0.05 if rig.engine.quant == "fp8" else 0.01
    assert ((share - every).abs() <= 5 * (every * (1 - every) / n).sqrt() + slack * every + 2 / n).all()


@torch.no_grad()
def hf_logprobs_of_next(model, prompt):
    ids = torch.tensor([prompt], device=model.device)
    return model(ids).logits[0, -1].float().log_softmax(-1).cpu()


def test_greedy_is_the_argmax_without_logprobs(rig):
    prompts = prompts_of(rig, 4)
    first = rig.engine.generate(prompts, n=1, max_tokens=12, greedy=True)
    again = rig.engine.generate(prompts, n=1, max_tokens=12, greedy=True)
    assert [[s.token_ids for s in g] for g in first] == [[s.token_ids for s in g] for g in again]
    assert [s.rollout_logprobs for g in first for s in g] == [[]] * 4
    if rig.engine.quant == "none":
        for prompt, group in zip(prompts, first, strict=True):
            distribution = hf_logprobs_of_next(rig.model, prompt)
            chosen = distribution[group[0].token_ids[0]]
            assert chosen >= distribution.max() - 0.05  # bf16 may exchange two tokens that are as good as equal


def test_publish_drops_the_keys_of_old_weights(rig, policy):
    """Without publish the engine reads the old weights' keys and values for a prompt that it has seen."""
    engine, prompts = rig.engine, prompts_of(rig, 1, LONG)
    old = {name: t.clone() for name, t in policy.state_dict().items()}
    limit = 0.05 if engine.quant == "none" else 0.2
    assert gaps(rig, prompts, engine.generate(prompts, n=64, max_tokens=1)).mean() < limit

    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_((torch.randn(p.shape, generator=g) * 0.5 * p.float().std().cpu()).to(p))
    rig.plan.sync()
    stale = gaps(rig, prompts, engine.generate(prompts, n=64, max_tokens=1)).mean()
    engine.publish(4)
    groups = engine.generate(prompts, n=64, max_tokens=1)
    fresh = gaps(rig, prompts, groups).mean()
    assert fresh < limit
    assert stale > 2 * fresh
    assert engine.version == 4

    policy.load_state_dict(old)
    assert gaps(rig, prompts, groups).mean() > 2 * fresh  # the log-probs are no longer the old policy's


def test_publish_refuses_an_older_version(rig):
    with pytest.raises(EngineError, match="version 2 is older than 3, which the engine already holds"):
        rig.engine.publish(2)
    assert rig.engine.version == 3


def test_publish_fails_if_the_prefix_cache_was_not_dropped(rig, monkeypatch):
    monkeypatch.setattr(rig.engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(EngineError, match="prefix cache"):
        rig.engine.publish(4)
    assert rig.engine.version == 3


def test_the_collector_rests_while_the_engine_generates(rig, monkeypatch):
    seen, step = [], rig.engine.llm.llm_engine.step

    def spy():
        seen.append(gc.isenabled())
        return step()

    monkeypatch.setattr(rig.engine.llm.llm_engine, "step", spy)
    rig.engine.generate([[5, 6, 7]], n=1, max_tokens=1)
    assert set(seen) == {False} and gc.isenabled()


def test_a_prompt_is_handed_over_when_its_samples_are_complete(rig):
    """With its texts, and once each."""
    prompts, told = prompts_of(rig, 5), []
    finished = lambda i, samples: told.append((i, samples))  # noqa: E731
    groups = rig.engine.generate(prompts, n=3, max_tokens=4, on_finished=finished)
    assert sorted(i for i, _ in told) == list(range(5))
    assert all(samples is groups[i] and len(samples) == 3 for i, samples in told)
    if rig.tokenizer is not None:
        assert all(s.text == rig.tokenizer.decode(s.token_ids, skip_special_tokens=True) for g in groups for s in g)


# ---- without an engine


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_collector_is_put_back(was_on, fails):
    (gc.enable if was_on else gc.disable)()
    try:
        expected = pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext()
        with expected, rollout._no_garbage_collection():
            inside = gc.isenabled(), gc.get_freeze_count() > 0
            if fails:
                raise ZeroDivisionError
        assert inside == (False, True)
        assert gc.isenabled() == was_on
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_missing_vllm_names_the_requirements(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"pip install -r requirements\.txt"):
        rollout.Engine("any", tokenizer=None, quant="fp8", max_model_len=8, max_num_seqs=1, kv_cache_bytes=1)


class Draws:
    """A stub of the engine, the prompts and the reward: draw i is scored `rewards[i]`, in the order of drawing.

    `lengths[i]` are the token counts of draw i's samples (1 if not given); a response of 4 tokens was cut.
    """

    version = 7
    ranks = Ranks()

    def __init__(self, rewards, lengths=()):
        self.rewards, self.lengths = rewards, lengths
        self.taken, self.calls = [], []
        self.submitted = {}

    def before_step(self):
        pass

    def take(self, n):
        start = sum(self.taken)
        self.taken.append(n)
        return [Prompt(Example(str(i), [], "", "exact", {}), [i]) for i in range(start, start + n)]

    def generate(self, prompts, *, n, max_tokens, on_finished):
        self.calls.append((n, max_tokens))
        groups = [[self.sample(i, j) for j in range(n)] for (i,) in prompts]
        for i in reversed(range(len(groups))):  # in whatever order they are complete
            on_finished(i, groups[i])
        return groups

    def sample(self, i, j):
        length = self.lengths[i][j] if i < len(self.lengths) else 1
        return Sample([i] * length, [-0.5] * length, "length" if length == 4 else "stop", "")

    def submit(self, key, example, completion):
        self.submitted[key] = self.rewards[int(example.id)][key[1]]

    def collect(self):
        collected, self.submitted = self.submitted, {}
        return collected

    def run(self, *, prompts, samples=2, max_tokens=4, **options):
        return sample_groups(self, self, self, prompts=prompts, samples=samples, max_tokens=max_tokens, **options)


def drawn(groups):
    return [int(g.prompt.example.id) for g in groups]


MIXED, SOLVED, FAILED = (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)


def test_mixed_groups_are_kept_and_equal_ones_replaced():
    """Half of the first round is kept, so the second draws twice what is missing."""
    stub = Draws([MIXED, SOLVED, FAILED, MIXED, FAILED, MIXED, MIXED, SOLVED])
    groups, metrics = stub.run(prompts=4)
    assert stub.taken == [4, 4]
    assert drawn(groups) == [0, 3, 5, 6]
    assert metrics["sampling/groups_trained"] == 4
    assert metrics["sampling/groups_equal"] == 4


def test_more_rounds_until_there_are_enough():
    stub = Draws([MIXED, SOLVED, FAILED, MIXED] + [FAILED] * 4 + [MIXED] * 8)
    groups, metrics = stub.run(prompts=4)
    # 2 of 4 kept: draw 2 / 0.5. Then 2 of 8: draw 2 / 0.25.
    assert stub.taken == [4, 4, 8]
    assert drawn(groups) == [0, 3, 8, 9]
    assert metrics["sampling/rounds"] == 3
    assert metrics["sampling/groups_surplus"] == 6
    assert stub.calls == [(2, 4)] * 3
    assert {g.version for g in groups} == {7}
    assert all(
        len(g.samples) == 2 and g.samples[0].token_ids == [i] for g, i in zip(groups, drawn(groups), strict=True)
    )


def test_one_round_is_enough_where_all_are_mixed():
    stub = Draws([MIXED] * 3)
    groups, metrics = stub.run(prompts=3)
    assert stub.taken == [3] and drawn(groups) == [0, 1, 2]
    assert metrics["sampling/groups_surplus"] == 0


def test_the_first_round_draws_for_the_share_that_is_expected():
    stub = Draws([MIXED, SOLVED] * 4)
    groups, metrics = stub.run(prompts=3, expected_share=0.45)
    assert stub.taken == [7]  # 3 / 0.45, rounded up: no second round and its tail
    assert drawn(groups) == [0, 2, 4]
    assert metrics["sampling/groups_surplus"] == 1
    hopeless = Draws([FAILED] * 40)
    hopeless.run(prompts=3, expected_share=0.0, max_rounds=1)
    assert hopeless.taken == [12]  # never more than four times what is missing
    everything = Draws([SOLVED, MIXED, FAILED])
    everything.run(prompts=3, expected_share=0.5, dynamic=False)
    assert everything.taken == [3]


def test_rounds_end_with_what_there_is():
    stub = Draws([MIXED] + [FAILED] * 99)
    groups, metrics = stub.run(prompts=2, max_rounds=3)
    assert drawn(groups) == [0]
    assert stub.taken == [2, 2, 4]  # shares: 1 of 2, then 1 of 4
    assert metrics["sampling/rounds"] == 3
    assert metrics["sampling/groups_trained"] == 1


def test_nothing_mixed_is_an_empty_step_with_finite_metrics():
    stub = Draws([SOLVED, FAILED] * 20)
    groups, metrics = stub.run(prompts=2)
    assert groups == []
    assert stub.taken == [2, 8, 8, 8]  # never more than four times what is missing
    assert all(math.isfinite(v) for v in metrics.values())
    assert metrics["sampling/groups_equal"] == metrics["sampling/groups_drawn"] == 26
    assert metrics["sampling/groups_trained"] == metrics["sampling/groups_mixed"] == 0


def test_without_dynamic_sampling_everything_of_one_round_is_kept():
    stub = Draws([SOLVED, MIXED, FAILED])
    groups, metrics = stub.run(prompts=3, dynamic=False)
    assert stub.taken == [3] and drawn(groups) == [0, 1, 2]
    assert metrics["sampling/groups_equal"] == 2
    assert metrics["sampling/groups_trained"] == 3
    assert metrics["sampling/rounds"] == 1


def test_metrics_by_hand():
    """Over everything drawn: also the two equal groups, and the mixed one that is surplus."""
    stub = Draws(
        [(1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (0.0, 0.0), (-1.0, 1.0), (2.0, 0.0), (0.5, 0.5)],
        lengths=[(1, 2), (3, 4), (1, 1), (4, 4), (2, 2), (1, 1), (3, 3)],
    )
    groups, metrics = stub.run(prompts=3)
    # Round 1: two of three. Round 2: one is missing, 1 / (2 / 3) = 1.5, so two are drawn; the first is failed.
    assert stub.taken == [3, 2]
    assert drawn(groups) == [0, 1, 4]
    assert metrics.pop("time/score") >= 0
    assert metrics == pytest.approx(
        {
            "sampling/rounds": 2,
            "sampling/groups_drawn": 5,
            "sampling/groups_mixed": 3,
            "sampling/groups_equal": 2,
            "sampling/groups_surplus": 0,
            "sampling/groups_trained": 3,
            "reward/mean": 4.5 / 10,
            "reward/solved_share": 2 / 5,  # every sample above zero: (1, 0.5) and (1, 1)
            "reward/failed_share": 1 / 5,
            "response/tokens": 24,
            "response/length_mean": 2.4,
            "response/length_max": 4,
            "response/truncated_share": 3 / 10,
        }
    )


def test_mixed_looks_at_raw_rewards():
    group = Group(Prompt(Example("", [], "", "exact", {}), [0]), [], 0, rewards=[0.1, 0.1, 0.1])
    assert not group.mixed
    group.rewards[2] = math.nextafter(0.1, 1)
    assert group.mixed


# ---- machines without what the engine needs ----


class _Platform:
    def __init__(self, cpu: bool):
        self._cpu = cpu

    def is_cpu(self) -> bool:
        return self._cpu


def test_fp8_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform", _Platform(cpu=False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(rollout.EngineError, match=r"A100 has 8\.0\. Use --rollout-quant none"):
        engine_options.check_platform("fp8")
    assert engine_options.check_platform("none") is True
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert engine_options.check_platform("fp8") is True


def test_a_gpu_build_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform", _Platform(cpu=False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(rollout.EngineError, match=r"requirements-cpu\.txt"):
        engine_options.check_platform("none")


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_a_processor_with_amx_keeps_live_weights(make_model, start_engine, device, monkeypatch, quant):
    """With AMX, vLLM's CPU build would read packed copies that no sync reaches. (Nothing is generated here: the
    attention kernel chosen for AMX cannot run on a processor that only claims it.)"""
    if device.type != "cpu":
        pytest.skip("the CPU backend's kernels")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model, folder = make_model("qwen2", tied=True)
    engine = start_engine(folder, quant=quant)
    plan = SyncPlan.build(model.state_dict(), engine.model)
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)
    hidden = torch.randn(3, model.config.hidden_size).to(torch.bfloat16)
    with torch.no_grad():
        logits = engine.model.compute_logits(hidden)[:, : model.config.vocab_size]
        torch.testing.assert_close(logits, model.lm_head(hidden), rtol=0.02, atol=0.02)
