"""The tests of `pytest --quick`, the order of all tests, and the results that .ci/run passes on."""

import gc
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.composing import keep_groups

keep_groups()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # traffic of tests stays on this machine
# A thread of torch that waits for its next work turns for milliseconds, on a core that another worker needs: here it sleeps.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "of every test the first case, without those marked slow or hosts: the tests of a working day"
    parser.addoption("--quick", action="store_true", help=what)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Each worker imports all files of tests; to look again and again through what they have made so far would be a fifth of that."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests begin, as two workers end together then; `--quick` takes few."""
    if config.getoption("quick"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items) if not is_slow(item)}
        taken = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in taken])
        items[:] = [item for item in items if item in taken]
    slow = Counter(item.path for item in items if is_slow(item))
    items.sort(key=lambda item: -slow[item.path])


def is_slow(item: pytest.Item) -> bool:
    return any(item.iter_markers("slow")) or any(item.iter_markers("hosts"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers of a test, and of the fixtures made for it, hang on no test that ran before it in this process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if said := os.environ.get("SLUICE_GPU_CHECKS"):
        terminalreporter.write_line(said)


@pytest.fixture(autouse=True)
def no_process_group_is_left(request):
    """One that a test leaves behind would fail another test of this process, far away from it: it is ended, and the test named."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        warnings.warn(f"{request.node.nodeid} left a process group behind", stacklevel=1)
