"""A GPU's kernels: torch's fused ones where it has them, our own in Triton where it has none (train/model/fused_rows.py).

Shapes as in train/model/kernels.py.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from train.model import fused_rows, grouped
from train.model.attention import Attention, document_mask
from train.model.kernels import Groups, Kernels


def scaled_dot_product(
    q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, documents_BT: Tensor | None
) -> Tensor:
    """`Kernels.attention` by the kernel that torch takes for these sizes."""
    mask_B1TT, causal = None if documents_BT is None else document_mask(documents_BT), documents_BT is None
    return F.scaled_dot_product_attention(q_BHTQ, k_BHTQ, v_BHTV, attn_mask=mask_B1TT, is_causal=causal, scale=scale)


class FusedKernels(Kernels):
    """`Kernels` that never wait for the device. attention: see `train.attention_choice`."""

    def __init__(self, attention: Attention = scaled_dot_product):
        self.attention = attention

    def rows_at_once(self, x_ND: Tensor, elements: int) -> int:
        return max(1, x_ND.size(0))

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._fused_rms_norm(x, weight_D.shape, weight_D, eps)

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, x_needed: bool, weight_needed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        dx, dweight_D = torch.ops.aten._fused_rms_norm_backward(
            grad.contiguous(), x, weight_D.shape, rstd, weight_D, [x_needed, weight_needed]
        )
        return dx if x_needed else None, dweight_D if weight_needed else None

    def swiglu(self, h_N2F: Tensor, gates_N: Tensor | None) -> Tensor:
        return fused_rows.swiglu(h_N2F, gates_N)

    def swiglu_backward(self, grad_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return fused_rows.swiglu_backward(grad_NF, h_N2F, gates_N)

    def to_heads(
        self, q_BTHQ: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, table: Tensor, nope: int
    ) -> tuple[Tensor, ...]:
        return fused_rows.FusedHeads.apply(q_BTHQ, kv_BTHX, k_rope_BTR, table, nope)

    def groups(self, counts_E: Tensor, dtype: torch.dtype) -> Groups:
        return grouped.ends_of(counts_E)
