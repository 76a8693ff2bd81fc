"""The sampler: a vLLM engine inside this process, and groups of samples drawn from it.

Axes: P prompts, G samples a prompt.

The engine never reads a checkpoint: it is built with dummy weights and filled by the first sync, and it refuses to
generate until a version of the policy has been published to it. Log-probs are vLLM's processed ones at temperature T
over the full vocabulary (top-p 1, no top-k): the true log mu(a) of the distribution that was sampled. Anything that
truncates the distribution would bias pi/mu and is refused by the flags.

vLLM's cost per token is Python, not the GPU, for small models; so it makes no text (one batch decode at the end), its
log-probs come as flat lists, the garbage collector rests while it generates, and fast_scheduler.py shortens its steps.
"""

import contextlib
import gc
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from engine_options import EngineError, check_platform, graph_sizes, quantization_options
from fast_scheduler import QUALNAME, FastPath, scheduler_of
from loop_control import Stopped
from ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data import Prompt, PromptStream
    from reward_pool import RewardPool


@dataclass(slots=True)
class Sample:
    """One sampled response. `rollout_logprobs[i]` is log mu of `token_ids[i]`; the end-of-sequence token is included
    where the model gave one (finish_reason "stop"); "length" means it was cut at the limit. `logprobs` is the trainer's
    log pi_old of the same tokens, of samples that are logged after they were trained on; else empty."""

    token_ids: list[int]
    rollout_logprobs: list[float]
    finish_reason: str
    text: str
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Group:
    """G samples of one prompt with their raw rewards, drawn from policy `version`."""

    prompt: "Prompt"
    samples: list[Sample]
    version: int
    rewards: list[float] = field(default_factory=list)

    @property
    def mixed(self) -> bool:
        """True if the raw rewards are not all equal, i.e. if the group has a gradient."""
        return min(self.rewards) != max(self.rewards)


class Engine:
    """vLLM's `LLM` in this process, with sleep, publishing and sampling reduced to what the loop needs.

    Args:
        model: folder or Hub name; its config and tokenizer are read, its weights are not.
        tokenizer: decodes the samples; None leaves texts empty, and vLLM with the config's end-of-sequence token alone.
        quant: format of the weights, a key of QUANTIZATION.
        skip: HF names of linear layers that stay bf16 (see `skipped_layers`).
        kv_cache_dtype: "auto" (bf16) or "fp8" (e4m3 with scales of 1; half the memory a token).
        max_model_len: prompt + response, tokens.
        max_num_seqs: sequences that run at once.
        kv_cache_bytes: size of the KV cache.
        sleep_level: 0 stay resident, 1 weights to the host, 2 drop the weights (the sync writes them anyway).
        memory_fraction: share of the device that must be free at start (vLLM checks it); GPU only.
        fast_scheduler: vLLM's scheduler with fast_scheduler.py's short ways, where this vLLM is one that it knows.
        ranks: with several, each makes its engine at the same time, and those of a tensor-parallel group (ranks.tp)
            are parts of one: they must be asked the same, and sample the same.

    Raises EngineError if vLLM, the GPU's FP8 or the memory is missing.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: "PreTrainedTokenizerBase | None",
        quant: str,
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_bytes: int,
        skip: Sequence[str] = (),
        kv_cache_dtype: str = "auto",
        sleep_level: int = 0,
        memory_fraction: float = 0.5,
        temperature: float = 1.0,
        seed: int = 0,
        trust_remote_code: bool = False,
        fast_scheduler: bool = True,
        ranks: "Ranks | None" = None,
    ):
        on_gpu = check_platform(quant, kv_cache_dtype)
        import vllm

        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise EngineError(
                "VLLM_ENABLE_V1_MULTIPROCESSING must be 0 (import runtime first sets it): in a process of its own the "
                "engine's tensors could not be written in place"
            )
        if not on_gpu:
            import cpu_backend

            cpu_backend.prepare()
            sleep_level = 0
        self.quant, self.temperature, self.sleep_level = quant, temperature, sleep_level
        self.version: int | None = None  # None: the weights are dummies, or were dropped by sleep level 2
        self.asleep = False
        self.ranks = ranks or Ranks()
        self.before_step: Callable[[], None] = lambda: None  # called while generating; what it raises ends that
        self.meanwhile: Callable[[], None] = lambda: None  # called while generating: other work that must not wait
        self.seconds_loading = math.nan  # of the last load_by_vllm
        self._tokenizer = tokenizer
        self._sampling_params = vllm.SamplingParams
        sizes = graph_sizes(max_num_seqs) if on_gpu else None
        state = torch.random.get_rng_state()
        try:
            self.llm = vllm.LLM(
                model=model,
                skip_tokenizer_init=tokenizer is None,
                dtype="bfloat16",
                **quantization_options(quant, skip),
                kv_cache_dtype=kv_cache_dtype,
                load_format="dummy",
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                kv_cache_memory_bytes=kv_cache_bytes,
                gpu_memory_utilization=memory_fraction,
                enable_sleep_mode=sleep_level > 0,
                enforce_eager=not on_gpu,  # CUDA graphs on a GPU; the CPU has none to capture
                enable_prefix_caching=True,  # the G samples of a group share their prompt
                logprobs_mode="processed_logprobs",
                seed=seed + self.ranks.group,
                trust_remote_code=trust_remote_code,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **({"scheduler_cls": QUALNAME} if fast_scheduler else {}),
                **({"compilation_config": {"cudagraph_capture_sizes": sizes}} if sizes else {}),
                **_launched(self.ranks),
            )
        except (OSError, ValueError, RuntimeError) as error:  # torch's out-of-memory error is a RuntimeError
            raise EngineError(
                f"vLLM could not build the engine for {model}: {_reason(error)}. Its memory is decided by "
                "--kv-cache-gib, --max-num-seqs, --max-prompt-len and --max-response-len"
            ) from error
        finally:
            torch.random.set_rng_state(state)  # LLM() seeds torch globally
        scheduler = scheduler_of(self.llm)
        self._kept_logprobs: dict[str, list[float]] | None = None  # request id -> log-probs; None: vLLM hands them out
        if isinstance(scheduler, FastPath):
            scheduler.keeps_logprobs, self._kept_logprobs = True, scheduler.logprobs
        self.model: torch.nn.Module = self.llm.apply_model(lambda module: module)[0]
        _settle_kv_scales(self.model)
        self._others = self._save_others() if sleep_level == 2 else {}

    # -- weights -------------------------------------------------------------------------------------------------

    def publish(self, version: int) -> None:
        """Declare that the engine's tensors now hold policy `version`, and drop every cached prefix of the old one.

        Raises EngineError if a newer version was already published, or if vLLM keeps its cache.
        """
        if self.version is not None and version < self.version:
            raise EngineError(f"version {version} is older than {self.version}, which the engine already holds")
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM did not drop its prefix cache; keys of old weights would be reused")
        self.version = version

    def load_by_vllm(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """HF's tensors through vLLM's own loader, slowly: what a sync is measured against (`seconds_loading`)."""
        log = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns of every module that has no weights
        start = time.perf_counter()
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise EngineError(
                f"vLLM's own loader failed: {error}. --no-prove-sync starts without comparing the sync with it"
            ) from error
        finally:
            log.setLevel(level)
        self.seconds_loading = time.perf_counter() - start
        self.version = None

    def sleep(self) -> None:
        """Give the engine's memory back to the trainer (nothing at sleep level 0)."""
        if self.sleep_level == 0 or self.asleep:
            return
        torch.cuda.synchronize()
        with _frozen_heap():  # vLLM collects garbage when it sleeps: with its heap, most of the time of a sleep
            self.llm.sleep(level=self.sleep_level)
        self.asleep = True
        if self.sleep_level == 2:
            self.version = None

    def weight_blocks(self) -> list[tuple[int, int]]:
        """(address, bytes) of what sleep level 2 drops and a sync must write: all that is allocated in the memory that
        wakes as "weights", by the allocator's own list, but for buffers, which vLLM restores, and for what is neither
        parameter nor buffer, which `wake` restores. Empty without sleep mode."""
        if self.sleep_level == 0:
            return []
        restored = {t.data_ptr() for t in self.model.buffers()} | set(self._others)
        return [(address, size) for address, size in self._pool_blocks() if address not in restored]

    def _pool_blocks(self) -> Iterator[tuple[int, int]]:
        from vllm.device_allocator.cumem import CuMemAllocator

        allocations = CuMemAllocator.get_instance().pointer_to_data
        held = {address for address, data in allocations.items() if data.tag == "weights"}
        for segment in torch.cuda.memory_snapshot():
            if segment["address"] in held:
                for block in segment["blocks"]:
                    if block["state"] == "active_allocated":
                        yield block["address"], block["requested_size"]

    def _save_others(self) -> dict[int, tuple[int, torch.Tensor | None]]:
        """address -> (bytes, their values on the host; None: zeros) of what lies among the weights but is neither
        parameter nor buffer: states of vLLM's sampler, libraries' workspaces, as they are before the first request.
        vLLM would lose them."""
        known = {t.data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}
        others = {}
        for address, size in self._pool_blocks():
            if address not in known:
                values = _device_bytes(address, size)
                others[address] = (size, values.cpu() if bool(values.any()) else None)
        return others

    def wake(self, *tags: str) -> None:
        """Take memory back: "weights" before a sync, "kv_cache" before generating."""
        if not self.asleep:
            return
        torch.cuda.empty_cache()  # the allocator of sleep mode cannot see blocks that torch keeps for itself
        self.llm.wake_up(tags=list(tags))
        if "weights" in tags and self.sleep_level == 2:
            for address, (size, values) in self._others.items():
                memory = _device_bytes(address, size)
                memory.zero_() if values is None else memory.copy_(values)
        self.asleep = "kv_cache" not in tags

    # -- sampling ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[list[int]],
        *,
        n: int,
        max_tokens: int,
        greedy: bool = False,
        on_finished: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """n samples for each prompt (token ids), at the run's temperature, or one greedy sample.

        `on_finished(i, samples)` is called as soon as prompt i has all of its samples, while others still run. Greedy
        samples carry no log-probs: an argmax is no sample of mu.
        """
        if self.version is None or self.asleep:
            raise EngineError("the engine holds no weights of the policy: wake, sync and publish before generating")
        params = self._sampling_params(
            n=n,
            temperature=0.0 if greedy else self.temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=max_tokens,
            logprobs=None if greedy else 0,  # 0: the sampled token's alone
            flat_logprobs=True,
            detokenize=False,
        )
        groups: list[list[Sample]] = [[] for _ in prompts]
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        with _no_garbage_collection():
            try:
                names = self.llm.enqueue(requests, params, use_tqdm=False)
            except ValueError as error:  # a prompt that vLLM refuses
                raise EngineError(f"vLLM refuses a prompt: {_reason(error)}; look at --data and --model") from error
            index = {name.partition("-")[0]: i for i, name in enumerate(names)}  # vLLM's own ids: 17-5d21c3e9
            while self.llm.llm_engine.has_unfinished_requests():
                self.meanwhile()
                if self.ranks.tp == 1:  # ranks that hold one engine together end a round together
                    self.before_step()
                for output in self.llm.llm_engine.step():
                    if not output.finished:
                        continue
                    i = index[output.request_id]
                    groups[i] = [self._read_sample(out, names[i], n, greedy) for out in output.outputs]
                    if on_finished is not None:
                        self._decode(groups[i])
                        on_finished(i, groups[i])
        if on_finished is None:
            self._decode([s for group in groups for s in group])
        return groups

    def _read_sample(self, output: Any, name: str, n: int, greedy: bool) -> Sample:
        tokens, logprobs = list(output.token_ids), []
        if not greedy and self._kept_logprobs is not None:  # vLLM puts the sample's index before its request's name
            logprobs = self._kept_logprobs.pop(f"{output.index}_{name}" if n > 1 else name, [])
        elif not greedy:
            logprobs = list(output.logprobs.logprobs)
        if not greedy and len(logprobs) != len(tokens):
            raise EngineError(
                f"vLLM gave {len(logprobs)} log-probs for {len(tokens)} tokens; this version is not supported"
            )
        return Sample(tokens, logprobs, output.finish_reason, "")

    def _decode(self, samples: list[Sample]) -> None:
        if self._tokenizer is not None:
            texts = self._tokenizer.batch_decode([s.token_ids for s in samples], skip_special_tokens=True)
            for sample, text in zip(samples, texts, strict=True):
                sample.text = text


def _launched(ranks: Ranks) -> dict[str, Any]:
    """Arguments of vLLM's LLM where this process is one of several: vLLM's executor for workers that are started by
    torchrun. It finds its place in the process group of all ranks."""
    if ranks.world == 1:
        return {}
    return {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": ranks.tp}


def _reason(error: Exception) -> str:
    """What vLLM says, in one line; pydantic wraps it into several, and its lists of models are long."""
    text = " ".join(str(error).split()).partition(" [type=")[0]
    return text if len(text) <= 400 else text[:400] + "..."


def _device_bytes(address: int, size: int) -> torch.Tensor:
    """Memory of the current GPU as a tensor of bytes: a view, by the interface through which torch takes addresses."""

    class Memory:
        __cuda_array_interface__: ClassVar = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    return torch.as_tensor(Memory(), device="cuda")


def _settle_kv_scales(model: torch.nn.Module) -> None:
    """KV-cache scales of 1 where vLLM made parameters of them (a compressed-tensors config, so INT8): dummy loading
    filled those with noise. The sync writes the tensors again; vLLM also keeps their values as numbers."""
    for module in model.modules():
        for kind in "qkv":
            scale = getattr(module, f"_{kind}_scale", None)
            if isinstance(scale, torch.nn.Parameter):
                scale.data.fill_(1.0)
                setattr(module, f"_{kind}_scale_float", 1.0)
                host = getattr(module, f"_{kind}_scale_cpu", None)
                if host is not None:
                    host.fill_(1.0)


def sample_groups(
    engine: Engine,
    stream: "PromptStream",
    rewards: "RewardPool",
    *,
    prompts: int,
    samples: int,
    max_tokens: int,
    dynamic: bool = True,
    max_rounds: int = 4,
    expected_share: float = 1.0,
) -> tuple[list[Group], dict[str, float]]:
    """Draw groups until `prompts` of them have mixed rewards (DAPO's dynamic sampling, arXiv 2503.14476 section 3.2).

    A round draws as many prompts as the share kept so far asks for, the first one as `expected_share` does: each round
    ends in a tail in which few sequences still run, so one round that draws a few groups too many beats three. Groups
    whose raw rewards are all equal are dropped; what is drawn beyond `prompts` is dropped too, so that every step
    trains on at most `prompts` groups. After `max_rounds` the step goes on with what there is, which may be nothing.
    A group is scored as soon as it is complete, while the engine goes on with others.

    With several ranks each engine draws its share of a round's prompts, and every rank gets all groups, in one order.

    Returns the groups and `sampling/...` and `reward/...` metrics over everything drawn (docs/metrics.md).
    """
    ranks = engine.ranks
    drawn: list[Group] = []
    kept: list[Group] = []
    rounds, seconds_scoring = 0, 0.0
    while len(kept) < prompts and rounds < (max_rounds if dynamic else 1):
        missing = prompts - len(kept)
        share = 1.0 if not dynamic else len(kept) / len(drawn) if drawn else expected_share
        batch = stream.take(math.ceil(missing / max(share, 0.25)))
        mine = batch[ranks.group :: ranks.groups]

        def submit(i: int, drawn_for_it: list[Sample], mine: list["Prompt"] = mine) -> None:
            for j, sample in enumerate(drawn_for_it):
                rewards.submit((i, j), mine[i].example, sample.text)

        ids = [p.token_ids for p in mine]
        on_finished, stopped = submit if ranks.speaks else None, False
        try:
            sampled = engine.generate(ids, n=samples, max_tokens=max_tokens, on_finished=on_finished)
            engine.before_step()
        except Stopped:
            stopped = True
        if ranks.any(stopped):
            raise Stopped
        assert engine.version is not None
        start = time.perf_counter()
        scored = rewards.collect()
        seconds_scoring += time.perf_counter() - start
        groups = everyones(ranks, batch, sampled, scored, engine.version)
        drawn += groups
        kept += [g for g in groups if g.mixed or not dynamic]
        rounds += 1
    return kept[:prompts], _sampling_metrics(drawn, kept, prompts, rounds, seconds_scoring)


def everyones(
    ranks: Ranks, batch: list["Prompt"], sampled: list[list[Sample]], scored: dict[Any, float], version: int
) -> list[Group]:
    """The groups of a round's prompts, in their order, on every rank: `sampled` and `scored` (prompt, sample) are what
    this rank's engine made of its share."""
    if ranks.world == 1:
        parts = [(sampled, scored)]
    else:
        parts = ranks.gather((sampled, scored) if ranks.speaks else ([], {}))[:: ranks.tp]
    groups = []
    for i, prompt in enumerate(batch):
        of, at = i % ranks.groups, i // ranks.groups
        samples, rewards = parts[of][0][at], parts[of][1]
        groups.append(Group(prompt, samples, version, [rewards[at, j] for j in range(len(samples))]))
    return groups


def _sampling_metrics(
    drawn: list[Group], kept: list[Group], prompts: int, rounds: int, seconds_scoring: float
) -> dict[str, float]:
    every = [s for g in drawn for s in g.samples]
    rewards = [r for g in drawn for r in g.rewards]
    lengths = [len(s.token_ids) for s in every]
    mixed = sum(g.mixed for g in drawn)
    return {
        "sampling/rounds": rounds,
        "sampling/groups_drawn": len(drawn),
        "sampling/groups_mixed": mixed,
        "sampling/groups_equal": len(drawn) - mixed,
        "sampling/groups_surplus": max(0, len(kept) - prompts),
        "sampling/groups_trained": min(len(kept), prompts),
        "reward/mean": sum(rewards) / len(rewards),
        "reward/solved_share": sum(min(g.rewards) > 0 for g in drawn) / len(drawn),
        "reward/failed_share": sum(max(g.rewards) <= 0 for g in drawn) / len(drawn),
        "response/tokens": sum(lengths),
        "response/length_mean": sum(lengths) / len(lengths),
        "response/length_max": max(lengths),
        "response/truncated_share": sum(s.finish_reason == "length" for s in every) / len(every),
        "time/score": seconds_scoring,
    }


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """vLLM makes millions of small objects that live until the end; searching them meanwhile costs up to a third."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        with _frozen_heap():
            yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """What exists now is not searched by the garbage collector meanwhile."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
