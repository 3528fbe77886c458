"""Dispatch and experts against one loop over tokens."""

import pytest
import torch
from torch.nn import functional as F

from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.model.moe import LocalDispatcher

torch.set_num_threads(1)


def weights(experts: int, width: int, inner: int, dtype=torch.float32):
    w13 = (torch.randn(experts, 2 * inner, width) * 0.3).to(dtype).requires_grad_()
    w2 = (torch.randn(experts, width, inner) * 0.3).to(dtype).requires_grad_()
    return w13, w2


def plain(x_TD, ids_TK, gates_TK, w13, w2):
    rows = []
    for x, ids, gates in zip(x_TD, ids_TK.tolist(), gates_TK, strict=True):
        y = 0
        for gate_value, e in zip(gates, ids, strict=True):
            gate, up = (w13[e] @ x).chunk(2)
            y = y + w2[e] @ (F.silu(gate) * up * gate_value)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("recompute", [False, True])
def test_dispatch_experts_combine_equal_a_loop(recompute):
    """fp32; expert 1 gets no token and must still get a zero gradient."""
    torch.manual_seed(0)
    experts, width, inner, tokens, top_k = 5, 12, 8, 17, 3
    x_TD = torch.randn(tokens, width, requires_grad=True)
    gates_TK = torch.rand(tokens, top_k, requires_grad=True)
    ids_TK = torch.stack([torch.tensor([0, 2, 3, 4])[torch.randperm(4)[:top_k]] for _ in range(tokens)])
    w13, w2 = weights(experts, width, inner)
    dispatcher = LocalDispatcher(experts, build_kernels("cpu"))
    routed = dispatcher.dispatch(x_TD, ids_TK, gates_TK)
    assert torch.equal(routed.counts_E, ids_TK.flatten().bincount(minlength=experts))
    assert routed.counts_E.dtype == torch.int64
    out = HighPrecision(torch.float32, build_kernels("cpu"), recompute).expert_ffn(
        routed.rows_RD, routed.gates_R, w13, w2, routed.counts_E
    )
    y_TD = dispatcher.combine(out, routed)
    expected = plain(x_TD, ids_TK, gates_TK, w13, w2)
    torch.testing.assert_close(y_TD, expected)
    upstream = torch.randn_like(y_TD)
    inputs = [x_TD, gates_TK, w13, w2]
    got = torch.autograd.grad(y_TD, inputs, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, inputs, upstream))
    assert got[2][1].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens(dtype):
    """A rank can be sent nothing; weights then get zero gradients."""
    x_TD = torch.zeros(0, 16, dtype=dtype, requires_grad=True)
    gates_TK = torch.zeros(0, 2, requires_grad=True)
    w13, w2 = weights(4, 16, 8, dtype)
    dispatcher = LocalDispatcher(4, build_kernels("cpu"))
    routed = dispatcher.dispatch(x_TD, torch.zeros(0, 2, dtype=torch.int64), gates_TK)
    assert routed.counts_E.tolist() == [0, 0, 0, 0]
    out = HighPrecision(dtype, build_kernels("cpu")).expert_ffn(
        routed.rows_RD, routed.gates_R, w13, w2, routed.counts_E
    )
    y_TD = dispatcher.combine(out, routed)
    assert y_TD.shape == (0, 16)
    y_TD.sum().backward()
    assert x_TD.grad.shape == (0, 16)
    assert w13.grad.abs().sum() == 0 and w2.grad.abs().sum() == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_bf16_experts_give_fp32_gradients_near_exact(recompute):
    """Errors of 2^-8 per rounding; fp32 .grad on bf16 weights."""
    torch.manual_seed(0)
    rows = torch.randn(40, 16)
    gates_R, counts_E = torch.rand(40), torch.tensor([10, 0, 25, 5])
    w13, w2 = weights(4, 16, 8, torch.bfloat16)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        parameters = [torch.nn.Parameter(w.detach().to(dtype)) for w in (w13, w2)]
        for parameter in parameters:
            parameter.grad_dtype = torch.float32
        x, g = rows.bfloat16().to(dtype).requires_grad_(), gates_R.clone().requires_grad_()
        HighPrecision(dtype, build_kernels("cpu"), recompute).expert_ffn(
            x, g, *parameters, counts_E
        ).square().sum().backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in parameters)
        results.append([x.grad.float(), g.grad, *(parameter.grad for parameter in parameters)])
    for exact, rounded in zip(*results, strict=True):
        assert (exact - rounded).norm() / exact.norm() < 0.02
