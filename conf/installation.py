"""How the program is called and installed: by which command it was started, where its children find it, how an extra is added."""

import os
import sys
from pathlib import Path

from conf.schema import ROOT

COMMAND = "sluice"
DISTRIBUTION = "sluice-train"
"""What pip calls the program; PyPI's `sluice` is another project."""


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
