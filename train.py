"""Train a language model with DAPO on what an 8-bit vLLM engine in the same process sampled.

    python train.py                                                      # the built-in tiny model, any machine
    python train.py --model Qwen/Qwen2.5-1.5B-Instruct --tis-cap 2.0     # GSM8K, one GPU
    python train.py --help                                               # every flag

    python train.py --resume runs/NAME                                   # goes on where that run ended, or was ended

    accelerate launch --multi_gpu train.py ...                           # every GPU of the node, the same flags
    torchrun --standalone --nproc-per-node 8 train.py ... --tp 2

The loop is `train()`; what it needs is made in parts.py. What it leaves out today: more than one node, multi-turn.
"""

import runtime  # noqa: F401  (first: it sets what torch and vLLM read at import)

# isort: split
import dataclasses
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import lora
from alarms import AlarmError, Alarms
from checkpoint import CheckpointError
from config import Args, ConfigError, read_flags
from data import DataError, Prompt
from engine_options import EngineError, check_platform
from keys import redacted
from loop_control import Clock, Progress, Stopped, StopRequest
from loss import (
    advantages_by,
    finite_mask,
    loss_denominators,
    merge_sums,
    mismatch_metrics,
    mismatch_sums,
    overlong_mask,
    policy_loss,
    soft_overlong_penalty,
)
from memory import GIB, MemoryLog, MemoryPlanError, host_used
from optimizer import OptimizerError, check_states
from packing import PackingError
from parts import build, load_config, plan_device
from policy import Batch, Policy, PolicyError
from quant_sync import SyncError, SyncPlan
from ranks import Ranks, RanksError
from reward_pool import RewardPool
from rewards import RewardError
from rollout import Engine, Group, sample_groups
from run_folder import RunFolder, RunFolderError, check_free, default_run_name, is_run, saved_config
from run_report import reported
from sample_log import KeptLogprobs, TokenTexts, logged_samples, sample_record
from trackers import TrackerError, check_trackers


def train(args: Args, ranks: Ranks | None = None) -> Path:
    """Run it all; returns the run folder. `args` must be resolved."""
    ranks = ranks or Ranks()
    ranks.agree("arguments", config_of(args))
    stop = StopRequest(ranks)
    run_name = args.run_name or ranks.from_first(default_run_name(args.model))
    run = None
    if args.resume:
        run = open_run(args, run_name, ranks)
        check_steps_left(run, args)
    else:
        check_free(args.runs_dir, run_name, ranks)
    check_platform(args.rollout_quant, args.kv_cache_dtype)
    check_states(args.optimizer_states)
    check_trackers(args.wandb, args.tensorboard)
    if args.lora is not None:
        lora.check_peft()
    config, tokenizer = load_config(args)
    args, memory, skip = plan_device(args, config, ranks)
    used = MemoryLog(memory, args.memory_bytes) if torch.cuda.is_available() else None
    checkpoint = run.checkpoint if run else None
    with said_on_failure(run, ranks):
        made = build(args, memory, skip, config, tokenizer, used, checkpoint, ranks)
    engine, policy, plan, stream, held_out, rewards = made
    run = run or open_run(args, run_name, ranks)
    texts = TokenTexts(tokenizer)
    print(f"run folder {run.path}", flush=True)
    alarms = Alarms(args.alarms)
    progress = Progress(run, policy, tokenizer, stream, rewards, alarms)
    engine.before_step, engine.meanwhile = stop.check, rewards.poll
    ranks.watch(lambda: how_to_go_on(run))
    page = reported(run.path) if ranks.first else nullcontext()
    with page, rewards, stop.watching(), saved_on_failure(progress, run, ranks):
        sync_weights(engine, plan, 0 if checkpoint is None else checkpoint.loop.step, Clock(), full_verify=True)
        if checkpoint is None:
            accuracy = evaluate(engine, held_out, rewards, args, run, 0)
            progress.finished(0, accuracy=None if math.isnan(accuracy) else accuracy)
        else:
            progress.resume(checkpoint)
            print(f"goes on after step {progress.loop.step}, from {checkpoint.folder}", flush=True)
        first = progress.loop.step + 1
        bar = tqdm(
            initial=first - 1, total=args.steps, desc="train", unit="step",
            disable=not (ranks.first and sys.stderr.isatty()),
        )  # fmt: skip
        clock = Clock()
        for step in range(first, args.steps + 1):
            try:
                with stop.allowed():
                    with clock("rollout"):
                        engine.wake("kv_cache")
                        groups, metrics = sample_groups(
                            engine, stream, rewards, prompts=args.prompts_per_step, samples=args.samples_per_prompt,
                            max_tokens=args.max_response_len, dynamic=args.dynamic_sampling,
                            max_rounds=args.max_sample_rounds, expected_share=progress.loop.expected_share,
                        )  # fmt: skip
                    if used is not None:
                        used.mark("rollout")
                    with clock("sleep"):
                        engine.sleep()
                    with clock("save"):
                        run.wait_for_copies()
                    with clock("train"):
                        check = stop.check if ranks.world == 1 else stop.check_together
                        metrics |= train_step(policy, groups, args, clock, check)
            except Stopped:
                break
            if used is not None:
                used.mark("train")
            with clock("wake"):
                engine.wake("weights")
            sync_weights(engine, plan, step, clock)
            last = step == args.steps
            accuracy = progress.loop.accuracy
            if held_out and (step % args.eval_every == 0 or last):  # after a signal too: a step is done or not
                with clock("eval"):
                    engine.wake("kv_cache")
                    accuracy = metrics["eval/accuracy"] = evaluate(engine, held_out, rewards, args, run, step)
            if groups and (step == 1 or "eval/accuracy" in metrics):
                with clock("eval"):
                    metrics["mismatch/bf16_floor"] = policy.noise_floor(few_sequences(groups))
            counts = ranks.gather(rewards.counts())
            metrics |= clock.metrics() | {
                "reward/scored": sum(c["calls"] for c in counts),
                "reward/errors": sum(c["errors"] for c in counts),
                "reward/timeouts": sum(c["timeouts"] for c in counts),
                "policy/version": engine.version,
            }
            metrics |= speed_metrics(metrics, used)
            events = ranks.from_first(alarms.check(step, metrics))
            clock = Clock()  # of the next step: writing this one's results down is part of it
            with clock("log"):
                run.log({"step": step} | metrics)
                run.log_samples([sample_record(step, g, i, texts) for g, i in logged_samples(groups, args.log_samples)])
                bar.update()
                tqdm.write(step_line(step, args.steps, metrics, accuracy), file=sys.stdout)
                if used is not None and step == first:
                    tqdm.write(used.table(ranks.gather(used.seen)), file=sys.stdout)
                for event in events:
                    run.log_event(event.line())
                    tqdm.write(f"alarm: step {step}: {event.message}", file=sys.stdout)
                sys.stdout.flush()
            share = progress.loop.expected_share
            if args.dynamic_sampling:  # the next step draws for a share a tenth below this one's
                share = 0.9 * metrics["sampling/groups_mixed"] / metrics["sampling/groups_drawn"]
            best = is_best(metrics.get("eval/accuracy"), progress.loop.best_accuracy) and bool(args.save_every)
            changes = {"best_accuracy": accuracy, "best_step": step} if best else {}
            progress.finished(step, expected_share=share, accuracy=accuracy, **changes)
            if any(event.stops for event in events):
                raise AlarmError(f"stopped after step {step}: {next(e.message for e in events if e.stops)}")
            if args.save_every and (best or step % args.save_every == 0) and not last:
                with clock("save"):
                    progress.save(wait=False)
            report_lost_checkpoint(run, step)
            if stop.agreed():
                break
        bar.close()
        folder = progress.save() if progress.loop.step else None
    report_lost_checkpoint(run, progress.loop.step)
    run.close()
    if stop.requested:
        print(f"stopped after {progress.loop.step} of {args.steps} steps", flush=True)
        print(f"go on with: python train.py --resume {run.path}", flush=True)
    print(f"checkpoint {folder}\nrun folder {run.path}" if folder else f"run folder {run.path}", flush=True)
    return run.path


def open_run(args: Args, name: str, ranks: Ranks) -> RunFolder:
    return RunFolder(
        args.runs_dir, name, config_of(args), args.wandb, args.tensorboard,
        resume=args.resume is not None, keep_last=args.keep_last, ranks=ranks,
    )  # fmt: skip


def how_to_go_on(run: RunFolder) -> str:
    """Where a run that has ended stands, and the command that goes on."""
    return f"run folder {run.path}; go on with: python train.py --resume {run.path}"


def is_best(accuracy: float | None, best: float | None) -> bool:
    return accuracy is not None and not math.isnan(accuracy) and (best is None or accuracy > best)


def check_steps_left(run: RunFolder, args: Args) -> None:
    """ConfigError for a run that has nothing left to do."""
    done = run.checkpoint.loop.step if run.checkpoint else 0
    if done >= args.steps:
        raise ConfigError(
            f"{run.path} has done all of its {args.steps} steps; go on with --steps above {done}, or choose another "
            "--run-name"
        )


def report_lost_checkpoint(run: RunFolder, step: int) -> None:
    """Say which checkpoint the thread could not write. The run goes on, and the next one is tried."""
    error = run.writer_error()
    if error is not None:
        lost = redacted(str(error))  # said first: on a full disk the event may not find room either
        print(f"alarm: {lost}; the run goes on, and the next checkpoint is tried", file=sys.stderr, flush=True)
        run.log_event({"step": step, "event": "checkpoint_failed", "message": lost})


@contextmanager
def said_on_failure(run: RunFolder | None, ranks: Ranks) -> Iterator[None]:
    """However it ends, the run folder and the command that goes on are said, where there is a run."""
    try:
        yield
    except BaseException as error:
        if run is not None and ranks.world > 1:
            ranks.failed(f"{_what_failed(error)}\n{how_to_go_on(run)}")
        elif run is not None:
            print(how_to_go_on(run), file=sys.stderr, flush=True)
        raise


@contextmanager
def saved_on_failure(progress: Progress, run: RunFolder, ranks: Ranks) -> Iterator[None]:
    """A failure of whatever kind ends the run, but not without what it has learned, unless the failure is that it could
    not be saved. One rank of several cannot save by itself: the last checkpoint stands."""
    with said_on_failure(run, ranks):
        try:
            yield
        except Exception as error:
            if ranks.world > 1:
                raise
            if not progress.save_failed and (progress.loop.step or progress.ahead()):
                try:
                    print(f"checkpoint {progress.save()}", file=sys.stderr, flush=True)
                except Exception as lost:  # whatever it is, the failure that ended the run is the one to raise
                    why = redacted(f"{type(lost).__name__}: {lost}")
                    print(f"error: no checkpoint: {why}", file=sys.stderr, flush=True)
                lost = run.writer_error()
                if lost is not None:
                    print(f"error: {redacted(str(lost))}", file=sys.stderr, flush=True)
            of_memory = isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
            if isinstance(error, torch.OutOfMemoryError) or of_memory:
                raise MemoryPlanError(
                    f"out of memory in the middle of a step: {error}. Smaller --micro-batch-tokens or --kv-cache-gib, "
                    "--gradient-checkpointing True or --sleep 2 make room"
                ) from error
            raise


def train_step(
    policy: Policy, groups: list[Group], args: Args, clock: Clock | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """One batch of groups through `updates_per_batch` updates; the step's metrics. No group, no update. `check` is
    called before each micro-batch of the first update, and may raise: nothing has changed yet."""
    clock = clock or Clock()
    if not groups:
        print("step skipped: no group with mixed rewards was drawn; see docs/metrics.md, sampling/", flush=True)
        return {"train/updates_applied": 0, "train/skipped_total": policy.skipped}
    with clock("pack"):
        batch, metrics = build_batch(groups, args, policy.device)
    correction, ranks = args.gap_correction, policy.ranks
    if args.updates_per_batch > 1 and not correction.kind.direct:
        batch.old_logprobs = policy.compute_logprobs(batch, max(args.micro_batch_tokens, policy.logprob_tokens))
    sums: dict[str, torch.Tensor] = {}
    norms, losses, applied = [], [], 0
    kept = KeptLogprobs(groups, args.log_samples)
    for rows in split_groups(len(groups), args.samples_per_prompt, args.updates_per_batch):
        with clock("pack"):
            mini = batch.select(rows)
            if not bool(mini.mask.any()):
                continue  # every token was filtered out: there is no gradient, and nothing to divide by
            mini.denominators = loss_denominators(
                mini.mask, mini.lengths, args.samples_per_prompt, args.loss_reduction, args.max_response_len
            )
            mine = ranks.share(mini.micro_batches(args.micro_batch_tokens, ranks.world))
            micro_batches = [mini.select(chosen) if chosen else mini.nothing() for chosen in mine]
        loss_sum = torch.zeros((), device=policy.device)
        for i, micro in enumerate(micro_batches):
            if not norms:
                check()
            policy.begin_micro_batch(last=i == len(micro_batches) - 1)
            logprobs, entropy = policy.logprobs(micro)
            # One update per batch: the weights are still the step's, so old log-probs are the policy's own.
            old = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
            kept.keep(micro, old)
            loss, stats = policy_loss(
                logprobs, old, micro.rollout_logprobs, micro.advantages, micro.mask, micro.denominators,
                args.clip_low, args.clip_high, args.dual_clip, correction, micro.lengths,
            )  # fmt: skip
            loss.backward()
            loss_sum += loss.detach()
            sums = merge_sums(
                sums, stats | {"entropy_sum": torch.where(micro.mask, entropy.detach(), 0.0).double().sum()}
            )
            gap = mismatch_sums(old, micro.rollout_logprobs, micro.mask, args.tis_cap, micro.lengths)
            sums = merge_sums(sums, {f"gap_{k}": v for k, v in gap.items()})
        metrics["train/lr"] = policy.current_lr()
        norm, was_applied = policy.update()
        norms.append(norm)
        losses.append(float(ranks.merge({"loss": loss_sum})["loss"]))
        applied += was_applied
    kept.hand_out(ranks)
    metrics |= {"train/updates_applied": applied, "train/skipped_total": policy.skipped}
    if not norms:
        return metrics
    sums = ranks.merge(sums)
    tokens = float(sums["tokens"])
    return metrics | mismatch_metrics({k[4:]: v for k, v in sums.items() if k.startswith("gap_")}) | {
        "train/loss": sum(losses) / len(losses),
        "train/grad_norm": sum(norms) / len(norms),
        "train/tokens": tokens,
        "train/entropy": float(sums["entropy_sum"]) / tokens,
        "train/ratio_mean": float(sums["ratio_sum"]) / tokens,
        "train/ratio_max": float(sums["ratio_max"]),
        "train/clip_low_share": float(sums["clipped_low"]) / tokens,
        "train/clip_high_share": float(sums["clipped_high"]) / tokens,
        "train/dual_clip_share": float(sums["dual_clipped"]) / tokens,
        "train/is_weight_mean": float(sums["is_weights_sum"]) / tokens,
        "train/is_weight_max": float(sums["is_weights_max"]),
        "train/is_capped_share": float(sums["is_capped"]) / tokens,
        "train/is_masked_share": float(sums["is_masked"]) / tokens,
        "train/is_capped_sequence_share": float(sums["is_capped_sequences"]) / float(sums["sequences"]),
        "train/is_masked_sequence_share": float(sums["is_masked_sequences"]) / float(sums["sequences"]),
    }  # fmt: skip


def sync_weights(engine: Engine, plan: SyncPlan, version: int, clock: Clock, full_verify: bool = False) -> None:
    """Policy -> engine, proved, published: after this the engine samples from `version` and from nothing older."""
    with clock("sync"):
        plan.sync()
    with clock("verify"):
        plan.verify(turn=version, full=full_verify)
    engine.publish(version)


def build_batch(groups: list[Group], args: Args, device: torch.device) -> tuple[Batch, dict[str, float]]:
    """Groups as one batch, with advantages and mask; the soft overlong penalty goes on after the groups were chosen."""
    samples = [s for g in groups for s in g.samples]
    lengths = torch.tensor([len(s.token_ids) for s in samples])
    rewards_P_G = torch.tensor([g.rewards for g in groups], dtype=torch.float32)
    penalty_N = soft_overlong_penalty(lengths, args.max_response_len, args.overlong_buffer)
    advantages_P_G = advantages_by(args.advantage, rewards_P_G + penalty_N.view_as(rewards_P_G))
    rollout_logprobs = torch.tensor([x for s in samples for x in s.rollout_logprobs], dtype=torch.float32)
    sampled = torch.ones_like(rollout_logprobs, dtype=torch.bool)
    if args.overlong_filter:
        sampled = overlong_mask(torch.tensor([s.finish_reason == "length" for s in samples]), lengths)
    mask = finite_mask(rollout_logprobs, sampled)
    batch = Batch(
        prompt_ids=[g.prompt.token_ids for g in groups for _ in g.samples],
        response_ids=[s.token_ids for s in samples],
        rollout_logprobs=rollout_logprobs.to(device),
        advantages=advantages_P_G.flatten().repeat_interleave(lengths).to(device),
        mask=mask.to(device),
    )
    return batch, {
        "train/tokens_filtered": int((~sampled).sum()),
        "train/tokens_nonfinite": int((sampled & ~mask).sum()),
        "reward/overlong_penalty_mean": float(penalty_N.mean()),
    }


def few_sequences(groups: list[Group]) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of one sample of each of eight groups; the responses' first 512 tokens will do."""
    return [(g.prompt.token_ids, g.samples[0].token_ids[:512]) for g in groups[:8]]


def split_groups(groups: int, samples: int, parts: int) -> Iterator[list[int]]:
    """Sample rows of each of `parts` mini-batches; whole groups, sizes differ by one group at most."""
    parts = min(parts, groups)
    for part in range(parts):
        first, last = groups * part // parts, groups * (part + 1) // parts
        yield list(range(first * samples, last * samples))


def evaluate(
    engine: Engine, held_out: list[Prompt], rewards: RewardPool, args: Args, run: RunFolder, step: int
) -> float:
    """Mean reward of one greedy answer to each held-out prompt, given by the (quantized) engine; nan without any."""
    if not held_out:
        return math.nan
    start, ranks = time.perf_counter(), engine.ranks
    mine = held_out[ranks.group :: ranks.groups]
    answers = engine.generate([p.token_ids for p in mine], n=1, max_tokens=args.max_response_len, greedy=True)
    for i, (prompt, answer) in enumerate(zip(mine, answers, strict=True)):
        if ranks.speaks:
            rewards.submit(i, prompt.example, answer[0].text)
    accuracy = sum(ranks.gather(sum(rewards.collect().values()))) / len(held_out)
    if step == 0:
        run.log({"step": 0, "eval/accuracy": accuracy, "time/eval": time.perf_counter() - start})
        print(f"before training: held-out accuracy {accuracy:.3f} (greedy, {len(held_out)} prompts)", flush=True)
    return accuracy


def speed_metrics(metrics: dict[str, float], used: MemoryLog | None) -> dict[str, float]:
    """Rates of the step, the share of it that neither sampled nor trained, and on a GPU the memory in use."""
    generating = max(metrics["time/rollout"] - metrics["time/score"], 1e-9)
    training = max(metrics["time/train"] - metrics.get("time/pack", 0.0), 1e-9)
    step = metrics["time/step"] - metrics.get("time/eval", 0.0)
    return {
        "speed/rollout_tokens_per_s": metrics["response/tokens"] / generating,
        "speed/train_tokens_per_s": metrics.get("train/tokens", 0) / training,
        "speed/overhead_share": 1.0 - (generating + training) / step,
        "memory/host_gib": host_used() / GIB,
    } | ({} if used is None else used.metrics())


def step_line(step: int, steps: int, metrics: dict[str, float], accuracy: float | None) -> str:
    """The terminal's line for a step."""
    gap = metrics.get("mismatch/abs_dlogp_mean", math.nan)
    held_out = "" if accuracy is None else f" held-out {accuracy:.3f} |"
    phases = " ".join(f"{k} {metrics[f'time/{k}']:.2f}" for k in ("rollout", "train", "sync", "verify"))
    return (
        f"step {step}/{steps} | reward {metrics['reward/mean']:.3f} |{held_out} |dlogp| {gap:.4f} | "
        f"{metrics['speed/rollout_tokens_per_s']:.0f} tok/s | {phases} s | step {metrics['time/step']:.2f} s"
    )


def config_of(args: Args) -> dict[str, Any]:
    """The arguments as JSON (infinity as a string, since JSON has none)."""
    return {k: str(v) if v == math.inf else v for k, v in dataclasses.asdict(args).items()}


def with_resumed(args: Args) -> Args:
    """The arguments of the run that --resume or an existing --run-name goes on with, where there is one."""
    by_name = args.resume is None
    if by_name and (args.run_name is None or not is_run(Path(args.runs_dir) / args.run_name)):
        return args
    folder = Path(args.runs_dir) / str(args.run_name) if args.resume is None else Path(args.resume)
    resumed = args.resumed(saved_config(folder), by_name)
    return dataclasses.replace(resumed, resume=str(folder), run_name=folder.name, runs_dir=str(folder.parent))


ERRORS = (
    AlarmError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    lora.LoraError,
    MemoryPlanError,
    OptimizerError,
    PackingError,
    PolicyError,
    RanksError,
    RewardError,
    RunFolderError,
    SyncError,
    TrackerError,
)


def _what_failed(error: BaseException) -> str:
    """What a run says of its end: a message, or the traceback of what has none."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ERRORS):
        return redacted(f"error: {error}")
    return redacted("".join(traceback.format_exception(error)).rstrip())


def main() -> None:
    ranks = Ranks()
    try:
        args = flags()
        ranks = Ranks.start(args.tp)
        train(args, ranks)
        ranks.finish()
    except KeyboardInterrupt:
        if ranks.world > 1:
            ranks.failed("interrupted")
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if ranks.world > 1:
            ranks.failed(_what_failed(error))
        # All ranks find the same before they have met: the first one says it. What is unknown may be of one alone.
        alike = isinstance(error, ERRORS) and os.environ.get("RANK", "0") != "0"
        sys.exit(1 if alike else _what_failed(error))


def flags() -> Args:
    """The command line, read alike by all ranks; the first one speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        return with_resumed(read_flags(__doc__)).resolved()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        return with_resumed(read_flags(__doc__)).resolved()


if __name__ == "__main__":
    main()
