"""The result of an optimizer step."""

from dataclasses import dataclass


@dataclass
class Update:
    """Result of one optimizer step."""

    grad_norm: float
    """Global gradient norm before clipping; not finite after a skipped step."""
    applied: bool
    bad_parameters: list[str]
    """Parameters in this rank's shard with non-finite gradients, by name."""
