"""Before anything of the program is imported: names in the working folder that are not its own, and packages that it lacks.

`python -m` looks for packages in the working folder first, so a user's conf.py, cluster/ or torch.py there would be imported
instead of what is meant. The command `sluice` does not look there. This file needs the standard library alone, as all else
may be hidden.
"""

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""As conf.schema.ROOT, which cannot be imported yet."""


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
