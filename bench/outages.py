"""When each node of a simulated run is away: according to a trace of one year on 400 servers, or at random times.

In the trace (outage_trace/README.md) the smallest fault is a lost node: it has no hangs, slow ranks or wrong numbers.
Faults by chance occur at the rate published for another job, and a node is away for as long as a node of the trace.
"""

import csv
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DAY = 86400.0
TRACE = Path(__file__).parent / "outage_trace" / "faults.csv"
TRACE_SERVERS, TRACE_DAYS = 400, 348.98
RATE_PER_DEVICE = 419 / 54 / 24 / 16384
"""Failures per device and hour: 419 unplanned stops on 16,384 H100 in 54 days (Llama 3, arXiv 2407.21783, table 5)."""


@dataclass(frozen=True)
class Outage:
    """An interval in which a node is away, in seconds since the beginning of the simulation."""

    node: int
    begin: float
    end: float


@cache
def _trace() -> list[Outage]:
    """All faults of the trace, by server, in seconds since its first day."""
    with TRACE.open(newline="") as file:
        rows = [(int(row["server"]), float(row["begin"]), float(row["end"])) for row in csv.DictReader(file)]
    return [Outage(server, DAY * begin, DAY * end) for server, begin, end in rows]


def traced(nodes: int, days: float, seed: int) -> list[Outage]:
    """The faults of `nodes` servers that are drawn at random from the trace, in the order of time. The trace has 400
    servers."""
    place = {server: node for node, server in enumerate(random.Random(seed).sample(range(TRACE_SERVERS), nodes))}
    found = [Outage(place[one.node], one.begin, one.end) for one in _trace() if one.node in place]
    return [one for one in found if one.begin < days * DAY]


def by_chance(nodes: int, days: float, seed: int, per_node_hour: float) -> list[Outage]:
    """Faults at random times, in the order of time. Every node that is present fails at this rate."""
    draw, repairs = random.Random(seed), [one.end - one.begin for one in _trace()]
    away: dict[int, float] = defaultdict(float)
    found, now = [], 0.0
    while per_node_hour > 0:
        now += draw.expovariate(nodes * per_node_hour / 3600)
        if now >= days * DAY:
            break
        if away[node := draw.randrange(nodes)] <= now:
            away[node] = now + max(1.0, draw.choice(repairs))
            found.append(Outage(node, now, away[node]))
    return found
