"""What a run wants of its nodes, and how patient it is."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from conf.check import check
from conf.errors import UserError
from conf.schema import Config


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
    straggler_factor: float = 1.2
    """A rank with lastingly this many times its peers' work per step is named; 0 for never."""
    saves: bool = True
    """Whether checkpoints come at intervals; else nodes that return are used at once."""
    probe: float = 4.0
    settle: float = 1.5
    """For the other ranks to report after the first failure."""
    stacks: float = 2.0
    kill: float = 10.0
    """For ranks to be gone after SIGKILL."""
    return_wait: float = 6.0
    """For a node whose agent is being started again."""

    @property
    def world(self) -> int:
        """Ranks that the whole run has."""
        return self.pp * self.dp


def policy_of(config: Config, attempt: int) -> Policy:
    """What the configuration asks of the supervisor."""
    parallel, cluster = config.parallel, config.cluster

    def accept(ranks: int) -> bool:
        if ranks % parallel.cp:
            return False
        try:
            check(with_stage_ranks(config, ranks))
        except UserError:
            return False
        return True

    return Policy(
        pp=parallel.pp,
        dp=parallel.stage_ranks,
        ep=parallel.ep,
        accept=accept,
        first_attempt=attempt,
        wait=cluster.wait,
        heartbeat=cluster.heartbeat,
        hang_after=cluster.hang_after,
        start_timeout=cluster.start_timeout,
        stop_timeout=cluster.stop_timeout,
        restarts=cluster.restarts,
        straggler_factor=cluster.straggler_factor,
        saves=config.checkpoint.every > 0,
    )


def with_stage_ranks(config: Config, ranks: int) -> Config:
    """The same run on another number of ranks a stage, a multiple of parallel.cp."""
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, dp=ranks // config.parallel.cp))
