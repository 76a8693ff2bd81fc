"""What must be settled before torch is imported: threads, vLLM's switches, and which machine this is.

Import this module first in every script. It only sets variables that the user has not set.

Why each one:
- OMP_NUM_THREADS, OMP_WAIT_POLICY, KMP_BLOCKTIME: OpenMP's threads spin while they wait. With another busy process on
  the machine they starve each other, and generation on a CPU gets fifty times slower; passive waiting ends that.
- ONEDNN_PRIMITIVE_CACHE_CAPACITY, LRU_CACHE_CAPACITY: oneDNN keeps a compiled matrix product for each shape that it
  has seen, 1,024 of them, and torch keeps as many of its own where the processor has bf16 products. Every step has
  shapes of its own, and the process would grow for hundreds of steps. Without a GPU only.
- VLLM_ENABLE_V1_MULTIPROCESSING=0: the engine must live in this process, or its tensors could not be written in place.
- VLLM_CPU_OMP_THREADS_BIND=nobind: vLLM would otherwise pin the whole process, the trainer included, to its cores.
- VLLM_HOST_IP: vLLM otherwise asks the network for an address, which fails on a machine without one.
- VLLM_USE_FLASHINFER_SAMPLER=0: it is for top-p and top-k, which are refused here, and vLLM 0.26 imports flashinfer
  without looking whether it is there.
- VLLM_ALLREDUCE_USE_SYMM_MEM=0: it tries NVLink multicast, which a machine may forbid; vLLM has another all-reduce.
- VLLM_USE_DEEP_GEMM=0: it would quantize 128 x 128 blocks once more, to scales that are powers of two; vLLM takes
  CUTLASS instead, which needs no compiler at run time.
"""

import os
import sys
from pathlib import Path


def has_gpu() -> bool:
    """True if an NVIDIA driver is present and not hidden by CUDA_VISIBLE_DEVICES (asked without importing torch)."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def set_defaults() -> None:
    """Set the variables above where the user has not; an error if torch is already imported and they come too late."""
    defaults = {
        "OMP_NUM_THREADS": str(min(8, os.cpu_count() or 1)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING" if has_gpu() else "ERROR",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        "VLLM_USE_DEEP_GEMM": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not has_gpu():
        defaults |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}
    if "OMP_NUM_THREADS" not in os.environ and "torch" in sys.modules:
        raise RuntimeError("import runtime before torch: OMP_NUM_THREADS has no effect once torch is loaded")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


set_defaults()
