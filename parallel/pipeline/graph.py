"""What a backward in two parts, of inputs and then of weights, needs of the graph in between."""

import torch
from torch import Tensor
from torch.autograd.graph import Node


def kept_graph(output: Tensor) -> Node | None:
    """Keeps the graph behind an output alive from before its backward of inputs, which lets go of it, to that of weights.

    Before torch 2.13 a node of a Python function does not live by being held in Python, as the parts hold those that
    the second begins with. None where that is so no more: the rest of the graph is then freed in between.
    """
    if torch.__version__ >= (2, 13):
        return None
    with torch.enable_grad():
        return output.view_as(output).grad_fn
