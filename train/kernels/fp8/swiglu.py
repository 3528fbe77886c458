"""SwiGLU times the router's gate value, in torch operations (paper 3.3.3; DeepSeek TileKernels).

    forward    a = silu(g) * u * w                         g and u the halves of h, w the row's gate value
    backward   du = da * w * silu(g)
               dg = da * w * u * silu'(g)                  silu'(g) = s + g s (1 - s), s = sigmoid(g)
               dw = sum over the row of da * silu(g) * u

Arithmetic is in fp32. Forward casts to FP8 directly from fp32. Backward returns `a` and dh in bf16, because two casts
(1x128 and 128x1) must start from the same numbers.

Shape suffixes: P rows, F inner width of an expert.
"""

import torch
from torch import Tensor

from conf.thresholds import THRESHOLDS


def forward(h_P2F: Tensor, gates_P: Tensor) -> Tensor:
    """Returns the output `a` (P, F) in fp32."""
    gate_PF, up_PF = h_P2F.float().chunk(2, -1)
    return torch.nn.functional.silu(gate_PF).mul_(up_PF).mul_(gates_P[:, None])


def chunks(x_P: Tensor, h_P2F: Tensor | None = None) -> tuple[Tensor, ...]:
    """Splits x by rows. h has at most `fp8_gate_and_up` elements in the rows of one part. h_P2F: None if x is h."""
    h_P2F = x_P if h_P2F is None else h_P2F
    return x_P.split(max(1, THRESHOLDS.fp8_gate_and_up // max(h_P2F.shape[1], 1)))


def recompute(h_P2F: Tensor, gates_P: Tensor) -> Tensor:
    """Returns the output `a` (P, F) in bf16, bitwise as `backward`."""
    a_PF = gates_P.new_empty(h_P2F.shape[0], h_P2F.shape[1] // 2, dtype=torch.bfloat16)
    for h, gates, a in zip(*(chunks(tensor, h_P2F) for tensor in (h_P2F, gates_P, a_PF)), strict=True):
        a.copy_(forward(h, gates))
    return a_PF


def backward(h_P2F: Tensor, gates_P: Tensor, da_PF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the recomputed `a` (P, F) and dh (P, 2F) in bf16, and dw (P,) in fp32."""
    a_PF = torch.empty_like(da_PF, dtype=torch.bfloat16)
    dh_P2F = torch.empty_like(h_P2F, dtype=torch.bfloat16)
    dgates_P = torch.empty_like(gates_P)
    tensors = (h_P2F, gates_P, da_PF, a_PF, dh_P2F, dgates_P)
    for part in zip(*(chunks(tensor, h_P2F) for tensor in tensors), strict=True):
        _backward(*part)
    return a_PF, dh_P2F, dgates_P


def _backward(h_P2F: Tensor, gates_P: Tensor, da_PF: Tensor, a_PF: Tensor, dh_P2F: Tensor, dgates_P: Tensor) -> None:
    """Writes some rows' `a`, dh and dw."""
    gate_PF, up_PF = h_P2F.float().chunk(2, -1)
    da_PF, gates_P1 = da_PF.float(), gates_P[:, None]
    dgate_PF, dup_PF = dh_P2F.chunk(2, -1)
    silu_PF = torch.nn.functional.silu(gate_PF)
    plain_PF = silu_PF * up_PF
    torch.sum(plain_PF * da_PF, -1, out=dgates_P)
    a_PF.copy_(plain_PF.mul_(gates_P1))
    da_PF = da_PF * gates_P1
    dup_PF.copy_(silu_PF.mul_(da_PF))
    dgate_PF.copy_(torch.ops.aten.silu_backward(da_PF.mul_(up_PF), gate_PF))
