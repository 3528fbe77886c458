"""Whether master weights and the optimizer's state are, when they are read next, what the update before left: a bit that flips in memory
meanwhile makes no error anywhere, and most of them have no copy on another rank.

Between the end of an update and the next read, by an update or a checkpoint, nothing may write them. So each rank adds up the bits of
every tensor of its shard behind the update of some steps, and again before that read. What cannot be seen: a flip inside an update, one
behind a step that is not checked, and one in a gradient or an activation.
"""

import torch
from torch import Tensor

from conf.errors import EXIT_CRASH, RunEnded
from parallel.zero.engine import Zero
from train.loop.replicas import TAKE_OUT, shown_weights, sum_of_bits


class StateChanged(RunEnded):
    """Something changed master weights or moments that nothing may write; neither update nor checkpoint was made of them."""

    code = EXIT_CRASH


class StateCheck:
    """Holds the state of one rank's shard against what an update left. every: steps between such updates; 0 never."""

    def __init__(self, every: int, zero: Zero, rank: int):
        self._every, self._zero, self._rank = every, zero, rank
        self._left: tuple[int, dict[str, Tensor]] | None = None
        """The step of an update, and the sums of bits behind it."""

    def note(self, step: int) -> None:
        """Call behind the update of every step."""
        self._left = (step, self._sums()) if self._every and step % self._every == 0 else None

    def require_unchanged(self) -> None:
        """Call before the state is read. Raises StateChanged, on the rank whose state it is alone."""
        if self._left is None:
            return
        (step, before), now = self._left, self._sums()
        equal = (torch.stack([*before.values()]) == torch.stack([*now.values()])).tolist()
        names = [name for name, same in zip(now, equal, strict=True) if not same]
        if names:
            raise StateChanged(
                f"rank {self._rank}: {shown_weights(names)} changed behind the update of step {step}, where nothing writes them: a bit "
                f"flipped in memory. Neither update nor checkpoint was made of it; {TAKE_OUT}",
                (self._rank,),
            )

    def _sums(self) -> dict[str, Tensor]:
        return {name: sum_of_bits(shard.local) for name, shard in self._zero.shards(copies=True).items()}
