"""Bytes that our kernels of Triton load and store, seen in its interpreter, beside what tests/ghost/traffic.py counts of their tensors:
two ways to a figure, of which one reads no kernel and the other no list of tensors.

A plugin of pytest for a process with TRITON_INTERPRET=1: `-p tests.ghost.interpreted_traffic`. At the end of the session it holds, of every kernel,
the launch with the most bytes: each address that is loaded and each that is stored counts once. What a kernel loads again (rows for
their two halves, for example) is in neither count, as it comes from a cache.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter

from tests.ghost.traffic import TRITON_MATMULS, bytes_of, sides_of

TOLERANCE = 0.1
"""Tests have few rows, beside which sums, offsets and what pads a table weigh more than in a layer."""
OUT_OF_ITS_TENSORS = {
    "_update_kernel": "works in place on gradients and moments",
    "_squares_kernel": "is given addresses",
    "_decode_kernel": "reads the rows that came, of a buffer that has room for more",
}
"""Kernels of which the tensors do not tell it, none of them in the count of a layer, and why."""

Accesses = dict[int, list[np.ndarray]]
"""Addresses, by the bytes of what lies there."""
_seen: dict[str, tuple[int, int]] = {}
"""Of the largest launch of each kernel: bytes of its tensors, and bytes that it loads and stores."""
_loads: Accesses = defaultdict(list)
_stores: Accesses = defaultdict(list)


def _note(accesses: Accesses, pointers: Any, mask: Any) -> None:
    item = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
    accesses[item].append(np.atleast_1d(pointers.data)[np.atleast_1d(mask.data).astype(bool)])


def _distinct(accesses: Accesses) -> int:
    """Bytes. Equal addresses are neighbours once they are in order; numpy's `unique`, by hashes, takes ten times as long."""
    found = 0
    for item, places in accesses.items():
        ordered = np.sort(np.concatenate(places))
        found += item * (np.count_nonzero(ordered[1:] != ordered[:-1]) + min(ordered.size, 1))
    return found


def pytest_configure() -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def noted_load(self, pointers, mask, *more, **named):
        _note(_loads, pointers, mask)
        return load(self, pointers, mask, *more, **named)

    def noted_store(self, pointers, value, mask, *more, **named):
        _note(_stores, pointers, mask)
        return store(self, pointers, value, mask, *more, **named)

    def noted_launch(self, *args, **options):
        _loads.clear()
        _stores.clear()
        result, name = launch(self, *args, **options), self.fn.__name__
        counted = sum(map(bytes_of, sides_of(name, args)))
        if counted > _seen.get(name, (0, 0))[0]:
            _seen[name] = counted, _distinct(_loads) + _distinct(_stores)
        return result

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = noted_load, noted_store, noted_launch


def pytest_sessionfinish(session: pytest.Session) -> None:
    held = {name: pair for name, pair in _seen.items() if name not in (*TRITON_MATMULS, *OUT_OF_ITS_TENSORS)}
    wrong = {name: pair for name, pair in held.items() if abs(pair[0] / pair[1] - 1) > TOLERANCE}
    for name, (counted, moved) in sorted(held.items()):
        print(f"\n{name}: {counted} bytes of tensors, {moved} loaded and stored", end="")
    if wrong or not held:
        print(f"\nnot the bytes that are counted: {wrong}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
