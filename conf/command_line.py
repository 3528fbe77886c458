"""Every word of a command line against the schema: what a mistyped one breaks, and the line that was meant.

Hydra and OmegaConf say what they could not do with a word. Here each word is held against the schema and the options of the
groups instead, so that a wrong type, choice, key or way of writing has a cure of its own. Bounds and rules that join
several fields are not seen here: conf/check.py holds those, once the configuration is typed. Similar words come from difflib over the
schema's own keys: its 250 take 3 ms on a busy core, and rapidfuzz would be one more package.
"""

import difflib
import math
import re
import shlex
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from conf.errors import UserError
from conf.fields import wrong_choice
from conf.keys import attribute_meanings, dotted_keys, kinds, type_of
from conf.optimizers import OPTIMIZERS
from conf.removed_keys import REMOVED_KEYS
from conf.schema import ROOT, Config, Mode
from conf.synonyms import KEYS, OWN_KEYS, VALUES

FLAGS = {
    name: takes_value
    for names, takes_value in (
        ("--help -h --hydra-help --version --resolve --run -r --multirun -m --shell-completion -sc", False),
        (
            "--cfg -c --package -p --config-path -cp --config-name -cn --config-dir -cd --experimental-rerun --info -i",
            True,
        ),
    )
    for name in names.split()
}
"""Hydra's, and whether a value follows as a word of its own."""
COMPLETION = {"--shell-completion", "-sc", "--hydra-help"}
"""Flags with which the other words are not settings."""
LISTS = "`sluice --help`, or `python -m train --help`, lists recipes, groups and keys"
OF_YOUR_OWN = "for one of your own write MINE/{group}/NAME.yaml, and add --config-dir MINE"


def check_words(words: Sequence[str]) -> None:
    """Raise UserError for the first word of a command line that cannot be taken."""
    if COMPLETION & {*words}:
        return
    _check_flags(words)
    if wrong := _first_error(words, _settings(words)):
        raise wrong


def _first_error(words: Sequence[str], settings: Sequence[str]) -> UserError | None:
    """The first error among the words that are settings."""
    sweeps = any(word in ("-m", "--multirun") for word in words)
    groups = _groups(_own(words))
    found = (
        _error_of(word, settings[:place], settings[place + 1 :], sweeps, groups) for place, word in enumerate(settings)
    )
    return next((wrong for wrong in found if wrong), None)


def _check_flags(words: Sequence[str]) -> None:
    """Raise UserError for a word that looks like a flag and is none, and for a flag that does not fit."""
    rest = iter(enumerate(words))
    for place, word in rest:
        name, equals, value = word.partition("=")
        if not name.startswith("-"):
            continue
        following = words[place + 1] if place + 1 < len(words) else ""
        value = value if equals else following
        if name in ("--config-name", "-cn", "--config-path", "-cp"):
            raise _names_a_file(name, value)
        if name in ("--config-dir", "-cd") and not Path(value).is_dir():
            raise UserError(
                name, value, "must be an existing folder with recipes of your own", OF_YOUR_OWN.format(group="conf")
            )
        if name not in FLAGS:
            raise _unknown_flag(name, "" if not equals and "=" in following else value)
        if FLAGS[name] and not equals:
            next(rest, None)


def _own(words: Sequence[str]) -> list[Path]:
    """Folders of the user's recipes."""
    flags = [value for name, value in zip(words, [*words[1:], ""], strict=False) if name in ("--config-dir", "-cd")]
    given = [match[1] for word in words if (match := re.fullmatch(r'hydra\.searchpath=\["(.*)"\]', word))]
    return [Path(value) for value in (*flags, *given)]


def _settings(words: Sequence[str]) -> list[str]:
    """Words that are neither flags nor their values."""
    return [
        word
        for place, word in enumerate(words)
        if not word.startswith("-") and not (place and FLAGS.get(words[place - 1], False))
    ]


def _groups(own: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Options by group."""
    files = sorted(file for folder in (ROOT / "conf", *own) for file in folder.glob("*/*.yaml"))
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(file.parent.name, []).append(file.stem)
    return groups


def _error_of(
    word: str, before: Sequence[str], after: Sequence[str], sweeps: bool, groups: dict[str, list[str]]
) -> UserError | None:
    """What is wrong with one word; None if nothing is that can be seen in it alone."""
    bare = word.lstrip("+~")
    key, equals, text = bare.partition("=")
    following = after[0] if after else ""
    if word.startswith("~") and not key.startswith("hydra"):
        name = key.partition("@")[0]
        cure = f"write {name}=VALUE, or leave the word out" if name in groups or type_of(name) else "leave the word out"
        return UserError(word, "", "deletes a key, and every key has a value here", cure)
    if not equals or not key:
        return None if word.startswith("~") else _no_assignment(word, before, after, groups)
    if key == "name" and text.startswith("["):
        return None  # several runs, as text once it is composed
    if following and not text and "=" not in following:
        return UserError(key, "", "there must be no space around =", f"write {key}={following}")
    try:
        parsed = OverridesParser.create().parse_override(word)
    except HydraException:
        return _unreadable(key, text, after)
    key = parsed.key_or_group.partition("@")[0]
    if key.startswith("hydra"):
        return None
    if key not in groups and type_of(key) is None:
        return _unknown_key(key, text, groups)
    if parsed.is_sweep_override() and not sweeps:
        if typing.get_origin(kind := type_of(key)) is list or kind is Any:
            return UserError(key, text, "a list stands in brackets", f"write '{key}=[{text}]'")
        rule = "is several values, and one run has one"
        return UserError(key, text, rule, f"add -m, which runs one after another: -m {key}={text}")
    if parsed.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return None
    values = parsed.sweep_iterator() if parsed.is_sweep_override() else [parsed.value()]
    for value in values:
        wrong = _wrong_option(key, value, groups) if key in groups else _wrong_value(key, value)
        if wrong and not parsed.is_sweep_override():
            return UserError(wrong.field, text, wrong.rule, wrong.cure)
        if wrong:
            return wrong
    if parsed.is_add() and not word.startswith("++") and key not in groups:
        return UserError(key, text, "is a key already: + is for keys that there are not", f"write {bare}")
    return None


def _wrong_value(key: str, value: Any) -> UserError | None:
    """The error where the schema's type does not take the value of this key; None if it does."""
    if (problem := _refused(key, value)) is None:
        return None
    kind = type_of(key)
    default = _default(key)
    example = f"for example {_written(key, default)}" if default not in (None, [], "", 0) else f"{LISTS}"
    if value == "" and kind is not str:
        return UserError(key, "", "is empty, as a shell leaves it where a variable is not set", example)
    if str(value).lower() in ("none", "null", "~") and _refused(key, None) is None:
        return UserError(key, value, "is a word here, not nothing", f"write {key}=null")
    if isinstance(problem, (ConfigKeyError, ConfigAttributeError)):
        return _unknown_part(key, value, kind)
    shown = _plain(value)
    if typing.get_origin(kind) is list:
        return _wrong_list(key, value, kind, default)
    if is_dataclass(kind):
        inside = ", ".join(f"{key}.{field.name}" for field in fields(kind))
        return UserError(key, shown, "is a section, not a value", f"set one of its keys: {inside}")
    if (meant := VALUES.get((key, str(shown).lower()))) is not None:
        return UserError(key, shown, f"is no value of it; {meant[0]} {meant[1]}", f"write {key}={meant[0]}")
    if isinstance(kind, type) and issubclass(kind, Enum):
        choices = [choice.value for choice in kind]
        section, _, name = key.rpartition(".")
        usual = f"use {default.value}, the default, or another. " if default else ""
        return wrong_choice(
            key, shown, choices, usual + attribute_meanings(type_of(section) if section else Config).get(name, "")
        )
    if kind is bool:
        return UserError(key, shown, "must be true or false", f"write {key}=true or {key}=false")
    if kind in (int, float):
        written = example if default else f"write {key}=NUMBER" + (f" or {key}=null" if default is None else "")
        return UserError(key, shown, f"must be {_singular(kind)}", _number_meant(key, value, kind) or written)
    if kind is str:
        return UserError(key, shown, "must be text, one value", f"quote it: '{key}=\"{shown}\"'")
    return UserError(key, shown, " ".join(str(problem).splitlines()[:1]), example)


def _number_meant(key: str, value: Any, kind: type) -> str | None:
    """The number that was meant by a fraction, a percentage or a number with a unit."""
    if kind is int and isinstance(value, float) and math.isfinite(value):
        if value.is_integer():
            return f"write it out: {key}={int(value)}"
        return f"round it: {key}={max(1, round(value))}"
    if found := re.fullmatch(r"([\d.]+)\s*%", str(value)):
        return f"write a fraction: {key}={float(found[1]) / 100:g}"
    if re.fullmatch(r"[\d.]+(?:e[+-]?\d+)?\s*[A-Za-z]+", str(value)):
        return "write the number alone, in the unit that the key has"
    return None


def _wrong_list(key: str, value: Any, kind: Any, default: Any) -> UserError:
    item = typing.get_args(kind)[0]
    rule = f"must be a list of {_plural(item)}"
    if not isinstance(value, list) and not default and _refused(key, [value]) is None:
        return UserError(key, _plain(value), rule, f"write '{key}=[{_plain(value)}]'")
    if is_dataclass(item):
        inside = ", ".join(f"{field.name}: ..." for field in fields(item))
        return UserError(key, _plain(value), rule, f"write '{key}=[{{{inside}}}]', leaving out what stays as it is")
    return UserError(key, _plain(value), rule, f"for example {_written(key, default)}")


def _unknown_part(key: str, value: Any, kind: Any) -> UserError:
    """A mapping, or a list of them, with a key that its section does not have."""
    section = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
    known = [field.name for field in fields(section)] if is_dataclass(section) else []
    given = [name for part in (value if isinstance(value, list) else [value]) for name in part]
    wrong = next((name for name in given if name not in known), key)
    close = difflib.get_close_matches(str(wrong), known, n=1)
    cure = f"did you mean {close[0]}?" if close else "leave it out"
    return UserError(f"{key}: {wrong}", _plain(value), f"the keys here are {', '.join(known)}", cure)


def _wrong_option(group: str, value: Any, groups: dict[str, list[str]]) -> UserError | None:
    if isinstance(value, list) and value and group != "conf" and all(each in groups[group] for each in value):
        return None
    if value in groups[group]:
        return None
    name = str(value).removesuffix(".yaml").removesuffix(".yml")
    if name in groups[group]:
        return UserError(group, value, "is the name of a file; its ending is not needed", f"write {group}={name}")
    if (meant := VALUES.get((group, str(value).lower()))) is not None:
        return UserError(group, value, f"is none of them; {meant[0]} {meant[1]}", f"write {group}={meant[0]}")
    if value == "":
        rule = (
            f"is empty, as a shell leaves it where a variable is not set; it must be one of {', '.join(groups[group])}"
        )
        return UserError(group, "", rule, "take one of them, or leave it out")
    if Path(name).name in groups[group]:
        rule = "is the name of a file, without its folders and its ending"
        return UserError(group, value, rule, f"write {group}={Path(name).name}")
    section = type_of(group)
    first = fields(section)[0] if section else None
    single = (
        f", or set single keys, such as {group}.{first.name}=VALUE"
        if first and not first.metadata.get("choices") and first.name != "name"
        else ""
    )
    choices = [*groups[group], *(OPTIMIZERS if group == "optim" else ())]  # optim=muon is short for optim.name=muon
    return wrong_choice(group, _plain(value), choices, f"take one of them{single}; {OF_YOUR_OWN.format(group=group)}")


def _unknown_key(key: str, text: str, groups: dict[str, list[str]]) -> UserError:
    if removed := REMOVED_KEYS.get(key):
        return removed.error(key, text)
    close = _close_keys(key, [*groups])
    meant = [f"{each}={VALUES.get((each, text.lower()), (text,))[0]}" for each in close]
    cure = f"did you mean {' or '.join(meant)}? " if meant else ""
    return UserError(key, text, "is not a key of the schema", cure + LISTS)


def _close_keys(key: str, more: Sequence[str] = ()) -> list[str]:
    """Keys that may be meant: a synonym's, those that end in this one, else those that look like it."""
    known = [*dict.fromkeys([*dotted_keys(), *more])]
    section, _, last = key.rpartition(".")
    if synonym := KEYS.get(key.lower()) or KEYS.get(last.lower()):
        return [synonym]
    if section in known and not is_dataclass(type_of(section)):
        return [section]
    ends = {each: each.rpartition(".")[2] for each in known}
    if same := [each for each in known if ends[each] in (last, key.replace(".", "_")) and _may_be_in(section, each)]:
        return same[:3]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.75)
    for end in difflib.get_close_matches(last, sorted({*ends.values()}), n=2, cutoff=0.75):
        near += [each for each in known if ends[each] == end and each not in near and _may_be_in(section, each)]
    near = near or [KEYS[each] for each in difflib.get_close_matches(last.lower(), KEYS, n=1, cutoff=0.8)]
    near = near or [each for each in difflib.get_close_matches(key, known, n=3) if _may_be_in(section, each)]
    return near[:3]


def _may_be_in(section: str, key: str) -> bool:
    """Whether who typed this section may have meant that key: the section is one of ours, perhaps the wrong one, or looks like
    the key's own. Two keys with one last part may have nothing else in common.
    """
    first, own = section.partition(".")[0], key.rpartition(".")[0]
    return not section or first in kinds(Config) or bool(difflib.get_close_matches(section, [own, key]))


def _no_assignment(
    word: str, before: Sequence[str], after: Sequence[str], groups: dict[str, list[str]]
) -> UserError | None:
    """A word without `key=`."""
    rule = "every word is KEY=VALUE or a flag"
    following = after[0] if after else ""
    if following.startswith("="):
        value = following[1:] or (after[1] if len(after) > 1 else "")
        return UserError(word, following, "there must be no space around =", f"write {word}={value}")
    if (cut := re.fullmatch(r"([\w.]+):(.*)", word)) and type_of(cut[1]) is not None:
        return UserError(word, "", rule, f"write {cut[1]}={cut[2] or following}")
    if word in [mode.value for mode in Mode]:
        usual = ", or leave it out, as it is the default" if word == Mode.train.value else ""
        return UserError(word, "", rule, f"write mode={word}{usual}")
    if word in groups["conf"]:
        return UserError(word, "", rule, f"write conf={word}")
    if type_of(word) is not None or word in groups:
        is_value = bool(following) and "=" not in following
        value = following if is_value else "VALUE"
        return UserError(f"{word} {following}" if is_value else word, "", rule, f"write {word}={value}")
    if word in ("help", "version"):
        return UserError(word, "", rule, f"write --{word}")
    if before and before[-1].startswith("name="):
        return UserError("name", f"{before[-1][5:]} {word}", "must be one word", f"write {before[-1]}_{word}")
    if before and "=" in before[-1]:
        return UserError(word, "", f"{rule}; a value with spaces is quoted", f'write "{before[-1]} {word}"')
    close = [f"{each}=VALUE" for each in _close_keys(word)]
    return UserError(word, "", rule, f"did you mean {' or '.join(close)}? {LISTS}" if close else LISTS)


def _unreadable(key: str, text: str, after: Sequence[str]) -> UserError:
    """A value that is cut by the shell, or has characters that mean something to Hydra."""
    if text.count("[") + text.count("{") > text.count("]") + text.count("}"):
        whole = " ".join([text, *after])
        end = max(whole.rfind("]"), whole.rfind("}")) + 1
        rule = "a list or a mapping is one word: closed, and quoted where it holds spaces"
        return UserError(
            key, whole, rule, f"write '{key}={whole[:end]}'" if end else f"close it: '{key}={whole}{_closing(whole)}'"
        )
    if text.startswith("="):
        return UserError(key, text, "one = stands between key and value", f"write {key}={text.lstrip('=')}")
    if (wrong := _wrong_value(key, text)) and type_of(key) in (int, float, bool):
        return wrong
    if text.endswith(","):
        return UserError(
            key, text, "a value must follow the comma", f"write {key}={text.rstrip(',')}, or -m and several"
        )
    word = f'{key}="{text}"' if '"' not in text else f"{key}='{text}'"
    rule = "has characters that mean something here: quotes, brackets, =, or commas"
    return UserError(key, text, rule, f"if they belong to the value, quote it twice: {shlex.quote(word)}")


def _closing(text: str) -> str:
    """The brackets that are missing at the end of a text."""
    missing: list[str] = []
    for character in text:
        if character in "[{":
            missing.append("]" if character == "[" else "}")
        elif missing and character == missing[-1]:
            missing.pop()
    return "".join(reversed(missing))


def _names_a_file(flag: str, value: str) -> UserError:
    rule = "says where Hydra finds the schema, and that does not change; a recipe is named by conf="
    name = Path(value).stem
    cure = (
        f"write conf={name}" if name in _groups()["conf"] else "write conf=NAME, with --config-dir FOLDER for your own"
    )
    return UserError(flag, value, rule, cure)


def _unknown_flag(flag: str, value: str) -> UserError:
    rule = "is no flag; settings are written KEY=VALUE, without dashes"
    name = flag.strip("-")
    for each in (name, name.replace("-", "_")):
        if type_of(each) is not None or each in _groups():
            return UserError(flag, value, rule, f"write {each}={value or 'VALUE'}")
    if close := difflib.get_close_matches(flag, FLAGS, n=1, cutoff=0.75):
        return UserError(flag, value, rule, f"did you mean {close[0]}?")
    meant = [f"{each}={value or 'VALUE'}" for each in _close_keys(name.replace("-", "_"), [*_groups()])]
    return UserError(flag, value, rule, f"did you mean {' or '.join(meant)}? {LISTS}" if meant else LISTS)


def refuse_keys_of_other_modes(mode: Mode, overrides: Sequence[str]) -> None:
    """Raise UserError for the first word of a command line that this mode would not read. A recipe may hold keys of every mode."""
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+")
        for own, modes in OWN_KEYS.items():
            if (key == own or key.startswith(f"{own}.")) and mode not in modes:
                rule = f"mode={mode.value} does not read it: {own} belongs to mode={modes[0].value}"
                raise UserError(key, value, rule, f"write mode={modes[0].value}, or leave {key} out")


def explain(error: Exception, words: Sequence[str]) -> UserError:
    """An error of Hydra or OmegaConf as field, value, rule and cure: of a setting, where help was asked for with some, else of
    a recipe, as `check_words` found nothing.
    """
    if wrong := _first_error(words, [word for word in _settings(words) if "=" in word]):
        return wrong
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        # Of OmegaConf an AssertionError is for a key of a section that is null.
        if isinstance(error, AssertionError) and (wrong := _in_null_section(words)):
            return wrong
        raise error
    groups = _groups(_own(words))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if wrong := group in groups and _wrong_option(group, name, groups):
            return wrong
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = {name: value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    key = re.sub(r"\[\d+\].*", "", told.get("full_key", getattr(error, "full_key", None) or ""))
    recipe = found[1] if (found := re.match(r"In '([^']*)'", lines[0] if lines else "")) else ""
    place = f"in {recipe}.yaml: " if recipe else ""
    if key and type_of(key) is None:
        wrong = _unknown_key(key, "VALUE", groups)
        return UserError(key, "VALUE", place + wrong.rule, wrong.cure)
    if key and (found := re.search(r"alue '([^']*)'(?: of type '(\w+)')?", str(error))):
        value = yaml.safe_load(found[1]) if found[2] not in (None, "str") else found[1]
        if wrong := _wrong_value(key, value):
            return UserError(key, value, place + wrong.rule, wrong.cure)
    if recipe and (wrong := _in_recipe(recipe, _own(words))):
        return UserError(wrong.field, wrong.value, place + wrong.rule, wrong.cure)
    rule = " ".join(line for line in lines if not re.match(r"(full_key|object_type|reference_type)\b", line))
    return UserError(key or "recipe", "?", rule, f"correct the recipe; {LISTS}")


def _in_null_section(words: Sequence[str]) -> UserError | None:
    """The first setting of a section that may be null, as what the recipe chose left it."""
    for word in _settings(words):
        key, _, value = word.lstrip("+").partition("=")
        names = key.split(".")
        for section in (".".join(names[:count]) for count in range(1, len(names))):
            if is_dataclass(type_of(section)) and _refused(section, None) is None:
                group, _, inside = section.partition(".")
                files = sorted((ROOT / "conf" / group).glob("*.yaml"))
                having = [
                    f"{group}={file.stem}" for file in files if (yaml.safe_load(file.read_text()) or {}).get(inside)
                ]
                rule = f"is a key of {section}, which is null with what is chosen for {group}"
                return UserError(key, value, rule, f"choose {' or '.join(having)}, or leave it out")
    return None


def _in_recipe(name: str, own: Sequence[Path]) -> UserError | None:
    """The first value in a recipe that its key does not take. name: its group and its own, such as `conf/mine`."""
    path = next((path for folder in own if (path := folder / f"{name}.yaml").is_file()), None)

    def walk(section: dict[str, Any], prefix: str) -> Iterator[UserError]:
        for name, value in section.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and is_dataclass(type_of(key)):
                yield from walk(value, f"{key}.")
            elif type_of(key) is not None and (wrong := _wrong_value(key, value)):
                yield wrong

    given = yaml.safe_load(path.read_text()) if path else None
    return next(walk(given, ""), None) if isinstance(given, dict) else None


def _refused(key: str, value: Any) -> OmegaConfBaseException | None:
    """Why the schema's type does not take this value."""
    section, _, name = key.rpartition(".")
    kind: Any = type_of(section) if section else Config
    if not is_dataclass(kind):
        return None
    try:
        OmegaConf.update(OmegaConf.structured(_section_of_one(kind, name)), name, value)
    except OmegaConfBaseException as error:
        return error
    return None


@cache
def _section_of_one(section: type, name: str) -> type:
    """This section with one of its keys alone, as OmegaConf takes 10 ms to read all of them; the section itself if it has no such key."""
    key = next((each for each in fields(section) if each.name == name), None)
    if key is None:
        return section
    own = field(default=key.default, default_factory=key.default_factory)
    return make_dataclass(section.__name__, [(name, typing.get_type_hints(section)[name], own)])


def _default(key: str) -> Any:
    section, _, name = key.rpartition(".")
    kind: Any = type_of(section) if section else Config
    return getattr(kind(), name) if is_dataclass(kind) else None


def _written(key: str, value: Any) -> str:
    """A setting as one types it."""
    word = f"{key}={_plain(value)}"
    return f"'{word}'" if set(word) & set(" [{") else word


def _plain(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_plain(each) for each in value)}]"
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_plain(each)}" for name, each in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _singular(kind: type) -> str:
    return {int: "a whole number", float: "a number"}[kind]


def _plural(item: Any) -> str:
    if isinstance(item, type) and issubclass(item, Enum):
        return ", ".join(choice.value for choice in item)
    return {int: "whole numbers", float: "numbers", str: "words"}.get(item, "mappings, each with keys of its own")
