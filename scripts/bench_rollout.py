"""Tokens per second of a rollout, from vLLM as it is shipped to what rollout.Engine does, one thing at a time.

One process, dummy weights (every sample has the full length), one engine for each scheduler:

    shipped        LLM.generate with text, log-probs as dicts, Python's garbage collector on
    no text        detokenize=False
    flat logprobs  flat_logprobs=True
    gc off         the collector rests while it generates
    no logprobs    none at all: the bound of what cheaper log-probs could give

"fast" has the last two with fast_scheduler.py and with CUDA graphs for steps of more than 512 tokens, and "kept
logprobs": they stay in the scheduler, where rollout.Engine takes them, so that this row is what it reaches. "process"
is vLLM's own scheduler with the engine in a process of its own (vLLM's default outside of training), where only the
outputs' Python is timed, and no collector rests there.

"python, us" is what schedule, update_from_output and process_outputs took of the row's time, each in microseconds a
token; their timers are on in every row. With async scheduling (vLLM's default on a GPU) the GPU works meanwhile.
--mean-tokens gives samples lengths as real ones have: each token ends its sample with a chance of one in so many. With
more samples than --max-num-seqs their places are then taken one by one, each by a prompt beside hundreds of decodes.
--scheduler-only needs no model and no GPU: vLLM's scheduler and output processor with a runner that invents tokens.

    python scripts/bench_rollout.py --shape qwen2.5-0.5b --quant fp8 --out rollout.json
    python scripts/bench_rollout.py --shape qwen2.5-1.5b --runner v1 --async-scheduling off --profile
    python scripts/bench_rollout.py --prompts 128 --max-tokens 512 --mean-tokens 300 --schedulers fast [--graphs vllm]
    python scripts/bench_rollout.py --shape tiny --samples 2 --prompts 8 --max-tokens 32     # a CPU will do
    python scripts/bench_rollout.py --scheduler-only --prompts 64 --samples 8 --max-tokens 128
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # noqa: F401  (first: it sets what torch and vLLM read at import)

if "--runner" in sys.argv[:-1]:  # vLLM reads it at import
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(sys.argv[sys.argv.index("--runner") + 1] == "v2"))

# isort: split
import argparse
import contextlib
import cProfile
import gc
import json
import pstats
import tempfile
import time
import zlib
from collections import deque
from typing import Any

import torch
from make_random_model import SHAPES, TOKENIZER, save_config

import fast_scheduler
from engine_options import QUANTIZATION, check_platform, graph_sizes, quantization_options
from rollout import _no_garbage_collection as no_garbage_collection

HEAD = "| scheduler | calls | tokens/s | gain | seconds | schedule, us | update | outputs |"
CALLS = {  # name -> options of SamplingParams, whether the collector rests
    "shipped": ({"logprobs": 0}, False),
    "no text": ({"logprobs": 0, "detokenize": False}, False),
    "flat logprobs": ({"logprobs": 0, "detokenize": False, "flat_logprobs": True}, False),
    "gc off": ({"logprobs": 0, "detokenize": False, "flat_logprobs": True}, True),
    "kept logprobs": ({"logprobs": 0, "detokenize": False, "flat_logprobs": True}, True),
    "no logprobs": ({"detokenize": False}, True),
}
OF = {
    "vllm": [c for c in CALLS if c != "kept logprobs"],
    "process": [c for c in CALLS if c != "kept logprobs"],
    "fast": ["gc off", "kept logprobs", "no logprobs"],
}


class Clock:
    """Seconds spent in vLLM's three functions that loop over requests."""

    def __init__(self, scheduler: Any, output_processor: Any):
        self.seconds = {"schedule": 0.0, "update": 0.0, "outputs": 0.0}
        if scheduler is not None:  # None: it lives in another process
            self._watch(scheduler, "schedule", "schedule")
            self._watch(scheduler, "update_from_output", "update")
        self._watch(output_processor, "process_outputs", "outputs")

    def _watch(self, owner: Any, method: str, name: str) -> None:
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        setattr(owner, method, timed)

    def reset(self) -> None:
        self.seconds = dict.fromkeys(self.seconds, 0.0)


# ---- the scheduler alone


class InventedRunner:
    """vLLM's scheduler and output processor, stepped as its EngineCore does, with tokens that are a hash of (request,
    position): what comes out depends on the scheduler alone. `vocabulary` tokens, of which 0 ends a response."""

    def __init__(
        self, *, fast: bool, is_async: bool, v2: bool = False, max_num_seqs: int = 512, max_model_len: int = 512,
        blocks: int = 1 << 16, batched_tokens: int = 8192, vocabulary: int = 1 << 30,
    ):  # fmt: skip
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.engine.output_processor import OutputProcessor
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        config = EngineArgs(
            model=str(TOKENIZER), skip_tokenizer_init=True, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=batched_tokens, enable_prefix_caching=True, block_size=16, enforce_eager=True,
        ).create_engine_config()  # fmt: skip
        config.scheduler_config.async_scheduling = is_async
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=16, dtype=torch.bfloat16)
        kv_cache = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        if fast:
            config.scheduler_config.scheduler_cls = fast_scheduler.QUALNAME
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config, kv_cache_config=kv_cache, structured_output_manager=StructuredOutputManager(config),
            block_size=16, hash_block_size=16, log_stats=False,
        )  # fmt: skip
        self.scheduler.use_v2_model_runner = v2
        self.output_processor = OutputProcessor(None, log_stats=False)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(16, sha256)
        self._depth, self._queue = 1 + is_async, deque()
        self._lengths: dict[str, int] = {}
        self._vocabulary = vocabulary

    def add(self, name: str, prompt: list[int], **options: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.request import Request

        options = {"logprobs": 0, "flat_logprobs": True, "detokenize": False, "ignore_eos": True} | options
        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **options)
        if not params.ignore_eos:
            params.update_from_generation_config({}, eos_token_id=0)
        request = EngineCoreRequest(
            request_id=name, prompt_token_ids=prompt, mm_features=None, sampling_params=params, pooling_params=None,
            arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None, external_req_id=name,
        )  # fmt: skip
        self.output_processor.add_request(request, None)
        self._lengths[name] = len(prompt)
        self.scheduler.add_request(Request.from_engine_core_request(request, self._hasher))

    def run(self, step: Any, known: dict[str, int]) -> Any:
        """The runner's output of a step; known: tokens of each cached request, sampled or on the way."""
        import numpy as np
        from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

        names = [r.req_id for r in step.scheduled_new_reqs] + step.scheduled_cached_reqs.req_ids
        at = {r.req_id: r.num_computed_tokens for r in step.scheduled_new_reqs}
        at |= dict(zip(step.scheduled_cached_reqs.req_ids, step.scheduled_cached_reqs.num_computed_tokens, strict=True))
        ends = [at[name] + step.num_scheduled_tokens[name] for name in names]
        tokens = [
            [] if end < known[name] else [zlib.crc32(f"{name} {end}".encode()) % self._vocabulary]
            for name, end in zip(names, ends, strict=True)
        ]
        rows = np.array([t[0] if t else 0 for t in tokens], np.int32)
        logprobs = LogprobsLists(rows[:, None], -(rows[:, None] % 997 / 100).astype(np.float32), rows % 7)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=tokens,
            logprobs=logprobs,
        )

    def step(self) -> tuple[Any, list]:
        """(what was scheduled or None, finished RequestOutputs): EngineCore.step or, if async, step_with_batch_queue"""
        step = None
        if self.scheduler.has_requests():
            step = self.scheduler.schedule()
            cached = step.scheduled_cached_reqs
            known = {r.req_id: len(r.prefill_token_ids or r.prompt_token_ids) for r in step.scheduled_new_reqs}
            known |= {
                name: self._lengths[name] + count
                for name, count in zip(cached.req_ids, cached.num_output_tokens, strict=True)
            }
            self._queue.appendleft((step, self.run(step, known) if step.num_scheduled_tokens else None))
            if len(self._queue) < self._depth and step.num_scheduled_tokens:
                return step, []
        if not self._queue:
            return step, []
        done, output = self._queue.pop()
        if output is None:
            from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT as output
        outputs = self.scheduler.update_from_output(done, output)
        outputs = outputs[0].outputs if 0 in outputs else []
        return step, self.output_processor.process_outputs(outputs).request_outputs

    def busy(self) -> bool:
        return bool(self._queue) or self.scheduler.has_requests()


def scheduler_only(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds a token, for both schedulers, with and without async scheduling."""
    rows: list[dict[str, Any]] = []
    for is_async in (False, True):
        for label in args.schedulers:
            for name in [c for c in args.calls if c in OF[label] and c in OF["fast"]]:
                best: dict[str, Any] = {}
                for _ in range(args.repeat):
                    row = invent(args, label, name, is_async)
                    best = row if not best or row["seconds"] < best["seconds"] else best
                rows.append(best)
                print(line(best, rows[0]), flush=True)
    return rows


def invent(args: argparse.Namespace, label: str, name: str, is_async: bool) -> dict[str, Any]:
    """One run of `scheduler_only`; "seconds" are those of the three functions alone."""
    runner = InventedRunner(fast=label == "fast", is_async=is_async, max_num_seqs=args.max_num_seqs)
    if label == "fast":
        runner.scheduler.keeps_logprobs = name == "kept logprobs"
    clock = Clock(runner.scheduler, runner.output_processor)
    for i in range(args.prompts):
        for j in range(args.samples):
            logprobs = None if name == "no logprobs" else 0
            runner.add(f"{j}_{i}", [i + 1] * args.prompt_len, logprobs=logprobs, max_tokens=args.max_tokens)
    tokens = 0
    with no_garbage_collection():
        while runner.busy():
            tokens += sum(len(o.token_ids) for r in runner.step()[1] for o in r.outputs)
    label += " async" if is_async else ""
    row = {"scheduler": label, "calls": name, "tokens": tokens, "seconds": sum(clock.seconds.values())}
    return row | {f"{k}_us": v / tokens * 1e6 for k, v in clock.seconds.items()}


# ---- the engine


def start_engine(args: argparse.Namespace, folder: str, label: str) -> Any:
    import vllm

    fast = label == "fast"
    vllm.envs.disable_envs_cache()  # an engine before this one made vLLM keep its variables
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(label == "process"))
    on_gpu = check_platform(args.quant)
    if not on_gpu:
        import cpu_backend

        cpu_backend.prepare()
    options = {"scheduler_cls": fast_scheduler.QUALNAME} if fast else {}
    sizes = graph_sizes(args.max_num_seqs) if fast and on_gpu and args.graphs == "ours" else None
    if sizes:
        options["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    if args.async_scheduling != "default":
        options["async_scheduling"] = args.async_scheduling == "on"
    llm = vllm.LLM(
        model=folder, tokenizer=str(TOKENIZER), dtype="bfloat16", **quantization_options(args.quant, ()),
        load_format="dummy", max_model_len=args.prompt_len + args.max_tokens, max_num_seqs=args.max_num_seqs,
        kv_cache_memory_bytes=int(args.kv_cache_gib * 2**30), gpu_memory_utilization=0.1, enforce_eager=not on_gpu,
        enable_prefix_caching=True, logprobs_mode="processed_logprobs", disable_log_stats=True, use_tqdm_on_load=False,
        **options,
    )  # fmt: skip
    if fast and not isinstance(fast_scheduler.scheduler_of(llm), fast_scheduler.FastPath):
        sys.exit("error: this vLLM or configuration has no fast scheduler; the warning above says why")
    return llm


def release(llm: Any) -> None:
    """Free an engine's weights and KV cache. The object itself must live on, since vLLM's finalizer ends what all
    engines share; so must buffers, which they share too (the rotary embedding's)."""
    if not hasattr(llm.llm_engine, "model_executor"):
        llm.llm_engine.engine_core.shutdown()  # its process
        return
    model = llm.apply_model(lambda module: module)[0]
    caches = llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_caches
    for tensor in [*model.parameters(), *caches]:
        if torch.is_tensor(tensor):
            tensor.untyped_storage().resize_(0)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generate(llm: Any, args: argparse.Namespace, name: str, turn: int) -> tuple[int, float]:
    """(tokens, seconds) of one call; each has prompts of its own, so no prefix is cached from the call before."""
    import vllm

    options, quiet = CALLS[name]
    vocab = llm.model_config.get_vocab_size()
    if args.mean_tokens:
        options = options | {"stop_token_ids": list(range(max(1, vocab // args.mean_tokens)))}
    params = vllm.SamplingParams(n=args.samples, max_tokens=args.max_tokens, ignore_eos=True, **options)
    g = torch.Generator().manual_seed(turn)
    top = min(vocab, 200)
    prompts = [{"prompt_token_ids": torch.randint(3, top, (args.prompt_len,), generator=g).tolist()}
               for _ in range(args.prompts)]  # fmt: skip
    gc.collect()
    with no_garbage_collection() if quiet else contextlib.nullcontext():
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
    return sum(len(o.token_ids) for r in outputs for o in r.outputs), seconds


def profile(llm: Any, args: argparse.Namespace) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    generate(llm, args, "gc off", 999)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def engines(args: argparse.Namespace, report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each engine and kind of call; the best of --repeat calls."""
    rows: list[dict[str, Any]] = []
    keep = []
    for label in args.schedulers:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            model = str(TOKENIZER) if args.shape == "tiny" else save_config(args.shape, folder)
            llm = start_engine(args, model, label)
        keep.append(llm)
        scheduler = None if label == "process" else fast_scheduler.scheduler_of(llm)
        report.setdefault("engine_start_s", []).append(round(time.perf_counter() - start, 1))
        config = llm.llm_engine.vllm_config
        report["async_scheduling"] = config.scheduler_config.async_scheduling
        report["runner"] = "v2" if config.use_v2_model_runner else "v1"
        clock = Clock(scheduler, llm.llm_engine.output_processor)
        generate(llm, args, "gc off", 1000)  # compiles what is compiled late
        for name in [c for c in args.calls if c in OF[label]]:
            if label == "fast":
                scheduler.keeps_logprobs = name == "kept logprobs"
            best: dict[str, Any] = {}
            for turn in range(args.repeat):
                clock.reset()
                getattr(scheduler, "logprobs", {}).clear()
                tokens, seconds = generate(llm, args, name, turn)
                if not best or seconds < best["seconds"]:
                    best = {"scheduler": label, "calls": name, "tokens": tokens, "seconds": seconds}
                    best |= {f"{k}_us": v / tokens * 1e6 for k, v in clock.seconds.items()}
            rows.append(best)
            print(line(best, rows[0]), flush=True)
        if isinstance(scheduler, fast_scheduler.FastPath):
            counts = {k: getattr(scheduler, k) for k in ("fast_steps", "own_steps", "fast_tokens")}
            report["fast"] = counts
        if args.profile:
            profile(llm, args)
        release(llm)
    return rows


def line(row: dict[str, Any], first: dict[str, Any]) -> str:
    speed = row["tokens"] / row["seconds"]
    cells = [row["scheduler"], row["calls"], f"{speed:.0f}", f"{speed * first['seconds'] / first['tokens']:.2f}"]
    cells += [f"{row['seconds']:.2f}", *(f"{row[f'{k}_us']:.2f}" for k in ("schedule", "update", "outputs"))]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="qwen2.5-0.5b")
    parser.add_argument("--quant", choices=QUANTIZATION, default="fp8")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--mean-tokens", type=int, help="samples end by chance, after so many in the mean")
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--graphs", choices=["ours", "vllm"], default="ours", help='CUDA graphs of "fast"')
    parser.add_argument("--kv-cache-gib", type=float, default=8.0)
    parser.add_argument("--runner", choices=["v1", "v2"], help="vLLM's model runner (default: vLLM's choice)")
    parser.add_argument("--async-scheduling", choices=["default", "on", "off"], default="default")
    parser.add_argument("--schedulers", nargs="+", choices=OF, default=["vllm", "fast"])
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--repeat", type=int, default=2, help="calls of a kind, of which the best counts")
    parser.add_argument("--profile", action="store_true", help="print where one call of each engine spends its time")
    parser.add_argument("--scheduler-only", action="store_true", help="no model: the schedulers' Python alone")
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "options": vars(args)}
    print(f"{name}, torch {torch.__version__}\n{HEAD}\n{'|---' * (HEAD.count('|') - 1)}|", flush=True)
    report["results"] = scheduler_only(args) if args.scheduler_only else engines(args, report)
    facts = {k: report[k] for k in ("runner", "async_scheduling", "engine_start_s", "fast") if k in report}
    print(json.dumps(facts))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
