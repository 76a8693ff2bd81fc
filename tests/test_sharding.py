"""One step on several ranks is the step of one: real processes, gloo, small fp32 models (tests/sharded_step.py).

fp32 tolerance: sums over ranks and micro-batches have another order.
"""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sharding import TokenLists
from weight_sources import packs_of

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(__file__).with_name("sharded_step.py")
CASES = ["qwen2", "qwen3", "llama", "recomputed", "updates", "sequence-tis", "offloaded", "bf16-moments", "lora", "few",
         "clipped", "whole", "whole-updates", "whole-lora"]  # fmt: skip


def run_ranks(world: int, *arguments: str, program: Path = PROGRAM, timeout: float = 300) -> list[str]:
    """What each rank printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        env = os.environ | {k: str(v) for k, v in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(program), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=env, cwd=ROOT, **pipes))
    ends = [p.communicate(timeout=timeout) for p in processes]
    assert [p.returncode for p in processes] == [0] * world, "\n".join(map("".join, ends))[-4000:]
    return [out for out, _ in ends]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """world -> case -> what tests/sharded_step.py wrote."""
    folder, found = tmp_path_factory.mktemp("steps"), {}
    for world in (1, 2, 4):
        run_ranks(world, str(folder / f"{world}.pt"), *CASES)
        found[world] = torch.load(folder / f"{world}.pt", weights_only=False)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_a_step_of_several_ranks_is_the_step_of_one(steps, world, case):
    found, expected = steps[world][case], steps[1][case]
    assert found["metrics"].keys() == expected["metrics"].keys()
    for key, value in expected["metrics"].items():
        assert found["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert expected["metrics"]["train/updates_applied"] == (3 if "updates" in case else 1)
    assert expected["metrics"]["train/grad_norm"] > 1e-3
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        # Adam's first update is the gradient's sign: where a gradient is zero but for rounding, it may be either.
        off = (found["weights"][name] - weight).abs() > 2e-5
        assert off.float().mean() < 0.01, name
    assert found["floor"] < 1e-5 and expected["floor"] < 1e-5
    for a, b in zip(found["logged"], expected["logged"], strict=True):
        assert len(a) == len(b) > 0 and a == pytest.approx(b, abs=1e-4)


def test_the_check_for_gpus_says_what_agrees(tmp_path):
    """scripts/check_ranks.py, with the built-in model; and a step of other samples is told apart."""
    sizes = ["--shape", "tiny", "--prompt-len", "16", "--response-len", "16", "--micro-batch-tokens", "64"]
    program, one = ROOT / "scripts" / "check_ranks.py", str(tmp_path / "one.pt")
    run_ranks(1, *sizes, "--prompts", "4", "--out", one, program=program)
    for how in ("--reshard-after-forward", "--no-reshard-after-forward"):
        out = run_ranks(
            2, *sizes, "--prompts", "4", "--compare", one, how, "--repeat", "2", "--profile", program=program
        )
        assert "within the tolerance" in out[0] and "tiny, 2 rank(s)" in out[0] and out[1] == ""
        assert re.search(r"once more, 2: \d+\.\d+ s\nprofiled: \d+\.\d+ s; no GPU\n(?s:.*)aten::mm", out[0])
    with pytest.raises(AssertionError, match=r"beyond the tolerance: .*train/tokens"):
        run_ranks(2, *sizes, "--prompts", "3", "--compare", one, program=program)


GATHER = """
import sys
sys.path.insert(0, {root!r})
import runtime
import torch

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from ranks import Ranks
from weight_sources import PackedGather, packs_of

ranks = Ranks.start()
mesh = init_device_mesh("cpu", (ranks.world,))
torch.manual_seed(0)
shapes = [(1,), (5, 3), (7,), (6, 4), (2, 129), (300, 2)]  # fewer rows than ranks, a rest, none
for dtype in (torch.bfloat16, torch.float32):
    expected = [torch.randn(shape).to(dtype) for shape in shapes]
    pairs = [(distribute_tensor(t, mesh, [Shard(0)]), torch.full_like(t, torch.nan)) for t in expected]
    gathers = [PackedGather(pairs[:4]), PackedGather(pairs[4:])]
    scratch = torch.empty(max(g.scratch_bytes for g in gathers), dtype=torch.uint8)
    for gather in gathers:
        gather.use(scratch)
    for turn in range(2):
        for (shard, _), t in zip(pairs, expected):
            t.add_(1)
            shard.to_local().add_(1)
        for gather in gathers:
            gather()
        assert all(torch.equal(whole, t) for (_, whole), t in zip(pairs, expected)), (dtype, turn)
assert [len(pack) for pack in packs_of(pairs)] == [6]
print("gathered", flush=True) if ranks.first else None
ranks.finish()
"""


def test_tensors_that_are_gathered_together_arrive_whole(tmp_path):
    program = tmp_path / "gather.py"
    program.write_text(GATHER.format(root=str(ROOT)))
    assert "gathered" in run_ranks(3, program=program)[0]


def test_packs_are_no_larger_than_they_may_be(monkeypatch):
    monkeypatch.setattr("weight_sources.PACK_BYTES", 100)
    wholes = [torch.empty(n, dtype=torch.uint8) for n in (60, 40, 1, 99, 1, 100, 30)]
    packs = list(packs_of([(whole, whole) for whole in wholes]))
    assert [[len(whole) for _, whole in pack] for pack in packs] == [[60, 40], [1, 99], [1], [100], [30]]


def test_token_ids_are_not_looked_through():
    """What FSDP2 calls on its arguments does not enter it: a list it enters, and a dataclass."""
    from torch.distributed import utils

    tokens = TokenLists([[1, 2]] * 8, [[3, 4, 5]] * 8)
    (args,), _ = utils._to_kwargs((tokens,), None, torch.device("cpu"), False)
    assert args == (tokens,) and args[0].prompt_ids is tokens.prompt_ids
    assert torch.utils._pytree.tree_leaves(tokens) == [tokens]
    assert not dataclasses.is_dataclass(tokens) and not isinstance(tokens, (list, tuple, dict))
