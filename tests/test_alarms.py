"""alarms.py: each fault planted in a healthy run's metrics, said once, with its numbers; a healthy run says nothing."""

import copy
import json

import pytest

from alarms import Alarms, Thresholds
from config import Args, ConfigError


def healthy(step: int) -> dict[str, float]:
    """Metrics of a step as train.py has them; they wander a little."""
    return {
        "mismatch/abs_dlogp_mean": 0.03 * (1 + 0.2 * (step % 3)),
        "train/entropy": 0.3 - 0.001 * step,
        "train/loss": 0.01,
        "train/updates_applied": 1,
        "train/skipped_total": 0,
        "train/tokens_nonfinite": 0,
        "sampling/groups_mixed": 5,
        "reward/solved_share": 0.2,
        "reward/failed_share": 0.3,
        "reward/errors": 0,
        "reward/scored": 64 * step,
        "response/truncated_share": 0.1,
    }


def run(alarms: Alarms, faults: dict[int, dict[str, float]], steps: int = 12) -> dict[int, list]:
    """Events of each step that had any; `faults` are what differs from a healthy step."""
    found = {}
    for step in range(1, steps + 1):
        events = alarms.check(step, healthy(step) | faults.get(step, {}))
        if events:
            found[step] = events
    return found


def test_a_healthy_run_says_nothing():
    assert run(Alarms(Thresholds()), {}, steps=200) == {}


@pytest.mark.parametrize(
    ("event", "fault", "stops"),
    [
        ("mismatch", {"mismatch/abs_dlogp_mean": 0.2}, False),
        ("mismatch", {"mismatch/abs_dlogp_mean": float("nan")}, False),
        ("entropy", {"train/entropy": 0.02}, False),
        ("length", {"response/truncated_share": 0.95}, False),
        ("reward_errors", {"reward/errors": 40}, True),
        ("nonfinite", {"train/tokens_nonfinite": 3}, False),
        ("nonfinite", {"train/skipped_total": 1, "train/updates_applied": 0}, False),
        ("nonfinite", {"train/loss": float("nan")}, False),
    ],
)
def test_a_fault_is_an_event_with_its_numbers(event, fault, stops):
    after = {n: {"reward/errors": 40} for n in range(8, 13)} if event == "reward_errors" else {}
    after |= {n: {"train/skipped_total": 1} for n in range(8, 13)} if "train/skipped_total" in fault else {}
    found = run(Alarms(Thresholds()), {7: fault} | after)
    assert list(found) == [7]
    (seen,) = found[7]
    assert (seen.event, seen.stops, seen.step) == (event, stops, 7)
    line = seen.line()
    assert {"step", "event", "message"} < line.keys() and all(
        isinstance(v, (int, float)) for v in seen.numbers.values()
    )
    json.dumps(line)


def test_a_gap_that_stays_stops_the_run():
    high = {"mismatch/abs_dlogp_mean": 0.2}
    found = run(Alarms(Thresholds()), {n: high for n in (5, 7, 9, 10)})
    assert [(n, e.stops) for n, events in found.items() for e in events] == [
        (5, False), (7, False), (9, False), (10, True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("event", "flag", "fault"),
    [
        ("equal_groups", "equal_groups", {"sampling/groups_mixed": 0}),
        ("nonfinite", "skipped_updates", {"train/updates_applied": 0}),
    ],
)
def test_what_may_happen_once_stops_a_run_when_it_goes_on(event, flag, fault):
    def faults(steps):
        return {n: fault | {"train/skipped_total": n - 3} for n in steps}

    limit = getattr(Thresholds(), flag)
    first = next(n for n, events in run(Alarms(Thresholds()), faults(range(4, 13))).items() if events[0].stops)
    assert first == 4 + limit - 1
    broken = faults(n for n in range(4, 13) if n % limit)  # one healthy step in between
    after = {n: {"train/skipped_total": n - 3} for n in range(4, 13) if not n % limit}
    assert not any(e.stops for events in run(Alarms(Thresholds()), broken | after).values() for e in events)
    off = Alarms(Thresholds(**{flag: 0}))
    assert not any(e.stops for events in run(off, faults(range(4, 13))).values() for e in events)


def test_one_that_lasts_is_said_when_it_begins_and_when_it_comes_back():
    long = {"response/truncated_share": 1.0}
    assert list(run(Alarms(Thresholds()), {n: long for n in (3, 4, 5, 9, 10)})) == [3, 9]


@pytest.mark.parametrize("name", ["mismatch", "entropy", "length", "reward_errors"])
def test_0_turns_an_alarm_off(name):
    fault = {"mismatch/abs_dlogp_mean": 9.0, "train/entropy": 0.0, "response/truncated_share": 1.0, "reward/errors": 64}
    with_it = {e.event for events in run(Alarms(Thresholds()), {7: fault}).values() for e in events}
    without = {e.event for events in run(Alarms(Thresholds(**{name: 0})), {7: fault}).values() for e in events}
    assert with_it - without == {name}


def test_the_level_follows_a_slow_drift_and_a_step_without_groups_has_none():
    alarms, metrics = Alarms(Thresholds()), healthy(1)
    for step in range(1, 300):
        metrics["mismatch/abs_dlogp_mean"] = 0.03 * 1.02**step  # 370 times as much in the end
        metrics["reward/scored"] = 64 * step
        assert alarms.check(step, metrics) == []
    del metrics["mismatch/abs_dlogp_mean"], metrics["train/entropy"], metrics["train/loss"]
    assert alarms.check(300, metrics) == []


def test_statistics_go_on_from_json():
    """Split anywhere, the same events."""
    faults = {9: {"mismatch/abs_dlogp_mean": 0.2}, 6: {"train/entropy": 0.01}, 7: {"train/entropy": 0.01}}
    whole = run(Alarms(Thresholds()), faults)
    for split in range(1, 12):
        alarms, found = Alarms(Thresholds()), {}
        for step in range(1, 13):
            if step == split:
                state = json.loads(json.dumps(alarms.state))
                alarms = Alarms(Thresholds())
                alarms.state = copy.deepcopy(state)
            events = alarms.check(step, healthy(step) | faults.get(step, {}))
            if events:
                found[step] = events
        assert found == whole, split


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_no_threshold_is_refused(value):
    with pytest.raises(ConfigError, match=r"--alarms\.mismatch is"):
        Args(alarms=Thresholds(mismatch=value)).resolved()
