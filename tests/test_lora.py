"""LoRA policies: peft's layers in the trainer, merged weights in the engine, adapters on the disk."""

import runtime  # noqa: F401  (first: it sets what torch and vLLM read at import)

# isort: split
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from small_models import CONFIGS, V
from transformers import AutoModelForCausalLM

import lora
import packing
from checkpoint import LoopState, random_states, read_checkpoint
from config import TINY_MODEL, Args, ConfigError
from lora import LoraError, LoraSettings
from memory import GIB, model_sizes, plan_memory
from policy import Batch, Policy, load_model
from quant_sync import SyncPlan
from weight_sources import Source

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import merge_lora

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
needs_engine = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
SETTINGS = LoraSettings(rank=4, alpha=8.0)


class NoTokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path) -> Path:
    """A small random model on the disk."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.15) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(folder: Path, random: bool = True, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """With adapters that change something, unless not `random`."""
    model = load_model(str(folder), torch.device("cpu")).to(dtype)
    lora.add_adapters(model, SETTINGS)
    if random:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return model


def batch(seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    prompts, responses = ([torch.randint(V, (n,), generator=g).tolist() for n in sizes] for sizes in ((3, 7), (5, 9)))
    return Batch(prompts, responses, torch.zeros(14), torch.ones(14), torch.ones(14).bool())


def step(policy: Policy) -> None:
    logprobs, _ = policy.logprobs(batch())
    (-logprobs.mean()).backward()
    policy.update()


def test_a_new_adapter_changes_nothing_and_a_trained_one_what_merging_says(folder):
    plain = Policy(load_model(str(folder), torch.device("cpu")).float())
    assert torch.equal(
        plain.logprobs(batch())[0], Policy(adapted(folder, random=False, dtype=torch.float32)).logprobs(batch())[0]
    )
    model = adapted(folder, dtype=torch.float32)
    ours, _ = Policy(model).logprobs(batch())
    plain.model.load_state_dict(dict(lora.merged_weights(model)))
    merged, _ = plain.logprobs(batch())
    torch.testing.assert_close(ours, merged, rtol=1e-4, atol=1e-4)
    assert (ours - Policy(adapted(folder, random=False, dtype=torch.float32)).logprobs(batch())[0]).abs().max() > 0.05


def test_adapters_alone_are_trained_and_fill_the_optimizer(folder):
    model = adapted(folder)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    policy = Policy(model, lr=0.01)
    step(policy)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved)
    layers = len(model.model.layers)
    assert len(moved) == len(policy.optimizer.masters) == 2 * 7 * layers
    assert policy.optimizer.bytes_resident == 12 * lora.trained(model)
    assert all(p.grad is None for p in model.parameters())


def test_the_sync_reads_every_weight_under_its_plain_name(folder):
    model = adapted(folder)
    plain = load_model(str(folder), torch.device("cpu"))
    found = lora.sources(model)
    assert found.keys() == dict(plain.named_parameters(remove_duplicate=False)).keys()
    for name, value in found.items():
        merged = isinstance(value, Source)
        assert merged == (name.endswith("_proj.weight")), name
        if not merged:
            assert torch.equal(value, plain.state_dict()[name])
    layer = model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    exact = layer.base_layer.weight.double() + 2.0 * b.double() @ a.double()
    got = found["model.layers.0.self_attn.q_proj.weight"].read(torch.device("cpu"))
    assert (got.double() - exact).abs().max() <= 2**-8 * exact.abs().max(), "one rounding to bf16"
    assert torch.equal(layer.base_layer.weight, plain.state_dict()["model.layers.0.self_attn.q_proj.weight"])


@needs_engine
@pytest.mark.parametrize("quant", ["fp8", "fp8-channel", "none"])
def test_the_engine_gets_the_bytes_of_the_merged_model(quant, start_engine):
    """And a stale factor is found."""
    model = adapted(Path(TINY_MODEL))
    policy = Policy(model, lr=0.05)
    engine = start_engine(TINY_MODEL, quant=quant)
    plan = SyncPlan.build(lora.sources(model), engine.model)
    step_on_tiny(policy)
    plan.sync()
    plan.verify(full=True)
    bytes_of = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    whole = load_model(TINY_MODEL, torch.device("cpu"))
    whole.load_state_dict(dict(lora.merged_weights(model)))
    SyncPlan.build(whole, engine.model).sync()
    for name, p in engine.model.named_parameters():
        assert torch.equal(p.view(torch.uint8), bytes_of[name].view(torch.uint8)), name
    step_on_tiny(policy)
    with pytest.raises(RuntimeError):
        plan.verify(full=True)


def step_on_tiny(policy: Policy) -> None:
    ids = [[5, 6, 7], [8, 9]]
    tokens = Batch(ids, [[10, 11], [12, 13, 14]], torch.zeros(5), torch.ones(5), torch.ones(5).bool())
    (-policy.logprobs(tokens)[0].mean()).backward()
    policy.update()


# ---- files


def test_a_checkpoint_has_adapters_that_peft_opens_and_training_goes_on(folder, tmp_path):
    import peft

    policy = Policy(adapted(folder), lr=0.01, warmup_steps=3)
    step(policy)
    target = tmp_path / "step-000001"
    target.mkdir()
    loop = LoopState(step=1, policy=policy.numbers(), random=random_states()[0])
    policy.snapshot(NoTokenizer(), loop, {}).write(target)
    size = sum(p.stat().st_size for p in target.glob("*.safetensors"))
    assert size < 2.5 * lora.trained(policy.model) + 2e5, "the adapters alone"
    opened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), target)
    ids = torch.tensor([[1, 2, 3]])
    policy.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(opened(ids).logits, policy.model(ids).logits, rtol=0.05, atol=0.15)
    policy.model.set_attn_implementation(packing.ATTENTION)
    other = Policy(adapted(folder, random=False), lr=0.01, warmup_steps=3)
    other.load_training(read_checkpoint(target))
    for _ in range(2):
        step(policy)
        step(other)
    ours, theirs = policy.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_merging_gives_what_the_sync_gave(folder, tmp_path, capsys, monkeypatch):
    model = adapted(folder)
    model.save_pretrained(tmp_path / "adapters")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: NoTokenizerOf())
    merge_lora.merge(tmp_path / "adapters", tmp_path / "merged", str(folder))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    for name, tensor in lora.merged_weights(model):
        assert torch.equal(whole[name], tensor), name
    for checkpoint, out, word in ((folder, "new", "no LoRA checkpoint"), (tmp_path / "adapters", "merged", "exists")):
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", str(checkpoint), str(tmp_path / out)])
        with pytest.raises(SystemExit, match=rf"error: .*{word}"):
            merge_lora.main()


class NoTokenizerOf:
    def save_pretrained(self, folder):
        pass


def test_adapters_of_another_model_are_refused(folder, tmp_path):
    adapted(Path(TINY_MODEL)).save_pretrained(tmp_path / "adapters")
    with pytest.raises(LoraError, match="do not fit this model"):
        lora.load_adapters(load_model(str(folder), torch.device("cpu")), tmp_path / "adapters")


# ---- flags and plan


@pytest.mark.parametrize("targets", ["nope", "q_proj,nope", "", "lm_head"])
def test_targets_that_match_nothing_are_named_with_those_that_there_are(folder, targets):
    model = load_model(str(folder), torch.device("cpu"))
    with pytest.raises(LoraError, match=r"--lora-targets .*down_proj.*q_proj.*all-linear"):
        lora.add_adapters(model, LoraSettings(4, 8.0, targets))
    assert not lora.has_adapters(model)


def test_some_targets_get_adapters(folder):
    model = load_model(str(folder), torch.device("cpu"))
    lora.add_adapters(model, LoraSettings(4, 8.0, "q_proj, v_proj"))
    found = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert found == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lora_rank": -1}, "--lora-rank is -1"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "--lora-alpha is 0.0"),
        ({"lora_rank": 4, "rollout_quant": "int4-sim"}, "int4-sim rounds whole weights"),
    ],
)
def test_flags_that_cannot_work(flags, words):
    with pytest.raises(ConfigError, match=words):
        Args(**flags).resolved()


def test_alpha_is_twice_the_rank_unless_said():
    assert Args(lora_rank=8).lora == LoraSettings(8, 16.0, "all-linear")
    assert Args(lora_rank=8, lora_alpha=4.0).lora.alpha == 4.0
    assert Args().lora is None


def test_the_plan_counts_adapters_and_a_frozen_base():
    """Qwen3-32B fits on one GPU of 139 GiB with FP8 rollouts: 61 GiB of base, 31 of engine."""
    from make_random_model import shape_config

    sizes = model_sizes(shape_config("qwen3-32b"), lora=LoraSettings(32, 64.0))
    per_layer = 32 * (5120 * (3 + 2) + 8192 * 2 + 1024 * 2 + 25600 * 3 + 5120 * 2)
    assert sizes.trained == 64 * per_layer and sizes.adapted == 7 * 64
    assert 30e9 < sizes.parameters - sizes.trained < 34e9
    plan = plan_memory(
        sizes, free=139 * GIB, one_byte_weights=sum(sizes.linear_layers.values()), max_model_len=1536, max_num_seqs=64,
        micro_batch_tokens=None, checkpointing=None, offload=None, sleep="auto", host_free=100 * GIB,
    )  # fmt: skip
    assert plan.training_state == 2 * sizes.parameters + 16 * sizes.trained
    assert not plan.offload and plan.used("train") <= 0.96 * 139 * GIB
    assert json.dumps(plan.table())
