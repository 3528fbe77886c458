"""The kernels of a GPU: torch's fused kernels, or Sluice's Triton kernels (train/kernels/gpu/fused_rows.py).

Shapes as in train/model/operations.py.
"""

import torch
from torch import Tensor

from conf.thresholds import THRESHOLDS
from parallel.expert.permute import triton_dispatch
from train.kernels.gpu import fused_rows
from train.kernels.gpu.fused_attention import EfficientAttention
from train.kernels.gpu.fused_chosen import FusedChosen
from train.kernels.gpu.fused_route import FusedRoute
from train.kernels.plain import grouped
from train.kernels.plain.plain_chosen import chosen_index_loss
from train.kernels.plain.plain_kernels import PlainKernels
from train.kernels.plain.routing import Route
from train.model.attention import AttentionCore
from train.model.indexer import AttentionTarget, IndexLoss, IndexVectors
from train.model.operations import ExpertGroups, RouterCounters, RoutingRule
from train.model.sequence import Positions
from train.model.weight_gradient import LinearMatmul


class FusedKernels(PlainKernels):
    """Implements `Kernels` so that the host never waits for the device. core: the attention core."""

    chosen = FusedChosen()

    def __init__(self, core: AttentionCore | None = None):
        self.core = core or EfficientAttention()

    def rows_at_once(self, x_ND: Tensor, elements: int) -> int:
        return max(1, x_ND.size(0))

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return torch._fused_rms_norm(x, weight_D.shape, weight_D, eps)

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        return fused_rows.FusedHeads.apply(q_BTHQ, kv_BTHX, k_rope_BTR, table, nope)

    def linear(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        return LinearMatmul.apply(x, weight_OI, self)

    def matmul(self, left_OC: Tensor, right_NC: Tensor, dtype: torch.dtype, into_ON: Tensor | None = None) -> Tensor:
        if dtype != torch.float32 or left_OC.dtype != torch.bfloat16:
            return super().matmul(left_OC, right_NC, dtype, into_ON)
        if left_OC.is_meta:
            return left_OC.new_empty(len(left_OC), len(right_NC), dtype=dtype) if into_ON is None else into_ON
        if not left_OC.is_cuda:  # torch has neither operation on a CPU; results differ only in the order of sums
            return super().matmul(left_OC.float(), right_NC.float(), dtype, into_ON)
        if into_ON is None:
            return torch.mm(left_OC, right_NC.t(), out_dtype=dtype)
        return torch.addmm(into_ON, left_OC, right_NC.t(), out_dtype=dtype, out=into_ON)

    def grouped_weight_gradient(
        self, grad_RO: Tensor, x_RI: Tensor, groups: ExpertGroups, dtype: torch.dtype, into_EOI: Tensor | None = None
    ) -> Tensor:
        if dtype != torch.float32 or grad_RO.dtype != torch.bfloat16:
            return super().grouped_weight_gradient(grad_RO, x_RI, groups, dtype, into_EOI)
        if grad_RO.is_meta:
            shape = len(groups), grad_RO.shape[1], x_RI.shape[1]
            return grad_RO.new_empty(shape, dtype=dtype) if into_EOI is None else into_EOI
        if not grad_RO.is_cuda:
            return super().grouped_weight_gradient(grad_RO.float(), x_RI.float(), groups, dtype, into_EOI)
        from train.kernels.gpu.triton_grouped import grouped_weight_gradient

        assert isinstance(groups, Tensor)
        return grouped_weight_gradient(grad_RO, x_RI, groups, into_EOI)

    def logits(self, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        if x_ND.dtype != torch.bfloat16 or weight_ED.dtype != torch.bfloat16:
            return super().logits(x_ND, weight_ED)
        return self.matmul(x_ND, weight_ED, torch.float32)  # exact, because tensor cores multiply bf16 without rounding

    def logits_backward(
        self, grad_NE: Tensor, x_ND: Tensor, weight_ED: Tensor, x_needed: bool, weight_needed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if x_ND.dtype != torch.bfloat16 or weight_ED.dtype != torch.bfloat16:
            return super().logits_backward(grad_NE, x_ND, weight_ED, x_needed, weight_needed)
        (N, E), dx_ND, dweight_ED = grad_NE.shape, None, None
        parts_N2E = x_ND.new_empty(N, 2, E)  # the gradient as a sum of two bf16 numbers, with an error of 2^-17
        large_NE, rest_NE = parts_N2E.unbind(1)
        torch.sub(grad_NE, large_NE.copy_(grad_NE), out=rest_NE)
        parts_NX = parts_N2E.flatten(1)
        if x_needed:
            dx_ND = self.matmul(parts_NX, torch.cat((weight_ED, weight_ED)).t(), x_ND.dtype)
        if weight_needed:
            dweight_ED = self.matmul(parts_NX.t(), x_ND.t(), torch.float32).view(2, E, -1).sum(0)
        return dx_ND, dweight_ED

    def route(
        self,
        logits_BTE: Tensor,
        bias_E: Tensor,
        rule: RoutingRule,
        balance_weight: float,
        counters: RouterCounters | None,
        positions: Positions,
        replayed_BTK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        # Three cases use plain code: fp64 in mode=prove; counts that ranks exchange because they share a sequence;
        # softmax scores or counts per sample.
        plain = positions.share is not None or positions.samples_BS is not None or rule.softmax
        one_kernel = logits_BTE.dtype == torch.float32 and not plain
        route = FusedRoute if one_kernel else Route
        return route.apply(logits_BTE, bias_E, rule, balance_weight, counters, positions, replayed_BTK)

    def index_scores(self, q_CHI: Tensor, k_SI: Tensor, w_CH: Tensor) -> Tensor:
        if not q_CHI.is_cuda or q_CHI.dtype == torch.float64:  # the values of mode=prove are in fp64
            return super().index_scores(q_CHI, k_SI, w_CH)
        from train.kernels.gpu.triton_index import fused_index_scores

        return fused_index_scores(q_CHI, k_SI, w_CH)

    def mean_attention(self, target: AttentionTarget, b: int, queries: slice, k_HSQ: Tensor, bias_CS: Tensor) -> Tensor:
        if not k_HSQ.is_cuda or k_HSQ.dtype == torch.float64:
            return super().mean_attention(target, b, queries, k_HSQ, bias_CS)
        from train.kernels.gpu.triton_index import fused_mean_attention

        q_HCQ, lse_HC = target.q_BHTQ[b, :, queries], target.lse_BHT[b, :, queries]
        return fused_mean_attention(q_HCQ, k_HSQ, lse_HC, target.scale).masked_fill_(bias_CS == -torch.inf, 0)

    def chosen_index_loss(
        self, index: IndexVectors, chosen_BTK: Tensor, shares_BTK: Tensor, weight_BT: Tensor
    ) -> IndexLoss:
        return chosen_index_loss(index, chosen_BTK, shares_BTK, weight_BT, THRESHOLDS.gathered_elements)

    def sort_by_expert(self, expert_ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not expert_ids_TK.is_cuda:
            return super().sort_by_expert(expert_ids_TK, experts)
        return triton_dispatch().place_entries(expert_ids_TK, experts)

    def sum_entries(self, rows_RD: Tensor, places_TK: Tensor) -> Tensor:
        if not rows_RD.is_cuda or rows_RD.dtype == torch.float64:
            return super().sum_entries(rows_RD, places_TK)
        out_TD = rows_RD.new_empty(len(places_TK), rows_RD.size(1))
        triton_dispatch().sum_entries(rows_RD.contiguous(), places_TK, out_TD)
        return out_TD

    def groups(self, counts_E: Tensor, dtype: torch.dtype) -> ExpertGroups:
        return grouped.ends_of(counts_E)
