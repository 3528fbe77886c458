"""Runs interpreted.py in a process whose triton interprets kernels on the CPU."""

from pathlib import Path

import pytest

from tests.interpret import needs_triton, run_interpreted


@pytest.mark.slow
@needs_triton
def test_kernels_of_a_gpu_in_the_interpreter():
    run_interpreted(Path(__file__).parent, ["interpreted"])


@pytest.mark.slow
@needs_triton
def test_places_of_kernels_at_the_border_of_32_bits():
    run_interpreted(Path(__file__).parent, ["interpreted_borders"], traffic=False)
