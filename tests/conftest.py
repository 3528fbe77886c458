"""What .ci/run has found out beside the tests stands above pytest's closing line."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # traffic of tests stays on this machine


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if said := os.environ.get("SLUICE_GPU_CHECKS"):
        terminalreporter.write_line(said)
