"""Run an ablation: every variant with every seed through train.py, then a table, curves and a verdict with its odds.

The scripts in scripts/ablations/ call it; by hand:

    python scripts/ablation.py tis_cap --variant "none: --tis-cap None" --variant "2: --tis-cap 2" \\
        --seeds 0 1 2 --folder runs/ablations/tis_cap -- --steps 20 --eval-every 5

What stands after -- goes to every run. A variant is "NAME: FLAGS"; it is compared with the first one, or with the one
that "NAME vs OTHER: FLAGS" names. Runs are processes of their own, one after the other. The same command goes on where
it was ended: a run is finished when its process ended with status 0, its metrics.jsonl has the last step, and
finished.json says so; any other run folder is moved to FOLDER/aside and run again. A run that fails is shown as failed,
never as a number, the others go on, and the exit status is 1. A finished run with other flags than those asked for is
refused, or run again with --rerun-changed.

FOLDER gets runs/VARIANT-seedS (without checkpoints, unless --keep-checkpoints), logs/, table.md and curves.png. What
the figures of the table and the odds are is written in ablation_report.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import argparse
import contextlib
import dataclasses
import fcntl
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tyro
from ablation_report import Results, Variant, draw, report

from config import BY_MACHINE, Args, ConfigError

ROOT = Path(__file__).resolve().parent.parent
NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
OURS = ("seed", "runs_dir", "run_name")  # flags that this script gives


class AblationError(ValueError):
    """What was asked for cannot be run; the message names the flag or the folder, and the fix."""


# ---- what is run


@dataclass(frozen=True, eq=False)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int
    folder: Path
    """Of the ablation."""
    flags: list[str]
    train: Path

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"

    @property
    def path(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def command(self) -> list[str]:
        place = ["--runs-dir", str(self.folder / "runs"), "--run-name", self.name]
        return [sys.executable, str(self.train), "--seed", str(self.seed), *place, *self.flags]

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json should say. Raises ConfigError; a flag that train.py does not know ends the program."""
        asked = tyro.cli(Args, prog="train.py", args=["--seed", str(self.seed), *self.flags]).resolved()
        return {k: str(v) if v == math.inf else v for k, v in dataclasses.asdict(asked).items() if k not in OURS[1:]}


def parse_variants(texts: Sequence[str]) -> list[Variant]:
    """Of "NAME: FLAGS" or "NAME vs OTHER: FLAGS" each; the first one is the baseline of all that name none."""
    variants: list[Variant] = []
    for text in texts:
        found = re.fullmatch(rf"({NAME})(?:\s+vs\s+({NAME}))?\s*:(.*)", text.strip(), re.DOTALL)
        if not found:
            raise AblationError(f'--variant "{text}" is not "NAME: FLAGS" or "NAME vs OTHER: FLAGS"')
        name, other, flags = found.groups()
        names = [v.name for v in variants]
        if name in names:
            raise AblationError(f"--variant {name} is there twice")
        if other is not None and other not in names:
            raise AblationError(f"--variant {name} vs {other}: no variant {other} stands before it")
        variants.append(Variant(name, shlex.split(flags), other or (names[0] if names else None)))
    return variants


def flag_names(flags: Sequence[str]) -> set[str]:
    """Field names of the flags in a command line; --no-x and --x are the same one."""
    names = (f[2:].partition("=")[0].replace("-", "_") for f in flags if f.startswith("--"))
    return {name.removeprefix("no_") for name in names}


def plan_runs(
    variants: Sequence[Variant], seeds: Sequence[int], common: list[str], folder: Path, train: Path
) -> list[Run]:
    """Seed by seed, so that an ablation that is ended early has some of each variant. Raises AblationError."""
    if len(set(seeds)) < len(seeds):
        raise AblationError(f"--seeds {' '.join(map(str, seeds))}: each once")
    for name in sorted(flag_names(common)):
        flag = "--" + name.replace("_", "-")
        if name in OURS:
            raise AblationError(f"{flag} is set by the ablation itself: use --seeds and --folder")
        if any(name in flag_names(v.flags) for v in variants):
            raise AblationError(f"{flag} is what this ablation varies; it cannot be given for all runs")
    runs = [Run(v.name, seed, folder, [*common, *v.flags], train) for seed in seeds for v in variants]
    known: dict[str, str] = {}
    for run in runs[: len(variants)]:
        if not (run.config["eval_every"] and run.config["eval_size"]):
            raise AblationError("--eval-every 0 or --eval-size 0: variants are compared by their held-out accuracy")
        same = known.setdefault(json.dumps(run.config, sort_keys=True), run.variant)
        if same != run.variant:
            raise AblationError(f"the variants {same} and {run.variant} have the same flags")
    return runs


# ---- what is there already


def read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise AblationError(f"{path} is damaged ({error}); remove {path.parent} and start again") from error


def is_finished(run: Run) -> bool:
    """True if this script saw the run end well, and the last step of its own config is in its metrics."""
    if not all((run.path / name).is_file() for name in ("finished.json", "config.json", "metrics.jsonl", "env.json")):
        return False
    steps = json.loads((run.path / "config.json").read_text(encoding="utf-8"))["steps"]
    return any(line["step"] == steps for line in read_lines(run.path / "metrics.jsonl"))


def differences(run: Run) -> list[str]:
    """Flags in which a finished run differs from what is asked now; a flag that is younger than the run counts as its
    default then."""
    had = json.loads((run.path / "config.json").read_text(encoding="utf-8"))
    defaults = dataclasses.asdict(Args())
    found = []
    for name, asked in run.config.items():
        value = had.get(name, defaults[name])
        if value != asked and not (asked is None and name in BY_MACHINE):
            found.append(f"--{name.replace('_', '-')} was {value}, now {asked}")
    return found


def move_aside(run: Run) -> Path:
    """FOLDER/aside/NAME-N, the first N that is free."""
    aside = run.folder / "aside"
    aside.mkdir(exist_ok=True)
    number = next(n for n in range(1, 10**6) if not (aside / f"{run.name}-{n}").exists())
    return run.path.rename(aside / f"{run.name}-{number}")


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """One ablation at a time in a folder; the lock ends with the process."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AblationError(
                f"another process is at work in {folder}; wait for it, or use another folder"
            ) from error
        yield


# ---- running


def execute(run: Run, keep_checkpoints: bool) -> str | None:
    """Run it; None if it ended well, otherwise why not. Whatever was in its folder is moved aside."""
    if run.path.exists():
        print(f"  {run.path} moved to {move_aside(run)}", flush=True)
    start = time.perf_counter()
    with open(run.log, "w", encoding="utf-8") as log:
        child = subprocess.Popen(run.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = child.wait()
        except BaseException:  # Ctrl-C or SIGTERM: no process is left behind
            child.terminate()
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(60)
            finally:
                child.kill()
            raise
    seconds = time.perf_counter() - start
    if status != 0:
        return error_of(run.log.read_text(encoding="utf-8", errors="replace"), status)
    metrics = run.path / "metrics.jsonl"
    lines = read_lines(metrics) if metrics.is_file() else []
    done = max((line["step"] for line in lines), default=0)
    if done != run.config["steps"]:
        return f"stopped after {done} of {run.config['steps']} steps"
    if lines[-1].get("eval/accuracy") is None:
        return "no held-out accuracy at the last step"
    if not keep_checkpoints:
        shutil.rmtree(run.path / "checkpoints")
    finished = {"command": shlex.join(run.command[1:]), "seconds": round(seconds, 2)}
    (run.path / "finished.json").write_text(json.dumps(finished, indent=1) + "\n", encoding="utf-8")
    return None


def error_of(log: str, status: int) -> str:
    """The last line of a log that names an error, otherwise its last line; with the exit status."""
    how = f"status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(error:|[\w.]*(Error|Exception|Interrupt)\b)", line)]
    return f"{how}: {(errors or lines or ['no output'])[-1]}"


# ---- the command line


def run_all(args: argparse.Namespace, variants: Sequence[Variant], runs: Sequence[Run]) -> Results:
    """Run what is not finished; table.md is written anew after each run."""
    results = Results()
    changed = {run: differences(run) for run in runs if is_finished(run)}
    refused = [f"  {run.path}: {'; '.join(what)}" for run, what in changed.items() if what]
    if refused and not args.rerun_changed:
        raise AblationError(
            "finished runs have other flags than those asked for now:\n" + "\n".join(refused) + "\n"
            "take another folder, or --rerun-changed to move them aside and run them again"
        )
    for number, run in enumerate(runs, 1):
        write_table(args, variants, results)
        where = f"{number}/{len(runs)} {run.name}"
        if changed.get(run) == []:
            results.add(run.variant, run.seed, run.path)
            print(f"{where}: finished before", flush=True)
            continue
        print(f"{where}: runs, log in {run.log}", flush=True)
        start = time.perf_counter()
        error = execute(run, args.keep_checkpoints)
        if error is None:
            results.add(run.variant, run.seed, run.path)
            accuracy = results.accuracies(run.variant)[run.seed]
            print(f"{where}: held-out {accuracy:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
        else:
            results.failures[run.variant, run.seed] = error
            print(f"{where}: FAILED, {error}", flush=True)
    return results


def write_table(args: argparse.Namespace, variants: Sequence[Variant], results: Results) -> str:
    """FOLDER/table.md; returns its text."""
    text = report(args.name, variants, args.seeds, shlex.join(args.common), results)
    (args.folder / "table.md").write_text(text, encoding="utf-8")
    return text


def print_plan(runs: Sequence[Run]) -> None:
    """One line a run: what would be done with it, and the command."""
    for run in runs:
        state = "run"
        if is_finished(run):
            state = "changed" if differences(run) else "finished"
        elif run.path.exists():
            state = "run again"
        print(f"{state}: {shlex.join(['python', *run.command[1:]])}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`common` is what stands after --."""
    ours, common = list(argv), []
    if "--" in ours:
        cut = ours.index("--")
        ours, common = ours[:cut], ours[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--variant", action="append", required=True, metavar="'NAME [vs OTHER]: FLAGS'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="runs/ablations/NAME")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--rerun-changed", action="store_true", help="run finished runs with other flags again")
    parser.add_argument("--keep-checkpoints", action="store_true", help="of finished runs")
    parser.add_argument("--train", type=Path, default=ROOT / "train.py", help=argparse.SUPPRESS)
    args = parser.parse_args(ours)
    args.common = common
    args.folder = (args.folder or Path("runs/ablations") / args.name).absolute()
    return args


def main(argv: Sequence[str]) -> int:
    """The exit status: 0, 1 if a run failed, 130 if interrupted. Raises AblationError and ConfigError."""
    args = parse_arguments(argv)
    variants = parse_variants(args.variant)
    runs = plan_runs(variants, args.seeds, args.common, args.folder, args.train)
    size = f"{len(variants)} variants, {len(args.seeds)} seeds, {len(runs)} runs"
    print(f"{args.name}: {size}; {args.folder}", flush=True)
    if args.dry_run:
        print_plan(runs)
        return 0
    try:
        with only_one(args.folder):
            results = run_all(args, variants, runs)
            text = write_table(args, variants, results)
            if results.lines:
                draw(args.name, variants, results, args.folder / "curves.png")
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on. So far: {args.folder / 'table.md'}", file=sys.stderr)
        return 130
    print(f"\n{text}\ntable and curves: {args.folder}")
    return 1 if results.failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run in progress is ended too
    try:
        sys.exit(main(sys.argv[1:]))
    except (AblationError, ConfigError) as error:
        sys.exit(f"error: {error}")
