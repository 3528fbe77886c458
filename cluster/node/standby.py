"""A process that has imported a rank's program and waits to become a rank:  python -m cluster.node.standby MODULE

Imports are most of the time that a small rank takes to start again. The agent keeps one such process per rank; a restart
sends it one line of JSON with the environment, arguments and log of the rank, and the process calls MODULE.main(). What
main() would import later, MODULE.preload() imports before the wait, where there is one. Until then it holds no device and
no connection. End of input ends it.
"""

import gc
import importlib
import json
import os
import sys

from cluster.interrupts import leave


def main() -> int:
    gc.disable()  # a sixth of the imports would be looks through what they have made so far
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
