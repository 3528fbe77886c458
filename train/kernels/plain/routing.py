"""Computes a router's choice and gates from its logits, in torch operations. train/model/router.py has the formulas.

Shapes: B sequences, T positions, E experts, K = top_k, G groups, N separately counted sequences or samples.
"""

import torch
from torch import Tensor

from train.model.needed import Function, once_differentiable
from train.model.operations import RoutingRule
from train.model.recompute import is_repeated, recall, remember
from train.model.sequence import Positions


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Returns the indices of the k largest values of the last axis, largest first, the lower of equal values first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def choose_experts(biased_BTE: Tensor, rule: RoutingRule) -> Tensor:
    """Chooses the experts with the largest biased scores in the allowed groups: ids (B, T, K)."""
    if rule.top_groups < rule.groups:
        grouped_BTGX = biased_BTE.unflatten(-1, (rule.groups, -1))
        best = grouped_BTGX.topk(rule.group_top_k, dim=-1).values
        group_ids = top_indices(best.sum(-1), rule.top_groups)
        closed_BTG1 = torch.ones_like(best[..., 0], dtype=torch.bool).scatter_(-1, group_ids, False).unsqueeze(-1)
        biased_BTE = grouped_BTGX.masked_fill(closed_BTG1, -torch.inf).flatten(-2)
    return top_indices(biased_BTE, rule.top_k)


def count_experts(ids: Tensor, experts: int) -> Tensor:
    """Returns how often each expert occurs, per index of the first axis: int64 (B, E)."""
    ids = ids.flatten(1)
    return ids.new_zeros(ids.size(0), experts).scatter_add_(1, ids, torch.ones_like(ids))


class _Whole:
    """Counts choices separately for each sequence: N = B."""

    def __init__(self, length: int):
        self._length = length

    def count(self, ids_BTK: Tensor, experts: int) -> Tensor:
        """Returns how often each expert is chosen: int64 (N, E)."""
        return count_experts(ids_BTK, experts)

    def frequency(self, best_NE: Tensor, experts: int, top_k: int) -> Tensor:
        """Returns the frequency f (paper, equation 18), (N, E).

        best_NE: number of positions at which each expert has one of the top_k largest scores.
        """
        return best_NE * (experts / (top_k * self._length))

    def mean(self, scores_BTE: Tensor, total_BT1: Tensor) -> Tensor:
        """Returns this rank's summand of P (paper, equation 20), (N, E): each expert's sum of normalised scores,
        divided by the number of positions.
        """
        return ((1 / total_BT1).transpose(1, 2) @ scores_BTE).squeeze(1) / self._length

    def spread(self, frequency_NE: Tensor, length: int) -> Tensor:
        """Returns, for each position, the frequencies f of the position's sample times a weight: (B, 1 or T, E).

        The weight is `length` divided by the sample's number of positions: 1 if a sample is a complete sequence.
        """
        return frequency_NE.unsqueeze(1)


class _Packed:
    """Counts choices separately for N samples. Excluded positions form one more sample, which is dropped."""

    def __init__(self, number_BT: Tensor, lengths_N: Tensor):
        self._number_BT = number_BT
        self._lengths_N1 = lengths_N.clamp_min(1).unsqueeze(-1)  # a sample of one token has no position

    def count(self, ids_BTK: Tensor, experts: int) -> Tensor:
        places = (self._number_BT.unsqueeze(-1) * experts + ids_BTK).flatten()
        counts = places.new_zeros((len(self._lengths_N1) + 1) * experts)
        return counts.scatter_add_(0, places, torch.ones_like(places)).view(-1, experts)[:-1]

    def frequency(self, best_NE: Tensor, experts: int, top_k: int) -> Tensor:
        return best_NE * (experts / top_k) / self._lengths_N1

    def mean(self, scores_BTE: Tensor, total_BT1: Tensor) -> Tensor:
        sums = scores_BTE.new_zeros(len(self._lengths_N1) + 1, scores_BTE.size(-1))
        sums.index_add_(0, self._number_BT.flatten(), (scores_BTE / total_BT1).flatten(0, 1))
        return sums[:-1] / self._lengths_N1

    def spread(self, frequency_NE: Tensor, length: int) -> Tensor:
        scaled_NE = frequency_NE * length / self._lengths_N1
        scaled_NE = torch.cat([scaled_NE, scaled_NE.new_zeros(1, scaled_NE.size(-1))])
        return scaled_NE[self._number_BT]


class Route(Function):
    """Implements `train.model.operations.Kernels.route`. One backward covers the gates and the balance loss."""

    @staticmethod
    def forward(
        ctx, logits_BTE, bias_E, rule: RoutingRule, balance_weight: float, counters, positions: Positions, replayed_BTK
    ):
        (batch, _, experts), length, share = logits_BTE.shape, positions.length, positions.share
        scores_BTE = logits_BTE.softmax(-1) if rule.softmax else logits_BTE.sigmoid()
        ids_BTK = recall() if replayed_BTK is None else replayed_BTK
        if ids_BTK is None:
            ids_BTK = remember(choose_experts(scores_BTE + bias_E, rule))
        chosen_BTK = scores_BTE.gather(-1, ids_BTK)
        factor_BT1 = rule.route_scale / (chosen_BTK.sum(-1, keepdim=True) + 1e-20)
        gates_BTK = chosen_BTK * factor_BT1
        frequency_BXE = total_BT1 = None
        if counters is not None and length > 0:
            total_BT1 = scores_BTE.sum(-1, keepdim=True)
            counted = _Whole(length) if positions.packed is None else _Packed(*positions.packed.on(scores_BTE.device))
            frequency_NE = None
            if balance_weight:
                best_NE = counted.count(top_indices(scores_BTE, rule.top_k), experts)
                best_NE = best_NE if share is None else share.total(best_NE)
                frequency_NE = counted.frequency(best_NE, experts, rule.top_k)
                frequency_BXE = counted.spread(frequency_NE, length)
            if not is_repeated():
                load_E, score_E, balance_loss = counters
                load_E += counted.count(ids_BTK, experts).sum(0)
                share_NE = counted.mean(scores_BTE, total_BT1)
                score_E += share_NE.sum(0)
                if frequency_NE is not None:
                    balance_loss += balance_weight * (frequency_NE * share_NE).sum() / batch
        ctx.save_for_backward(scores_BTE, ids_BTK, gates_BTK, factor_BT1, frequency_BXE, total_BT1)
        ctx.route_scale, ctx.softmax = rule.route_scale, rule.softmax
        # Each rank that shares sequences has only a part of the loss, but gradients are averaged. So the weight is
        # multiplied by the number of these ranks.
        ctx.balance_weight = balance_weight * (1 if share is None else share.parts) / (batch * max(length, 1))
        ctx.mark_non_differentiable(ids_BTK)
        return gates_BTK, ids_BTK

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTK: Tensor, _):
        scores_BTE, ids_BTK, gates_BTK, factor_BT1, frequency_BXE, total_BT1 = ctx.saved_tensors
        inner_BT1 = (grad_BTK * gates_BTK).sum(-1, keepdim=True) / ctx.route_scale
        dchosen_BTK = (grad_BTK - inner_BT1) * factor_BT1
        if frequency_BXE is None:
            dscores_BTE = torch.zeros_like(scores_BTE)
        else:
            # d/ds_j of sum_i f_i s_i / S is (f_j - sum_i f_i s_i / S) / S
            if frequency_BXE.size(1) == 1:
                mean_BT1 = (scores_BTE @ frequency_BXE.transpose(1, 2)) / total_BT1
            else:
                mean_BT1 = (scores_BTE * frequency_BXE).sum(-1, keepdim=True) / total_BT1
            dscores_BTE = (frequency_BXE - mean_BT1) * (ctx.balance_weight / total_BT1)
        dscores_BTE.scatter_add_(-1, ids_BTK, dchosen_BTK)
        if ctx.softmax:
            inner_BT1 = (dscores_BTE * scores_BTE).sum(-1, keepdim=True)
            dlogits_BTE = scores_BTE * (dscores_BTE - inner_BT1)
        else:
            dlogits_BTE = torch.ops.aten.sigmoid_backward(dscores_BTE, scores_BTE)
        return dlogits_BTE, None, None, None, None, None, None
