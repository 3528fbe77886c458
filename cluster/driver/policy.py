"""What a run wants of its nodes, and how patient it is."""

from dataclasses import dataclass

from cluster.driver.shapes import Shapes
from conf.schema import Config


@dataclass(frozen=True)
class Policy:
    """What the run wants, and its patience in seconds."""

    shapes: Shapes
    """The run's layout, and those that it may shrink to."""
    first_attempt: int = 1
    wait: float = 60.0
    """For enough nodes."""
    heartbeat: float = 5.0
    """Without an answer before a node counts as lost."""
    kill_after: float | None = None
    """Without any progress, at least; None for what Patience has."""
    hang_after: float = 300.0
    """Without progress in a step, at most."""
    start_timeout: float = 600.0
    """Without progress before the first step, in a checkpoint or a validation, at most."""
    timeout: float = 600.0
    """In a collective; a save without progress has as long."""
    stop_timeout: float = 600.0
    """For the checkpoint after a request to stop."""
    restarts: int = 3
    """Failures of one kind without a new checkpoint in between."""
    straggler_factor: float = 1.2
    """A rank with lastingly this many times its peers' work per step is named."""
    saves: bool = True
    """Whether checkpoints come at intervals; else nodes that return are used at once."""
    copies: bool = False
    """Whether ranks keep copies of the state in memory, from which they go on with more nodes."""
    calls: float = 500.0
    """Calls to agents, and their answers, that the driver can do in a second, at least."""
    probe: float = 4.0
    settle: float = 1.5
    """For the other ranks to report after the first failure."""
    stacks: float = 5.0
    """For ranks that hang to print where; a busy machine holds one for seconds. Of one that is stopped nobody waits for it."""
    kill: float = 10.0
    """For ranks to be gone after SIGKILL."""
    return_wait: float = 6.0
    """For a node whose agent is being started again."""

    @property
    def world(self) -> int:
        """Ranks that the whole run has."""
        return self.shapes.pp * self.shapes.own.dp


def policy_of(config: Config, attempt: int, shapes: Shapes) -> Policy:
    """What the configuration asks of the supervisor."""
    cluster = config.cluster
    return Policy(
        shapes=shapes,
        first_attempt=attempt,
        wait=cluster.wait,
        heartbeat=cluster.heartbeat,
        kill_after=cluster.kill_after,
        hang_after=cluster.hang_after,
        start_timeout=cluster.start_timeout,
        timeout=cluster.timeout,
        stop_timeout=cluster.stop_timeout,
        restarts=cluster.restarts,
        saves=config.checkpoint.every > 0,
        copies=config.checkpoint.every_memory > 0,
    )
