"""What the expert all-to-all moved and how long it was waited for.

A dispatcher owns one TrafficCounters object. Bytes are those of the messages handed to the communication library for
other ranks, split counts included, without the library's own headers; what a rank keeps for itself is not sent
and not counted.
"""

from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Sums since the last take."""

    inside_bytes: int = 0
    """Bytes sent to other ranks of the same node."""
    across_bytes: int = 0
    """Bytes sent to ranks of other nodes."""
    waited: float = 0.0
    """Seconds that the host spent waiting for arrivals. With NCCL the host does not wait, so this stays near 0."""


@dataclass
class TrafficCounters:
    """Traffic of the forward and of the backward pass."""

    forward: Traffic = field(default_factory=Traffic)
    backward: Traffic = field(default_factory=Traffic)

    def take(self) -> "TrafficCounters":
        """Return the sums so far and start again at 0."""
        taken = TrafficCounters(self.forward, self.backward)
        self.forward, self.backward = Traffic(), Traffic()
        return taken
