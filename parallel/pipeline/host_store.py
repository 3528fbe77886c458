"""Stores activations in host memory from the forward that computes them to the backward that reads them.

When the forward of a part of the model ends, its saved activations are copied to the host as one batch. Backward reads
the batches in reverse order:

    to the host      The copy starts at once. The batch's device memory is freed when the same pipeline action sends
                     another batch. The last batch of an action is freed when the next action ends, so a backward that
                     follows at once needs no copy to the device.
    to the device    The newest batch of a micro-batch is copied during the action before this micro-batch's backward.
                     When backward reads a batch, the copy of the previous batch starts. So two batches are on the
                     device at a time.

Each direction has its own stream. Events order copies and compute, so the host never waits. Memory is freed only after
the compute stream has waited for the copy of this memory.

Host memory is allocated in pages (pinned for a GPU), which are reused.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from conf.thresholds import THRESHOLDS
from parallel.pipeline.orders import Action
from parallel.pipeline.simulate import what_runs

ALIGNMENT = 64
"""Alignment in bytes of the tensors within a batch."""


class HostMemoryFull(RuntimeError):
    """The host has no more memory for activations."""


def page_bytes(sizes: Iterable[int], kind: str) -> int:
    """Return the number of bytes that a batch's pages take.

    sizes: number of bytes of each tensor. kind: device type, such as cuda.
    """
    page = _size_of_page(kind)
    return -(-sum(map(_aligned, sizes)) // page) * page


def _size_of_page(kind: str) -> int:
    return THRESHOLDS.gpu_page_bytes if kind == "cuda" else THRESHOLDS.host_page_bytes


def reads(action: Action, one_piece: Collection[int] = ()) -> list[tuple[int, int]]:
    """Return (stage, micro-batch) of the activations that this action is the first to read.

    one_piece: stages whose backward cannot be split into a backward of inputs and a backward of weights.
    """
    return [
        (part.stage, part.micro_batch)
        for part in action.halves or (action,)
        if what_runs(part, part.stage in one_piece) in ("B", "I")
    ]


class HostStore:
    """The activations of one rank, copied to and from pages of host memory.

    Outside of `acting`, a batch is copied back only when backward reads it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pages = _Pages(device.type)
        self._out, self._back = _Copies(device), _Copies(device)
        self._reads: dict[tuple[str, int, int], tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
        """For each action: (stage, micro-batch) of the activations that it reads, and of those that the next action
        reads."""
        self._batches: dict[tuple[int, int], list[_Batch]] = {}
        """Unread batches of activations, by stage and micro-batch."""
        self._current: tuple[int, int] | None = None
        """Stage and micro-batch of the running forward, if any."""
        self._leaving: list[_Batch] = []
        """The current action's batch, until its device memory is freed."""
        self._left_over: list[_Batch] = []
        """The previous action's batches, until their device memory is freed."""
        self.sent_bytes = 0
        """Number of bytes sent to the host since construction."""

    @property
    def taken_bytes(self) -> int:
        """Bytes of host memory that the pages take."""
        return self._pages.taken

    def start(self, actions: Iterable[Action], one_piece: Collection[int] = ()) -> None:
        """Start a step that consists of these actions. one_piece: see `reads`."""
        runs = [action for action in actions if what_runs(action, action.stage in one_piece)]
        read = [*(reads(action, one_piece) for action in runs), []]
        self._reads = {action[:3]: pair for action, pair in zip(runs, pairwise(read), strict=True)}

    @contextmanager
    def acting(self, kind: str, stage: int, micro_batch: int) -> Iterator[None]:
        """Run one action in the block. For an overlapped pair, pass stage and micro_batch of its forward."""
        if (kind, stage, micro_batch) not in self._reads:  # for an action that computes nothing
            yield
            return
        now, then = self._reads[kind, stage, micro_batch]
        if kind in ("F", "FB"):
            self._current = stage, micro_batch
            self._batches[self._current] = []
        for key in then:
            if self._batches.get(key):
                self._fetch(self._batches[key][-1])
        yield
        self._let_go(self._left_over)
        self._left_over, self._leaving, self._current = self._leaving, [], None
        for key in now:
            for batch in self._batches.pop(key):
                # Also wait for unread batches, before their memory is reused.
                batch.wait()

    def send(self, storages: Sequence[Tensor]) -> list["_Piece"]:
        """Start to copy storages (flat tensors of bytes) to the host.

        Returns one object per storage. The object's `fetched` returns the storage on the device.
        """
        self._let_go(self._leaving)
        sizes = list(map(len, storages))
        before = [] if self._current is None else self._batches[self._current]
        batch = _Batch([_Piece(self, storage) for storage in storages], before[-1] if before else None, self._pages)
        with self._out.after_computing():
            pages = self._pages.take(sum(map(_aligned, sizes)))
            batch.places = list(_places(sizes, pages))
            for storage, places in zip(storages, batch.places, strict=True):
                for place in places:
                    place.host.copy_(storage[place.begin : place.end], non_blocking=True)
            batch.pages, batch.copied = pages, self._out.mark()
        before.append(batch)
        self._leaving = [batch]
        self.sent_bytes += sum(sizes)
        return batch.held

    def read(self, batch: "_Batch") -> None:
        """Make later compute wait until this batch is on the device. Start to copy back the previous batch."""
        self._fetch(batch)
        batch.wait()
        before, batch.before = batch.before, None
        if before is not None:
            self._fetch(before)

    def _fetch(self, batch: "_Batch") -> None:
        if batch.is_back:
            return
        batch.is_back = True
        if not batch.held:  # otherwise the batch is still on the device
            pieces = [
                (piece, places)
                for one, places in zip(batch.pieces, batch.places, strict=True)
                if (piece := one()) is not None
            ]
            tensors = [torch.empty(places[-1].end, dtype=torch.uint8, device=self._device) for _, places in pieces]
            with self._back.after_computing():
                for (piece, places), tensor in zip(pieces, tensors, strict=True):
                    piece.tensor = tensor
                    for place in places:
                        tensor[place.begin : place.end].copy_(place.host, non_blocking=True)
                batch.copied = self._back.mark()
            batch.held = [piece for piece, _ in pieces]
        batch.give_pages()

    def _let_go(self, batches: list["_Batch"]) -> None:
        for batch in batches:
            if batch.is_back:
                continue  # a backward that followed at once reads it on the device
            pieces = batch.held
            batch.wait()
            for piece in pieces:
                piece.tensor = None


class _Place(NamedTuple):
    """Bytes `begin` to `end` of a storage, copied to `host`."""

    begin: int
    end: int
    host: Tensor


class _Piece:
    """One torch storage in a batch of activations."""

    def __init__(self, store: HostStore, tensor: Tensor | None):
        self._store, self.tensor = store, tensor
        self.batch: _Batch

    def fetched(self) -> Tensor:
        """Return the storage's bytes on the device, copied back if necessary."""
        self._store.read(self.batch)
        assert self.tensor is not None
        return self.tensor


class _Batch:
    """Storages of activations that are copied to the host together."""

    def __init__(self, pieces: list[_Piece], before: "_Batch | None", pages: "_Pages"):
        self.held = pieces
        """The batch's storages during a copy, to keep their device memory."""
        self.pieces = [ref(piece) for piece in pieces]
        """Weak references to the storages, empty once backward needs none."""
        self.before = before
        """The batch before this batch in the same forward; None if this batch is the first, or has been read by
        backward."""
        self.is_back = False
        self.places: list[list[_Place]] = []
        self.pages: list[_Page] = []
        self.copied: torch.cuda.Event | None = None
        """Event after the batch's last copy."""
        self._all_pages = pages
        for piece in pieces:
            piece.batch = self

    def wait(self) -> None:
        """Make the compute stream wait for the last copy, so that later work may reuse the memory."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
        self.held = []

    def give_pages(self) -> None:
        """Release the batch's pages for reuse after its last copy."""
        self.places = []
        for page in self.pages:
            page.read = self.copied
        self._all_pages.free += self.pages
        self.pages = []

    def __del__(self):
        self.give_pages()  # for a batch whose graph was dropped without a backward


class _Page:
    """A page of host memory. read: event after the last copy that reads it."""

    def __init__(self, host: Tensor):
        self.host = host
        self.read: torch.cuda.Event | None = None


class _Pages:
    """A rank's host memory, in pages of equal length."""

    def __init__(self, kind: str):
        self._kind, self._size = kind, _size_of_page(kind)
        self.free: deque[_Page] = deque()
        self.taken = 0

    def take(self, size: int) -> list[_Page]:
        """Return pages for `size` bytes. New copies to these pages wait until earlier copies from the pages are
        complete."""
        pages = [self.free.popleft() if self.free else self._make() for _ in range(-(-size // self._size))]
        for event in {page.read for page in pages if page.read is not None}:
            torch.cuda.current_stream().wait_event(event)
        return pages

    def _make(self) -> _Page:
        try:
            page = _Page(torch.empty(self._size, dtype=torch.uint8, pin_memory=self._kind == "cuda"))
        except RuntimeError as error:
            raise HostMemoryFull(
                f"no page of {self._size} bytes beside {self.taken} bytes of this rank: {error}"
            ) from error
        self.taken += self._size
        return page


class _Copies:
    """The stream for copies to the host, or for copies back."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after_computing(self) -> Iterator[None]:
        """Run the block's copies on this stream, after all compute launched before the block."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """Return an event after all launched copies; None on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _places(sizes: Iterable[int], pages: Sequence[_Page]) -> Iterator[list[_Place]]:
    """For each storage, yield where its bytes are in the pages. The storages follow one another in the pages."""
    at = 0
    for size in sizes:
        places, begin = [], 0
        while begin < size:
            number, offset = divmod(at + begin, len(pages[0].host))
            end = min(size, begin + len(pages[0].host) - offset)
            places.append(_Place(begin, end, pages[number].host[offset : offset + end - begin]))
            begin = end
        yield places
        at += _aligned(size)
