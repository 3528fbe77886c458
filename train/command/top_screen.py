"""The screen of `sluice top`: a run's head, its ranks as a heat map and as a table, its events; or one rank with its log or stacks.

Pure functions from a picture and what the person chose to lines of a given width, so that any terminal, a pipe and a test see the same.
"""

import datetime
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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
LEAST_RANGE = 0.2
"""Share of the median between the lightest and the darkest cell, at least: less is noise."""
MAP_ROWS, WIDEST_CELL = 16, 6
LABEL_WIDTH = 9


@dataclass(frozen=True)
class MapKind:
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
SORTS: dict[str, Callable[[RankView], tuple]] = {
    "busy": lambda one: (-(one.busy or 0.0), one.rank),
    "waiting": lambda one: (-(one.waiting or 0.0), one.rank),
    "memory": lambda one: (-one.memory, one.rank),
    "step": lambda one: (one.step, -one.age, one.rank),
    "rank": lambda one: (one.rank,),
}
SCREEN_KEYS = "b busy  w waiting  m memory  s sort  up/down and enter: a rank  q quit"
RANK_SCREEN_KEYS = "l log  t stacks now  esc back  q quit"


@dataclass(frozen=True)
class TopChoice:
    """What the person chose: the map, the order of ranks, the line of the table, and the rank that is looked into."""

    map: str = "busy"
    sort: str = "busy"
    line: int = 0
    rank: int | None = None
    stacks: bool = False


def press_key(choice: TopChoice, key: str, picture: RunPicture) -> TopChoice:
    """What a key makes of it."""
    first = {"b": "busy", "w": "waiting", "m": "memory"}
    if choice.rank is not None:
        match key:
            case "esc" | "back":
                return replace(choice, rank=None, stacks=False)
            case "t" | "l":
                return replace(choice, stacks=key == "t")
        return choice
    match key:
        case "b" | "w" | "m":
            return replace(choice, map=first[key], sort=first[key])
        case "s":
            names = list(SORTS)
            return replace(choice, sort=names[(names.index(choice.sort) + 1) % len(names)])
        case "up" | "down":
            most = max(0, len(picture.ranks) - 1)
            return replace(choice, line=min(most, max(0, choice.line + (1 if key == "down" else -1))))
        case "enter" if picture.ranks:
            return replace(
                choice, rank=ordered(picture.ranks, choice.sort)[min(choice.line, len(picture.ranks) - 1)].rank
            )
    return choice


def ordered(ranks: Sequence[RankView], sort: str) -> list[RankView]:
    return sorted(ranks, key=SORTS[sort])


def run_screen(picture: RunPicture, choice: TopChoice, width: int, height: int, live: bool) -> Group:
    """The whole run. live: whether keys work, so that the screen is no higher than the terminal."""
    lines = [*_head(picture, width)]
    rows = max(1, min(picture.stages, MAP_ROWS, (height - len(lines)) // 3 if live else MAP_ROWS))
    if not picture.ranks:
        lines += [Text("no rank has said yet how it is", style="dim")]
    elif live and width < 150:
        lines += heat_map(picture, choice.map, width, rows)
    elif width >= 150:
        lines += _beside([heat_map(picture, name, (width - 4) // 3, rows) for name in MAPS], (width - 4) // 3)
    else:
        for name in MAPS:
            lines += heat_map(picture, name, width, rows)
    news = list(_news(picture, width))
    left = height - len(lines) - 3 if live else 60
    shown = max(3, min(len(picture.ranks), left - min(len(news), max(3, left // 3)) if live else 8))
    if picture.ranks:
        lines += _table(picture, choice, width, shown, live)
    room = max(0, height - len(lines) - 2) if live else 8
    if news and room:
        lines += [Text("newest events", style="bold"), *news[-room:]]
    if live:
        lines = [*lines[: height - 1], Text(SCREEN_KEYS[:width], style="reverse")]
    return Group(*lines)


def rank_screen(picture: RunPicture, rank: int, text: Sequence[str], what: str, width: int, height: int) -> Group:
    """One rank: how it is, and the end of a text of it. what: the name of that text."""
    view = next((one for one in picture.ranks if one.rank == rank), None)
    head = f"rank {rank} of {picture.name}"
    if view is not None:
        stage, replica = divmod(rank, picture.replicas)
        head += f": stage {stage}, replica {replica}, on {one_line(view.node) or 'this machine'}, step {view.step}, {_doing(view)}"
    lines = [Text(head[:width], style="bold"), Text(f"{what}:"[:width], style="dim")]
    room = max(1, height - 3)
    shown = [_end_of(one_line(line), width) for line in text[-room:]] or ["(nothing)"]
    return Group(*lines, *(Text(line) for line in shown), Text(RANK_SCREEN_KEYS[:width], style="reverse"))


def _end_of(line: str, width: int) -> str:
    """What a line ends with says more than the folder that it begins with."""
    return line if len(line) <= width else "…" + line[1 - width :]


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


def _beside(maps: Sequence[list[Text]], width: int) -> list[Text]:
    """Maps of equal height next to each other."""
    found = []
    for row in range(max(len(one) for one in maps)):
        line = Text()
        for one in maps:
            piece = one[row].copy() if row < len(one) else Text()
            piece.truncate(width, pad=True)
            line.append_text(piece).append("  ")
        found.append(line)
    return found


def _table(picture: RunPicture, choice: TopChoice, width: int, shown: int, live: bool) -> list[Text]:
    """Ranks in the chosen order, the chosen line among those that are shown."""
    ranks = ordered(picture.ranks, choice.sort)
    line = min(choice.line, len(ranks) - 1)
    first = max(0, min(line - shown // 2, len(ranks) - shown)) if live else 0
    head = f"{'rank':>6} {'stage':>5} {'step':>8} {'doing':<10} {'busy':>9} {'waiting':>9} {'memory':>10} {'news':>7}  node"
    found = [Text(f"{head}   (by {choice.sort})"[:width], style="bold")]
    for place, one in enumerate(ranks[first : first + shown], first):
        busy, waiting = ("" if value is None else _seconds(value) for value in (one.busy, one.waiting))
        stage = one.rank // picture.replicas
        memory = gib(one.memory) if one.memory else ""
        text = (
            f"{one.rank:>6} {stage:>5} {one.step:>8} {one_line(_doing(one)):<10.10} {busy:>9} {waiting:>9} {memory:>10} "
            f"{duration(one.age):>7}  {one_line(one.node)}"
        )
        found.append(Text(text[:width], style="reverse" if live and place == line else ""))
    if len(ranks) > shown:
        found.append(Text(f"  {len(ranks)} ranks in all"[:width], style="dim"))
    return found


def _doing(one: RankView) -> str:
    return "ended" if one.ended else one.phase


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
        style = {
            "failure": "red",
            "incident": "red",
            "straggler": "yellow",
            "node lost": "yellow",
            "quiet": "yellow",
        }.get(kind, "")
        yield _cut(Text(f"{when}  {one_line(kind)}: {one_line(text)}", style=style), width)


def _cut(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    return text
