"""The operations of the layers (train/model/operations.py) in torch: the reference in tests.

Subclasses: train/kernels/cpu/compiled_kernels.py (bf16 on a CPU) and train/kernels/gpu/fused_kernels.py (GPU). Shapes
as in train/model/operations.py.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.thresholds import THRESHOLDS
from train.kernels.plain import grouped
from train.kernels.plain.heads import PlainHeads
from train.kernels.plain.plain_attention import PlainAttention
from train.kernels.plain.plain_chosen import PlainChosen, chosen_index_loss
from train.kernels.plain.plain_indexer import block_scores, choose_keys, index_loss, mean_attention
from train.kernels.plain.routing import Route
from train.model.attention import Attend, AttentionCore, AttentionInput
from train.model.chosen_attention import ChosenInput, ChosenOutput
from train.model.indexer import AttentionTarget, IndexLoss, IndexVectors, best_keys
from train.model.operations import ExpertGroups, Kernels, RouterCounters, RoutingRule
from train.model.sequence import Positions, SeenKeys


class PlainKernels(Kernels):
    """Implements `Kernels` in torch operations, on any device."""

    parts: tuple[str, ...] = ()
    core: AttentionCore = PlainAttention()
    chosen = PlainChosen()

    def rows_at_once(self, x_ND: Tensor, elements: int) -> int:
        """Returns the number of rows to process at a time: at most `elements` elements, to fit a cache."""
        return max(1, elements // x_ND.size(1))

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x32 = x.float()
        rstd = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().mul_(1 / x.size(-1)).add_(eps).rsqrt_()
        return (x32 * rstd).mul_(weight_D).to(x.dtype), rstd

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, x_needed: bool, weight_needed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        x_ND, grad_ND = x.flatten(0, -2).float(), grad.flatten(0, -2).float()
        rstd_N1, weight_D = rstd.view(-1, 1), weight_D.float()
        product_ND = x_ND * grad_ND
        # Both sums over x * grad are matrix-vector products, which read memory once.
        dweight_D = torch.mv(product_ND.t(), rstd_N1.view(-1)) if weight_needed else None
        if not x_needed:
            return None, dweight_D
        slope_N1 = torch.mv(product_ND, weight_D).view(-1, 1).mul_(rstd_N1.pow(3)).div_(x.size(-1))
        dx_ND = (grad_ND * weight_D).mul_(rstd_N1).addcmul_(x_ND, slope_N1, value=-1)
        return dx_ND.to(x.dtype).view(x.shape), dweight_D

    def swiglu(self, h_N2F: Tensor, gates_N: Tensor | None) -> Tensor:
        out_NF = h_N2F.new_empty(h_N2F.size(0), h_N2F.size(1) // 2)
        for h, gates, out in self._pieces(h_N2F, gates_N, out_NF):
            gate, up = h.float().chunk(2, -1)
            activated = F.silu(gate).mul_(up)
            out.copy_(activated if gates is None else activated.mul_(gates.unsqueeze(-1)))
        return out_NF

    def swiglu_backward(self, grad_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dh_N2F = torch.empty_like(h_N2F)
        dgates_N = None if gates_N is None else torch.empty_like(gates_N)
        for h, grad, gates, dh, dgates in self._pieces(h_N2F, grad_NF, gates_N, dh_N2F, dgates_N):
            dh_piece, dgates_piece = _swiglu_backward(grad, h, gates)
            dh.copy_(dh_piece)
            if dgates is not None:
                dgates.copy_(dgates_piece)
        return dh_N2F, dgates_N

    def _pieces(self, h_N2F: Tensor, *rows: Tensor | None) -> Iterator[tuple]:
        """Yields the same rows of all tensors, some rows at a time."""
        size = self.rows_at_once(h_N2F, THRESHOLDS.gate_and_up)
        splits = [t.split(size) if t is not None else itertools.repeat(None) for t in (h_N2F, *rows)]
        return zip(*splits, strict=False)

    def to_heads(
        self, q_BTHQ: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, table: Tensor, nope: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return PlainHeads.apply(q_BTHQ, kv_BTHX, k_rope_BTR, table, nope)

    def attention(self, given: AttentionInput) -> Tensor:
        return Attend.apply(self.core, *given)

    def choose_keys(self, index: IndexVectors, seen: SeenKeys, top_k: int) -> Tensor:
        return choose_keys(index, seen, top_k, self.best_keys, self.index_scores)

    def index_scores(self, q_CHI: Tensor, k_SI: Tensor, w_CH: Tensor) -> Tensor:
        """Returns a block's scores I, fp32 (C, S)."""
        return block_scores(q_CHI, k_SI, w_CH)

    def best_keys(self, scores_TS: Tensor, top_k: int) -> Tensor:
        """Returns the indices of each row's top_k largest scores (`train.model.indexer.best_keys`)."""
        return best_keys(scores_TS, top_k)

    def index_loss(
        self,
        index: IndexVectors,
        seen: SeenKeys,
        target: AttentionTarget,
        weight_BT: Tensor,
    ) -> IndexLoss:
        return index_loss(index, seen, target, weight_BT, self.index_scores, self.mean_attention)

    def mean_attention(self, target: AttentionTarget, b: int, queries: slice, k_HSQ: Tensor, bias_CS: Tensor) -> Tensor:
        """Returns the attention probabilities of a block of one sequence, averaged over the heads: (C, S)."""
        return mean_attention(target, b, queries, k_HSQ, bias_CS)

    def attend_chosen(self, given: ChosenInput) -> ChosenOutput:
        return self.chosen.forward(given)

    def attend_chosen_backward(
        self, dout_BTHV: Tensor, given: ChosenInput, out_BTHV: Tensor, lse_BTH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.chosen.backward(dout_BTHV, given, out_BTHV, lse_BTH)

    def chosen_index_loss(
        self, index: IndexVectors, chosen_BTK: Tensor, shares_BTK: Tensor, weight_BT: Tensor
    ) -> IndexLoss:
        return chosen_index_loss(index, chosen_BTK, shares_BTK, weight_BT)

    def logits(self, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        return F.linear(x_ND.float(), weight_ED.float())

    def logits_backward(
        self, grad_NE: Tensor, x_ND: Tensor, weight_ED: Tensor, x_needed: bool, weight_needed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        dx_ND = (grad_NE @ weight_ED.float()).to(x_ND.dtype) if x_needed else None
        return dx_ND, grad_NE.t() @ x_ND.float() if weight_needed else None

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
        return Route.apply(logits_BTE, bias_E, rule, balance_weight, counters, positions, replayed_BTK)

    def sort_by_expert(self, expert_ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sorted_R, order_R = expert_ids_TK.flatten().sort(stable=True)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        ends_E = torch.searchsorted(sorted_R, torch.arange(1, experts + 1, device=sorted_R.device))
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        return order_R, inverse_R, order_R // expert_ids_TK.size(1), counts_E

    def sum_entries(self, rows_RD: Tensor, places_TK: Tensor) -> Tensor:
        return F.embedding_bag(places_TK, rows_RD, mode="sum")  # gathers and adds in one pass

    def cross_entropy(self, logits_NV: Tensor, targets_N: Tensor, scale: float | None) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        rows = self.rows_at_once(logits_NV, THRESHOLDS.logits)
        for logits_RV, targets_R in zip(logits_NV.split(rows), targets_N.split(rows), strict=True):
            targets_R1 = targets_R.unsqueeze(-1)
            log_p_RV = torch.log_softmax(logits_RV, -1, dtype=torch.float32)
            loss -= log_p_RV.gather(-1, targets_R1).sum()
            if scale is not None:
                dlogits_RV = log_p_RV.exp_()
                dlogits_RV.scatter_add_(-1, targets_R1, dlogits_RV.new_full(targets_R1.shape, -1.0))
                logits_RV.copy_(dlogits_RV.mul_(scale))
        return loss

    def linear(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        return F.linear(x, weight_OI)

    def matmul(self, left_OC: Tensor, right_NC: Tensor, dtype: torch.dtype, into_ON: Tensor | None = None) -> Tensor:
        return added((left_OC @ right_NC.t()).to(dtype), into_ON)

    def groups(self, counts_E: Tensor, dtype: torch.dtype) -> ExpertGroups:
        return counts_E.tolist() if dtype == torch.bfloat16 else grouped.ends_of(counts_E)

    def grouped_matmul(self, x_RI: Tensor, weight_EIO: Tensor, groups: ExpertGroups) -> Tensor:
        if isinstance(groups, list):
            return grouped.matmul(x_RI, weight_EIO, groups)
        return grouped.matmul_to_ends(x_RI, weight_EIO, groups)

    def grouped_weight_gradient(
        self, grad_RO: Tensor, x_RI: Tensor, groups: ExpertGroups, dtype: torch.dtype, into_EOI: Tensor | None = None
    ) -> Tensor:
        if isinstance(groups, list):
            made = grouped.weight_gradient(grad_RO, x_RI, groups)
        else:
            made = grouped.weight_gradient_to_ends(grad_RO, x_RI, groups)
        return added(made.to(dtype), into_EOI)


def added(made: Tensor, into: Tensor | None) -> Tensor:
    """Adds `made` to `into`, and returns `into`; without `into`, returns `made`."""
    return made if into is None else into.add_(made)


def _swiglu_backward(grad_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of h and of the gate values for some rows, fp32."""
    gate_NF, up_NF = h_N2F.float().chunk(2, -1)
    dup_NF = F.silu(gate_NF).mul_(grad_NF)
    dsilu_NF = grad_NF * up_NF
    dgates_N = None
    if gates_N is not None:
        dgates_N = (dup_NF * up_NF).sum(-1)
        dup_NF.mul_(gates_N.unsqueeze(-1))
        dsilu_NF.mul_(gates_N.unsqueeze(-1))
    return torch.cat([torch.ops.aten.silu_backward(dsilu_NF, gate_NF), dup_NF], -1), dgates_N
