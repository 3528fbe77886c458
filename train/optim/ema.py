"""Exponential moving average of the weights in CPU memory (paper 3.2.3)."""

import torch
from torch import Tensor


class Ema:
    """Averages of this rank's fp32 master shards.

    The copy from the device is issued without waiting; the average of a step is taken when the next step arrives, so
    the training never waits for it.
    """

    def __init__(self, masters: dict[str, Tensor], decay: float):
        self.decay = decay
        self.masters = masters
        pinned = any(master.is_cuda for master in masters.values())
        self.average = {name: master.detach().cpu().clone() for name, master in masters.items()}
        self._arrived = {
            name: torch.empty_like(master, device="cpu", pin_memory=pinned) for name, master in masters.items()
        }
        self._event: torch.cuda.Event | None = torch.cuda.Event() if pinned else None
        self._pending = False

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        self.flush()
        for name, master in self.masters.items():
            self._arrived[name].copy_(master.detach(), non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._pending = True

    @torch.no_grad()
    def flush(self) -> None:
        """Finish the average of the last update; call before reading `average`."""
        if not self._pending:
            return
        if self._event is not None:
            self._event.synchronize()
        for name, arrived in self._arrived.items():
            self.average[name].lerp_(arrived, 1 - self.decay)
        self._pending = False

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the past: the average becomes the present weights."""
        self._pending = False
        for name, master in self.masters.items():
            self.average[name].copy_(master.detach())
