"""What .ci/run has found out beside the tests stands above pytest's closing line."""

import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # traffic of tests stays on this machine


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers of a test, and of the fixtures made for it, hang on no test that ran before it in this process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if said := os.environ.get("SLUICE_GPU_CHECKS"):
        terminalreporter.write_line(said)
