"""Selective recomputation (paper 3.2.3): outputs that backward makes again instead of keeping.

An operation saves its inputs for backward. Where an input is cheap to make from something that is kept anyway (a norm's
output from the norm's input), `Recomputed` gives the operation a recipe to save in its place. It works on whatever
saves the tensor, a plain product or a hand-written function, so the code that computes does not change.
"""

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_OPEN: ContextVar[tuple["Recomputed", ...]] = ContextVar("open contexts", default=())
"""The contexts around the running code: torch keeps their hooks in the same way and does not show them."""


def is_free(tensor: Tensor) -> bool:
    """Whether saving the tensor for backward keeps nothing here, because a `Recomputed` around makes it again."""
    return any(context.makes(tensor) for context in _OPEN.get()[-1:])  # torch asks the innermost hooks alone


class Recomputed:
    """Context in which saving one of `outputs` for backward keeps only `function`, which makes them all again.

    function: called without gradient, returns one tensor or a tuple with the values and strides of outputs. It may be
    called once per backward pass; all that was saved under one context shares the result. A tensor counts as one of
    the outputs when it starts at the same address, so views from the first element (reshapes, transposes) do too.
    """

    def __init__(self, function: Callable[[], Tensor | tuple[Tensor, ...]], *outputs: Tensor):
        self._function = function
        self._index = {_address(output): (i, output.numel()) for i, output in enumerate(outputs)}
        self._saved = 0
        self._waiting = 0
        self._made: tuple[Tensor, ...] | None = None

    def __enter__(self) -> None:
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        self._token = _OPEN.set((*_OPEN.get(), self))

    def __exit__(self, *error: object) -> None:
        _OPEN.reset(self._token)
        self._hooks.__exit__(*error)
        del self._hooks, self._token

    def makes(self, tensor: Tensor) -> bool:
        """Whether the tensor is one of the outputs."""
        _, numel = self._index.get(_address(tensor), (None, 0))
        return 0 < tensor.numel() <= numel

    def _pack(self, tensor: Tensor) -> Tensor | tuple:
        if not self.makes(tensor):
            return tensor
        self._saved += 1
        return self._index[_address(tensor)][0], tensor.size(), tensor.stride()

    def _unpack(self, packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        index, size, stride = packed
        if self._made is None:
            with torch.no_grad():
                made = self._function()
            self._made = made if isinstance(made, tuple) else (made,)
            self._waiting = self._saved
        base = self._made[index]
        self._waiting -= 1
        if self._waiting == 0:  # the last reader: free the result, a further backward pass makes it again
            self._made = None
        return base.as_strided(size, stride, base.storage_offset())


def _address(tensor: Tensor) -> tuple[int, int]:
    """Where the tensor starts; on the meta device too, where there is no memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()
