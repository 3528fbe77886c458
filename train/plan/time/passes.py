"""Computes the time of a pass over a stage's layers, alone or overlapped with another pass.

A pass is a list of segments. Each segment computes, starts a transfer, computes more (the shared experts), and waits.
In a pair of overlapped passes, the other pass runs during the wait (parallel/pipeline/overlap.py). The pair starts with
the backward.

A device runs one transfer at a time. A transfer takes the fraction `taken` of the device (SMs or CPU cores) from
computing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Seconds of a section of a pass.

    compute: computation before the transfer
    beside: computation that may overlap the transfer
    """

    compute: float
    transfer: float = 0.0
    beside: float = 0.0
    yields: bool = True
    """Whether the other pass of a pair runs during the wait."""


@dataclass(frozen=True)
class ElapsedTime:
    """The time of a pass or of a pair of passes."""

    seconds: float
    exposed: float
    """Seconds in which the passes wait for transfers; included in `seconds`."""


def alone(segments: list[Segment], taken: float) -> ElapsedTime:
    """Returns the time of a pass that overlaps with no other pass.

    taken: fraction of the device that a running transfer uses
    """
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
    """Returns the time of a forward and a backward. Each runs while the other waits. taken: as in `alone`."""
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
    """Returns the end time of a computation.

    The computation starts at `now`, and takes `seconds` without a transfer. Until the time `link`, a transfer slows
    the computation.
    """
    lost = taken * max(0.0, link - now)
    return now + min(seconds + lost, seconds / max(1 - taken, 1e-9))
