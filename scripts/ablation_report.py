"""What an ablation shows: a table, curves, and a verdict with its odds. scripts/ablation.py runs it.

Every figure is read from metrics.jsonl. The table is mean ± standard deviation over seeds. "held-out" is eval/accuracy;
"best" is the largest of several noisy figures, and so too high by some. Reward, mismatch and entropy are means over the
last quarter of the steps; seconds a step are the median over all steps but the first, evaluations left out.

The odds: d = last held-out accuracy of the variant minus that of its baseline, seed by seed (the same prompts in the
same order, as far as dynamic sampling lets them be). Mean d over its standard error s / sqrt(n) is compared with
Student's t of n - 1 degrees of freedom: the paired t-test. Read with a flat prior, P(better) = P(T < mean / error). It
takes d as normal. Of k comparisons the clearest is the one that chance favoured most, so the verdict also says in how
many ablations without any difference one so clear would turn up: at most 2 k (1 - P) (Bonferroni, both directions). A
variant is called better or worse when that is below 5 %. All runs answer the same held-out questions: what others would
show is not in these odds.
"""

import dataclasses
import json
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENOUGH = 0.05  # called better or worse below this chance of a false alarm
ENVIRONMENT = {
    "code": ("git_commit", "git_diff"), "packages": ("versions", "python"), "machine": ("gpus", "cpu_count"),
}  # fmt: skip

FIGURES = {
    "held-out before": ".3f", "held-out last": ".3f", "held-out best": ".3f", "reward": ".3f", "abs dlogp": ".4f",
    "ESS": ".4f", "entropy": ".3f", "s a step": ".2f",
}  # fmt: skip
LAST_QUARTER = {
    "reward": "reward/mean", "abs dlogp": "mismatch/abs_dlogp_mean", "ESS": "mismatch/ess", "entropy": "train/entropy"
}  # fmt: skip
PANELS = [
    ("reward (all samples drawn)", "reward/mean"),
    ("held-out accuracy", "eval/accuracy"),
    ("mismatch: mean |log pi_old - log mu|", "mismatch/abs_dlogp_mean"),
    ("entropy (nats)", "train/entropy"),
]


# ---- what it is told


@dataclass(frozen=True)
class Variant:
    name: str
    flags: list[str]
    baseline: str | None = None
    """Name of the variant it is compared with; None: nothing, it is the first one."""


@dataclass
class Results:
    """What is known of every run, by (variant, seed); one neither in `lines` nor in `failures` has not ended."""

    lines: dict[tuple[str, int], list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    """Of metrics.jsonl, of finished runs."""
    environments: dict[tuple[str, int], dict[str, Any]] = dataclasses.field(default_factory=dict)
    """env.json of finished runs."""
    failures: dict[tuple[str, int], str] = dataclasses.field(default_factory=dict)
    """Why a run failed."""

    def add(self, variant: str, seed: int, folder: Path) -> None:
        """A finished run."""
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        self.lines[variant, seed] = [json.loads(line) for line in text.splitlines()]
        self.environments[variant, seed] = json.loads((folder / "env.json").read_text(encoding="utf-8"))

    def of(self, variant: str) -> dict[int, list[dict[str, Any]]]:
        return {seed: lines for (name, seed), lines in self.lines.items() if name == variant}

    def accuracies(self, variant: str) -> dict[int, float]:
        return {seed: lines[-1]["eval/accuracy"] for seed, lines in self.of(variant).items()}


# ---- figures of a run


def last_quarter(steps: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    return steps[-math.ceil(len(steps) / 4) :]


def mean_of(lines: Sequence[dict[str, Any]], key: str) -> float | None:
    """Mean over the lines that have the key; nan if one of them is null (not finite), None if no line has it."""
    values = [math.nan if line[key] is None else line[key] for line in lines if key in line]
    return statistics.fmean(values) if values else None


def figures_of(lines: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """A finished run's row of the table: FIGURES, from the lines of its metrics.jsonl."""
    steps = [line for line in lines if line["step"] > 0]
    accuracy = [line["eval/accuracy"] for line in lines if line.get("eval/accuracy") is not None]
    seconds = [line["time/step"] - line.get("time/eval", 0.0) for line in steps]
    return {
        "held-out before": mean_of(lines[:1], "eval/accuracy") if lines[0]["step"] == 0 else None,
        "held-out last": lines[-1]["eval/accuracy"],
        "held-out best": max(accuracy),
        "s a step": statistics.median(seconds[1:] or seconds),
    } | {name: mean_of(last_quarter(steps), key) for name, key in LAST_QUARTER.items()}


def mean_std(values: Sequence[float | None], form: str) -> str:
    """Mean ± sample standard deviation; no deviation of a single value, "-" without any."""
    there = [v for v in values if v is not None]
    if not there:
        return "-"
    mean = format(statistics.fmean(there), form)
    return mean if len(there) == 1 else f"{mean} ± {format(deviation(there), form)}"


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; nan if a value is."""
    return math.nan if any(math.isnan(v) for v in values) else statistics.stdev(values)


# ---- odds


def t_cdf(t: float, degrees: int) -> float:
    """P(T < t) of Student's t with a whole number of degrees of freedom: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):  # cos^(k-1) with its coefficient
        total += term
        term *= cosine**2 * k / (k + 1)
    between = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return 0.5 + between / 2


def t_quantile(p: float, degrees: int) -> float:
    """The t with P(T < t) = p, for p above 1/2, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < p else (low, middle)
    return high


@dataclass(frozen=True)
class Comparison:
    """A variant minus its baseline, over the seeds that both have finished."""

    variant: str
    baseline: str
    pairs: int
    mean: float | None = None
    error: float | None = None
    """Standard error of the mean; None with fewer than two pairs."""
    better: float | None = None
    """P(the variant is better); None where there is no spread to judge by."""

    @property
    def shows(self) -> float:
        """Half of the 95 % interval: a smaller difference does not show with these seeds."""
        return t_quantile(0.975, self.pairs - 1) * self.error


def compare(variant: str, baseline: str, ours: dict[int, float], theirs: dict[int, float]) -> Comparison:
    """The paired t-test of two {seed: accuracy}."""
    gaps = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not gaps:
        return Comparison(variant, baseline, 0)
    mean = statistics.fmean(gaps)
    if len(gaps) == 1:
        return Comparison(variant, baseline, 1, mean)
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    if error < 1e-12:  # the same difference in every seed
        return Comparison(variant, baseline, len(gaps), mean, 0.0)
    return Comparison(variant, baseline, len(gaps), mean, error, t_cdf(mean / error, len(gaps) - 1))


def verdict(comparisons: Sequence[Comparison]) -> str:
    """One line: the clearest of the comparisons, its odds, and how often chance alone shows one so clear."""
    judged = [c for c in comparisons if c.better is not None]
    if not judged:
        return f"verdict: none can be given. {without_odds(comparisons)}".strip()
    best = max(judged, key=lambda c: abs(c.better - 0.5))
    by_chance = min(1.0, 2 * len(judged) * min(best.better, 1 - best.better))
    if by_chance >= ENOUGH:
        told = "nothing is told apart"
    else:
        told = f"{best.variant} is {'better' if best.mean > 0 else 'worse'} than {best.baseline}"
    few = f"; {best.pairs} seeds tell little" if best.pairs < 5 else ""
    return (
        f"verdict: {told}. The clearest of {len(judged)} comparisons: {best.variant} minus {best.baseline} = "
        f"{best.mean:+.3f} ± {best.error:.3f} (standard error, {best.pairs} seeds), P(better) {best.better:.3f}, "
        f"P(worse) {1 - best.better:.3f}; without any difference, one so clear turns up in up to {by_chance:.1%} of "
        f"such ablations. A difference below {best.shows:.3f} would not show in it{few}. {without_odds(comparisons)}"
    ).strip()


def without_odds(comparisons: Sequence[Comparison]) -> str:
    """The comparisons that have none, and why."""
    parts = []
    for c in comparisons:
        pair = f"{c.variant} and {c.baseline}"
        if c.pairs < 2:
            parts.append(f"{pair} have {c.pairs} finished seed{'s' * (c.pairs != 1)} in common, and odds need two")
        elif c.better is None:
            equal = "end with the same accuracy" if abs(c.mean) < 1e-12 else f"differ by the same {c.mean:+.3f}"
            parts.append(f"{pair} {equal} in all {c.pairs} seeds")
    return f"No odds: {'; '.join(parts)}." if parts else ""


# ---- the report


def compare_all(variants: Sequence[Variant], results: Results) -> list[Comparison]:
    return [
        compare(v.name, v.baseline, results.accuracies(v.name), results.accuracies(v.baseline))
        for v in variants
        if v.baseline is not None
    ]


def table(variants: Sequence[Variant], seeds: Sequence[int], results: Results) -> str:
    """Markdown, one line a variant; "failed" where no seed ended well and one failed."""
    compared = {c.variant: c for c in compare_all(variants, results)}
    header = ["variant", *FIGURES, "seeds", "against", "difference ± SE", "P(better)"]
    rows = [header, ["---"] * len(header)]
    for v in variants:
        runs = results.of(v.name)
        failed = sum(name == v.name for name, _ in results.failures)
        rows_of = [figures_of(lines) for lines in runs.values()]
        nothing = "failed" if failed else "to run"
        cells = [mean_std([r[k] for r in rows_of], form) if runs else nothing for k, form in FIGURES.items()]
        count = f"{len(runs)} of {len(seeds)}" + (f", {failed} failed" if failed else "")
        c = compared.get(v.name)
        difference, odds = "", ""
        if c is not None:
            difference = "-" if c.mean is None else f"{c.mean:+.3f}"
            difference += "" if c.error is None else f" ± {c.error:.3f}"
            odds = "-" if c.better is None else f"{c.better:.3f}"
        rows.append([v.name, *cells, count, v.baseline or "", difference, odds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def notes(results: Results) -> list[str]:
    """What a reader of the table must know besides: failures, skipped updates, runs of other code or machines."""
    found = [f"{variant}-seed{seed} failed: {error}" for (variant, seed), error in results.failures.items()]
    for (variant, seed), lines in results.lines.items():
        skipped = lines[-1].get("train/skipped_total")
        if skipped:
            found.append(f"{variant}-seed{seed}: {skipped} updates were skipped, since their gradient was not finite")
    changed = []
    for what, keys in ENVIRONMENT.items():
        if len({json.dumps([env.get(key) for key in keys]) for env in results.environments.values()}) > 1:
            changed.append(what)
    if changed:
        found.append(f"the finished runs do not all have the same {', '.join(changed)} (env.json)")
    return found


def report(name: str, variants: Sequence[Variant], seeds: Sequence[int], common: str, results: Results) -> str:
    """The table, notes, the verdict, and the flags (`common`: those of all runs), as Markdown."""
    missing = len(variants) * len(seeds) - len(results.lines) - len(results.failures)
    flags = [f"all: `{common}`", *[f"{v.name}: `{shlex.join(v.flags)}`" for v in variants]]
    parts = [
        f"# {name}",
        table(variants, seeds, results),
        "\n".join(f"- {note}" for note in notes(results)),
        f"{missing} of {len(variants) * len(seeds)} runs have not ended yet." if missing else "",
        verdict(compare_all(variants, results)),
        "Flags of train.py:\n\n" + "\n".join(f"- {line}" for line in flags),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def curve(runs: Sequence[Sequence[dict[str, Any]]], key: str) -> tuple[list[int], list[float], list[float]]:
    """(steps, mean over the runs, standard deviation or 0 for a single value) of a metric, where it was finite."""
    by_step: dict[int, list[float]] = {}
    for lines in runs:
        for line in lines:
            if line.get(key) is not None:
                by_step.setdefault(line["step"], []).append(line[key])
    steps = sorted(by_step)
    means = [statistics.fmean(by_step[s]) for s in steps]
    return steps, means, [statistics.stdev(by_step[s]) if len(by_step[s]) > 1 else 0.0 for s in steps]


def draw(name: str, variants: Sequence[Variant], results: Results, out: Path) -> None:
    """A panel a metric: the mean over seeds against the step, with a band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = plt.get_cmap("tab10" if len(variants) <= 10 else "tab20")
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for axis, (title, key) in zip(axes.flat, PANELS, strict=True):
        for i, v in enumerate(variants):
            steps, means, stds = curve(list(results.of(v.name).values()), key)
            if not steps:
                continue
            axis.plot(steps, means, color=colours(i), label=v.name, marker="o" if key == "eval/accuracy" else None)
            low = [mean - std for mean, std in zip(means, stds, strict=True)]
            high = [mean + std for mean, std in zip(means, stds, strict=True)]
            axis.fill_between(steps, low, high, color=colours(i), alpha=0.12, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"{name}: mean over seeds, band of one standard deviation")
    figure.savefig(out, dpi=110)
    plt.close(figure)
