"""Which gradients a custom autograd Function has to compute in the pass that is running.

zbv and dualpipev split a backward into its input part (I) and its weight part (W): autograd runs once for the inputs
and once for the weights, and skips what a pass does not need.  A Function written in Python does not take part in that by
itself: its ctx.needs_input_grad says in either pass what required a gradient in forward, so it would compute the gradients
of both inputs and weights twice, and one of each would be thrown away.  So every Function of the model that has both asks
the engine instead.
"""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import Node


class Function(torch.autograd.Function):
    """torch's, called without what it first does for functorch, whose transforms nothing here runs in."""

    if TYPE_CHECKING:
        backward: Callable[..., Any]  # torch's own annotations forbid to name the arguments of a backward
    else:
        apply = torch._C._FunctionBase.__dict__["apply"]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's, for a backward whose gradient could be asked for; any other runs without gradients already and is called as it is."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


SKIPPED, EXECUTED, HANDED_OUT = "skipped", "executed", "handed out"


def gradients_needed(ctx: Any) -> tuple[bool, ...]:
    """For every argument of the Function, whether the pass now running wants its gradient.

    Call inside backward, with its ctx. In an ordinary backward it equals ctx.needs_input_grad.
    """
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])
    return tuple([required and _fate(next(nodes)) != SKIPPED for required in ctx.needs_input_grad])


def is_recorded(ctx: Any) -> bool:
    """Whether autograd records the call, so that a backward can follow. Call inside forward, with its ctx.

    ctx.needs_input_grad does not say: it is True for every weight that trains, under torch.no_grad too.
    """
    return bool(ctx.next_functions)


def node_of(ctx: Any, argument: int) -> Node:
    """Where the gradient of an argument that requires one goes."""
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    return nodes[sum(ctx.needs_input_grad[:argument])]


def will_accumulate(node: Node) -> bool:
    """Whether the running pass adds what arrives at this leaf to its `.grad`, rather than hand it out."""
    return _fate(node) == EXECUTED


def _fate(node: Node) -> str:
    """What the running pass does with a node, or with the gradient that arrives at it."""
    try:
        return EXECUTED if torch._C._will_engine_execute_node(node) else SKIPPED
    except RuntimeError as error:
        # The engine refuses to answer for a leaf whose gradient autograd.grad() was asked for.
        if "leaf node" not in str(error):
            raise
        return HANDED_OUT
