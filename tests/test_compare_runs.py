"""scripts/compare_runs.py by hand: what was spent until each level, and the two tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import compare_runs  # noqa: E402

from run_curves import ReportError, read_run  # noqa: E402


def make_run(folder, accuracies, seconds=60.0, drawn=10):
    """A step a minute, 10 groups of 4; `accuracies` by step."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"samples_per_prompt": 4}))
    rows = [{"step": 0, "eval/accuracy": accuracies[0], "time/eval": 500.0}]
    for step in range(1, max(accuracies) + 1):
        row = {"step": step, "time/step": seconds, "sampling/groups_drawn": drawn, "reward/mean": step / 10,
               "mismatch/abs_dlogp_mean": 0.03, "train/entropy": 1.0}  # fmt: skip
        if step in accuracies:
            row |= {"eval/accuracy": accuracies[step], "time/eval": 30.0, "time/step": seconds + 30.0}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_a_level_is_reached_at_the_evaluation_that_shows_it(tmp_path):
    run = read_run(make_run(tmp_path / "a", {0: 0.26, 2: 0.29, 4: 0.36, 6: 0.34, 8: 0.40}))
    assert compare_runs.milestones(run) == [
        (pytest.approx(0.30), 4, 160, pytest.approx(4)), (pytest.approx(0.35), 4, 160, pytest.approx(4)),
        (pytest.approx(0.40), 8, 320, pytest.approx(8)),
    ]  # fmt: skip


def test_a_start_on_a_level_has_reached_it(tmp_path):
    run = read_run(make_run(tmp_path / "a", {0: 0.25, 1: 0.25, 2: 0.30}))
    assert [level for level, *_ in compare_runs.milestones(run)] == [pytest.approx(0.30)]


def run_script(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "compare_runs.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_tables_and_the_accuracy_in_bf16(tmp_path):
    runs = [make_run(tmp_path / "runs" / n, {0: 0.26, 5: last}) for n, last in (("a", 0.31), ("b", 0.20))]
    (tmp_path / "runs" / "notes.txt").write_text("no run")
    asked = [
        {"checkpoint": f"{runs[0]}/checkpoints/step-{n:06d}", "accuracy": a, "standard_error": 0.017}
        for n, a in ((5, 0.333), (2, 0.111))
    ] + [{"checkpoint": "models/base", "accuracy": 0.25, "standard_error": 0.016}]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    done = run_script(*sorted((tmp_path / "runs").iterdir()), "--accuracy", tmp_path / "asked.json")
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line]
    assert lines[2] == ["a", "5", "200", "5.0", "0.200 to 0.400", "0.0300 to 0.0300", "1.000 to 1.000", "0.260",
                        "0.310", "0.310", "0.333 ± 0.017"]  # fmt: skip
    assert lines[3][0] == "b" and lines[3][-1] == "-"
    assert lines[6] == ["a", "0.30", "5", "200", "5.0"] and len(lines) == 7


def test_later_steps_can_be_left_out(tmp_path):
    folder = make_run(tmp_path / "a", {0: 0.26, 2: 0.31, 4: 0.41})
    assert "0.40" not in run_script(folder, "--to-step", 3).stdout and "0.40" in run_script(folder).stdout


@pytest.mark.parametrize("content", ["[", '{"a": 1}', '[{"accuracy": 1}]'])
def test_an_accuracy_file_that_is_none_is_one_error(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ReportError, match=r"--accuracy .*evaluate\.py"):
        compare_runs.read_accuracy(path)
