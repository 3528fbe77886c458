"""A Function that asks what is needed, under torch's split backward."""

import torch
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input

from parallel.pipeline.stage import backward_of_weights, kept_graph
from train.model.needed import gradients_needed


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float, weight: Tensor, log: list) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale, ctx.log = scale, log
        return scale * (x @ weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        x_needed, _, weight_needed, _ = gradients_needed(ctx)
        ctx.log.append(("x" if x_needed else "") + ("w" if weight_needed else ""))
        dx = ctx.scale * grad @ weight.T if x_needed else None
        return dx, None, (ctx.scale * x.T @ grad if weight_needed else None), None


def _model(log: list) -> tuple[Tensor, list[torch.nn.Parameter], Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 4, requires_grad=True)
    weights = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    return x, weights, _Product.apply(_Product.apply(x, 2.0, weights[0], log).relu(), 3.0, weights[1], log).sum()


def test_each_gradient_is_computed_once():
    log: list[str] = []
    x, weights, loss = _model(log)
    loss.backward()
    assert log == ["xw", "xw"]
    wanted = [x.grad, *(w.grad for w in weights)]
    log.clear()
    x, weights, loss = _model(log)
    graph = kept_graph(loss)
    (dx,), groups = stage_backward_input([loss], None, [x], iter(weights))
    assert log == ["x", "x"]
    log.clear()
    backward_of_weights(groups)
    del graph
    assert log == ["w", "w"]
    assert all(torch.equal(a, b) for a, b in zip(wanted, [dx, *(w.grad for w in weights)], strict=True))


def test_a_frozen_input_needs_nothing():
    log: list[str] = []
    weight = torch.nn.Parameter(torch.randn(4, 4))
    _Product.apply(torch.randn(3, 4), 1.0, weight, log).sum().backward()
    assert log == ["w"]
