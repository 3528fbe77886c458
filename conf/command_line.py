"""Explains an invalid command line: the wrong argument, the rule that it breaks, and one fix.

Flags and deletions of keys are checked before Hydra runs, because Hydra exits at an unknown flag. Other explanations
use Hydra's error and the schema. conf/check.py checks bounds and rules over several fields.
"""

import difflib
import math
import re
import shlex
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from conf.errors import UserError
from conf.fields import wrong_choice
from conf.keys import WORDS, attribute_meanings, choices_of, dotted_keys, is_nullable, kinds, type_of, yaml_words
from conf.optimizers import OPTIMIZERS
from conf.removed_keys import REMOVED_KEYS
from conf.schema import ROOT, Config, Mode
from conf.synonyms import COMMANDS, CURES, KEYS, OWN_KEYS, VALUES
from conf.yaml_file import read_yaml

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
"""Hydra's flags, and whether each takes a value."""
COMPLETION = {"--shell-completion", "-sc", "--hydra-help"}
"""Flags whose command lines contain no settings."""
LISTS = "`sluice --help` tells how to list recipes, groups and keys"
OF_YOUR_OWN = "for a custom one, write MINE/{group}/NAME.yaml and add --config-dir MINE"
NAMES_A_WORD = re.compile(
    r"(?:merging override |config use \+|for argument '|parameters '|prefix: ')(.*?)(?:'?$|' requires)", re.M
)
"""Pattern of the rejected argument in a Hydra error."""


def check_words(words: Sequence[str]) -> None:
    """Raise UserError for the first unsuitable flag, or for the deletion of a key."""
    if COMPLETION & {*words}:
        return
    rest = iter(enumerate(words))
    for place, word in rest:
        name, equals, value = word.partition("=")
        if name.startswith("~") and not name.startswith("~hydra"):
            key = name[1:].partition("@")[0]
            known = type_of(key) or key in _groups()
            cure = f"write {key}=VALUE, or leave the word out" if known else "leave the word out"
            raise UserError(word, "", "deletes a key, and every key needs a value", cure)
        if not name.startswith("-"):
            continue
        following = words[place + 1] if place + 1 < len(words) else ""
        value = value if equals else following
        if name in ("--config-name", "-cn", "--config-path", "-cp"):
            raise _names_a_file(name, value)
        if name in ("--config-dir", "-cd") and not Path(value).is_dir():
            raise UserError(
                name, value, "must be an existing folder with custom recipes", OF_YOUR_OWN.format(group="conf")
            )
        if name not in FLAGS:
            raise _unknown_flag(name, "" if not equals and "=" in following else value)
        if FLAGS[name] and not equals:
            next(rest, None)


def explain(error: Exception, words: Sequence[str]) -> UserError:
    """Convert an error of Hydra or OmegaConf to a UserError, or raise it again."""
    wrong = _explained(error, words)
    typed = (wrong.field, wrong.field.rpartition(".")[2], str(wrong.value))
    cure = next((CURES[each.lower()] for each in typed if each.lower() in CURES), wrong.cure)
    return UserError(wrong.field, wrong.value, wrong.rule, cure)


def _explained(error: Exception, words: Sequence[str]) -> UserError:
    groups, settings = _groups(_own(words)), settings_in(words)
    if isinstance(error, OverrideParseException):
        place = settings.index(error.override) if error.override in settings else 0
        return _unread(error.override, settings[:place], settings[place + 1 :], groups)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, slash, name = error.missing_cfg_file.partition("/")
        return _wrong_option(group, name, groups) if slash else _wrong_option("conf", group, groups)
    typed = {key.partition("@")[0]: text for key, _, text in (word.lstrip("+").partition("=") for word in settings)}
    if not isinstance(error, (HydraException, OmegaConfBaseException)) or "hydra.runtime" in str(error):
        # OmegaConf raises AssertionError for a key of a null section, and Hydra for an option that is not a word.
        odd = (group for group, text in typed.items() if group in groups and text not in groups[group])
        unknown = (key for key in typed if type_of(key) is None and key not in groups and not key.startswith("hydra"))
        if "" in typed:
            return UserError(f"={typed['']}", "", "every word is KEY=VALUE or a flag", LISTS)
        if (key := next(unknown, None)) is not None:
            return _unknown_key(key, typed[key], groups)
        if isinstance(error, AssertionError) and (wrong := _in_null_section(typed)):
            return wrong
        if (group := next(odd, None)) is None:
            raise error
        return _wrong_option(group, typed[group], groups)
    problem = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    inside = re.sub(r"\[\d+\].*", "", getattr(problem, "full_key", None) or "")
    if not inside and (found := re.search(r"full_key: ([\w.]+)", str(error))):
        inside = found[1]
    if found := NAMES_A_WORD.search(str(error)):
        key, _, text = found[1].lstrip("+").partition("=")
        return _wrong_setting(key.partition("@")[0], text, typed, inside, problem, lines[0], groups)
    recipe = found[1] if (found := re.match(r"In '([^']*)'", lines[0] if lines else "")) else ""
    place = f"in {recipe}.yaml: " if recipe else ""
    if inside and type_of(inside) is None:
        key = next((each for each in typed if f"{each}.".startswith(f"{inside}.")), inside)
        wrong = _unknown_key(key, typed.get(key, "VALUE"), groups)
        return UserError(wrong.field, wrong.value, place + wrong.rule, wrong.cure)
    if recipe and (found := _in_recipe(recipe, inside, _own(words))):
        key, value = found
        wrong = _wrong_value(key, value, problem)
        return UserError(key, value, place + wrong.rule, wrong.cure)
    if inside and (found := re.search(r"alue '([^']*)'", str(error))):
        return _wrong_value(inside, found[1], problem)
    rule = " ".join(line for line in lines if not re.match(r"(full_key|object_type|reference_type)\b", line))
    return UserError(inside or "recipe", "?", rule, f"correct the recipe; {LISTS}")


def _wrong_setting(
    key: str, text: str, typed: dict[str, str], inside: str, problem: Exception, said: str, groups: dict[str, list[str]]
) -> UserError:
    """Return the error for an argument that Hydra or OmegaConf rejected. inside: key in OmegaConf's error. said: first
    line of Hydra's error."""
    if (kind := type_of(key)) is None and key not in groups:
        return _unknown_key(key, typed.get(key, text), groups)
    if said.startswith(("Ambiguous", "Sweep")):
        if typing.get_origin(kind) is list or kind is Any:
            return UserError(key, text, "a list needs brackets", f"write '{key}=[{text}]'")
        rule = "has several values, and one run needs one value"
        return UserError(key, text, rule, f"add -m for one run per value: -m {key}={text}")
    if "already at" in said:
        return UserError(key, text, "exists already, and + only adds new keys", f"write {key}={text}")
    value: Any = OverridesParser.create().parse_override(f"{key}={text}").value()
    if inside.startswith(f"{key}."):
        for name in inside.removeprefix(f"{key}.").split("."):
            value = value[name]
        return _wrong_value(inside, value, problem)
    wrong = _wrong_value(key, value, problem)
    return UserError(wrong.field, text, wrong.rule, wrong.cure)


def _own(words: Sequence[str]) -> list[Path]:
    """Return the folders with the user's recipes."""
    flags = [value for name, value in zip(words, [*words[1:], ""], strict=False) if name in ("--config-dir", "-cd")]
    given = [match[1] for word in words if (match := re.fullmatch(r'hydra\.searchpath=\["(.*)"\]', word))]
    return [Path(value) for value in (*flags, *given)]


def settings_in(words: Sequence[str]) -> list[str]:
    """Return the arguments that are neither flags nor values of flags."""
    return [
        word
        for place, word in enumerate(words)
        if not word.startswith("-") and not (place and FLAGS.get(words[place - 1], False))
    ]


def _groups(own: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Return the option names of each group. own: folders with user recipes."""
    files = sorted(file for folder in (ROOT / "conf", *own) for file in folder.glob("*/*.yaml"))
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(file.parent.name, []).append(file.stem)
    return groups


def _wrong_value(key: str, value: Any, problem: Exception) -> UserError:
    """Return the error for a value of the wrong type."""
    kind, default = type_of(key), _default(key)
    example = f"for example {_written(key, default)}" if default not in (None, [], "", 0) else LISTS
    if value == "" and kind is not str:
        return UserError(key, "", "is empty, perhaps from a shell variable that is not set", example)
    if str(value).lower() in ("none", "null", "~") and is_nullable(key):
        return UserError(key, value, "is text here, not the empty value", f"write {key}=null")
    if isinstance(problem, (ConfigKeyError, ConfigAttributeError)):
        return _unknown_part(key, value, kind)
    shown = _plain(value)
    if typing.get_origin(kind) is list:
        return _wrong_list(key, value, kind, default)
    if is_dataclass(kind):
        inside = ", ".join(f"{key}.{field.name}" for field in fields(kind))
        return UserError(key, shown, "is a section, not a value", f"set one of its keys: {inside}")
    if (meant := VALUES.get((key, str(shown).lower()))) is not None:
        return UserError(key, shown, f"is not accepted; {meant[0]} {meant[1]}", f"write {key}={meant[0]}")
    if choices := choices_of(kind):
        section, _, name = key.rpartition(".")
        usual = f"use {default.value}, the default, or another value. " if default else "use one of these. "
        return wrong_choice(
            key, shown, choices, usual + attribute_meanings(type_of(section) if section else Config).get(name, "")
        )
    if kind is bool:
        return UserError(key, shown, "must be true or false", f"write {key}=true or {key}=false")
    if kind in (int, float):
        written = example if default else f"write {key}=NUMBER" + (f" or {key}=null" if default is None else "")
        return UserError(key, shown, f"must be a {WORDS[kind]}", _number_meant(key, value, kind) or written)
    if kind is str:
        return UserError(key, shown, "must be text, one value", f"quote it: '{key}=\"{shown}\"'")
    return UserError(key, shown, " ".join(str(problem).splitlines()[:1]), example)


def _number_meant(key: str, value: Any, kind: type) -> str | None:
    """Return a fix for a fraction, a percentage or a number with a unit, or None."""
    if kind is int and isinstance(value, float) and math.isfinite(value):
        if value.is_integer():
            return f"write it out: {key}={int(value)}"
        return f"round it: {key}={max(1, round(value))}"
    if found := re.fullmatch(r"([\d.]+)\s*%", str(value)):
        return f"write a fraction: {key}={float(found[1]) / 100:g}"
    if re.fullmatch(r"[\d.]+(?:e[+-]?\d+)?\s*[A-Za-z]+", str(value)):
        return "write the number without a unit; the key has a fixed unit"
    return None


def _wrong_list(key: str, value: Any, kind: Any, default: Any) -> UserError:
    item = typing.get_args(kind)[0]
    words = ", ".join(choices_of(item)) or f"{'word' if item is str else WORDS.get(item, 'mapping')}s"
    rule = f"must be a list of {words}{', each with its keys' if is_dataclass(item) else ''}"
    if not default and isinstance(value, item):
        return UserError(key, _plain(value), rule, f"write '{key}=[{_plain(value)}]'")
    if is_dataclass(item):
        inside = ", ".join(f"{field.name}: ..." for field in fields(item))
        return UserError(key, _plain(value), rule, f"write '{key}=[{{{inside}}}]'; omitted keys keep their defaults")
    example = default or [*choices_of(item)][:2] or None
    return UserError(key, _plain(value), rule, f"for example {_written(key, example)}")


def _unknown_part(key: str, value: Any, kind: Any) -> UserError:
    """Return the error for an unknown name in a mapping or a list of mappings."""
    section = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
    known = [field.name for field in fields(section)] if is_dataclass(section) else []
    given = [name for part in (value if isinstance(value, list) else [value]) for name in part]
    wrong = next((name for name in given if name not in known), key)
    close = difflib.get_close_matches(str(wrong), known, n=1)
    cure = f"did you mean {close[0]}?" if close else "leave it out"
    return UserError(f"{key}: {wrong}", _plain(value), f"the keys here are {', '.join(known)}", cure)


def _wrong_option(group: str, value: str, groups: dict[str, list[str]]) -> UserError:
    """Return the error for an unknown option of a config group."""
    if (meant := VALUES.get((group, value.lower()))) is not None:
        return UserError(group, value, f"is not accepted; {meant[0]} {meant[1]}", f"write {group}={meant[0]}")
    if value == "":
        rule = f"is empty, perhaps from a shell variable that is not set; it must be one of {', '.join(groups[group])}"
        return UserError(group, "", rule, "use one of these, or leave it out")
    if (name := Path(value).stem) in groups[group]:
        rule = "must be the name of a file, without folders and suffix"
        return UserError(group, value, rule, f"write {group}={name}")
    section = type_of(group)
    first = fields(section)[0] if section else None
    single = (
        f", or set single keys, such as {group}.{first.name}=VALUE"
        if first and not first.metadata.get("choices") and first.name != "name"
        else ""
    )
    choices = [*groups[group], *(OPTIMIZERS if group == "optim" else ())]  # optim=muon is short for optim.name=muon
    return wrong_choice(group, value, choices, f"use one of these{single}; {OF_YOUR_OWN.format(group=group)}")


def _unknown_key(key: str, text: str, groups: dict[str, list[str]]) -> UserError:
    if removed := REMOVED_KEYS.get(key):
        return removed.error(key, text)
    close = close_keys(key, [*groups])
    meant = [f"{each}={VALUES.get((each, text.lower()), (text,))[0]}" for each in close]
    cure = f"did you mean {' or '.join(meant)}? " if meant else ""
    return UserError(key, text, "is not a key of the schema", cure + LISTS)


def close_keys(key: str, more: Sequence[str] = ()) -> list[str]:
    """Return keys that the user may have meant: a synonym, keys with the same last word, or similar keys."""
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
    """Whether a user who typed an unknown key may have meant `key`. section: the unknown key without its last name.

    The result is true if `section` is empty, begins with a top-level key, or resembles `key` or the section of `key`.
    """
    first, own = section.partition(".")[0], key.rpartition(".")[0]
    return not section or first in kinds(Config) or bool(difflib.get_close_matches(section, [own, key]))


def _unread(word: str, before: Sequence[str], after: Sequence[str], groups: dict[str, list[str]]) -> UserError:
    """Return the error for an argument without `key=`, or with an unreadable value."""
    key, equals, text = word.lstrip("+").partition("=")
    if equals and key:
        return _unreadable(key, text, after)
    rule = "every word is KEY=VALUE or a flag"
    following = after[0] if after else ""
    if before and before[-1].endswith("="):
        return UserError(before[-1][:-1], "", "there must be no space around =", f"write {before[-1]}{word}")
    if following.startswith("="):
        value = following[1:] or (after[1] if len(after) > 1 else "")
        return UserError(word, following, "there must be no space around =", f"write {word}={value}")
    if (cut := re.fullmatch(r"([\w.]+):(.*)", word)) and type_of(cut[1]) is not None:
        return UserError(word, "", rule, f"write {cut[1]}={cut[2] or following}")
    meant = {name: f"conf={name}" for name in groups["conf"]} | {mode.value: f"mode={mode.value}" for mode in Mode}
    meant |= {"help": "--help", "version": "--version"} | {name: f"`sluice {name}`" for name in COMMANDS}
    if word in meant:
        usual = ", or leave it out, as it is the default" if word == Mode.train.value else ""
        return UserError(word, "", rule, f"write {meant[word]}{usual}")
    if type_of(word) is not None or word in groups:
        is_value = bool(following) and "=" not in following
        value = following if is_value else "VALUE"
        return UserError(f"{word} {following}" if is_value else word, "", rule, f"write {word}={value}")
    if before and before[-1].startswith("name="):
        return UserError("name", f"{before[-1][5:]} {word}", "must be one word", f"write {before[-1]}_{word}")
    if before and "=" in before[-1]:
        return UserError(word, "", f"{rule}; a value with spaces needs quotes", f'write "{before[-1]} {word}"')
    close = [meant[each] for each in difflib.get_close_matches(word, meant, n=1, cutoff=0.75)]
    close = close or [f"{each}=VALUE" for each in close_keys(word)]
    return UserError(word, "", rule, f"did you mean {' or '.join(close)}? {LISTS}" if close else LISTS)


def _unreadable(key: str, text: str, after: Sequence[str]) -> UserError:
    """Return the error for a value that the shell truncated or Hydra cannot parse."""
    if text.count("[") + text.count("{") > text.count("]") + text.count("}"):
        whole = " ".join([text, *after])
        end = max(whole.rfind("]"), whole.rfind("}")) + 1
        rule = "a list or a mapping must be closed, and quoted if it has spaces"
        return UserError(
            key, whole, rule, f"write '{key}={whole[:end]}'" if end else f"close it: '{key}={whole}{_closing(whole)}'"
        )
    if text.startswith("="):
        return UserError(key, text, "key and value must be separated by one =", f"write {key}={text.lstrip('=')}")
    if type_of(key) in (int, float, bool):
        return _wrong_value(key, text, ValueError())
    if text.endswith(","):
        return UserError(
            key, text, "a value must follow the comma", f"write {key}={text.rstrip(',')}, or add -m and more values"
        )
    word = f'{key}="{text}"' if '"' not in text else f"{key}='{text}'"
    rule = "has characters with a special meaning: quotes, brackets, = or commas"
    return UserError(key, text, rule, f"if they belong to the value, quote it twice: {shlex.quote(word)}")


def _closing(text: str) -> str:
    """Return the closing brackets that a text lacks."""
    while (rest := re.sub(r"\[[^][{}]*\]|\{[^][{}]*\}", "", text)) != text:
        text = rest
    return "".join({"[": "]", "{": "}"}[bracket] for bracket in reversed(re.findall(r"[\[{]", text)))


def _names_a_file(flag: str, value: str) -> UserError:
    rule = "names the folder of the schema, which is fixed; conf= names a recipe"
    name = Path(value).stem
    cure = (
        f"write conf={name}" if name in _groups()["conf"] else "write conf=NAME, with --config-dir FOLDER for your own"
    )
    return UserError(flag, value, rule, cure)


def _unknown_flag(flag: str, value: str) -> UserError:
    rule = "is no flag; write settings as KEY=VALUE, without dashes"
    name, groups = flag.strip("-").replace("-", "_"), _groups()
    if type_of(name) is not None or name in groups:
        return UserError(flag, value, rule, f"write {name}={value or 'VALUE'}")
    if close := difflib.get_close_matches(flag, FLAGS, n=1, cutoff=0.75):
        return UserError(flag, value, rule, f"did you mean {close[0]}?")
    meant = [f"{each}={value or 'VALUE'}" for each in close_keys(name, [*groups])]
    cure = f"did you mean {' or '.join(meant)}? {LISTS}" if meant else LISTS
    return UserError(flag, value, rule, CURES.get(name, CURES.get(name.rpartition(".")[2], cure)))


def refuse_keys_of_other_modes(mode: Mode, overrides: Sequence[str]) -> None:
    """Raise UserError if the command line sets a key that this mode does not read."""
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+")
        for own, modes in OWN_KEYS.items():
            if (key == own or key.startswith(f"{own}.")) and mode not in modes:
                rule = f"mode={mode.value} does not read it; it belongs to mode={modes[0].value}"
                raise UserError(key, value, rule, f"write mode={modes[0].value}, or leave {key} out")


def _in_null_section(typed: dict[str, str]) -> UserError | None:
    """Return the error for the first typed key of a null section."""
    for key, value in typed.items():
        section = next((each for each in dotted_keys() if key.startswith(f"{each}.") and is_nullable(each)), "")
        if is_dataclass(type_of(section)):
            group, _, inside = section.partition(".")
            files = {file.stem: read_yaml(file) for file in sorted((ROOT / "conf" / group).glob("*.yaml"))}
            having = [f"{group}={name}" for name, found in files.items() if found.get(inside)]
            rule = f"is a key of {section}, which is null with this choice of {group}"
            return UserError(key, value, rule, f"choose {' or '.join(having)}, or leave it out")
    return None


def _in_recipe(name: str, inside: str, own: Sequence[Path]) -> tuple[str, Any] | None:
    """Return the key and the value that caused an error in a recipe file. name: GROUP/OPTION of the file. inside: key
    in OmegaConf's error."""
    files = (folder / f"{name}.yaml" for folder in (*own, ROOT / "conf"))
    given = read_yaml(next(file for file in files if file.is_file()))
    for key in dotted_keys():
        value = OmegaConf.select(given, key.removeprefix(f"{name.partition('/')[0]}."))
        if key == inside or (is_dataclass(type_of(key)) and not isinstance(value, (DictConfig, type(None)))):
            return key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return None


def _default(key: str) -> Any:
    section, _, name = key.rpartition(".")
    kind: Any = type_of(section) if section else Config
    return getattr(kind(), name) if is_dataclass(kind) else None


def _written(key: str, value: Any) -> str:
    """Return a setting as a user types it."""
    word = f"{key}={_plain(value)}"
    return f"'{word}'" if set(word) & set(" [{") else word


def _plain(value: Any) -> str:
    """Return a value as a user types it."""
    held: Any = OmegaConf.to_container(OmegaConf.create({"_": value}), enum_to_str=True)
    return yaml_words(held["_"])
