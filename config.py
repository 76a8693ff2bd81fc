"""The arguments of a run: one frozen dataclass, which is also `--help` and `config.json`."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from alarms import Thresholds
from corrections import CORRECTIONS, Correction
from keys import keys_in
from lora import LoraSettings
from loss import ADVANTAGES, REDUCTIONS
from quant_formats import BLOCK

TINY_MODEL = str(Path(__file__).resolve().parent / "assets" / "tiny-adder")

# Flags left at None take these values: the built-in model wants other sizes than a real one.
TINY_DEFAULTS: dict[str, Any] = {
    "data": "arithmetic",
    "steps": 60,
    "prompts_per_step": 32,
    "samples_per_prompt": 8,
    "tp": 1,
    "max_prompt_len": 32,
    "max_response_len": 8,
    "lr": 3e-4,
    "eval_size": 512,
    "eval_every": 20,
    "save_every": 20,
}
REAL_DEFAULTS: dict[str, Any] = {
    "data": "gsm8k",
    "steps": 100,
    "prompts_per_step": 64,
    "samples_per_prompt": 8,
    "tp": 1,
    "max_prompt_len": 512,
    "max_response_len": 1024,
    "lr": 1e-6,
    "eval_size": 512,
    "eval_every": 10,
    "save_every": 20,
}

GROUPS = {  # title in --help: its first flag; the fields of Args stand in this order
    "model and data": "model",
    "sampler": "rollout_quant",
    "correction and loss": "tis_cap",
    "optimizer": "lr",
    "memory": "sleep",
    "run": "steps",
}

POSITIVE = ("steps", "prompts_per_step", "max_prompt_len", "max_response_len", "max_sample_rounds", "max_num_seqs",
            "keep_last", "tp", "lr", "lora_alpha", "micro_batch_tokens", "updates_per_batch", "max_grad_norm",
            "temperature", "reward_workers", "reward_time_limit")  # fmt: skip
AT_LEAST_ZERO = ("lora_rank", "eval_size", "eval_every", "save_every", "warmup_steps", "weight_decay", "clip_low",
                 "log_samples", "overlong_buffer", "seed")  # fmt: skip


DEFAULT_TIS_CAP = 2.0
LOWEST_TEMPERATURE = 0.01  # vLLM samples at no lower one, whatever it is asked for
MOST_WORKERS = 1024
VOCAB_PADDING = 64  # vLLM's: embeddings have a multiple of so many rows

# Flags that may differ between a run and what goes on with it: they change nothing that it computes.
FREE = ("steps", "save_every", "keep_last", "resume", "run_name", "runs_dir", "alarms", "log_samples", "wandb",
        "tensorboard", "reward_workers", "reward_time_limit", "prove_sync", "fast_scheduler", "sleep", "memory_gib",
        "kv_cache_gib", "trust_remote_code")  # fmt: skip
# Flags of the machine: chosen where they are None, the most by the memory plan; config.json has the choice, and a
# resumed run keeps to it unless it is told otherwise.
BY_MACHINE = ("micro_batch_tokens", "gradient_checkpointing", "offload_optimizer", "reshard_after_forward", "compile",
              "tp")  # fmt: skip


class ConfigError(ValueError):
    """A flag, or a combination of flags, that cannot work."""


@dataclass(frozen=True)
class Args:
    """Where a flag's text says "None: A; B", its default is A, and B for the built-in tiny model."""

    model: str = TINY_MODEL
    """HF folder or Hub name of a Qwen2, Qwen3 or Llama model with a chat template."""
    trust_remote_code: bool = False
    """Let the model's repository run its own code."""
    data: str | None = None
    """arithmetic[:add1|add2|add3|sub2|mul|chain], gsm8k, dapo-math, a Hub dataset, a .jsonl or .parquet file.
    None: gsm8k; arithmetic."""
    eval_data: str | None = None
    """Held-out data, as --data, or aime-2024. None: the test split of --data, or a part of it held out."""
    eval_size: int | None = None
    """Held-out prompts to evaluate on (greedy); 0 for none. None: 512."""
    chat_template_kwargs: str = "{}"
    """JSON for the chat template, e.g. '{"enable_thinking": false}' for Qwen3."""
    reward: str | None = None
    """Your own reward, file.py:function, called as function(completion, answer, row); or number, exact, gsm8k or
    math-verify (also for fractions, sets, formulas). None: the data's own, math-verify for dapo-math and aime-2024."""
    reward_workers: int = 2
    """Processes that score completions while the engine generates."""
    reward_time_limit: float = 10.0
    """Seconds that one reward may take; then it counts as 0 and its process is replaced."""

    rollout_quant: Literal["fp8", "fp8-channel", "fp8-block", "int8", "none", "int4-sim", "int3-sim", "int2-sim"] = (
        "fp8"
    )
    """Weights of the sampler: FP8 with one scale a matrix (fp8), a row (fp8-channel) or a block of 128 x 128
    (fp8-block); int8 with one scale a row; none for bf16. int4-sim, int3-sim and int2-sim save nothing: bf16 weights
    rounded to so many bits, one scale a row, to see what a large mismatch does."""
    quant_skip: str = ""
    """Layers of the sampler that stay bf16, by comma: layers.0,down_proj,layers.3.mlp."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """The sampler's KV cache: bf16 (auto), or fp8, which holds twice the tokens. GPU only."""
    prove_sync: bool = True
    """At start, load the policy through vLLM's own loader once and compare its bytes with the sync's. Not for int8,
    to which vLLM itself does not quantize."""
    prompts_per_step: int | None = None
    """Prompts (groups) trained on in a step. None: 64; 32."""
    samples_per_prompt: int | None = None
    """Responses drawn for each prompt (the group), at least 2. None: 8."""
    max_prompt_len: int | None = None
    """Longest prompt, tokens; longer ones are dropped and counted. None: 512; 32."""
    max_response_len: int | None = None
    """Longest response, tokens. None: 1024; 8."""
    dynamic_sampling: bool = True
    """Drop groups whose rewards are all equal, and draw more prompts instead."""
    max_sample_rounds: int = 4
    """Rounds of drawing before a step goes on with what it has."""
    temperature: float = 1.0
    """Sampling temperature; the trainer divides its logits by it too."""
    top_p: float = 1.0
    """Must be 1: truncating the distribution would bias pi/mu."""
    top_k: int = 0
    """Must be 0 (off), for the same reason."""
    max_num_seqs: int = 512
    """Sequences that the engine runs at once."""
    tp: int | None = None
    """Ranks that hold one engine together (tensor parallel); the rest of the ranks hold others. Must divide the number
    of processes. None: 1."""
    fast_scheduler: bool = True
    """vLLM's scheduler with a short way for steps that only decode (fast_scheduler.py): a tenth of its Python a token,
    which is what limits small models. A vLLM that it does not know runs its own, after a warning."""

    tis_cap: float | Literal["auto"] | None = "auto"
    """Truncated importance sampling: weights pi_old/mu are cut at this value. inf never cuts, None turns them off, auto
    is 2 where --correction has a cap."""
    correction: Literal[
        "none", "token-tis", "sequence-tis", "token-is", "token-mask", "sequence-mask", "geometric-mask", "ppo-is"
    ] = "token-tis"
    """How the loss corrects the gap between sampler and trainer (corrections.py); --tis-cap is for the two with tis. A
    token that a mask takes out has weight 0 and stays in the loss's denominator."""
    mask_low: float | None = None
    """Lower end of the band of a mask. None: 0.5 for token-mask, 0 for sequence-mask, 0.98 for geometric-mask."""
    mask_high: float | None = None
    """Upper end of the band. None: 5, 3 and 1.02, for the same."""
    advantage: Literal["grpo", "dr-grpo", "rloo"] = "grpo"
    """A response's reward against its group: grpo divides by the standard deviation, dr-grpo does not, rloo leaves the
    response out of its own baseline."""
    loss_reduction: Literal["token-mean", "sequence-mean", "prompt-mean", "dr-grpo"] = "token-mean"
    """What counts the same in an update: every token (DAPO), response (GRPO) or prompt; dr-grpo divides by
    --max-response-len."""
    clip_low: float = 0.2
    """Lower clip range of the policy ratio."""
    clip_high: float = 0.28
    """Upper clip range (DAPO's clip-higher)."""
    dual_clip: float | None = None
    """Dual clip constant c > 1 for negative advantages, e.g. 10. None: off."""
    overlong_filter: bool = False
    """Leave responses that were cut at the limit out of the loss."""
    overlong_buffer: int = 0
    """Soft overlong punishment over the last this many tokens of --max-response-len; 0 for none."""

    lr: float | None = None
    """AdamW learning rate: linear warm-up, then constant. None: 1e-6; 3e-4."""
    warmup_steps: int = 5
    """Updates of warm-up."""
    weight_decay: float = 0.1
    """AdamW weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; an update whose norm is not finite is skipped and counted."""
    updates_per_batch: int = 1
    """Optimizer updates for each batch of rollouts; above 1 the trainer recomputes old log-probs first."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank on a frozen base, not all weights; 0 for none."""
    lora_alpha: float | None = None
    """The adapters count alpha / rank. None: twice the rank."""
    lora_targets: str = "all-linear"
    """Layers that get adapters, by comma: q_proj,v_proj."""
    optimizer_states: Literal["fp32", "bf16", "8bit"] = "fp32"
    """AdamW's moments: 8, 4 or 2 bytes a parameter beside the fp32 master weight. 8bit needs torchao."""

    sleep: Literal["auto", "0", "1", "2"] = "auto"
    """What the engine does while the policy trains: 0 stays, 1 moves its weights to the host, 2 drops them.
    auto: from the memory plan."""
    memory_gib: float | None = None
    """Plan for this much free memory on the GPU, and have no more: the rest is occupied. None: all that is free."""
    kv_cache_gib: float | None = None
    """Size of the KV cache, GiB. None: room for a step's samples at full length, twice that with dynamic sampling, at
    most for max_num_seqs of them."""
    micro_batch_tokens: int | None = None
    """Tokens in a forward and backward pass, at least one full sequence. None: from the memory plan, 16384 where there
    is room."""
    offload_optimizer: bool | None = None
    """fp32 master weights and AdamW's moments in pinned host memory, streamed through the GPU at each update. None:
    from the memory plan."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: slower by a quarter, much less memory. None: from the memory plan."""
    reshard_after_forward: bool | None = None
    """With several ranks: give a layer's weights up after its pass, and reduce its gradients in each micro-batch (the
    FULL_SHARD of FSDP). False: weights and gradient sums are whole on each GPU from the first micro-batch of an update
    to the last, and travel once: faster where there is room. None: from the memory plan."""
    compile: bool | None = None
    """torch.compile the policy's layers: a fifth faster and smaller, 10 to 40 s at the first step. None: on a GPU."""

    steps: int | None = None
    """Training steps. None: 100; 60."""
    seed: int = 0
    """Order of the prompts and the sampler's randomness."""
    eval_every: int | None = None
    """Evaluate every this many steps, and before the first and after the last; 0 for never. None: 10; 20."""
    save_every: int | None = None
    """Checkpoint every this many steps and after the best evaluation; 0 only at the end. None: 20."""
    keep_last: int = 1
    """Checkpoints to keep beside the best one, at least 1."""
    resume: str | None = None
    """Run folder to go on with, from its last checkpoint; its config.json gives all flags. The same command with the
    --run-name of a folder that exists goes on too. None: a new run."""
    run_name: str | None = None
    """Folder under --runs-dir. None: the model's name and the time."""
    runs_dir: str = "runs"
    """Where run folders go."""
    alarms: Thresholds = field(default_factory=Thresholds)
    """When a run says that something is wrong, or ends for it (alarms.py)."""
    log_samples: int = 4
    """Samples a step written to samples.jsonl with the log-probs of their tokens, two of each group; 0 for none."""
    wandb: bool = False
    """Mirror metrics, samples and config to Weights & Biases; WANDB_MODE=offline keeps them in the run folder."""
    tensorboard: bool = False
    """Mirror metrics and samples to TensorBoard's files in the run folder. Needs the package tensorboard."""

    @property
    def lora(self) -> LoraSettings | None:
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return LoraSettings(self.lora_rank, alpha, self.lora_targets) if self.lora_rank else None

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def max_model_len(self) -> int:
        return self.max_prompt_len + self.max_response_len

    @property
    def gap_correction(self) -> Correction:
        """--correction with its thresholds; --tis-cap None turns a capped one off. Raises ValueError."""
        cap = self._cap()
        if self._has_cap() and cap is None:
            return Correction("none", None, self.mask_low, self.mask_high)
        return Correction(self.correction, cap, self.mask_low, self.mask_high)

    def _has_cap(self) -> bool:
        return self.correction in CORRECTIONS and CORRECTIONS[self.correction].cap

    def _cap(self) -> float | None:
        if self.tis_cap != "auto":
            return self.tis_cap
        return DEFAULT_TIS_CAP if self._has_cap() else None

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_gib is None else int(self.memory_gib * 2**30)

    def resolved(self) -> "Args":
        """With every None that depends on the model filled in, and every value checked. Raises ConfigError."""
        defaults = TINY_DEFAULTS if Path(self.model).resolve() == Path(TINY_MODEL) else REAL_DEFAULTS
        unset = {k: v for k, v in defaults.items() if getattr(self, k) is None} | {"tis_cap": self._cap()}
        args = dataclasses.replace(self, **unset)
        args._check()
        return args

    def resumed(self, saved: dict[str, Any], by_name: bool) -> "Args":
        """These arguments for going on with a run whose config.json is `saved`, unresolved as they are.

        A flag left at its default takes the run's value, unless the run was named (`by_name`): then the command is
        the run's own and every flag has been said. Raises ConfigError for a value that would change the result.
        """
        run = _of_json(saved)
        asked = self.resolved() if by_name else self
        values: dict[str, Any] = {}
        for f in dataclasses.fields(Args):
            name, value, default = f.name, getattr(asked, f.name), _default(f)
            chosen_by_plan = name in BY_MACHINE and value is None
            if name not in run or (name in FREE and (by_name or value != default)):
                values[name] = value
            elif chosen_by_plan or value == run[name] or (not by_name and value == default):
                values[name] = run[name]
            elif name in BY_MACHINE:
                values[name] = value
            else:
                raise ConfigError(
                    f"{_flag(name)} {value} would change the result of this run, which has {run[name]}; leave it as it "
                    "was, or begin another run with another --run-name"
                )
        return dataclasses.replace(self, **values)

    def _check(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, str) and not _is_utf8(value):
                raise ConfigError(f"{_flag(name)} {value!a} is not UTF-8, which the run folder's files are; rename it")
            if isinstance(value, str) and (held := keys_in(value)):
                raise ConfigError(
                    f"{_flag(name)} holds the value of {', '.join(held)}; no flag takes a key, since flags are logged"
                )
        if self.run_name is not None and not re.fullmatch(r"(?!\.{1,2}$)[^/\x00-\x1f\x7f]{1,200}", self.run_name):
            raise ConfigError(
                f"--run-name {self.run_name[:80]!r} is not the name of one folder: 1 to 200 characters, no slash, not "
                ". or ..; --runs-dir says where it goes"
            )
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}; it must be greater than 0")
        for name in AT_LEAST_ZERO:
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}; it must be 0 or more, and finite")
        if self.seed >= 2**32:
            raise ConfigError(f"--seed is {self.seed}; it must be below 2**32")
        if self.temperature < LOWEST_TEMPERATURE:
            raise ConfigError(
                f"--temperature is {self.temperature}; vLLM samples at {LOWEST_TEMPERATURE} at least, and log-probs at "
                "a lower temperature would not be those of the samples"
            )
        if self.reward_workers > MOST_WORKERS:
            raise ConfigError(f"--reward-workers is {self.reward_workers}; at most {MOST_WORKERS} are started")
        try:
            valid = isinstance(json.loads(self.chat_template_kwargs), dict)
        except (json.JSONDecodeError, RecursionError):
            valid = False
        if not valid:
            raise ConfigError(f"--chat-template-kwargs {self.chat_template_kwargs[:200]} is not a JSON object")
        if self.samples_per_prompt < 2:
            raise ConfigError(
                f"--samples-per-prompt is {self.samples_per_prompt}; a group needs at least 2 samples, since each "
                "one's advantage is measured against the others"
            )
        if self.top_p != 1.0 or self.top_k != 0:
            raise ConfigError(
                f"--top-p {self.top_p} --top-k {self.top_k}: only 1 and 0 are possible. The log-probs of a "
                "truncated sampler are not those of the full vocabulary, and pi/mu would be biased; use --temperature"
            )
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ConfigError(
                f"--tis-cap is {self.tis_cap}; it must be greater than 0 (inf never cuts, None turns it off)"
            )
        try:
            _ = self.gap_correction
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for flag, value, known in (
            ("--advantage", self.advantage, ADVANTAGES), ("--loss-reduction", self.loss_reduction, REDUCTIONS)
        ):  # fmt: skip
            if value not in known:
                raise ConfigError(f"{flag} {value} is not known; there are {', '.join(known)}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ConfigError(f"--dual-clip is {self.dual_clip}; it must be greater than 1 (None turns it off)")
        if not self.clip_high >= 0:
            raise ConfigError(f"--clip-high is {self.clip_high}; it must be 0 or more (inf turns it off)")
        if self.clip_low >= 1:
            raise ConfigError(f"--clip-low is {self.clip_low}; the ratio's lower bound 1 - clip_low must stay positive")
        if self.overlong_buffer > self.max_response_len:
            raise ConfigError(
                f"--overlong-buffer {self.overlong_buffer} is longer than --max-response-len {self.max_response_len}"
            )
        if self.updates_per_batch > self.prompts_per_step:
            raise ConfigError(
                f"--updates-per-batch {self.updates_per_batch} needs at least as many --prompts-per-step "
                f"({self.prompts_per_step})"
            )
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < self.max_model_len:
            raise ConfigError(
                f"--micro-batch-tokens {self.micro_batch_tokens} is less than one full sequence of --max-prompt-len "
                f"{self.max_prompt_len} + --max-response-len {self.max_response_len} = {self.max_model_len} tokens"
            )
        if self.lora_rank and self.rollout_quant.endswith("-sim"):
            raise ConfigError(
                f"--rollout-quant {self.rollout_quant} rounds whole weights; leave --lora-rank out with it"
            )
        if self.offload_optimizer and self.optimizer_states == "8bit":
            raise ConfigError(
                "--optimizer-states 8bit stays on the GPU; with --offload-optimizer True use fp32 or bf16"
            )
        for name, value in dataclasses.asdict(self.alarms).items():
            if not 0 <= value < math.inf:
                raise ConfigError(f"{_flag('alarms.' + name)} is {value}; it must be 0 (off) or more, and finite")
        for name in ("memory_gib", "kv_cache_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{_flag(name)} is {value}; it must be greater than 0, and finite")


def check_ranks(args: Args, config: Any, world: int) -> None:
    """ConfigError for flags and a model (transformers' `config`) that `world` ranks, --tp of them to an engine, cannot
    work with. `args` must be resolved and `config` make a model. That --tp divides the ranks is ranks.py's to check."""
    tp = args.tp
    if world > 1 and args.optimizer_states == "8bit":
        raise ConfigError(
            f"--optimizer-states 8bit is for one process, not {world}: its blocks of 256 values do not follow the rows "
            "by which the policy is sharded; use bf16"
        )
    if args.prompts_per_step < world // tp:
        raise ConfigError(
            f"--prompts-per-step {args.prompts_per_step} is less than the {world // tp} engines of {world} processes "
            f"with --tp {tp}, and some would have nothing to sample; give more prompts, a larger --tp or fewer "
            "processes"
        )
    if tp == 1:
        return
    if uncut := _cannot_cut(config, tp):
        others = [n for n in range(1, world + 1) if world % n == 0 and not _cannot_cut(config, n)]
        raise ConfigError(
            f"--tp {tp} cannot split {args.model}: it has {uncut}; with {world} processes --tp may be "
            f"{', '.join(map(str, others))}"
        )
    if args.rollout_quant == "fp8-block":
        heads, kv_heads, head = _heads(config)
        parts = {"queries": heads * head // tp, "keys": max(1, kv_heads // tp) * head}
        for what, rows in (parts | {"MLP": config.intermediate_size // tp}).items():
            if rows % BLOCK:
                raise ConfigError(
                    f"--rollout-quant fp8-block: with --tp {tp} a rank has {rows} rows of the {what} of {args.model}, "
                    f"which blocks of {BLOCK} do not cover; use fp8 or fp8-channel, or another --tp"
                )


def _heads(config: Any) -> tuple[int, int, int]:
    """(heads, key and value heads, size of a head)."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head


def _cannot_cut(config: Any, tp: int) -> str | None:
    """What of the model `tp` ranks cannot share evenly. vLLM (0.26 and 0.32) cuts attention by heads, the MLP by its
    width, embeddings and head by a padded vocabulary; key and value heads are cut, or each held by several ranks."""
    heads, kv_heads, _ = _heads(config)
    if heads % tp:
        return f"{heads} attention heads"
    if kv_heads % tp and tp % kv_heads:
        return f"{kv_heads} key and value heads"
    if config.intermediate_size % tp:
        return f"an intermediate size of {config.intermediate_size}"
    padded = math.ceil(config.vocab_size / VOCAB_PADDING) * VOCAB_PADDING
    return f"a vocabulary of {padded}, padded" if padded % tp else None


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


def _of_json(saved: dict[str, Any]) -> dict[str, Any]:
    """Fields of Args from a run's config.json, where infinity is a string. Raises ConfigError for what is no field."""
    unknown = sorted(set(saved) - {f.name for f in dataclasses.fields(Args)})
    if unknown:
        raise ConfigError(f"config.json of the run has {', '.join(unknown)}, which this version does not know")
    values = {k: math.inf if v == "inf" else v for k, v in saved.items()}
    if "alarms" in values:
        values["alarms"] = Thresholds(**values["alarms"])
    return values


def read_flags(description: str) -> Args:
    """Args of the command line. --help shows the flags under the titles of GROUPS, with the texts of Args.

    tyro groups by nested dataclass, and Args is flat: the groups are made here, of the same fields, without prefixes.
    """
    import docstring_parser
    import tyro

    texts = {p.arg_name: p.description for p in docstring_parser.parse_from_object(Args).params}
    firsts = {first: title for title, first in GROUPS.items()}
    members: dict[str, list[tuple[str, Any, Any]]] = {}
    title = ""
    for f in dataclasses.fields(Args):
        title = firsts.get(f.name, title)
        if f.name == "alarms":  # a dataclass of its own, whose flags keep their prefix
            continue
        shown = tyro.conf.arg(prefix_name=False, **_help_of(" ".join(texts[f.name].split()), f.default))
        members.setdefault(title, []).append((f.name, Annotated[f.type, shown], f.default))
    groups = []
    for title, fields in members.items():
        group = dataclasses.make_dataclass("Flags", fields, frozen=True)
        groups.append((title.replace(" ", "_"), Annotated[group, tyro.conf.arg(name=title)], group()))
    groups.append(("alarms", Thresholds, Thresholds()))
    nested = vars(tyro.cli(dataclasses.make_dataclass("Flags", groups, frozen=True), description=description))
    alarms = nested.pop("alarms")
    return Args(**{k: v for group in nested.values() for k, v in vars(group).items()}, alarms=alarms)


def _help_of(text: str, default: Any) -> dict[str, str]:
    """Help and hint of a flag: what a text says after "None:" is its default, and "A; B" are a real model's and the
    tiny one's."""
    if default == TINY_MODEL:
        return {"help": text, "help_behavior_hint": "(default: the built-in tiny model)"}
    text, _, unset = text.partition(" None: ")
    if default is not None or not unset:
        return {"help": text}
    return {"help": text, "help_behavior_hint": f"(default: {unset.rstrip('.').replace('; ', '; built-in model: ')})"}


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no UTF-8 arrive as lone surrogates
        return False
    return True


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
