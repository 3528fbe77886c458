"""Reads the data of `sluice top` from the run folder.

With cluster=ray the driver writes the state of all ranks (cluster/driver/journal.py). Otherwise each rank writes a file
(cluster/run_files.py).
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.driver.journal import RANKS_FILE, read_events
from cluster.incident import newest_incident
from cluster.run_files import PROGRESS
from conf.files import read_plain_json
from train.checkpoint.run_folder import is_held
from train.metrics.jsonl import METRICS_FILE, read_last_lines
from train.metrics.names import Record
from train.metrics.wall_time import WallTime, split_wall_time
from train.show.report import read_settings

SHOWN_EVENTS = 200
WALL_TIME_EVERY = 10
"""Seconds between computations of the wall time."""
PACE_STEPS = 20
"""Number of the newest records of metrics.jsonl from which the time left is estimated."""
QUIET_FACTOR, QUIET_LEAST = 5.0, 30.0
"""A run is quiet if no step ended for QUIET_FACTOR step times or QUIET_LEAST seconds, whichever is longer."""


def read_picture(folder: Path, name: str) -> dict[str, Any]:
    """Returns the present state of a run as --json prints it. Unknown values are null.

    name, step, steps, stages, replicas, restarts
    state         trains, quiet, stopped, failed, done or empty
    seconds_left  estimated seconds to the last step, if the run trains
    record        numbers of the newest line of metrics.jsonl
    ranks         a list in rank order; each entry has
                      rank, node, step, phase, ended
                      memory   bytes
                      age      seconds since the report
                      seconds  duration of the newest step
                      busy     computing time of this step
                      waiting  waiting time of this step, for other ranks or data
    wall          wall time: seconds_in (seconds of each part), seconds (total), effective (fraction that was training)
    events        the newest events and the newest incident: time, kind, text
    """
    settings, now = read_settings(folder), time.time()
    said, steps = settings.get("parallel"), settings.get("steps")
    layout = said if isinstance(said, dict) else {}
    records, events = read_last_lines(folder / METRICS_FILE), read_events(folder)
    newest, ranks = records[-1] if records else {}, list(_from_files(folder, now))
    if events and (table := _read_table(folder)):
        layout, ranks = layout | {"cp": 1} | table, list(_from_table(table, now))
    wall, step, pace = _wall_time(folder, int(now // WALL_TIME_EVERY)), newest.get("step", 0), _pace(records)
    steps = steps if isinstance(steps, int) else None
    state = _state(folder, step, steps, newest, events, pace, now)
    for rank in ranks:
        known = rank["busy"] is not None and rank["seconds"] is not None
        rank["waiting"] = max(0.0, rank["seconds"] - rank["busy"]) if known else None
    picture = {
        "name": name,
        "state": state,
        "step": step,
        "steps": steps,
        "seconds_left": (steps - step) * pace if steps and pace and state in ("trains", "quiet") else None,
        "record": {key: value for key, value in newest.items() if isinstance(value, int | float)},
        "stages": _whole(layout.get("pp"), 1),
        "replicas": _whole(layout.get("dp"), 1) * _whole(layout.get("cp"), 1),
        "ranks": sorted(ranks, key=lambda rank: rank["rank"]),
        "wall": None if wall is None else asdict(wall) | {"seconds": wall.seconds},
        "events": _news(folder, events),
        "restarts": max(0, (wall.starts if wall is not None else 1) - 1),
    }
    return json.loads(json.dumps(picture), parse_constant=lambda _: None)  # JSON has no NaN


@lru_cache(maxsize=1)
def _wall_time(folder: Path, moment: int) -> WallTime | None:
    """Returns the parts of the wall time, cached until `moment` changes."""
    return split_wall_time(folder)


def _news(folder: Path, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the events except checkpoints, with the newest incident, oldest first."""
    found = [event for event in events if event["kind"] != "checkpoint"][-SHOWN_EVENTS:]
    if (newest := newest_incident(folder / "logs")) is not None:
        found = [event for event in found if event["kind"] != "incident"]
        found.append({"time": newest[1]["time"], "kind": "incident", "text": newest[1]["text"]})
    return sorted(found, key=lambda event: event["time"])


def _state(
    folder: Path, step: int, steps: int | None, newest: Record, events: Sequence[dict], pace: float | None, now: float
) -> str:
    if is_held(folder):
        silent = now - newest.get("time", now)
        return "quiet" if pace is not None and silent > max(QUIET_LEAST, QUIET_FACTOR * pace) else "trains"
    if steps is not None and step >= steps:
        return "done"
    code = events[-1].get("code") if events and events[-1]["kind"] == "finish" else None
    failed = code not in (None, 0, 75) or any(folder.glob("logs/rank_*.error.json"))
    return "empty" if not step else "failed" if failed else "stopped"


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else otherwise


def _pace(records: Sequence[Record]) -> float | None:
    """Returns the mean seconds per step, with waits for checkpoints."""
    begun = max((place for place, one in enumerate(records) if "resumed" in one), default=0)
    timed = [one for one in records[begun:][-PACE_STEPS:] if isinstance(one.get("time"), int | float)]
    steps = timed[-1]["step"] - timed[0]["step"] if timed else 0
    return (timed[-1]["time"] - timed[0]["time"]) / steps if steps > 0 else None


def _read_table(folder: Path) -> dict[str, Any]:
    """Returns the driver's rank table; empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        table = read_plain_json(folder / RANKS_FILE)
        return table if isinstance(table, dict) and isinstance(table.get("ranks"), list) else {}
    return {}


def _from_table(table: dict[str, Any], now: float) -> Iterator[dict[str, Any]]:
    age = max(0.0, now - table["time"]) if isinstance(table.get("time"), int | float) else 0.0
    for row in table["ranks"]:
        match row:
            case [int(rank), str(node), int(step), str(phase), busy, seconds, int(memory), bool(ended)]:
                said = {"step": step, "phase": phase, "busy": busy, "seconds": seconds, "memory": memory}
                yield _rank(rank, node, said, age, ended)


def _from_files(folder: Path, now: float) -> Iterator[dict[str, Any]]:
    for path in folder.glob(f"logs/{PROGRESS}"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, OverflowError, AttributeError):
            said, number = read_plain_json(path), path.name.removeprefix("rank_").removesuffix(".progress.json")
            yield _rank(int(number), str(said.get("host") or ""), said, max(0.0, now - float(said["time"])), False)


def _rank(number: int, node: str, said: dict[str, Any], age: float, ended: bool) -> dict[str, Any]:
    """Returns one entry of `ranks`. age: seconds since the report."""
    seconds = {
        key: float(value) if isinstance(value := said.get(key), int | float) and math.isfinite(value) else None
        for key in ("busy", "seconds")
    }
    about = {"rank": number, "node": node, "step": int(said["step"]), "phase": str(said["phase"]), "ended": ended}
    return about | seconds | {"memory": _whole(said.get("memory"), 0) or None, "age": age}
