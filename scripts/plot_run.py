"""Print what a run reached, and draw its curves from metrics.jsonl into curves.png in the run folder.

python scripts/plot_run.py runs/NAME
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows = read_metrics(folder)
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
