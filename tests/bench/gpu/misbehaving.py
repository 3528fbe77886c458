"""A benchmark part whose checks misbehave in every way that a check on a new GPU may. A process of
tests/bench/gpu/test_run.py runs it."""

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

from bench.gpu.child import run_checks
from bench.gpu.line import Check, Finding, NotTried


class Machine:
    """Its context breaks when a check says so."""

    patience = 1.0

    def __init__(self):
        self.context_is_broken = False

    def broken(self) -> bool:
        return self.context_is_broken


def raises() -> Finding:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def not_tried() -> Finding:
    raise NotTried("TransformerEngine is not installed")


def breaks(machine: Machine) -> Finding:
    machine.context_is_broken = True
    raise RuntimeError("device-side assert")


def hangs() -> Finding:
    time.sleep(60)
    return Finding()


def writes_half_a_line(path: str) -> None:
    with Path(path).open("a") as file:
        file.write('{"line": {"na')
    os._exit(4)


def main() -> int:
    faulthandler.enable()
    kind, path = sys.argv[1:]
    machine = Machine()
    if kind == "import_error":
        raise ImportError("libcudart.so.13: cannot open shared object file")
    checks = {
        "first": lambda: Finding({"milliseconds": 1.5}, "less than 2"),
        "raises": raises,
        "not tried": not_tried,
        "breaks the context": lambda: breaks(machine),
        "crashes": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "exits": lambda: os._exit(3),
        "writes half a line": lambda: writes_half_a_line(path),
        "hangs": hangs,
        "wrong": lambda: Finding({"error": float("nan")}, "below 1", "it is not a number"),
        "last": Finding,
    }
    if kind == "late":
        checks = {name: checks[name] for name in ("first", "hangs", "last")}
    limits = {"hangs": 0.5} if kind == "all" else {}
    return run_checks([Check(name, run, limits.get(name, 60.0)) for name, run in checks.items()], machine, Path(path))


if __name__ == "__main__":
    sys.exit(main())
