"""Print what a run reached, and draw its curves from metrics.jsonl into curves.png in the run folder.

What it leaves out: comparing several runs.

    python scripts/plot_run.py runs/NAME
    python scripts/plot_run.py runs/NAME --table     # and a Markdown table of the steps
"""

import argparse
import json
import math
import sys
from pathlib import Path

PANELS = [
    ("accuracy", ["reward/mean", "eval/accuracy"]),
    ("mean |log pi_old - log mu|", ["mismatch/abs_dlogp_mean"]),
    ("entropy (nats)", ["train/entropy"]),
    ("response length (tokens)", ["response/length_mean"]),
    ("gradient norm", ["train/grad_norm"]),
    ("seconds", ["time/rollout", "time/train", "time/step"]),
]

TABLE = [
    ("step", "step", "d"),
    ("reward", "reward/mean", ".3f"),
    ("held-out", "eval/accuracy", ".3f"),
    ("mixed", "sampling/groups_mixed", "d"),
    ("drawn", "sampling/groups_drawn", "d"),
    ("length", "response/length_mean", ".0f"),
    ("abs dlogp", "mismatch/abs_dlogp_mean", ".4f"),
    ("k3", "mismatch/kl_k3", ".4f"),
    ("ESS", "mismatch/ess", ".4f"),
    ("capped", "mismatch/capped_share", ".2%"),
    ("grad norm", "train/grad_norm", ".2f"),
    ("entropy", "train/entropy", ".3f"),
    ("tok/s", "speed/rollout_tokens_per_s", ".0f"),
    ("rollout s", "time/rollout", ".2f"),
    ("train s", "time/train", ".2f"),
    ("sync ms", "time/sync", "ms"),
    ("verify ms", "time/verify", "ms"),
    ("step s", "time/step", ".2f"),
]


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; exits with a message if the folder has none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"error: {path} is not there; give a run folder, e.g. runs/NAME")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows:
        sys.exit(f"error: {path} is empty: the run ended before its first step")
    return rows


def series(rows: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a key, where it was logged."""
    points = [(r["step"], r[key]) for r in rows if r.get(key) is not None and math.isfinite(r[key])]
    return [s for s, _ in points], [v for _, v in points]


def print_table(rows: list[dict[str, float]]) -> None:
    """A Markdown table, one line a step."""

    def cell(row: dict[str, float], key: str, form: str) -> str:
        value = row.get(key)
        if value is None:
            return ""
        return f"{value * 1e3:.0f}" if form == "ms" else format(value, form)

    print("| " + " | ".join(name for name, *_ in TABLE) + " |")
    print("|---" * len(TABLE) + "|")
    for row in rows:
        print("| " + " | ".join(cell(row, key, form) for _, key, form in TABLE) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", action="store_true", help="print a Markdown table of the steps")
    args = parser.parse_args()
    folder = args.folder
    rows = read_metrics(folder)
    if args.table:
        print_table(rows)
    steps, accuracy = series(rows, "eval/accuracy")
    if accuracy:
        print(
            f"held-out accuracy: {accuracy[0]:.3f} at step {steps[0]:.0f} -> {accuracy[-1]:.3f} at step {steps[-1]:.0f}"
        )
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, PANELS, strict=True):
        for key in keys:
            x, y = series(rows, key)
            axis.plot(x, y, marker="o" if key.startswith("eval/") else None, label=key)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(folder.name)
    figure.savefig(folder / "curves.png", dpi=110)
    print(f"curves: {folder / 'curves.png'}\nrun folder: {folder}")


if __name__ == "__main__":
    main()
