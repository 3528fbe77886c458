"""The list of `python -m bench --help` is complete and short, and agrees with the modules."""

import ast
import re

from bench.catalog import FOLDER, commands, listed

SOURCES = {file.stem: file.read_text() for file in FOLDER.glob("*.py") if not file.name.startswith("__")}


def test_a_module_is_a_command_with_a_time_or_a_part_of_one():
    """A command names itself as one runs it; a part is imported or started by another module."""
    names = {command.name for command in commands()}
    for name, source in SOURCES.items():
        text = ast.get_docstring(ast.parse(source))
        others = [other for other in (FOLDER.rglob("*.py")) if other.stem != name]
        used = any(re.search(rf"bench\.{name}\b", other.read_text()) for other in others)
        assert (name in names and f"python -m bench.{name}" in text) or (name not in names and used), name
    assert names - SOURCES.keys() == {"gpu"}


def test_the_list_has_one_line_for_each_command():
    lines, found = listed().splitlines()[1:], commands()
    assert len(lines) == len(found) > 10
    for line, command in zip(lines, found, strict=True):
        name, takes, said = re.split(r"\s{2,}", line.strip())
        assert (name, f"about {takes}") == (command.name, command.takes) and command.line.startswith(said)
        assert len(line) < 190 and re.search(r"seconds|minute|runs", takes)
