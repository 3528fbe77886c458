"""A run of the trainer that waits at a step until a test has done what it does there, on a machine of any speed.

Imports nothing of ours: ranks that find `site` on their path run it before all else.
"""

import contextlib
import json
import os
import time
from pathlib import Path

HOLD = "hold_at"
"""A file with the number of a step: ranks that look at it wait when they have come to this step, until it is gone or names a later one."""
SITE = f"""
import os, runpy, sys
if "train.worker" in sys.orig_argv:
    runpy.run_path({__file__!r})["hold_on"](os.environ["HOLD"])
"""


def hold_at(path: Path, step: int) -> None:
    new = path.with_name(f".{path.name}")
    new.write_text(str(step))
    new.replace(path)


def hold_on(path: Path | str) -> None:
    """This process, soon a rank, looks at the file whenever it tells at which step it is."""
    replace = os.replace

    def replace_and_wait(source: str | Path, target: str | Path, **more: int) -> None:
        replace(source, target, **more)
        if str(target).endswith(".progress.json"):
            told = json.loads(Path(target).read_text())
            with contextlib.suppress(FileNotFoundError):
                while told["phase"] == "step" and told["step"] >= int(Path(path).read_text()):
                    time.sleep(0.02)

    os.replace = replace_and_wait


def site(folder: Path, path: Path) -> dict[str, str]:
    """Environment in which all ranks of the trainer look at this file; folder: for what they need to."""
    (folder / "sitecustomize.py").write_text(SITE)
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HOLD": str(path),
    }
