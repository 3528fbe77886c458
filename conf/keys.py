"""Lists every key of the schema with its type, choices and meaning, from the text of conf/schema.py.

`sluice --help`, train/docs/keys.md and conf/recipe.schema.json use this list.
"""

import ast
import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from conf import schema
from conf.schema import Config

WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "word or list of whole numbers"}
"""Names of the schema's types for the user."""
ITEM, NAME = "[]", "NAME"
"""Placeholders in a key's path: ITEM in a list, NAME in a mapping."""


@dataclass(frozen=True)
class Key:
    """One setting. path: as a user types it, with [] for an index."""

    path: str
    type: str
    """Type of the key as text."""
    choices: tuple[str, ...]
    """All accepted words; empty if there is no such list."""
    nullable: bool
    meaning: str
    """Meaning of the key in one line, with the unit."""
    expert: bool = False
    """Whether the key is an expert key, which is rarely used."""


@dataclass(frozen=True)
class KeyGroup:
    """A section or subsection. name: its path; empty for top-level keys."""

    name: str
    meaning: str
    keys: tuple[Key, ...]
    notes: tuple[tuple[str, str], ...] = ()
    """Path of each subsection, with a note about all its keys."""

    def part(self, expert: bool) -> "KeyGroup":
        """Return the group with only its expert keys (rarely used keys), or with only its other keys."""
        keys = tuple(key for key in self.keys if key.expert is expert)
        notes = tuple((path, note) for path, note in self.notes if any(key.path.startswith(path) for key in keys))
        return replace(self, keys=keys, notes=notes)


@dataclass(frozen=True)
class SchemaField:
    """Properties of one schema field. Every generated text uses them."""

    name: str
    kind: Any
    """Type of the field without `| None`."""
    nullable: bool
    section: type | None
    """Section class in the field's type; None if there is none."""
    mark: str
    """Placeholder in the paths of a list or mapping of sections; else empty."""
    meaning: str
    expert: bool
    default: Any

    @property
    def is_key(self) -> bool:
        """Whether the field is a key, not a section."""
        return self.section is None or bool(self.mark)


@cache
def fields_of(cls: type) -> dict[str, SchemaField]:
    """Return every field of a section by name, in schema order."""
    hints, meanings, found = typing.get_type_hints(cls), attribute_meanings(cls), {}
    usual = cls()
    for item in dataclasses.fields(cls):
        kind, nullable = plain(hints[item.name])
        section, mark = inner_section(kind)
        meaning, expert = meanings.get(item.name, ""), item.metadata.get("expert", False)
        found[item.name] = SchemaField(
            item.name, kind, nullable, section, mark, meaning, expert, getattr(usual, item.name)
        )
    return found


@cache
def groups() -> tuple[KeyGroup, ...]:
    """Return all sections in schema order, the top-level keys first."""
    top = tuple(key for key in _keys(Config, "") if "." not in key.path)  # keys with a dot belong to sections
    found = [KeyGroup("", "The run as a whole.", top)]
    for name, item in fields_of(Config).items():
        if (cls := item.section) is not None and not item.is_key:
            notes = tuple(_notes(cls, f"{name}.", set()))
            found.append(KeyGroup(name, docstring(cls), tuple(_keys(cls, f"{name}.")), notes))
    return tuple(found)


def _keys(cls: type, prefix: str, expert: bool = False) -> Iterator[Key]:
    """Yield the keys of a section and its subsections. expert: whether all these keys are rarely used."""
    for item in fields_of(cls).values():
        path, rare = prefix + item.name, expert or item.expert
        if item.is_key:
            yield Key(path, type_words(item.kind), choices_of(item.kind), item.nullable, item.meaning, rare)
        if item.section is not None:
            yield from _keys(item.section, f"{path}{item.mark}.", rare)


def _notes(cls: type, prefix: str, described: set[type]) -> Iterator[tuple[str, str]]:
    """Yield path and note of each subsection. The note is the field's docstring and, where a class first occurs, the
    class docstring."""
    for item in fields_of(cls).values():
        if (inner := item.section) is None:
            continue
        path, said = f"{prefix}{item.name}{item.mark}", "" if item.mark else item.meaning
        if inner not in described:
            described.add(inner)
            yield path, " ".join(filter(None, (said, docstring(inner))))
            yield from _notes(inner, f"{path}.", described)
        elif said:
            yield path, said


def inner_section(found: Any) -> tuple[type | None, str]:
    """Return the section class in a type, or None, and its placeholder in a path: [] for a list, .NAME for a mapping,
    else nothing."""
    inner = next(iter(typing.get_args(found)[-1:]), found)
    if not dataclasses.is_dataclass(inner):
        return None, ""
    return inner, "" if inner is found else ITEM if typing.get_origin(found) is list else f".{NAME}"


def plain(found: Any) -> tuple[Any, bool]:
    """Return the type without `| None`, and whether it accepted None."""
    if isinstance(found, types.UnionType):
        (inner,) = (each for each in typing.get_args(found) if each is not type(None))
        return inner, True
    return found, False


def type_words(found: Any) -> str:
    """Return a type as text for the user."""
    arguments = typing.get_args(found)
    if typing.get_origin(found) is list:
        inner = arguments[0]
        return "list of entries" if dataclasses.is_dataclass(inner) else f"list of {type_words(inner)}"
    if typing.get_origin(found) is dict:
        if arguments[-1] is Any:
            return "_target_ with its keys"
        return "entries by name" if dataclasses.is_dataclass(arguments[-1]) else "values by name"
    return "word" if issubclass(found, enum.Enum) else WORDS[found]


def choices_of(found: Any) -> tuple[str, ...]:
    """Return the member names of an enumeration, or of a list's enumeration; empty for any other type."""
    inner = typing.get_args(found)[0] if typing.get_origin(found) is list else found
    return tuple(inner.__members__) if isinstance(inner, type) and issubclass(inner, enum.Enum) else ()


def dotted_keys() -> list[str]:
    """Return every dotted key of the schema."""

    def walk(section: type, prefix: str) -> Iterator[str]:
        for name, item in fields_of(section).items():
            yield prefix + name
            if item.section is not None and not item.is_key:
                yield from walk(item.section, f"{prefix}{name}.")

    return list(walk(Config, ""))


def kinds(section: type) -> dict[str, Any]:
    """Return the type of every field, without `| None`."""
    return {name: item.kind for name, item in fields_of(section).items()}


def type_of(key: str) -> Any:
    """Return the type of a key, or None. Mappings accept any name."""
    kind: Any = Config
    for name in key.split("."):
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif dataclasses.is_dataclass(kind) and name in (known := kinds(kind)):
            kind = known[name]
        else:
            return None
    return kind


def is_nullable(key: str) -> bool:
    """Whether a key of the schema accepts null."""
    section, _, name = key.rpartition(".")
    kind: Any = type_of(section) if section else Config
    return dataclasses.is_dataclass(kind) and fields_of(kind)[name].nullable


def docstring(cls: type) -> str:
    """Return the docstring of a section in one line."""
    return " ".join((inspect.getdoc(cls) or "").split())


@cache
def attribute_meanings(cls: type) -> dict[str, str]:
    """Return the docstrings under a class's fields or members, each as one line."""
    (node,) = (each for each in _tree().body if isinstance(each, ast.ClassDef) and each.name == cls.__name__)
    found = {}
    for before, after in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
            continue
        if isinstance(before, (ast.AnnAssign, ast.Assign)):
            target = before.target if isinstance(before, ast.AnnAssign) else before.targets[0]
            assert isinstance(target, ast.Name)
            found[target.id] = " ".join(str(after.value.value).split())
    return found


@cache
def _tree() -> ast.Module:
    return ast.parse(inspect.getsource(schema))


def value_words(path: str, values: DictConfig) -> str:
    """Return a key's value in a configuration as YAML. For a path with a placeholder, or a key in an absent section,
    return the key's default."""
    place: Any = values
    for part in path.split("."):
        place = None if ITEM in part or part == NAME else place._get_node(part) if place is not None else None
        if place is None or place._is_none():
            return _default_words(path) if place is None or part != path.split(".")[-1] else "null"
    found = OmegaConf.to_container(place, enum_to_str=True) if OmegaConf.is_config(place) else place._value()
    return yaml_words(found)


def _default_words(path: str) -> str:
    """Return the default that the schema gives a key, as text. The path may contain placeholders."""
    cls: Any = Config
    *sections, last = path.replace(ITEM, "").split(".")
    for name in sections:
        cls = cls if name == NAME else fields_of(cls)[name].section
    return yaml_words(fields_of(cls)[last].default)


def yaml_words(value: Any) -> str:
    """Return a value as a user types it."""
    if isinstance(value, enum.Enum):
        return value.name
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
