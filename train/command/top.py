"""`sluice top NAME [runs=FOLDER] [--json]`: shows the present state of a run.

The command works while the run trains or hangs, and after the run's end. Heat
maps show busy time, waiting time and memory of the ranks, by stage and replica.
Step, loss, speed, time left and effective time are above the heat maps; the
newest events are below them. All data come from the run folder, so any machine
that can read this folder can show them. In a terminal the screen is updated
until Ctrl-C. Without a terminal it is printed once. --json prints the data for
scripts.
"""

import json
import signal
import statistics
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from conf.errors import EXIT_OK, UserError
from conf.load import reported
from conf.screen import Terminal
from conf.words import one_line, say
from train.command.command_words import sort_words
from train.command.top_state import read_picture
from train.metrics.quantities import duration, gib, short

LOOKS_EVERY = 1.0
"""Seconds between two reads of the run folder."""
HARD_SPACE = "\N{NO-BREAK SPACE}"
SHADES = "·░▒▓█"
COLOURS = ("grey37", "dodger_blue2", "green3", "gold3", "red3")
"""Colours of a heat map, smallest value first, like SHADES."""
STATES = {
    "trains": "bold green",
    "done": "bold green",
    "quiet": "bold yellow",
    "stopped": "bold yellow",
    "failed": "bold red",
    "empty": "dim",
}
NEWS_STYLES = {"failure": "red", "incident": "red", "straggler": "yellow", "node lost": "yellow", "quiet": "yellow"}
LEAST_RANGE = 0.2
"""Minimum difference between the ends of a colour scale, as a share of the median value."""
MAP_ROWS, WIDEST_CELL, LABEL_WIDTH = 16, 6, 9
LISTED_RANKS = LISTED_NEWS = 8


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


MAPS = {
    "busy": ("a rank's computing time in its newest step", _seconds),
    "waiting": ("waiting time for other ranks or data in its newest step", _seconds),
    "memory": ("its peak", gib),
}
"""Values that have a heat map, with description and formatter."""
HEAD = {
    "main_loss": "loss {:.4g}",
    "validation_loss": "held-out {:.4g}",
    "tokens_per_second": "{} tokens/s",
    "mfu": "MFU {:.1%}",
    "step_seconds": "{:.3g} s per step",
    "max_vio": "balance (MaxVio) {:.2f}",
    "grad_norm": "gradient {:.3g}",
    "skipped_steps": "{} skipped",
}
"""Metrics in the top line, with their formats. A metric with the value 0 is not shown."""


@reported
def main(words: Sequence[str]) -> int:
    """Run `sluice top` with these arguments; returns the exit code."""
    given = sort_words("sluice top", words)
    name, console = given.one_run(), Terminal()
    folder = given.runs / name
    if not (folder / "config.yaml").is_file():
        cure = "`sluice runs` lists the names; `runs=FOLDER` looks in another folder"
        raise UserError(given.command, name, f"is no run in {given.runs.absolute()}", cure)
    if given.flags:
        say(json.dumps(read_picture(folder, name), indent=1))
    elif not console.is_terminal or console.is_dumb_terminal:
        console.print(run_screen(read_picture(folder, name), console.width))
    else:
        stop = threading.Event()  # an event, because a KeyboardInterrupt in a finalizer is lost
        signal.signal(signal.SIGINT, lambda *_: stop.set())
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not stop.is_set():
                live.update(run_screen(read_picture(folder, name), console.width, console.height), refresh=True)
                stop.wait(LOOKS_EVERY)
    return EXIT_OK


def run_screen(picture: dict[str, Any], width: int, height: int | None = None) -> Group:
    """Returns the complete screen. height: rows; None: no limit."""
    lines, news = [*_head(picture, width)], [*_news(picture, width)][-LISTED_NEWS:]
    room = 10**6 if height is None else height - len(lines) - min(len(news), 3) - 5
    for name in MAPS if picture["ranks"] else ():
        rows = max(1, min(picture["stages"], MAP_ROWS, room - 2))
        if name == "busy" or room >= rows + 2:
            lines += heat_map(picture, name, width, rows)
            room -= rows + 2
    if picture["ranks"]:
        lines += _table(picture, width, max(1, min(LISTED_RANKS, room)))
    else:
        lines.append(Text("no rank has reported yet", style="dim"))
    if news:
        lines += [Text("newest events", style="bold"), *news]
    return Group(*lines[:height])


def _head(picture: dict[str, Any], width: int) -> Iterator[Text]:
    state, wall, record = picture["state"], picture["wall"], picture["record"]
    first = Text.assemble((one_line(picture["name"]), "bold"), "  ", (state, STATES[state]))
    first.append(f"  step {picture['step']}" + (f"/{picture['steps']}" if picture["steps"] else ""))
    if picture["seconds_left"] is not None:
        first.append(f"  {duration(picture['seconds_left'])} left")
    yield _cut(first, width)
    numbers = {name: short(value) if name == "tokens_per_second" else value for name, value in record.items()}
    yield from _lines_of([words.format(numbers[name]) for name, words in HEAD.items() if numbers.get(name)], width)
    if wall is not None:
        again = f", {picture['restarts']} restart{'s' * (picture['restarts'] > 1)}" if picture["restarts"] else ""
        whole = f"effective {wall['effective']:.1%} of {duration(wall['seconds'])}{again}:"
        shares = [f"{part} {took / (wall['seconds'] or 1):.1%}" for part, took in wall["seconds_in"].items() if took]
        yield from _lines_of([whole, *shares], width)


def _lines_of(pieces: Sequence[str], width: int) -> Iterator[Text]:
    """Joins texts into lines of `width` characters, with line breaks only between texts."""
    whole = "  ".join(piece.replace(" ", HARD_SPACE) for piece in pieces)
    yield from (Text(line.replace(HARD_SPACE, " ")) for line in textwrap.wrap(whole, width))


def heat_map(picture: dict[str, Any], name: str, width: int, rows: int) -> list[Text]:
    """Returns a heat map of stages and replicas. A cell that contains several ranks shows their largest value."""
    (title, words), stages, replicas = MAPS[name], picture["stages"], picture["replicas"]
    values = {rank["rank"]: rank[name] for rank in picture["ranks"] if rank[name] is not None}
    lines = [Text(f"{name}: {title}"[:width], style="bold")]
    if not values:
        return [*lines, Text("  unknown so far"[:width], style="dim")]
    middle, least, most = statistics.median(values.values()), min(values.values()), max(values.values())
    span = max(most - least, LEAST_RANGE * middle, 1e-12)
    low = least if most - least >= LEAST_RANGE * middle else middle - span / 2
    room = max(1, width - LABEL_WIDTH)
    cell = max(1, min(WIDEST_CELL, room // replicas))
    columns, rows = min(replicas, room // cell), min(rows, stages)
    for row in range(rows):
        line = Text(f"stage {row * stages // rows:<3}"[:LABEL_WIDTH].ljust(LABEL_WIDTH), style="dim")
        for column in range(columns):
            here = [
                values.get(stage * replicas + replica, -1.0)
                for stage in _share(row, rows, stages)
                for replica in _share(column, columns, replicas)
            ]
            level = min(len(SHADES) - 1, max(0, int((max(here) - low) / span * len(SHADES))))
            known = max(here) >= 0
            line.append((SHADES[level] if known else " ") * cell, style=COLOURS[level] if known else "")
        lines.append(line)
    worst, most_ranks = max(values, key=lambda rank: values[rank]), -(-replicas // columns) * -(-stages // rows)
    several = f"; a cell: up to {most_ranks} ranks" if most_ranks > 1 else ""
    text = f"  {words(least)} to {words(most)} (rank {worst}), median {words(middle)}{several}"
    return [*lines, Text(text[:width], style="dim")]


def _share(index: int, parts: int, count: int) -> range:
    """Divides `count` items into `parts` parts. Returns the items of the part `index`."""
    return range(index * count // parts, (index + 1) * count // parts)


def _table(picture: dict[str, Any], width: int, shown: int) -> list[Text]:
    """Returns a table of the busiest ranks."""
    ranks = sorted(picture["ranks"], key=lambda rank: (-(rank["busy"] or 0.0), rank["rank"]))
    head = f"{'rank':>6} {'stage':>5} {'step':>8} {'doing':<10} {'busy':>9} {'waiting':>9} {'memory':>10} {'news':>7}  node"
    found = [Text(head[:width], style="bold")]
    for one in ranks[:shown]:
        busy, waiting = ("" if one[key] is None else _seconds(one[key]) for key in ("busy", "waiting"))
        doing, memory = "ended" if one["ended"] else one_line(one["phase"]), gib(one["memory"]) if one["memory"] else ""
        place = f"{one['rank']:>6} {one['rank'] // picture['replicas']:>5} {one['step']:>8} {doing:<10.10}"
        text = f"{place} {busy:>9} {waiting:>9} {memory:>10} {duration(one['age']):>7}  {one_line(one['node'])}"
        found.append(Text(text[:width]))
    if len(ranks) > shown:
        found.append(Text(f"  the busiest of {len(ranks)} ranks"[:width], style="dim"))
    return found


def _news(picture: dict[str, Any], width: int) -> Iterator[Text]:
    """Yields one line per event, the oldest event first."""
    for event in picture["events"]:
        kind, when = event["kind"].replace("_", " "), time.strftime("%m-%d %H:%M:%S", time.localtime(event["time"]))
        text = f"{when}  {one_line(kind)}: {one_line(event['text'])}"
        yield _cut(Text(text, style=NEWS_STYLES.get(kind, "")), width)


def _cut(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    return text
