"""What a run folder says, read again, and its curves as PNG; of several runs, overlaid.

A run that was stopped in the middle of a line is read all the same. matplotlib is imported when something is drawn. The
ablations' own table and curves are scripts/ablation_report.py.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEED_FLAGS = ("seed", "run_name", "runs_dir")  # runs that differ in these alone are one line with a band


class ReportError(ValueError):
    """A run that cannot be shown; the message names the file."""


@dataclass(frozen=True)
class Panel:
    """One plot. Of several lines only the `overlaid` keys are shown, or the first one; never on a logarithmic scale. A
    key that never reaches `least` is left out."""

    title: str
    keys: tuple[str, ...]
    log: bool = False
    overlaid: tuple[str, ...] = ()
    least: float = -math.inf

    def keys_in(self, runs: "Sequence[Run]") -> list[str]:
        """Those that there is something to show of."""
        return [k for k in self.keys if any(v >= self.least for run in runs for _, v in run.finite(k))]


PANELS = (
    Panel("reward, all samples drawn", ("reward/mean",)),
    Panel("held-out accuracy", ("eval/accuracy",)),
    Panel("mismatch: mean |log pi_old - log mu|", ("mismatch/abs_dlogp_mean", "mismatch/bf16_floor")),
    Panel("entropy, nats a token", ("train/entropy",)),
    Panel("response length, tokens", ("response/length_mean",)),
    Panel("gradient norm", ("train/grad_norm",)),
    Panel(
        "seconds",
        ("time/step", "time/rollout", "time/train", "time/eval", "time/sync", "time/verify", "time/sleep", "time/wake"),
        log=True,
        overlaid=("time/step", "time/rollout", "time/train"),
        least=1e-4,
    ),
    Panel("tokens a second", ("speed/rollout_tokens_per_s", "speed/train_tokens_per_s")),
    Panel(
        "GPU memory, GiB",
        (
            "memory/device_gib",
            "memory/torch_reserved_gib",
            "memory/used_peak_gib",
            "memory/torch_peak_gib",
            "memory/planned_peak_gib",
        ),
    ),
    Panel("host memory, GiB", ("memory/host_gib",)),
)


# ---- reading


@dataclass
class Run:
    """What is in a run folder. `rows` are the lines of metrics.jsonl in the order of their steps, the last one of each;
    `notes` says what could not be read."""

    folder: Path
    rows: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) where the key was logged; nan where its value was not finite."""
        found = [(r["step"], as_number(r[key])) for r in self.rows if key in r]
        return [s for s, _ in found], [v for _, v in found]

    def finite(self, key: str) -> list[tuple[float, float]]:
        return [(s, v) for s, v in zip(*self.series(key), strict=True) if math.isfinite(v)]


def read_run(folder: Path) -> Run:
    """Everything but the checkpoints. Raises ReportError without a single step; what else is missing or broken is left
    out and said in `notes`."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ReportError(f"{path} is not there; give a run folder, e.g. runs/NAME")
    lines, notes = read_lines(path)
    if not lines:
        why = f"has no line that can be read, and {len(notes)} that cannot" if notes else "is empty"
        raise ReportError(f"{path} {why}: the run ended before its first step")
    run = Run(folder, [line for _, line in sorted({r["step"]: r for r in lines}.items())], notes=notes)
    for name in ("samples", "events"):
        if (folder / f"{name}.jsonl").is_file():
            lines, notes = read_lines(folder / f"{name}.jsonl")
            setattr(run, name, lines)
            run.notes += notes
    for name, attribute in (("config.json", "config"), ("env.json", "environment")):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            setattr(run, attribute, content if isinstance(content, dict) else {})
        except (OSError, ValueError) as error:
            run.notes.append(f"{folder / name} could not be read: {error}")
    return run


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(objects with a step, what was left out) of a .jsonl file. Raises ReportError if it cannot be opened."""
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: a text may hold U+2028
    except OSError as error:
        raise ReportError(f"{path} could not be read: {error.strerror}") from error
    good, notes = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict) or not math.isfinite(as_number(value.get("step"))):
                raise ValueError
            good.append(value)
        except (ValueError, RecursionError):
            half = "is half-written" if number == len(lines) else "is no JSON object with a step"
            notes.append(f"{path}: line {number} {half} and left out")
    return good, notes


def as_number(value: Any) -> float:
    """nan for what is none: JSON's null, a text, digits without end."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        float(value)
    except OverflowError:
        return math.nan
    return value


# ---- several runs


@dataclass(frozen=True)
class Line:
    """Runs that differ in SEED_FLAGS alone, under one name."""

    label: str
    runs: list[Run]

    def band(self, key: str) -> tuple[list[float], list[float], list[float], list[float]]:
        """(steps, mean, smallest, largest) over the runs that have a finite value at that step; a single run also has
        its steps without one, as nan."""
        if len(self.runs) == 1:
            steps, values = self.runs[0].series(key)
            return steps, values, values, values
        by_step: dict[float, list[float]] = {}
        for run in self.runs:
            for step, value in run.finite(key):
                by_step.setdefault(step, []).append(value)
        steps = sorted(by_step)
        return steps, *([of(by_step[s]) for s in steps] for of in (statistics.fmean, min, max))


def lines_of(runs: Sequence[Run]) -> list[Line]:
    """The runs as lines of a plot, named by the flags in which they differ."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        setting = {k: v for k, v in run.config.items() if k not in SEED_FLAGS}
        groups.setdefault(json.dumps(setting, sort_keys=True) if setting else str(run.folder.resolve()), []).append(run)
    firsts = [group[0] for group in groups.values()]
    flags = sorted({k for run in firsts for k in run.config if k not in SEED_FLAGS})
    differing = [k for k in flags if len({json.dumps(run.config.get(k)) for run in firsts}) > 1]
    lines = []
    for group in groups.values():
        first = group[0]
        label = ", ".join(f"{k} {first.config.get(k)}" for k in differing)
        if not 1 <= len(differing) <= 3 or not first.config:
            label = first.name
        lines.append(Line(label + (f" ({len(group)} runs)" if len(group) > 1 else ""), group))
    return lines


# ---- curves as PNG


def draw(runs: Sequence[Run], out: Path) -> None:
    """The panels that any of the runs has values for. One run: all keys of a panel. Several: a colour each, runs that
    differ by seed alone as their mean with a band from the smallest to the largest value."""
    from matplotlib.figure import Figure

    lines = lines_of(runs)
    panels = [p for p in PANELS if p.keys_in(runs)]
    if not panels:
        raise ReportError(f"{', '.join(run.name for run in runs)}: nothing to draw, no metric has a finite value")
    columns = min(len(panels), 4 if len(panels) in (4, 7, 8) else 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.1 * rows + 0.5), layout="constrained")
    for i, panel in enumerate(panels):
        axis = figure.add_subplot(rows, columns, i + 1)
        _draw_panel(axis, panel, lines)
    title = runs[0].name if len(runs) == 1 else ""
    if any(len(line.runs) > 1 for line in lines):
        title += "\nline: mean over the runs; band: smallest to largest"
    figure.suptitle(_plain(title.strip()) or f"{len(runs)} runs", fontsize=11)
    if len(lines) > 1:
        handles = [h for h in figure.axes[0].get_lines() if not h.get_label().startswith("_")]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(lines), 4), fontsize=8)
    figure.savefig(out, dpi=110)


def _plain(text: str) -> str:
    """For matplotlib, which reads formulas between dollar signs and leaves names with a leading underscore out."""
    return text.replace("$", r"\$").removeprefix("_")


def _draw_panel(axis: Any, panel: Panel, lines: Sequence[Line]) -> None:
    single = len(lines) == 1
    keys = panel.keys_in([run for line in lines for run in line.runs])
    if not single:
        keys = [k for k in keys if k in (panel.overlaid or keys[:1])]
    for i, line in enumerate(lines):
        for j, key in enumerate(keys):
            steps, mean, low, high = line.band(key)
            colour, style = (f"C{j}", "-") if single else (f"C{i % 10}", ("-", "--", ":")[j % 3])
            few = len(steps) <= 20
            label = key.partition("/")[2] if single else _plain(line.label) if j == 0 else None
            axis.plot(steps, mean, color=colour, linestyle=style, marker="." if few else None, label=label, lw=1.3)
            if len(line.runs) > 1:
                axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    if single and len(keys) > 1:
        axis.legend(fontsize=7, ncols=2 if len(keys) > 4 else 1)
    elif len(keys) > 1:
        names = [axis.plot([], [], color="grey", linestyle=("-", "--", ":")[j % 3])[0] for j in range(len(keys))]
        axis.legend(names, [k.partition("/")[2] for k in keys], fontsize=7)
    if len(lines) == len(lines[0].runs) == 1:
        for event in lines[0].runs[0].events:
            axis.axvline(event["step"], color="C3", lw=0.8, alpha=0.6, linestyle="--")
    if panel.log and single:
        axis.set_yscale("log")
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
