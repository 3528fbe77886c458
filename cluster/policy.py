"""What a run wants of its nodes, and how patient it is."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """What the run wants, and its patience in seconds."""

    pp: int
    dp: int
    ep: int
    accept: Callable[[int], bool] = lambda dp: True
    """Whether the batch divides among a smaller dp."""
    first_attempt: int = 1
    wait: float = 60.0
    """For enough nodes."""
    heartbeat: float = 5.0
    """Without an answer before a node counts as lost."""
    hang_after: float = 300.0
    """Without a finished step."""
    start_timeout: float = 600.0
    """Before the first step, in a checkpoint or a validation."""
    stop_timeout: float = 600.0
    """For the checkpoint after a request to stop."""
    restarts: int = 3
    """Failures of one kind without a new checkpoint in between."""
    straggler_factor: float = 2.0
    """A rank with this many times the median work per step is named; 0 for never."""
    saves: bool = True
    """Whether checkpoints come at intervals; else nodes that return are used at once."""
    probe: float = 4.0
    settle: float = 1.5
    """For the other ranks to report after the first failure."""
    stacks: float = 3.0
    kill: float = 10.0
    """For ranks to be gone after SIGKILL."""
    return_wait: float = 6.0
    """For a node whose agent is being started again."""
