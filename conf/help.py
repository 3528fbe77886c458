"""Implements `sluice --help` from the schema and the files in the folders of conf/.

sluice --help                      one screen: examples, commands, and the following words
sluice --help recipes              recipes; also modes, groups (with their options) and keys (sections)
sluice --help parallel             the keys of a section; optim.lr is one key
sluice --help expert [parallel]    expert keys, of all sections or of the named sections
sluice --help optim conf=NAME      with the values of that recipe
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from conf.command_line import close_keys
from conf.errors import EXIT_OK, UserError
from conf.keys import Key, KeyGroup, attribute_meanings, groups, value_words
from conf.load import compose_node, explained, reported
from conf.schema import ROOT, Mode
from conf.synonyms import COMMANDS

EXPERT = "expert"
"""The argument that shows the expert keys, which are rarely used."""
FIRST_SCREEN = {
    "Examples": (
        ("sluice", "train the recipe tiny, a small DeepSeek-V3"),
        ("sluice data.path=FOLDER name=mine", "train it on your text"),
        ("sluice steps=2000 optim.lr=1e-3", "change settings"),
        ("sluice -m optim.lr=1e-3,2e-3", "train once for each value"),
        ("sluice mode=generate name=mine", "generate text from a trained model"),
        ("sluice mode=plan conf=deepseek_v3", "predict memory, speed and cost"),
        ("sluice --cfg job", "print all settings, and start nothing"),
    ),
    "Commands": (
        ("sluice top NAME", "watch a run"),
        ("sluice why NAME", "name the rank that failed or blocks others"),
        ("sluice runs", "list runs; sluice runs clean frees disk"),
        ("sluice launch --print slurm", "print a job file for a cluster"),
        ("sluice doctor", "check this machine; --version: versions"),
    ),
    "More help": (
        ("sluice --help modes", "tasks: train, plan, prove, export, ..."),
        ("sluice --help recipes", "models and trainings: tiny, ..."),
        ("sluice --help groups", "options of model, data, optim, ..."),
        ("sluice --help keys", "sections of keys, and keys at the top"),
        ("sluice --help optim", "keys of a section; optim.lr: one key"),
        ("sluice --help expert", "rarely used keys, in all sections"),
    ),
}
TABLE_WIDTH = 120
"""Minimum width of a terminal for tables of keys."""


@reported
def show_help(words: list[str], console: Console | None = None) -> int:
    """Print the help that a command line asks for. Returns the exit code."""
    overrides, names = _sorted_out(words)
    console = console or Console(highlight=False)
    with explained(overrides):
        values = compose_node(*overrides)
    if not names:
        console.print("[bold]sluice[/] \\[conf=RECIPE] \\[GROUP=OPTION] \\[KEY=VALUE ...] \\[-m]")
        for title, rows in FIRST_SCREEN.items():
            _two_columns(console, title, rows)
    expert = EXPERT in names
    for name in [name for name in names if name != EXPERT] or ([group.name for group in groups()] if expert else []):
        if name in WORD_LISTS:
            _two_columns(console, *WORD_LISTS[name]())
        if name not in WORD_LISTS or name == TOP_KEYS:
            console.print(*_section(name.removeprefix(TOP_KEYS), values, expert, console.width), sep="\n")
    return EXIT_OK


def _sorted_out(words: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into overrides (also --config-dir) and other names. Other flags are ignored."""
    overrides, names, left = [], [], iter(words)
    for word in left:
        flag, _, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            overrides.append(f'hydra.searchpath=["{Path(value or next(left, ".")).absolute()}"]')
        elif not word.startswith("-"):
            (overrides if "=" in word else names).append(word)
    return overrides, names


def recipe_lines() -> dict[str, str]:
    """Return the name and the first comment line of every recipe."""
    return {name: option_line(ROOT / "conf" / "conf" / f"{name}.yaml") for name in options("conf")}


def options(group: str) -> list[str]:
    """Return the names of the files of a Hydra group."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def option_groups() -> list[str]:
    """Return the folders of conf/ with options, except the recipes' folder."""
    return sorted(path.name for path in (ROOT / "conf").iterdir() if path.name != "conf" and any(path.glob("*.yaml")))


def option_line(path: Path) -> str:
    """Return the first comment line of an option's file that is no directive (such as @package), or an empty string."""
    comments = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((line for line in comments if not line.startswith(("@package", "yaml-language-server"))), "")


def _modes() -> tuple[str, Iterable[tuple[str, str]]]:
    meanings = attribute_meanings(Mode)
    return "Modes (mode=)", [(mode.name, meanings[mode.name]) for mode in Mode]


def _sections() -> tuple[str, Iterable[tuple[str, str]]]:
    rows = [(section.name, f"{len(section.part(False).keys)} keys. {section.meaning}") for section in groups()[1:]]
    return "Sections of keys (sluice --help SECTION shows their keys)", rows


TOP_KEYS = "keys"
"""The argument of `sluice --help` for the sections and top-level keys."""
WORD_LISTS = {
    "modes": _modes,
    "recipes": lambda: ("Recipes (conf=)", recipe_lines().items()),
    "groups": lambda: ("Groups (GROUP=OPTION)", [(group, ", ".join(options(group))) for group in option_groups()]),
    TOP_KEYS: _sections,
}
"""Maps an argument of `sluice --help` to a function that returns the title and the rows of a list."""


def _two_columns(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, text in rows:
        table.add_row(f"  {escape(name)}", escape(text))
    console.print(f"\n[bold]{escape(title)}[/]")
    console.print(table)


def _section(name: str, values: DictConfig, expert: bool, width: int) -> Iterator[RenderableType]:
    """Return the help screen of a section or a key. expert: whether to show a section's rare keys."""
    everything = groups()
    for group in everything:
        if name == group.name:
            part, other = group.part(expert), group.part(not expert)
            more = "" if expert or not other.keys else f"sluice --help {EXPERT} {name}"
            return _screen(part, values, width, f"{len(other.keys)} more, rarely used: {more}" if more else "")
    keys = tuple(
        key
        for group in everything
        for key in group.keys
        if key.path == name or key.path.startswith((f"{name}.", f"{name}[]"))
    )
    if not keys:
        meant = {mode.value: "--help modes" for mode in Mode} | dict.fromkeys(options("conf"), "--help recipes")
        meant |= {command: f"{command} --help" for command in COMMANDS}
        close = " or ".join(close_keys(name))
        cure = f"did you mean {close}? " if close else ""
        cure = f"write `sluice {meant[name]}`" if name in meant else f"{cure}`sluice --help keys` lists the sections"
        raise UserError("--help", name, "is neither a section nor a key", cure)
    return _screen(KeyGroup(name, "", keys, ()), values, width)


def _screen(group: KeyGroup, values: DictConfig, width: int, more: str = "") -> Iterator[RenderableType]:
    """Yield the title, the subsections' notes, the keys, and `more`, a hint at another command."""
    if not group.keys and not more:
        return
    yield f"\n[bold]{escape(group.name or 'Keys at the top')}[/]  {escape(group.meaning)}"
    for path, note in group.notes:
        yield Padding(f"[cyan]{escape(path)}[/]  [dim]{escape(note)}[/]", (0, 0, 0, 2))
    yield from _table(group, values) if width >= TABLE_WIDTH else _list(group, values)
    if more:
        yield f"  [dim]{escape(more)}[/]"


def _table(group: KeyGroup, values: DictConfig) -> Iterator[RenderableType]:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("  key", style="cyan", no_wrap=True)
    table.add_column("value", style="green", overflow="fold", max_width=28)
    table.add_column("meaning (accepted values)", overflow="fold")
    for key in group.keys:
        value, meaning = value_words(key.path, values), f"{escape(key.meaning)} [dim]{escape(takes(key))}[/]"
        table.add_row(f"  {escape(key.path)}", escape(value), meaning)
    yield table


def _list(group: KeyGroup, values: DictConfig) -> Iterator[RenderableType]:
    for key in group.keys:
        value = escape(value_words(key.path, values))
        yield Padding(f"[cyan]{escape(key.path)}[/] = [green]{value}[/]", (0, 0, 0, 2))
        yield Padding(f"{escape(key.meaning)} [dim]{escape(takes(key))}[/]", (0, 0, 0, 6))


def takes(key: Key) -> str:
    """Return the choices of a key as text, or its type."""
    words = " | ".join(key.choices) if key.choices else key.type
    words = f"list of {words}" if key.choices and key.type.startswith("list") else words
    return f"({words}{' or null' if key.nullable else ''})"
