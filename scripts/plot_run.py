"""Print what runs reached, and draw them: curves.png, and for each run a page to read, report.html, in its folder.

Several runs are overlaid in one curves.png, beside their folders unless --out says otherwise; files among them are left
out (runs/*). Runs whose config.json differs in seed, run name and folder alone become one line, their mean, with a band
from the smallest to the largest value. The page needs no other file and no network; it shows samples.jsonl and
events.jsonl where they are there.

    python scripts/plot_run.py runs/NAME
    python scripts/plot_run.py runs/a-seed0 runs/a-seed1 runs/b-seed0 --out ab.png
    python scripts/plot_run.py runs/NAME --table     # and a Markdown table of the steps
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run_curves import ReportError, Run, draw, read_run
from run_report import TABLE, cell, write_page


def print_table(run: Run) -> None:
    """A Markdown table, one line a step."""
    print("| " + " | ".join(name for name, *_ in TABLE) + " |")
    print("|---" * len(TABLE) + "|")
    for row in run.rows:
        print("| " + " | ".join(cell(row, key, form) for _, key, form in TABLE) + " |")


def print_accuracy(run: Run, prefix: str) -> None:
    accuracy = run.finite("eval/accuracy")
    if accuracy:
        (first, before), (last, after) = accuracy[0], accuracy[-1]
        print(f"{prefix}held-out accuracy: {before:.3f} at step {first:.0f} -> {after:.3f} at step {last:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--table", action="store_true", help="print a Markdown table of the steps")
    parser.add_argument("--out", type=Path, help="PNG of the curves (RUN/curves.png; of several runs beside them)")
    args = parser.parse_args()
    folders = list({f.resolve(): f for f in args.folders if len(args.folders) == 1 or not f.is_file()}.values())
    if not folders:
        raise ReportError("no run folder is among these files; give some, e.g. runs/NAME")
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        for note in run.notes:
            print(f"note: {note}", file=sys.stderr)
        if args.table:
            print(f"{run.folder}:\n" if len(runs) > 1 else "", end="")
            print_table(run)
        print_accuracy(run, f"{run.name}: " if len(runs) > 1 else "")
    for run in runs:
        write_page(run, run.folder / "report.html")
        print(f"report: {run.folder / 'report.html'}")
    folder = runs[0].folder if len(runs) == 1 else Path(os.path.commonpath([f.resolve().parent for f in folders]))
    out = args.out or folder / "curves.png"
    try:
        draw(runs, out)
    except ImportError as error:
        raise ReportError(f"{out} was not drawn: {error}; pip install matplotlib") from error
    print(f"curves: {out}")
    if len(runs) == 1:
        print(f"run folder: {folder}")


if __name__ == "__main__":
    try:
        main()
    except (ReportError, OSError) as error:
        sys.exit(f"error: {error}")
