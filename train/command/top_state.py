"""What `sluice top` shows of a run, read from its folder alone: it may train now, here or elsewhere, hang, be dead or done.

Ranks: with cluster=ray the driver writes how all of them are (cluster/driver/rank_table.py); else each has its own file
(cluster/run_files.py). What a file of another version or a strange hand lacks is left out.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.driver.journal import read_events
from cluster.driver.rank_table import RANKS_FILE
from cluster.incident import newest_incident
from cluster.run_files import PROGRESS
from conf.files import read_plain_json
from train.checkpoint.run_folder import is_held
from train.metrics.jsonl import METRICS_FILE, read_last_lines
from train.metrics.names import Record
from train.metrics.wall_time import WallTime, split_wall_time
from train.show.report import read_settings

SHOWN_EVENTS = 200
WALL_TIME_EVERY = 10.0
"""Seconds between looks at all that a run recorded, of which its wall time is made."""
PACE_STEPS = 20
"""Newest records from which the time left is made."""
QUIET_FACTOR, QUIET_LEAST = 5.0, 30.0
"""A run without a step for so many usual ones, and so many seconds, is shown as quiet."""


@dataclass(frozen=True)
class RankView:
    """One rank. busy, seconds: of its newest step, its own work and all of it; memory: bytes; age: seconds since it said so."""

    rank: int
    node: str
    step: int
    phase: str
    busy: float | None
    seconds: float | None
    memory: int
    age: float
    ended: bool = False

    @property
    def waiting(self) -> float | None:
        """Seconds of its newest step in which it waited for other ranks or for data."""
        return None if self.busy is None or self.seconds is None else max(0.0, self.seconds - self.busy)


@dataclass(frozen=True)
class RunPicture:
    """What is shown of a run at one moment."""

    name: str
    state: str
    """trains, quiet, stopped, failed, done or empty."""
    step: int
    steps: int | None
    record: Record
    """The newest one of metrics.jsonl."""
    seconds_left: float | None
    stages: int
    replicas: int
    ranks: Sequence[RankView]
    wall: WallTime | None
    events: Sequence[dict[str, Any]]
    restarts: int
    incidents: Sequence[dict[str, Any]] = ()
    """Time and sentence of the newest one."""

    def plain(self) -> dict[str, Any]:
        """This picture as JSON has it."""
        found = asdict(self)
        record = {key: value for key, value in self.record.items() if isinstance(value, int | float)}
        ranks = [asdict(each) | {"waiting": each.waiting} for each in self.ranks]
        wall = None if self.wall is None else asdict(self.wall) | {"seconds": self.wall.seconds}
        return _finite(found | {"record": record, "ranks": ranks, "wall": wall})


def _finite(value: Any) -> Any:
    """NaN is no JSON."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunReader:
    """Reads the picture of a run again and again; what costs much, seldom."""

    def __init__(self, run_folder: Path, name: str):
        self.folder, self.name = run_folder, name
        self._wall: WallTime | None = None
        self._wall_at = -math.inf

    def read(self) -> RunPicture:
        settings, now = read_settings(self.folder), time.time()
        said = settings.get("parallel")
        parallel = said if isinstance(said, dict) else {}
        stages, replicas = _whole(parallel.get("pp"), 1), _whole(parallel.get("dp"), 1) * _whole(parallel.get("cp"), 1)
        records = read_last_lines(self.folder / METRICS_FILE)
        newest = records[-1] if records else {}
        events = read_events(self.folder)
        table = _read_table(self.folder) if events else None
        if table is not None:
            stages, replicas = _whole(table.get("pp"), stages), _whole(table.get("dp"), replicas)
        ranks = sorted(
            _from_table(table, now) if table is not None else _from_files(self.folder, now), key=lambda each: each.rank
        )
        if now - self._wall_at > WALL_TIME_EVERY:
            self._wall, self._wall_at = split_wall_time(self.folder), now
        incident = newest_incident(self.folder / "logs")
        steps = settings.get("steps") if isinstance(settings.get("steps"), int) else None
        pace = _pace(records)
        step = newest.get("step", 0)
        state = self._state(step, steps, newest, events, pace, now)
        left = (
            None if steps is None or pace is None or state not in ("trains", "quiet") else max(0, steps - step) * pace
        )
        return RunPicture(
            name=self.name,
            state=state,
            step=step,
            steps=steps,
            record=newest,
            seconds_left=left,
            stages=stages,
            replicas=replicas,
            ranks=ranks,
            wall=self._wall,
            events=[one for one in events if one["kind"] != "checkpoint"][-SHOWN_EVENTS:],
            restarts=max(0, (self._wall.starts if self._wall is not None else 1) - 1),
            incidents=[] if incident is None else [{key: incident[1].get(key) for key in ("time", "text")}],
        )

    def _state(
        self, step: int, steps: int | None, newest: Record, events: Sequence[dict], pace: float | None, now: float
    ) -> str:
        if is_held(self.folder):
            silent = now - newest.get("time", now)
            return "quiet" if pace is not None and silent > max(QUIET_LEAST, QUIET_FACTOR * pace) else "trains"
        if steps is not None and step >= steps:
            return "done"
        code = events[-1].get("code") if events and events[-1]["kind"] == "finish" else None
        failed = code not in (None, 0, 75) or any(self.folder.glob("logs/rank_*.error.json"))
        return "empty" if not step else "failed" if failed else "stopped"


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else otherwise


def _pace(records: Sequence[Record]) -> float | None:
    """Seconds from step to step of late, stalls included."""
    begun = max((place for place, one in enumerate(records) if "resumed" in one), default=0)
    recent = records[begun:][-PACE_STEPS:]
    told = [(one["step"], one["time"]) for one in recent if isinstance(one.get("time"), int | float)]
    steps = told[-1][0] - told[0][0] if told else 0
    return (told[-1][1] - told[0][1]) / steps if steps > 0 else None


def _read_table(folder: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        table = read_plain_json(folder / RANKS_FILE)
        return table if isinstance(table, dict) and isinstance(table.get("ranks"), list) else None
    return None


def _from_table(table: dict[str, Any], now: float) -> Iterator[RankView]:
    age = max(0.0, now - table["time"]) if isinstance(table.get("time"), int | float) else 0.0
    for row in table["ranks"]:
        match row:
            case [int(rank), str(node), int(step), str(phase), busy, seconds, int(memory), bool(ended)]:
                yield RankView(rank, node, step, phase, _real(busy), _real(seconds), memory, age, ended)


def _from_files(folder: Path, now: float) -> Iterator[RankView]:
    for path in folder.glob(f"logs/{PROGRESS}"):
        number = path.name.removeprefix("rank_").removesuffix(".progress.json")
        try:
            said = read_plain_json(path)
            yield RankView(
                int(number),
                str(said.get("host") or ""),
                int(said["step"]),
                str(said["phase"]),
                _real(said.get("busy")),
                _real(said.get("seconds")),
                _whole(said.get("memory"), 0),
                max(0.0, now - float(said["time"])),
            )
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            continue


def _real(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
