"""`sluice --help`: the possible words of a command line, read from the schema and the folders of conf/.

sluice --help                      modes, recipes, groups, the keys at the top
sluice --help parallel             the keys of a section; optim.lr is one key
sluice --help expert [parallel]    expert keys, of all sections or of the named sections
sluice --help optim conf=NAME      with the values of that recipe
"""

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conf.errors import EXIT_OK, UserError
from conf.keys import Key, KeyGroup, attribute_meanings, groups, value_words
from conf.load import compose_node, explained, reported
from conf.schema import ROOT, Mode

EXPERT = "expert"
"""The word that asks for expert keys, which hardly anyone sets."""
EXAMPLES = (
    ("sluice", "train the recipe tiny, a small DeepSeek-V3, here and now"),
    ("sluice conf=tiny data.path=FOLDER name=mine", "on text of your own"),
    ("sluice steps=2000 optim.lr=1e-3 name=long", "with other values"),
    ("sluice -m optim.lr=1e-3,2e-3", "every combination of values, one run after another"),
    ("sluice mode=generate name=mine", "generate text from the trained model"),
    ("sluice --cfg job", "show every value and start nothing"),
    ("sluice top NAME", "a run at a glance, while it trains or after its end"),
    ("sluice why NAME", "which rank broke a run or holds it up, and where"),
    ("sluice runs", "the runs that are there; sluice runs clean frees their disk"),
    ("sluice launch --print slurm hardware=h100", "the file that starts a recipe on a cluster"),
    ("sluice doctor", "what this machine has and lacks; --version for versions"),
)


@reported
def show_help(words: list[str], console: Console | None = None) -> int:
    """Print the help for a command line that asks for it; returns the exit code."""
    overrides, names = _sorted_out(words)
    console = console or Console(highlight=False)
    with explained(overrides):
        values = compose_node(*overrides)
    if not names:
        _overview(console, values)
    expert = EXPERT in names
    for name in [name for name in names if name != EXPERT] or ([group.name for group in groups()] if expert else []):
        console.print(*_section(name, values, expert), sep="\n")
    return EXIT_OK


def _sorted_out(words: list[str]) -> tuple[list[str], list[str]]:
    """Overrides (a folder of recipes, --config-dir, becomes one of them), and names of sections or keys. Ignores other
    flags."""
    overrides, names, left = [], [], iter(words)
    for word in left:
        flag, _, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            overrides.append(f'hydra.searchpath=["{Path(value or next(left, ".")).absolute()}"]')
        elif not word.startswith("-"):
            (overrides if "=" in word else names).append(word)
    return overrides, names


def recipe_lines() -> dict[str, str]:
    """Every recipe with the first comment line of its file."""
    return {name: option_line(ROOT / "conf" / "conf" / f"{name}.yaml") for name in options("conf")}


def options(group: str) -> list[str]:
    """Names of the files of a Hydra group."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def option_groups() -> list[str]:
    """Folders of conf/ with options, except the folder of recipes."""
    return sorted(path.name for path in (ROOT / "conf").iterdir() if path.name != "conf" and any(path.glob("*.yaml")))


def option_line(path: Path) -> str:
    """The first comment line of an option's file that is not a directive; empty if there is none."""
    comments = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((line for line in comments if not line.startswith(("@package", "yaml-language-server"))), "")


def _overview(console: Console, values: DictConfig) -> None:
    console.print(
        "[bold]sluice[/] \\[conf=RECIPE] \\[GROUP=OPTION] \\[KEY=VALUE ...] \\[-m]   trains a DeepSeek-V3-class model"
    )
    meanings = attribute_meanings(Mode)
    _two_columns(console, "Examples", EXAMPLES)
    _two_columns(console, "Modes (mode=)", [(mode.name, meanings[mode.name]) for mode in Mode])
    _two_columns(console, "Recipes (conf=)", recipe_lines().items())
    _two_columns(console, "Groups (GROUP=OPTION)", [(group, ", ".join(options(group))) for group in option_groups()])
    top, *sections = groups()
    _two_columns(
        console,
        "Sections of keys (sluice --help SECTION shows them; sluice --help expert those that hardly anyone sets)",
        [(section.name, f"{len(section.part(False).keys)} keys. {section.meaning}") for section in sections],
    )
    console.print(*_screen(top.part(False), values), sep="\n")


def _two_columns(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, text in rows:
        table.add_row(f"  {escape(name)}", escape(text))
    console.print(f"\n[bold]{escape(title)}[/]")
    console.print(table)


def _section(name: str, values: DictConfig, expert: bool) -> Iterator[object]:
    """The help screen of a section, a part of a section, or a key. expert: show the expert keys of a section."""
    everything = groups()
    for group in everything:
        if name == group.name:
            part, other = group.part(expert), group.part(not expert)
            more = "" if expert or not other.keys else f"sluice --help {EXPERT} {name}"
            return _screen(part, values, f"{len(other.keys)} more, which hardly anyone sets: {more}" if more else "")
    keys = tuple(
        key
        for group in everything
        for key in group.keys
        if key.path == name or key.path.startswith((f"{name}.", f"{name}[]"))
    )
    if not keys:
        known = [group.name for group in everything if group.name] + [
            key.path for group in everything for key in group.keys
        ]
        close = difflib.get_close_matches(name, known, n=3)
        cure = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError("--help", name, "is neither a section nor a key", f"{cure}`sluice --help` lists the sections")
    return _screen(KeyGroup(name, "", keys, ()), values)


def _screen(group: KeyGroup, values: DictConfig, more: str = "") -> Iterator[object]:
    """A title, the notes of the subsections, a table of keys, and how to see more; nothing for a group without keys."""
    if not group.keys and not more:
        return
    yield f"\n[bold]{escape(group.name or 'Keys at the top')}[/]  {escape(group.meaning)}"
    for path, note in group.notes:
        yield f"  [cyan]{escape(path)}[/]  [dim]{escape(note)}[/]"
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("  key", style="cyan", no_wrap=True)
    table.add_column("value", style="green", overflow="fold", max_width=28)
    table.add_column("meaning, and what it takes", overflow="fold")
    for key in group.keys:
        table.add_row(
            f"  {escape(key.path)}",
            escape(value_words(key.path, values)),
            f"{escape(key.meaning)} [dim]{escape(takes(key))}[/]",
        )
    yield table
    if more:
        yield f"  [dim]{escape(more)}[/]"


def takes(key: Key) -> str:
    """The accepted values of a key as text: its choices, else its type."""
    words = " | ".join(key.choices) if key.choices else key.type
    words = f"list of {words}" if key.choices and key.type.startswith("list") else words
    return f"({words}{' or null' if key.nullable else ''})"
