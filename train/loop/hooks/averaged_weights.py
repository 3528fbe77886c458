"""optim.ema_decay: the average of the weights (train/optim/ema.py), taken after every update and kept in checkpoints as ema.*."""

from typing import Any

from conf.schema import Config
from parallel.shard import Shard
from parallel.zero.engine import Zero
from train.loop.live_run import LiveRun
from train.optim.ema import Ema


class AveragedWeights:
    """The average of this rank's master weights."""

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
    """None or one, as the recipe asks for it."""
    return [AveragedWeights(zero, config.optim.ema_decay)] if config.optim.ema_decay else []
