"""Activations in the host's memory, between the forward that makes them and the backward that reads them.

What a part of the model keeps goes out as one batch when the part ends, and comes back as one, in the reverse order. The order of
the pipeline's actions says when:

    out     A copy starts as the batch is sent. The device's memory is let go of when the next batch of the action is sent, or
            when the next action ends: until then the copy has computing beside it, and a backward that comes at once takes
            back what has not gone yet.
    back    The newest batch of a micro-batch starts to come back one action ahead of the backward that reads it. When backward
            reads a batch, the one before it starts: two are on the device at a time.

Copies have two streams of the device, one each way, as its link works both ways at once. They wait for the computing and it for
them by events, so the host waits for nothing. A copy's memory is let go of where the computing has waited for the copy, so the
allocator needs to know of no second stream. On a CPU the same code copies where it stands.

The host's memory is taken in pages, pinned for a GPU, which are kept and used again: experts' rows differ from one micro-batch
to the next, so buffers of fitting sizes would pile up.
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
"""Bytes at whose multiples tensors begin in a batch."""


class HostMemoryFull(RuntimeError):
    """The host has no more memory for activations."""


def page_bytes(sizes: Iterable[int], kind: str) -> int:
    """Bytes of the pages that a batch of tensors of so many bytes takes. kind: of the device."""
    page = _size_of_page(kind)
    return -(-sum(map(_aligned, sizes)) // page) * page


def _size_of_page(kind: str) -> int:
    return THRESHOLDS.gpu_page_bytes if kind == "cuda" else THRESHOLDS.host_page_bytes


def reads(action: Action, one_piece: Collection[int] = ()) -> list[tuple[int, int]]:
    """Stage and micro-batch whose activations an action reads before any other does. one_piece: stages whose backward cannot be
    split.
    """
    return [
        (part.stage, part.micro_batch)
        for part in action.halves or (action,)
        if what_runs(part, part.stage in one_piece) in ("B", "I")
    ]


class HostStore:
    """The store of one rank. Copies between its device and pages of its host; see above.

    Outside of actions a batch comes back when it is read.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pages = _Pages(device.type)
        self._out, self._back = _Copies(device), _Copies(device)
        self._reads: dict[tuple[str, int, int], tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
        """By action what it reads, and what the one after it does."""
        self._batches: dict[tuple[int, int], list[_Batch]] = {}
        """By stage and micro-batch, until they are read."""
        self._current: tuple[int, int] | None = None
        """Stage and micro-batch of the forward that runs."""
        self._leaving: list[_Batch] = []
        """What this action sends out; at most one."""
        self._left_over: list[_Batch] = []
        """What the action before has left."""
        self.sent_bytes = 0
        """What went out since this object was made."""

    @property
    def taken_bytes(self) -> int:
        """Memory of the host."""
        return self._pages.taken

    def start(self, actions: Iterable[Action], one_piece: Collection[int] = ()) -> None:
        """A step begins, of these actions. one_piece: as in `reads`."""
        runs = [action for action in actions if what_runs(action, action.stage in one_piece)]
        read = [*(reads(action, one_piece) for action in runs), []]
        self._reads = {action[:3]: pair for action, pair in zip(runs, pairwise(read), strict=True)}

    @contextmanager
    def acting(self, kind: str, stage: int, micro_batch: int) -> Iterator[None]:
        """Around one action of the step; of a pair its forward half is given."""
        if (kind, stage, micro_batch) not in self._reads:  # nothing runs
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
                batch.wait()  # also of those that nothing was read of, before others have their memory

    def send(self, storages: Sequence[Tensor]) -> list["_Piece"]:
        """Begin to bring storages, flat and in bytes, to the host. What is returned for each gives it back."""
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
        """Let computing that comes now have this batch, and begin to fetch the one before it."""
        self._fetch(batch)
        batch.wait()
        before, batch.before = batch.before, None
        if before is not None:
            self._fetch(before)

    def _fetch(self, batch: "_Batch") -> None:
        if batch.is_back:
            return
        batch.is_back = True
        if not batch.held:  # else it has not left
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
                continue  # a backward came at once
            pieces = batch.held
            batch.wait()
            for piece in pieces:
                piece.tensor = None


class _Place(NamedTuple):
    """Bytes begin to end of a storage, and where they lie on the host."""

    begin: int
    end: int
    host: Tensor


class _Piece:
    """One storage of a batch."""

    def __init__(self, store: HostStore, tensor: Tensor | None):
        self._store, self.tensor = store, tensor
        self.batch: _Batch

    def fetched(self) -> Tensor:
        """The storage, flat and in bytes, for computing that comes now."""
        self._store.read(self.batch)
        assert self.tensor is not None
        return self.tensor


class _Batch:
    """What was sent together."""

    def __init__(self, pieces: list[_Piece], before: "_Batch | None", pages: "_Pages"):
        self.held = pieces
        """Pieces as long as they are on their way, out or back: the device's memory must not be let go of under a copy."""
        self.pieces = [ref(piece) for piece in pieces]
        """Those that backward still wants."""
        self.before = before
        """The one that the same forward sent before, until this one is read."""
        self.is_back = False
        self.places: list[list[_Place]] = []
        self.pages: list[_Page] = []
        self.copied: torch.cuda.Event | None = None
        """When the last copy of it is through."""
        self._all_pages = pages
        for piece in pieces:
            piece.batch = self

    def wait(self) -> None:
        """Let computing wait for the last copy; what comes after may have the memory."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
        self.held = []

    def give_pages(self) -> None:
        """Let others have the pages, after the last copy."""
        self.places = []
        for page in self.pages:
            page.read = self.copied
        self._all_pages.free += self.pages
        self.pages = []

    def __del__(self):
        self.give_pages()  # of a graph that fell without a backward


class _Page:
    """host: its bytes. read: when the copy back is through that read it last."""

    def __init__(self, host: Tensor):
        self.host = host
        self.read: torch.cuda.Event | None = None


class _Pages:
    """The host's memory of a rank."""

    def __init__(self, kind: str):
        self._kind, self._size = kind, _size_of_page(kind)
        self.free: deque[_Page] = deque()
        self.taken = 0

    def take(self, size: int) -> list[_Page]:
        """Pages for so many bytes. What is copied to them on the current stream comes after what was read from them."""
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
    """The copies of a device in one direction."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after_computing(self) -> Iterator[None]:
        """Copies inside wait for what was computed up to now."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """Their end up to here."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _places(sizes: Iterable[int], pages: Sequence[_Page]) -> Iterator[list[_Place]]:
    """Where storages of these sizes lie, one behind the other."""
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
