"""Finds which gradients a custom autograd Function must compute in the current backward pass.

The pipeline schedules zbv and dualpipev split a backward into two passes of autograd: one for input gradients (I), and
one for weight gradients (W). autograd skips gradients that a pass does not need. A Function written in Python cannot
skip them by itself: its ctx.needs_input_grad only says which inputs required a gradient in forward. It would compute
both gradients in both passes, and each pass would discard one of them. So every Function with both gradients asks
autograd's engine which gradients the current pass needs.
"""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import Node


class Function(torch.autograd.Function):
    """torch's Function without the preparation for functorch transforms, which Sluice does not use."""

    if TYPE_CHECKING:
        backward: Callable[..., Any]  # torch's type annotations do not allow a backward with named arguments
    else:
        apply = torch._C._FunctionBase.__dict__["apply"]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Apply torch's decorator once_differentiable to calls with gradients enabled. Other calls run `backward`
    directly."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


SKIPPED, EXECUTED, HANDED_OUT = "skipped", "executed", "handed out"


def gradients_needed(ctx: Any) -> tuple[bool, ...]:
    """Return, for every argument of the Function, whether the current pass needs the argument's gradient.

    Call this function inside backward, with the ctx of backward. In a backward that is not split, the result equals
    ctx.needs_input_grad.
    """
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])
    return tuple([required and _fate(next(nodes)) != SKIPPED for required in ctx.needs_input_grad])


def is_recorded(ctx: Any) -> bool:
    """Return whether autograd records the call, so that a backward can follow. Call this function inside forward, with
    the ctx of forward.

    ctx.needs_input_grad does not show this: it is True for every trained weight, even under torch.no_grad.
    """
    return bool(ctx.next_functions)


def node_of(ctx: Any, argument: int) -> Node:
    """Return the node that receives the gradient of an argument. The argument must require a gradient."""
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    return nodes[sum(ctx.needs_input_grad[:argument])]


def will_accumulate(node: Node) -> bool:
    """Return whether the current pass adds the gradients of this leaf to its `.grad`, instead of returning them."""
    return _fate(node) == EXECUTED


def _fate(node: Node) -> str:
    """Return what the current pass does with a node: skip it, execute it, or return the gradient that arrives at it."""
    try:
        return EXECUTED if torch._C._will_engine_execute_node(node) else SKIPPED
    except RuntimeError as error:
        # The engine raises an error for a leaf whose gradient autograd.grad() must return.
        if "leaf node" not in str(error):
            raise
        return HANDED_OUT
