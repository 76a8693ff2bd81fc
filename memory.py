"""The memory plan: what each part of a run takes on the GPU, and whether the engine may stay while the policy trains.

Everything is predicted before anything is allocated, from the model's config and the run's sizes. Estimates are rounded
up; `python train.py` prints the table with the choice and its reason.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from optimizer import PIECE_ELEMENTS, SLOTS

GIB = 2**30
USABLE = 0.94  # of the free memory: the rest is for fragmentation and libraries' workspaces
MICRO_BATCH_CHOICES = (16384, 8192, 4096)  # tokens, in order of preference
WEIGHT_AND_GRADIENT = 2 + 4  # bytes a parameter: bf16 weight, fp32 gradient
SLOT_BYTES = SLOTS * 3 * 4 * PIECE_ELEMENTS  # of an offloaded optimizer, on the GPU
MASTER_AND_MOMENTS = 4 + 8  # fp32 master, two fp32 Adam moments; in host memory if offloaded


class MemoryPlanError(RuntimeError):
    """The run does not fit; the message says what takes what and which flags help."""


@dataclass(frozen=True)
class ModelSizes:
    """Counts read from a config, without allocating the model."""

    parameters: int
    linear_layers: dict[str, int]  # HF name -> weights, of the layers that a sampler's format quantizes
    kv_bytes_per_token: int
    layers: int
    hidden: int
    intermediate: int
    vocab: int


def model_sizes(config: Any, trust_remote_code: bool = False) -> ModelSizes:
    """Sizes of the causal LM that `config` (transformers) describes. Raises ValueError if it describes none."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    return ModelSizes(
        parameters=sum(p.numel() for p in model.parameters()),
        linear_layers={n: m.weight.numel() for n, m in linear.items()},
        kv_bytes_per_token=2 * config.num_hidden_layers * kv_heads * head_dim * 2,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocab=config.vocab_size,
    )


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided, and from which figures (bytes)."""

    sleep_level: int
    checkpointing: bool
    offload: bool
    micro_batch_tokens: int
    kv_cache: int
    reason: str
    kv_wanted: int = 0
    free: int = 0
    engine_weights: int = 0
    engine_workspace: int = 0  # while generating
    engine_graphs: int = 0  # stay even while the engine sleeps
    training_state: int = 0
    training_peak: int = 0

    @property
    def engine(self) -> int:
        """Bytes of the awake engine."""
        return self.engine_weights + self.engine_graphs + self.engine_workspace + self.kv_cache

    def table(self) -> str:
        """The plan as text, in GiB."""
        rows = [
            ("engine weights", self.engine_weights),
            ("engine CUDA graphs, workspace", self.engine_graphs + self.engine_workspace),
            (f"KV cache (wanted {self.kv_wanted / GIB:.1f})", self.kv_cache),
            ("policy, gradients" + ("" if self.offload else ", master, Adam"), self.training_state),
            ("activations, logits while training", self.training_peak),
            ("free on the device", self.free),
        ]
        lines = [f"  {name:<36}{size / GIB:8.1f} GiB" for name, size in rows]
        kept = "recomputed" if self.checkpointing else "kept"
        where = ", master and Adam in host memory" if self.offload else ""
        choice = (
            f"  activations {kept}{where}, {self.micro_batch_tokens} tokens a micro-batch; --sleep {self.sleep_level}"
        )
        return "\n".join(["memory plan", *lines, f"{choice}: {self.reason}"])


def plan_memory(
    sizes: ModelSizes,
    *,
    free: int,
    one_byte_weights: int,
    max_model_len: int,
    max_num_seqs: int,
    micro_batch_tokens: int | None,
    checkpointing: bool | None,
    offload: bool | None,
    sleep: str,
    kv_cache_gib: float | None = None,
) -> MemoryPlan:
    """Decide sleep level, activation checkpointing, micro-batch size and KV cache for `free` bytes, where the engine
    holds `one_byte_weights` of the parameters in an 8-bit format and the others in bf16.

    `micro_batch_tokens`, `checkpointing` and `offload` (master weights and moments in host memory) are chosen where
    they are None, `sleep` where it is "auto"; the first that fits is taken, in order of what it costs: smaller
    micro-batches, recomputed activations, an engine that sleeps at level 2 while the policy trains (the sync writes
    every weight anyway), an offloaded optimizer. An engine that stays has a KV cache for `max_num_seqs` full sequences;
    one that sleeps has what the training state leaves. Raises MemoryPlanError if nothing fits.
    """
    s = sizes
    usable = int(free * USABLE)
    weights = 2 * s.parameters - one_byte_weights
    graphs = 2 * GIB
    workspace = 12 * max_num_seqs * s.vocab  # sampler: a few fp32 copies of the logits
    least = s.kv_bytes_per_token * (max_model_len + 16)
    wanted = least * max_num_seqs if kv_cache_gib is None else int(kv_cache_gib * GIB)

    def try_plan(level: int, checkpoint: bool, tokens: int, on_host: bool) -> tuple[bool, MemoryPlan]:
        state = WEIGHT_AND_GRADIENT * s.parameters + (SLOT_BYTES if on_host else MASTER_AND_MOMENTS * s.parameters)
        block = tokens * (13 * s.hidden + 4.5 * s.intermediate) * 2  # what one layer keeps for backward
        activations = int(tokens * s.layers * s.hidden * 2 + block if checkpoint else s.layers * block)
        peak = activations + 5 * GIB + 4 * s.vocab * s.hidden  # logits by chunks, and the head's gradient
        training = state + peak + graphs
        awake = weights + graphs + workspace + (training - graphs if level == 0 else state)
        kv = min(wanted, usable - awake)
        enough = wanted if level == 0 and sleep == "auto" else least
        fits = kv >= enough and training <= usable
        if sleep != "auto":
            reason = "asked for"
        elif level == 0:
            reason = "engine, policy and optimizer fit together, so nothing sleeps"
        else:
            reason = (
                f"they do not fit together ({(awake + peak + wanted - usable) / GIB:.1f} GiB short); the sync rewrites "
                "every weight, so none is kept on the host"
            )
        return fits, MemoryPlan(
            level, checkpoint, on_host, tokens, kv, reason, wanted, free, weights, workspace, graphs, state, peak
        )

    levels = (0, 2) if sleep == "auto" else (int(sleep),)
    checkpoints = (False, True) if checkpointing is None else (checkpointing,)
    choices = MICRO_BATCH_CHOICES if micro_batch_tokens is None else (micro_batch_tokens,)
    sizes_of_micro_batch = dict.fromkeys(max(tokens, max_model_len) for tokens in choices)  # at least one sequence
    for on_host in (False, True) if offload is None else (offload,):
        for level, checkpoint in itertools.product(levels, checkpoints):
            for tokens in sizes_of_micro_batch:
                fits, plan = try_plan(level, checkpoint, tokens, on_host)
                if fits:
                    return plan
    raise MemoryPlanError(
        f"this run does not fit on the GPU.\n{plan.table()}\n"
        "What helps: a smaller --model; smaller --max-response-len, --max-num-seqs or --micro-batch-tokens; "
        "--gradient-checkpointing True; --offload-optimizer True; --sleep 2; --kv-cache-gib left out; other programs "
        "off the GPU"
    )
