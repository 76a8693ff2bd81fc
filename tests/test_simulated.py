"""Formats that only exist as rounded bf16 weights (int4-sim, ...), and evaluating checkpoints: with the real engine."""

import runtime  # noqa: F401  (first: it sets what torch and vLLM read at import)

# isort: split
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import TINY_MODEL
from engine_options import SIMULATED
from policy import load_model
from quant_sync import SyncError, SyncPlan
from weight_sources import Source, rounded_sources

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", SIMULATED.values())
def test_weights_lie_on_a_grid_of_so_many_bits_a_row(bits):
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[3] = 0
    before = weight.clone()
    rounded = Source.rounded("w", weight, bits).read(CPU)
    assert torch.equal(weight, before) and rounded.dtype == torch.bfloat16
    largest = 2 ** (bits - 1) - 1
    assert all(len(row.unique()) <= 2 * largest + 1 for row in rounded)
    assert max(len(row.unique()) for row in rounded) > largest
    step = weight.float().abs().amax(1, keepdim=True) / largest
    assert ((rounded.float() - weight.float()).abs() <= step * 0.51).all()
    torch.testing.assert_close(rounded.abs().amax(1), weight.abs().amax(1))
    assert not rounded[3].any()


@pytest.fixture(scope="module")
def rig(start_engine):
    model = load_model(TINY_MODEL, CPU)
    skip = ["model.layers.0.mlp.down_proj"]
    engine = start_engine(TINY_MODEL, quant="int3-sim")
    plan = SyncPlan.build(rounded_sources(model, SIMULATED["int3-sim"], skip), engine.model)
    plan.check_formats("int3-sim", skip)
    return model, engine, plan, skip


def test_only_linear_layers_are_rounded_and_follow_the_policy(rig):
    model, engine, plan, skip = rig
    plan.sync()
    plan.verify(full=True)
    held = dict(engine.model.named_parameters())
    weights = dict(model.named_parameters())
    assert torch.equal(held["model.embed_tokens.weight"][: weights["model.embed_tokens.weight"].shape[0]],
                       weights["model.embed_tokens.weight"])  # fmt: skip
    assert torch.equal(held["model.norm.weight"], weights["model.norm.weight"])
    assert torch.equal(held[f"{skip[0]}.weight"], weights[f"{skip[0]}.weight"])
    name = "model.layers.0.self_attn.o_proj.weight"
    assert all(len(row.unique()) <= 7 for row in held[name]) and not torch.equal(held[name], weights[name])
    with torch.no_grad():
        weights[name].mul_(1.5)
    with pytest.raises(SyncError, match="o_proj"):
        plan.verify(full=True)
    plan.sync()
    plan.verify(full=True)


def test_vllms_loader_agrees(rig):
    _, engine, plan, _ = rig
    assert plan.prove(engine.load_by_vllm) == len(plan.rows)


def run_evaluate(*arguments):
    command = [sys.executable, "scripts/evaluate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_checkpoints_are_evaluated_in_bf16(tmp_path):
    """The built-in model against a copy whose head is spoiled: one engine, one sync each."""
    from transformers import AutoTokenizer

    broken = load_model(TINY_MODEL, CPU)
    with torch.no_grad():
        broken.model.norm.weight.zero_()
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(tmp_path / "broken")
    run = run_evaluate(TINY_MODEL, tmp_path / "broken", "--eval-size", 128, "--out", tmp_path / "a.json")
    assert run.returncode == 0, run.stderr[-2000:]
    good, bad = json.loads((tmp_path / "a.json").read_text())
    assert 0.35 < good["accuracy"] < 0.7 and bad["accuracy"] < 0.1
    assert good["standard_error"] == pytest.approx((good["accuracy"] * (1 - good["accuracy"]) / 128) ** 0.5)
    assert (good["prompts"], good["quant"]) == (128, "none")


def test_what_is_no_checkpoint_is_named(tmp_path):
    run = run_evaluate(tmp_path / "nowhere")
    assert run.returncode == 1 and "nowhere: no folder with a config.json" in run.stderr
