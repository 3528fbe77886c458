"""The result of an optimizer step."""

from dataclasses import dataclass


@dataclass
class Update:
    """Result of one optimizer step."""

    grad_norm: float
    """Global gradient norm before clipping; not finite if the step was skipped."""
    applied: bool
    bad_parameters: list[str]
    """Parameters in this rank's shard whose gradients are not finite, by name."""
