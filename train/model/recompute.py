"""Recomputation (paper 3.2.3): backward recomputes single outputs or complete layers instead of saving them.

The context managers of this file (called contexts below) intercept the tensors that an operation saves for backward.

    RecomputedOutputs    saves a function instead of an output that is cheap to compute from a saved tensor, such as a
                         norm's output from its input.
    ReplaceableTensors   saves tensors unchanged. A function of other saved tensors can replace a tensor later.
    repeatable           saves only the input of a layer. It counts and drops the tensors that the operations save. When
                         backward needs the first of them, the layer runs a second time. Its tensors replace the dropped
                         tensors, in the same order, in the graph of the first run. The second run stops after the last
                         needed tensor.

Only the first run of a layer chooses experts and destination ranks, and stores them with `remember`. So the second run
sends the same rows to the same ranks, even if a repeated matmul differs in its last bits.

Contexts can be nested. The enclosing context gets the tensors that the inner context does not intercept, and the
objects that the inner context saves.
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
    """An object that autograd saves instead of a tensor."""

    def unpack(self) -> "Tensor | PackedTensor":
        """Return the tensor, or the object that an enclosing context saved instead of the tensor."""


P = TypeVar("P", bound=PackedTensor)


class SavedContext:
    """A context manager that intercepts the tensors that operations save for backward."""

    def __enter__(self) -> None:
        self._hooks = saved_tensors_hooks(_pack, unpacked)
        self._hooks.__enter__()
        self._token = _OPEN.set((*_OPEN.get(), self))

    def __exit__(self, *error: object) -> None:
        _OPEN.reset(self._token)
        self._hooks.__exit__(*error)
        del self._hooks, self._token

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        """Return what autograd shall save instead of `saved`."""
        raise NotImplementedError

    def makes(self, tensor: Tensor) -> bool:
        """Return whether this context recomputes the tensor instead of saving it."""
        return False


_OPEN: ContextVar[tuple[SavedContext, ...]] = ContextVar("open contexts", default=())
"""The `SavedContext` objects around the running code, outermost first."""


def _pack(tensor: Tensor) -> Tensor | PackedTensor:
    # Detach an operation's own output. Otherwise the operation and its saved output would refer to each other, and
    # never be freed. Save a weight itself, so that ZeRO 3 can free its memory before backward.
    has_history = tensor.requires_grad and not isinstance(tensor, nn.Parameter)
    return pack_outside(tensor.detach() if has_history else tensor, None)


def pack_outside(saved: Tensor | PackedTensor, context: SavedContext | None) -> Tensor | PackedTensor:
    """Ask the open contexts, innermost first, what to save instead of `saved`. Return the answer.

    context: ask only contexts around this one; None: ask all.
    """
    opened = _OPEN.get()
    for one in reversed(opened[: opened.index(context)] if context in opened else opened):
        saved = one.pack(saved)
    return saved


def unpacked(saved: Tensor | PackedTensor) -> Tensor:
    """Return the tensor that an operation saved, from its saved substitute."""
    while not isinstance(saved, Tensor):
        saved = saved.unpack()
    return saved


def is_free(tensor: Tensor) -> bool:
    """Return whether the innermost open `RecomputedOutputs` recomputes the tensor."""
    opened = _OPEN.get()
    return bool(opened) and opened[-1].makes(tensor)


class RecomputedOutputs(SavedContext):
    """A context manager that saves `function` instead of each of `outputs`.

    Views of an output are recomputed too, if they start at its first element (reshapes, transposes).

    function: computes the outputs from `sources`, without gradient. It returns one tensor or a tuple, with the values
    and strides of the outputs. Each backward pass may call it again.
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
        """Return the index of the output at this address, or None."""
        index, numel = self._index.get(_address(tensor), (None, 0))
        return index if 0 < tensor.numel() <= numel else None

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        if not isinstance(saved, Tensor) or (index := self._output(saved)) is None:
            return saved
        self._saved += 1
        return _Again(self, index, saved.size(), saved.stride())

    def make(self, index: int, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """Return the output with this index, with this size and stride."""
        if self._made is None:
            with torch.no_grad():
                made = self._function(*map(unpacked, self._sources))
            self._made = made if isinstance(made, tuple) else (made,)
            self._waiting = self._saved
        base = self._made[index]
        self._waiting -= 1
        if self._waiting == 0:  # all saved tensors are read; another backward pass would compute again
            self._made = None
        return base.as_strided(size, stride, base.storage_offset())


class _Again:
    """A saved reference to one output of a `RecomputedOutputs`."""

    def __init__(self, context: RecomputedOutputs, *place: Any):
        self._context, self._place = context, place

    def unpack(self) -> Tensor:
        return self._context.make(*self._place)


class ReplaceableTensors(SavedContext):
    """A context manager that saves tensors unchanged. They can be replaced later."""

    def __init__(self) -> None:
        self._slots: list[weakref.ref[Slot]] = []

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        if not isinstance(saved, Tensor):
            return saved
        slot = Slot(saved)
        self._slots.append(weakref.ref(slot))
        return slot

    def replace(self, tensor: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> None:
        """Save the function `make` instead of this tensor, wherever an operation saved exactly this tensor.

        make: computes nearly equal values of the same shape from `sources`.
        """
        kept = [pack_outside(source.detach(), self) for source in sources]
        for slot in filter(None, (ref() for ref in self._slots)):
            if slot.holds(tensor):
                slot.replace(lambda: make(*map(unpacked, kept)))


class Slot:
    """A saved tensor, or a function that computes it."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor
        """The saved tensor; None if a function computes it."""
        self._stride = tensor.stride()

    def holds(self, tensor: Tensor) -> bool:
        held = self.tensor
        return held is not None and _address(held) == _address(tensor) and held.shape == tensor.shape

    def replace(self, make: Callable[[], Tensor]) -> None:
        self.tensor, self._make = None, make

    def hand_over(self, pack: Callable[[Tensor], P]) -> P:
        """Store pack(tensor) instead of the tensor, and return pack(tensor)."""
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
    """Return function(x). Saves only x and the decisions stored with `remember`."""
    with _FirstRun(function, x):
        return function(x)


class _FirstRun(SavedContext):
    """The first run of a layer, which drops saved tensors."""

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
        """Run the layer again, to fill the first run's placeholders."""
        assert self._x is not None, "a layer runs again once"
        x, self._x = unpacked(self._x).detach().requires_grad_(), None
        second = _SecondRun(self._places, self.decisions)
        token = _OPEN.set(())  # contexts around backward must not act on the second run
        try:
            with torch.enable_grad(), second:
                self._function(x)
        except _AllThere:
            pass
        finally:
            _OPEN.reset(token)
        assert second.done, "a layer saved less when it ran again"


class _Place:
    """A placeholder for one tensor that the first run of a layer saved."""

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
    """A layer's second run, which fills the first run's placeholders."""

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
    """Raised to end a second run when all placeholders are filled."""


def is_repeated() -> bool:
    """Return whether a layer's second run is in progress. Counters must ignore this run."""
    return isinstance(_OPEN.get()[0], _SecondRun) if _OPEN.get() else False


def remember(decision: T) -> T:
    """Store a decision, which `recall` returns in the layer's second run."""
    for context in _OPEN.get():
        if isinstance(context, _FirstRun):
            context.decisions.append(decision)
    return decision


def recall() -> Any:
    """Return the next decision that the layer's first run stored; None outside a second run."""
    innermost = next(iter(_OPEN.get()), None)
    return innermost.decision() if isinstance(innermost, _SecondRun) else None


def _address(tensor: Tensor) -> tuple[int, int | torch.SymInt]:
    """Return an identifier of the start of the tensor's memory, also on the meta device."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()
