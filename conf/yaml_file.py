"""Reads a YAML file, or gives the reason in one sentence.

The file may have another author. It may contain references such as ${model.layers}. Resolvers such as ${oc.env:HOME}
can read data of this machine, so they need trust.
"""

import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import OmegaConfGrammarParser, parse

from conf.disk import cure_of_reading
from conf.errors import UserError
from conf.removed_keys import drop_removed_keys

UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError)
"""Exceptions for wrong content. ValueError: invalid UTF-8 or an impossible date."""


def read_yaml(path: Path, trust: bool = False) -> DictConfig:
    """Return the settings in a file, also of an earlier version (conf/removed_keys.py).

    Raises UserError for an unreadable file, or for a resolver if `trust` is false.
    """
    try:
        found = OmegaConf.load(path)
        plain = OmegaConf.to_container(found)
        calls = [] if trust else list(_calls(plain))
    except UNREADABLE as error:
        raise yaml_error(error, path) from error
    if not (isinstance(found, DictConfig) and isinstance(plain, dict)):
        raise UserError(path.name, path, "must be a mapping of settings (key: value)", CURE)
    for key, text in calls:
        rule = f"in {path} calls a function that can read from this machine, and the file may have another author"
        raise UserError(
            key, text, rule, "write the value there, or set trust=true, if you trust the author of the file"
        )
    return OmegaConf.create(plain) if drop_removed_keys(plain, str(path)) else found


def _calls(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield key and text of each resolver in nested values."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _calls(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _calls(inner, f"{key}[{index}]")
    elif isinstance(value, str) and "${" in value and _holds_resolver(parse(value)):
        yield key, value


def _holds_resolver(tree: Any) -> bool:
    """Whether a parsed text contains a resolver."""
    if isinstance(tree, OmegaConfGrammarParser.InterpolationResolverContext):
        return True
    return any(map(_holds_resolver, getattr(tree, "children", None) or ()))


def escaped(value: Any) -> Any:
    """Return resolved values with every ${ escaped, so that OmegaConf reads it as plain text."""
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    if isinstance(value, str) and not isinstance(value, Enum):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value


def yaml_error(error: Exception, path: Path | None = None) -> UserError:
    """Return a UserError for an exception of UNREADABLE. path: the file, if the error does not name it."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = mark.name if mark else getattr(error, "name", None) or getattr(error, "filename", None) or path
    line = f", line {mark.line + 1}" if mark else ""
    if isinstance(error, RecursionError):
        problem = "it has too many nested levels"
    else:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
    if place is None:
        return UserError("command line", " ".join(sys.argv[1:]), f"a file or a value cannot be read: {problem}", CURE)
    cure = cure_of_reading(error) if isinstance(error, OSError) else CURE
    return UserError(Path(place).name, f"{place}{line}", f"cannot be read: {problem}", cure)


CURE = "correct it; settings must be plain YAML in UTF-8: numbers, words, lists and mappings, without tags (!name)"
