"""Attention over chosen keys on a GPU, by the kernels of train/kernels/gpu/triton_chosen.py.

In a bf16 model, operands of matmuls stay in bf16. So absorbed queries, attention probabilities and gradients of scores
are rounded to bf16.

The gradients of latents are sums over queries and heads. For a few queries at a time, a matmul sums over heads, and
torch's `index_add_` adds the resulting rows to the keys' rows.

On the meta device, the functions create the same tensors as in a run. Shapes as in train/kernels/plain/plain_chosen.py;
W = 2H: first the heads of ds or q, then the heads of p or du.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.thresholds import THRESHOLDS
from train.kernels.gpu.fused_rows import runs
from train.kernels.plain.plain_chosen import PlainChosen


class FusedChosen(PlainChosen):
    """`PlainChosen` with Triton kernels, except for fp64 (used by mode=prove)."""

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype == torch.bfloat16 else super().operand_dtype(dtype)

    def add_product(self, left: Tensor, right: Tensor, into: Tensor) -> None:
        _product(left, right, into)

    def attend(
        self, q_CHX: Tensor, latents_SX: Tensor, chosen_CK: Tensor, rank: int, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if q_CHX.dtype == torch.float64:
            return super().attend(q_CHX, latents_SX, chosen_CK, rank, scale)
        (C, H, _), K = q_CHX.shape, chosen_CK.size(1)
        lse_CH, largest_CH = q_CHX.new_empty(2, C, H, dtype=torch.float32)
        shares_CK, p_CKH = q_CHX.new_empty(C, K, dtype=torch.float32), q_CHX.new_empty(C, K, H)
        sums_CHX = torch.empty_like(q_CHX)
        if runs(sums_CHX):
            _triton().log_sums(q_CHX, latents_SX, chosen_CK, lse_CH, largest_CH, rank, scale)
            _triton().weights(q_CHX, latents_SX, chosen_CK, lse_CH, None, p_CKH, shares_CK, rank, scale)
            _triton().sum_latents(p_CKH, latents_SX, chosen_CK, sums_CHX, rank)
        return sums_CHX[..., :rank], lse_CH, largest_CH, shares_CK

    def attend_backward(
        self,
        q_CHX: Tensor,
        latents_SX: Tensor,
        chosen_CK: Tensor,
        du_CHR: Tensor,
        mean_CH: Tensor,
        lse_CH: Tensor,
        scale: float,
        dlatents_SX: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if q_CHX.dtype == torch.float64:
            return super().attend_backward(q_CHX, latents_SX, chosen_CK, du_CHR, mean_CH, lse_CH, scale, dlatents_SX)
        (C, H, X), K, rank = q_CHX.shape, chosen_CK.size(1), du_CHR.size(2)
        rows_CWX = torch.cat([q_CHX, F.pad(du_CHR, (0, X - rank))], 1)
        weights_CKW, sums_CWX = q_CHX.new_empty(C, K, 2 * H), torch.empty_like(rows_CWX)
        if runs(sums_CWX):
            _triton().weights(rows_CWX, latents_SX, chosen_CK, lse_CH, mean_CH, weights_CKW, None, rank, scale)
            _triton().sum_latents(weights_CKW, latents_SX, chosen_CK, sums_CWX, rank)
        # Missing keys add zeros to different rows, because additions to one row would wait for each other.
        other_K = torch.arange(K, dtype=torch.int32, device=chosen_CK.device) % len(latents_SX)
        place_CK = chosen_CK.where(chosen_CK >= 0, other_K)
        size = max(1, THRESHOLDS.gathered_elements // (K * X))
        for weights, rows, place in zip(*(one.split(size) for one in (weights_CKW, rows_CWX, place_CK)), strict=True):
            dlatents_SX.index_add_(0, place.flatten(), _product(weights, rows).flatten(0, 1))
        return sums_CWX[:, :H], sums_CWX[:, H:, :rank]


def _product(left: Tensor, right: Tensor, into: Tensor | None = None) -> Tensor:
    """Returns left @ right in fp32, or adds it to `into`."""
    if left.is_meta:
        return left.new_empty(*left.shape[:2], right.size(2), dtype=torch.float32) if into is None else into
    if left.dtype != torch.bfloat16 or not left.is_cuda:  # torch has no out_dtype for these
        left, right = left.float(), right.float()
        return torch.bmm(left, right) if into is None else into.baddbmm_(left, right)
    if into is None:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.baddbmm(into, left, right, out_dtype=torch.float32, out=into)


def _triton():
    """Imports and returns the module with the Triton kernels."""
    from train.kernels.gpu import triton_chosen

    return triton_chosen
