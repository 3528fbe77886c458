"""optim.ema_decay: updates a moving average of the weights after every step. Checkpoints store it as ema.*."""

from typing import Any

import torch
from torch import Tensor

from conf.schema import Config
from parallel.shard import Shard
from parallel.zero.engine import Zero
from train.loop.live_run import LiveRun

# The exponential moving average of the weights is in CPU memory (paper 3.2.3).


class Ema:
    """Averages the fp32 master shards of this rank.

    `update` starts an asynchronous copy of the shards to the host. The next call of `update` adds this copy to the
    average.
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
        """Start to copy the weights to the host. The next call of `update` or `flush` adds the copy to the average."""
        self.flush()
        for name, master in self.masters.items():
            self._arrived[name].copy_(master.detach(), non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._pending = True

    @torch.no_grad()
    def flush(self) -> None:
        """Add the last copied weights to the average. Call this method before you read `average`."""
        if not self._pending:
            return
        if self._event is not None:
            self._event.synchronize()
        for name, arrived in self._arrived.items():
            self.average[name].lerp_(arrived, 1 - self.decay)
        self._pending = False

    @torch.no_grad()
    def restart(self) -> None:
        """Reset the average to the current weights."""
        self._pending = False
        for name, master in self.masters.items():
            self.average[name].copy_(master.detach())


class AveragedWeights:
    """A hook that averages this rank's master weights after every update."""

    def __init__(self, zero: Zero, decay: float):
        self._zero = zero
        masters = {name: shard.local for name, shard in zero.shards(copies=True).items() if name.startswith("master.")}
        self.ema = Ema(masters, decay)

    def on_update(self, run: LiveRun, step: int) -> None:
        self.ema.update()

    def shards(self) -> dict[str, Shard]:
        self.ema.flush()
        return self._of(self._zero.shards())

    def wanted(self) -> dict[str, Shard]:
        return self._of(self._zero.shards(copies=True))

    def meta(self) -> dict[str, Any]:
        return {"has_ema": True}

    def restore(self, meta: dict[str, Any] | None) -> None:
        if meta is None:
            self.ema.restart()

    def _of(self, masters: dict[str, Shard]) -> dict[str, Shard]:
        return {
            "ema." + name.removeprefix("master."): Shard(average.view(-1), masters[name].offset, masters[name].shape)
            for name, average in self.ema.average.items()
            if name in masters
        }


def weight_averages(config: Config, zero: Zero) -> list[AveragedWeights]:
    """Returns a list with the hook `AveragedWeights` if optim.ema_decay is set, else an empty list."""
    return [AveragedWeights(zero, config.optim.ema_decay)] if config.optim.ema_decay else []
