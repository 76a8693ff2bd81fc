"""Checkpoints of several ranks: any number of them goes on from what any number wrote, and a rank that fails costs the
checkpoint, not the run.

Ranks are threads here, with a meeting in memory in the place of gloo; what needs a process of its own is at the end.
"""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import gc
import itertools
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint as checkpoint_module
import run_folder
from checkpoint import (
    CheckpointError,
    LoopState,
    Snapshot,
    random_states,
    read_checkpoint,
    set_random_states,
    shard_names,
)
from loop_control import Progress
from optimizer import MasterAdamW
from ranks import Ranks
from run_folder import RunFolder, RunFolderError, check_free
from trackers import TrackerError

ROOT = Path(__file__).resolve().parent.parent


class Met(Ranks):
    """A rank that is a thread. Everything said is pickled, as gloo does it."""

    def __init__(self, rank: int, world: int, tp: int, barrier: threading.Barrier, values: list):
        super().__init__(rank, world, tp)
        self._barrier, self._values = barrier, values

    def gather(self, value):
        self._values[self.rank] = pickle.dumps(value)
        self._barrier.wait(20)
        said = [pickle.loads(v) for v in self._values]
        self._barrier.wait(20)
        return said

    def from_first(self, value):
        return self.gather(value)[0]

    def any(self, flag):
        return any(self.gather(flag))

    def barrier(self):
        self._barrier.wait(20)


def together(world: int, work: Callable[[Ranks], Any], tp: int = 1) -> list[Any]:
    """What `work` returned or raised on each rank."""
    barrier, values, results = threading.Barrier(world), [None] * world, [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = work(Met(rank, world, tp, barrier, values))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank waits for ever"
    return results


def no_error(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


# ---- the optimizer's shards

SHAPES = {"wide": (7, 3), "long": (13, 2), "vector": (5,), "one": (1, 4), "three": (3,), "cube": (6, 2, 2)}


def whole_state() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in SHAPES.items():
        state[f"master.{name}"] = torch.randn(shape, generator=g)
        state[f"first.{name}"] = torch.randn(shape, generator=g).bfloat16()
    return state


def rows_of(rows: int, rank: int, world: int) -> tuple[int, int]:
    """As torch.chunk: the last ranks may have fewer or none."""
    each = -(-rows // world)
    return min(rank * each, rows), min((rank + 1) * each, rows)


def shards_of(state: dict[str, torch.Tensor], rank: int, world: int) -> tuple[dict, dict]:
    """(this rank's rows, in memory of their own, spans)"""
    if world == 1:
        return {k: t.clone() for k, t in state.items()}, {}
    spans = {k: (rows_of(len(t), rank, world)[0], len(t)) for k, t in state.items()}
    return {k: t[slice(*rows_of(len(t), rank, world))].clone() for k, t in state.items()}, spans


def write_model(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, folder / "model.safetensors")


def snapshot(
    ranks: Ranks, state: dict[str, torch.Tensor], step: int = 1, write: Callable = write_model, **options: Any
) -> Snapshot:
    plain, tensors = random_states(ranks)
    shards, spans = shards_of(state, ranks.rank, ranks.world)
    model = {"w": torch.full((2, 2), float(step), dtype=torch.bfloat16)} if ranks.first else {}
    return Snapshot(
        model, shards, write, LoopState(step=step, random=plain), tensors, spans=spans, ranks=ranks, **options
    )


def save(folder: Path, state: dict[str, torch.Tensor], world: int, tp: int = 1) -> None:
    """A checkpoint of `world` ranks, without a run folder."""
    folder.mkdir()
    snapshots = [snapshot(Ranks(rank, world, tp), state) for rank in range(world)]
    for each in reversed(snapshots):
        each.write(folder)
    if world > 1:
        snapshots[0].write_state(folder)


def load(folder: Path, state: dict[str, torch.Tensor], world: int) -> list[dict[str, torch.Tensor]]:
    """Each rank's live tensors after loading; `state` has the shapes and types."""
    found = []
    for rank in range(world):
        live, spans = shards_of({k: torch.full_like(t, 9.0) for k, t in state.items()}, rank, world)
        read_checkpoint(folder).load_optimizer(live, spans)
        found.append(live)
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("worlds", [(1, 2, 4, 3, 1), (4, 4), (2, 8, 5, 1), (3, 1, 3)], ids=str)
def test_any_number_of_ranks_goes_on_from_any_other(worlds, tmp_path):
    state = whole_state()
    for i, (world, then) in enumerate(itertools.pairwise(worlds)):
        folder = tmp_path / str(i)
        save(folder, state, world)
        assert read_checkpoint(folder).world == world
        found = load(folder, state, then)
        for rank in range(then):
            assert equal(found[rank], shards_of(state, rank, then)[0]), (world, then, rank)
        state = {k: torch.cat([f[k] for f in found]) for k in state}  # and what was read is written next
    assert equal(state, whole_state())


def test_a_checkpoint_of_one_rank_has_the_files_and_contents_that_it_always_had(tmp_path):
    save(tmp_path / "a", whole_state(), 1)
    files = sorted(p.name for p in (tmp_path / "a" / "training").iterdir())
    assert files == ["optimizer.safetensors", "random.safetensors", "state.json"]
    assert equal(load_file(tmp_path / "a" / "training" / "optimizer.safetensors"), whole_state())
    assert set(json.loads((tmp_path / "a" / "training" / "state.json").read_text())) == {"loop", "files"}


@pytest.mark.parametrize("world", [1, 3])
def test_no_row_is_read_twice_or_by_a_rank_that_has_no_use_for_it(world, tmp_path, monkeypatch):
    state, read = whole_state(), []
    save(tmp_path / "a", state, world)
    inner = checkpoint_module.safe_open

    class Counted:
        def __init__(self, *args, **options):
            self.file = inner(*args, **options)

        def __enter__(self):
            self.open = self.file.__enter__()
            return self

        def __exit__(self, *end):
            return self.file.__exit__(*end)

        def __getattr__(self, name):
            return getattr(self.open, name)

        def get_tensor(self, key):
            raise AssertionError(f"all of {key} is read")

        def get_slice(self, key):
            piece = self.open.get_slice(key)

            class Piece:
                get_shape, get_dtype = piece.get_shape, piece.get_dtype

                def __getitem__(self, rows):
                    read.append(rows.stop - rows.start)
                    return piece[rows]

            return Piece()

    monkeypatch.setattr(checkpoint_module, "safe_open", Counted)
    load(tmp_path / "a", state, 4)
    assert sum(read) == sum(len(t) for t in state.values()) and min(read) > 0


@pytest.mark.parametrize("states", ["fp32", "bf16"])
@pytest.mark.parametrize("offload", [False, True])
def test_the_optimizer_itself_goes_on_on_other_ranks(states, offload, tmp_path):
    """Masters and moments of AdamW on each rank's rows, some ranks with none of a weight. AdamW works element by
    element: two ranks, then three, then one make the masters that one alone makes, with fp32 moments to the bit."""
    shapes = [(7, 4), (2, 3), (5,), (1,)]
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(s, generator=g).bfloat16() for s in shapes]
    gradients = [[torch.randn(s, generator=g) for s in shapes] for _ in range(3)]

    def build(rank: int, world: int) -> tuple[MasterAdamW, dict]:
        spans = {}
        for i, w in enumerate(weights):
            spans |= {f"{i}.{k}": (rows_of(len(w), rank, world)[0], len(w)) for k in ("master", "first", "second")}
        mine = [w[slice(*rows_of(len(w), rank, world))].clone() for w in weights]
        return MasterAdamW(mine, weight_decay=0.1, states=states, offload=offload), spans if world > 1 else {}

    def step(optimizer: MasterAdamW, rank: int, world: int, which: int) -> None:
        for grad, whole in zip(optimizer.grads, gradients[which], strict=True):
            grad.copy_(whole[slice(*rows_of(len(whole), rank, world))])
        optimizer.step(0.01)

    alone, _ = build(0, 1)
    for which in range(3):
        step(alone, 0, 1, which)
    last = None
    for which, world in enumerate((2, 3, 1)):
        folder = tmp_path / str(which)
        folder.mkdir()
        snapshots = []
        for rank in range(world):
            optimizer, spans = build(rank, world)
            if last is not None:
                read_checkpoint(last).load_optimizer(optimizer.state_tensors(), spans)
                optimizer.set_updates(which)
            step(optimizer, rank, world, which)
            ranks = Ranks(rank, world)
            snapshots.append(
                Snapshot({}, optimizer.state_tensors(), lambda *_: None, LoopState(random=random_states()[0]),
                         random_states(ranks)[1], offload, spans, ranks)
            )  # fmt: skip
            snapshots[-1].write(folder)
        if world > 1:
            snapshots[0].write_state(folder)
        last = folder
    masters = load_file(last / "training" / "optimizer.safetensors")
    for i, expected in enumerate(alone.masters):
        found = masters[f"{i}.master"]
        if states == "fp32":
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # bf16 moments are rounded at random
        assert not torch.equal(found, weights[i].float())


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("then", [1, 2])
@pytest.mark.parametrize("what", ["name", "rows", "width", "dtype"])
def test_another_models_shards_are_refused(world, then, what, tmp_path):
    state = whole_state()
    save(tmp_path / "a", state, world)
    if what == "name":
        state["master.other"] = state.pop("master.wide")
    elif what == "dtype":
        state["first.wide"] = state["first.wide"].float()
    else:
        state["master.wide"] = torch.zeros((8, 3) if what == "rows" else (7, 4))
    word = {"name": r"--optimizer-states: 2 tensors.*master.other", "rows": r"master.wide is \(7, 3\).*\(8, 3\)",
            "width": r"\(7, 3\).*\(7, 4\)", "dtype": r"first.wide.*bfloat16 there.*float32 here"}[what]  # fmt: skip
    with pytest.raises(CheckpointError, match=f"another model.*{word}"):
        load(tmp_path / "a", state, then)


@pytest.mark.parametrize("damage", ["missing", "cut", "torn", "rows", "spans"])
@pytest.mark.parametrize("then", [1, 3])
def test_a_damaged_shard_is_named(damage, then, tmp_path):
    folder, name = tmp_path / "a", shard_names(1, 3)[0]
    save(folder, whole_state(), 3)
    path = folder / name
    size = path.stat().st_size
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "torn":  # of the right size: a disk that lost a block
        path.write_bytes(b"\xff" * size)
    elif damage == "rows":  # the shard of another rank in its place
        shutil.copy(folder / shard_names(0, 3)[0], path)
        (folder / "training" / "state.json").write_text(
            (folder / "training" / "state.json")
            .read_text()
            .replace(f'{name}": {size}', f'{name}": {path.stat().st_size}')
        )
    else:
        path.write_bytes(path.read_bytes().replace(b'spans":"{', b'spans":"!', 1))
    message = "no file of training/ has all rows of" if damage == "rows" else "optimizer-00001-of-00003"
    with pytest.raises(CheckpointError, match=rf"a is damaged: .*{message}.*Move it away"):
        load(folder, whole_state(), then)


# ---- random numbers


def draw() -> tuple[list[float], list[float], float]:
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


def seed(n: int) -> None:
    torch.manual_seed(n)
    np.random.seed(n)
    random.seed(n)


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (3, 1), (4, 2)])
def test_each_rank_gets_its_own_random_numbers_back(world, tp, tmp_path):
    """NumPy's too: vLLM draws a seed for each request from them, and the ranks' requests are not the same many."""
    snapshots, expected = [], []
    for rank in range(world):
        seed(rank // tp)
        draw()
        snapshots.append(snapshot(Ranks(rank, world, tp), whole_state()))
        expected.append(draw())
    assert len({str(e) for e in expected}) == world // tp
    for each in snapshots:
        each.write(tmp_path)
    if world > 1:
        snapshots[0].write_state(tmp_path)
    for rank in range(world):
        seed(99)
        assert read_checkpoint(tmp_path).restore_random(Ranks(rank, world, tp))
        assert draw() == expected[rank]


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 1), (8, 1), (4, 2), (4, 4)])
def test_other_ranks_begin_random_numbers_anew(world, tp, tmp_path):
    """The ranks of one engine must draw the same, those of different engines must not."""
    seed(0)
    save(tmp_path / "a", whole_state(), 4)
    drawn = []
    for rank in range(world):
        seed(rank)  # whatever came before
        assert not read_checkpoint(tmp_path / "a").restore_random(Ranks(rank, world, tp))
        drawn.append(draw())
    assert len({str(d) for d in drawn}) == world // tp
    assert all(drawn[rank] == drawn[rank // tp * tp] for rank in range(world))
    seed(5)
    read_checkpoint(tmp_path / "a").restore_random(Ranks(0, world, tp))
    assert draw() == drawn[0], "the same again"


def test_a_rank_keeps_the_numbers_of_its_own_gpu_alone(monkeypatch):
    """Asking another GPU for them would take memory there, one context a rank."""
    states, used = [torch.arange(4).byte(), torch.arange(4).byte() + 1], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": states[1])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device="cuda": used.append((device, state[0].item()))
    )
    plain, tensors = random_states(Ranks(1, 2))
    assert set(tensors) == {"cpu", "cuda"}
    set_random_states(plain, tensors)
    assert used == [("cuda", 1)]
    plain, tensors = random_states()
    assert set(tensors) == {"cpu", "cuda:0", "cuda:1"}
    set_random_states(plain, tensors)
    assert used[1:] == [(0, 0), (1, 1)]


# ---- the run folder


def names(folder: Path) -> list[str]:
    checkpoints = folder / "checkpoints"
    return sorted(p.name for p in checkpoints.iterdir()) if checkpoints.exists() else []


def events(folder: Path) -> list[dict]:
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def open_all(tmp_path: Path, ranks: Ranks, **options: Any) -> RunFolder:
    return RunFolder(str(tmp_path), "a", {"lr": 1}, ranks=ranks, **options)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_write_one_checkpoint_and_others_open_it(world, wait, tmp_path):
    state = whole_state()

    def work(ranks: Ranks) -> RunFolder:
        run = open_all(tmp_path, ranks)
        for step in (1, 2, 3):
            run.log({"step": step, "a/b": ranks.rank})
            run.log_samples([{"step": step}])
            run.log_event({"step": step, "event": "x", "message": "m"})
            run.wait_for_copies()
            path = run.save_checkpoint(step, snapshot(ranks, state, step), wait, best=2 if step > 1 else None)
            if wait:
                assert read_checkpoint(path).loop.step == step, "whole on every rank when it returns"
        run.close()
        assert run.writer_error() is None and run.checkpoint is None
        return run.path

    assert no_error(together(world, work)) == [tmp_path / "a"] * world
    assert names(tmp_path / "a") == ["step-000002", "step-000003"]
    assert (tmp_path / "a" / "best").resolve().name == "step-000002"
    for name in ("metrics", "samples", "events"):
        lines = (tmp_path / "a" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert '"a/b": 0' in (tmp_path / "a" / "metrics.jsonl").read_text()
    folder = tmp_path / "a" / "checkpoints" / "step-000003"
    shards = [n for rank in range(world) for n in shard_names(rank, world)]
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {"model.safetensors", "training/state.json", *shards}
    assert set(json.loads((folder / "training" / "state.json").read_text())["files"]) == files - {"training/state.json"}

    def reopen(ranks: Ranks) -> dict:
        run = open_all(tmp_path, ranks, resume=True)
        assert run.checkpoint.loop.step == 3
        live, spans = shards_of({k: torch.zeros_like(t) for k, t in state.items()}, ranks.rank, ranks.world)
        run.checkpoint.load_optimizer(live, spans)
        return live

    for then in (3, 1, world):
        found = no_error(together(then, reopen))
        assert all(equal(found[rank], shards_of(state, rank, then)[0]) for rank in range(then))
    assert [e["event"] for e in events(tmp_path / "a")] == ["x"] * 3 + ["resumed"] * 3


def broken(ranks: Ranks, which: int, what: str) -> Snapshot:
    """A snapshot that rank `which` cannot write."""
    state = whole_state()
    if ranks.rank != which:
        return snapshot(ranks, state)
    if what == "weights":

        def full(folder: Path, state: dict) -> None:
            (folder / "model.safetensors").write_text("half")
            raise OSError(28, "No space left on device")

        return snapshot(ranks, state, write=full)
    made = snapshot(ranks, state)
    if what == "optimizer":
        made._optimizer_state["master.wide"] = torch.zeros(4, 4).to_sparse()
    else:
        made._random["cpu"] = torch.zeros(4, 4).t()  # after the shard of the optimizer is there
    return made


FAILURES = [(0, "weights", "No space left"), (2, "optimizer", "master.wide|sparse"), (1, "random", "contiguous"),
            (0, "optimizer", "master.wide|sparse")]  # fmt: skip


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize(("which", "what", "why"), FAILURES)
def test_a_rank_that_cannot_write_costs_the_checkpoint_alone(which, what, why, wait, tmp_path):
    """The first rank says which one and why; the run goes on, and the next checkpoint is made."""

    def work(ranks: Ranks) -> Any:
        run = open_all(tmp_path, ranks)
        run.save_checkpoint(1, snapshot(ranks, whole_state()))
        said = None
        try:
            run.save_checkpoint(2, broken(ranks, which, what), wait)
        except RunFolderError as error:
            said = error
        run.wait_for_copies()
        if not wait:
            run._join_writer()
            said = run.writer_error()
        ranks.barrier()
        left = names(run.path)
        ranks.barrier()
        run.save_checkpoint(3, snapshot(ranks, whole_state(), 3), wait)
        run.close()
        return said, left

    results = no_error(together(3, work))
    for rank, (said, left) in enumerate(results):
        assert left == ["step-000001"], "nothing half-written is left"
        if rank == 0 or wait:
            assert isinstance(said, RunFolderError) and f"step-000002 could not be written: rank {which}: " in str(said)
            assert any(word in str(said) for word in why.split("|"))
        else:
            assert said is None, "one rank speaks"
    assert names(tmp_path / "a") == ["step-000003"]
    assert read_checkpoint(tmp_path / "a" / "checkpoints" / "step-000003").loop.step == 3


@pytest.mark.parametrize("then", ["close", "save"])
def test_a_rank_that_cannot_even_say_so_does_not_make_the_first_one_wait(then, tmp_path, monkeypatch):
    """A full disk takes no note either: the ranks tell each other where they meet next."""
    write_text = Path.write_text

    def full(self, *args, **options):
        if ".failed" in self.name:
            raise OSError(28, "No space left on device")
        return write_text(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)

    def work(ranks: Ranks) -> Any:
        run = open_all(tmp_path, ranks)
        run.save_checkpoint(1, broken(ranks, 2, "optimizer"), wait=False)
        run.wait_for_copies()
        if then == "save":
            run.save_checkpoint(2, snapshot(ranks, whole_state(), 2))
            said = run.writer_error()
            run.close()
            return said
        run.close()

    results = together(3, work)
    speaking = results if then == "close" else results[:1]
    assert all("step-000001 could not be written: rank 2: " in str(e) for e in speaking), results
    assert then == "close" or results[1:] == [None, None]
    assert names(tmp_path / "a") == ([] if then == "close" else ["step-000002"])


def test_a_rank_that_writes_nothing_any_more_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "STALLED", 0.3)
    stuck = threading.Event()

    def work(ranks: Ranks) -> Any:
        run = open_all(tmp_path, ranks)
        made = snapshot(ranks, whole_state())
        if ranks.rank == 1:
            made._save_optimizer = lambda *_: stuck.wait(20)
        run.save_checkpoint(1, made, wait=False)
        if ranks.first:
            run._writer.join()
            stuck.set()
        said = run.writer_error()
        ranks.barrier()
        run.close()
        return str(said)

    results = no_error(together(2, work))
    assert "rank 1: it has written nothing for" in str(results[0]) and results[1] == "None"
    assert names(tmp_path / "a") == []


def test_updates_wait_for_every_copy_and_for_nothing_else(tmp_path):
    """The weights are being written still while the ranks change theirs; the checkpoint has what was."""
    state, writing, go = whole_state(), threading.Event(), threading.Event()

    def slow(folder: Path, model: dict) -> None:
        writing.set()
        assert go.wait(20)
        write_model(folder, model)

    def work(ranks: Ranks) -> None:
        run = open_all(tmp_path, ranks)
        made = snapshot(ranks, state, write=slow)
        path = run.save_checkpoint(1, made, wait=False)
        run.wait_for_copies()
        for tensor in made._optimizer_state.values():
            tensor.zero_()
        ranks.barrier()
        if ranks.first:
            assert writing.wait(20) and not path.exists()
            go.set()
        run.close()

    no_error(together(3, work))
    found = load(tmp_path / "a" / "checkpoints" / "step-000001", state, 1)
    assert equal(found[0], state)


def test_a_folder_that_takes_no_checkpoint_does_not_hold_up_the_update(tmp_path):
    """Of one rank too: what is never written needs no copies."""

    def work(ranks: Ranks) -> Any:
        run = open_all(tmp_path, ranks)
        if ranks.first:
            (run.path / "checkpoints").write_text("a file")
        run.save_checkpoint(1, snapshot(ranks, whole_state()), wait=False)
        run.wait_for_copies()
        said = run.writer_error()
        with pytest.raises(RunFolderError, match="step-000002 could not be written"):
            run.save_checkpoint(2, snapshot(ranks, whole_state()))
        run.close()
        return str(said)

    for world in (1, 2):
        results = no_error(together(world, work))
        assert "step-000001 could not be written" in results[0] and results[1:] == ["None"] * (world - 1)
        shutil.rmtree(tmp_path / "a")


@pytest.mark.parametrize("there", [[0], [1], [0, 1, 2]])
def test_ranks_killed_between_shards_leave_the_checkpoint_before(there, tmp_path):
    def begin(ranks: Ranks) -> None:
        run = open_all(tmp_path, ranks)
        run.log({"step": 2})
        run.save_checkpoint(2, snapshot(ranks, whole_state(), 2))
        run.log({"step": 4})
        run.close()

    no_error(together(3, begin))
    aside = tmp_path / "a" / "checkpoints" / "step-000004.tmp"
    aside.mkdir()
    for rank in there:
        snapshot(Ranks(rank, 3), whole_state(), 4).write(aside)
    (aside / "training" / "optimizer-00002-of-00003.safetensors.part").write_text("half")

    def again(ranks: Ranks) -> int:
        return open_all(tmp_path, ranks, resume=True).checkpoint.loop.step

    assert no_error(together(2, again)) == [2, 2]
    assert names(tmp_path / "a") == ["step-000002"]
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == '{"step": 2}\n'


# ---- errors of the first rank reach all


def all_alike(results: list[Any], kind: type, word: str) -> None:
    assert {type(r) for r in results} == {kind} and len({str(r) for r in results}) == 1, results
    assert word in str(results[0])


def test_a_taken_folder_is_refused_on_all_ranks(tmp_path):
    first = RunFolder(str(tmp_path), "a", {})
    for work in (
        lambda ranks: open_all(tmp_path, ranks),
        lambda ranks: check_free(str(tmp_path), "a", ranks),
        lambda ranks: open_all(tmp_path, ranks, resume=True),
    ):
        all_alike(together(3, work), RunFolderError, "--run-name")
    first.close()
    assert no_error(together(3, lambda ranks: check_free(str(tmp_path), "b", ranks))) == [tmp_path / "b"] * 3


@pytest.mark.parametrize("damage", ["shard", "state", "weights"])
def test_a_damaged_checkpoint_is_refused_on_all_ranks(damage, tmp_path):
    def begin(ranks: Ranks) -> None:
        run = open_all(tmp_path, ranks)
        run.save_checkpoint(2, snapshot(ranks, whole_state(), 2))
        run.close()

    no_error(together(2, begin))
    folder = tmp_path / "a" / "checkpoints" / "step-000002"
    name = {"shard": shard_names(1, 2)[0], "state": "training/state.json", "weights": "model.safetensors"}[damage]
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    for world in (2, 3):
        all_alike(together(world, lambda ranks: open_all(tmp_path, ranks, resume=True)), CheckpointError, name)
        gc.collect()  # the errors' frames hold the lock
    assert names(tmp_path / "a") == ["step-000002"]


def test_a_tracker_that_does_not_start_is_said_on_all_ranks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    results = together(2, lambda ranks: open_all(tmp_path, ranks, use_wandb=True))
    all_alike(results, TrackerError, "pip install wandb")
    assert not (tmp_path / "a").exists()


def test_an_error_that_nobody_thought_of_reaches_all_ranks(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_folder, "_environment", refused)
    results = together(3, lambda ranks: open_all(tmp_path, ranks))
    assert isinstance(results[0], PermissionError)
    all_alike(results[1:], RunFolderError, "Permission denied")


def test_the_folder_is_in_use_until_the_last_rank_has_ended(tmp_path):
    runs = no_error(together(3, lambda ranks: open_all(tmp_path, ranks)))
    for run in runs[:2]:
        run._release()
        all_alike(together(2, lambda ranks: open_all(tmp_path, ranks, resume=True)), RunFolderError, "in use")
    runs[2]._release()
    no_error(together(2, lambda ranks: open_all(tmp_path, ranks, resume=True)))


# ---- what a run goes on from


class Rewards:
    def __init__(self, calls: int):
        self.set_counts({"calls": calls, "errors": calls // 10, "timeouts": 0})

    def counts(self) -> dict[str, int]:
        return dict(self.now)

    def set_counts(self, counts: dict[str, int]) -> None:
        self.now = dict(counts)


class Stream:
    def __init__(self):
        self.state: dict = {}

    def state_dict(self) -> dict:
        return {"cursor": 5}

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def progress_of(run: RunFolder, rewards: Rewards) -> Progress:
    def taken(tokenizer: Any, loop: LoopState, random: dict) -> Snapshot:
        shards, spans = shards_of(whole_state(), run.ranks.rank, run.ranks.world)
        model = {"w": torch.zeros(1)} if run.ranks.first else {}
        return Snapshot(model, shards, write_model, loop, random, spans=spans, ranks=run.ranks)

    policy = SimpleNamespace(numbers=lambda: {"updates": 1}, snapshot=taken)
    return Progress(run, policy, None, Stream(), rewards, SimpleNamespace(state={"alarm": [1]}))


@pytest.mark.parametrize(("world", "tp", "then"), [(4, 1, 4), (4, 2, 4), (4, 1, 2), (2, 1, 1), (1, 1, 3)])
def test_rewards_are_counted_over_all_engines_and_go_on_from_their_sum(world, tp, then, tmp_path, capsys):
    def begin(ranks: Ranks) -> dict:
        progress = progress_of(open_all(tmp_path, ranks), Rewards(10 * (ranks.rank + 1) if ranks.speaks else 0))
        progress.finished(7)
        progress.save(wait=False)
        progress._run.close()
        return progress.loop.rewards

    total = 10 * sum(rank + 1 for rank in range(0, world, tp))
    assert no_error(together(world, begin, tp)) == [{"calls": total, "errors": total // 10, "timeouts": 0}] * world

    def go_on(ranks: Ranks) -> int:
        rewards = Rewards(0)
        run = open_all(tmp_path, ranks, resume=True)
        progress = progress_of(run, rewards)
        progress.resume(run.checkpoint)
        assert progress.loop.step == 7 and progress._stream.state == {"cursor": 5}
        assert progress._alarms.state == {"alarm": [1]}
        own = rewards.counts()["calls"]
        progress.finished(8)
        assert progress.loop.rewards["calls"] == total
        return own

    capsys.readouterr()
    assert no_error(together(then, go_on)) == [total] + [0] * (then - 1)
    said = [e for e in events(tmp_path / "a") if e["event"] == "other_ranks"]
    if (world, tp) == (then, 1):
        assert said == []
    else:
        assert len(said) == 1 and said[0]["step"] == 7
        assert f"checkpoint of {world} rank" in said[0]["message"] and f"goes on as {then} rank" in said[0]["message"]
        assert said[0]["message"] in capsys.readouterr().out


# ---- processes


def processes(world: int, *arguments: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        env = os.environ | {k: str(v) for k, v in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        command = [sys.executable, str(Path(__file__).with_name("checkpoint_run.py")), *arguments]
        started.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    ends = [p.communicate(timeout=300)[1] for p in started]
    assert [p.returncode for p in started] == [0] * world, "\n".join(ends)[-4000:]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes under gloo left of their runs: tests/checkpoint_run.py."""
    folder = tmp_path_factory.mktemp("processes")
    processes(2, str(folder))
    return folder


@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_two_processes_save_beside_the_run_and_one_or_two_go_on(kind, two_processes):
    """A sharded policy: the update that came while the checkpoint was written is made again by those who go on from it,
    to the bit, with the same random numbers where they are as many."""
    import checkpoint_run
    from transformers import AutoModelForCausalLM

    (folder,) = (two_processes / kind / "checkpoints").iterdir()
    assert folder.name == "step-000001" and read_checkpoint(folder).world == 2
    if kind == "whole":
        AutoModelForCausalLM.from_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    else:
        assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    first, two = (torch.load(two_processes / f"{kind}-{t}.pt", weights_only=False) for t in ("begin", "resume"))
    one = checkpoint_run.run(two_processes, kind, Ranks(), resume=True)
    assert first["drawn"][0] != first["drawn"][1]
    assert two["drawn"] == first["drawn"] and one["drawn"][0] not in first["drawn"]
    for then in (one, two):
        assert equal(then["state"], first["state"])
        assert then["numbers"] == first["numbers"] and then["calls"] == 20
    assert [e["event"] for e in events(two_processes / kind)] == ["resumed", "resumed", "other_ranks"]
