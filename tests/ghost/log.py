"""The calls that the ghost received, in a process that runs on it.

with recorded() as calls:
    step()
print(calls.launches, calls.waits, calls.kernels.most_common(5))
"""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

KINDS = (
    "kernel", "product", "collective", "to device", "to host", "on device", "fill", "wait", "order", "allocation", "refusal",
)  # fmt: skip
"""In the order of ghost.h, from 1 on."""
LAUNCHED = ("kernel", "product", "collective", "to device", "to host", "on device", "fill")
"""Kinds that put work on the GPU, each at the cost of one launch."""
CAPACITY = 1 << 21


class _Event(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("name", ctypes.c_char_p),
        ("bytes", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Calls:
    """Events of one stretch of a program."""

    kinds: Counter[str] = field(default_factory=Counter)
    """How many of each of KINDS."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of copies, fills and allocations, by kind."""
    kernels: Counter[str] = field(default_factory=Counter)
    """Kernels, products and collectives by name."""

    @property
    def launches(self) -> int:
        """Everything that was put on the GPU."""
        return sum(self.kinds[kind] for kind in LAUNCHED)

    @property
    def waits(self) -> int:
        """How often the host waited."""
        return self.kinds["wait"]


def on_ghost() -> bool:
    """Whether this process runs on it."""
    return hasattr(ctypes.CDLL(None), "ghost_note")


class Event(NamedTuple):
    """One call, in the order of the calls."""

    kind: str
    name: str
    bytes: int
    """Of an order: the handle of the event."""
    stream: int


@contextmanager
def recorded_events() -> Iterator[list[Event]]:
    """The calls of the block in their order, filled in at its end."""
    library, events = ctypes.CDLL(None), []
    count = ctypes.c_int32.in_dll(library, "ghost_count")
    first = count.value
    yield events
    last = count.value
    if last > CAPACITY:
        raise RuntimeError(f"the ghost's log of {CAPACITY} calls is full: record shorter stretches, in fresh processes")
    for one in (_Event * CAPACITY).in_dll(library, "ghost_events")[first:last]:
        events.append(Event(KINDS[one.kind - 1], one.name.decode(), one.bytes, one.stream))


@contextmanager
def recorded() -> Iterator[Calls]:
    """The calls of the block, filled in at its end."""
    calls = Calls()
    with recorded_events() as events:
        yield calls
    for event in events:
        calls.kinds[event.kind] += 1
        calls.bytes[event.kind] += event.bytes
        if event.kind in ("kernel", "product", "collective"):
            calls.kernels[event.name] += 1
