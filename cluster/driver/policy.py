"""What a run requires of its nodes, and time limits."""

from dataclasses import dataclass

from cluster.driver.shapes import Shapes
from conf.schema import Config


@dataclass(frozen=True)
class Policy:
    """What a run requires of its nodes, and limits in seconds."""

    shapes: Shapes
    """The run's layout, and the smaller layouts that it may use."""
    first_attempt: int = 1
    wait: float = 60.0
    """Maximum time to wait for enough nodes."""
    heartbeat: float = 5.0
    """Time without an answer after which a node counts as lost."""
    kill_after: float | None = None
    """Minimum time without progress before the ranks are ended; None: see `Patience`."""
    hang_after: float = 300.0
    """Maximum time without progress within a step."""
    start_timeout: float = 600.0
    """Maximum time without progress before the first step or outside of steps."""
    timeout: float = 600.0
    """Time limit of a collective, of a save without progress, and of the checkpoint after a stop request."""
    restarts: int = 3
    """Allowed number of failures of one kind before the next checkpoint."""
    straggler_factor: float = 1.2
    """A rank is slow if its work time per step stays at least this many times its peers' median."""
    saves: bool = True
    """Whether the run writes checkpoints at intervals. If not, it restarts at once when nodes return."""
    names_checkpoint: bool = False
    """Whether `resume` names a checkpoint. Until this run has saved a checkpoint, its first step is then unknown."""
    copies: bool = False
    """Whether ranks keep copies in memory, from which the run can restart when nodes return."""
    calls: float = 500.0
    """Minimum number of calls and answers that the driver handles per second."""
    probe: float = 4.0
    settle: float = 1.5
    """Seconds to wait for other ranks' reports after the first failure."""
    stacks: float = 5.0
    """Seconds to wait for the stack traces of hung ranks. Ranks that a signal has stopped cannot write any."""
    kill: float = 10.0
    """Seconds to wait for ranks to disappear after SIGKILL."""
    return_wait: float = 6.0
    """Maximum seconds to wait for a node whose agent is restarting."""

    @property
    def world(self) -> int:
        """Number of ranks of the run's full layout."""
        return self.shapes.pp * self.shapes.own.dp


def policy_of(config: Config, attempt: int, shapes: Shapes) -> Policy:
    """Return the supervisor's policy that follows from the configuration."""
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
        restarts=cluster.restarts,
        saves=config.checkpoint.every > 0,
        names_checkpoint=config.resume not in ("auto", "never"),
        copies=config.checkpoint.every_memory > 0,
    )
