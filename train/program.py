"""Protects the program's imports, checks its packages, and prepares child processes.

`python -m` looks for packages in the working folder first, where a conf.py would replace the real package. The program
imports this file first. It needs only the standard library.
"""

import importlib.metadata
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Root folder of the program, equal to conf.schema.ROOT."""
COMMAND = "sluice"
DISTRIBUTION = "sluice-train"
"""The program's name for pip; `sluice` on PyPI is another project."""


def require_linux() -> None:
    """End with a one-line error if the system is not Linux."""
    if problem := other_system():
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def other_system() -> str | None:
    """Returns an error text unless the system is Linux."""
    if sys.platform == "linux":
        return None
    return f"Sluice runs only on Linux, and this system is {sys.platform}; use Linux, a container, or WSL 2"


def guard_names() -> None:
    """Remove the working folder from the import path, to which `python -m` has added it.

    It cannot prevent that `python -m train` runs a train.py in the working folder.
    """
    first = sys.path[0] if sys.path and not sys.flags.safe_path else None
    if first is not None and Path(first or ".").resolve() == Path.cwd() != ROOT:
        del sys.path[0]


def require_packages() -> None:
    """End with an error if a checkout lacks a required package."""
    if lacking := list(_lacking()):
        named = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} others" if len(lacking) > 3 else "")
        active = ROOT / ".venv" / "bin" / "activate"
        cure = f". {active}" if active.is_file() else f"{sys.executable} -m pip install -e {ROOT}"
        print(f"error: {sys.executable} has no {named}; type `{cure}` first", file=sys.stderr)
        sys.exit(2)


def _lacking() -> Iterator[str]:
    """Returns the packages that pyproject.toml requires but this Python lacks."""
    project = ROOT / "pyproject.toml"
    if not project.is_file():
        return
    import tomllib

    for wanted in tomllib.loads(project.read_text())["project"]["dependencies"]:
        name = re.split(r"[^\w.-]", wanted, maxsplit=1)[0]
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            yield name


def environment_of_children() -> dict[str, str]:
    """Returns variables with which child processes find this program."""
    found = {"PYTHONSAFEPATH": "1"}
    if ROOT.name != "site-packages":  # a checkout, which Python may find only in the working folder
        others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
        found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *others])
    return found


@contextmanager
def keep_environment(names: Collection[str]) -> Iterator[None]:
    """Returns a context manager that restores these environment variables on exit."""
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ |= before


def typed_command() -> list[str] | None:
    """Returns the command that the user typed, or None."""
    started = Path(sys.argv[0]).name
    if started == COMMAND:
        return [COMMAND]
    return ["python", "-m", "train"] if started == "__main__.py" else None


def install_words(extra: str) -> str:
    """Returns the command that installs an extra of the program."""
    if (ROOT / "pyproject.toml").is_file():
        return f"in the program's folder: pip install -e '.[{extra}]'"
    return f"pip install '{DISTRIBUTION}[{extra}]'"
