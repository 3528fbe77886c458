"""Recomputation (paper 3.2.3): what backward makes again instead of keeping, single outputs or whole layers.

An operation saves tensors for backward. The contexts of this file stand between it and what it saves, so the code that
computes does not change, be it a plain product or a hand-written function.

    Recomputed       an output that is cheap to make from something that is kept anyway (a norm's output from the norm's
                     input) is not kept: a recipe is, in its place.
    Replaceable      what is saved stays as it is, until something that is kept anyway is found to stand for it.
    repeatable       a layer keeps its input alone. What its operations save is counted and let go. When backward first
                     wants some of it, the layer runs once more, and what its operations save this time goes where the
                     first was wanted, in the same order. So the graph is that of the first run, and an ordinary
                     backward, one in two parts (zbv, dualpipev) and one that takes turns with a forward all work on
                     it as on any other. The second run ends with the last thing that is wanted: outputs are not.

What a layer decides it decides once: it `remember`s its decisions (which experts, and which rows go where), so that the
second run sends the same rows to the same ranks whatever the bits of a second product are.

Contexts lie in each other. What an inner one leaves, and the recipes it makes, go to the one around it.
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
    """What is kept in place of a tensor."""

    def unpack(self) -> "Tensor | PackedTensor":
        """The tensor, or what it was in the hands of a context further in."""


P = TypeVar("P", bound=PackedTensor)


class SavedContext:
    """A context that sees what operations save inside it."""

    def __enter__(self) -> None:
        self._hooks = saved_tensors_hooks(_pack, unpacked)
        self._hooks.__enter__()
        self._token = _OPEN.set((*_OPEN.get(), self))

    def __exit__(self, *error: object) -> None:
        _OPEN.reset(self._token)
        self._hooks.__exit__(*error)
        del self._hooks, self._token

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        """What to keep in place of this."""
        raise NotImplementedError

    def makes(self, tensor: Tensor) -> bool:
        """Whether saving the tensor keeps nothing."""
        return False


_OPEN: ContextVar[tuple[SavedContext, ...]] = ContextVar("open contexts", default=())
"""The contexts around the running code, from the outermost on."""


def _pack(tensor: Tensor) -> Tensor | PackedTensor:
    # With its history an operation's own output would hold the operation, which holds what is kept: never to be freed.
    # A weight is no output, and as itself it may be let go of in the meantime (ZeRO stage 3).
    has_history = tensor.requires_grad and not isinstance(tensor, nn.Parameter)
    return pack_outside(tensor.detach() if has_history else tensor, None)


def pack_outside(saved: Tensor | PackedTensor, context: SavedContext | None) -> Tensor | PackedTensor:
    """What all open contexts keep in place of this, from the innermost on; of those around `context` where it is given."""
    opened = _OPEN.get()
    for one in reversed(opened[: opened.index(context)] if context in opened else opened):
        saved = one.pack(saved)
    return saved


def unpacked(saved: Tensor | PackedTensor) -> Tensor:
    """The tensor that was saved."""
    while not isinstance(saved, Tensor):
        saved = saved.unpack()
    return saved


def is_free(tensor: Tensor) -> bool:
    """Whether saving the tensor for backward keeps nothing here, because a `RecomputedOutputs` around makes it again."""
    opened = _OPEN.get()
    return bool(opened) and opened[-1].makes(tensor)


class RecomputedOutputs(SavedContext):
    """Context in which saving one of `outputs` for backward keeps only `function`, which makes them all again.

    function: called without gradient on `sources`, returns one tensor or a tuple with the values and strides of outputs. It
    may be called once per backward pass; all that was saved under one context shares the result. A tensor counts as one of
    the outputs when it starts at the same address, so views from the first element (reshapes, transposes) do too.
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
        """Which of the outputs the tensor is."""
        index, numel = self._index.get(_address(tensor), (None, 0))
        return index if 0 < tensor.numel() <= numel else None

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        if not isinstance(saved, Tensor) or (index := self._output(saved)) is None:
            return saved
        self._saved += 1
        return _Again(self, index, saved.size(), saved.stride())

    def make(self, index: int, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """An output, or a view of it."""
        if self._made is None:
            with torch.no_grad():
                made = self._function(*map(unpacked, self._sources))
            self._made = made if isinstance(made, tuple) else (made,)
            self._waiting = self._saved
        base = self._made[index]
        self._waiting -= 1
        if self._waiting == 0:  # the last reader: free the result, a further backward pass makes it again
            self._made = None
        return base.as_strided(size, stride, base.storage_offset())


class _Again:
    """One of the outputs of a `RecomputedOutputs`."""

    def __init__(self, context: RecomputedOutputs, *place: Any):
        self._context, self._place = context, place

    def unpack(self) -> Tensor:
        return self._context.make(*self._place)


class ReplaceableTensors(SavedContext):
    """Context after which something else may be kept in place of what was saved inside."""

    def __init__(self) -> None:
        self._slots: list[weakref.ref[Slot]] = []

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        if not isinstance(saved, Tensor):
            return saved
        slot = Slot(saved)
        self._slots.append(weakref.ref(slot))
        return slot

    def replace(self, tensor: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> None:
        """Keep `make`, which gives nearly its values in its shape, and what it takes, where exactly this tensor was saved."""
        kept = [pack_outside(source.detach(), self) for source in sources]
        for slot in filter(None, (ref() for ref in self._slots)):
            if slot.holds(tensor):
                slot.replace(lambda: make(*map(unpacked, kept)))


class Slot:
    """A tensor that was saved, or what gives it."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor
        """None where something else gives it."""
        self._stride = tensor.stride()

    def holds(self, tensor: Tensor) -> bool:
        held = self.tensor
        return held is not None and _address(held) == _address(tensor) and held.shape == tensor.shape

    def replace(self, make: Callable[[], Tensor]) -> None:
        self.tensor, self._make = None, make

    def hand_over(self, pack: Callable[[Tensor], P]) -> P:
        """Keep what this makes of the tensor in its place."""
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
    """function(x), of which only x is kept for backward, and what function `remember`s."""
    with _FirstRun(function, x):
        return function(x)


class _FirstRun(SavedContext):
    """Counts what is saved, and lets it go."""

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
        """Run the layer again, and fill the places that backward still has."""
        assert self._x is not None, "a layer runs again once"
        x, self._x = unpacked(self._x).detach().requires_grad_(), None
        second = _SecondRun(self._places, self.decisions)
        token = _OPEN.set(())  # those around the code that runs backward have no part in it
        try:
            with torch.enable_grad(), second:
                self._function(x)
        except _AllThere:
            pass
        finally:
            _OPEN.reset(token)
        assert second.done, "a layer saved less when it ran again"


class _Place:
    """Stands for one tensor that an operation of the layer saved."""

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
    """Hands what is saved to the places of the first run."""

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
    """Nothing more is wanted of a second run."""


def is_repeated() -> bool:
    """Whether the running code is the second run of a layer: what it counts is counted already."""
    return isinstance(_OPEN.get()[0], _SecondRun) if _OPEN.get() else False


def remember(decision: T) -> T:
    """Give this decision to `recall` when the layer runs again."""
    for context in _OPEN.get():
        if isinstance(context, _FirstRun):
            context.decisions.append(decision)
    return decision


def recall() -> Any:
    """The next decision of the first run, in the order in which it remembered them; None where this is no second run."""
    innermost = next(iter(_OPEN.get()), None)
    return innermost.decision() if isinstance(innermost, _SecondRun) else None


def _address(tensor: Tensor) -> tuple[int, int | torch.SymInt]:
    """Where the tensor starts; on the meta device too, where there is no memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()
