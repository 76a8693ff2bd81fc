"""The memory plan: what each part of a run takes on the GPU, and whether the engine may stay while the policy trains.

Everything is predicted before anything is allocated, from the model's config and the run's sizes. Estimates are rounded
up; `python train.py` prints the table with the choice and its reason.
"""

from dataclasses import dataclass
from typing import Any

import torch

GIB = 2**30
USABLE = 0.94  # of the free memory: the rest is for fragmentation and libraries' workspaces
TRAIN_BYTES_PER_PARAMETER = 2 + 4 + 4 + 8  # bf16 weight, fp32 gradient, fp32 master, two fp32 Adam moments


class MemoryPlanError(RuntimeError):
    """The run does not fit; the message says what takes what and which flags help."""


@dataclass(frozen=True)
class ModelSizes:
    """Counts read from a config, without allocating the model."""

    parameters: int
    linear_parameters: int  # in the layers' linear weights: one byte each under FP8
    kv_bytes_per_token: int
    layers: int
    hidden: int
    intermediate: int
    vocab: int


def model_sizes(config: Any) -> ModelSizes:
    """Sizes of the causal LM that `config` (transformers) describes."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    return ModelSizes(
        parameters=sum(p.numel() for p in model.parameters()),
        linear_parameters=sum(m.weight.numel() for m in linear),
        kv_bytes_per_token=2 * config.num_hidden_layers * kv_heads * head_dim * 2,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocab=config.vocab_size,
    )


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided and from which figures (bytes)."""

    free: int
    engine_weights: int
    engine_other: int
    kv_cache: int
    kv_wanted: int
    training_state: int
    training_peak: int
    sleep_level: int
    reason: str

    @property
    def engine(self) -> int:
        """Bytes of the awake engine."""
        return self.engine_weights + self.engine_other + self.kv_cache

    def table(self) -> str:
        """The plan as text, in GiB."""
        rows = [
            ("engine weights", self.engine_weights),
            ("engine CUDA graphs, workspace", self.engine_other),
            (f"KV cache (wanted {self.kv_wanted / GIB:.1f})", self.kv_cache),
            ("policy, gradients, master, Adam", self.training_state),
            ("activations, logits while training", self.training_peak),
            ("free on the device", self.free),
        ]
        lines = [f"  {name:<36}{size / GIB:8.1f} GiB" for name, size in rows]
        return "\n".join(["memory plan", *lines, f"  --sleep {self.sleep_level}: {self.reason}"])


def plan_memory(
    sizes: ModelSizes,
    *,
    free: int,
    fp8: bool,
    max_model_len: int,
    max_num_seqs: int,
    micro_batch_tokens: int,
    checkpointing: bool,
    sleep: str,
    kv_cache_gib: float | None = None,
) -> MemoryPlan:
    """Decide sleep level and KV cache size for `free` bytes.

    The engine stays resident when everything fits together with a KV cache for `max_num_seqs` full sequences; else it
    sleeps at level 2 while the policy trains (the sync writes every weight anyway) and the KV cache gets what the
    training state leaves. `sleep` is auto, 0, 1 or 2. Raises MemoryPlanError if not even one sequence fits.
    """
    s = sizes
    weights = 2 * s.parameters - (s.linear_parameters if fp8 else 0)
    engine_other = 2 * GIB + 12 * max_num_seqs * s.vocab  # sampler: a few fp32 copies of the logits
    wanted = s.kv_bytes_per_token * (max_model_len + 16) * max_num_seqs
    if kv_cache_gib is not None:
        wanted = int(kv_cache_gib * GIB)
    least = s.kv_bytes_per_token * (max_model_len + 16)
    state = TRAIN_BYTES_PER_PARAMETER * s.parameters
    block = micro_batch_tokens * (13 * s.hidden + 4.5 * s.intermediate) * 2  # what one layer keeps for backward
    activations = int(micro_batch_tokens * s.layers * s.hidden * 2 + block if checkpointing else s.layers * block)
    peak = activations + 4 * GIB  # chunked logits and their gradient
    usable = int(free * USABLE)

    def plan(level: int, kv: int, reason: str) -> MemoryPlan:
        return MemoryPlan(free, weights, engine_other, kv, wanted, state, peak, level, reason)

    beside_training = usable - weights - engine_other - state - peak
    beside_state = usable - weights - engine_other - state
    forced = None if sleep == "auto" else int(sleep)
    if forced == 0 or (forced is None and beside_training >= wanted):
        kv, level = min(wanted, beside_training), 0
        reason = "asked for" if forced == 0 else "engine, policy and optimizer fit together, so nothing sleeps"
    else:
        kv, level = min(wanted, beside_state), 2 if forced is None else forced
        reason = (
            "asked for"
            if forced is not None
            else f"they do not fit together ({(wanted - beside_training) / GIB:.1f} GiB short); the sync rewrites "
            "every weight, so none is kept on the host"
        )
    chosen = plan(level, kv, reason)
    if kv < least or state + peak > usable:
        raise MemoryPlanError(
            f"this run does not fit on the GPU.\n{chosen.table()}\n"
            "What helps: a smaller --model; smaller --max-response-len, --max-num-seqs or --micro-batch-tokens; "
            "--gradient-checkpointing; --sleep 2; --kv-cache-gib left out; other programs off the GPU"
        )
    return chosen
