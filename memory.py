"""The memory plan: what each part of a run takes on the GPU, and whether the engine may stay while the policy trains.

Everything is predicted before anything is allocated, from the model's config and the run's sizes; `python train.py`
prints the table with each choice and its reason, and after the first step what was really used. With several GPUs all
figures are those of one of them, all have the same plan, and FSDP2's shards and --tp divide what can be divided.
"""

import ctypes
import itertools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from head_logprobs import CHUNK_ELEMENTS
from lora import LoraSettings, add_adapters, trained
from optimizer import PIECE_ELEMENTS, SLOTS, STATE_BYTES
from quant_sync import STAGING_BYTES
from weight_sources import PACK_BYTES

GIB = 2**30
USABLE = 0.96  # of the free memory: the rest is for fragmentation
HOST_USABLE = 0.85  # of the host's: the other processes of the run live there too
LIBRARIES = int(0.6 * GIB)  # their handles, loaded kernels and workspaces
# The engine's CUDA graphs and its runner's buffers, which stay even while it sleeps: a constant, and more for each
# layer and each element of the hidden size. Fitted to what engines took beside weights, KV cache and LIBRARIES (one
# H200, vLLM 0.26, --max-num-seqs 512), in GiB, with the fit in brackets: 0.5B 1.0 in FP8, 1.1 in bf16, 0.9 in sleep
# mode (0.95); 1.5B 1.15, 1.05 in sleep mode (1.12); 7B 1.5 (1.51); 32B in sleep mode 2.2 (2.23). tests/test_memory.py
# has the runs.
GRAPHS = GIB // 2
GRAPHS_LAYER = 12 * 2**20
GRAPHS_WIDTH = 200 * 2**10
PREFILL_TOKENS = 16384  # of prompts in one pass of the engine: vLLM's own choice on a large GPU, half of it on others
NCCL = GIB  # buffers and channels of the ranks' communicators, where there are several; fits runs on two GPUs
MICRO_BATCH_CHOICES = (16384, 8192, 4096)  # tokens, in order of preference
LOGPROB_TOKENS = 65536  # at most in a pass without gradient, unless a micro-batch is larger
GRADIENT = 4  # bytes a trained parameter, fp32


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
    query: int  # heads x head size
    key: int  # key/value heads x head size
    norms_of_heads: bool = False  # Qwen3's of q and k
    trained: int | None = None  # parameters with gradient and optimizer state; None: all
    adapted: int = 0  # linear layers with an adapter, and its rank
    rank: int = 0
    kv_heads: int = 1
    root: int = 0  # parameters outside the layers: embeddings, last norm, head

    def kv_bytes_of_rank(self, tp: int) -> int:
        """A token's keys and values on one of `tp` ranks that hold an engine together: heads are dealt out, and where
        there are fewer than ranks, each is held by several."""
        return self.kv_bytes_per_token * max(1, self.kv_heads // tp) // self.kv_heads


def model_sizes(config: Any, trust_remote_code: bool = False, lora: LoraSettings | None = None) -> ModelSizes:
    """Sizes of the causal LM that `config` (transformers) describes, with adapters if there are to be some. Raises
    ValueError if it describes none, LoraError for adapters that fit nowhere."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    adapters = {}
    if lora is not None:
        with torch.device("meta"):
            add_adapters(model, lora)
        adapted = sum(hasattr(m, "lora_A") for m in model.modules())
        adapters = {"trained": trained(model), "adapted": adapted, "rank": lora.rank}
    return ModelSizes(
        parameters=sum(p.numel() for p in model.parameters()),
        linear_layers={n: m.weight.numel() for n, m in linear.items()},
        kv_bytes_per_token=2 * config.num_hidden_layers * kv_heads * head_dim * 2,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocab=config.vocab_size,
        query=config.num_attention_heads * head_dim,
        key=kv_heads * head_dim,
        norms_of_heads=any(n.endswith("q_norm.weight") for n, _ in model.named_parameters()),
        kv_heads=kv_heads,
        root=sum(p.numel() for n, p in model.named_parameters() if ".layers." not in n),
        **adapters,
    )


def activation_bytes(s: ModelSizes, tokens: int, checkpointing: bool, compiled: bool) -> int:
    """What the forward pass of a micro-batch keeps for its backward pass, and the head's part of that pass.

    Measured at the 1.5B shape (docs/results/step_h200.md).
    """
    head = 2 * min(CHUNK_ELEMENTS, tokens * s.vocab) * 2  # logits
    if s.trained is None:
        head += 6 * s.vocab * s.hidden  # the weight's gradient
    return int(2 * tokens * _kept_of_token(s, checkpointing, compiled) + head)


def _kept_of_layer(s: ModelSizes, compiled: bool) -> int:
    """Elements that a layer keeps of a token: compiled, its inputs, what goes into and comes out of attention, and
    gate, up and their product; eager, each operation's own."""
    norms = s.query + s.key if s.norms_of_heads else 0
    if compiled:
        return 4 * s.hidden + 2 * s.query + 2 * s.key + norms + 3 * s.intermediate
    return 7 * s.hidden + 3 * s.query + 3 * s.key + 2 * norms + 4 * s.intermediate


def _kept_of_token(s: ModelSizes, checkpointing: bool, compiled: bool) -> float:
    """Elements that a forward pass keeps of a token for its backward pass."""
    layer = _kept_of_layer(s, compiled)
    kept = s.layers * s.hidden + 2 * layer if checkpointing else s.layers * layer  # recomputed with its gradients
    return kept + s.adapted * s.rank / (s.layers if checkpointing else 1)  # an adapter's inner features


def logprob_tokens(s: ModelSizes, micro_batch_tokens: int, checkpointing: bool, compiled: bool) -> int:
    """Tokens of a pass without gradient in the memory of a micro-batch that is trained on: it keeps one layer's
    activations and two hidden states (what enters, what leaves), where training keeps every layer's; the head's chunks
    are the same, and its gradient is not there. As many times the micro-batch as that makes, up to LOGPROB_TOKENS."""
    times = int(_kept_of_token(s, checkpointing, compiled) / (_kept_of_layer(s, compiled) + 2 * s.hidden))
    return max(micro_batch_tokens, min(LOGPROB_TOKENS, times * micro_batch_tokens))


def graphs_bytes(s: ModelSizes) -> int:
    """The engine's CUDA graphs and its runner's buffers (the constants above)."""
    return GRAPHS + GRAPHS_LAYER * s.layers + GRAPHS_WIDTH * s.hidden


def workspace_bytes(s: ModelSizes, sequences: int, max_model_len: int, tp: int) -> int:
    """What the engine's passes take while it generates, the larger of two: the logits of all sequences, in bf16 and in
    fp32; a layer of a pass over prompts, with gate, up, their product and two hidden states."""
    tokens = min(PREFILL_TOKENS, sequences * max_model_len)
    return max(6 * sequences * s.vocab, 2 * tokens * (3 * s.intermediate // tp + 2 * s.hidden))


def sharding_bytes(s: ModelSizes, world: int, reshard: bool = True) -> int:
    """What FSDP2 has beside its shards while a micro-batch is trained on; nothing in a world of one.

    The bf16 weights of two layers (one computes, the next arrives) and of the root, which stays gathered; the bf16
    gradients of two layers and the root; and what is reduced in fp32: whole as it goes in, a shard as it comes out.
    Without `reshard` all weights are gathered, and all gradients have a sum in fp32.
    """
    if world == 1:
        return 0
    layer = (s.parameters - s.root) / s.layers
    learns = (layer, s.root) if s.trained is None else (s.trained / s.layers, 0)
    weights = 2 * (2 * layer + s.root) if reshard else 2 * s.parameters
    sums = 0 if reshard else GRADIENT * (s.parameters if s.trained is None else s.trained)
    gradients = 2 * (2 * learns[0] + max(0, learns[1] - s.vocab * s.hidden))  # the head's: activation_bytes
    return int(weights + sums + gradients + GRADIENT * sum(learns) * (1 + 1 / world))


def sync_bytes(s: ModelSizes, world: int) -> int:
    """The sync's two staging buffers, for weights that do not lie as they are needed: shards, or layers with adapters.
    Each holds the largest parameter of the engine at least. Shards are sent from and received in memory of their own,
    and sharded adapters are kept whole.
    """
    if world == 1 and not s.rank:
        return 0
    largest = max(2 * s.intermediate * s.hidden, (s.query + 2 * s.key) * s.hidden)  # gate and up; q, k and v
    if world > 1:
        largest = max(largest, s.vocab * s.hidden)
    packs = 0 if world == 1 else int(min(PACK_BYTES, 2 * s.parameters) * (1 + 1 / world))
    adapters = 2 * s.trained if s.rank and world > 1 else 0
    return 2 * min(max(STAGING_BYTES, 2 * largest), 2 * s.parameters) + packs + adapters


def sequences_at_once(max_num_seqs: int, prompts: int, samples: int, engines: int = 1, dynamic: bool = True) -> int:
    """Sequences of a step that one of `engines` has at once: with dynamic sampling about twice what is kept."""
    return min(max_num_seqs, (2 if dynamic else 1) * -(-prompts // engines) * samples)


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided and why, and from which figures (bytes, of one GPU)."""

    sleep_level: int
    checkpointing: bool
    offload: bool
    micro_batch_tokens: int
    kv_cache: int
    kv_wanted: int = 0
    free: int = 0
    engine_weights: int = 0
    engine_graphs: int = 0
    engine_workspace: int = 0  # while generating
    policy: int = 0
    gradients: int = 0
    optimizer: int = 0  # masters and moments, or what they pass through from the host
    training_peak: int = 0  # of a micro-batch
    host: int = 0
    world: int = 1  # GPUs that have this plan, each for itself
    reshard: bool = False  # weights and gradient sums are whole on no GPU
    sharding: int = 0  # FSDP2's beside its shards, while training
    sync_buffers: int = 0
    logprob_tokens: int = 0  # of a pass without gradient
    reasons: dict[str, str] = field(default_factory=dict)  # flag -> why it is as it is

    @property
    def engine(self) -> int:
        """Bytes of the engine while it generates."""
        return self.engine_weights + self.engine_graphs + self.engine_workspace + self.kv_cache

    @property
    def libraries(self) -> int:
        return LIBRARIES + (NCCL if self.world > 1 else 0)

    @property
    def training_state(self) -> int:
        return self.policy + self.gradients + self.optimizer

    @property
    def usable(self) -> int:
        return int(self.free * USABLE)

    def used(self, phase: str) -> int:
        """Predicted bytes in use: "engine" built, "policy" and optimizer too, while in "rollout", while in "train"."""
        state = self.training_state + self.sync_buffers
        training = self.training_peak + self.sharding  # into what torch's allocator kept of the engine's workspace
        built = self.engine - self.engine_workspace
        return self.libraries + {
            "engine": built,
            "policy": built + state,
            "rollout": self.engine + state,
            "train": (built if self.sleep_level == 0 else self.engine_graphs) + state + training,
        }[phase]  # fmt: skip

    @property
    def peak(self) -> int:
        return max(self.used("rollout"), self.used("train"))

    @property
    def short(self) -> int:
        """Bytes that are lacking; none are where it is not positive."""
        return self.peak - self.usable

    def choices(self) -> dict[str, str]:
        """flag -> its value, of all that is chosen here."""
        return {
            "--sleep": str(self.sleep_level),
            "--offload-optimizer": str(self.offload),
            "--gradient-checkpointing": str(self.checkpointing),
            "--reshard-after-forward": str(self.reshard),
            "--micro-batch-tokens": str(self.micro_batch_tokens),
            "--kv-cache-gib": _gib(self.kv_cache),
        }

    def table(self) -> str:
        """The plan as text: what takes what, in GiB, and each choice with its reason."""
        several = self.world > 1
        rows = [
            ("engine weights", self.engine_weights),
            (f"KV cache (wanted {_gib(self.kv_wanted)})", self.kv_cache),
            ("CUDA graphs, the engine's buffers", self.engine_graphs),
            ("workspace while generating", self.engine_workspace),
            ("libraries" + (", communicators" if several else ""), self.libraries),
            ("policy", self.policy),
            ("gradients", self.gradients),
            ("optimizer, on its way from the host" if self.offload else "optimizer: master, Adam", self.optimizer),
            ("activations, logits of a micro-batch", self.training_peak),
            *([("gathered weights, gradients on their way", self.sharding)] if several else []),
            *([("the sync's staging buffers", self.sync_buffers)] if self.sync_buffers else []),
            ("most in use: generating", self.used("rollout")),
            ("             training", self.used("train")),
            ("free on the device", self.free),
        ]
        title = f"memory plan, per GPU, of {self.world}" if several else "memory plan"
        lines = [f"  {name:<40}{_gib(size):>8} GiB" for name, size in rows]
        chosen = [
            f"  {f'{flag} {value}':<32}{self.reasons[flag]}"
            for flag, value in self.choices().items()
            if flag in self.reasons
        ]
        return "\n".join([title, *lines, *chosen])


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _reasons(
    plan: MemoryPlan, instead: dict[str, MemoryPlan], asked: dict[str, Any], sequences: int, one_sequence: int
) -> dict[str, str]:
    """flag -> why its choice is as it is: asked for, fits, or what it saves and how much is lacking without it.

    `instead` has for a flag the plan with that one choice taken back, to what costs less; `asked` what the user gave,
    None where it was left open. `sequences` and their KV cache, bytes of one, are those of an engine.
    """
    why = {flag: "fits" if given is None else "asked for" for flag, given in asked.items()}
    open_choice = {flag for flag, given in asked.items() if given is None}
    if "--sleep" in open_choice:
        saved, short = plan.engine_weights + plan.kv_cache, instead["--sleep"].short
        why["--sleep"] = "fits: nothing sleeps" if plan.sleep_level == 0 else (
            f"saves {_gib(saved)} GiB while the policy trains; {_gib(short)} GiB short if the engine stayed, with all "
            "of its KV cache"
        )  # fmt: skip
    if plan.offload and "--offload-optimizer" in open_choice:
        here = instead["--offload-optimizer"]
        host = f"{_gib(plan.host)} in host memory" + (f", {plan.world} times" if plan.world > 1 else "")
        saved = here.optimizer - plan.optimizer
        why["--offload-optimizer"] = f"saves {_gib(saved)} GiB ({host}); {_gib(here.short)} GiB short without"
    if plan.checkpointing and "--gradient-checkpointing" in open_choice:
        kept = instead["--gradient-checkpointing"]
        saved = kept.training_peak - plan.training_peak
        why["--gradient-checkpointing"] = f"saves {_gib(saved)} GiB; {_gib(kept.short)} GiB short without"
    if plan.reshard and "--reshard-after-forward" in open_choice:
        whole = instead["--reshard-after-forward"]
        saved = whole.sharding - plan.sharding
        why["--reshard-after-forward"] = f"saves {_gib(saved)} GiB; {_gib(whole.short)} GiB short without"
    tokens, larger = plan.micro_batch_tokens, instead["--micro-batch-tokens"]
    if "--micro-batch-tokens" not in open_choice:
        if tokens != asked["--micro-batch-tokens"]:
            why["--micro-batch-tokens"] = f"one full sequence; {asked['--micro-batch-tokens']} were asked for"
    elif larger.micro_batch_tokens > tokens:
        saved = larger.training_peak - plan.training_peak
        short = f"{_gib(larger.short)} GiB short with {larger.micro_batch_tokens}"
        why["--micro-batch-tokens"] = f"saves {_gib(saved)} GiB; {short}"
    elif tokens > MICRO_BATCH_CHOICES[0]:
        why["--micro-batch-tokens"] = "one full sequence"
    room = min(sequences, plan.kv_cache // one_sequence)
    if plan.kv_cache < plan.kv_wanted:
        wanted = f"{_gib(plan.kv_wanted)} {'wanted' if '--kv-cache-gib' in open_choice else 'asked for'}"
        why["--kv-cache-gib"] = f"what is left, of {wanted}: room for {room} of {sequences} sequences at full length"
    elif "--kv-cache-gib" in open_choice:
        why["--kv-cache-gib"] = f"fits: {sequences} sequences at full length"
    return why


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
    reshard: bool | None = None,
    kv_cache_gib: float | None = None,
    compiled: bool = True,
    optimizer_states: str = "fp32",
    host_free: int | None = None,
    world: int = 1,
    tp: int = 1,
) -> MemoryPlan:
    """Decide sleep level, activation checkpointing, micro-batch size and KV cache for `free` bytes, where the engine
    holds `one_byte_weights` of the parameters in an 8-bit format and the others in bf16.

    For each of `world` GPUs alike: the training state is divided among all of them, an engine among `tp`. `free` is
    then that of the fullest GPU, `max_num_seqs` one engine's, and `host_free` is what all ranks share.

    `micro_batch_tokens`, `checkpointing`, `offload` (master weights and moments in host memory) and `reshard` (no GPU
    has weights and gradient sums whole) are chosen where they are None, `sleep` where it is "auto"; the first that fits
    is taken, in order of what it costs: smaller micro-batches, resharding, recomputed activations, an engine that
    sleeps at level 2 while the policy trains (the sync writes every weight anyway), an offloaded optimizer, for which
    the host must have room (`host_free`; None: not asked). An engine that stays has a KV cache for `max_num_seqs` full
    sequences; one that sleeps has what the training state leaves. Raises MemoryPlanError if nothing fits.
    """
    s = sizes
    host_free = None if host_free is None else host_free // world
    one_sequence = s.kv_bytes_of_rank(tp) * (max_model_len + 16)
    wanted = one_sequence * max_num_seqs if kv_cache_gib is None else int(kv_cache_gib * GIB)
    learns = s.parameters if s.trained is None else s.trained
    of_optimizer = int(STATE_BYTES[optimizer_states] * learns / world)
    slots = int(SLOTS * STATE_BYTES[optimizer_states] * PIECE_ELEMENTS)

    def planned(level: int, checkpoint: bool, sharded: bool, tokens: int, on_host: bool) -> MemoryPlan:
        plan = MemoryPlan(
            level, checkpoint, on_host, tokens, 0, wanted, free,
            engine_weights=-(-(2 * s.parameters - one_byte_weights) // tp),
            engine_graphs=graphs_bytes(s),
            engine_workspace=workspace_bytes(s, max_num_seqs, max_model_len, tp),
            policy=-(-2 * s.parameters // world),
            gradients=-(-GRADIENT * learns // world),
            optimizer=slots if on_host else of_optimizer,
            training_peak=activation_bytes(s, tokens, checkpoint, compiled),
            host=of_optimizer if on_host else 0,
            world=world,
            reshard=sharded,
            sharding=sharding_bytes(s, world, sharded),
            sync_buffers=sync_bytes(s, world),
            logprob_tokens=logprob_tokens(s, tokens, checkpoint, compiled),
        )  # fmt: skip
        left = plan.usable - (plan.peak if level == 0 else plan.used("rollout"))
        needed = wanted if level == 0 and sleep == "auto" else one_sequence
        return replace(plan, kv_cache=max(needed, min(wanted, left)))

    levels = (0, 2) if sleep == "auto" else (int(sleep),)
    checkpoints = (False, True) if checkpointing is None else (checkpointing,)
    choices = MICRO_BATCH_CHOICES if micro_batch_tokens is None else (micro_batch_tokens,)
    sizes_of_micro_batch = list(dict.fromkeys(max(tokens, max_model_len) for tokens in choices))  # holds one sequence
    places = (False, True) if offload is None and optimizer_states != "8bit" else (bool(offload),)
    shardings = (False,) if world == 1 else (False, True) if reshard is None else (reshard,)
    for on_host, level, checkpoint, sharded, tokens in itertools.product(
        places, levels, checkpoints, shardings, sizes_of_micro_batch
    ):
        plan = planned(level, checkpoint, sharded, tokens, on_host)
        if plan.short <= 0:
            break
    # What a choice avoids comes before it in that order, and was found not to fit.
    position = sizes_of_micro_batch.index(tokens)
    instead = {
        "--sleep": planned(0, checkpoint, sharded, tokens, on_host),
        "--offload-optimizer": planned(level, checkpoint, sharded, tokens, False),
        "--gradient-checkpointing": planned(level, False, sharded, tokens, on_host),
        "--reshard-after-forward": planned(level, checkpoint, False, tokens, on_host),
        "--micro-batch-tokens": planned(
            level, checkpoint, sharded, sizes_of_micro_batch[max(0, position - 1)], on_host
        ),
    }
    asked = {
        "--sleep": None if sleep == "auto" else sleep,
        "--offload-optimizer": offload,
        "--gradient-checkpointing": checkpointing,
        **({"--reshard-after-forward": reshard} if world > 1 else {}),
        "--micro-batch-tokens": micro_batch_tokens,
        "--kv-cache-gib": kv_cache_gib,
    }
    reasons = _reasons(plan, instead, asked, max_num_seqs, one_sequence)
    if optimizer_states == "8bit" and offload is None:
        reasons["--offload-optimizer"] = "8-bit moments stay on the GPU"
    plan = replace(plan, reasons=reasons)
    host_has_room = host_free is None or plan.host <= HOST_USABLE * host_free  # without it no plan on the host fits
    if plan.short <= 0 and host_has_room:
        return plan
    lacking = f"{_gib(plan.short)} GiB short of {_gib(plan.usable)} GiB ({USABLE:.0%} of what is free)"
    if not host_has_room:
        each = "" if world == 1 else f" for each of {world} ranks"
        lacking = f"the optimizer wants {_gib(plan.host)} GiB of host memory{each}, {_gib(host_free)} are available"
    several = "" if world == 1 else "; a larger --tp; more processes, on more GPUs"
    raise MemoryPlanError(
        f"this run does not fit on the GPU: {lacking} even as follows.\n{plan.table()}\n"
        "What helps: a smaller --model; smaller --max-response-len, --max-num-seqs or --micro-batch-tokens; "
        "--gradient-checkpointing True; --offload-optimizer True; --optimizer-states 8bit; --sleep 2; --kv-cache-gib "
        f"left out; other programs off the GPU{several}"
    )


def host_memory() -> int:
    """Bytes of the host's memory that this process may still take: what is available, or a container's limit leaves.
    Cached files do not count as taken: the kernel drops them when memory is asked for."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and limit.read_text().strip() != "max":
        stat = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        taken = int(used.read_text()) - int(stat["active_file"]) - int(stat["inactive_file"])
        available = min(available, int(limit.read_text()) - taken)
    return available


def host_used() -> int:
    """Bytes of the host's memory that this process holds (resident set, shared pages included)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def return_free_memory() -> None:
    """Give the system back what malloc keeps of freed memory, in the arenas of all threads; does nothing without glibc.
    5 to 13 ms where 40 to 80 MiB are free in a heap of 300, in which other threads may wait for malloc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def most_seen(everyone: list[dict[str, int]]) -> dict[str, int]:
    """phase -> the most that any rank has seen in it."""
    phases = dict.fromkeys(phase for seen in everyone for phase in seen)
    return {phase: max(seen.get(phase, 0) for seen in everyone) for phase in phases}


@dataclass
class MemoryLog:
    """What a run really uses of the device, beside the plan; a GPU only.

    Args:
        plan: with its predictions.
        limit: bytes that this run may have; what is free beyond that is occupied until the run ends, so that the run
            has no more than a smaller card would give. None: no limit.
    """

    plan: MemoryPlan
    limit: int | None = None
    seen: dict[str, int] = field(default_factory=dict)  # phase -> bytes, the most

    def __post_init__(self) -> None:
        self._before = self.device_used()
        free, _ = torch.cuda.mem_get_info()
        surplus = 0 if self.limit is None else max(0, free - self.limit)
        self._occupied = torch.empty(surplus, dtype=torch.uint8, device="cuda")

    @property
    def occupied(self) -> int:
        return self._occupied.numel()

    @staticmethod
    def device_used() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    def in_use(self) -> int:
        """Bytes that the run has on the device now; what others take meanwhile counts too, nobody can tell it apart."""
        return self.device_used() - self._before - self.occupied

    def mark(self, phase: str) -> None:
        """Note what is in use now; what torch's allocator keeps for itself counts, so peaks are seen afterwards."""
        self.seen[phase] = max(self.seen.get(phase, 0), self.in_use())

    def metrics(self) -> dict[str, float]:
        """`memory/...` (docs/metrics.md): peaks so far, and what is in use and reserved by torch now."""
        most = max(("rollout", "train"), key=lambda phase: self.seen.get(phase, 0))
        return {
            "memory/used_peak_gib": self.seen[most] / GIB,
            "memory/planned_peak_gib": self.plan.peak / GIB,
            "memory/torch_peak_gib": (torch.cuda.max_memory_allocated() - self.occupied) / GIB,
            "memory/device_gib": self.in_use() / GIB,
            "memory/torch_reserved_gib": (torch.cuda.memory_reserved() - self.occupied) / GIB,
        }

    def table(self, everyone: list[dict[str, int]] | None = None) -> str:
        """Planned and used, in GiB. `everyone` is what each rank has seen: `ranks.gather(used.seen)`; then what the
        fullest GPU used stands beside the plan, and after it what each of them did."""
        names = {"engine": "engine built", "policy": "policy and optimizer built", "rollout": "generating",
                 "train": "training"}  # fmt: skip
        everyone = everyone or [self.seen]
        lines = ["memory, GiB                     planned    used" + (" most" if len(everyone) > 1 else "")]
        for phase, used in most_seen(everyone).items():
            planned = self.plan.used(phase)
            each = " ".join(f"{seen[phase] / GIB:.1f}" if phase in seen else "-" for seen in everyone)
            lines.append(
                f"  {names[phase]:<28}{planned / GIB:9.1f}{used / GIB:8.1f}   {(used - planned) / planned:+.0%}"
                + (f"   by rank: {each}" if len(everyone) > 1 else "")
            )
        unused = torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()
        lines.append(f"  kept by torch's allocator beyond its peak {max(0, unused) / GIB:14.1f}")
        return "\n".join(lines)
