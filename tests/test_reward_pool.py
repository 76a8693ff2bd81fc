"""Rewards in processes of their own: results, and a reward that raises, hangs, dies, prints, or knows too much."""

import contextlib
import os
import time
from pathlib import Path

import pytest

from data import Example
from reward_pool import RewardPool
from rewards import RewardError

REWARD = """
import os, sys, time, subprocess

def score(completion, answer, row):
    if completion == "hang":
        while True:
            time.sleep(1)
    if completion == "hang in a child":
        subprocess.run(["sleep", "600"])
    if completion == "die":
        os._exit(3)
    if completion == "leave":
        sys.exit(0)
    if completion == "raise":
        raise ValueError("no")
    if completion == "nan":
        return float("nan")
    if completion == "secret":
        return float("HF_TOKEN" in os.environ or "WANDB_API_KEY" in os.environ)
    if completion == "torch":
        return float("torch" in sys.modules)
    if completion == "slow":
        time.sleep(0.1)
    if completion == "row":
        return float(row["when"].year)
    print("a reward may print")
    return len(completion) / 10
"""


def example(i, **row):
    return Example(id=f"row-{i}", messages=[{"role": "user", "content": "?"}], answer="4", reward="number", row=row)


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    return f"{tmp_path / 'mine.py'}:score"


def scored(pool, *completions):
    for i, completion in enumerate(completions):
        pool.submit(i, example(i), completion)
    return [reward for _, reward in sorted(pool.collect().items())]


def test_polling_keeps_the_workers_busy_while_the_engine_generates(spec):
    """Twenty rewards of 0.1 s on two workers take 1 s. A loop that only polls meanwhile leaves nothing to wait for."""
    with RewardPool(spec, 2, 5.0) as pool:
        for i in range(20):
            pool.submit(i, example(i), "slow")
        end = time.monotonic() + 30
        while len(pool._done) < 20 and time.monotonic() < end:
            pool.poll()
            time.sleep(0.005)
        assert len(pool._done) == 20
        assert pool.collect() == {i: 0.4 for i in range(20)}
        pool.poll()  # nothing is outstanding


def test_results_come_by_key_and_once():
    with RewardPool(None, 2, 5.0) as pool:
        for i in range(200):
            pool.submit(("group", i), example(i), "4" if i % 3 else "five")
        results = pool.collect()
        assert results == {("group", i): float(i % 3 > 0) for i in range(200)}
        assert pool.collect() == {}
        assert scored(pool, "4", "5") == [1.0, 0.0]
        assert (pool.calls, pool.errors, pool.timeouts) == (202, 0, 0)


def test_what_goes_wrong_is_0_and_counted_and_the_rest_is_scored(spec, capfd):
    start = time.monotonic()
    with RewardPool(spec, 2, 1.0) as pool:
        bad = ("hang", "die", "raise", "nan", "hang in a child", "leave")
        completions = [x for word in bad for x in (word, "good")]
        assert scored(pool, *completions) == [0.0, 0.4] * len(bad)
        assert (pool.calls, pool.errors, pool.timeouts) == (12, 6, 4)
        assert scored(pool, "good") == [0.4], "the workers that are left go on"
    assert time.monotonic() - start < 20
    out, err = capfd.readouterr()
    assert "a reward may print" in err and "a reward may print" not in out
    assert err.count("scored 0.0. Later errors are only counted") == 1


def test_a_child_that_a_reward_started_does_not_outlive_it(spec):
    with RewardPool(spec, 1, 0.5) as pool:
        pool.submit(0, example(0), "hang in a child")
        group = pool._workers[0].process.pid
        assert pool.collect() == {0: 0.0}
    deadline = time.monotonic() + 10
    while alive(group):
        assert time.monotonic() < deadline


def alive(group):
    """Whether a process of the group runs; one that is dead and not yet collected by its new parent does not."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            states += [state] * (int(of_group) == group)
    return bool(set(states) - {"Z"})


def test_keys_and_torch_stay_out_of_the_workers(spec, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("WANDB_API_KEY", "y")
    with RewardPool(spec, 1, 5.0) as pool:
        assert scored(pool, "secret", "torch") == [0.0, 0.0]


def test_rows_need_not_be_json(spec):
    import datetime

    with RewardPool(spec, 1, 5.0) as pool:
        pool.submit("x", example(0, when=datetime.date(2024, 5, 1)), "row")
        assert pool.collect() == {"x": 2024.0}


def test_submitting_does_not_wait(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef score(c, a, r):\n    time.sleep(0.5)\n    return 1.0\n")
    with RewardPool(f"{tmp_path / 'slow.py'}:score", 2, 5.0) as pool:
        pool.submit("warm", example(0), "x")
        pool.collect()
        start = time.monotonic()
        for i in range(4):
            pool.submit(i, example(i), "x")
        assert time.monotonic() - start < 0.3
        assert sum(pool.collect().values()) == 4.0
        assert 0.9 < time.monotonic() - start < 1.9, "two at a time"


@pytest.mark.parametrize("bad", ["no_such_file.py:score", "mine.py:nothing"])
def test_a_reward_that_cannot_be_used_is_an_error_at_once(tmp_path, bad):
    (tmp_path / "mine.py").write_text(REWARD)
    with pytest.raises(RewardError, match="--reward"):
        RewardPool(str(tmp_path / bad), 1, 1.0)


def test_a_file_that_only_works_in_the_trainer_is_an_error_too(tmp_path):
    """It is imported in another process, which has other variables."""
    path = tmp_path / "mine.py"
    path.write_text(
        f"import os\nif os.getpid() != {os.getpid()}:\n    raise OSError('elsewhere')\ndef f(c, a, r): return 1\n"
    )
    with pytest.raises(RewardError, match="elsewhere"):
        RewardPool(f"{path}:f", 1, 1.0)
