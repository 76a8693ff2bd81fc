"""run_folder.py: no run overwrites another, every line is JSON, no key leaks, no half-written checkpoint has a name."""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import contextlib
import gc
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import run_folder
from checkpoint import CheckpointError, LoopState, Snapshot, random_states, read_checkpoint
from run_folder import RunFolder, RunFolderError, check_free, default_run_name
from trackers import TrackerError

ROOT = Path(run_folder.__file__).resolve().parent


def lines(path: Path) -> list[dict]:
    """Every line as strict JSON: NaN and Infinity, which json.loads takes by default, are refused."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def lines_of(path: Path) -> list[dict]:
    """The same where the text itself may hold what str.splitlines takes for an end of line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


FILES = ("metrics.jsonl", "samples.jsonl", "events.jsonl")


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path / "runs"), "a", {"lr": 1e-6, "path": Path("x")})


# ---- the folder


def test_an_existing_folder_is_refused_and_left_alone(run, tmp_path):
    (run.path / "metrics.jsonl").write_text("kept\n")
    config = (run.path / "config.json").read_text()
    with pytest.raises(RunFolderError) as error:
        RunFolder(str(tmp_path / "runs"), "a", {"lr": 5})
    assert "--run-name" in str(error.value) and str(run.path) in str(error.value)
    assert (run.path / "metrics.jsonl").read_text() == "kept\n"
    assert (run.path / "config.json").read_text() == config


def test_a_runs_dir_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "runs"
    file.write_text("")
    with pytest.raises(RunFolderError, match="--runs-dir") as error:
        RunFolder(str(file), "a", {})
    assert str(file) in str(error.value)
    assert file.read_text() == ""


def test_parents_are_made_and_two_names_live_side_by_side(tmp_path):
    deep = tmp_path / "not" / "there" / "yet"
    first, second = RunFolder(str(deep), "a", {}), RunFolder(str(deep), "b", {})
    assert first.path == deep / "a" and second.path == deep / "b"


def test_default_name_holds_the_model_and_is_one_folder():
    for model in ("Qwen/Qwen2.5-1.5B-Instruct", "/models/Qwen2.5-1.5B-Instruct", "models/Qwen2.5-1.5B-Instruct/"):
        name = default_run_name(model)
        assert name.startswith("Qwen2.5-1.5B-Instruct-2") and "/" not in name


# ---- config.json, env.json


def test_config_and_environment_are_json_and_hold_what_a_reader_needs(run):
    assert json.loads((run.path / "config.json").read_text()) == {"lr": 1e-6, "path": "x"}
    env = json.loads((run.path / "env.json").read_text())
    assert env["versions"]["torch"].split("+")[0] == run_folder.torch.__version__.split("+")[0]
    assert env["versions"]["transformers"] and env["python"] and env["platform"]
    assert env["command"] and env["cpu_count"] >= 1
    assert {"git_commit", "git_diff", "gpus", "omp_num_threads"} <= env.keys()


def test_no_secret_of_the_environment_is_in_any_file(tmp_path, monkeypatch):
    secrets = {name: f"marker-of-{name.lower()}" for name in ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "SECRET")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run = RunFolder(str(tmp_path), "a", {"model": "m"})
    run.log({"step": 1, "train/loss": 0.5})
    run.log_samples([{"step": 1, "text": "t"}])
    run.save_checkpoint(1, Write(lambda folder: (folder / "w").write_text("w")))
    files = [f for f in run.path.rglob("*") if f.is_file()]
    assert len(files) == 6  # .lock too
    for file in files:
        found = [v for v in secrets.values() if v in file.read_text()]
        assert found == [], f"{file.name} holds a secret"


def test_without_git_the_environment_is_still_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    env = json.loads((RunFolder(str(tmp_path), "a", {}).path / "env.json").read_text())
    assert env["git_commit"] is None and env["git_diff"] is None


# ---- lines


def test_values_that_are_not_finite_become_null(run):
    run.log({"step": 1, "a/nan": math.nan, "a/inf": math.inf, "a/minus": -math.inf, "a/fine": 0.25, "a/count": 3})
    run.log({"step": 2, "a/nan": 1.0})
    assert lines(run.path / "metrics.jsonl") == [
        {"step": 1, "a/nan": None, "a/inf": None, "a/minus": None, "a/fine": 0.25, "a/count": 3},
        {"step": 2, "a/nan": 1.0},
    ]


def test_samples_keep_their_text_on_one_line_each(run):
    texts = ["two\nlines", 'quotes " and \\', "\u2028 separator", "ünïcode 中文", "\x00\x1b[0m", ""]
    run.log_samples([{"step": 1, "text": t} for t in texts])
    run.log_samples([{"step": 2, "text": "later"}])
    raw = (run.path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["text"] for line in raw if line] == [*texts, "later"]


# ---- checkpoints


class Write:
    """A snapshot whose writing is `work`."""

    def __init__(self, work):
        self.work = work
        self.copied = threading.Event()

    def write(self, folder: Path) -> None:
        try:
            self.work(folder)
        finally:
            self.copied.set()

    def wait(self) -> None:
        assert self.copied.wait(10)


def write_weights(content: str) -> Write:
    return Write(lambda folder: (folder / "model.safetensors").write_text(content))


def names(run: RunFolder) -> list[str]:
    folder = run.path / "checkpoints"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_a_checkpoint_bears_its_step_and_holds_what_was_written(run):
    path = run.save_checkpoint(7, write_weights("seven"))
    assert path == run.path / "checkpoints" / "step-000007"
    assert (path / "model.safetensors").read_text() == "seven"
    assert names(run) == ["step-000007"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("I/O error 28")], ids=repr)
def test_a_writer_that_fails_leaves_nothing_under_either_name(run, failure):
    """A full disk is an OSError from Python's files and another class from the serializer of the weights."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise failure

    with pytest.raises((RunFolderError, type(failure))):
        run.save_checkpoint(7, Write(write))
    assert names(run) == []
    run.save_checkpoint(7, write_weights("seven"))
    assert names(run) == ["step-000007"], "the same step can be saved once there is room again"


def test_an_interrupt_while_writing_leaves_no_folder_with_the_final_name(run):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(7, Write(write))
    assert "step-000007" not in names(run)


def test_a_full_disk_is_an_error_that_names_the_checkpoint(run):
    def write(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunFolderError, match=r"step-000007.*No space left"):
        run.save_checkpoint(7, Write(write))


def test_a_second_save_of_a_step_does_not_rewrite(run):
    first = run.save_checkpoint(7, write_weights("first"))
    stamp = (first / "model.safetensors").stat().st_mtime_ns

    def never(folder: Path) -> None:
        raise AssertionError("written twice")

    assert run.save_checkpoint(7, Write(never)) == first
    assert (first / "model.safetensors").read_text() == "first"
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_checkpoint_is_written_while_the_run_goes_on(run):
    going, finish = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        (folder / "model.safetensors").write_text("seven")
        going.set()
        assert finish.wait(10)

    path = run.save_checkpoint(7, Write(slow), wait=False)
    assert going.wait(10) and not path.exists(), "half-written, it does not bear the name"
    finish.set()
    run.keep_last = 2
    run.save_checkpoint(8, write_weights("eight"))  # waits for the one before
    assert names(run) == ["step-000007", "step-000008"]
    assert (path / "model.safetensors").read_text() == "seven"


MEMORY_OF_A_THREAD = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
from memory import host_used
from run_folder import RunFolder
from test_run_folder import Write

run = RunFolder(sys.argv[1], "a", {})
torch.ones(28 * 2**18)
before = host_used()
run.save_checkpoint(7, Write(lambda folder: [torch.ones(2**18) for _ in range(48)] and None), wait=False)
run.close()
print("kept", (host_used() - before) >> 20)
"""


def test_a_thread_that_wrote_a_checkpoint_keeps_none_of_its_copies(tmp_path):
    """In a fresh thread's arena malloc would keep all 48 MiB, once it has seen a larger piece freed. In a process of
    its own: others keep and give back memory for reasons of their own."""
    command = [sys.executable, "-c", MEMORY_OF_A_THREAD, str(tmp_path), str(ROOT), str(ROOT / "tests")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert int(out.split("kept")[1]) < 16


@pytest.mark.parametrize("then", ["asked", "close"])
def test_a_failure_of_the_writing_thread_is_said_once(run, then):
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    run.save_checkpoint(7, Write(full), wait=False)
    run.wait_for_copies()
    if then == "close":
        with pytest.raises(RunFolderError, match=r"step-000007.*No space left"):
            run.close()
        return
    run.save_checkpoint(8, write_weights("eight"))
    assert re.search(r"step-000007.*No space left", str(run.writer_error())) and run.writer_error() is None
    run.close()
    assert names(run) == ["step-000008"]


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(1, None, [4]), (2, None, [3, 4]), (1, 2, [2, 4]), (9, 1, [1, 2, 3, 4])]
)
def test_the_last_ones_and_the_best_are_kept(tmp_path, keep, best, left):
    run = RunFolder(str(tmp_path), "a", {}, keep_last=keep)
    for step in (1, 2, 3, 4):
        run.save_checkpoint(step, write_weights(str(step)), best=best if best and step >= best else None)
    assert names(run) == [f"step-{n:06d}" for n in left]
    link = run.path / "best"
    if best is None:
        assert not link.exists()
    else:
        assert (link / "model.safetensors").read_text() == str(best)


def full(folder: Path) -> None:
    raise OSError(28, "No space left on device")


def test_a_best_one_that_could_not_be_saved_leaves_the_one_before_it(run):
    run.save_checkpoint(10, write_weights("ten"), best=10)
    run.save_checkpoint(20, Write(full), wait=False, best=20)
    for step in (30, 40):
        run.save_checkpoint(step, write_weights("later"), best=20)
    assert "step-000020 could not be written" in str(run.writer_error())
    assert names(run) == ["step-000010", "step-000040"]
    assert (run.path / "best" / "model.safetensors").read_text() == "ten"
    run.save_checkpoint(50, write_weights("fifty"), best=50)
    assert names(run) == ["step-000050"] and (run.path / "best" / "model.safetensors").read_text() == "fifty"


def test_an_old_one_that_cannot_be_removed_is_said_and_the_new_one_is_whole(run, monkeypatch):
    run.save_checkpoint(2, state(2))

    def refuses(path: Path, **options) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(shutil, "rmtree", refuses)
    (run.path / "checkpoints" / "step-000004.tmp").mkdir()
    with pytest.raises(RunFolderError, match=r"step-000004 could not be written: .*Read-only"):
        run.save_checkpoint(4, state(4))
    (run.path / "checkpoints" / "step-000004.tmp").rmdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or refuses(path))
    with pytest.raises(RunFolderError, match=r"step-000004 is whole, but one that it replaces .*Read-only"):
        run.save_checkpoint(4, state(4))
    assert read_checkpoint(run.path / "checkpoints" / "step-000004").loop.step == 4


@pytest.fixture
def order(monkeypatch) -> list[tuple[str, str]]:
    """What was flushed to the disk and what got its name, in order."""
    done, fsync = [], os.fsync

    def flushed(file: int) -> None:
        done.append(("fsync", os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    monkeypatch.setattr(os, "fsync", flushed)
    for name in ("rename", "replace"):
        real = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda path, to, r=real: done.append(("name", str(to))) or r(path, to))
    return done


def test_a_checkpoint_is_on_the_disk_before_it_bears_its_name(run, order):
    final = run.save_checkpoint(2, state(2))
    named = order.index(("name", str(final)))
    aside = final.with_name(final.name + ".tmp")
    for path in (final, *final.rglob("*")):
        flushed = ("fsync", str(aside / path.relative_to(final)))
        assert flushed in order[:named], path
    assert ("fsync", str(final.parent)) in order[named:], "and then the name itself"


def test_lines_that_were_taken_out_do_not_take_the_others_along(tmp_path, order):
    run = RunFolder(str(tmp_path), "a", {})
    fill(run, 1, 3)
    run.close()
    order.clear()
    RunFolder(str(tmp_path), "a", {}, resume=True)
    for name in FILES:
        path = str(tmp_path / "a" / name)
        assert order.index(("fsync", path + ".tmp")) < order.index(("name", path))


# ---- ended between any two changes of a file

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate")


def killed(before: int, work: Callable[[], None]) -> bool:
    """`work` in a process of its own that is killed before its change number `before` of a file, or flush of one. False
    if it makes no so many."""
    pid = os.fork()
    if pid == 0:
        left, fsync = before, os.fsync

        def count() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, args: tuple) -> None:
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES or writes:
                count()

        def counted(file: int) -> None:
            count()
            fsync(file)

        status = 1
        try:
            run_folder.os.fsync = counted
            sys.addaudithook(hook)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_start_that_is_killed_anywhere_loses_nothing(tmp_path, monkeypatch):
    """A resumed run takes out what came after its checkpoint; killed in there and resumed again, it does the same."""
    monkeypatch.setattr(run_folder, "_environment", dict)
    run = RunFolder(str(tmp_path), "a", {}, keep_last=2)
    fill(run, 1, 5)
    run.close()
    expected = {name: [x for x in lines_of(run.path / name) if x["step"] <= 4] for name in FILES}
    with open(run.path / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 6, "a')
    for name in ("step-000006.tmp", "step-000001.old"):
        shutil.copytree(run.path / "checkpoints" / "step-000002", run.path / "checkpoints" / name)
    before = 0
    while True:
        folder = tmp_path / str(before)
        shutil.copytree(tmp_path / "a", folder / "a", symlinks=True)
        ended = killed(before, lambda folder=folder: RunFolder(str(folder), "a", {}, resume=True))
        again = RunFolder(str(folder), "a", {}, resume=True)
        assert again.checkpoint.loop.step == 4 and names(again) == ["step-000002", "step-000004"], before
        found = {name: lines_of(again.path / name) for name in FILES}
        assert 1 <= len(found["events.jsonl"]) - len(expected["events.jsonl"]) <= 2
        assert {name: found[name][: len(expected[name])] for name in FILES} == expected, before
        assert [found[name] for name in FILES[:2]] == [expected[name] for name in FILES[:2]], before
        again.close()
        if not ended:
            break
        before += 1
    assert before > 15


@pytest.mark.parametrize("best", [4, 2])
def test_a_save_that_is_killed_anywhere_leaves_a_whole_one_and_the_best(tmp_path, monkeypatch, best):
    monkeypatch.setattr(run_folder, "_environment", dict)
    run = RunFolder(str(tmp_path), "a", {})
    run.save_checkpoint(2, state(2), best=2)
    run.close()
    before, seen = 0, set()
    while True:
        folder = tmp_path / str(before)
        shutil.copytree(tmp_path / "a", folder / "a", symlinks=True)
        going = RunFolder(str(folder), "a", {}, resume=True)
        ended = killed(before, lambda going=going: going.save_checkpoint(4, state(4), best=best))
        going.close()
        again = RunFolder(str(folder), "a", {}, resume=True)
        seen.add(again.checkpoint.loop.step)
        shown = read_checkpoint((again.path / "best").resolve(strict=True)).loop.step
        assert shown in (2, best), before
        again.save_checkpoint(4, state(4), best=best)
        again.save_checkpoint(6, state(6), best=best)
        assert names(again) == [f"step-{best:06d}", "step-000006"], before
        again.close()
        if not ended:
            break
        before += 1
    assert seen == {2, 4} and before > 10


# ---- disks that take no more


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The kernel writes no file beyond `size` bytes; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_files_that_the_kernel_cuts_short_make_no_checkpoint_and_no_line(tmp_path, file):
    run = RunFolder(str(tmp_path), "a", {})
    fill(run, 1, 2)
    large = {"model.safetensors": {"model": 1 << 16}, "optimizer.safetensors": {"optimizer": 1 << 16}}[file]
    with no_file_above(1 << 15):
        with pytest.raises(RunFolderError, match=r"step-000004 could not be written: .*(File too large|os error 27)"):
            run.save_checkpoint(4, state(4, **large))
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl cannot be written: File too large"):
            run.log({"step": 3} | {f"a/{i}": 0.5 for i in range(5000)})
    assert names(run) == ["step-000002"] and (run.path / "metrics.jsonl").stat().st_size == 1 << 15
    run.close()
    again = RunFolder(str(tmp_path), "a", {}, resume=True)
    assert again.checkpoint.loop.step == 2 and [m["step"] for m in lines(again.path / "metrics.jsonl")] == [1, 2]


def on_a_small_disk(disk: Path) -> None:
    """In a process that has mounted 512 KiB there."""
    run = RunFolder(str(disk), "a", {}, keep_last=2)
    fill(run, 1, 3)
    no_room = r"step-000004 could not be written: .*(No space left|os error 28)"
    with pytest.raises(RunFolderError, match=no_room):
        run.save_checkpoint(4, state(4, model=1 << 20))
    run.save_checkpoint(4, state(4, optimizer=1 << 20), wait=False)
    with pytest.raises(RunFolderError, match=no_room):
        run.close()
    assert names(run) == ["step-000002"]
    run = RunFolder(str(disk), "a", {}, resume=True)
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl cannot be written: No space left"):
        for step in range(3, 5000):
            run.log({"step": step, "a/b": 0.5})
    run.close()
    with pytest.raises(RunFolderError, match="cannot be written: No space left"):
        RunFolder(str(disk), "a", {}, resume=True)
    gc.collect()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(RunFolderError, match=r"cannot be written: .*Read-only file system"):
        RunFolder(str(disk), "a", {}, resume=True)
    with pytest.raises(RunFolderError, match=r"--runs-dir .* cannot be written"):
        check_free(str(disk), "b")
    gc.collect()
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    (disk / "filler").unlink()
    again = RunFolder(str(disk), "a", {}, resume=True)
    assert again.checkpoint.loop.step == 2 and [m["step"] for m in lines(again.path / "metrics.jsonl")] == [1, 2]
    again.save_checkpoint(4, state(4))
    assert names(again) == ["step-000004"]


def test_a_disk_that_is_full_or_read_only_is_said_and_what_was_saved_stays(tmp_path):
    own = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=512k none "$0" && exec "$@"', str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    script = "import sys, pathlib, test_run_folder as t; t.on_a_small_disk(pathlib.Path(sys.argv[1])); print('done')"
    done = subprocess.run(
        [*own, sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]


# ---- going on


def state(step: int, model: int = 4, optimizer: int = 3):
    """A checkpoint of `step` as Snapshot writes it, with so many numbers in its model and optimizer."""
    tensors = {"model.weight": torch.full((model,), float(step), dtype=torch.bfloat16)}
    plain, generators = random_states()

    def write_model(folder: Path, state: dict) -> None:
        save_file(state, folder / "model.safetensors")

    loop = LoopState(step=step, random=plain)
    return Snapshot(tensors, {"master.x": torch.zeros(optimizer)}, write_model, loop, generators)


def fill(run: RunFolder, first: int, last: int, every: int = 2) -> None:
    for step in range(first, last + 1):
        run.log({"step": step, "a/b": step / 3})
        run.log_samples([{"step": step, "text": "\u2028 two\nlines"}] * 2)
        run.log_event({"step": step, "event": "x", "message": "m"})
        if step % every == 0:
            run.save_checkpoint(step, state(step))


@pytest.mark.parametrize("half", [b"", b'{"step": 6, "a/', b"\xff\xfe"])
def test_what_came_after_the_last_checkpoint_is_taken_out(tmp_path, half):
    run = RunFolder(str(tmp_path), "a", {"lr": 1})
    fill(run, 0, 5)
    kept = {name: [x for x in lines_of(run.path / name) if x["step"] <= 4] for name in FILES}
    run.close()
    with open(run.path / "metrics.jsonl", "ab") as f:
        f.write(half)
    for name in ("step-000006.tmp", "step-000002.old"):
        (run.path / "checkpoints" / name).mkdir()
    again = RunFolder(str(tmp_path), "a", {"lr": 2}, resume=True)
    assert again.checkpoint.loop.step == 4 and names(again) == ["step-000004"]
    assert lines(again.path / "metrics.jsonl") == kept["metrics.jsonl"]
    assert lines_of(again.path / "samples.jsonl") == kept["samples.jsonl"]
    events = lines(again.path / "events.jsonl")
    assert events[:-1] == kept["events.jsonl"] and events[-1]["event"] == "resumed"
    assert json.loads((again.path / "config.json").read_text()) == {"lr": 1}


def test_a_run_without_a_checkpoint_begins_again(tmp_path):
    run = RunFolder(str(tmp_path), "a", {})
    fill(run, 1, 2, every=5)
    run.close()
    again = RunFolder(str(tmp_path), "a", {}, resume=True)
    assert again.checkpoint is None and lines(again.path / "metrics.jsonl") == []
    assert [e["message"] for e in lines(again.path / "events.jsonl")] == ["goes on from the beginning"]


def test_a_folder_in_use_is_refused(tmp_path):
    first = RunFolder(str(tmp_path), "a", {})
    with pytest.raises(RunFolderError, match=r"in use by another process.*--run-name"):
        RunFolder(str(tmp_path), "a", {}, resume=True)
    first.close()
    RunFolder(str(tmp_path), "a", {}, resume=True)


def cut_file(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("file", "damage"),
    [("model.safetensors", cut_file), ("training/optimizer.safetensors", cut_file), ("training/state.json", cut_file),
     ("training/random.safetensors", lambda folder, name: (folder / name).unlink()),
     ("training/state.json", lambda folder, name: (folder / name).unlink())],
)  # fmt: skip
def test_a_torn_file_is_named_and_nothing_is_removed(tmp_path, file, damage):
    run = RunFolder(str(tmp_path), "a", {}, keep_last=2)
    fill(run, 0, 5)
    run.close()
    damage(run.path / "checkpoints" / "step-000004", file)
    before = (run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=rf"step-000004 is damaged: {file}.*Move it away"):
        RunFolder(str(tmp_path), "a", {}, resume=True)
    assert names(run) == ["step-000002", "step-000004"] and (run.path / "metrics.jsonl").read_bytes() == before
    (run.path / "checkpoints" / "step-000004").rename(tmp_path / "moved")
    assert RunFolder(str(tmp_path), "a", {}, resume=True).checkpoint.loop.step == 2


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    run = RunFolder(str(tmp_path), "a", {})
    checkpoint = read_checkpoint(run.save_checkpoint(2, state(2)))
    for tensors, word in (({"master.y": torch.zeros(3)}, "master"), ({"master.x": torch.zeros(4)}, r"\(4,\)")):
        with pytest.raises(CheckpointError, match=f"another model.*{word}"):
            checkpoint.load_optimizer(tensors)


def test_what_cannot_be_taken_out_of_a_resumed_run_is_said_and_stays(tmp_path, monkeypatch):
    run = RunFolder(str(tmp_path), "a", {})
    fill(run, 1, 3)
    (run.path / "checkpoints" / "step-000004.tmp").mkdir()
    run.close()
    before = (run.path / "metrics.jsonl").read_bytes()

    def refuses(*args, **options) -> None:
        raise OSError(30, "Read-only file system")

    for place, name, words in (
        (shutil, "rmtree", "step-000004.tmp, half of a checkpoint, cannot be removed"),
        (Path, "replace", "metrics.jsonl cannot be written: Read-only file system"),
        (Path, "read_bytes", "metrics.jsonl cannot be read: Read-only file system"),
    ):
        with monkeypatch.context() as patch, pytest.raises(RunFolderError, match=words):
            patch.setattr(place, name, refuses)
            RunFolder(str(tmp_path), "a", {}, resume=True)
        assert (run.path / "metrics.jsonl").read_bytes() == before
        assert not (run.path / "metrics.jsonl.tmp").exists()
    assert RunFolder(str(tmp_path), "a", {}, resume=True).checkpoint.loop.step == 2


def test_a_folder_that_can_no_longer_be_written_is_said(run):
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(RunFolderError, match=r"metrics.jsonl cannot be written"):
        run.log({"step": 1})


def test_what_an_interrupted_save_left_is_cleared_by_the_next(run):
    left = run.path / "checkpoints" / "step-000007.tmp"
    left.mkdir(parents=True)
    (left / "stale").write_text("stale")
    path = run.save_checkpoint(7, write_weights("seven"))
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors"]
    assert names(run) == ["step-000007"]


def test_a_tracker_that_does_not_start_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrackerError, match="pip install wandb"):
        RunFolder(str(tmp_path), "a", {}, use_wandb=True)
    assert not (tmp_path / "a").exists()


def test_a_secret_in_the_command_is_not_in_the_environment_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "marker-of-hf-token")
    monkeypatch.setattr(sys, "argv", ["train.py", "--model=https://me:marker-of-hf-token@host/m"])
    env = json.loads((RunFolder(str(tmp_path), "a", {}).path / "env.json").read_text())
    assert env["command"] == ["train.py", "--model=https://***@host/m"]
