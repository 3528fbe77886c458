"""Runs interpreted.py in a process whose triton interprets kernels on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed, so no kernel can be interpreted: the extra dev brings it on Linux",
)
def test_kernels_of_a_gpu_in_the_interpreter():
    tests = Path(__file__).parent / "interpreted.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.ghost.interpreted_traffic",
        "--timeout=240",
        str(tests),
    ]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
