"""One part in its own process:  python -m bench.gpu.child PART DEVICE FILE

FILE gets one JSON object per line: first the names of all checks, then every check when it begins, and its line when it
is complete. Checks that already have a line in FILE are left out, so a new process can continue after another one died.
A check that takes longer than its limit ends the process, and faulthandler prints where it hung. An error that makes
the CUDA context unusable ends the process too.
"""

import faulthandler
import json
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu.line import Check, make_line

if TYPE_CHECKING:  # a process that cannot import torch says so with faulthandler on
    from bench.gpu.machine import Machine

BROKEN = 70
"""Exit code: the checks that are left need a new process."""


def main() -> int:
    name, device, path = sys.argv[1:]
    faulthandler.enable()
    from bench.gpu.machine import Machine
    from bench.gpu.parts import PARTS

    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    machine = Machine.here(device)
    return run_checks(PARTS[name].load()(machine), machine, Path(path))


def run_checks(checks: list[Check], machine: "Machine", path: Path) -> int:
    """All that have no line in the file yet."""
    done = {entry["line"]["name"] for entry in read_entries(path) if "line" in entry}
    with path.open("a") as file:
        file.write("\n")  # ends what a process was writing when it died

        def write(entry: dict) -> None:
            print(json.dumps(entry), file=file, flush=True)

        write({"checks": [check.name for check in checks]})
        for check in checks:
            if check.name in done:
                continue
            write({"begun": check.name})
            faulthandler.dump_traceback_later(machine.patience * check.limit, exit=True)
            line = make_line(check)
            faulthandler.cancel_dump_traceback_later()
            write({"line": asdict(line)})
            if machine.broken():
                return BROKEN
    return 0


def read_entries(path: Path) -> list[dict]:
    """What the processes wrote. A line that one was writing, or is, is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


if __name__ == "__main__":
    sys.exit(main())
