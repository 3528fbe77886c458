"""ranks.json of a run folder: the state of all ranks in the newest attempt, for external tools.

time      Unix time at which the driver wrote the file
attempt   number of the attempt
phase     phase of the driver (cluster/driver/messages.py)
pp, dp    layout; with parallel.cp all ranks of a stage count as dp
ranks     [[rank, node, step, phase, busy, seconds, memory, ended], ...], as in cluster.cause.RankReport
"""

import contextlib
import json
from pathlib import Path

from cluster.clocks import SteadyClock
from cluster.driver.messages import DriverPhase
from cluster.driver.supervisor import Supervisor
from conf.files import atomic_write_text

RANKS_FILE = "ranks.json"
WRITTEN_EVERY, SLOWER_FROM = 2.0, 1000
"""Seconds between two writes, and the number of ranks from which the interval grows in proportion to the ranks."""


class RankTable:
    """Writes ranks.json at intervals. If the disk refuses the file, only the file is lost."""

    def __init__(self, folder: Path):
        self._path, self._clock = folder / RANKS_FILE, SteadyClock()
        self._due, self._phase = 0.0, DriverPhase.gathering

    def update(self, supervisor: Supervisor, now: float) -> None:
        """Write the file if it is due, or if the phase of the run has changed. now: seconds of any clock."""
        attempt = supervisor.attempt
        if attempt is None or (now < self._due and supervisor.phase is self._phase):
            return
        self._due = now + WRITTEN_EVERY * max(1.0, len(attempt.reports) / SLOWER_FROM)
        self._phase = supervisor.phase
        ranks = [
            [
                each.rank,
                attempt.names[each.rank],
                each.step,
                each.phase,
                each.busy,
                each.seconds,
                each.memory,
                each.ended,
            ]
            for each in attempt.reports.values()
        ]
        layout = {"pp": attempt.placement.pp, "dp": attempt.placement.dp}
        head = {"time": self._clock.now(), "attempt": attempt.number, "phase": self._phase.value}
        with contextlib.suppress(OSError):
            atomic_write_text(self._path, json.dumps(head | layout | {"ranks": ranks}), durable=False)
