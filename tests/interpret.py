"""Tests of Triton kernels on the CPU, in a process of their own: triton reads TRITON_INTERPRET when it is first imported."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed, so no kernel can be interpreted: the extra dev brings it on Linux",
)


def run_interpreted(folder: Path, names: Iterable[str], traffic: bool = True) -> None:
    """Run the tests in these files of a folder. traffic: hold what their kernels load and store (tests/ghost/interpreted_traffic.py)."""
    options = ["-q", "-p", "no:cacheprovider", "--timeout=240", *(["-p", "tests.ghost.interpreted_traffic"] * traffic)]
    command = [sys.executable, "-m", "pytest", *options, *(str(folder / f"{name}.py") for name in names)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
