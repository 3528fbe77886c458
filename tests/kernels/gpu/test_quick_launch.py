"""Faster launches of Triton's kernels, with a kernel that records its launches: parallel/triton_types.py."""

import importlib.util
import itertools
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

NUMBERS = [
    0,
    1,
    2,
    15,
    16,
    17,
    4096,
    2**31 - 1,
    2**31,
    2**31 + 1,
    2**40,
    2**63,
    -1,
    -16,
    -(2**31),
    -(2**31) - 1,
    1.0,
    0.5,
    True,
    False,
]


class NotedKernel:
    """In the place of Triton's: a launch of its own gives what is compiled, and both note how they were called."""

    arg_names, constexprs = ("x_ptr", "y_ptr", "rows", "width", "block"), [4]
    params = [SimpleNamespace(do_not_specialize=False) for _ in arg_names]

    def __init__(self):
        self.own, self.quick = [], []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.own.append((grid, args, options))
            run = lambda *given: self.quick.append((given, options))  # noqa: E731
            return SimpleNamespace(run=run, function="function", packed_metadata="metadata")

        return launch


@pytest.fixture
def kernel(monkeypatch):
    from parallel import triton_types

    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7))
    monkeypatch.setattr(triton_types, "driver", driver)
    return triton_types.QuickKernel(NotedKernel())


def test_numbers_that_count_as_alike_are_alike_to_triton():
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend

    from parallel.triton_types import _kind_of

    theirs = [native_specialize_impl(BaseBackend, number, False, True, True) for number in NUMBERS]
    ours = list(map(_kind_of, NUMBERS))
    for (one, other), (said, said_too) in zip(
        itertools.combinations(ours, 2), itertools.combinations(theirs, 2), strict=True
    ):
        assert one != other or said == said_too
    assert _kind_of(32) == _kind_of(4096) and _kind_of(33) == _kind_of(35)


def test_the_second_launch_of_a_kind_runs_what_the_first_compiled(kernel):
    x, y = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
    for rows in (48, 32):
        kernel[3, 2](x, y, rows, 5, 128, num_warps=8)
    noted = kernel.kernel
    assert noted.own == [((3, 2), (x, y, 48, 5, 128), {"num_warps": 8})]
    given = (3, 2, 1, 7, "function", "metadata", None, None, None, x, y, 32, 5, 128)
    assert noted.quick == [(given, {"num_warps": 8})]


def test_counts_of_rows_compile_nothing_new(monkeypatch, kernel):
    from parallel.triton_types import QuickKernel

    rows = [SimpleNamespace(do_not_specialize=name == "rows") for name in NotedKernel.arg_names]
    monkeypatch.setattr(NotedKernel, "params", rows)
    kernel, x = QuickKernel(NotedKernel()), torch.zeros(64)
    for count in (48, 1, 17, 0, 2**31 - 1):
        kernel[(1,)](x, x, count, 5, 128)
    assert len(kernel.kernel.own) == 1 and len(kernel.kernel.quick) == 4
    kernel[(1,)](x, x, 2**31, 5, 128)
    assert len(kernel.kernel.own) == 2


@pytest.mark.parametrize("change", [
    lambda x, y: (x.bfloat16(), y, 48, 5, 128), lambda x, y: (x, y, 49, 5, 128), lambda x, y: (x, y, 48, 1, 128),
    lambda x, y: (x, y, 48, 5, 64), lambda x, y: (x, y, 48, 5.0, 128), lambda x, y: (x, y, 2**40, 5, 128),
])  # fmt: skip
def test_another_kind_is_compiled(kernel, change):
    x, y = torch.zeros(64), torch.zeros(64)
    kernel[(1,)](x, y, 48, 5, 128)
    kernel[(1,)](*change(x, y))
    kernel[(1,)](x, y, 48, 5, 128, num_warps=4)
    assert len(kernel.kernel.own) == 3 and not kernel.kernel.quick


def test_tensors_at_odd_addresses_and_watched_launches_are_left_to_triton(kernel):
    from triton import knobs

    x = torch.zeros(64)
    for _ in range(2):
        kernel[(1,)](x, x[1:], 48, 5, 128)
    hook = lambda metadata: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(2):
            kernel[(1,)](x, x, 48, 5, 128)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(kernel.kernel.own) == 4 and not kernel.kernel.quick
