"""Seconds of a pass over the layers of a stage, alone or overlapped with another: who waits for which transfer.

A pass is a list of segments. A segment computes, starts a transfer, computes what does not need it (the shared
experts), and then waits. Alone, a pass can hide a transfer only behind that last part. In a pair two passes take turns
where each has started a transfer, exactly as parallel/pipeline/overlap.py runs them, backward first.

Transfers of a device follow one another. While one is in flight, computing is slowed: it takes the share `taken` of
the device (some SMs, or on a CPU the very cores).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Seconds of computing, then of a transfer (0 for none) with the computing that may run beside it."""

    compute: float
    transfer: float = 0.0
    beside: float = 0.0
    yields: bool = True
    """Whether a pair changes turns before the transfer is waited for."""


@dataclass(frozen=True)
class ElapsedTime:
    """How long a pass or a pair of them takes."""

    seconds: float
    exposed: float
    """Seconds of these in which a transfer was waited for."""


def alone(segments: list[Segment], taken: float) -> ElapsedTime:
    """One pass, nothing else to do while it waits."""
    seconds = exposed = 0.0
    for segment in segments:
        beside = _compute(0.0, segment.beside, segment.transfer, taken)
        wait = max(0.0, segment.transfer - beside)
        seconds += segment.compute + beside + wait
        exposed += wait
    return ElapsedTime(seconds, exposed)


class _Lane:
    def __init__(self, segments: list[Segment]):
        self.segments, self.at, self.arrival = segments, 0, 0.0

    @property
    def done(self) -> bool:
        return self.at == len(self.segments)


def overlapped(forward: list[Segment], backward: list[Segment], taken: float) -> ElapsedTime:
    """A forward and a backward pass that take turns; see parallel/pipeline/overlap.py for the order."""
    lanes = [_Lane(backward), _Lane(forward)]
    now = exposed = link = 0.0
    turn = 0
    while not all(lane.done for lane in lanes):
        lane = lanes[turn] if not lanes[turn].done else lanes[1 - turn]
        exposed += max(0.0, lane.arrival - now)
        now = max(now, lane.arrival)
        while not lane.done:
            segment = lane.segments[lane.at]
            lane.at += 1
            now = _compute(now, segment.compute, link, taken)
            if segment.transfer:
                link = lane.arrival = max(now, link) + segment.transfer
                now = _compute(now, segment.beside, link, taken)
                if segment.yields:
                    break
                exposed += max(0.0, link - now)
                now = max(now, link)
        turn = 1 - turn
    last = max(lane.arrival for lane in lanes)
    return ElapsedTime(max(now, last), exposed + max(0.0, last - now))


def _compute(now: float, seconds: float, link: float, taken: float) -> float:
    """When computing that starts now ends, slowed while the link is busy."""
    lost = taken * max(0.0, link - now)
    return now + min(seconds + lost, seconds / max(1 - taken, 1e-9))
