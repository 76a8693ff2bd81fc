"""AdamW on fp32 master weights, on the GPU or in host memory, with moments of 4, 2 or 1 bytes.

Why masters: at lr 1e-6 an update is far below bf16's half ulp, so a bf16 weight would never move. AdamW works on fp32
copies, and each update writes them rounded into the bf16 weights that the forward pass and the sync read: on a GPU in
the same pass (adamw_kernels.py).

Resident, a master and its moments take 12 bytes a parameter on the GPU; 8 with bf16 moments, which are rounded up or
down at random, so that small changes of them are kept in the mean; 6 with 8-bit moments, torchao's (arXiv 2110.02861).
Offloaded, they live in pinned host memory and pass through the GPU in pieces, at the speed of the bus: while one piece
is updated, the next arrives and the last leaves.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

PIECE_ELEMENTS = 1 << 24  # of an offloaded state on the GPU at a time; three slots of 192 MiB
SLOTS = 3
STATE_BYTES = {"fp32": 12, "bf16": 8, "8bit": 4 + 2 * (1 + 4 / 256)}  # master and moments, a parameter
EIGHT_BIT_BLOCK = 256  # moments under one fp32 scale


class OptimizerError(RuntimeError):
    """The optimizer cannot be built here; the message names the flag or package."""


def check_states(states: str) -> None:
    """OptimizerError if a package is missing for these states."""
    if states == "8bit":
        try:
            import torchao.optim  # noqa: F401
        except ImportError as error:
            message = f"--optimizer-states 8bit needs the package torchao ({error}): pip install torchao"
            raise OptimizerError(message) from error


class MasterAdamW:
    """AdamW (arXiv 1711.05101) for bf16 `weights`, with fp32 gradients that the caller sums into `grads`.

    Args:
        weights: bf16, dense, on their device; written in place by `step`.
        weight_decay: on matrices alone.
        states: of the moments: "fp32", "bf16" or "8bit" (not with offload; needs torchao).
        offload: masters and moments in host memory, pinned where there is a GPU.
        seed: of the rounding of bf16 moments.

    Attributes:
        grads: fp32, one for each weight, on its device; `step` leaves zeros.
        bytes_resident: memory of masters, moments and slots on the weights' device, gradients not counted.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        *,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        states: str = "fp32",
        offload: bool = False,
        seed: int = 0,
    ):
        self._weights = list(weights)
        self._decay = [weight_decay if w.dim() >= 2 else 0.0 for w in self._weights]
        self._betas, self._eps, self._seed = betas, eps, seed
        self.updates = 0
        self.device = self._weights[0].device
        self.states, self.offload = states, offload
        self.grads = [torch.zeros_like(w, dtype=torch.float32) for w in self._weights]
        cuda = self.device.type == "cuda"
        self.masters = self._zeros(torch.float32)
        for master, weight in zip(self.masters, self._weights, strict=True):
            master.copy_(weight.detach())
        self._slots: list[tuple[torch.Tensor, ...]] = []
        if states == "8bit":
            self._eight_bit = self._build_eight_bit()
            self.bytes_resident = int(STATE_BYTES["8bit"] * sum(w.numel() for w in self._weights))
            return
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[states]
        self._moments = list(zip(self._zeros(dtype), self._zeros(dtype), strict=True))
        held = [] if offload else [*self.masters, *(t for pair in self._moments for t in pair)]
        if offload:
            largest = min(PIECE_ELEMENTS, max(w.numel() for w in self._weights))
            self._slots = [
                tuple(torch.empty(largest, dtype=d, device=self.device) for d in (torch.float32, dtype, dtype))
                for _ in range(SLOTS)
            ]
            held = [t for slot in self._slots for t in slot]
            if cuda:
                self._arriving, self._leaving = (torch.cuda.Stream(self.device) for _ in range(2))
                self._events = [[torch.cuda.Event() for _ in range(3)] for _ in range(SLOTS)]
        self.bytes_resident = sum(t.numel() * t.element_size() for t in held)

    def _zeros(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """A tensor for each weight, where the states live."""
        if not self.offload:
            return [torch.zeros(w.shape, dtype=dtype, device=self.device) for w in self._weights]
        sizes = [w.numel() for w in self._weights]
        flat = torch.zeros(sum(sizes), dtype=dtype)
        if self.device.type == "cuda":
            _pin(flat)
            weakref.finalize(self, _unpin, flat)
        return [t.view(w.shape) for t, w in zip(flat.split(sizes), self._weights, strict=True)]

    @torch.no_grad()
    def step(self, lr: float, scale: torch.Tensor | None = None) -> None:
        """One update from `grads` times `scale` (fp32, no dimension, on the device; None: 1); leaves zero `grads`."""
        self.updates += 1
        scale = torch.ones((), device=self.device) if scale is None else scale
        if self.states == "8bit":
            self._step_eight_bit(lr, scale)
        elif self.offload:
            self._step_offloaded(lr, scale)
        else:
            for i, weight in enumerate(self._weights):
                self._update(i, 0, weight.detach(), self.grads[i], self.masters[i], *self._moments[i], lr, scale)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Live masters and moments, "I.master", "I.first", "I.second" (8bit: their codes and scales) of weight I. They
        and `updates` are all that `step` goes by; who writes into them sets `updates` too (`set_updates`)."""
        tensors = {f"{i}.master": master.detach() for i, master in enumerate(self.masters)}
        if self.states != "8bit":
            for i, (first, second) in enumerate(self._moments):
                tensors |= {f"{i}.first": first, f"{i}.second": second}
            return tensors
        if not self._eight_bit.state:  # torchao makes the moments in its first step; at lr 0 that changes no master
            self._step_eight_bit(0.0, torch.ones((), device=self.device))
            self.set_updates(self.updates)
        for i, master in enumerate(self.masters):
            for name, key in (("first", "exp_avg"), ("second", "exp_avg_sq")):
                moment = self._eight_bit.state[master][key]
                if hasattr(moment, "codes"):
                    tensors |= {f"{i}.{name}.codes": moment.codes, f"{i}.{name}.scale": moment.scale}
                else:  # a small tensor stays fp32
                    tensors[f"{i}.{name}"] = moment
        return tensors

    def set_updates(self, updates: int) -> None:
        """Go on as after so many updates."""
        self.updates = updates
        if self.states == "8bit":
            for state in self._eight_bit.state.values():
                state["step"].fill_(float(updates))

    def _update(
        self, i: int, start: int, weight: torch.Tensor, grad: torch.Tensor, master: torch.Tensor, first: torch.Tensor,
        second: torch.Tensor, lr: float, scale: torch.Tensor,
    ) -> None:  # fmt: skip
        """One update of weight i, or of the piece of it that begins at `start`."""
        seed = (self._seed * 1_000_003 + self.updates * 10_007 + i * 101 + start // PIECE_ELEMENTS) % 2**31
        if weight.is_cuda:
            import adamw_kernels

            adamw_kernels.adamw_(
                weight, grad, master, first, second, scale, update=self.updates, seed=seed, lr=lr,
                decay=self._decay[i], betas=self._betas, eps=self._eps,
            )  # fmt: skip
            return
        grad.mul_(scale)
        moments = [first.float(), second.float()]  # themselves where they are fp32
        settings = {"beta1": self._betas[0], "beta2": self._betas[1], "eps": self._eps}
        adamw(
            [master], [grad], moments[:1], moments[1:], [], [torch.tensor(self.updates - 1.0)], fused=True, lr=lr,
            weight_decay=self._decay[i], amsgrad=False, maximize=False, **settings,
        )  # fmt: skip
        if first.dtype == torch.bfloat16:
            g = torch.Generator().manual_seed(seed)
            for moment, exact in zip((first, second), moments, strict=True):
                random = torch.randint(0, 2**16, exact.shape, generator=g, dtype=torch.int32)
                moment.copy_(((exact.view(torch.int32) + random) & -(2**16)).view(torch.float32))
        weight.copy_(master)
        grad.zero_()

    def _step_offloaded(self, lr: float, scale: torch.Tensor) -> None:
        size = self._slots[0][0].numel()
        pieces = [
            (i, start, min(start + size, weight.numel()))
            for i, weight in enumerate(self._weights)
            for start in range(0, weight.numel(), size)
        ]
        cuda = self.device.type == "cuda"
        main = torch.cuda.current_stream(self.device) if cuda else None

        def host(piece: tuple[int, int, int]) -> list[torch.Tensor]:
            i, start, stop = piece
            return [state.view(-1)[start:stop] for state in (self.masters[i], *self._moments[i])]

        def fetch(k: int) -> None:
            """Piece k into its slot, once what was in the slot has left."""
            states = host(pieces[k])
            slot = [t[: states[0].numel()] for t in self._slots[k % SLOTS]]
            if not cuda:
                for there, here in zip(slot, states, strict=True):
                    there.copy_(here)
                return
            arrived, _, left = self._events[k % SLOTS]
            with torch.cuda.stream(self._arriving):
                if k >= SLOTS:
                    self._arriving.wait_event(left)
                for there, here in zip(slot, states, strict=True):
                    there.copy_(here, non_blocking=True)
                arrived.record(self._arriving)

        for k in range(min(SLOTS - 1, len(pieces))):
            fetch(k)
        for k, piece in enumerate(pieces):
            i, start, stop = piece
            slot = [t[: stop - start] for t in self._slots[k % SLOTS]]
            arrived, updated, left = self._events[k % SLOTS] if cuda else (None, None, None)
            if cuda:
                main.wait_event(arrived)
            flat = (self._weights[i].detach().view(-1)[start:stop], self.grads[i].view(-1)[start:stop])
            self._update(i, start, *flat, *slot, lr, scale)
            if not cuda:
                for here, there in zip(host(piece), slot, strict=True):
                    here.copy_(there)
            else:
                updated.record(main)
                with torch.cuda.stream(self._leaving):
                    self._leaving.wait_event(updated)
                    for here, there in zip(host(piece), slot, strict=True):
                        here.copy_(there, non_blocking=True)
                    left.record(self._leaving)
            if k + SLOTS - 1 < len(pieces):
                fetch(k + SLOTS - 1)
        if cuda:
            self._leaving.synchronize()  # the host's copies are whole when this returns

    def _build_eight_bit(self) -> Any:
        if self.offload:
            raise OptimizerError("--optimizer-states 8bit stays on the GPU; use fp32 or bf16 with --offload-optimizer")
        check_states(self.states)
        from torchao.optim import AdamW8bit

        for master, grad in zip(self.masters, self.grads, strict=True):
            master.requires_grad_()
            master.grad = grad
        groups = [
            {"params": [m for m, d in zip(self.masters, self._decay, strict=True) if d == decay], "weight_decay": decay}
            for decay in sorted(set(self._decay))
        ]
        return AdamW8bit(groups, lr=0.0, betas=self._betas, eps=self._eps, block_size=EIGHT_BIT_BLOCK)

    def _step_eight_bit(self, lr: float, scale: torch.Tensor) -> None:
        import torch._dynamo  # seconds, which the other states need not wait for

        for group in self._eight_bit.param_groups:
            group["lr"].fill_(lr)
        torch._foreach_mul_(self.grads, scale)
        with torch._dynamo.config.patch(disable=False):  # torchao compiles its step; cpu_backend.py turns compiling off
            self._eight_bit.step()
        torch._foreach_copy_([w.detach() for w in self._weights], [m.detach() for m in self.masters])
        torch._foreach_zero_(self.grads)


def _pin(tensor: torch.Tensor) -> None:
    """Lock its pages, so that copies to and from the GPU run beside other work. Torch's own pinned memory comes in
    powers of two, up to twice as much."""
    size = tensor.numel() * tensor.element_size()
    error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)
    if int(error) != 0:
        raise OptimizerError(
            f"--offload-optimizer needs {size / 2**30:.1f} GiB of host memory in one locked piece, and CUDA refused it "
            f"({error}); raise the container's limits on memory and on locked memory, or use --optimizer-states bf16"
        )


def _unpin(tensor: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
