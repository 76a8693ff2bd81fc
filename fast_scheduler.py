"""vLLM's scheduler with a short way for the steps that only decode: what a token costs in Python while rollouts run.

vLLM's scheduler treats each running request in each step as if anything could happen to it. In a rollout nearly every
request of nearly every step gets one more token and nothing else, so three things are shortened, and all else stays
vLLM's own code:

- schedule: running requests that each need one token are scheduled here; vLLM's code admits waiting ones behind them.
  A request touches the KV cache's books only where a block begins or ends. A step in which a prompt is in parts, or too
  few blocks are free (so that vLLM preempts), is vLLM's.
- update_from_output: a token that does not end its request is appended here. First tokens, last tokens, preempted
  requests and everything unusual go to vLLM's code.
- output: tokens and log-probs wait here until the request ends and then leave in one piece, so that vLLM's output
  processor has nothing to do per token. Only for requests whose caller waits for the end anyway (`LLM.generate` and
  `LLM.enqueue` do) and that make no text. A request aborted from outside loses the tokens that still wait.

vLLM takes it through its option `scheduler_cls="fast_scheduler.build_scheduler"`, with and without async scheduling.
What is replicated here was read in vLLM 0.26 and 0.32: if the source of one of those functions is another, or the
configuration is one that was not provided for, one warning says so and vLLM's own scheduler is used.
"""

import copy
import dataclasses
import hashlib
import inspect
import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

QUALNAME = "fast_scheduler.build_scheduler"  # for LLM(scheduler_cls=...)

# Fingerprints (see `fingerprint`) in vLLM 0.26 and 0.32 of all that is replicated or relied on here.
READ = {
    "Scheduler.schedule": ("c83d498e", "7c9dcab5"),
    "Scheduler._make_cached_request_data": ("7fc979b0",),
    "Scheduler._update_after_schedule": ("a4954924", "868f7779"),
    "Scheduler._preempt_request": ("60c6607c", "2a9dbe70"),
    "Scheduler.update_from_output": ("b7385b0d", "83f03f41"),
    "Scheduler._update_request_with_output": ("024f3ce5", "c4770fc3"),
    "Scheduler.add_request": ("f8b53aff", "35c2c5cb"),
    "Scheduler._free_request": ("a54e6b44", "19ae3b8e"),
    "AsyncScheduler._update_after_schedule": ("09f6f2dd", "131e68f6"),
    "AsyncScheduler._update_request_with_output": ("94840139", "77c3a301"),
    "Request.__init__": ("8a4ca69a", "334dad3b"),
    "Request.append_output_token_ids": ("d39732d9",),
    "Request.update_block_hashes": ("cc60dbdc",),
    "KVCacheManager.allocate_slots": ("b3b60c6a", "6006f6d5"),
    "KVCacheManager.cache_blocks": ("fe254a04",),
    "KVCacheCoordinator.allocate_new_blocks": ("2d08fe0e",),
    "SingleTypeKVCacheManager.get_num_blocks_to_allocate": ("fb9e04a4", "77e32466"),
    "SingleTypeKVCacheManager.allocate_new_blocks": ("ef5a7211",),
    "SingleTypeKVCacheManager.cache_blocks": ("d3966e79", "9ce5dd10"),
    "SingleTypeKVCacheManager.get_num_skipped_tokens": ("3e4ade7f",),
    "FullAttentionManager.cache_blocks": ("00eb31a7", "383b4703"),
    "OutputProcessor.process_outputs": ("2908ed54", "8d4a8356"),
    "RequestState.make_request_output": ("3461dc51", "38516c44"),
    "LogprobsProcessor._update_sample_logprobs": ("83c72719",),
    "LogprobsProcessor.update_from_output": ("03f082c0", "b3520aa5"),
    "check_stop": ("e6dc016b", "4f5dc90b"),
    "get_request_block_hasher": ("a0e51ad1", "af2a16de"),
    "CachedRequestData": ("7f28d725",),
    "SchedulerOutput": ("1dd26977", "25f02a41"),
    "EngineCoreOutput": ("53145e55", "5cc101f8"),
    "LogprobsLists": ("89872c85",),
}


def fingerprint(source: str) -> str:
    """Of Python source, comments and layout left out."""
    code = re.sub(r"#[^\n]*|\s", "", source)
    return hashlib.sha256(code.encode()).hexdigest()[:8]


def relied_on() -> dict[str, Any]:
    """Name -> vLLM's function or class whose behaviour this module replicates or builds on.

    Raises ImportError or AttributeError if this vLLM lacks one.
    """
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.core.sched import utils
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.outputs import LogprobsLists
    from vllm.v1.request import Request

    methods = {
        Scheduler: (
            "schedule", "_make_cached_request_data", "_update_after_schedule", "_preempt_request", "update_from_output",
            "_update_request_with_output", "add_request", "_free_request",
        ),
        AsyncScheduler: ("_update_after_schedule", "_update_request_with_output"),
        Request: ("__init__", "append_output_token_ids", "update_block_hashes"),
        KVCacheManager: ("allocate_slots", "cache_blocks"),
        KVCacheCoordinator: ("allocate_new_blocks",),
        SingleTypeKVCacheManager: ("get_num_blocks_to_allocate", "allocate_new_blocks", "cache_blocks",
                                   "get_num_skipped_tokens"),
        FullAttentionManager: ("cache_blocks",),
        OutputProcessor: ("process_outputs",),
        RequestState: ("make_request_output",),
        LogprobsProcessor: ("_update_sample_logprobs", "update_from_output"),
    }  # fmt: skip
    found = {f"{cls.__name__}.{name}": getattr(cls, name) for cls, names in methods.items() for name in names}
    whole = (utils.check_stop, get_request_block_hasher, CachedRequestData, SchedulerOutput, EngineCoreOutput)
    return found | {item.__name__: item for item in (*whole, LogprobsLists)}


def unknown_vllm() -> str | None:
    """Why this vLLM is not one that was read; None if it is."""
    try:
        changed = [name for name, item in relied_on().items() if fingerprint(inspect.getsource(item)) not in READ[name]]
    except (AttributeError, ImportError, OSError) as error:
        return f"this vLLM is built otherwise than 0.26 and 0.32 ({error})"
    return f"in this vLLM the source of {', '.join(changed)} is not that of 0.26 or 0.32" if changed else None


def unsupported(vllm_config: Any, kv_cache_config: Any, options: dict[str, Any]) -> str | None:
    """What in the engine's configuration was not provided for; None if all of it was."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    parallel, scheduling, model = vllm_config.parallel_config, vllm_config.scheduler_config, vllm_config.model_config
    groups = kv_cache_config.kv_cache_groups
    block = groups[0].kv_cache_spec.block_size if groups else None
    found = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "an encoder connector": vllm_config.ec_transfer_config is not None,
        "KV cache events": vllm_config.kv_events_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "data parallelism inside vLLM": parallel.data_parallel_size > 1,
        "a model that is more than a text decoder": model.runner_type != "generate"
        or model.is_encoder_decoder
        or model.is_multimodal_model
        or model.is_diffusion,
        "layers other than full attention": len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec,
        "prefix hashes finer than a block": options.get("hash_block_size") not in (None, block)
        or options["block_size"] != block,
        "vLLM's statistics": options.get("log_stats", False),
        "scheduling by priority": scheduling.policy != "fcfs",
        "a limit on long prompts": scheduling.long_prefill_token_threshold > 0,
        "a watermark of free blocks": scheduling.watermark > 0,
        "routed experts": getattr(model, "enable_return_routed_experts", False),
    }
    return ", ".join(name for name, here in found.items() if here) or None


def build_scheduler(vllm_config: Any, kv_cache_config: Any, **options: Any) -> Any:
    """What vLLM calls in place of its scheduler's class; an object of that class, with the short ways or, after a
    warning, as it is."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    own = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    reason = unknown_vllm()
    if reason is None:
        reason = unsupported(vllm_config, kv_cache_config, options)
        reason = reason and f"it does not provide for {reason}"
    if reason is not None:
        logger.warning("fast scheduler off, vLLM's own is used: %s", reason)
        return own(vllm_config=vllm_config, kv_cache_config=kv_cache_config, **options)
    cls = type(f"Fast{own.__name__}", (FastPath, own), {})
    return cls(vllm_config=vllm_config, kv_cache_config=kv_cache_config, **options)


def scheduler_of(llm: "LLM") -> Any:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


class Held:
    """A request whose outputs wait: `logprobs[i]` and `ranks[i]` are those of output token `start` + i."""

    __slots__ = ("all_ids", "limit", "logprobs", "output_ids", "ranks", "request", "start", "stops", "with_logprobs")

    def __init__(self, request: "Request", max_model_len: int):
        params = request.sampling_params
        self.request = request
        self.all_ids, self.output_ids = request._all_token_ids, request._output_token_ids
        self.stops = {params.eos_token_id, *(params.stop_token_ids or ())}
        self.limit = min(max_model_len, request.num_prompt_tokens + request.max_tokens)  # tokens with which it ends
        self.with_logprobs = params.num_logprobs is not None
        self.start = 0
        self.logprobs: list[float] = []
        self.ranks: list[int] = []


class FastPath:
    """The short ways, for a class that inherits from this one and from vLLM's Scheduler or AsyncScheduler.

    With `keeps_logprobs` the log-probs of requests that make no text stay in `logprobs[request id]` until they are
    taken from there, and vLLM's outputs have none: the 2 us a token that vLLM takes to repack them are saved.
    """

    def __init__(self, **options: Any):
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.core.sched.interface import PauseState
        from vllm.v1.core.sched.output import CachedRequestData
        from vllm.v1.outputs import LogprobsLists

        super().__init__(**options)
        self.keeps_logprobs = False
        self.logprobs: dict[str, list[float]] = {}
        self.fast_steps = self.own_steps = self.fast_tokens = 0  # what went which way, to look at
        self._cached_request_data, self._logprobs_lists = CachedRequestData, LogprobsLists
        self._unpaused, self._final_only = PauseState.UNPAUSED, RequestOutputKind.FINAL_ONLY
        self._is_async = self.scheduler_config.async_scheduling
        self._block = self.kv_cache_manager.coordinator.single_type_managers[0].block_size
        self._held: dict[str, Held] = {}
        self._decoding: dict[str, Held] = {}  # those of them that had their first token and were never preempted
        self._ended: dict[str, Held] = {}  # those that ended while vLLM's update_from_output runs
        self._unusual: set[str] = set()  # requests during which every step is vLLM's

    # -- requests ------------------------------------------------------------------------------------------------

    def add_request(self, request: "Request") -> None:
        if request.request_id not in self.requests:
            params = request.sampling_params
            if (
                params is None
                or request.pooling_params is not None
                or request.structured_output_request is not None
                or request.prompt_embeds is not None
                or request.mm_features
                or request.lora_request is not None
                or request.resumable
                or params.repetition_detection is not None
            ):
                self._unusual.add(request.request_id)
            elif (
                params.output_kind == self._final_only
                and not params.detokenize
                and not params.stop
                and params.logprobs in (None, 0)
                and params.num_logprobs == params.logprobs
                and params.prompt_logprobs is None
                and request.client_index == 0
                and request.trace_headers is None
            ):
                self._held[request.request_id] = Held(request, self.max_model_len)
        super().add_request(request)

    def _preempt_request(self, request: "Request", *args: Any, **kwargs: Any) -> None:
        self._decoding.pop(request.request_id, None)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: "Request", *args: Any, **kwargs: Any) -> Any:
        self._unusual.discard(request.request_id)
        self._decoding.pop(request.request_id, None)
        held = self._held.pop(request.request_id, None)
        if held is not None:
            self._ended[request.request_id] = held
        return super()._free_request(request, *args, **kwargs)

    # -- schedule ------------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> Any:
        running = self.running
        plan = None
        if running and not (throttle_prefills or self._unusual) and self._pause_state == self._unpaused:
            plan = self._plan(running)
        if plan is None:
            self.own_steps += 1
            return super().schedule(throttle_prefills)
        self.fast_steps += 1
        ids, requests, computed, outputs, edges = plan
        blocks = self._turn_blocks(requests, computed, edges)

        # vLLM's own code does the rest of the step, with what the running requests leave of the limits.
        limits = {n: getattr(self, n) for n in ("max_num_running_reqs", "max_num_active_reqs") if hasattr(self, n)}
        budget = self.max_num_scheduled_tokens
        self.running = []
        self.max_num_scheduled_tokens = budget - len(ids)
        for name, limit in limits.items():
            setattr(self, name, limit - len(running))
        try:
            step = super().schedule(throttle_prefills)
        finally:
            self.max_num_scheduled_tokens = budget
            for name, limit in limits.items():
                setattr(self, name, limit)
            running.extend(self.running)
            self.running = running

        for request in requests:
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
        if self._is_async:
            for request in requests:
                request.num_output_placeholders += 1
        if not self.use_v2_model_runner:
            self.prev_step_scheduled_req_ids.update(ids)
        cached = step.scheduled_cached_reqs
        step.scheduled_cached_reqs = self._cached_request_data(
            req_ids=ids + cached.req_ids,
            resumed_req_ids=cached.resumed_req_ids,
            new_token_ids=cached.new_token_ids,
            all_token_ids=cached.all_token_ids,
            new_block_ids=blocks + cached.new_block_ids,
            num_computed_tokens=computed + cached.num_computed_tokens,
            num_output_tokens=outputs + cached.num_output_tokens,
        )
        step.num_scheduled_tokens = dict.fromkeys(ids, 1) | step.num_scheduled_tokens
        step.total_num_scheduled_tokens += len(ids)
        if step.num_common_prefix_blocks:  # of older versions, for cascade attention
            step.num_common_prefix_blocks = self.kv_cache_manager.get_num_common_prefix_blocks(running[0].request_id)
        return step

    def _plan(self, running: list["Request"]) -> tuple[list, list, list, list, list] | None:
        """(ids, requests, their computed tokens, their output tokens, indices of those that begin or end a block) of a
        step; None if a request needs more than one token, or more blocks than are free. Changes nothing."""
        block, last = self._block, self.max_model_len - 1
        ids, requests, computed_tokens, output_tokens, edges = [], [], [], [], []
        needed = 0
        for request in running:
            computed, pending = request.num_computed_tokens, request.num_output_placeholders
            if len(request._all_token_ids) + pending - computed != 1 or request.is_prefill_chunk:
                return None
            if pending and computed + 2 - pending >= request.num_prompt_tokens + request.max_tokens:
                continue  # its last token is on the way
            if computed >= last:
                continue
            place = computed % block
            if place == 0 or (place == block - 1 and not pending):
                needed += place == 0
                edges.append(len(ids))
            ids.append(request.request_id)
            requests.append(request)
            computed_tokens.append(computed)
            output_tokens.append(len(request._output_token_ids) + pending)
        if len(ids) > self.max_num_scheduled_tokens or needed > self.kv_cache_manager.block_pool.get_num_free_blocks():
            return None
        if not self.use_v2_model_runner and not self.prev_step_scheduled_req_ids.issuperset(ids):
            return None  # the runner wants all tokens of a request that it left out in the last step
        return ids, requests, computed_tokens, output_tokens, edges

    def _turn_blocks(self, requests: list["Request"], computed: list[int], edges: list[int]) -> list:
        """Where a block is full it enters the prefix cache, and a new one is taken: what `allocate_slots` does for a
        request that gets one token. Returns the new blocks' numbers of each request, or None."""
        blocks: list[tuple[list[int], ...] | None] = [None] * len(requests)
        manager = self.kv_cache_manager
        for i in edges:
            request, length = requests[i], computed[i] + 1
            if length % self._block == 1:
                new = manager.coordinator.allocate_new_blocks(request.request_id, length, length, 0)
                blocks[i] = tuple([block.block_id for block in group] for group in new)
            manager.cache_blocks(request, min(length, len(request._all_token_ids)))
        return blocks

    # -- update --------------------------------------------------------------------------------------------------

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        rest = self._take_tokens(scheduler_output.num_scheduled_tokens, model_runner_output)
        if len(rest) < len(scheduler_output.num_scheduled_tokens):
            self.fast_tokens += len(scheduler_output.num_scheduled_tokens) - len(rest)
            scheduler_output = copy.copy(scheduler_output)
            scheduler_output.num_scheduled_tokens = rest
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for of_client in outputs.values():
            for output in of_client.outputs:
                name = output.request_id
                held = self._ended.get(name) or self._held.get(name)
                if held is not None:
                    self._complete(output, held)
                    if name in self._held and not held.request.num_preemptions:
                        self._decoding[name] = held
        self._ended.clear()
        return outputs

    def _take_tokens(self, scheduled: dict[str, int], model_output: Any) -> dict[str, int]:
        """Append the tokens that end no request; returns the part of `scheduled` that is left to vLLM."""
        sampled, index, logprobs = model_output.sampled_token_ids, model_output.req_id_to_index, model_output.logprobs
        if not sampled or not self._only_tokens(model_output):
            return scheduled
        values = ranks = None
        if logprobs is not None:
            values, ranks = logprobs.logprobs[:, 0].tolist(), logprobs.sampled_token_ranks.tolist()
        block, is_async, keeps = self._block, self._is_async, self.keeps_logprobs
        rest: dict[str, int] = {}
        decoding = self._decoding
        for name, count in scheduled.items():
            held = decoding.get(name)
            if held is None:
                rest[name] = count
                continue
            i, all_ids = index[name], held.all_ids
            new = sampled[i]
            if (
                len(new) != 1
                or (token := new[0]) in held.stops
                or len(all_ids) + 1 >= held.limit
                or (values is None and held.with_logprobs)
            ):
                rest[name] = count
                continue
            all_ids.append(token)
            held.output_ids.append(token)
            if held.with_logprobs:
                held.logprobs.append(values[i])
                if not keeps:
                    held.ranks.append(ranks[i])
            request = held.request
            request.num_in_flight_tokens -= count
            if is_async:  # vLLM also caches blocks here, but `schedule` has done so one step before
                request.num_output_placeholders -= 1
            if len(all_ids) % block == 0:
                request.update_block_hashes()
        return rest

    @staticmethod
    def _only_tokens(model_output: Any) -> bool:
        """True if a step's output is sampled tokens and at most their log-probs, one row a request."""
        usual = ("req_ids", "req_id_to_index", "sampled_token_ids", "logprobs", "cudagraph_stats")
        for field in dataclasses.fields(model_output):
            value = getattr(model_output, field.name)
            if field.name not in usual and value is not None and value != {}:
                return False
        return model_output.logprobs is None or model_output.logprobs.cu_num_generated_tokens is None

    def _complete(self, output: Any, held: Held) -> None:
        """Put what waited in front of what vLLM's code now gives for the request."""
        late, output_ids = output.new_logprobs, held.output_ids
        waited = len(output_ids) - held.start - len(output.new_token_ids)
        if waited:
            output.new_token_ids = output_ids[held.start :]
        if held.with_logprobs and self.keeps_logprobs:
            kept = self.logprobs.setdefault(output.request_id, [])
            kept += held.logprobs
            if late is not None:
                kept += late.logprobs[:, 0].tolist()
            output.new_logprobs = None
        elif held.with_logprobs and waited:
            rows = (
                np.array(output_ids[held.start :][:waited], np.int32)[:, None],
                np.array(held.logprobs, np.float32)[:, None],
                np.array(held.ranks),
            )
            if late is not None:
                late = (late.logprob_token_ids[:, :1], late.logprobs[:, :1], late.sampled_token_ranks)
                rows = tuple(np.concatenate(pair) for pair in zip(rows, late, strict=True))
            output.new_logprobs = self._logprobs_lists(*rows)
        held.start = len(output_ids)
        held.logprobs, held.ranks = [], []
