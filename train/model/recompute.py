"""Recomputation (paper 3.2.3): backward recomputes single outputs or whole layers instead of keeping them.

An operation saves tensors for backward. The contexts of this file intercept those saves, so the computing code does not
change, be it a plain matmul or a hand-written function.

    RecomputedOutputs    keeps a recipe instead of an output that is cheap to compute from something that is kept anyway
                         (a norm's output from the norm's input).
    ReplaceableTensors   keeps saved tensors unchanged, until they are replaced by something that is kept anyway.
    repeatable           keeps only a layer's input. Tensors that its operations save are counted and dropped. When
                         backward first needs one, the layer runs once more, and the tensors saved this time fill the
                         places of the first run, in the same order. So the graph is that of the first run. An ordinary
                         backward, a backward in two parts (zbv, dualpipev) and one that alternates with a forward all
                         use it like any other graph. The second run ends with the last needed tensor; the layer's
                         outputs are not needed.

A layer makes its decisions once. It `remember`s them (which experts, and which rows go where), so that the second run
sends the same rows to the same ranks even if a repeated matmul differs in its last bits.

Contexts can be nested. Tensors that an inner context leaves, and the recipes that it creates, go to the enclosing
context.
"""

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

T = TypeVar("T")


class PackedTensor(Protocol):
    """A substitute that is kept in place of a tensor."""

    def unpack(self) -> "Tensor | PackedTensor":
        """Return the tensor, or the substitute of an inner context."""


P = TypeVar("P", bound=PackedTensor)


class SavedContext:
    """A context that intercepts the tensors that operations save inside it."""

    def __enter__(self) -> None:
        self._hooks = saved_tensors_hooks(_pack, unpacked)
        self._hooks.__enter__()
        self._token = _OPEN.set((*_OPEN.get(), self))

    def __exit__(self, *error: object) -> None:
        _OPEN.reset(self._token)
        self._hooks.__exit__(*error)
        del self._hooks, self._token

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        """Return what to keep instead of the argument."""
        raise NotImplementedError

    def makes(self, tensor: Tensor) -> bool:
        """Whether saving the tensor keeps nothing."""
        return False


_OPEN: ContextVar[tuple[SavedContext, ...]] = ContextVar("open contexts", default=())
"""The contexts around the running code, the outermost first."""


def _pack(tensor: Tensor) -> Tensor | PackedTensor:
    # With its history, an operation's own output would hold the operation, which holds the kept tensor: it would never
    # be freed. A weight is no output, and kept as itself its memory may be freed in the meantime (ZeRO stage 3).
    has_history = tensor.requires_grad and not isinstance(tensor, nn.Parameter)
    return pack_outside(tensor.detach() if has_history else tensor, None)


def pack_outside(saved: Tensor | PackedTensor, context: SavedContext | None) -> Tensor | PackedTensor:
    """Return what all open contexts keep instead of the argument, the innermost first; only contexts around
    `context` if it is given.
    """
    opened = _OPEN.get()
    for one in reversed(opened[: opened.index(context)] if context in opened else opened):
        saved = one.pack(saved)
    return saved


def unpacked(saved: Tensor | PackedTensor) -> Tensor:
    """Return the tensor that was saved."""
    while not isinstance(saved, Tensor):
        saved = saved.unpack()
    return saved


def is_free(tensor: Tensor) -> bool:
    """Whether saving the tensor for backward keeps nothing here, because an enclosing `RecomputedOutputs` recomputes
    it.
    """
    opened = _OPEN.get()
    return bool(opened) and opened[-1].makes(tensor)


class RecomputedOutputs(SavedContext):
    """Context in which saving one of `outputs` for backward keeps only `function`, which recomputes them all.

    function: called without gradient on `sources`, returns one tensor or a tuple with the values and strides of
    outputs. It may be called once per backward pass; all tensors saved under one context share the result. A tensor
    counts as an output if it starts at the same address, so views from the first element (reshapes, transposes) count
    too.
    """

    def __init__(
        self, function: Callable[..., Tensor | tuple[Tensor, ...]], sources: tuple[Tensor, ...], *outputs: Tensor
    ):
        self._function = function
        self._sources = [pack_outside(source.detach(), self) for source in sources]
        self._index = {_address(output): (i, output.numel()) for i, output in enumerate(outputs)}
        self._saved = 0
        self._waiting = 0
        self._made: tuple[Tensor, ...] | None = None

    def makes(self, tensor: Tensor) -> bool:
        return self._output(tensor) is not None

    def _output(self, tensor: Tensor) -> int | None:
        """Return which output the tensor is."""
        index, numel = self._index.get(_address(tensor), (None, 0))
        return index if 0 < tensor.numel() <= numel else None

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        if not isinstance(saved, Tensor) or (index := self._output(saved)) is None:
            return saved
        self._saved += 1
        return _Again(self, index, saved.size(), saved.stride())

    def make(self, index: int, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """Return an output, or a view of it."""
        if self._made is None:
            with torch.no_grad():
                made = self._function(*map(unpacked, self._sources))
            self._made = made if isinstance(made, tuple) else (made,)
            self._waiting = self._saved
        base = self._made[index]
        self._waiting -= 1
        if self._waiting == 0:  # the last reader: free the result; another backward pass recomputes it
            self._made = None
        return base.as_strided(size, stride, base.storage_offset())


class _Again:
    """One of the outputs of a `RecomputedOutputs`."""

    def __init__(self, context: RecomputedOutputs, *place: Any):
        self._context, self._place = context, place

    def unpack(self) -> Tensor:
        return self._context.make(*self._place)


class ReplaceableTensors(SavedContext):
    """Context after which something else may replace the tensors that were saved inside."""

    def __init__(self) -> None:
        self._slots: list[weakref.ref[Slot]] = []

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        if not isinstance(saved, Tensor):
            return saved
        slot = Slot(saved)
        self._slots.append(weakref.ref(slot))
        return slot

    def replace(self, tensor: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> None:
        """Keep `make` and its sources wherever exactly this tensor was saved; `make` returns nearly equal values in
        its shape.
        """
        kept = [pack_outside(source.detach(), self) for source in sources]
        for slot in filter(None, (ref() for ref in self._slots)):
            if slot.holds(tensor):
                slot.replace(lambda: make(*map(unpacked, kept)))


class Slot:
    """A saved tensor, or a function that returns it."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor
        """None if a function returns it."""
        self._stride = tensor.stride()

    def holds(self, tensor: Tensor) -> bool:
        held = self.tensor
        return held is not None and _address(held) == _address(tensor) and held.shape == tensor.shape

    def replace(self, make: Callable[[], Tensor]) -> None:
        self.tensor, self._make = None, make

    def hand_over(self, pack: Callable[[Tensor], P]) -> P:
        """Keep pack(tensor) instead of the tensor, and return it."""
        assert self.tensor is not None
        packed = pack(self.tensor)
        self.replace(lambda: unpacked(packed))
        return packed

    def unpack(self) -> Tensor:
        if self.tensor is not None:
            return self.tensor
        with torch.no_grad():
            made = self._make()
        if made.stride() == self._stride:
            return made
        return torch.empty_strided(made.shape, self._stride, dtype=made.dtype, device=made.device).copy_(made)


def repeatable(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x), keeping for backward only x and the decisions that function `remember`s."""
    with _FirstRun(function, x):
        return function(x)


class _FirstRun(SavedContext):
    """Counts the saved tensors, and drops them."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor):
        self._function = function
        self._x: Tensor | PackedTensor | None = pack_outside(x.detach(), self)
        self._places: list[weakref.ref[_Place]] = []
        self.decisions: list[Any] = []

    def pack(self, saved: Tensor | PackedTensor) -> "_Place":
        place = _Place(self)
        self._places.append(weakref.ref(place))
        return place

    def repeat(self) -> None:
        """Run the layer again, and fill the places that backward still holds."""
        assert self._x is not None, "a layer runs again once"
        x, self._x = unpacked(self._x).detach().requires_grad_(), None
        second = _SecondRun(self._places, self.decisions)
        token = _OPEN.set(())  # contexts around the code that runs backward do not apply
        try:
            with torch.enable_grad(), second:
                self._function(x)
        except _AllThere:
            pass
        finally:
            _OPEN.reset(token)
        assert second.done, "a layer saved less when it ran again"


class _Place:
    """Represents one tensor that an operation of the layer saved."""

    def __init__(self, run: _FirstRun):
        self._run: _FirstRun | None = run
        self.value: Tensor | PackedTensor | None = None

    def unpack(self) -> Tensor | PackedTensor:
        if self._run is not None and self.value is None:
            self._run.repeat()
        self._run = None
        assert self.value is not None
        return self.value


class _SecondRun(SavedContext):
    """Passes saved tensors to the places of the first run."""

    def __init__(self, places: "list[weakref.ref[_Place]]", decisions: list[Any]):
        self._places, self._decisions = iter(places), iter(decisions)
        self._left = len(places)

    @property
    def done(self) -> bool:
        return self._left == 0

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        if (place := next(self._places)()) is not None:
            place.value = saved
        self._left -= 1
        if self.done:
            raise _AllThere
        return saved

    def decision(self) -> Any:
        return next(self._decisions)


class _AllThere(Exception):
    """A second run has filled all places."""


def is_repeated() -> bool:
    """Whether the running code is the second run of a layer: its values are counted already."""
    return isinstance(_OPEN.get()[0], _SecondRun) if _OPEN.get() else False


def remember(decision: T) -> T:
    """Store this decision, so that `recall` returns it when the layer runs again."""
    for context in _OPEN.get():
        if isinstance(context, _FirstRun):
            context.decisions.append(decision)
    return decision


def recall() -> Any:
    """Return the next decision of the first run, in the order in which it remembered them; None outside a second
    run.
    """
    innermost = next(iter(_OPEN.get()), None)
    return innermost.decision() if isinstance(innermost, _SecondRun) else None


def _address(tensor: Tensor) -> tuple[int, int | torch.SymInt]:
    """Return where the tensor starts; also on the meta device, which has no memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()
