"""Runs interpreted.py, interpreted_matmuls.py and interpreted_mx.py in a process whose triton interprets kernels on the CPU."""

from pathlib import Path

import pytest

from tests.interpret import needs_triton, run_interpreted


@pytest.mark.slow
@pytest.mark.timeout(900)  # of all of them: each one has a limit of its own
@needs_triton
def test_cuda_path_in_the_interpreter():
    """In one process: of each kernel the largest launch of all three files is held to the bytes that are counted."""
    run_interpreted(Path(__file__).parent, ["interpreted", "interpreted_matmuls", "interpreted_mx"])
