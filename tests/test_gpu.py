"""On a GPU only: sleep level 2 drops every weight, and the sync alone brings the same engine back."""

import runtime  # noqa: F401

# isort: split
from pathlib import Path

import pytest
import torch

from policy import load_model
from quant_sync import SyncPlan
from rollout import Engine, EngineError

pytestmark = pytest.mark.gpu
TINY = str(Path(__file__).resolve().parent.parent / "assets" / "tiny-adder")


def greedy(engine: Engine) -> list[list[int]]:
    prompts = [[1, 260 + i, 265, 270 + i, 2] for i in range(16)]
    return [group[0].token_ids for group in engine.generate(prompts, n=1, max_tokens=12, greedy=True)]


def test_sync_refills_an_engine_that_dropped_its_weights():
    engine = Engine(
        TINY, tokenizer=None, quant="fp8", max_model_len=64, max_num_seqs=16, kv_cache_bytes=2**28, sleep_level=2,
        memory_fraction=0.2,
    )  # fmt: skip
    model = load_model(TINY, torch.device("cuda"))
    plan = SyncPlan.build(model.state_dict(), engine.model)
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)
    engine.publish(0)
    before = greedy(engine)
    addresses = [p.data_ptr() for p in engine.model.parameters()]
    free_awake = torch.cuda.mem_get_info()[0]

    engine.sleep()
    assert torch.cuda.mem_get_info()[0] - free_awake >= 2**28  # the KV cache at least
    with pytest.raises(EngineError, match="wake, sync and publish"):
        greedy(engine)
    engine.wake("weights")
    for parameter in engine.model.parameters():  # whatever the memory held, it is not the weights
        data = parameter.data if parameter.data.is_contiguous() else parameter.data.t()
        data.view(torch.uint8).fill_(0x7F)
    plan.sync()
    assert plan.verify(full=True) == len(plan.rows)
    engine.publish(1)
    engine.wake("kv_cache")
    assert [p.data_ptr() for p in engine.model.parameters()] == addresses
    assert greedy(engine) == before

    # CUDA graphs were captured before all of this: they must read the new weights, not remembered ones.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.empty_like(parameter).uniform_(0.2, 1.8))
    plan.sync()
    engine.publish(2)
    assert greedy(engine) != before
