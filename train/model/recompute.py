"""Recomputation (paper 3.2.3): backward recomputes single outputs or complete layers instead of saving them.

An operation saves tensors for backward. The contexts of this file intercept these saves. So the code of the operation
does not change, whether it is a plain matmul or a custom Function.

    RecomputedOutputs    saves a function instead of an output, if the output is cheap to compute from a tensor that is
                         saved anyway. For example, a norm's output is recomputed from the norm's input.
    ReplaceableTensors   saves tensors unchanged, until a function replaces them that uses tensors that are saved anyway.
    repeatable           saves only the input of a layer. Tensors that its operations save are counted and dropped. When
                         backward needs the first of them, the layer runs a second time. The tensors of the second run
                         fill the places of the first run, in the same order. So the graph of the first run is used.
                         Backward may run in one pass, in two passes (zbv, dualpipev), or alternate with a forward. The
                         second run stops after the last tensor that backward needs.

A layer decides only once which experts it uses, and which rows it sends where. It calls `remember` to store these
decisions. So the second run sends the same rows to the same ranks, even if a repeated matmul differs in its last bits.

Contexts can be nested. An inner context passes the tensors that it does not intercept, and the functions that it
creates, to the enclosing context.
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
    """A substitute that is saved instead of a tensor."""

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
        """Return the tensor or substitute to save instead of the argument."""
        raise NotImplementedError

    def makes(self, tensor: Tensor) -> bool:
        """Whether autograd saves this tensor without extra memory, because the context recomputes it."""
        return False


_OPEN: ContextVar[tuple[SavedContext, ...]] = ContextVar("open contexts", default=())
"""The open contexts around the running code, outermost first."""


def _pack(tensor: Tensor) -> Tensor | PackedTensor:
    # An operation's own output must be detached. Otherwise it would refer to the operation, which refers to the saved
    # tensor, and the memory would never be freed. A weight is not an output. It is saved as it is, so that ZeRO 3 can
    # free its memory before backward.
    has_history = tensor.requires_grad and not isinstance(tensor, nn.Parameter)
    return pack_outside(tensor.detach() if has_history else tensor, None)


def pack_outside(saved: Tensor | PackedTensor, context: SavedContext | None) -> Tensor | PackedTensor:
    """Return what the open contexts save instead of the argument. The innermost context is asked first.

    context: ask only the contexts around this one.
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
    """Whether autograd saves the tensor without extra memory, because an open `RecomputedOutputs` recomputes it."""
    opened = _OPEN.get()
    return bool(opened) and opened[-1].makes(tensor)


class RecomputedOutputs(SavedContext):
    """A context that saves `function` instead of each of `outputs`. The function recomputes all outputs.

    function: is called on `sources` without gradient. It returns one tensor or a tuple, with the values and strides of
    the outputs. Each backward pass may call it again. All tensors saved in one context share the result of a call. A
    tensor counts as an output if it starts at the same address. So views that start at the first element (reshapes,
    transposes) count as outputs too.
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
        """Return the index of the output that the tensor is; None if it is not an output."""
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
        if self._waiting == 0:  # the last reader: free the result, which another backward pass would recompute
            self._made = None
        return base.as_strided(size, stride, base.storage_offset())


class _Again:
    """Represents one output of a `RecomputedOutputs`."""

    def __init__(self, context: RecomputedOutputs, *place: Any):
        self._context, self._place = context, place

    def unpack(self) -> Tensor:
        return self._context.make(*self._place)


class ReplaceableTensors(SavedContext):
    """A context whose saved tensors can be replaced later."""

    def __init__(self) -> None:
        self._slots: list[weakref.ref[Slot]] = []

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        if not isinstance(saved, Tensor):
            return saved
        slot = Slot(saved)
        self._slots.append(weakref.ref(slot))
        return slot

    def replace(self, tensor: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> None:
        """Save the function `make` wherever exactly this tensor was saved in the context.

        `make` returns nearly equal values in the same shape.
        """
        kept = [pack_outside(source.detach(), self) for source in sources]
        for slot in filter(None, (ref() for ref in self._slots)):
            if slot.holds(tensor):
                slot.replace(lambda: make(*map(unpacked, kept)))


class Slot:
    """A saved tensor, or a function that returns it."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor
        """The saved tensor; None if a function returns it."""
        self._stride = tensor.stride()

    def holds(self, tensor: Tensor) -> bool:
        held = self.tensor
        return held is not None and _address(held) == _address(tensor) and held.shape == tensor.shape

    def replace(self, make: Callable[[], Tensor]) -> None:
        self.tensor, self._make = None, make

    def hand_over(self, pack: Callable[[Tensor], P]) -> P:
        """Save pack(tensor) instead of the tensor. Return pack(tensor)."""
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
    """Return function(x). Save only x and the decisions that the function `remember`s for backward."""
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
        token = _OPEN.set(())  # contexts around the backward must have no effect here
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
    """Ends a second run after it has filled all places."""


def is_repeated() -> bool:
    """Whether the running code is the second run of a layer. Counters must ignore this run."""
    return isinstance(_OPEN.get()[0], _SecondRun) if _OPEN.get() else False


def remember(decision: T) -> T:
    """Store this decision, so that `recall` returns it when the layer runs again."""
    for context in _OPEN.get():
        if isinstance(context, _FirstRun):
            context.decisions.append(decision)
    return decision


def recall() -> Any:
    """Return the next decision of the first run, in the order of the calls of `remember`; None outside a second run."""
    innermost = next(iter(_OPEN.get()), None)
    return innermost.decision() if isinstance(innermost, _SecondRun) else None


def _address(tensor: Tensor) -> tuple[int, int | torch.SymInt]:
    """Return an identification of the tensor's start. It also works on the meta device, which has no memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()
