"""The list that `python -m bench --help` prints, read from the docstrings of the modules so that both always agree."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent


class BenchCommand(NamedTuple):
    """A measurement that `python -m bench.NAME` runs."""

    name: str
    line: str
    """The first line of its docstring."""
    takes: str
    """How long it takes, as its docstring says in the words "Takes about ... ."."""


def commands() -> list[BenchCommand]:
    """Every module whose docstring says how long it takes, by name. The other modules are parts of these commands."""
    files = [*FOLDER.glob("*.py"), FOLDER / "gpu" / "__main__.py"]
    found = []
    for file in files:
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        takes = re.search(r"Takes (about [^.]+)\.", text)
        if takes and file != FOLDER / "__main__.py":
            name = file.parent.name if file.stem == "__main__" else file.stem
            found.append(BenchCommand(name, text.splitlines()[0], " ".join(takes[1].split())))
    return sorted(found)


def listed() -> str:
    """The commands as text, one line each: name, how long it takes, what it measures."""
    rows = [(row.name, row.takes.removeprefix("about "), row.line.rstrip(".")) for row in commands()]
    names, times = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"    {name:{names}}  {takes:{times}}  {line}" for name, takes, line in rows]
    return "\n".join(["One question each, by python -m bench.NAME, and about how long it takes on two cores:", *lines])
