"""AdamW on fp32 master weights, on the GPU or in host memory.

Why masters: at lr 1e-6 an update is far below bf16's half ulp, so a bf16 weight would never move. AdamW works on fp32
copies, and each update ends by rounding them into the bf16 weights that the forward pass and the sync read.

Resident, masters and moments take 12 bytes a parameter on the GPU. Offloaded, they live in pinned host memory and pass
through the GPU in pieces, at the speed of the bus: while one piece is updated, the next arrives and the last leaves.
The arithmetic is torch's fused AdamW in both.
"""

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

PIECE_ELEMENTS = 1 << 24  # of an offloaded state on the GPU at a time; three slots of 192 MiB
SLOTS = 3


class MasterAdamW:
    """AdamW (arXiv 1711.05101) for bf16 `weights`, with fp32 gradients that the caller sums into `grads`.

    Args:
        weights: bf16, on their device; written in place by `step`.
        weight_decay: on matrices alone.
        offload: masters and moments in host memory, pinned where there is a GPU.

    Attributes:
        grads: fp32, one for each weight, on its device. `step` reads them; zeroing is the caller's.
        bytes_resident: memory of masters, moments and slots on the weights' device, gradients not counted.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        *,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        offload: bool = False,
    ):
        self._weights = list(weights)
        self._decay = [weight_decay if w.dim() >= 2 else 0.0 for w in self._weights]
        self._settings = {"beta1": betas[0], "beta2": betas[1], "eps": eps, "amsgrad": False, "maximize": False}
        self.updates = 0
        self.device = self._weights[0].device
        self.offload = offload
        self.grads = [torch.zeros_like(w, dtype=torch.float32) for w in self._weights]
        cuda = self.device.type == "cuda"
        self._states = []  # (master, first moment, second moment) of each weight
        for weight in self._weights:
            where = {"device": "cpu" if offload else self.device, "pin_memory": offload and cuda}
            states = [torch.zeros(weight.shape, dtype=torch.float32, **where) for _ in range(3)]
            states[0].copy_(weight.detach())
            self._states.append(tuple(states))
        held = [] if offload else [t for states in self._states for t in states]
        self._slots: list[torch.Tensor] = []
        if offload:
            largest = min(PIECE_ELEMENTS, max(w.numel() for w in self._weights))
            self._slots = [torch.empty(3, largest, dtype=torch.float32, device=self.device) for _ in range(SLOTS)]
            held = self._slots
            if cuda:
                self._arriving, self._leaving = (torch.cuda.Stream(self.device) for _ in range(2))
                self._events = [[torch.cuda.Event() for _ in range(3)] for _ in range(SLOTS)]
        self.bytes_resident = sum(t.numel() * 4 for t in held)

    @property
    def masters(self) -> list[torch.Tensor]:
        """The fp32 weights, where they live."""
        return [states[0] for states in self._states]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from `grads`."""
        self.updates += 1
        if self.offload:
            self._step_offloaded(lr)
            return
        for decay in sorted(set(self._decay)):
            chosen = [i for i, d in enumerate(self._decay) if d == decay]
            columns = zip(*(self._states[i] for i in chosen), strict=True)
            self._adamw([self.grads[i] for i in chosen], *map(list, columns), lr, decay)
        torch._foreach_copy_(self._weights, self.masters)

    def _adamw(self, grads: list, masters: list, firsts: list, seconds: list, lr: float, decay: float) -> None:
        steps = [torch.full((), self.updates - 1, dtype=torch.float32, device=m.device) for m in masters]
        adamw(masters, grads, firsts, seconds, [], steps, fused=True, lr=lr, weight_decay=decay, **self._settings)

    def _step_offloaded(self, lr: float) -> None:
        size = self._slots[0].shape[1]
        pieces = [
            (i, start, min(start + size, weight.numel()))
            for i, weight in enumerate(self._weights)
            for start in range(0, weight.numel(), size)
        ]
        cuda = self.device.type == "cuda"
        main = torch.cuda.current_stream(self.device) if cuda else None

        def host(piece: tuple[int, int, int]) -> list[torch.Tensor]:
            i, start, stop = piece
            return [state.view(-1)[start:stop] for state in self._states[i]]

        def fetch(k: int) -> None:
            """Piece k into its slot, once what was in the slot has left."""
            states = host(pieces[k])
            slot = self._slots[k % SLOTS][:, : states[0].numel()]
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
            slot = self._slots[k % SLOTS][:, : stop - start]
            arrived, updated, left = self._events[k % SLOTS] if cuda else (None, None, None)
            if cuda:
                main.wait_event(arrived)
            self._adamw([self.grads[i].view(-1)[start:stop]], [slot[0]], [slot[1]], [slot[2]], lr, self._decay[i])
            self._weights[i].view(-1)[start:stop].copy_(slot[0])
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
