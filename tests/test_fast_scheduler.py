"""The fast scheduler against vLLM's own: the same steps, the same books, the same samples; and when it stands back.

The scheduler alone runs beside vLLM's step by step, with a runner that invents tokens; so async scheduling and the V2
runner's ways are tested without a GPU. The engines at the end are real.
"""

import dataclasses
import logging
import random
import sys
from pathlib import Path

import pytest
import torch

import fast_scheduler
from quant_sync import SyncPlan

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from bench_rollout import InventedRunner  # noqa: E402

TINY_ADDER = ROOT / "assets" / "tiny-adder"


# ---- the scheduler alone, in step with vLLM's


def books(scheduler):
    """All that the KV cache and the queues remember; blocks by number, in their order."""
    manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    pool = manager.block_pool
    return {
        "running": [r.request_id for r in scheduler.running],
        "waiting": [r.request_id for r in scheduler.waiting],
        "free": [b.block_id for b in pool.free_block_queue.get_all_free_blocks()],
        "blocks": {name: [b.block_id for b in blocks] for name, blocks in manager.req_to_blocks.items() if blocks},
        "hashes": {b.block_id: b.block_hash for b in pool.blocks if b.block_hash is not None},
        "counts": [b.ref_cnt for b in pool.blocks],
        "requests": {
            r.request_id: (
                *(r.status, r.num_computed_tokens, r.num_output_placeholders, r.num_in_flight_tokens),
                *(r.num_preemptions, r.is_prefill_chunk, list(r.all_token_ids), list(r.block_hashes)),
            )
            for r in scheduler.requests.values()
        },
    }


def plain(step):
    """A SchedulerOutput as dictionaries, without what is an object of each run."""
    fields = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
    fields["scheduled_cached_reqs"] = dataclasses.asdict(step.scheduled_cached_reqs)
    fields["scheduled_new_reqs"] = [
        (r.req_id, r.prompt_token_ids, r.prefill_token_ids, r.block_ids, r.num_computed_tokens)
        for r in step.scheduled_new_reqs
    ]
    fields["order"] = list(step.num_scheduled_tokens)
    return fields


def sample(output):
    flat = output.logprobs
    return (
        *(output.index, list(output.token_ids), output.finish_reason, output.stop_reason, output.cumulative_logprob),
        flat and (flat.token_ids, flat.logprobs, flat.ranks, flat.start_indices, flat.end_indices),
    )


def in_step(requests, *, every=1, forgets=False, **options):
    """Run both schedulers on `requests` [(name, prompt, options)], comparing each step; returns the fast one's runner.

    Requests arrive by and by: eight at once, then one in `every` steps. With `forgets` the V1 runner's list of what ran
    in the last step is emptied now and then.
    """
    runners = [InventedRunner(fast=fast, **options) for fast in (False, True)]
    assert isinstance(runners[1].scheduler, fast_scheduler.FastPath)
    before = books(runners[1].scheduler)["counts"]
    finished = [{}, {}]
    queue = list(requests)
    steps = 0
    while queue or runners[0].busy():
        arrive = 8 if steps == 0 else int(steps % every == 0)
        for name, prompt, params in queue[:arrive]:
            for runner in runners:
                runner.add(name, list(prompt), **params)
        queue = queue[arrive:]
        if forgets and steps % 10 == 9:
            for runner in runners:
                runner.scheduler.prev_step_scheduled_req_ids.clear()
        scheduled = []
        for runner, done in zip(runners, finished, strict=True):
            step, outputs = runner.step()
            scheduled.append(step and plain(step))
            done |= {r.request_id: [sample(o) for o in r.outputs] for r in outputs}
        assert scheduled[0] == scheduled[1], f"step {steps}"
        assert books(runners[0].scheduler) == books(runners[1].scheduler), f"step {steps}"
        steps += 1
    assert not runners[1].busy()
    assert finished[0] == finished[1] and len(finished[0]) == len(requests)
    scheduler = runners[1].scheduler
    assert books(scheduler)["counts"] == before, "blocks leaked"
    assert not scheduler._held and not scheduler._ended and not scheduler._unusual
    return runners[1], finished[1]


def requests_of(seed, count, *, longest=60, tokens=70, **params):
    """Prompts that partly begin alike, every length and limit, some without log-probs or not held back."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        prompt = [rng.choice((7, 8))] * rng.randint(1, longest) + [rng.randint(1, 9) for _ in range(rng.randint(0, 9))]
        own = {"max_tokens": rng.randint(1, tokens), "ignore_eos": rng.random() < 0.5} | params
        kind = rng.random()
        if kind < 0.2:
            own["logprobs"] = None
        elif kind < 0.3:
            own["min_tokens"] = min(3, own["max_tokens"])
        elif kind < 0.4:
            own["stop_token_ids"] = [3]
        elif kind < 0.45:
            own["logprobs"] = 2  # not held back: the columns of others' rows grow
        made.append((f"{i}", prompt, own))
    return made


WAYS = [{"is_async": a, "v2": v} for a in (False, True) for v in (False, True)]


@pytest.mark.parametrize(
    "way", WAYS, ids=lambda w: f"{'async' if w['is_async'] else 'sync'}-{'v2' if w['v2'] else 'v1'}"
)
@pytest.mark.parametrize(
    "sizes",
    [
        {"max_num_seqs": 64, "blocks": 2000},
        {"max_num_seqs": 7, "blocks": 2000},  # more requests than sequences: admitted while others decode
        {"max_num_seqs": 16, "blocks": 48},  # preemption
        {"max_num_seqs": 16, "blocks": 2000, "batched_tokens": 20, "every": 6},  # prompts in parts
        {"max_num_seqs": 64, "blocks": 2000, "forgets": True},
        {"max_num_seqs": 16, "blocks": 200, "max_model_len": 80},  # ends at the model's limit
    ],
    ids=["roomy", "queue", "preempted", "chunked", "forgetful", "limit"],
)
def test_every_step_is_vllms(way, sizes):
    longest = 40 if "max_model_len" in sizes else 60
    tokens = 30 if sizes.get("max_model_len") else 70
    requests = requests_of(1, 40, longest=longest, tokens=tokens)
    if "max_model_len" in sizes:
        requests = [(name, prompt, params | {"max_tokens": 80}) for name, prompt, params in requests]
    runner, finished = in_step(requests, vocabulary=40, **way, **sizes)
    scheduler = runner.scheduler
    assert scheduler.fast_steps > (0 if "batched_tokens" in sizes else scheduler.own_steps)
    assert scheduler.fast_tokens > sum(len(s[1]) for samples in finished.values() for s in samples) / 3
    reasons = {sample[2] for samples in finished.values() for sample in samples}
    assert reasons == {"stop", "length"}


def count_preemptions(scheduler):
    """A list that grows with each preemption."""
    preempted, own = [], scheduler._preempt_request
    scheduler._preempt_request = lambda request, *a, **k: (preempted.append(request.request_id), own(request, *a, **k))
    return preempted


def test_a_small_cache_preempts():
    """Or the case above would test nothing."""
    runner = InventedRunner(fast=True, is_async=False, max_num_seqs=16, blocks=48)
    preempted = count_preemptions(runner.scheduler)
    for name, prompt, params in requests_of(1, 40):
        runner.add(name, prompt, **params)
    while runner.busy():
        runner.step()
    assert preempted


@pytest.mark.parametrize("is_async", [False, True])
def test_nothing_is_output_before_a_request_ends(is_async):
    runner = InventedRunner(fast=True, is_async=is_async)
    seen = []
    own = runner.output_processor.process_outputs
    runner.output_processor.process_outputs = lambda outputs: (seen.extend(outputs), own(outputs))[1]
    runner.add("a", [5] * 20, max_tokens=50)
    while runner.busy():
        runner.step()
    assert [len(o.new_token_ids) for o in seen] == [1, 49]
    assert [len(o.new_logprobs.logprobs) for o in seen] == [1, 49]


@pytest.mark.parametrize("is_async", [False, True])
def test_kept_logprobs_are_those_that_would_be_output(is_async):
    """Of requests that run on, are preempted, and end with their first token."""
    results = []
    for keeps in (False, True):
        runner = InventedRunner(fast=True, is_async=is_async, max_num_seqs=16, blocks=48, vocabulary=40)
        runner.scheduler.keeps_logprobs = keeps
        for name, prompt, params in requests_of(2, 40):
            runner.add(name, prompt, **params | {"logprobs": 0})
        outputs = []
        while runner.busy():
            outputs += runner.step()[1]
        results.append({r.request_id: (list(r.outputs[0].logprobs.logprobs), r.outputs[0].token_ids) for r in outputs})
    without, kept = results[0], runner.scheduler.logprobs
    assert without.keys() == kept.keys()
    for name, (logprobs, tokens) in without.items():
        assert kept[name] == logprobs and len(logprobs) == len(tokens) and results[1][name] == ([], tokens)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_abort_leaves_nothing_behind(is_async):
    from vllm.v1.request import RequestStatus

    runner = InventedRunner(fast=True, is_async=is_async)
    before = books(runner.scheduler)["counts"]
    for i in range(6):
        runner.add(f"{i}", [5] * 20, max_tokens=50)
    for _ in range(20):
        runner.step()
    runner.scheduler.finish_requests(["1", "4"], RequestStatus.FINISHED_ABORTED)
    runner.output_processor.abort_requests(["1", "4"], internal=True)
    names = set()
    while runner.busy():
        names |= {r.request_id for r in runner.step()[1]}
    assert names == {"0", "2", "3", "5"}
    assert books(runner.scheduler)["counts"] == before
    assert not runner.scheduler._held and not runner.scheduler._ended


def test_an_unusual_request_makes_every_step_vllms():
    from vllm.sampling_params import RepetitionDetectionParams

    runner = InventedRunner(fast=True, is_async=False)
    runner.add("a", [5] * 20, max_tokens=30)
    for _ in range(5):
        runner.step()
    fast = runner.scheduler.fast_steps
    runner.add("b", [5] * 20, max_tokens=10,
               repetition_detection=RepetitionDetectionParams(max_pattern_size=4, min_count=50))  # fmt: skip
    while "b" in runner.scheduler.requests:
        runner.step()
    assert runner.scheduler.fast_steps == fast > 0
    while runner.busy():
        runner.step()
    assert runner.scheduler.fast_steps > fast


# ---- standing back


def test_this_vllm_was_read():
    assert fast_scheduler.unknown_vllm() is None


def test_another_source_is_refused(monkeypatch, caplog):
    monkeypatch.setitem(fast_scheduler.READ, "check_stop", ("00000000",))
    with caplog.at_level(logging.WARNING, logger="fast_scheduler"):
        runner = InventedRunner(fast=True, is_async=True)
    assert type(runner.scheduler).__name__ == "AsyncScheduler"
    assert len(caplog.messages) == 1 and "vLLM's own is used" in caplog.text and "check_stop" in caplog.text


def test_a_missing_name_is_refused(monkeypatch, caplog):
    import vllm.v1.core.sched.utils as utils

    monkeypatch.delattr(utils, "check_stop")
    with caplog.at_level(logging.WARNING, logger="fast_scheduler"):
        runner = InventedRunner(fast=True, is_async=False)
    assert type(runner.scheduler).__name__ == "Scheduler"
    assert "check_stop" in caplog.text


def test_a_configuration_not_provided_for_is_refused(caplog):
    runner = InventedRunner(fast=False, is_async=False)
    s = runner.scheduler
    options = {"block_size": 16, "hash_block_size": 16, "log_stats": True}
    options["structured_output_manager"] = s.structured_output_manager
    s.vllm_config.scheduler_config.policy = "priority"
    with caplog.at_level(logging.WARNING, logger="fast_scheduler"):
        other = fast_scheduler.build_scheduler(s.vllm_config, s.kv_cache_config, **options)
    assert not isinstance(other, fast_scheduler.FastPath)
    assert "vLLM's statistics, scheduling by priority" in caplog.text


def test_fingerprints_leave_out_comments_and_layout():
    assert fast_scheduler.fingerprint("a = 1  # one\n\nb") == fast_scheduler.fingerprint("a=1\nb")
    assert fast_scheduler.fingerprint("a = 1") != fast_scheduler.fingerprint("a = 2")


# ---- real engines


@pytest.fixture(scope="module")
def engines(make_model, start_engine, device):
    """(with vLLM's own scheduler, with the fast one), the same weights in both, 16 sequences at once."""
    if TINY_ADDER.is_dir():
        from policy import load_model

        folder = str(TINY_ADDER)
        model = load_model(folder, device)
    else:
        model, folder = make_model("qwen2", tied=True)
    built = []
    for fast in (False, True):
        engine = start_engine(folder, quant="none", max_model_len=256, max_num_seqs=16, fast_scheduler=fast)
        SyncPlan.build(model.state_dict(), engine.model).sync()
        engine.publish(0)
        assert isinstance(fast_scheduler.scheduler_of(engine.llm), fast_scheduler.FastPath) == fast
        built.append(engine)
    return built


def free_blocks(engine):
    return fast_scheduler.scheduler_of(engine.llm).kv_cache_manager.block_pool.get_num_free_blocks()


def both(engines, prompts, **options):
    """The samples of both engines, from the same state of torch's generator."""
    results = []
    for engine in engines:
        before = free_blocks(engine)
        torch.manual_seed(7)
        groups = engine.generate(prompts, **options)
        assert free_blocks(engine) == before, "blocks leaked"
        results.append([[dataclasses.asdict(s) for s in group] for group in groups])
    return results


def random_prompts(seed, count, shortest, longest):
    rng = random.Random(seed)
    return [[rng.randint(3, 15) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {"n": 1, "max_tokens": 40},
        {"n": 6, "max_tokens": 40},  # 60 requests for 16 sequences
        {"n": 1, "max_tokens": 40, "greedy": True},
        {"n": 2, "max_tokens": 1},
        {"n": 3, "max_tokens": 200},
    ],
    ids=["one", "groups", "greedy", "one-token", "long"],
)
def test_samples_are_those_of_vllms_scheduler(engines, options):
    """Token ids, log-probs and finish reasons; twice in a row, the second with cached prefixes."""
    prompts = random_prompts(3, 10, 1, 50)
    for _ in range(2):
        own, fast = both(engines, prompts, **options)
        assert own == fast
    scheduler = fast_scheduler.scheduler_of(engines[1].llm)
    assert options["max_tokens"] == 1 or scheduler.fast_steps > scheduler.own_steps


def test_prompts_of_many_blocks_hit_the_prefix_cache(engines):
    prompts = [[5] * 150 + tail for tail in random_prompts(4, 4, 1, 20)]
    first = both(engines, prompts, n=4, max_tokens=20)
    again = both(engines, prompts, n=4, max_tokens=20)
    assert first[0] == first[1] and again[0] == again[1]


def test_groups_are_handed_over_while_others_run(engines):
    told = []
    prompts = random_prompts(5, 12, 1, 30)
    engines[1].generate(prompts, n=4, max_tokens=30, on_finished=lambda i, samples: told.append((i, len(samples))))
    assert sorted(told) == [(i, 4) for i in range(12)]


def test_an_engine_whose_cache_is_too_small_agrees(make_model, start_engine):
    """Eight sequences that grow to two or three blocks of 128 tokens each, in a cache of twelve."""
    model, folder = make_model("llama", tied=False)
    sizes = {"max_model_len": 384, "max_num_seqs": 8, "kv_cache_bytes": 12 * 65536}
    prompts = random_prompts(6, 12, 90, 127)
    results = []
    for fast in (False, True):
        engine = start_engine(folder, quant="none", fast_scheduler=fast, **sizes)
        SyncPlan.build(model.state_dict(), engine.model).sync()
        engine.publish(0)
        preempted = count_preemptions(fast_scheduler.scheduler_of(engine.llm))
        results += both([engine], prompts, n=2, max_tokens=180)
        if not torch.cuda.is_available():  # a GPU's blocks are smaller
            assert preempted
    assert results[0] == results[1]
