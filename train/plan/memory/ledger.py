"""Counts the tensor memory that code allocates and frees, without the allocator.

A `Ledger` is a torch dispatch mode. It counts each storage until its last tensor is freed. On the meta device, it
computes the memory that the code would use. It cannot count temporary memory of a kernel.

A ledger counts only threads that have entered the mode. On the CPU and the meta device, backward runs in the calling
thread.
"""

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from train.plan.work_recorder import WorkRecorder

_PLAIN = {Tensor, nn.Parameter}


@dataclass
class Snapshot:
    """Live bytes at one time, in total and by tag."""

    total: int = 0
    by_tag: Counter = field(default_factory=Counter)
    event: str = ""


def _undisturbed(mode: "type[Ledger]") -> "type[Ledger]":
    """Adds the dispatch method to a finished class.

    If the class body defined the method, torch would wrap the method, which would make it slower.
    """
    mode.__torch_dispatch__ = mode._count
    return mode


@_undisturbed
class Ledger(TorchDispatchMode):
    """Counts live bytes on one type of device, and their peak since the last `mark`.

    tag: label for new storages
    event: label of the current work, stored with the peak
    """

    def __init__(self, device: torch.device | str):
        super().__init__()
        self._kind = torch.device(device).type
        self._live: dict[int, tuple[int, str, weakref.ref]] = {}
        self._lock = threading.RLock()
        self.now = Snapshot()
        self.peak = Snapshot()
        self.tag = "workspace"
        self.event = ""
        self._is_told_apart = False
        self.recorder: WorkRecorder | None = None
        """Recorder of the work of every operation; None: do not record work."""

    def _count(self, func, types, args=(), kwargs=None):
        if not _PLAIN.issuperset(types):
            return NotImplemented  # a tensor subclass then runs operations on its inner tensors, which are counted
        if self.recorder is None:
            out = self._run(func, args, kwargs or {})
        else:
            out = self.recorder.operation(self._run, func, args, kwargs or {})
        self._enter_all(out)
        return out

    def _run(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _enter_all(self, out: object) -> None:
        if isinstance(out, Tensor):
            self.enter(out)
        elif isinstance(out, tuple | list):
            for one in out:
                self._enter_all(one)

    def enter(self, tensor: Tensor, tag: str | None = None) -> None:
        """Count the storage of a tensor, unless it is already counted."""
        if tensor.device.type != self._kind or type(tensor) not in _PLAIN:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        with self._lock:
            if key in self._live:
                return
            size, tag = 0 if self._is_told_apart else storage.nbytes(), self.tag if tag is None else tag
            self._live[key] = size, tag, weakref.ref(storage, partial(self._leave, key))
            self._add(size, tag)

    def _leave(self, key: int, gone: weakref.ref) -> None:
        with self._lock:
            size, tag, _ = self._live.pop(key)
            self._add(-size, tag)

    def _add(self, size: int, tag: str) -> None:
        now = self.now
        now.total += size
        now.by_tag[tag] += size
        if now.total > self.peak.total:
            self.peak = Snapshot(now.total, Counter(now.by_tag), self.event)

    def tag_of(self, tensor: Tensor) -> str:
        """The tag of a tensor's storage."""
        return self._live[tensor.untyped_storage()._cdata][1]

    def mark(self) -> Snapshot:
        """Returns the peak since the last call, and resets it."""
        peak, now = self.peak, self.now
        self.peak = Snapshot(now.total, Counter(now.by_tag), self.event)
        return peak

    @contextmanager
    def told_apart(self) -> Iterator[None]:
        """A context manager inside which new storages count as zero bytes; the caller counts their bytes."""
        self._is_told_apart = True
        try:
            yield
        finally:
            self._is_told_apart = False

    @contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """A context manager inside which new storages get this tag."""
        before, self.tag = self.tag, tag
        try:
            yield
        finally:
            self.tag = before


class PhaseBytes(NamedTuple):
    """Memory peaks of one phase of a rank's run, in bytes."""

    device: int
    host: int
    """Bytes of tensors in host memory; 0 on a CPU."""


class PeakMeter:
    """A context manager that measures peak memory; see `mark`."""

    def __init__(self, device: torch.device, counts_host: bool = False):
        """counts_host: on a GPU, also count tensors in host memory"""
        self._device, self._on_gpu = device, device.type == "cuda"
        self._ledger = Ledger("cpu") if counts_host or not self._on_gpu else None

    def __enter__(self) -> "PeakMeter":
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._ledger is not None:
            for one in gc.get_objects():
                if isinstance(one, torch.Tensor):
                    self._ledger.enter(one, "before")
            self._ledger.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._ledger is not None:
            self._ledger.__exit__(*error)

    def mark(self) -> int:
        """Returns the peak bytes on the device since the last call."""
        return self.mark_both().device

    def mark_both(self) -> PhaseBytes:
        """Returns device and host peaks in bytes since the last call."""
        counted = 0 if self._ledger is None else self._ledger.mark().total
        if not self._on_gpu:
            return PhaseBytes(counted, 0)
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return PhaseBytes(peak, counted)


class MetaLedger(Ledger):
    """A ledger for the meta device that caches results, for speed."""

    def __init__(self):
        super().__init__("meta")

    def _run(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if _writes_alone(func):
            return args[0]
        if not _makes_new(func):
            return func(*args, **kwargs)
        key = func, _shape_of(args), *((name, _shape_of(value)) for name, value in kwargs.items())
        made = _MADE.get(key)
        if made is None:
            out = func(*args, **kwargs)
            outs = out if isinstance(out, tuple | list) else (out,)
            if all(one is None or (type(one) is Tensor and one.is_meta) for one in outs):
                _MADE[key] = type(out), [one if one is None else (one.shape, one.stride(), one.dtype) for one in outs]
            return out
        kind, shapes = made
        outs = [
            None if one is None else torch.empty_strided(one[0], one[1], dtype=one[2], device="meta") for one in shapes
        ]
        return outs[0] if kind is Tensor else kind(outs)


_MADE: dict[tuple, tuple[type, list[tuple | None]]] = {}
"""Cached results of operations: type, and each tensor's shape, stride and dtype. None stands for an omitted output."""


@cache
def _makes_new(func: Any) -> bool:
    """Whether an operation returns only new tensors and changes no argument."""
    return not any(one.alias_info for one in (*func._schema.arguments, *func._schema.returns))


@cache
def _writes_alone(func: Any) -> bool:
    """Whether an elementwise operation writes only into its first argument."""
    first = func._schema.arguments[:1]
    written = [one.alias_info is not None and one.alias_info.is_write for one in first]
    return torch.Tag.pointwise in func.tags and func._schema.name.endswith("_") and written == [True]


def _shape_of(value: object) -> Hashable:
    """Returns the properties of an argument that determine the result's shape."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_shape_of, value))
    return type(value), value
