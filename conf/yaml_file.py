"""Reads a YAML file, and says in one sentence what is wrong with one that cannot be read."""

import sys
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.disk import cure_of_reading
from conf.errors import UserError

UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError)
"""What reading a file of settings raises when the file is at fault; ValueError: not UTF-8, or a date that does not exist."""


def read_yaml(path: Path) -> DictConfig:
    """The settings in a file, such as config.yaml of a run. Raises UserError if they cannot be read."""
    try:
        found = OmegaConf.load(path)
    except UNREADABLE as error:
        raise unreadable(error, path) from error
    if not isinstance(found, DictConfig):
        raise UserError(path.name, path, "must be a mapping of settings (key: value)", CURE)
    return found


def unreadable(error: Exception, path: Path | None = None) -> UserError:
    """An error of UNREADABLE for the user. path: the file, where it is known; errors of YAML know theirs."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = mark.name if mark else getattr(error, "name", None) or getattr(error, "filename", None) or path
    line = f", line {mark.line + 1}" if mark else ""
    if isinstance(error, RecursionError):
        problem = "it is nested too deep"
    else:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
    if place is None:
        return UserError("command line", " ".join(sys.argv[1:]), f"a file or a value cannot be read: {problem}", CURE)
    cure = cure_of_reading(error) if isinstance(error, OSError) else CURE
    return UserError(Path(place).name, f"{place}{line}", f"cannot be read: {problem}", cure)


CURE = "correct it; settings are plain YAML in UTF-8: numbers, words, lists and mappings without tags (!name)"
