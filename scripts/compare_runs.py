"""What runs came to, side by side, as two Markdown tables: figures, and what each 5 % of held-out accuracy cost.

Everything is read from the run folders. "held-out" is eval/accuracy, by the sampler that the run has; --accuracy takes
what scripts/evaluate.py wrote with --out, the policy's own in bf16. Samples are all that were drawn, also those of
groups that dynamic sampling dropped; minutes are those of the steps, without evaluations, checkpoints and the start.
Reward, mismatch and entropy are means over the first three and the last three steps. A level counts as reached at the
first evaluation that shows it.

    python scripts/compare_runs.py runs/fp8-seed0 runs/bf16-seed0 --accuracy accuracy.json
    python scripts/compare_runs.py runs/* --to-step 40        # leave out what came after
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run_curves import ReportError, Run, as_number, read_run

STEP = 0.05
ENDS = 3  # steps at each end that a mean is taken over


def spent(run: Run) -> list[tuple[float, float, float]]:
    """(step, samples drawn until then, minutes until then) of each row."""
    each, found = as_number(run.config.get("samples_per_prompt")), []
    samples = seconds = 0.0
    for row in run.rows:
        if row["step"] > 0:
            samples += as_number(row.get("sampling/groups_drawn")) * each
            seconds += as_number(row.get("time/step")) - as_number(row.get("time/eval", 0.0))
        found.append((row["step"], samples, seconds / 60))
    return found


def milestones(run: Run) -> list[tuple[float, float, float, float]]:
    """(level, step, samples, minutes) for each multiple of STEP above the first held-out accuracy that was reached."""
    accuracy = run.finite("eval/accuracy")
    cost = {step: (samples, minutes) for step, samples, minutes in spent(run)}
    found: list[tuple[float, float, float, float]] = []
    if accuracy:
        level = math.floor(accuracy[0][1] / STEP + 1e-9) + 1
        for step, value in accuracy[1:]:
            while value >= level * STEP - 1e-9:
                found.append((level * STEP, step, *cost[step]))
                level += 1
    return found


def ends(run: Run, key: str, form: str) -> str:
    """Mean over the first and over the last steps that have the key."""
    values = [v for _, v in run.finite(key)]
    if not values:
        return "-"
    first, last = statistics.fmean(values[:ENDS]), statistics.fmean(values[-ENDS:])
    return f"{first:{form}} to {last:{form}}"


def figures(run: Run, asked: dict[str, dict[str, Any]]) -> dict[str, str]:
    step, samples, minutes = spent(run)[-1]
    accuracy = run.finite("eval/accuracy")
    own = asked.get(run.name)
    return {
        "run": run.name,
        "steps": f"{step:.0f}",
        "samples": f"{samples:.0f}",
        "minutes": f"{minutes:.1f}",
        "reward": ends(run, "reward/mean", ".3f"),
        "mean abs dlogp": ends(run, "mismatch/abs_dlogp_mean", ".4f"),
        "entropy": ends(run, "train/entropy", ".3f"),
        "held-out, first": f"{accuracy[0][1]:.3f}" if accuracy else "-",
        "last": f"{accuracy[-1][1]:.3f}" if accuracy else "-",
        "best": f"{max(v for _, v in accuracy):.3f}" if accuracy else "-",
        "held-out, bf16": "-" if own is None else f"{own['accuracy']:.3f} ± {own['standard_error']:.3f}",
    }


def read_accuracy(path: Path) -> dict[str, dict[str, Any]]:
    """run name -> evaluate.py's result for its last checkpoint. Raises ReportError."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        named = [(Path(r["checkpoint"]), r) for r in results]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"--accuracy {path} is not what scripts/evaluate.py --out writes: {error}") from error
    found: dict[str, dict[str, Any]] = {}
    for folder, result in sorted(named, key=lambda pair: pair[0].name):
        if folder.parent.name == "checkpoints":
            found[folder.parent.parent.name] = result
    return found


def table(rows: Sequence[dict[str, str]]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *[[row[name] for name in names] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--accuracy", type=Path, help="JSON of scripts/evaluate.py --out")
    parser.add_argument("--to-step", type=int, help="leave out later steps")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.folders if folder.is_dir()]
    if not runs:
        raise ReportError("no run folder is among these; give some, e.g. runs/NAME")
    for run in runs:
        if args.to_step is not None:
            run.rows[:] = [row for row in run.rows if row["step"] <= args.to_step]
    asked = read_accuracy(args.accuracy) if args.accuracy else {}
    print(table([figures(run, asked) for run in runs]))
    reached = [
        {"run": run.name, "held-out": f"{level:.2f}", "step": f"{step:.0f}", "samples": f"{samples:.0f}",
         "minutes": f"{minutes:.1f}"}
        for run in runs for level, step, samples, minutes in milestones(run)
    ]  # fmt: skip
    if reached:
        print(f"\n{table(reached)}")


if __name__ == "__main__":
    try:
        main()
    except ReportError as error:
        sys.exit(f"error: {error}")
