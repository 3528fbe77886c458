"""Records the inputs and outputs of a dispatcher on every rank, for train/prove/judge_rows.py:

    forward     x, ids, gates -> rows, row_gates, counts        tokens of this rank -> rows for this rank's experts
                out -> y                                        outputs of these experts -> sums for this rank's tokens
    backward    d_y -> d_out                                    gradients of y -> gradients of out
                d_rows, d_row_gates -> d_x, d_gates             gradients of the rows -> gradients of the tokens

Shapes: as in train/model/moe.py.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from train.model.moe import Dispatcher, MoE, PendingRows, RoutedRows
from train.model.recompute import is_repeated

Keep = Callable[[str, int, Tensor], None]
"""Records a tensor. Arguments: name, index of the micro-batch, tensor."""


class WatchedDispatcher:
    """Wraps a layer's dispatcher, and passes its tensors to `keep`."""

    def __init__(self, moe: MoE, inner: Dispatcher, keep: Keep):
        self._moe, self._inner, self._keep = moe, inner, keep
        self._calls = 0
        self._numbers: dict[int, int] = {}
        """Maps the Python id of each dispatch result to its micro-batch."""

    def start_step(self) -> None:
        """Count micro-batches from 0 again."""
        self._calls = 0

    def dispatch_begin(self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, again: Any = None) -> PendingRows:
        if not self._moe.training or is_repeated():
            return self._inner.dispatch_begin(x_TD, expert_ids_TK, gates_TK, again)
        number, self._calls = self._calls, self._calls + 1
        self._keep("ids", number, expert_ids_TK)
        # The hooks are on views, because other code uses the tensors themselves and adds to their gradients.
        x_TD, gates_TK = x_TD.view_as(x_TD), gates_TK.view_as(gates_TK)
        self._watch("x", number, x_TD)
        self._watch("gates", number, gates_TK)
        return _WatchedPending(self, number, self._inner.dispatch_begin(x_TD, expert_ids_TK, gates_TK, again))

    def combine(self, out_RD: Tensor, routed: RoutedRows) -> Tensor:
        number = self._numbers.pop(id(routed), None)
        if number is None:
            return self._inner.combine(out_RD, routed)
        self._watch("out", number, out_RD)
        y_TD = self._inner.combine(out_RD, routed)
        self._watch("y", number, y_TD)
        return y_TD

    def arrived(self, number: int, routed: RoutedRows) -> None:
        """Record the rows that have reached this rank's experts."""
        self._numbers[id(routed)] = number
        self._watch("rows", number, routed.rows_RD)
        self._watch("row_gates", number, routed.gates_R)
        self._keep("counts", number, routed.counts_E)

    def _watch(self, name: str, number: int, tensor: Tensor) -> None:
        self._keep(name, number, tensor)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._keep(f"d_{name}", number, gradient))


class _WatchedPending:
    """A dispatch in progress. `wait` also records the received rows."""

    def __init__(self, watched: WatchedDispatcher, number: int, inner: PendingRows):
        self._watched, self._number, self._inner = watched, number, inner

    def wait(self) -> RoutedRows:
        routed = self._inner.wait()
        self._watched.arrived(self._number, routed)
        return routed
