"""A process that has imported a rank's program and waits to become a rank:  python -m cluster.node.standby MODULE

Imports take most of a small rank's start, so the agent keeps a reserve process per rank. The process calls
MODULE.preload(), if defined, and waits for one line of JSON with environment, arguments and log. Then it calls
MODULE.main(). It uses no device while it waits, and ends when its standard input is closed.
"""

import gc
import importlib
import json
import os
import sys

from cluster.interrupts import leave


def main() -> int:
    gc.disable()  # garbage collections would take a sixth of the import time
    module = importlib.import_module(sys.argv[1])
    if hasattr(module, "preload"):
        module.preload()
    gc.enable()
    line = sys.stdin.readline()
    if not line:
        return 0
    order = json.loads(line)
    _redirect(order["log"])
    os.environ.update(order["environment"])
    sys.argv = [sys.argv[1], *order["arguments"]]
    return module.main()


def _redirect(log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)


if __name__ == "__main__":
    sys.exit(leave(main()))
