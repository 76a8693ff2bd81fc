"""Shared by all tests: small random models, the real engine, and why a test is skipped.

`runtime` comes first: it settles the threads and vLLM's switches before anything imports torch.
"""

import runtime  # noqa: F401

# isort: split
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device():
    """Where the engine's and the policy's tensors live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory, device):
    """make_model("qwen2" | "qwen3" | "llama", tied=..., config fields) -> (HF model in bf16, its saved folder).

    Two layers of width 128; q and k differ in shape. 200 tokens, which vLLM pads to 256. Norms and biases are random
    and weights larger than usual: no tensor has a value that a mistake would also give, no distribution is uniform.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    extra = {"qwen2": {}, "qwen3": {"head_dim": 32}, "llama": {"attention_bias": True}}

    def make(family, *, tied, seed=0, **overrides):
        config = AutoConfig.for_model(
            family,
            vocab_size=200,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.05,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            dtype="bfloat16",
            **(extra[family] | overrides),
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            for name, p in model.named_parameters():
                if name.endswith("bias"):
                    p.normal_(std=0.1)
                elif "norm" in name:
                    p.uniform_(0.5, 1.5)
        folder = tmp_path_factory.mktemp(f"{family}-{'tied' if tied else 'untied'}")
        model.save_pretrained(folder)
        return model.eval().to(device), str(folder)

    return make


@pytest.fixture(scope="session")
def start_engine():
    """rollout.Engine with the sizes of a small model; some seconds each, so keep it and use it again.

    Every engine lives until pytest ends: vLLM's finalizer tears down the process groups that all engines of a
    process share, and a later engine would break at whatever moment the collector found an earlier one.
    """
    import rollout

    alive = []

    def start(folder, *, quant, tokenizer=None, **options):
        sizes = {"max_model_len": 128, "max_num_seqs": 64, "kv_cache_bytes": 1 << 27} | options
        alive.append(rollout.Engine(folder, tokenizer=tokenizer, quant=quant, **sizes))
        return alive[-1]

    yield start
    alive.clear()


@pytest.fixture
def run_with_triton():
    """Run a Python script in a process of its own, with Triton's interpreter or its compiler; returns what it printed.
    TRITON_INTERPRET is read when Triton is imported."""

    def run(script, interpreted):
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        if interpreted:
            env["TRITON_INTERPRET"] = "1"
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
