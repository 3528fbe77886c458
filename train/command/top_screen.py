"""The screen of `sluice top`: a run's head, its ranks as heat maps and as a table, its newest events.

Pure functions from a picture to lines of a given width, so that any terminal, a pipe and a test see the same.
"""

import datetime
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Group
from rich.text import Text

from conf.words import one_line
from train.command.top_state import RankView, RunPicture
from train.metrics.quantities import duration, gib, short

SHADES = "·░▒▓█"
COLOURS = ("grey37", "dodger_blue2", "green3", "gold3", "red3")
"""Colours of cells, from the least to the most; the characters tell the same without colour."""
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
"""Share of the median between the lightest and the darkest cell, at least: less is noise."""
MAP_ROWS, WIDEST_CELL, LABEL_WIDTH = 16, 6, 9
LISTED_RANKS = LISTED_NEWS = 8


class MapKind(NamedTuple):
    """What a heat map shows of each rank."""

    title: str
    value: Callable[[RankView], float | None]
    words: Callable[[float], str]


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


MAPS = {
    "busy": MapKind("busy: a rank's own work in its newest step", lambda one: one.busy, _seconds),
    "waiting": MapKind("waiting: for other ranks or data in its newest step", lambda one: one.waiting, _seconds),
    "memory": MapKind("memory: its peak", lambda one: float(one.memory) if one.memory else None, gib),
}


def run_screen(picture: RunPicture, width: int, height: int | None = None) -> Group:
    """The whole run. height: of a terminal, which then has as many maps and rows as fit; None for all of them."""
    lines, news = [*_head(picture, width)], [*_news(picture, width)][-LISTED_NEWS:]
    room = 10**6 if height is None else height - len(lines) - min(len(news), 3) - 5
    if not picture.ranks:
        lines += [Text("no rank has said yet how it is", style="dim")]
    for name in MAPS if picture.ranks else ():
        rows = max(1, min(picture.stages, MAP_ROWS, room - 2))
        if name == "busy" or room >= rows + 2:
            lines += heat_map(picture, name, width, rows)
            room -= rows + 2
    if picture.ranks:
        lines += _table(picture, width, max(1, min(LISTED_RANKS, room)))
    if news:
        lines += [Text("newest events", style="bold"), *news]
    return Group(*lines[:height])


def _head(picture: RunPicture, width: int) -> Iterator[Text]:
    of = f"/{picture.steps}" if picture.steps else ""
    first = Text.assemble((one_line(picture.name), "bold"), "  ", (picture.state, STATES.get(picture.state, "")))
    first.append(f"  step {picture.step}{of}")
    if picture.seconds_left is not None:
        first.append(f"  {duration(picture.seconds_left)} left")
    if picture.steps and (room := min(40, width - first.cell_len - 2)) >= 8:
        full = round(room * min(1.0, picture.step / picture.steps))
        first.append("  " + "━" * full + "╌" * (room - full))
    yield _cut(first, width)
    record, found = picture.record, []
    for name, words in (
        ("main_loss", lambda value: f"loss {value:.4g}"),
        ("validation_loss", lambda value: f"held-out {value:.4g}"),
        ("tokens_per_second", lambda value: f"{short(value)} tokens/s"),
        ("mfu", lambda value: f"MFU {value:.1%}"),
        ("step_seconds", lambda value: f"{value:.3g} s a step"),
        ("max_vio", lambda value: f"balance (MaxVio) {value:.2f}"),
        ("grad_norm", lambda value: f"gradient {value:.3g}"),
        ("skipped_steps", lambda value: f"{value} skipped" if value else ""),
    ):
        if isinstance(value := record.get(name), int | float) and (text := words(value)):
            found.append(text)
    yield from _lines_of(found, width)
    if picture.wall is not None:
        parts = [f"{part} {share:.1%}" for part, _, share in picture.wall.rows()]
        again = f", {picture.restarts} restart{'s' * (picture.restarts > 1)}" if picture.restarts else ""
        whole = f"effective {picture.wall.effective:.1%} of {duration(picture.wall.seconds)}{again}:"
        yield from _lines_of([whole, *parts], width)


def _lines_of(pieces: Sequence[str], width: int) -> Iterator[Text]:
    """Lines with as many pieces as fit."""
    line = ""
    for piece in pieces:
        if line and len(line) + 2 + len(piece) > width:
            yield _cut(Text(line), width)
            line = ""
        line += f"  {piece}" if line else piece
    if line:
        yield _cut(Text(line), width)


def heat_map(picture: RunPicture, name: str, width: int, rows: int) -> list[Text]:
    """Stages are rows and replicas columns. Where there are more than fit, a cell stands for several ranks and shows their largest value."""
    kind = MAPS[name]
    values = {one.rank: value for one in picture.ranks if (value := kind.value(one)) is not None}
    title = Text(kind.title[:width], style="bold")
    if not values:
        return [title, Text("  not known yet"[:width], style="dim")]
    middle, least, most = statistics.median(values.values()), min(values.values()), max(values.values())
    span = max(most - least, LEAST_RANGE * middle, 1e-12)
    low = least if most - least >= LEAST_RANGE * middle else middle - span / 2
    room = max(1, width - LABEL_WIDTH)
    cell = max(1, min(WIDEST_CELL, room // picture.replicas))
    columns, rows = min(picture.replicas, room // cell), min(rows, picture.stages)
    lines = [title]
    for row in range(rows):
        stages = _share(row, rows, picture.stages)
        line = Text(f"stage {stages.start:<3}"[:LABEL_WIDTH].ljust(LABEL_WIDTH), style="dim")
        for column in range(columns):
            replicas = _share(column, columns, picture.replicas)
            here = [values.get(stage * picture.replicas + replica) for stage in stages for replica in replicas]
            told = [value for value in here if value is not None]
            level = min(len(SHADES) - 1, max(0, int((max(told) - low) / span * len(SHADES)))) if told else None
            line.append((" " if level is None else SHADES[level]) * cell, style="" if level is None else COLOURS[level])
        lines.append(line)
    worst = max(values, key=lambda rank: values[rank])
    several = (
        f"; a cell: up to {-(-picture.replicas // columns) * -(-picture.stages // rows)} ranks"
        if columns < picture.replicas or rows < picture.stages
        else ""
    )
    text = f"  {kind.words(least)} to {kind.words(most)} (rank {worst}), median {kind.words(middle)}{several}"
    return [*lines, Text(text[:width], style="dim")]


def _share(index: int, parts: int, count: int) -> range:
    """Which of `count` things the part of this index has."""
    return range(index * count // parts, (index + 1) * count // parts)


def _table(picture: RunPicture, width: int, shown: int) -> list[Text]:
    """The busiest ranks."""
    ranks = sorted(picture.ranks, key=lambda one: (-(one.busy or 0.0), one.rank))
    head = f"{'rank':>6} {'stage':>5} {'step':>8} {'doing':<10} {'busy':>9} {'waiting':>9} {'memory':>10} {'news':>7}  node"
    found = [Text(head[:width], style="bold")]
    for one in ranks[:shown]:
        busy, waiting = ("" if value is None else _seconds(value) for value in (one.busy, one.waiting))
        doing, memory = "ended" if one.ended else one_line(one.phase), gib(one.memory) if one.memory else ""
        text = f"{one.rank:>6} {one.rank // picture.replicas:>5} {one.step:>8} {doing:<10.10} {busy:>9} {waiting:>9} {memory:>10} "
        found.append(Text(f"{text}{duration(one.age):>7}  {one_line(one.node)}"[:width]))
    if len(ranks) > shown:
        found.append(Text(f"  the busiest of {len(ranks)} ranks"[:width], style="dim"))
    return found


def _news(picture: RunPicture, width: int) -> Iterator[Text]:
    """Events and incidents in a line each, oldest first."""
    told = [
        (one["time"], one["kind"].replace("_", " "), one["text"])
        for one in picture.events
        if one["kind"] != "incident" or not picture.incidents  # the driver's is a screen of the same
    ]
    told += [(one["time"], "incident", one["text"]) for one in picture.incidents]
    for at, kind, text in sorted(told):
        when = datetime.datetime.fromtimestamp(at).strftime("%m-%d %H:%M:%S")
        yield _cut(Text(f"{when}  {one_line(kind)}: {one_line(text)}", style=NEWS_STYLES.get(kind, "")), width)


def _cut(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    return text
