"""What a step of the optimizer came to."""

from dataclasses import dataclass


@dataclass
class Update:
    """What one optimizer step did."""

    grad_norm: float
    """Global gradient norm before clipping; not finite when the step was skipped."""
    applied: bool
    bad_parameters: list[str]
    """Parameters of this rank's shard with a non-finite gradient."""
