"""What a rank gets done between two steps, counted in its ring, so that nobody takes a slow rank for one that hangs.

Whatever may be slow calls `got_on` after each piece of its work: a batch is read, a pass of a validation is over, a token of a sample is written.
The writer of a checkpoint calls `wrote`: its bytes count only while a rank waits for a checkpoint, as most are written beside the steps.
Both do nothing in a process that has no ring.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.comm_ring import CommRing

_rings: list[CommRing] = []
"""The ring of this process's rank is the last."""


@contextmanager
def counted_in(ring: CommRing) -> Iterator[None]:
    """Progress inside is counted in this ring."""
    _rings.append(ring)
    try:
        yield
    finally:
        _rings.remove(ring)


def got_on() -> None:
    """This rank has done a piece of its work."""
    for ring in _rings[-1:]:
        ring.count()


def wrote(size: int) -> None:
    """This rank has written so many bytes of a checkpoint."""
    for ring in _rings[-1:]:
        ring.count(written=size)
