"""How the program is called and installed: what hides it or what it lacks, by which command it was started, where its children find it.

`python -m` looks for packages in the working folder first, so a user's conf.py, cluster/ or torch.py there would be imported
instead of what is meant. The command `sluice` does not look there. This file is imported before all else, which may be hidden,
and needs the standard library alone.
"""

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Root of the program, equal to conf.schema.ROOT, which cannot be imported yet."""
COMMAND = "sluice"
DISTRIBUTION = "sluice-train"
"""What pip calls the program; PyPI's `sluice` is another project."""


def require_linux() -> None:
    """End with one line on another system than Linux."""
    if told := other_system():
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)


def other_system() -> str | None:
    """What is told on another system than Linux; None on Linux."""
    if sys.platform == "linux":
        return None
    return (
        f"Sluice runs on Linux alone, and this system is {sys.platform}; use a machine, a container or WSL 2 with Linux"
    )


def guard_names() -> None:
    """Forget the working folder as a place of packages, where `python -m` has put it.

    What cannot be cured here is a user's train.py or train/__init__.py, which `python -m train` takes for the program:
    `sluice` does not.
    """
    first = sys.path[0] if sys.path and not sys.flags.safe_path else None
    if first is not None and Path(first or ".").resolve() == Path.cwd() != ROOT:
        del sys.path[0]


def require_packages() -> None:
    """End with one line where this Python lacks a package that the program needs, as one outside the environment does.

    Looks in a checkout alone: pip installs the program elsewhere, and its packages with it.
    """
    if lacking := list(_lacking()):
        named = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} others" if len(lacking) > 3 else "")
        active = ROOT / ".venv" / "bin" / "activate"
        cure = f". {active}" if active.is_file() else f"{sys.executable} -m pip install -e {ROOT}"
        print(f"error: {sys.executable} has no {named}; type `{cure}` first", file=sys.stderr)
        sys.exit(2)


def _lacking() -> Iterator[str]:
    """Packages that pyproject.toml asks for and this Python has not."""
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
    """What Python processes need to find this program and nothing in the folder where they start."""
    found = {"PYTHONSAFEPATH": "1"}
    if ROOT.name != "site-packages":  # a checkout, perhaps known by the working folder alone
        others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
        found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *others])
    return found


def typed_command() -> list[str] | None:
    """The words that start the program as the user started it; None where something else did, such as torchrun."""
    started = Path(sys.argv[0]).name
    if started == COMMAND:
        return [COMMAND]
    return ["python", "-m", "train"] if started == "__main__.py" else None


def install_words(extra: str) -> str:
    """How to install an extra of the program where it lies now."""
    if (ROOT / "pyproject.toml").is_file():
        return f"in the program's folder: pip install -e '.[{extra}]'"
    return f"pip install '{DISTRIBUTION}[{extra}]'"
