"""Generates train/docs/keys.md, and conf/recipe.schema.json for editors, from the schema.

python -m conf.keys_files
"""

import dataclasses
import json
import sys
import typing
from typing import Any

from omegaconf import OmegaConf

from conf.errors import EXIT_OK
from conf.help import takes
from conf.keys import KeyGroup, SchemaField, choices_of, docstring, fields_of, groups, inner_section, value_words
from conf.load import compose_node
from conf.schema import ROOT, Config
from conf.words import say

KEYS_PAGE = ROOT / "train" / "docs" / "keys.md"
EDITORS = ROOT / "conf" / "recipe.schema.json"
PAGE_HEAD = """# Every key

All settings of a run, with the value of `sluice` without arguments, the accepted values, and the meaning. Rarely used keys are in the
[second part](#expert). The same in a terminal, with the values for any arguments:

    sluice --help keys
    sluice --help parallel
    sluice --help optim optim=deepseek_v3_16b
    sluice --help expert
    sluice --help expert cluster

`KEY[]` is an entry of a list, `NAME` any name. `python -m conf.keys_files` writes this page from [conf/schema.py](../../conf/schema.py).
"""
EXPERT_HEAD = """
## Expert

Rarely used keys: details of number formats, margins, time limits, and descriptions of devices.
"""
JSON_TYPES = {
    int: ["integer"],
    float: ["number"],
    bool: ["boolean"],
    str: ["string", "number"],
    Any: ["string", "array"],
}
"""JSON types that a recipe may use for a Python type. OmegaConf converts numbers to text."""
INTERPOLATION = {"type": "string", "pattern": r"\$\{"}
"""JSON schema of a reference such as ${optim.lr}."""


def keys_page() -> str:
    """Return the text of train/docs/keys.md."""
    values = compose_node()
    common, rare = (
        "".join(_section(group.part(expert), values, expert) for group in groups()) for expert in (False, True)
    )
    return f"{PAGE_HEAD}{common}{EXPERT_HEAD}{rare}"


def _section(group: KeyGroup, values: Any, expert: bool) -> str:
    """Return the section of keys.md for one group with keys, else an empty text. expert: whether the keys are rarely
    used."""
    if not group.keys:
        return ""
    name = group.name or "At the top"
    lines = [f"\n### {name}, expert\n"] if expert else [f"\n## {name}\n", f"{_cell(group.meaning)}\n"]
    lines += [f"`{path}`: {_cell(note)}\n" for path, note in group.notes if note]
    lines += ["| key | value | takes | meaning |", "|---|---|---|---|"]
    for key in group.keys:
        words = takes(key).strip("()").replace(" | ", ", ")
        lines.append(
            f"| `{key.path}` | `{_cell(value_words(key.path, values))}` | {_cell(words)} | {_cell(key.meaning)} |"
        )
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def recipe_schema() -> str:
    """Return the JSON schema of a recipe, with one line per key."""
    sections = {Config.__name__: Config}
    _collect(Config, sections)
    bodies = ",\n".join(f' "{name}": {_object(cls)}' for name, cls in sections.items())
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return f'{{"$schema": "{dialect}", "title": "A recipe of Sluice", "$ref": "#/$defs/Config", "$defs": {{\n{bodies}\n}}}}\n'


def _collect(cls: type, sections: dict[str, type]) -> None:
    """Add all sections below `cls` to `sections`, by class name."""
    for item in fields_of(cls).values():
        if item.section is not None and item.section.__name__ not in sections:
            sections[item.section.__name__] = item.section
            _collect(item.section, sections)


def _object(cls: type) -> str:
    """Return the JSON schema of one section, as text."""
    properties = {name: _property(item) for name, item in fields_of(cls).items()}
    if cls is Config:
        properties["defaults"] = {"type": "array", "description": "What the recipe starts from (Hydra)."}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(body)}" for name, body in properties.items())
    head = json.dumps({"type": "object", "description": docstring(cls), "additionalProperties": False})
    return f'{head[:-1]}, "properties": {{\n{lines}}}}}'


def _property(item: SchemaField) -> dict[str, Any]:
    default = None if dataclasses.is_dataclass(item.default) else _json_value(item.default)
    return {
        **({"description": item.meaning} if item.meaning else {}),
        **({"default": default} if default is not None else {}),
        "anyOf": [_value(item.kind), INTERPOLATION, *([{"type": "null"}] if item.nullable else [])],
    }


def _value(found: Any) -> dict[str, Any]:
    inner, _ = inner_section(found)
    section = {"$ref": f"#/$defs/{inner.__name__}"} if inner is not None else {}
    if typing.get_origin(found) is dict:
        return {"type": "object", "additionalProperties": section}
    if typing.get_origin(found) is list:
        return {"type": "array", "items": _value(typing.get_args(found)[0])}
    words = choices_of(found)
    return section or ({"enum": words} if words else {"type": JSON_TYPES[found]})


def _json_value(default: Any) -> Any:
    """Return a default as a JSON value; the value for an enumeration is the member's name."""
    plain = OmegaConf.to_container(OmegaConf.structured({"_": default}), enum_to_str=True)
    assert isinstance(plain, dict)
    return plain["_"]


def main() -> int:
    KEYS_PAGE.write_text(keys_page())
    EDITORS.write_text(recipe_schema())
    say(f"{KEYS_PAGE}\n{EDITORS}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
