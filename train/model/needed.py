"""Finds which gradients a custom autograd Function must compute in the current backward pass.

The pipeline schedules zbv and dualpipev run backward in two passes of autograd: input gradients (I), then weight
gradients (W). ctx.needs_input_grad is the same in both, so a Function would compute both gradients twice. This file
asks autograd's engine.
"""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import Node


class Function(torch.autograd.Function):
    """torch's Function without the preparation for functorch transforms."""

    if TYPE_CHECKING:
        backward: Callable[..., Any]  # torch's type annotations do not allow a backward with named arguments
    else:
        apply = torch._C._FunctionBase.__dict__["apply"]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a Function's `backward` in torch's once_differentiable, for calls while gradients are enabled.

    While gradients are disabled, a call runs `backward` directly.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


SKIPPED, EXECUTED, HANDED_OUT = "skipped", "executed", "handed out"


def gradients_needed(ctx: Any) -> tuple[bool, ...]:
    """Return, for every argument of the Function, whether the current pass needs its gradient.

    Call this inside backward, with its ctx. If backward is not split in two, the result is ctx.needs_input_grad.
    """
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])
    return tuple([required and _fate(next(nodes)) != SKIPPED for required in ctx.needs_input_grad])


def is_recorded(ctx: Any) -> bool:
    """Return whether autograd records this forward. Call it inside forward, with its ctx.

    ctx.needs_input_grad is True for every trained weight, even under torch.no_grad.
    """
    return bool(ctx.next_functions)


def node_of(ctx: Any, argument: int) -> Node:
    """Return the node that receives the gradient of an argument. The argument must require a gradient."""
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    return nodes[sum(ctx.needs_input_grad[:argument])]


def will_accumulate(node: Node) -> bool:
    """Return whether this pass adds gradients to the leaf's `.grad`."""
    return _fate(node) == EXECUTED


def _fate(node: Node) -> str:
    """Return what the current pass does with a node: skip it, execute it, or return its incoming gradient."""
    try:
        return EXECUTED if torch._C._will_engine_execute_node(node) else SKIPPED
    except RuntimeError as error:
        # The engine raises an error for a leaf whose gradient autograd.grad() returns.
        if "leaf node" not in str(error):
            raise
        return HANDED_OUT
