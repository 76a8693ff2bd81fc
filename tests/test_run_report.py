"""run_curves.py, run_report.py, scripts/plot_run.py: what is broken is said, seeds are one line, and a browser opens
the page from disk, with any text in it, without asking a network for anything."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import run_report
from run_curves import ReportError, draw, lines_of, read_lines, read_run
from run_report import key_numbers, reported, write_page, write_report

ROOT = Path(run_report.__file__).resolve().parent
PNG = b"\x89PNG"
CONFIG = {"model": "a/model", "tis_cap": 2.0, "correction": "token-tis", "lr": 1e-6, "steps": 5, "clip_high": "inf"}
ENV = {
    "command": ["train.py", "--model", "a/model"],
    "git_commit": "0123abcd",
    "git_diff": "",
    "gpus": [],
    "versions": {"torch": "2.13.0", "vllm": None},
}
ODD_TEXTS = [
    "<b>bold</b> & </script><script>document.title = 'taken'</script><!-- ",
    "U+2028 \u2028 inside, and \u2029",
    "emoji 🦜 and 👩‍👩‍👧, 中文",
    "right to left \u202e is written out, \x00 and \x1b[0m too",
    "half a pair \ud83d",
    "lines\n\nand\ttabs, @@TITLE@@, \\u003c, \"'`${1}",
]


def metrics(steps: int = 5, seed: int = 0, **changed) -> list[dict]:
    """Step 0 is an evaluation, as in metrics.jsonl; `changed` overwrites keys of every later line."""
    rows = [{"step": 0, "eval/accuracy": 0.25}]
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "reward/mean": 0.5 + 0.1 * seed,
            "mismatch/abs_dlogp_mean": 0.03,
            "train/entropy": 0.4,
            "response/length_mean": 100.0 + step,
            "response/tokens": 1000,
            "train/grad_norm": 0.2,
            "time/step": 2.0,
            "time/rollout": 1.2,
            "time/train": 0.7,
            "time/sync": 0.002,
        }
        rows.append(row | changed)
    rows[-1]["eval/accuracy"] = 0.75
    return rows


def sample(text: str, step: int = 1, **changed) -> dict:
    """A line of samples.jsonl with a token for each word; the second token has pi/mu 1.5, the last one 3."""
    words = re.findall(r"\s*\S+", text)
    mu = [-1.0] * len(words)
    pi = [-1.0, -1.0 + math.log(1.5), *[-1.0] * (len(words) - 3), -1.0 + math.log(3.0)][: len(words)]
    return {
        "step": step,
        "version": step - 1,
        "id": f"made:{step}",
        "prompt": [{"role": "user", "content": text}],
        "answer": text,
        "text": text,
        "reward": 1.0,
        "tokens": len(words),
        "finish_reason": "stop",
        "token_texts": words,
        "rollout_logprobs": mu,
        "logprobs": pi,
    } | changed


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, rows, samples=..., events=..., config flags) -> its folder."""

    def make(name="a", rows=None, samples=(), events=(), env=ENV, **flags):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        config = CONFIG | {"seed": 0, "run_name": name, "runs_dir": "runs"} | flags
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "env.json").write_text(json.dumps(env))
        for file, lines in (("metrics", metrics() if rows is None else rows), ("samples", samples), ("events", events)):
            if lines:
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (folder / f"{file}.jsonl").write_text(text)
        return folder

    return make


def page_of(folder: Path) -> str:
    out = folder / "report.html"
    write_page(read_run(folder), out)
    return out.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """What a browser makes of the page: its elements, their attributes, text outside of scripts, the data."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.scripts = [], [], [], []
        self._inside = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        (self.scripts if self._inside == "script" else self.text).append(data)

    @property
    def data(self) -> dict:
        def refuse(constant):
            raise AssertionError(f"{constant} is no JSON of a browser")

        return json.loads(self.scripts[0], parse_constant=refuse)


def plot_run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "plot_run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# ---- the page


@pytest.mark.parametrize("text", ODD_TEXTS, ids=lambda t: ascii(t[:12]))
def test_any_text_is_text_wherever_it_comes_from(make_run, text):
    samples = [sample(text), sample(text, 2)]
    events = [{"step": 2, "event": text, "message": text, "numbers": text}]
    env = ENV | {"command": ["train.py", text], "git_commit": text, "platform": text}
    folder = make_run(samples=samples, events=events, env=env, model=text, reward=text)
    plain = Reader(page_of(make_run("plain", samples=[sample("a")] * 2, events=[{"step": 2}])))
    reader = Reader(page_of(folder))
    assert reader.data["samples"] == [[1, samples[:1]], [2, samples[1:]]], "as it was"
    shown = "".join(reader.text)
    assert text.replace("\ud83d", "?") in shown and text not in reader.scripts[1]
    extra = [tag for tag in set(reader.tags) if reader.tags.count(tag) > plain.tags.count(tag)]
    assert set(extra) <= {"dt", "dd"}, "no element but the two facts that the other run lacks"


def test_the_page_refers_to_nothing_outside_of_it(make_run):
    page = page_of(make_run(samples=[sample("one two three four")], events=[{"step": 1, "event": "x"}]))
    reader = Reader(page)
    assert "default-src 'none'" in page, "the browser is told to ask for nothing"
    assert not {"link", "img", "iframe", "a", "image", "use"} & set(reader.tags)
    assert not {"src", "href", "srcset", "data-src"} & {name for name, _ in reader.attributes}
    assert "http" not in page.replace("http-equiv", "") and "url(" not in page and "import" not in page


def test_the_page_says_what_was_run_and_what_came_of_it(make_run):
    env = ENV | {"git_diff": "+x"}
    folder = make_run(events=[{"step": 3, "event": "mismatch", "message": "too high", "value": 0.25}], env=env)
    shown = "".join(Reader(page_of(folder)).text)
    for word in ("a/model", "python train.py --model a/model", "0123abcd with changes", "torch 2.13.0", "mismatch",
                 "too high", "value 0.25", "5 of 5", "0.250 → 0.750", "10 s"):  # fmt: skip
        assert word in shown, word
    assert "vllm" not in shown, "a package that was not there"
    numbers = dict(key_numbers(read_run(folder)))
    assert numbers["tokens sampled"] == "5,000" and numbers["seconds a step (median)"] == "2.00"


def test_a_page_without_samples_events_config_or_environment(make_run):
    folder = make_run()
    for name in ("config.json", "env.json"):
        (folder / name).unlink()
    reader = Reader(page_of(folder))
    assert reader.data["samples"] == [] and "Events" not in "".join(reader.text)
    assert "config.json could not be read" in "".join(reader.text)


def test_values_that_are_not_finite_leave_a_gap_and_break_nothing(make_run, tmp_path):
    rows = metrics()
    rows[3]["train/grad_norm"] = None
    rows[4]["train/grad_norm"] = math.nan
    rows[2]["reward/mean"] = math.inf
    rows[2]["time/sync"] = 0.0  # on a logarithmic scale
    rows[1]["train/entropy"] = 10**400
    broken = sample("one two three four", rollout_logprobs=[None, math.nan, -1.0, -1.0])
    folder = make_run(rows=rows, samples=[broken])
    run = read_run(folder)
    page = page_of(folder)
    assert [math.isnan(v) for v in run.series("train/grad_norm")[1]] == [False, False, True, True, False]
    figure = page[page.index("<figcaption>gradient norm") :].partition("</figure>")[0]
    assert re.search(r'<path class="k0" d="M[^M]+M[^M]+"', figure), "two pieces"
    assert figure.count("<circle") == 3
    assert "<td>-</td>" in page
    data = Reader(page).data
    assert data["samples"][0][1][0]["rollout_logprobs"] == [None, None, -1.0, -1.0]
    draw([run], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("rows", [[{"step": 0, "eval/accuracy": 0.5}], metrics(1), [{"step": 3, "reward/mean": 0}]])
def test_a_run_of_one_line_can_be_shown(make_run, tmp_path, rows):
    folder = make_run(rows=rows)
    assert "<svg" in page_of(folder)
    draw([read_run(folder)], tmp_path / "c.png")


def test_every_curve_has_its_figure(make_run):
    """The script finds a figure's numbers by its place."""
    rows = metrics(**{"time/step": 0.0, "time/rollout": 0.0, "time/train": 0.0, "time/sync": 0.0})
    rows[-1] |= {"memory/used_peak_gib": 3.0}
    reader = Reader(page_of(make_run(rows=rows)))
    assert reader.tags.count("figure") == len(reader.data["curves"]) == 7
    assert [names[0][0] for names in reader.data["curves"]][-1] == "used_peak_gib"


def test_memory_of_the_host_and_of_a_gpu_and_the_floor_of_the_mismatch_are_drawn(make_run):
    """A run on a CPU has the host's alone; of a GPU the growth of each step's own reading is seen beside the peaks."""
    host = {"memory/host_gib": 1.0}
    gpu = host | {"memory/device_gib": 2.0, "memory/torch_reserved_gib": 1.0, "memory/used_peak_gib": 3.0}
    drawn = {}
    for name, keys in (("cpu", host), ("gpu", gpu)):
        rows = metrics(**keys)
        rows[1]["mismatch/bf16_floor"] = 0.007
        page = page_of(make_run(name, rows))
        drawn[name] = [[key for key, _ in figure] for figure in Reader(page).data["curves"]]
        assert "0.0070" in page, "the table has it"
    assert drawn["cpu"][-1] == drawn["gpu"][-1] == ["host_gib"] and len(drawn["gpu"]) == len(drawn["cpu"]) + 1
    assert drawn["gpu"][-2] == ["device_gib", "torch_reserved_gib", "used_peak_gib"]
    assert ["abs_dlogp_mean", "bf16_floor"] in drawn["cpu"]


def test_many_samples_are_thinned_and_the_page_says_so(make_run, monkeypatch):
    samples = [sample("one two three", step) for step in range(1, 101)]
    monkeypatch.setattr(run_report, "SAMPLE_BYTES", sum(len(json.dumps(s)) for s in samples) // 10)
    reader = Reader(page_of(make_run(samples=samples)))
    steps = [step for step, _ in reader.data["samples"]]
    assert 8 <= len(steps) <= 10 and steps[0] == 1 and steps[-1] == 100
    assert f"samples of {len(steps)} of 100 steps" in "".join(reader.text)


def test_the_table_of_a_long_run_is_thinned(make_run):
    shown = "".join(Reader(page_of(make_run(rows=metrics(2500)))).text)
    assert "1000 of 2501 lines" in shown


def test_a_secret_in_the_command_is_not_on_the_page(make_run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "marker-of-hf-token")
    env = ENV | {"command": ["train.py", "--model=https://me:word@host/m", "--data=marker-of-hf-token"]}
    page = page_of(make_run(env=env, data="marker-of-hf-token", model="https://me:word@host/m"))
    assert "marker-of-hf-token" not in page and "me:word" not in page and "https://***@host/m" in page


# ---- reading


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (b'{"step": 6, "reward/me', "line 7 is half-written"),
        ('{"step": 6, "text": "é'.encode()[:-1], "line 7 is half-written"),
        (b"6", "line 7 is half-written"),
        (b'{"reward/mean": 1.0}\n', "line 7 is no JSON object with a step"),
        (b'{"step": null}\n', "line 7 is no JSON object with a step"),
        (b"\x00" * 40, "line 7 is half-written"),
    ],
    ids=repr,
)
def test_a_broken_last_line_is_said_and_the_others_are_used(make_run, end, said):
    folder = make_run()
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(end)
    run = read_run(folder)
    assert len(run.rows) == 6 and len(run.notes) == 1 and said in run.notes[0] and "metrics.jsonl" in run.notes[0]
    assert said in "".join(Reader(page_of(folder)).text)


def test_samples_with_a_line_separator_are_one_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"step": 1, "text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_lines(path) == ([{"step": 1, "text": "a\u2028b\x85c"}], [])


def test_a_step_that_was_made_again_counts_once(make_run):
    """A resumed run may write a step's line a second time."""
    run = read_run(make_run(rows=[*metrics(), *metrics()[3:]]))
    assert [row["step"] for row in run.rows] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("content", [None, "", "\n", '{"step'])
def test_without_a_step_there_is_one_line_that_names_the_file(make_run, content):
    folder = make_run()
    (folder / "metrics.jsonl").unlink()
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(ReportError, match=r"metrics\.jsonl") as error:
        read_run(folder)
    assert len(str(error.value).splitlines()) == 1


# ---- several runs


def test_runs_that_differ_by_seed_are_one_line(make_run):
    runs = [
        read_run(make_run(f"{cap}-{s}", metrics(seed=s), seed=s, tis_cap=cap)) for cap in (2.0, 1.0) for s in (0, 2)
    ]
    lines = lines_of(runs)
    assert [line.label for line in lines] == ["tis_cap 2.0 (2 runs)", "tis_cap 1.0 (2 runs)"]
    steps, mean, low, high = lines[0].band("reward/mean")
    assert steps == [1, 2, 3, 4, 5]
    assert (mean[0], low[0], high[0]) == pytest.approx((0.6, 0.5, 0.7))


def test_a_band_is_over_the_runs_that_have_the_step(make_run):
    short = metrics(2, seed=1)
    short[1]["reward/mean"] = None
    line = lines_of([read_run(make_run("a")), read_run(make_run("b", short, seed=1))])[0]
    steps, mean, low, high = line.band("reward/mean")
    assert steps == [1, 2, 3, 4, 5] and mean == pytest.approx([0.5, 0.55, 0.5, 0.5, 0.5])
    assert low == pytest.approx([0.5] * 5) and high[1] == pytest.approx(0.6)


def test_runs_without_a_config_and_runs_that_differ_in_much_have_their_own_names(make_run):
    folders = [make_run("x"), make_run("y", lr=1.0, model="b", data="c", steps=9), make_run("z")]
    (folders[2] / "config.json").unlink()
    assert [line.label for line in lines_of([read_run(f) for f in folders])] == ["x", "y", "z"]


# ---- scripts/plot_run.py


def test_plot_run_draws_one_run_and_prints_its_table(make_run):
    folder = make_run("_a $b$ c", samples=[sample("one two three")])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')
    done = plot_run(folder, "--table")
    assert done.returncode == 0, done.stderr
    assert "held-out accuracy: 0.250 at step 0 -> 0.750 at step 5" in done.stdout
    assert sum(line.startswith("| ") for line in done.stdout.splitlines()) == 1 + 6
    assert done.stderr.startswith("note: ") and "line 7 is half-written" in done.stderr
    assert (folder / "curves.png").read_bytes().startswith(PNG) and (folder / "report.html").is_file()


def test_plot_run_overlays_several(make_run, tmp_path):
    folders = [make_run(f"{cap}-{s}", metrics(seed=s), seed=s, tis_cap=cap) for cap in (2.0, 1.0) for s in (0, 1)]
    (folders[1] / "metrics.jsonl").write_text((folders[1] / "metrics.jsonl").read_text()[:-20])
    done = plot_run(*folders, folders[0])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "curves.png").read_bytes().startswith(PNG)
    assert all((f / "report.html").is_file() and not (f / "curves.png").exists() for f in folders)
    everything = sorted((tmp_path / "runs").iterdir())
    assert len(everything) == 5, "the drawing is among the folders"
    assert plot_run(*everything, "--out", tmp_path / "other.png").returncode == 0
    assert (tmp_path / "other.png").is_file()


@pytest.mark.parametrize("what", ["missing", "empty", "broken", "not a folder"])
def test_plot_run_ends_with_one_line_when_there_is_nothing_to_show(make_run, what):
    folder = make_run()
    path = folder / "metrics.jsonl"
    if what == "missing":
        path.unlink()
    else:
        path.write_text({"empty": "", "broken": "{", "not a folder": "{}"}[what])
    done = plot_run(path if what == "not a folder" else folder)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: .*metrics\.jsonl.*\n", done.stderr)


# ---- at the end of a run


def test_a_report_that_cannot_be_drawn_is_one_line_and_the_page_is_there(make_run, monkeypatch, capsys):
    folder = make_run("with space")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(folder)
    page, curves = capsys.readouterr().out.splitlines()
    assert page == f"report {folder / 'report.html'}" and (folder / "report.html").is_file()
    assert curves.startswith(f"{folder / 'curves.png'} was not written (") and "matplotlib" in curves
    assert curves.endswith(f"later: python scripts/plot_run.py {shlex.quote(str(folder))}")


def test_a_run_without_a_step_has_no_report_and_says_nothing(make_run, capsys):
    folder = make_run()
    (folder / "metrics.jsonl").unlink()
    write_report(folder)
    assert capsys.readouterr().out == "" and not (folder / "report.html").exists()


@pytest.mark.parametrize(("error", "written"), [(None, True), (RuntimeError, True), (KeyboardInterrupt, False)])
def test_a_run_is_reported_however_it_ends_but_for_a_second_ctrl_c(make_run, monkeypatch, error, written):
    folder = make_run()
    monkeypatch.setattr(run_report, "draw", lambda runs, out: out.write_bytes(PNG))
    try:
        with reported(folder):
            if error is not None:
                raise error("as it was")
    except (RuntimeError, KeyboardInterrupt) as raised:
        assert type(raised) is error and str(raised) == "as it was"
    assert (folder / "report.html").exists() == (folder / "curves.png").exists() == written


def test_matplotlib_is_imported_only_to_draw():
    script = "import sys, train, run_report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120).returncode == 0


# ---- in a browser


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def browse(tmp_path):
    """browse(page, flags) -> (the document after its script ran, what it wrote to the console); no network."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(BROWSERS)}")

    def run(page: Path, *flags: str) -> tuple[str, list[str]]:
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr", "--v=0", "--window-size=1100,2400", *flags, page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, timeout=90)
        document, log = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
        assert done.returncode == 0, log[-2000:]
        return document, [line for line in log.splitlines() if ":CONSOLE" in line]

    return run


class Document(HTMLParser):
    """The tokens of a document: (text, attributes) of every <span class=token> of a response."""

    def __init__(self, document: str):
        super().__init__()
        self.tokens, self.stack, self.titles = [], [], []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        if tag in ("meta", "input", "br", "link"):
            return
        attributes = dict(attrs)
        self.stack.append((tag, attributes.get("class") or ""))
        if tag == "span" and "token" in attributes.get("class", "").split() and ("div", "tokens") in self.stack:
            self.tokens.append(["", attributes])

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if any(tag == "title" for tag, _ in self.stack):
            self.titles.append(data)
        if any(c.split()[:1] == ["token"] for _, c in self.stack) and ("div", "tokens") in self.stack:
            self.tokens[-1][0] += data


def test_a_browser_shows_the_samples_with_colours_and_asks_for_nothing(make_run, browse, tmp_path):
    folder = make_run(
        samples=[sample("another step's text is not shown"), *(sample(text, 2) for text in ODD_TEXTS)],
        events=[{"step": 2, "event": "mismatch", "message": "<i>high</i>"}],
    )
    page_of(folder)
    document, console = browse(folder / "report.html", "--dump-dom")
    assert console == [], "an error of the script, or a request that its policy stopped"
    shown = Document(document)
    assert shown.titles[0] == "a", "no script of a sample has run"
    words = [w for text in ODD_TEXTS for w in re.findall(r"\s*\S+", text)]
    assert len(shown.tokens) == len(words)
    texts = "".join(text for text, _ in shown.tokens)
    for word in ("<b>bold</b>", "</script><script>document.title", "⟨U+2028⟩", "🦜", "👩‍👩‍👧", "⟨U+202E⟩", "⟨U+0000⟩",
                 "⟨U+001B⟩[0m", "⟨U+D83D⟩", "↵", "@@TITLE@@", "another"):  # fmt: skip
        assert (word in texts) == (word != "another"), word
    first = shown.tokens[: len(re.findall(r"\s*\S+", ODD_TEXTS[0]))]
    assert "pi/mu 1.500" in first[1][1]["title"] and "log mu -1.0000, log pi -0.5945" in first[1][1]["title"]
    assert all(re.search(r"background-color: rgba\(", attributes["style"]) for _, attributes in shown.tokens)
    assert len({attributes["style"] for _, attributes in first}) == 3, "ratios 1, 1.5 and 3"
    assert [("cut" in attributes["class"]) for _, attributes in first] == [False] * (len(first) - 1) + [True]
    assert 'id="browse"' in document and "step 2 (6 samples)" in document
    browse(folder / "report.html", f"--screenshot={tmp_path / 'page.png'}")
    assert (tmp_path / "page.png").read_bytes().startswith(PNG)


def test_a_browser_shows_samples_without_log_probs_and_other_oddities(make_run, browse):
    old = {k: v for k, v in sample("plain <i>text</i>").items() if not k.endswith(("_texts", "logprobs"))}
    half = sample("one two three", logprobs=[], prompt="no messages")
    strange = {"step": 1, "prompt": [None, {"role": "user", "content": [{"type": "text"}]}], "logprobs": "none"}
    parts = sample(
        "x", token_texts=["", "", "🦜", "\n\n"], rollout_logprobs=[-1.0] * 4, logprobs=[-1.0, None, -1.0, -90.0]
    )
    folder = make_run(samples=[old, half, strange, parts])
    page_of(folder)
    document, console = browse(folder / "report.html", "--dump-dom")
    assert console == []
    assert "plain &lt;i&gt;text&lt;/i&gt;" in document
    tokens = Document(document).tokens
    assert [text for text, _ in tokens] == ["one", " two", " three", "·", "·", "🦜", "↵\n↵\n"]
    assert ["style" in attributes for _, attributes in tokens] == [False] * 3 + [True, False, True, True]
    assert "log pi none" in tokens[0][1]["title"] and "pi/mu" not in tokens[0][1]["title"]


def test_a_browser_shows_a_run_without_samples(make_run, browse):
    folder = make_run()
    page_of(folder)
    document, console = browse(folder / "report.html", "--dump-dom")
    assert console == [] and "none were logged" in document
