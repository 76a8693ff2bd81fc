"""What a run's loop (train.py) needs, made from its flags: model and tokenizer, memory plan, data and rewards, engine,
policy, sync. What cannot work is said here, and what can be checked cheaply before the engine is built.
"""

import dataclasses
import json
import math
import os
import time
from typing import Any, NamedTuple

import torch

import lora
from checkpoint import Checkpoint
from config import Args, ConfigError, check_ranks
from data import Prompt, PromptStream, encode_prompts, load_data
from engine_options import SIMULATED, skipped_layers
from memory import (
    GIB,
    MICRO_BATCH_CHOICES,
    MemoryLog,
    MemoryPlan,
    MemoryPlanError,
    host_memory,
    model_sizes,
    plan_memory,
    sequences_at_once,
)
from policy import FAMILIES, Policy, load_model
from quant_sync import SyncPlan
from ranks import Ranks
from reward_pool import RewardPool
from rewards import required_modules
from rollout import Engine
from sharding import LogprobModel, shard
from weight_sources import rounded_sources


class Parts(NamedTuple):
    """What `build` makes. `plan` is that of the sync."""

    engine: Engine
    policy: Policy
    plan: SyncPlan
    stream: PromptStream
    held_out: list[Prompt]
    rewards: RewardPool


def load_config(args: Args) -> tuple[Any, Any]:
    """(config, tokenizer) of --model; ConfigError if there is none, or if it is too short for the lengths asked for."""
    from transformers import AutoConfig, AutoTokenizer

    parts = []
    for part, loader in (("config.json", AutoConfig), ("tokenizer", AutoTokenizer)):
        try:
            parts.append(loader.from_pretrained(args.model, trust_remote_code=args.trust_remote_code))
        except Exception as error:  # transformers raises whatever a file's content leads to
            what = f"--model {args.model[:200]} is neither a folder with a model nor a model that the Hub gives"
            if os.path.isdir(args.model):
                what = f"--model {args.model}: its {part} cannot be used"
            reason = _first_line(error)
            if "trust_remote_code" in str(error):
                reason = "it comes with code of its own; --trust-remote-code lets it run, once you have read it"
            raise ConfigError(f"{what}: {reason}") from error
    config, tokenizer = parts
    if tokenizer.eos_token_id is None and getattr(config, "eos_token_id", None) is None:
        raise ConfigError(
            f"--model {args.model}: neither its tokenizer nor its config names an end-of-sequence token, so that every "
            "response would run to --max-response-len; set eos_token in tokenizer_config.json"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and args.max_model_len > limit:
        raise ConfigError(
            f"--max-prompt-len {args.max_prompt_len} + --max-response-len {args.max_response_len} is more than the "
            f"{limit} positions of {args.model}"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and args.max_model_len > window:
        raise ConfigError(
            f"--max-prompt-len {args.max_prompt_len} + --max-response-len {args.max_response_len} is more than the "
            f"window of {window} tokens that {args.model} attends to"
        )
    return config, tokenizer


def plan_device(args: Args, config: Any, ranks: Ranks | None = None) -> tuple[Args, MemoryPlan, list[str]]:
    """(arguments with what the memory plan chose, the plan, layers that stay bf16); prints the plan, which is that of
    every rank. On a CPU it is the KV cache's size alone. Raises ConfigError, LoraError, EngineError (--quant-skip) and
    MemoryPlanError."""
    ranks = ranks or Ranks()
    known = f"--model {args.model} ({config.model_type}) cannot be trained here"
    if config.model_type not in FAMILIES:
        raise ConfigError(f"{known}: the families that can be are Qwen2, Qwen3 and Llama ({', '.join(FAMILIES)})")
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"{known}: its weights are quantized already; give the bf16 model and --rollout-quant")
    try:
        sizes = model_sizes(config, args.trust_remote_code, args.lora)
    except lora.LoraError:
        raise
    except Exception as error:  # whatever numbers that make no model lead to
        raise ConfigError(f"{known}: its config.json makes no model ({_first_line(error)})") from error
    check_ranks(args, config, ranks.world)
    skip = skipped_layers([*sizes.linear_layers, "lm_head", "model.embed_tokens"], args.quant_skip)
    bf16 = args.rollout_quant == "none" or args.rollout_quant in SIMULATED
    quantized = [] if bf16 else [n for k, n in sizes.linear_layers.items() if k not in skip]
    if args.kv_cache_dtype == "fp8":
        sizes = dataclasses.replace(sizes, kv_bytes_per_token=sizes.kv_bytes_per_token // 2)
    blocks = math.ceil(args.max_model_len / 128) + 1  # of a CPU, whose are the largest; vLLM keeps one to itself
    one_sequence = sizes.kv_bytes_of_rank(ranks.tp) * 128 * blocks
    if args.kv_cache_gib is not None and args.kv_cache_gib * GIB < one_sequence:
        raise MemoryPlanError(
            f"--kv-cache-gib {args.kv_cache_gib} does not hold one sequence of --max-prompt-len {args.max_prompt_len} "
            f"+ --max-response-len {args.max_response_len} tokens, which takes {one_sequence / GIB + 5e-7:.6f}; give "
            "more, or leave it out"
        )
    sequences = sequences_at_once(
        args.max_num_seqs, args.prompts_per_step, args.samples_per_prompt, ranks.groups, args.dynamic_sampling
    )
    compiled = torch.cuda.is_available() if args.compile is None else args.compile
    if ranks.world == 1 and args.reshard_after_forward is not None:
        print("--reshard-after-forward has no effect: one process holds all weights anyway", flush=True)
    if torch.cuda.is_available():
        free = min(ranks.gather(torch.cuda.mem_get_info()[0]))  # of the fullest GPU
        plan = plan_memory(
            sizes,
            free=free if args.memory_bytes is None else min(free, args.memory_bytes),
            one_byte_weights=sum(quantized),
            max_model_len=args.max_model_len,
            max_num_seqs=sequences,
            micro_batch_tokens=args.micro_batch_tokens,
            checkpointing=args.gradient_checkpointing,
            offload=args.offload_optimizer,
            reshard=args.reshard_after_forward,
            sleep=args.sleep,
            kv_cache_gib=args.kv_cache_gib,
            compiled=compiled,
            optimizer_states=args.optimizer_states,
            host_free=ranks.from_first(host_memory()),
            world=ranks.world,
            tp=ranks.tp,
        )
        print(f"{torch.cuda.get_device_name()}\n{plan.table()}", flush=True)
    else:
        if args.sleep not in ("auto", "0"):
            print(f"--sleep {args.sleep} has no effect: a CPU has no sleep mode, the engine stays", flush=True)
        if args.memory_gib is not None:
            print(f"--memory-gib {args.memory_gib} has no effect: it is for a GPU's memory", flush=True)
        wanted = max(sizes.kv_bytes_of_rank(ranks.tp) * (args.max_model_len + 128) * sequences, 2**27)
        plan = MemoryPlan(
            sleep_level=0,
            checkpointing=bool(args.gradient_checkpointing),
            offload=bool(args.offload_optimizer),
            reshard=ranks.world > 1 and args.reshard_after_forward is not False,
            micro_batch_tokens=args.micro_batch_tokens or max(MICRO_BATCH_CHOICES[0], args.max_model_len),
            kv_cache=wanted if args.kv_cache_gib is None else int(args.kv_cache_gib * GIB),
        )
        kv = f"KV cache {plan.kv_cache / 2**20:.0f} MiB"
        print(f"no GPU: engine and policy run on the CPU, nothing sleeps, {kv}", flush=True)
    chosen = {
        "micro_batch_tokens": plan.micro_batch_tokens,
        "gradient_checkpointing": plan.checkpointing,
        "offload_optimizer": plan.offload,
        "reshard_after_forward": plan.reshard if ranks.world > 1 else None,
        "compile": compiled,
    }
    return dataclasses.replace(args, **chosen), plan, skip


def build(
    args: Args, memory: MemoryPlan, skip: list[str], config: Any, tokenizer: Any, used: MemoryLog | None,
    checkpoint: Checkpoint | None = None, ranks: Ranks | None = None,
) -> Parts:  # fmt: skip
    """Everything the loop needs; data, rewards and the model's files are checked before the engine is built. The
    policy, its optimizer too, is that of the checkpoint where there is one. Raises DataError, RewardError, PolicyError,
    EngineError, SyncError and MemoryPlanError."""
    from transformers import set_seed

    ranks = ranks or Ranks()
    template = json.loads(args.chat_template_kwargs)
    train_examples, eval_examples = load_data(args.data, args.eval_data, args.eval_size if args.eval_every else 0)
    modules = required_modules(args.reward, train_examples + eval_examples)
    rewards = RewardPool(args.reward, args.reward_workers, args.reward_time_limit, modules)
    encoding = (tokenizer, args.max_prompt_len, template, config.vocab_size)
    prompts, _ = encode_prompts(train_examples, *encoding)
    held_out = encode_prompts(eval_examples, *encoding)[0] if eval_examples else []
    print(f"data {args.data}: {len(prompts)} prompts to train on, {len(held_out)} held out", flush=True)
    stream = PromptStream(prompts, args.seed)
    ranks.agree("data", {"--data": stream.state_dict()["prompts"], "--eval-data": [p.token_ids for p in held_out]})
    set_seed(args.seed)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    whole = str(checkpoint.folder) if checkpoint and not args.lora else args.model
    model = load_model(whole, torch.device("cpu"), args.trust_remote_code)  # a torn file is found in seconds
    start = time.perf_counter()
    engine = Engine(
        args.model,
        tokenizer=tokenizer,
        quant=args.rollout_quant,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        kv_cache_bytes=memory.kv_cache,
        skip=skip,
        kv_cache_dtype=args.kv_cache_dtype,
        sleep_level=memory.sleep_level,
        memory_fraction=memory.engine / torch.cuda.mem_get_info()[1] if device.type == "cuda" else 0.5,
        temperature=args.temperature,
        seed=args.seed,
        trust_remote_code=args.trust_remote_code,
        fast_scheduler=args.fast_scheduler,
        ranks=ranks,
    )
    engine_ready = time.perf_counter()
    if used is not None:
        used.mark("engine")
    if args.lora is not None:
        add_adapters(model, args.lora)
    root = LogprobModel(model, args.temperature)
    if ranks.world == 1:
        model.to(device)
    else:
        shard(root, ranks, device, bool(args.reshard_after_forward))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of a model that was whole here: what vLLM allocates comes from elsewhere
    plan = SyncPlan.build(sync_sources(model, args, skip), engine.model, ranks)
    plan.check_formats(args.rollout_quant, skip)
    plan.check_coverage(engine.weight_blocks())
    if args.prove_sync and args.rollout_quant != "int8":
        compared = plan.prove(engine.load_by_vllm)
        print(
            f"sync plan proved: {compared} parameters are what vLLM's own loader makes of the policy, in "
            f"{1000 * engine.seconds_loading:.0f} ms",
            flush=True,
        )
    try:
        policy = Policy(
            model,
            lr=args.lr,
            weight_decay=args.weight_decay,
            warmup_steps=args.warmup_steps,
            max_grad_norm=args.max_grad_norm,
            temperature=args.temperature,
            checkpointing=bool(args.gradient_checkpointing),
            compile=bool(args.compile),
            optimizer_states=args.optimizer_states,
            offload_optimizer=bool(args.offload_optimizer),
            logprob_tokens=memory.logprob_tokens,
            ranks=ranks,
            root=root,
            reshard=bool(args.reshard_after_forward),
            first_tokens=args.micro_batch_tokens if device.type == "cuda" else 0,
        )
    except torch.OutOfMemoryError as error:
        raise MemoryPlanError(
            f"the policy and its optimizer do not fit beside the engine: {error}\n{memory.table()}"
        ) from error
    if checkpoint is not None:
        policy.load_training(checkpoint)
    if used is not None:
        used.mark("policy")
    formats = ", ".join(f"{n} {name}" for name, n in plan.formats().items())
    moved = f"{plan.bytes_written / 2**20:.0f} MiB in the engine, {plan.bytes_moved / 1e9:.3f} GB moved by a sync"
    print(f"sync plan: {formats} parameters; {moved}", flush=True)
    print(
        f"engine ready in {engine_ready - start:.0f} s, policy in {time.perf_counter() - engine_ready:.1f} s",
        flush=True,
    )
    if ranks.world > 1:  # the ranks of an engine draw the same random numbers, other engines others
        set_seed(args.seed + 1_000_003 * ranks.group)
    return Parts(engine, policy, plan, stream, held_out, rewards)


def add_adapters(model: torch.nn.Module, settings: lora.LoraSettings) -> None:
    """In place; says how many parameters are trained."""
    lora.add_adapters(model, settings)
    counts = lora.trained(model) / 1e6, sum(p.numel() for p in model.parameters()) / 1e6
    print(f"LoRA: {counts[0]:.2f} M of {counts[1]:.0f} M parameters are trained", flush=True)


def sync_sources(model: torch.nn.Module, args: Args, skip: list[str]) -> Any:
    """What the sync reads, for SyncPlan.build."""
    bits = SIMULATED.get(args.rollout_quant)
    if args.lora is not None:
        return lora.sources(model)
    return rounded_sources(model, bits, skip) if bits else model


def _first_line(error: Exception) -> str:
    """The error's first two lines as one, with its class where it says little by itself."""
    line = " ".join(" ".join(str(error).strip().splitlines()[:2]).split())[:300]
    return line if isinstance(error, (OSError, ValueError)) and line else f"{type(error).__name__}: {line}"
