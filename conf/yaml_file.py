"""Reads a YAML file, and says in one sentence what is wrong with one that cannot be read.

A run folder may be somebody else's. So its file is data: a reference such as ${model.layers} means another value of the file, while
a resolver such as ${oc.env:HOME} calls a function that can read this machine, and is refused.

Modes that look at an earlier run take its settings, so that nobody has to repeat them.

    python -m train mode=evaluate name=mine data.path=OTHER

What the run was (model, precision, seq_len, tokenizer, ...) comes from its config.yaml; what the command line says goes
over it; how to spread the work now (parallel, cluster) comes from the command line alone, as it is another job. With an
explicit conf=RECIPE, or where there is no run, the composed configuration is taken as it is.

The run may be somebody else's. Only with trust=true may its config.yaml read this machine (conf/yaml_file.py) or name code to be run
(conf/own_code.py).
"""

import re
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import OmegaConfGrammarParser, parse

from conf.disk import cure_of_reading
from conf.errors import UserError
from conf.own_code import READ_FROM_RUNS
from conf.removed_keys import drop_removed_keys
from conf.schema import Config, Mode

UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError)
"""What reading a file of settings raises when the file is at fault; ValueError: not UTF-8, or a date that does not exist."""


def read_yaml(path: Path, trust: bool = False) -> DictConfig:
    """The settings in a file, such as config.yaml of a run, also of an earlier version (conf/removed_keys.py). Raises UserError if
    they cannot be read, or name a resolver without `trust`.
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
        rule = f"in {path} calls a function that can read this machine, and the file may be somebody else's"
        raise UserError(key, text, rule, "write the value there, or set trust=true, if you trust who wrote the file")
    return OmegaConf.create(plain) if drop_removed_keys(plain, str(path)) else found


def _calls(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of nested mappings and lists that holds a resolver, with its key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _calls(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _calls(inner, f"{key}[{index}]")
    elif isinstance(value, str) and "${" in value and _holds_resolver(parse(value)):
        yield key, value


def _holds_resolver(tree: Any) -> bool:
    """Whether one stands anywhere in a parsed text."""
    if isinstance(tree, OmegaConfGrammarParser.InterpolationResolverContext):
        return True
    return any(map(_holds_resolver, getattr(tree, "children", None) or ()))


def escaped(value: Any) -> Any:
    """Plain values whose texts OmegaConf reads as they are: a ${ in them is no reference, as they were resolved already."""
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    if isinstance(value, str) and not isinstance(value, Enum):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value


def yaml_error(error: Exception, path: Path | None = None) -> UserError:
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


LOOKS_AT_A_RUN = (Mode.export, Mode.evaluate, Mode.generate, Mode.score, Mode.dashboard)
SOURCES = ("path", "mix", "format", "text_key", "source")
"""Fields of data that say where documents come from. They change together, as path, mix and source exclude each other."""


def over_run_settings(node: DictConfig, overrides: Sequence[str], groups: Sequence[str]) -> DictConfig:
    """The composed node, over the settings of the run that it looks at if its mode is such a one.

    overrides: the command line, KEY=VALUE each; groups: names of Hydra's groups.
    """
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    if node.mode not in LOOKS_AT_A_RUN or "conf" in keys:
        return node
    file = next((folder / "config.yaml" for folder in _folders(node) if (folder / "config.yaml").is_file()), None)
    if file is None:
        return node
    try:
        settings = OmegaConf.merge(OmegaConf.structured(Config), read_yaml(file, trust=node.trust))
    except OmegaConfBaseException as error:
        rule = f"holds what this version does not know: {str(error).splitlines()[0]}"
        cure = "use the version that trained the run, or correct the file"
        raise UserError(file.name, file, rule, cure) from error
    if (file.parent / "tokenizer.json").is_file():  # the path in the settings may mean nothing here
        settings.data.tokenizer = escaped(str(file.parent))
    if any(key.startswith("data.") and key.split(".")[1] in SOURCES for key in keys):
        keys += [f"data.{name}" for name in SOURCES]
    for key in ["parallel", "cluster", "runs", "trust", *(key for key in keys if key in groups), *keys]:
        OmegaConf.update(settings, key, escaped(OmegaConf.select(node, key)), merge=False)
    tasks = settings.evaluate.task_path
    if node.mode == Mode.evaluate and tasks is not None and not node.trust and "evaluate.task_path" not in keys:
        rule = f"stands in {file}, and definitions of tasks can hold code, which would run"
        cure = "type evaluate.task_path=FOLDER (null for none), or set trust=true, if you trust who wrote the file"
        raise UserError("evaluate.task_path", tasks, rule, cure)
    for key, modes in READ_FROM_RUNS.items():
        typed = {key, f"{key}._target_", key.partition(".")[0]} & {*keys}
        section = OmegaConf.select(settings, key)
        if key == "data.template_function" and node.mode == Mode.generate and not node.generate.chat:
            continue  # texts need none
        if node.mode in modes and section and not node.trust and not typed:
            rule = f"stands in {file}, and would be imported: code that runs as you"
            cure = f"set trust=true, if you trust who wrote the file, or give your own recipe: conf=NAME, or {key}=null for none"
            raise UserError(f"{key}._target_", section.get("_target_"), rule, cure)
    if "micro_batch_size" not in keys and settings.micro_batch_size:
        share, rest = divmod(settings.batch_size, settings.parallel.dp)
        if rest or share % settings.micro_batch_size or "seq_len" in keys:
            settings.micro_batch_size = None  # it was chosen for the layout and the sequences of the training
    assert isinstance(settings, DictConfig)
    return settings


def _folders(node: DictConfig) -> list[Path]:
    """Where the run's folder may be: around the checkpoint that is named, else by the run's name."""
    sections = {mode: node[mode.value] for mode in (Mode.export, Mode.evaluate, Mode.generate, Mode.score)}
    named = sections[node.mode].checkpoint if node.mode in sections else None
    if named is None:
        return [Path(node.runs) / node.name]
    checkpoint = Path(named).absolute()
    return [checkpoint, *checkpoint.parents[:2]]
