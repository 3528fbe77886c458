"""What a backward in two parts, of inputs and then of weights, needs beside torch's own functions."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


def kept_graph(output: Tensor) -> Node | None:
    """Keeps the graph behind an output alive from before its backward of inputs, which lets go of it, to that of weights.

    Before torch 2.13 a node of a Python function does not live by being held in Python, as the parts hold those that
    the second begins with. None where that is so no more: the rest of the graph is then freed in between.
    """
    if torch.__version__ >= "2.13":
        return None
    with torch.enable_grad():
        return output.view_as(output).grad_fn


def backward_of_weights(groups: Sequence[dict[str, Any]]) -> None:
    """The second part: adds to every weight's `.grad`. groups: as torch's stage_backward_input gives them.

    torch's own asks autograd.grad() for the gradients and adds them itself, so that no product can add to a sum of its own
    (train/model/weight_gradient.py). Otherwise this is the same.
    """
    for group in groups:
        pairs = list(zip(group.pop("intermediates"), group.pop("grads"), strict=True))
        arrived = [
            (GradientEdge(node, i), one) for node, ones in pairs for i, one in enumerate(ones) if one is not None
        ]
        if not arrived:
            continue
        edges, gradients = zip(*arrived, strict=True)
        with ExitStack() as hooks:
            # A node that another one leads to would count what the other passes on to it a second time.
            for node, ones in pairs if len(pairs) > 1 else ():
                hooks.callback(node.register_prehook(lambda _, ones=ones: ones).remove)
            torch.autograd.backward(edges, gradients, inputs=[node.variable for node in group["params"]])
