"""What one rank of a tensor-parallel engine holds of each weight, and the scales that its ranks share.

Axes: O/I output/input features of a weight [O, I].

vLLM cuts q, k, v, gate and up by rows (O), o and down by columns (I), the vocabulary by rows; all else every rank has
whole. Where it cuts is read from attributes of the engine's own modules, which vLLM 0.26 and 0.32 both have.

One scale, several ranks. FP8 weights are quantized by each rank from its own part. vLLM 0.26 takes the part's own amax,
0.32 that of the whole matrix (or row): the sync does what the vLLM at hand does. Blocks and INT8 rows are always the
part's own: of a weight that is cut by columns, a row has one INT8 scale on each rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from quant_formats import FP8_CHANNEL, FP8_TENSOR, Format, SyncError


@dataclass(frozen=True)
class Cut:
    """Rows (dim 0) or columns (dim 1) start..stop of a tensor that has `whole` of them."""

    dim: int
    start: int
    stop: int
    whole: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(self.dim, self.start, self.stop - self.start)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        return (*whole[: self.dim], self.stop - self.start, *whole[self.dim + 1 :])


def cuts_of(name: str, module: torch.nn.Module, dims: int, parts: int) -> list[Cut | None]:
    """Which part of each of the `parts` policy tensors lies in the engine's parameter `name` of `module`; None: all.

    `dims` is 2 for a weight and 1 for a bias. Raises SyncError for a fused layer whose parts are not the policy's.
    """
    size = getattr(module, "tp_size", 1)
    if size == 1:
        return [None] * parts
    if (vocabulary := getattr(module, "shard_indices", None)) is not None:
        rows = vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index
        return [Cut(0, *rows, module.org_vocab_size)] * parts
    outputs = getattr(module, "output_partition_sizes", None)
    if outputs is None:
        return [None] * parts  # a norm
    rank, columns = module.tp_rank, getattr(module, "input_size_per_partition", module.input_size)
    if columns != module.input_size:
        cut = Cut(1, rank * columns, (rank + 1) * columns, module.input_size)
        return [cut if dims == 2 else None] * parts  # each rank has the whole bias, and the first one adds it
    if sum(outputs) == module.output_size:
        return [None] * parts
    if len(outputs) != parts:
        raise SyncError(f"{name} has {len(outputs)} parts in the engine and is made of {parts} policy tensor(s)")
    cuts: list[Cut | None] = []
    for i, rows in enumerate(outputs):
        # With more ranks than heads of k and v, neighbours hold the same one.
        replicas = getattr(module, "num_kv_head_replicas", 1) if i else 1
        shard = rank // replicas
        cuts.append(Cut(0, shard * rows, (shard + 1) * rows, rows * size // replicas))
    return cuts


def shared_amax(name: str, fmt: Format, cuts: Sequence[Cut | None], device: torch.device) -> Callable | None:
    """What makes one of the ranks' amax of a parameter, for quant_formats and quant_kernels; None where each rank's own
    is its scale's. Raises SyncError for what no kernel does."""
    across = {FP8_TENSOR: (0, 1), FP8_CHANNEL: (1,)}.get(fmt, ())  # dims over which its amax is taken
    if not any(cut is not None and cut.dim in across for cut in cuts) or not _vllm_shares_amax():
        return None
    if fmt is FP8_CHANNEL and device.type == "cuda":
        raise SyncError(
            f"{name}: this vLLM gives the rows of a weight that is cut by columns one scale on all ranks, which the "
            "GPU's kernel for --rollout-quant fp8-channel does not compute; use --rollout-quant fp8, --tp 1, or the "
            "vLLM version that requirements.txt names"
        )
    from vllm.distributed.parallel_state import get_tp_group

    return partial(_max, get_tp_group().device_group)


def _max(group: dist.ProcessGroup, bits: torch.Tensor) -> None:
    dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=group)


def _vllm_shares_amax() -> bool:
    """Whether this vLLM takes an FP8 weight's amax over all ranks that hold a part of it.

    Read from vLLM 0.26, where no rank knows another's, and 0.32, where online/fp8.py calls this function of its
    quant_utils for layers that are cut along what the amax is taken over. `SyncPlan.prove` holds it to vLLM's own load.
    """
    try:
        from vllm.model_executor.layers.quantization.utils import quant_utils
    except ImportError as error:
        raise SyncError(
            f"cannot tell how this vLLM quantizes under tensor parallelism ({error}); use --tp 1, --rollout-quant "
            "none, or a vLLM version that requirements.txt names"
        ) from error
    return hasattr(quant_utils, "amax_for_tp_weight_quant")
