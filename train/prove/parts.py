"""Records inputs and outputs of single model parts, such as a linear layer, for train/prove/judge_parts.py.

Hooks on modules, tensors and autograd nodes, and wrapped methods and kernels, record without changing the computation.

Keys are part.WHAT/NAME/NUMBER. NUMBER counts the calls of the part on this rank in a step:

    linear layer, norm     x, y, and the gradients dy, dx; also if backward repeats the call (mla_up)
    router                 x, dx; `EvidenceWatch` records gates and choices
    experts                x, gates, counts, y, dy, dx, dgates; the first matmul's output h and its gradient dh; rows
                           are sorted by expert
    LoRA A and B           the input after dropout, as `dropped`; for the second matmul of experts, as `dropped_a`
    attention              q, k, v, y, and the gradients dq, dk, dv, dy; not with context parallelism
    embedding              ids, y, dy
    output head            under head.DEPTH: x, dx; the loss as y, and its gradient dy
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.plain.high import HighPrecision
from train.model.attention import AttentionInput
from train.model.deepseek import DeepSeekV3, Head
from train.model.layers import Embedding, Linear, RMSNorm
from train.model.mla import MLA
from train.model.moe import Experts, MoE, RoutedRows
from train.model.needed import Function
from train.model.recompute import is_repeated
from train.model.router import Router

TILE = 128
"""The rows of an expert may be padded to this multiple."""
BETWEEN = 8
"""Maximum number of autograd nodes between experts' output and input."""


class PartsWatch:
    """Records inputs and outputs of the model parts in `chunks` while `is_on` is True."""

    def __init__(self, chunks: list[DeepSeekV3], precision: HighPrecision | Fp8Precision):
        self.is_on = False
        self.seen: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._here = threading.local()  # a forward and a backward that overlap run in two threads
        self._watch_swiglu(precision)
        tables: set[Embedding] = set()
        for chunk in chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, Linear | RMSNorm | Router):
                    module.register_forward_pre_hook(partial(self._take_input, name))
                    if not isinstance(module, Router):
                        module.register_forward_hook(partial(self._take_output, name))
                elif isinstance(module, Embedding) and module not in tables:  # two chunks may share an embedding table
                    tables.add(module)
                    module.register_forward_hook(self._take_embedded)
                elif isinstance(module, Head):
                    module.register_forward_pre_hook(self._take_states)
                    module.register_forward_hook(self._take_losses)
                elif isinstance(module, MoE):
                    first = torch.tensor(module.experts.local.start)
                    module.run_experts = partial(self._run_experts, name, first, module.run_experts)
                elif isinstance(module, MLA):
                    module.attend = partial(self._attend, name, module.attend)
                for what, lora in _lora_modules(module).items():
                    lora._drop = partial(self._drop, name, what, lora._drop)

    def clear(self) -> None:
        self.seen, self._calls = {}, {}

    def is_watching(self) -> bool:
        """Returns whether to record now. While backward recomputes complete layers, nothing is recorded."""
        return self.is_on and not is_repeated()

    def begin(self, name: str) -> str:
        """Counts a call of the part, and returns NAME/NUMBER."""
        number = self._calls[name] = self._calls.get(name, -1) + 1
        return f"{name}/{number}"

    def keep(self, what: str, key: str, tensor: Tensor) -> None:
        self.seen[f"part.{what}/{key}"] = tensor.detach().clone()

    def keep_gradient(self, what: str, key: str, tensor: Tensor) -> None:
        """Record the gradient of a tensor when backward computes it."""
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self.keep(what, key, gradient))

    # Modules

    def _take_input(self, name: str, module: nn.Module, given: tuple) -> tuple | None:
        if not (self.is_watching() and module.training):
            return None
        x, *rest = given
        key = self.begin(name)
        self.keep("x", key, x)
        self._open()[name] = key
        return _Passed.apply(x, partial(self.keep, "dx", key)), *rest

    def _take_output(self, name: str, module: nn.Module, given: tuple, y: Tensor) -> None:
        key = self._open().pop(name, None)
        if key is not None:
            self.keep("y", key, y)
            self.keep_gradient("dy", key, y)

    def _take_embedded(self, table: Embedding, given: tuple, y: Tensor) -> None:
        if self.is_watching() and table.training and torch.is_grad_enabled():
            key = self.begin("embedding")  # one name, because all embedding tables of a rank share one gradient
            self.keep("ids", key, given[0])
            self.keep("y", key, y)
            self.keep_gradient("dy", key, y)

    def _take_states(self, head: Head, given: tuple) -> tuple | None:
        if not (self.is_watching() and head.training):
            return None
        states, *rest = given
        keys = self._open()["head"] = [self.begin(f"head.{depth}") for depth in range(len(states))]
        self._open()["depths"] = iter(keys)
        for key, state in zip(keys, states, strict=True):
            self.keep("x", key, state)
        return [_Passed.apply(one, partial(self.keep, "dx", key)) for one, key in zip(states, keys, strict=True)], *rest

    def _take_losses(self, head: Head, given: tuple, losses: list[Tensor]) -> None:
        for key, loss in zip(self._open().pop("head", []), losses, strict=False):
            self.keep("y", key, loss)
            self.keep_gradient("dy", key, loss)

    def _open(self) -> dict[str, Any]:
        """Maps a model part to the keys (NAME/NUMBER) of its calls in this thread."""
        return self._here.__dict__.setdefault("keys", {})

    def _run_experts(self, name: str, first: Tensor, run: Callable[[RoutedRows], Tensor], routed: RoutedRows) -> Tensor:
        """Replaces a layer's `run_experts`. first: index of the first expert."""
        if not (self.is_watching() and torch.is_grad_enabled()):
            return run(routed)
        rows_RD, gates_R, counts = routed.rows_RD, routed.gates_R, routed.counts_E
        key, each = self.begin(name), counts.tolist()
        for what, tensor in (("x", rows_RD), ("gates", gates_R), ("counts", counts), ("first", first)):
            self.keep(what, key, tensor)
        self.enter_experts(key, each)
        try:
            y_RD = run(routed)
        finally:
            self.enter_experts(None)
        self.keep("y", key, y_RD)
        for what, tensor in (("dy", y_RD), ("dx", rows_RD), ("dgates", gates_R)):
            self.keep_gradient(what, key, tensor)
        if y_RD.requires_grad:
            first_node(y_RD, rows_RD).register_prehook(
                lambda gradients: self.keep("dh", key, own_rows(gradients[0], each))
            )
        return y_RD

    def _attend(self, name: str, attend: Callable[[AttentionInput], Tensor], given: AttentionInput) -> Tensor:
        """Replaces a layer's `attend`. attend: the original method."""
        if not (self.is_watching() and torch.is_grad_enabled()):
            return attend(given)
        key = self.begin(name)
        for what, tensor in zip("qkv", given[:3], strict=True):
            self.keep(what, key, tensor)
            self.keep_gradient(f"d{what}", key, tensor)
        out_BHTV = attend(given)
        self.keep("y", key, out_BHTV)
        self.keep_gradient("dy", key, out_BHTV)
        return out_BHTV

    def _drop(
        self, name: str, what: str, drop: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor
    ) -> tuple[Tensor, Any]:
        """Replaces the dropout of LoRA A's input. drop: the original method."""
        dropped, context = drop(x)
        key = self._open().get(name) or getattr(self._here, "experts", (None,))[0]
        if isinstance(key, list):  # the head calls its LoRA once for each depth, in order
            key = next(self._open()["depths"])
        if key is not None and dropped is not x:
            self.keep(what, key, dropped)
        return dropped, context

    # Between the two matmuls of experts

    def _watch_swiglu(self, precision: HighPrecision | Fp8Precision) -> None:
        owner, name = (precision.weights, "engine") if isinstance(precision, Fp8Precision) else (precision, "kernels")
        setattr(owner, name, _WatchedSwiGLU(getattr(owner, name), self))

    def enter_experts(self, key: str | None, counts: Sequence[int] = ()) -> None:
        """Sets the key under which this thread records the next input of the experts' SwiGLU."""
        self._here.experts = key, counts

    def saw_swiglu(self, h: Tensor) -> None:
        key, counts = getattr(self._here, "experts", (None, ()))
        if key is not None:
            self.keep("h", key, own_rows(h, counts))


class _Passed(Function):
    """Returns a view of x. Passes to `saw` only the gradient that flows back through this view."""

    @staticmethod
    def forward(ctx, x: Tensor, saw) -> Tensor:
        ctx.saw = saw
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.saw(gradient)
        return gradient, None


class _WatchedSwiGLU:
    """Wraps an FP8 engine or kernels, and records the inputs of SwiGLU."""

    def __init__(self, inner: Any, watch: PartsWatch):
        self._inner, self._watch = inner, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def swiglu(self, h: Tensor, *rest: Any) -> Any:
        self._watch.saw_swiglu(h)
        return self._inner.swiglu(h, *rest)


def _lora_modules(module: nn.Module) -> dict[str, Any]:
    """Maps each record name (`dropped`, `dropped_a`) to the LoRA module whose input is recorded under this name."""
    found = {
        "dropped": getattr(module, "added_up" if isinstance(module, Experts) else "added", None),
        "dropped_a": getattr(module, "added_down", None),
    }
    return {what: lora for what, lora in found.items() if lora is not None}


def first_node(y: Tensor, x: Tensor) -> Any:
    """Follows the autograd graph back from y, and returns the node whose first input is x."""
    node = y.grad_fn
    for _ in range(BETWEEN):
        assert node is not None
        before = node.next_functions[0][0]
        if before is None or before is x.grad_fn:
            return node
        node = before
    raise AssertionError(f"no path leads from {y.grad_fn} to {x.grad_fn}")


def own_rows(rows_PX: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns the experts' rows without the padding after each expert's rows."""
    if len(rows_PX) == sum(counts):
        return rows_PX
    starts = accumulate((-(-count // TILE) * TILE for count in counts), initial=0)
    return torch.cat([rows_PX[start : start + count] for start, count in zip(starts, counts, strict=False)])
