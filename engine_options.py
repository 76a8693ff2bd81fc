"""What an engine can be here: formats of its weights, the machine they need, and the layers that stay bf16."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

# --rollout-quant -> vLLM's name of the format; INT8 goes by a checkpoint's config, since vLLM has no online one
QUANTIZATION = {
    "none": None,
    "fp8": "fp8_per_tensor",
    "fp8-channel": "fp8_per_channel",
    "fp8-block": "fp8_per_block",
    "int8": "compressed-tensors",
}
# Bits of formats that no engine runs here: a bf16 engine gets weights that were rounded to them.
SIMULATED = {"int4-sim": 4, "int3-sim": 3, "int2-sim": 2}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # vLLM's, of HF's
PROMPTS_BESIDE = 256  # tokens of prompts that have a CUDA graph beside all sequences


class EngineError(RuntimeError):
    """The engine cannot be built or used here; the message names the flag or package to change."""


def _import_vllm() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")  # of its own imports
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"vLLM cannot be imported ({error}). Install it with `pip install -r requirements.txt` on a GPU, or run "
            "scripts/quickstart.sh, which also knows the CPU build"
        ) from error


def check_platform(quant: str, kv_cache_dtype: str = "auto") -> bool:
    """True on a GPU, False on a CPU; EngineError where vLLM, the machine and the formats do not fit together."""
    _import_vllm()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        if kv_cache_dtype != "auto":
            raise EngineError(f"--kv-cache-dtype {kv_cache_dtype} needs a GPU; use auto on a CPU")
        return False
    if not torch.cuda.is_available():
        raise EngineError(
            "this vLLM is a GPU build and torch sees no GPU: if there is one, its driver is missing, hidden "
            "(CUDA_VISIBLE_DEVICES) or too old. On a CPU install requirements-cpu.txt (scripts/install.sh does it)"
        )
    capability = torch.cuda.get_device_capability()
    has = f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    for flag, value in (("--rollout-quant", quant), ("--kv-cache-dtype", kv_cache_dtype)):
        if value.startswith("fp8") and capability < (8, 9):
            other = "none" if flag == "--rollout-quant" else "auto"
            raise EngineError(
                f"{flag} {value} needs a GPU with FP8 (compute capability 8.9 or more: Ada, Hopper, Blackwell); "
                f"{has}. Use {flag} {other}" + (" or int8" if other == "none" and capability >= (7, 5) else "")
            )
    if quant == "int8" and not (7, 5) <= capability < (10, 0):
        raise EngineError(
            f"--rollout-quant int8 needs a GPU whose INT8 matrix units vLLM uses (compute capability 7.5 to 9.0: "
            f"Turing to Hopper); {has}. Use --rollout-quant fp8 or none"
        )
    if quant == "fp8-block" and os.environ.get("VLLM_USE_DEEP_GEMM") != "0":
        raise EngineError(
            "--rollout-quant fp8-block needs VLLM_USE_DEEP_GEMM=0 (import runtime first sets it): DeepGEMM quantizes "
            "the weights once more, to scales that are powers of two"
        )
    return True


def skipped_layers(linear: Sequence[str], names: str) -> list[str]:
    """The names among `linear` (HF's full ones) that --quant-skip's comma-separated `names` mean.

    A name stands for every layer in whose path it occurs as a whole: "layers.0", "down_proj", "layers.3.mlp", vLLM's
    "qkv_proj". Raises EngineError for a name that matches nothing, and where a part of a fused layer would remain.
    """
    skipped = set()
    for name in filter(None, (n.strip() for n in names.split(","))):
        path, _, leaf = name.rpartition(".")
        aliases = [".".join(filter(None, (path, part))) for part in FUSED.get(leaf, (leaf,))]
        found = {layer for layer in linear for alias in aliases if f".{alias}." in f".{layer}."}
        if not found:
            leaves = sorted({layer.rpartition(".")[2] for layer in linear})
            raise EngineError(
                f"--quant-skip {name} matches no layer of the model; names look like layers.0, layers.0.mlp, "
                f"{', '.join(leaves)}"
            )
        skipped |= found
    for layer in sorted(skipped):
        path, _, leaf = layer.rpartition(".")
        fused = next((parts for parts in FUSED.values() if leaf in parts), ())
        rest = [part for part in fused if f"{path}.{part}" in linear and f"{path}.{part}" not in skipped]
        if rest:
            raise EngineError(
                f"--quant-skip takes {layer} but not its {', '.join(rest)}, and vLLM has {', '.join(fused)} in one "
                "matrix: name all of them or none"
            )
    return [layer for layer in linear if layer in skipped]


def graph_sizes(sequences: int) -> list[int] | None:
    """Batch sizes [tokens] of the CUDA graphs of an engine that runs so many sequences at once; None: vLLM's own, which
    end at 512.

    Above that vLLM launches kernel by kernel. An engine of 512 sequences gets there too, whenever a prompt takes the
    place of a sequence that has ended: so sizes go on, in steps of 64, up to `PROMPTS_BESIDE` tokens of prompts beside
    all sequences.
    """
    if sequences <= 256:
        return None
    top = -(-(sequences + PROMPTS_BESIDE) // 64) * 64
    return [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16), *range(576, top + 1, 64)]


def quantization_options(quant: str, skip: Sequence[str]) -> dict[str, Any]:
    """Arguments of vLLM's LLM for a format and the layers that it leaves out."""
    if quant == "none" or quant in SIMULATED:
        return {}
    if quant != "int8":
        return {"quantization": QUANTIZATION[quant]} | ({"quantization_config": {"ignore": list(skip)}} if skip else {})
    eight_bit = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight_bit | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bit | {"strategy": "token", "dynamic": True},
    }
    config = {
        "quant_method": QUANTIZATION[quant],
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *skip],
    }
    return {"hf_overrides": {"quantization_config": config}}
