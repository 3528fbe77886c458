"""User code, which a recipe names by its import path: `_target_: my_pkg.my_mod.Thing`, with arguments as further keys.

If Thing is a function, Sluice adds more arguments when it calls Thing. Python searches its module path first, then the
folder of the command.
"""

import difflib
import functools
import importlib
import importlib.machinery
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from conf.errors import UserError
from conf.schema import ROOT, Config, Mode

TARGET = "_target_"
CodeSection = Mapping[str, Any]
"""A recipe's section for user code: import path and arguments."""
OWN_CODE = ("data.source", "data.template_function", "model.block", "model.router", "optim.extra_loss", "callbacks")
"""The keys that accept user code; callbacks accepts a list."""
READ_FROM_RUNS: dict[str, tuple[Mode, ...]] = {
    "data.source": (Mode.evaluate,),
    "data.template_function": (Mode.evaluate, Mode.generate),
    "model.block": (Mode.evaluate,),
    "model.router": (Mode.evaluate, Mode.generate, Mode.score),
}
"""Modes that take user code from a run's config.yaml, with the user's permission."""
_FILES: dict[str, str] = {}
"""Maps an imported file of user code to the key that named it."""


def sections_of(config: Any) -> dict[str, CodeSection]:
    """Return the sections that name user code, by key."""
    found: dict[str, CodeSection] = {}
    for key in OWN_CODE:
        value = attrgetter(key)(config)
        entries = {key: value} if key != "callbacks" else {f"{key}[{place}]": each for place, each in enumerate(value)}
        found |= {name: section for name, section in entries.items() if section}
    return found


def targets_of(config: Config) -> dict[str, str]:
    """Return the import paths of all user code, by key."""
    return {key: section[TARGET] for key, section in sections_of(config).items()}


def check_targets(config: Config) -> None:
    """Raise UserError for a section without import path. Imports nothing."""
    for key, section in sections_of(config).items():
        target = section.get(TARGET)
        if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
            rule = "must be the import path of a class or function: module.Name, or package.module.Name"
            raise UserError(f"{key}.{TARGET}", target, rule, f"write {key}: {{{TARGET}: my_module.MyThing}}")


def is_findable(target: str, folder: str) -> bool:
    """Whether this node can find the top-level package or module of `target`, an import path.

    folder: working directory of the command, which is searched last.
    """
    return importlib.machinery.PathFinder.find_spec(target.partition(".")[0], [*sys.path, folder]) is not None


def import_target(key: str, section: CodeSection) -> Any:
    """Return the class or function that the section names. Raises UserError."""
    target: str = section[TARGET]
    module_name, _, name = target.rpartition(".")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # at the end, so that a file in this folder cannot hide a package of Sluice
    with refused(key, target, "importing it"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise  # a package that the user's module imports is missing
            rule = f"there is no module {error.name}: searched in {_searched(folder)}"
            cure = "run the command in the module's folder, add that folder to PYTHONPATH, or install the module, on every node"
            raise UserError(f"{key}.{TARGET}", target, rule, cure) from error
    if module.__file__ is not None:
        _FILES[module.__file__] = key
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, vars(module), n=1)
        cure = f"did you mean {module_name}.{near[0]}?" if near else f"choose a name that {module_name} defines"
        raise UserError(f"{key}.{TARGET}", target, f"{module.__file__} defines no {name}", cure)
    return getattr(module, name)


def _searched(folder: str) -> str:
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return ", ".join([folder, *(f"{path} (PYTHONPATH)" for path in given if path != folder), "the installed packages"])


def make(key: str, section: CodeSection) -> Any:
    """Return an object of the section's class, or its function with bound arguments. Raises UserError."""
    found = import_target(key, section)
    keys = {name: value for name, value in section.items() if name != TARGET}
    if not callable(found):
        raise UserError(
            f"{key}.{TARGET}", section[TARGET], "must be a class or a function", "choose a class or a function"
        )
    if not inspect.isclass(found):
        return functools.partial(found, **keys)
    with refused(key, section[TARGET], "making it"):
        return found(**keys)


def subclass(key: str, section: CodeSection | None, base: type) -> Callable[..., Any]:
    """Return the section's subclass of `base` with bound arguments; without a section, `base`."""
    if not section:
        return base
    found = import_target(key, section)
    if not (inspect.isclass(found) and issubclass(found, base)):
        rule = f"must be a subclass of {base.__module__}.{base.__qualname__}"
        raise UserError(f"{key}.{TARGET}", section[TARGET], rule, f"write class {found.__name__}({base.__qualname__})")
    return functools.partial(found, **{name: value for name, value in section.items() if name != TARGET})


def require_arguments(key: str, section: CodeSection, called: Any, count: int, what: str) -> None:
    """Raise UserError unless `called` accepts `count` positional arguments. what: text that names these arguments."""
    try:
        inspect.signature(called).bind(*[None] * count)
    except TypeError as error:
        rule = f"must take {what}: {error}{_defined(called)}"
        raise UserError(f"{key}.{TARGET}", section[TARGET], rule, "correct its arguments, or its keys here") from error
    except ValueError:
        pass  # a builtin function has no signature


def _defined(called: Any) -> str:
    function = getattr(called, "func", called)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""


@contextmanager
def refused(key: str, target: str, doing: str) -> Iterator[None]:
    """Context manager that converts exceptions of user code to UserError, before a run starts."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        rule = f"{doing} raised {type(error).__name__}: {error}{_raised_at(error)}"
        raise UserError(f"{key}.{TARGET}", target, rule, "correct it, or the keys beside it") from error


def _raised_at(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError):
        return f" ({error.filename}:{error.lineno})"
    ours = [str(ROOT / package) + os.sep for package in ("conf", "train", "parallel", "cluster")]
    own = [frame for frame in frames if not frame.filename.startswith(("<frozen", *ours))]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def named_by(frames: traceback.StackSummary) -> str | None:
    """Return file, line and function of an error in user code, and the key that names the code; or None."""
    frame = next((frame for frame in reversed(frames) if frame.filename in _FILES), None)
    return (
        frame
        if frame is None
        else f"{frame.filename}:{frame.lineno}, in {frame.name}, which {_FILES[frame.filename]} names"
    )
