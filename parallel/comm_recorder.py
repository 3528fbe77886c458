"""Records this process's collectives, sends and receives by wrapping the methods of torch's `ProcessGroup`.

A `CommLog` receives the records (format: cluster/comm_ring.py). For operations on GPU tensors, only the start of the
operation and the start of the wait are recorded, not the end.
"""

import itertools
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from conf.schema import ROOT

GROUP_METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "barrier": "barrier",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "recv": "receive",
}
"""Recorded methods of torch's `ProcessGroup`, with the kind of operation. Not every torch version has all."""
IN_PLACE = ("all_reduce", "broadcast", "reduce")
"""Kinds of operations that send and receive the same tensor."""
_BETWEEN = ("-packages" + os.sep, sysconfig.get_path("stdlib") + os.sep, __file__)
"""Code whose file path contains one of these texts is never a caller: packages, Python's library and this file."""


class CommLog(Protocol):
    """The interface of an object that receives the records; see cluster/comm_ring.py."""

    def name_group(self, name: str, label: str, ranks: Sequence[int]) -> int:
        """Return a group's number in the log."""
        ...

    def place(self, file: str, line: int) -> int:
        """Return the log's number for a line of code."""
        ...

    def begin(
        self, group: int, seq: int, kind: str, dtype: str, sent: int, received: int, peer: int, place: int
    ) -> int: ...

    def wait(self, at: int) -> None: ...

    def end(self, at: int) -> None: ...


class RecordedWork:
    """Wraps a work object. Tells the log when a wait starts and, for CPU tensors, when the work is complete."""

    __slots__ = ("_at", "_ends", "_log", "_work")

    def __init__(self, work: dist.Work, log: CommLog, at: int, ends: bool):
        self._work, self._log, self._at, self._ends = work, log, at, ends

    def wait(self, *given: Any, **named: Any) -> Any:
        """Wait for the work. For CPU tensors, then record the end of the work."""
        self._log.wait(self._at)
        result = self._work.wait(*given, **named)
        if self._ends:
            self._log.end(self._at)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class CommRecorder:
    """Records this process's communication in a log.

    labels: names of groups in the layout; some groups have no name.
    """

    def __init__(self, log: CommLog):
        self.labels: dict[ProcessGroup, str] = {}
        self._log = log
        self._groups: dict[ProcessGroup, tuple[int, Iterator[int], tuple[int, ...]]] = {}
        self._channels: dict[tuple[ProcessGroup, str, int], Iterator[int]] = {}
        self._places: dict[tuple[CodeType, int], int] = {}
        self._passed: dict[CodeType, bool] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record every operation that begins inside the block."""
        # A C++ method from getattr, instead of the class's dict, would not bind to instances when it is restored.
        kept = {name: vars(ProcessGroup)[name] for name in GROUP_METHODS if name in vars(ProcessGroup)}
        for name in kept:
            setattr(ProcessGroup, name, self._seen(getattr(ProcessGroup, name), GROUP_METHODS[name]))
        try:
            yield
        finally:
            for name, method in kept.items():
                setattr(ProcessGroup, name, method)

    def _seen(self, method: Callable, kind: str) -> Callable:
        note = self._note_message if kind in ("send", "receive") else self._note_collective

        def seen(group: ProcessGroup, *given: Any, **named: Any) -> Any:
            at, ends = note(group, kind, given)
            work = method(group, *given, **named)
            return None if work is None else RecordedWork(work, self._log, at, ends)

        return seen

    def _note_collective(self, group: ProcessGroup, kind: str, given: Sequence) -> tuple[int, bool]:
        number, seqs, _ = self._known(group)
        first = given[:1] and _first(given[0])
        received = _count(given[0]) if given else 0
        sent = received if kind in IN_PLACE or len(given) < 2 else _count(given[1])
        dtype = _DTYPE_NAMES.get(first.dtype, "other") if isinstance(first, Tensor) else ""
        at = self._log.begin(number, next(seqs), kind, dtype, sent, received, -1, self._place())
        return at, not isinstance(first, Tensor) or first.device.type == "cpu"

    def _note_message(self, group: ProcessGroup, kind: str, given: Sequence) -> tuple[int, bool]:
        number, _, ranks = self._known(group)
        tensor, peer = given[0][0], given[1]
        key = group, kind, peer
        seqs = self._channels.get(key)
        if seqs is None:
            seqs = self._channels[key] = itertools.count(1)
        count = tensor.numel()
        sent, received = (count, 0) if kind == "send" else (0, count)
        dtype = _DTYPE_NAMES.get(tensor.dtype, "other")
        at = self._log.begin(number, next(seqs), kind, dtype, sent, received, ranks[peer], self._place())
        return at, tensor.device.type == "cpu"

    def _known(self, group: ProcessGroup) -> tuple[int, Iterator[int], tuple[int, ...]]:
        known = self._groups.get(group)
        if known is None:
            ranks = tuple(dist.get_process_group_ranks(group))
            label = self.labels.get(group) or ("all ranks" if group is dist.group.WORLD else group.group_desc)
            number = self._log.name_group(group.group_name, label, ranks)
            known = self._groups[group] = number, itertools.count(1), ranks
        return known

    def _place(self) -> int:
        """Return the log's number for the innermost running line of Sluice's or the user's code."""
        frame: FrameType | None = sys._getframe(3)
        while frame is not None:
            code = frame.f_code
            passed = self._passed.get(code)
            if passed is None:
                passed = self._passed[code] = any(part in code.co_filename for part in _BETWEEN)
            if not passed:
                break
            frame = frame.f_back
        if frame is None:
            return 0
        key = frame.f_code, frame.f_lineno
        place = self._places.get(key)
        if place is None:
            file = frame.f_code.co_filename.removeprefix(f"{ROOT}{os.sep}")
            place = self._places[key] = self._log.place(file, frame.f_lineno)
        return place


_DTYPE_NAMES = {
    value: str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)
}


def _first(tensors: Any) -> Any:
    while isinstance(tensors, list | tuple) and tensors:
        tensors = tensors[0]
    return tensors


def _count(tensors: Any) -> int:
    """Return the number of elements of one tensor or of a list of tensors."""
    if isinstance(tensors, Tensor):
        return tensors.numel()
    return sum(map(_count, tensors)) if isinstance(tensors, list | tuple) else 0
