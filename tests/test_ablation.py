"""scripts/ablation.py and scripts/ablations/: statistics by hand, resuming, failures, the table, plans of the scripts.

Most runs are those of a train.py that only writes what it is told to; one whole ablation is real.
"""

import dataclasses

import runtime  # noqa: F401

# isort: split
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config import TINY_MODEL, Args

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import ablation  # noqa: E402
import ablation_report as shown  # noqa: E402
from ablation import AblationError  # noqa: E402
from ablation_report import Comparison, Results, Variant  # noqa: E402

NAMES = ["correction", "dapo_parts", "quant_format", "reduction", "tis_cap"]
needs_tiny_model = pytest.mark.skipif(
    not Path(TINY_MODEL, "model.safetensors").exists(), reason="assets/tiny-adder is not there"
)
needs_engine = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

# plan.json: {run name: last held-out accuracy, or an error to end with, or "sleep", "stop" (status 0, a step too few)}
FAKE_TRAIN = """
import json, os, pathlib, sys, time
here = pathlib.Path(__file__).parent
flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
name = flags["--run-name"]
told = json.loads((here / "plan.json").read_text())[name]
with open(here / "calls", "a") as calls:
    calls.write(name + "\\n")
config = json.loads((here / "config.json").read_text())
for flag, value in flags.items():
    key = flag[2:].replace("-", "_")
    try:
        config[key] = None if value == "None" else json.loads(value)
    except ValueError:
        config[key] = value
run = pathlib.Path(flags["--runs-dir"]) / name
(run / "checkpoints").mkdir(parents=True)
(run / "config.json").write_text(json.dumps(config))
(run / "env.json").write_text(json.dumps({"git_commit": "abc", "gpus": []}))
with open(run / "metrics.jsonl", "w") as metrics:
    def log(**line):
        metrics.write(json.dumps({k.replace("__", "/"): v for k, v in line.items()}) + "\\n")
        metrics.flush()
    log(step=0, eval__accuracy=0.5)
    for step in range(1, config["steps"]):
        log(step=step, reward__mean=0.1, time__step=1.0)
    print("working as", os.getpid(), flush=True)
    if told == "sleep":
        time.sleep(600)
    if told == "stop":
        sys.exit()
    if isinstance(told, str):
        sys.exit(told)
    log(step=config["steps"], eval__accuracy=told, reward__mean=0.4, time__step=3.0, time__eval=1.0,
        mismatch__abs_dlogp_mean=0.03, mismatch__ess=0.99, train__entropy=0.2)
"""
VARIANTS = ["--variant", "none: --tis-cap None", "--variant", "two: --tis-cap 2", "--seeds", "0", "1", "2"]
GOOD = {
    "none-seed0": 0.50, "none-seed1": 0.60, "none-seed2": 0.60, "two-seed0": 0.60, "two-seed1": 0.70, "two-seed2": 0.80
}  # fmt: skip


class Fake:
    """An ablation of a train.py that does as plan.json says."""

    def __init__(self, folder: Path):
        self.folder, self.here = folder / "ablation", folder
        (folder / "fake.py").write_text(FAKE_TRAIN)
        config = dataclasses.asdict(Args().resolved())
        # As train.py does, with what the machine decided.
        (folder / "config.json").write_text(json.dumps(config | {"micro_batch_tokens": 4096, "compile": False}))

    def arguments(self, *more: str, common: tuple[str, ...] = ("--steps", "4")) -> list[str]:
        place = ["--folder", str(self.folder), "--train", str(self.here / "fake.py")]
        return ["caps", *VARIANTS, *place, *more, "--", *common]

    def plan(self, **changes: object) -> None:
        told = GOOD | {k.replace("_", "-"): v for k, v in changes.items()}
        (self.here / "plan.json").write_text(json.dumps(told))

    def run(self, *more: str, common: tuple[str, ...] = ("--steps", "4")) -> int:
        (self.here / "calls").write_text("")
        return ablation.main(self.arguments(*more, common=common))

    @property
    def calls(self) -> list[str]:
        return (self.here / "calls").read_text().split()

    @property
    def table(self) -> str:
        return (self.folder / "table.md").read_text()

    def row(self, variant: str) -> list[str]:
        (line,) = [line for line in self.table.splitlines() if line.startswith(f"| {variant} |")]
        return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def fake(tmp_path):
    fake = Fake(tmp_path)
    fake.plan()
    return fake


# ---- statistics, by hand


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [
        (1.0, 1, 0.75),  # 1/2 + atan(t) / pi
        (math.sqrt(2), 2, 0.5 + math.sqrt(2) / 4),  # 1/2 + t / (2 sqrt(2 + t^2))
        (math.sqrt(3), 3, 0.75 + 0.5 / math.pi),  # theta = pi/4: 1/2 + (theta + sin cos) / pi
        (2.0, 4, 0.5 + 0.625 * math.sqrt(0.5)),  # 1/2 + sin (1 + cos^2 / 2) / 2
        (0.0, 7, 0.5),
    ],
)
def test_students_t(t, degrees, p):
    assert shown.t_cdf(t, degrees) == pytest.approx(p, abs=1e-12)
    assert shown.t_cdf(-t, degrees) == pytest.approx(1 - p, abs=1e-12)


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_quantiles_are_those_of_the_printed_tables(degrees, t):
    assert shown.t_quantile(0.975, degrees) == pytest.approx(t, abs=5e-4)


def test_compare_pairs_the_seeds():
    c = shown.compare("b", "a", {0: 0.6, 1: 0.7, 2: 0.8, 3: 0.1}, {2: 0.6, 1: 0.6, 0: 0.5, 4: 0.9})
    assert c.pairs == 3 and c.mean == pytest.approx(0.4 / 3)
    assert c.error == pytest.approx(1 / 30)  # s = 1 / sqrt(300)
    assert c.better == pytest.approx(0.5 + 4 / (2 * math.sqrt(18)))  # t = 4, two degrees of freedom
    assert c.shows == pytest.approx(4.30265 / 30, rel=1e-4)


def test_compare_without_enough_to_judge_by():
    assert shown.compare("b", "a", {0: 0.5}, {1: 0.5}) == Comparison("b", "a", 0)
    one = shown.compare("b", "a", {0: 0.75}, {0: 0.5})
    assert (one.pairs, one.mean, one.error, one.better) == (1, 0.25, None, None)
    same = shown.compare("b", "a", {0: 0.6, 1: 0.7}, {0: 0.5, 1: 0.6})  # 0.1 both times, but for rounding
    assert same.pairs == 2 and same.mean == pytest.approx(0.1) and same.better is None


def test_verdict_of_three_seeds_says_how_little_they_tell():
    text = shown.verdict([shown.compare("b", "a", {0: 0.6, 1: 0.7, 2: 0.8}, {0: 0.5, 1: 0.6, 2: 0.6})])
    assert text.startswith("verdict: nothing is told apart. The clearest of 1 comparisons: b minus a = +0.133 ± 0.033")
    assert "P(better) 0.971, P(worse) 0.029" in text and "in up to 5.7% of" in text  # 2 * 0.0286
    assert "A difference below 0.143 would not show in it; 3 seeds tell little." in text and "\n" not in text


def test_verdict_counts_the_comparisons():
    gaps = [0.1, 0.1, 0.1, 0.1, 0.2]  # mean 0.12, error 0.02, t = 6 with 4 degrees: P = 0.998059
    zero = dict.fromkeys(range(5), 0.5)
    clear = shown.compare("good", "base", {i: 0.5 + g for i, g in enumerate(gaps)}, zero)
    assert clear.better == pytest.approx(0.998059, abs=1e-6)
    noise = [Comparison(f"n{i}", "base", 5, 0.001, 0.02, 0.52) for i in range(30)]
    assert shown.verdict([clear]).startswith("verdict: good is better than base.")
    assert "in up to 0.8% of" in shown.verdict([noise[0], clear])  # 2 * 2 * 0.00194
    lost = shown.verdict([clear, *noise])
    assert lost.startswith("verdict: nothing is told apart.") and "31 comparisons" in lost and "12.0% of" in lost
    bad = shown.compare("bad", "base", {i: 0.5 - g for i, g in enumerate(gaps)}, zero)
    assert shown.verdict([bad, noise[0]]).startswith(
        "verdict: bad is worse than base. The clearest of 2 comparisons: bad"
    )


def test_verdict_without_odds_names_no_winner():
    text = shown.verdict([Comparison("b", "a", 1, 0.3), Comparison("c", "a", 3, 0.0, 0.0), Comparison("d", "a", 0)])
    assert text == (
        "verdict: none can be given. No odds: b and a have 1 finished seed in common, and odds need two; c and a end "
        "with the same accuracy in all 3 seeds; d and a have 0 finished seeds in common, and odds need two."
    )
    also = shown.verdict([Comparison("b", "a", 2, 0.1, 0.1, 0.75), Comparison("c", "a", 2, 0.1, 0.0)])
    assert also.endswith("No odds: c and a differ by the same +0.100 in all 2 seeds.")


def test_mean_and_deviation_of_cells():
    assert shown.mean_std([0.5, 0.6, 0.7], ".3f") == "0.600 ± 0.100"
    assert shown.mean_std([0.5], ".3f") == "0.500"
    assert shown.mean_std([None, None], ".3f") == "-"
    assert shown.mean_std([0.5, math.nan], ".3f") == "nan ± nan"


# ---- figures of a run


def test_figures_of_a_run():
    lines = [{"step": 0, "eval/accuracy": 0.5}]
    for step in range(1, 9):
        lines.append({"step": step, "time/step": float(step), "reward/mean": step / 10, "mismatch/ess": 0.9})
    lines[4] |= {"eval/accuracy": 0.75, "time/eval": 3.5}
    lines[8] |= {"eval/accuracy": 0.625, "time/eval": 7.5, "train/entropy": 0.3, "mismatch/ess": None}
    found = shown.figures_of(lines)
    assert found["held-out before"] == 0.5 and found["held-out last"] == 0.625 and found["held-out best"] == 0.75
    assert found["reward"] == pytest.approx(0.75)  # steps 7 and 8
    assert found["s a step"] == 3.0  # median of 2, 3, 0.5, 5, 6, 7, 0.5
    assert found["entropy"] == 0.3, "only where it was logged"
    assert math.isnan(found["ESS"]), "null was a value that is not finite"
    assert found["abs dlogp"] is None


def test_curves_are_the_mean_of_what_was_finite():
    a = [{"step": 0}, {"step": 1, "x": 0.2}, {"step": 2, "x": None}]
    b = [{"step": 1, "x": 0.4}, {"step": 2, "x": 0.5}, {"step": 3, "x": 0.6}]
    steps, means, stds = shown.curve([a, b], "x")
    assert steps == [1, 2, 3] and means == pytest.approx([0.3, 0.5, 0.6])
    assert stds == pytest.approx([math.sqrt(0.02), 0.0, 0.0])


def test_notes_tell_of_other_code_and_skipped_updates():
    results = Results()
    for seed, commit in ((0, "abc"), (1, "abd")):
        results.lines["a", seed] = [{"step": 4, "eval/accuracy": 0.5, "train/skipped_total": 2 * seed}]
        results.environments["a", seed] = {"git_commit": commit, "gpus": []}
    first, second = shown.notes(results)
    assert first == "a-seed1: 2 updates were skipped, since their gradient was not finite"
    assert second == "the finished runs do not all have the same code (env.json)"


# ---- what is asked for


def test_variants_and_what_they_are_compared_with():
    first, second, third = ablation.parse_variants(["a:", 'b: --data "my file" --no-x', "b+tis vs b: --tis-cap 2"])
    assert first == Variant("a", [], None)
    assert second == Variant("b", ["--data", "my file", "--no-x"], "a")
    assert third.baseline == "b"
    for texts, message in [
        (["--tis-cap 2"], "is not"),
        (["a/b: --x"], "is not"),
        (["a:", "a:"], "twice"),
        (["a vs b:", "b:"], "no variant b"),
    ]:
        with pytest.raises(AblationError, match=message):
            ablation.parse_variants(texts)


@pytest.mark.parametrize(
    ("common", "message"),
    [
        (("--tis_cap=3",), "--tis-cap is what this ablation varies"),
        (("--seed", "3"), "--seed is set by the ablation"),
        (("--runs-dir", "x"), "--runs-dir is set by the ablation"),
        (("--eval-every", "0"), "held-out accuracy"),
    ],
)
def test_common_flags_that_cannot_be(fake, common, message):
    with pytest.raises(AblationError, match=message):
        fake.run(common=common)
    assert fake.calls == [] and not fake.folder.exists()


def test_variants_that_are_the_same(fake):
    same = ["x", "--variant", "none: --tis-cap None", "--variant", "off: --tis-cap None", "--folder", str(fake.folder)]
    with pytest.raises(AblationError, match="none and off have the same flags"):
        ablation.main(same)
    with pytest.raises(AblationError, match="each once"):
        fake.run("--seeds", "1", "1")


def test_an_unknown_flag_ends_it_before_anything_is_run(fake, capsys):
    with pytest.raises(SystemExit):
        fake.run(common=("--tis-kap", "3"))
    assert "--tis-kap" in capsys.readouterr().err and not fake.folder.exists()


# ---- running


def test_all_goes_well(fake, capsys):
    assert fake.run() == 0
    assert fake.calls == [f"{v}-seed{s}" for s in (0, 1, 2) for v in ("none", "two")], "seed by seed"
    assert fake.row("none") == [
        "none", "0.500 ± 0.000", "0.567 ± 0.058", "0.567 ± 0.058", "0.400 ± 0.000", "0.0300 ± 0.0000",
        "0.9900 ± 0.0000", "0.200 ± 0.000", "1.00 ± 0.00", "3 of 3", "", "", "",
    ]  # fmt: skip
    assert fake.row("two")[1:3] == ["0.500 ± 0.000", "0.700 ± 0.100"]
    assert fake.row("two")[-4:] == ["3 of 3", "none", "+0.133 ± 0.033", "0.971"]
    assert sum(line.startswith("verdict: ") for line in fake.table.splitlines()) == 1
    assert "- all: `--steps 4`" in fake.table and "- two: `--tis-cap 2`" in fake.table
    assert fake.table in capsys.readouterr().out
    assert (fake.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    run = fake.folder / "runs" / "two-seed1"
    assert not (run / "checkpoints").exists() and json.loads((run / "finished.json").read_text())["seconds"] > 0


def test_a_finished_ablation_runs_nothing_again(fake):
    fake.run()
    table = fake.table
    (fake.folder / "table.md").unlink()
    assert fake.run() == 0 and fake.calls == [] and fake.table == table


def test_more_seeds_run_only_those(fake):
    fake.run()
    fake.plan(none_seed3=0.5, two_seed3=0.5)
    assert fake.run("--seeds", "0", "1", "2", "3") == 0 and fake.calls == ["none-seed3", "two-seed3"]
    assert "4 of 4" in fake.row("two")


def test_failures_are_recorded_and_the_others_go_on(fake, capsys):
    fake.plan(two_seed0="error: no luck", none_seed1="stop")
    assert fake.run() == 1
    assert len(fake.calls) == 6
    assert fake.row("two")[1:3] == ["0.500 ± 0.000", "0.750 ± 0.071"]
    assert fake.row("two")[-4:] == ["2 of 3, 1 failed", "none", "+0.200", "-"], "seed 2 alone is in both"
    assert "- two-seed0 failed: status 1: error: no luck" in fake.table
    assert "- none-seed1 failed: stopped after 3 of 4 steps" in fake.table
    assert "verdict: none can be given." in fake.table
    assert "FAILED, status 1: error: no luck" in capsys.readouterr().out
    fake.plan()
    assert fake.run() == 0 and fake.calls == ["two-seed0", "none-seed1"]
    assert (fake.folder / "aside" / "two-seed0-1" / "metrics.jsonl").exists()
    assert "failed" not in fake.table and "P(better) 0.971" in fake.table


def test_a_variant_that_always_fails_has_no_number(fake):
    fake.plan(two_seed0="ValueError: x", two_seed1="ValueError: x", two_seed2="ValueError: x")
    assert fake.run() == 1
    assert fake.row("two") == ["two", *["failed"] * 8, "0 of 3, 3 failed", "none", "-", "-"]
    assert (fake.folder / "curves.png").exists()


def test_a_run_without_a_last_held_out_accuracy_failed(fake):
    fake.plan(two_seed0=None)
    assert fake.run() == 1 and "- two-seed0 failed: no held-out accuracy at the last step" in fake.table


def test_an_unfinished_folder_is_moved_aside(fake):
    fake.run()
    run = fake.folder / "runs" / "two-seed0"
    (run / "finished.json").unlink()
    assert fake.run() == 0 and fake.calls == ["two-seed0"]
    metrics = fake.folder / "runs" / "none-seed2" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert fake.run() == 0 and fake.calls == ["none-seed2"], "the last step is not there"


def test_other_flags_are_refused_or_run_again(fake):
    fake.run()
    with pytest.raises(AblationError) as refused:
        fake.run(common=("--steps", "4", "--lr", "0.5"))
    assert "none-seed0: --lr was 0.0003, now 0.5" in str(refused.value) and "--rerun-changed" in str(refused.value)
    assert fake.calls == []
    assert fake.run("--rerun-changed", common=("--steps", "4", "--lr", "0.5")) == 0 and len(fake.calls) == 6
    assert json.loads((fake.folder / "aside" / "two-seed2-1" / "config.json").read_text())["lr"] == 3e-4


def test_a_flag_that_is_younger_than_the_run_counts_as_its_default(fake):
    fake.run()
    for path in fake.folder.glob("runs/*/config.json"):
        config = json.loads(path.read_text())
        del config["dual_clip"]
        path.write_text(json.dumps(config))
    assert fake.run() == 0 and fake.calls == []
    with pytest.raises(AblationError, match=r"--dual-clip was None, now 3\.0"):
        fake.run(common=("--steps", "4", "--dual-clip", "3"))


def test_dry_run_prints_the_commands_and_makes_nothing(fake, capsys):
    assert fake.run("--dry-run") == 0 and fake.calls == [] and not fake.folder.exists()
    lines = capsys.readouterr().out.splitlines()[1:]
    place = f"--runs-dir {fake.folder}/runs --run-name two-seed1"
    assert lines[3] == f"run: python {fake.here}/fake.py --seed 1 {place} --steps 4 --tis-cap 2"
    fake.plan(two_seed0="error: x")
    fake.run()
    capsys.readouterr()
    fake.run("--dry-run")
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[1:]] == (
        ["finished", "run again", *["finished"] * 4]
    )


def test_errors_are_found_in_a_log():
    log = "loading\nTraceback (most recent call last):\n  x\ntorch.OutOfMemoryError: no room\nwarning: leaked\n\n"
    assert ablation.error_of(log, 1) == "status 1: torch.OutOfMemoryError: no room"
    assert ablation.error_of("error: --x is 3\n  more of it", 2) == "status 2: error: --x is 3"
    assert ablation.error_of("step 3\n", -9) == "ended by SIGKILL: step 3"
    assert ablation.error_of("", 1) == "status 1: no output"


def test_one_ablation_at_a_time_in_a_folder(fake):
    with ablation.only_one(fake.folder), pytest.raises(AblationError, match="another process is at work"):
        fake.run()


def test_interrupted_it_ends_its_run_and_goes_on_later(fake):
    fake.plan(two_seed0="sleep")
    command = [sys.executable, str(SCRIPTS / "ablation.py"), *fake.arguments()]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = fake.folder / "logs" / "two-seed0.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=30)
    assert driver.returncode == 130 and "interrupted; the same command goes on" in errors
    assert "Traceback" not in errors
    assert "5 of 6 runs have not ended yet." in fake.table and fake.row("two")[1] == "to run"
    with pytest.raises(ProcessLookupError):  # the run was not left behind
        os.kill(int(log.read_text().split()[-1]), 0)
    fake.plan()
    assert fake.run() == 0 and len(fake.calls) == 5 and fake.calls[0] == "two-seed0"


# ---- the scripts


def given(name: str, folder: Path, *flags: str, **env: str) -> list[str]:
    """The arguments that a script of scripts/ablations/ gives to ablation.py, by a `python` that prints them."""
    stub = folder / "python"
    stub.write_text('#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPTS / "ablations" / f"{name}.sh"), *flags]
    done = subprocess.run(command, env=os.environ | path | env, capture_output=True, text=True, check=True, cwd=folder)
    script, *arguments = done.stdout.splitlines()
    assert script == "scripts/ablation.py"
    return arguments


def planned(arguments: list[str]) -> dict[str, dict]:
    """{variant: config} of seed 0."""
    args = ablation.parse_arguments(arguments)
    variants = ablation.parse_variants(args.variant)
    runs = ablation.plan_runs(variants, args.seeds, args.common, args.folder, args.train)
    return {run.variant: run.config for run in runs if run.seed == args.seeds[0]}


def changes(configs: dict[str, dict]) -> dict[str, set[str]]:
    """{variant: the flags in which it differs from the first one}."""
    first, *_ = configs.values()
    return {name: {k for k in first if config[k] != first[k]} for name, config in configs.items()}


def test_every_script_is_tested():
    assert sorted(p.stem for p in (SCRIPTS / "ablations").glob("*.sh") if p.stem != "common") == NAMES


@pytest.mark.parametrize("name", [*NAMES, "common"])
def test_scripts_parse(name):
    subprocess.run(["bash", "-n", str(SCRIPTS / "ablations" / f"{name}.sh")], check=True)


@pytest.mark.parametrize("flags", [(), ("--tiny",)])
@pytest.mark.parametrize("name", NAMES)
def test_scripts_vary_one_thing(name, flags, tmp_path):
    arguments = given(name, tmp_path, *flags, "--warmup-steps", "3")
    configs = planned(arguments)
    args = ablation.parse_arguments(arguments)
    assert len(args.seeds) >= 3 and args.folder.name == (f"{name}-tiny" if flags else name)
    baseline = next(iter(configs.values()))
    assert baseline["model"] == (TINY_MODEL if flags else "Qwen/Qwen2.5-0.5B-Instruct")
    assert baseline["data"] == ("arithmetic" if flags else "gsm8k") and baseline["warmup_steps"] == 3
    varied = changes(configs)
    if name == "dapo_parts":
        assert list(varied.values()) == [
            set(), {"clip_high"}, {"dynamic_sampling"}, {"overlong_buffer"}, {"loss_reduction"}
        ]  # fmt: skip
        assert baseline["overlong_buffer"] > 0 and baseline["updates_per_batch"] > 1, "or nothing could be clipped"
    elif name == "quant_format":
        assert len(varied) == 10 and set().union(*varied.values()) == {"rollout_quant", "tis_cap"}
        for variant in ablation.parse_variants(args.variant)[1:]:
            pair = changes({v: configs[v] for v in (variant.baseline, variant.name)})
            assert len(pair[variant.name]) == 1, f"{variant.name} against {variant.baseline} differ in one thing"
    else:
        flag = {"tis_cap": "tis_cap", "correction": "correction", "reduction": "loss_reduction"}[name]
        own = {"tis_cap"} if name == "correction" else set()  # a correction without a cap has none by --tis-cap auto
        assert all(v - own == {flag} for v in list(varied.values())[1:])
        assert len(varied) == {"tis_cap": 6, "correction": 8, "reduction": 4}[name]


def test_scripts_take_seeds_folder_and_the_drivers_own_flags(tmp_path):
    arguments = given("tis_cap", tmp_path, "--dry-run", "--tiny", SEEDS="4 5", FOLDER=str(tmp_path / "here"))
    args = ablation.parse_arguments(arguments)
    assert args.dry_run and args.seeds == [4, 5] and args.folder == tmp_path / "here"
    assert "--dry-run" not in args.common and "--tiny" not in args.common


def test_a_script_prints_its_plan(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(SCRIPTS / "ablations" / "tis_cap.sh"), "--tiny", "--dry-run"]
    env = os.environ | {"PATH": path, "FOLDER": str(tmp_path / "out")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("run: python ") for line in done.stdout.splitlines()) == 18
    assert not (tmp_path / "out").exists()
    text = subprocess.run([*command[:2], "--help"], capture_output=True, text=True, check=True).stdout
    assert "varied   --tis-cap" in text and "common.sh" not in text


# ---- a whole one


@pytest.mark.slow
@needs_tiny_model
@needs_engine
def test_an_ablation_from_end_to_end(tmp_path):
    command = [
        sys.executable, str(SCRIPTS / "ablation.py"), "small", "--folder", str(tmp_path / "out"), "--seeds", "0", "1",
        "--variant", "none: --tis-cap None", "--variant", "fp8: --tis-cap 2", "--",
        "--steps", "2", "--prompts-per-step", "4", "--samples-per-prompt", "4", "--eval-size", "32",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| 2 of 2 |") == 2 and done.stdout.count("verdict: ") == 1
    assert "do not all have the same" not in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.stdout.count("finished before") == 4, "config.json is what was asked for"
    assert (tmp_path / "out" / "curves.png").exists()
