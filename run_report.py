"""A run that can be read: all of it on one HTML page that needs no other file and no network.

The page has what was run, key numbers, curves, events, the logged samples with each token coloured by pi_old / mu, and
the table of steps; assets/run_report.html is its frame. scripts/plot_run.py makes it, and so does train.py when a run
ends, with the curves as PNG (run_curves.py) beside it.
"""

import functools
import html
import json
import math
import re
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keys import without_secrets
from run_curves import PANELS, Panel, Run, as_number, draw, read_run

FRAME = Path(__file__).resolve().parent / "assets" / "run_report.html"
SAMPLE_BYTES = 16 << 20  # of samples on a page; with more, some steps are left out
TABLE_ROWS = 1000

TABLE = [  # (heading, key, format; "ms" is seconds shown as milliseconds)
    ("step", "step", "d"),
    ("reward", "reward/mean", ".3f"),
    ("held-out", "eval/accuracy", ".3f"),
    ("mixed", "sampling/groups_mixed", "d"),
    ("drawn", "sampling/groups_drawn", "d"),
    ("length", "response/length_mean", ".0f"),
    ("abs dlogp", "mismatch/abs_dlogp_mean", ".4f"),
    ("bf16 floor", "mismatch/bf16_floor", ".4f"),
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


def write_page(run: Run, out: Path) -> None:
    """One HTML file without any reference to another. Raises OSError."""
    figures = {p: figure for p in PANELS if (figure := _svg(run, p))}
    samples, left_out = _chosen_samples(run.samples)
    parts = {
        "TITLE": _text(run.name),
        "NOTES": "".join(f"<p class=note>{_text(note)}</p>" for note in run.notes),
        "RUN": _facts(_what_was_run(run)),
        "NUMBERS": "".join(f"<div><b>{_text(value)}</b><span>{_text(k)}</span></div>" for k, value in key_numbers(run)),
        "CURVES": "".join(figures.values()),
        "EVENTS": _events(run.events),
        "STEPS": _steps(run.rows),
        "CONFIG": _facts([(k, _short(v)) for k, v in without_secrets(run.config).items()]),
        "SAMPLES_NOTE": f"<p class=note>{_text(left_out)}</p>" if left_out else "",
        "DATA": _json(
            {
                "samples": samples,
                "cap": _cap(run.config),
                "curves": [[[k.partition("/")[2], run.finite(k)] for k in p.keys_in([run])] for p in figures],
            }
        ),
    }
    frame = FRAME.read_text(encoding="utf-8")
    page = re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], frame)  # in one go: a sample may hold such a mark
    out.write_text(page, encoding="utf-8", errors="replace")


def _text(value: Any) -> str:
    """Anything as text of an HTML page. What UTF-8 cannot hold, half of a surrogate pair, becomes a question mark."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def _json(value: Any) -> str:
    """JSON that may stand inside a <script>: ASCII, without the characters that could end it."""
    text = json.dumps(_without_nan(value), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _without_nan(value: Any) -> Any:
    """A browser's JSON has neither NaN nor Infinity."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _facts(pairs: Sequence[tuple[str, Any]]) -> str:
    return "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in pairs)


def _what_was_run(run: Run) -> list[tuple[str, str]]:
    env, config = without_secrets(run.environment), without_secrets(run.config)
    command = env.get("command")
    versions = env.get("versions") if isinstance(env.get("versions"), dict) else {}
    commit = str(env.get("git_commit") or "unknown")
    facts = [
        ("model", config.get("model")),
        ("data", config.get("data")),
        ("command", shlex.join(["python", *map(str, command)]) if isinstance(command, list) else None),
        ("git commit", commit + (" with changes that are not in it" if env.get("git_diff") else "")),
        ("GPU", ", ".join(map(str, env.get("gpus") or [])) or "none"),
        ("versions", ", ".join(f"{k} {v}" for k, v in {"python": env.get("python"), **versions}.items() if v)),
        ("platform", env.get("platform")),
    ]
    return [(k, v) for k, v in facts if v]


def key_numbers(run: Run) -> list[tuple[str, str]]:
    """(what, value) of what a reader asks first; only what was logged."""
    steps = [r for r in run.rows if r["step"] > 0]
    numbers = [("steps", f"{len(steps)} of {run.config['steps']}" if run.config.get("steps") else str(len(steps)))]

    def add(what: str, key: str, show: Callable[[list[float]], str]) -> None:
        values = [v for _, v in run.finite(key)]
        if values:
            numbers.append((what, show(values)))

    def last_quarter(form: str) -> Callable[[list[float]], str]:
        return lambda v: format(statistics.fmean(v[-math.ceil(len(v) / 4) :]), form)

    add("held-out accuracy, first and last", "eval/accuracy", lambda v: f"{v[0]:.3f} → {v[-1]:.3f}")
    add("reward, last quarter of the steps", "reward/mean", last_quarter(".3f"))
    add("|log pi_old - log mu|, last quarter", "mismatch/abs_dlogp_mean", last_quarter(".4f"))
    add("tokens above --tis-cap", "mismatch/capped_share", lambda v: f"{statistics.fmean(v):.2%}")
    add("entropy, last quarter", "train/entropy", last_quarter(".3f"))
    add("response length, last quarter", "response/length_mean", last_quarter(".0f"))
    add("tokens sampled", "response/tokens", lambda v: f"{sum(v):,.0f}")
    add("seconds a step (median)", "time/step", lambda v: f"{statistics.median(v):.2f}")
    add("all steps", "time/step", lambda v: _duration(sum(v)))
    add("sampled tokens a second (median)", "speed/rollout_tokens_per_s", lambda v: f"{statistics.median(v):,.0f}")
    add("GiB of GPU memory at most", "memory/used_peak_gib", lambda v: f"{max(v):.1f}")
    add("updates skipped", "train/skipped_total", lambda v: f"{v[-1]:.0f}")
    add("rewards that failed", "reward/errors", lambda v: f"{v[-1]:.0f}")
    if run.events:
        numbers.append(("events", str(len(run.events))))
    return numbers


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _steps(rows: Sequence[dict[str, Any]]) -> str:
    shown = _thinned(rows, TABLE_ROWS)
    head = "".join(f"<th>{_text(name)}</th>" for name, *_ in TABLE)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell(row, key, form))}</td>" for _, key, form in TABLE) + "</tr>" for row in shown
    )
    note = "" if len(shown) == len(rows) else f"<p class=note>{len(shown)} of {len(rows)} lines, evenly spaced</p>"
    return f"{note}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """A figure of TABLE; empty if it was not logged, "-" if it was not finite."""
    if key not in row:
        return ""
    value = as_number(row[key])
    if not math.isfinite(value):
        return "-"
    if form == "ms":
        return f"{value * 1e3:.0f}"
    return format(int(value) if form == "d" else value, form)


def _events(events: Sequence[dict[str, Any]]) -> str:
    if not events:
        return ""
    rows = []
    for event in events:
        rest = ", ".join(f"{k} {_short(v)}" for k, v in event.items() if k not in ("step", "event", "message"))
        cells = (event["step"], event.get("event", ""), event.get("message", ""), rest)
        rows.append("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in cells) + "</tr>")
    head = "<tr><th>step</th><th>event</th><th>what</th><th>numbers</th></tr>"
    return f"<h2>Events</h2><div class=wide><table class=events>{head}{''.join(rows)}</table></div>"


def _chosen_samples(samples: Sequence[dict[str, Any]]) -> tuple[list[list[Any]], str]:
    """([[step, its samples], ...], what was left out): all of them, or those of evenly spaced steps if they would make
    a page of more than SAMPLE_BYTES."""
    by_step: dict[float, list[dict[str, Any]]] = {}
    for sample in samples:
        by_step.setdefault(sample["step"], []).append(sample)
    steps = sorted(by_step.items())
    size = sum(len(json.dumps(sample)) for sample in samples)
    if size <= SAMPLE_BYTES:
        return [list(s) for s in steps], ""
    chosen = _thinned(steps, max(1, len(steps) * SAMPLE_BYTES // size))
    note = f"samples of {len(chosen)} of {len(steps)} steps, evenly spaced; samples.jsonl has all of them"
    return [list(s) for s in chosen], note


def _thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    last = len(items) - 1
    return [items[round(i * last / max(1, most - 1))] for i in range(most)]


def _cap(config: dict[str, Any]) -> float | None:
    """--tis-cap where the correction has one."""
    if not str(config.get("correction", "token-tis")).endswith("-tis"):
        return None
    cap = as_number(config.get("tis_cap"))
    return cap if math.isfinite(cap) else None


# ---- curves of the page


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 46, 8, 8, 20  # of an SVG, in its units


def _svg(run: Run, panel: Panel) -> str:
    """A panel as <figure>; its numbers are shown under the pointer by the page's script."""
    curves = [(key.partition("/")[2], *run.series(key)) for key in panel.keys_in([run])]
    shown = [v for _, _, values in curves for v in values if math.isfinite(v) and not (panel.log and v <= 0)]
    if not shown:
        return ""
    place, ticks = _axis(min(shown), max(shown), panel.log)
    first, last = run.rows[0]["step"], run.rows[-1]["step"]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * place(value)

    parts = [
        f'<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1="{y(t):.1f}" y2="{y(t):.1f}"></line>'
        f'<text x={LEFT - 5} y="{y(t) + 3:.1f}" class=end>{_text(_tick_text(t))}</text>'
        for t in ticks
    ]
    for step in dict.fromkeys((first, last)):
        anchor = "end" if step == last and last > first else "start"
        parts.append(f'<text x="{x(step):.1f}" y={HEIGHT - 5} class={anchor}>{_text(f"{step:g}")}</text>')
    for event in run.events:
        if first <= event["step"] <= last:
            title = f"step {event['step']}: {event.get('event', '')} {event.get('message', '')}"
            at = f'x1="{x(event["step"]):.1f}" x2="{x(event["step"]):.1f}"'
            parts.append(f"<line class=event {at} y1={TOP} y2={HEIGHT - BOTTOM}><title>{_text(title)}</title></line>")
    for i, (_, steps, values) in enumerate(curves):
        points = [
            (x(s), y(v)) if math.isfinite(v) and not (panel.log and v <= 0) else None
            for s, v in zip(steps, values, strict=True)
        ]
        path, pen_down = [], False
        for point in points:
            if point is not None:
                path.append(f"{'L' if pen_down else 'M'}{point[0]:.1f} {point[1]:.1f}")
            pen_down = point is not None
        parts.append(f'<path class="k{i}" d="{"".join(path)}"></path>')
        if len(points) <= 40:
            parts += [f'<circle class="k{i}" cx="{p[0]:.1f}" cy="{p[1]:.1f}" r=2></circle>' for p in points if p]
    names = "".join(f'<span class="k{i}">{_text(name)}</span>' for i, (name, *_) in enumerate(curves) if curves[1:])
    scale = f'data-first="{first}" data-last="{last}" data-left={LEFT} data-right={WIDTH - RIGHT}'
    return (
        f"<figure><figcaption>{_text(panel.title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{_text(panel.title)}" {scale}>{"".join(parts)}'
        f"<line class=pointer y1={TOP} y2={HEIGHT - BOTTOM}></line></svg>"
        f"<div class=legend>{names}</div><output></output></figure>"
    )


def _axis(low: float, high: float, log: bool) -> tuple[Callable[[float], float], list[float]]:
    """(value -> 0 at the bottom to 1 at the top, where the ticks are)."""
    if log:
        bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
        top += top == bottom
        every = -(-(top - bottom) // 5)
        ticks = [10.0**e for e in range(bottom, top + 1, every)]
        return lambda value: (math.log10(value) - bottom) / (top - bottom), ticks
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    bottom, top = math.floor(low / width + 1e-9) * width, math.ceil(high / width - 1e-9) * width
    ticks = [bottom + i * width for i in range(round((top - bottom) / width) + 1)]
    return lambda value: (value - bottom) / (top - bottom), ticks


def _tick_text(value: float) -> str:
    return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:.6g}"


# ---- for a run that ends


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """However the run ends, its page and curves are written; a second Ctrl-C ends at once."""
    try:
        yield
    except Exception:
        write_report(folder)
        raise
    write_report(folder)


def write_report(folder: Path) -> None:
    """report.html and curves.png into a run folder that has metrics. What fails is one printed line: the run stays."""
    if not (folder / "metrics.jsonl").is_file():
        return
    read = functools.cache(lambda: read_run(folder))
    writers = {
        "report.html": lambda out: write_page(read(), out),
        "curves.png": lambda out: draw([read()], out),
    }
    for name, write in writers.items():
        try:
            write(folder / name)
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            later = f"python scripts/plot_run.py {shlex.quote(str(folder))}"
            print(f"{folder / name} was not written ({why}); later: {later}", flush=True)
        else:
            print(f"{name.partition('.')[0]} {folder / name}", flush=True)
