"""Requirements of a run for its nodes, and the driver's time limits."""

from dataclasses import dataclass

from cluster.driver.shapes import Shapes
from conf.schema import Config


@dataclass(frozen=True)
class Policy:
    """Requirements of a run, and its time limits in seconds."""

    shapes: Shapes
    """The run's layout, and the smaller layouts that it may use."""
    first_attempt: int = 1
    wait: float = 60.0
    """Time to wait for enough nodes."""
    heartbeat: float = 5.0
    """Time without an answer after which a node counts as lost."""
    kill_after: float | None = None
    """Minimum time without any progress before ranks are ended; None: `Patience` decides."""
    hang_after: float = 300.0
    """Maximum time without progress within a step."""
    start_timeout: float = 600.0
    """Maximum time without progress before the first step, in a checkpoint or in a validation."""
    timeout: float = 600.0
    """Time limit of a collective; also of a save without progress, and of the checkpoint after a stop request."""
    restarts: int = 3
    """Allowed failures of one kind without a new checkpoint in between."""
    straggler_factor: float = 1.2
    """The driver names a rank that lastingly takes this many times its peers' work time per step."""
    saves: bool = True
    """Whether the run writes checkpoints at intervals; otherwise it uses returning nodes at once."""
    copies: bool = False
    """Whether ranks keep copies of the state in memory; the run then goes on from such a copy with more nodes."""
    calls: float = 500.0
    """Minimum rate, per second, of agent calls and answers that the driver can handle."""
    probe: float = 4.0
    settle: float = 1.5
    """Time for the other ranks to report after the first failure."""
    stacks: float = 5.0
    """Time for hung ranks to print their stacks; a busy machine can delay a rank for seconds.
    The driver does not wait for a stopped rank.
    """
    kill: float = 10.0
    """Time for ranks to disappear after SIGKILL."""
    return_wait: float = 6.0
    """Time to wait for a node whose agent is starting again."""

    @property
    def world(self) -> int:
        """Number of ranks of the whole run."""
        return self.shapes.pp * self.shapes.own.dp


def policy_of(config: Config, attempt: int, shapes: Shapes) -> Policy:
    """Read the supervisor's policy from the configuration."""
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
        copies=config.checkpoint.every_memory > 0,
    )
