"""Reference for norms, attention, output head and router, which every recipe computes in bf16 or fp32 (paper 3.3.1).

The inputs are the rank's recorded tensors. Arithmetic is in fp64, with rounding only where the recipe stores a result.

Shapes: as in train/prove/reference.py; N rows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.prove.low_precision import CURVED, FP32, NearNumbers, PlainFormat, Total, matmul, rounded, transposed
from train.prove.recipe_values import Values
from train.prove.reference import best, group_scores, rotate, stretched, turns

# --- Norms ----------------------------------------------------------------------------------------------------------


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Total:
    """Returns x divided by its root mean square, times norm weight."""
    made = x_ND / (x_ND.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D
    return Total(made, made.abs(), None)


def rms_norm_back(dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Total, Total]:
    """Returns the gradients of x and of the norm weight."""
    rstd_N1 = (x_ND.square().mean(-1, keepdim=True) + eps).rsqrt()
    up_ND = dy_ND * weight_D
    slope, magnitude = ((x_ND * up_ND).mean(-1, keepdim=True), (x_ND * up_ND).abs().mean(-1, keepdim=True))
    dx = rstd_N1 * (up_ND - x_ND * rstd_N1.square() * slope)
    size = rstd_N1 * (up_ND.abs() + x_ND.abs() * rstd_N1.square() * magnitude)
    each = dy_ND * x_ND * rstd_N1
    return Total(dx, size, None), Total(each.sum(0), each.abs().sum(0), None)


# --- Attention (paper 2.1.1) ----------------------------------------------------------------------------------------


def softmax_scale(config: Values) -> float:
    """Returns the factor of attention scores, including YaRN's (paper 4.3)."""
    model = config.model
    scale = (model.nope_head_dim + model.rope_head_dim) ** -0.5
    if stretched(model, config.seq_len) and model.yarn.factor > 1:
        scale *= (0.1 * model.yarn.mscale * math.log(model.yarn.factor) + 1) ** 2
    return scale


def unseen(length: int, documents_BT: Tensor | None) -> Tensor:
    """Returns a mask (1 or B, 1, T, T) of later keys and other documents' keys."""
    later = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    if documents_BT is None:
        return later
    return later | (documents_BT[:, None, :, None] != documents_BT[:, None, None, :])


class AttentionSlopes(NamedTuple):
    """Gradients of queries, keys and values."""

    q: Total
    k: Total
    v: Total


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, unseen: Tensor) -> Total:
    """Computes softmax(scale q k^T) v, (B, H, T, ...). unseen: mask of forbidden keys."""
    p, off = _shares(q, k, scale, unseen)
    return Total(p @ v, p @ v.abs(), off @ v.abs())


def _shares(q: Tensor, k: Tensor, scale: float, unseen: Tensor) -> tuple[Tensor, Tensor]:
    """Returns softmax(scale q k^T), and its possible error."""
    p = (q @ k.mT * scale).masked_fill(unseen, -math.inf).softmax(-1)
    off = 8 * FP32 * q.size(-1) ** 0.5 * scale * (q.abs() @ k.abs().mT)
    return p, p * (off + (p * off).sum(-1, keepdim=True))


def attend_back(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, unseen: Tensor
) -> AttentionSlopes:
    """Computes the gradients of attention, from its output and output gradient."""
    p, off = _shares(q, k, scale, unseen)
    ds = scale * p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
    sizes = scale * (dout.abs() @ v.abs().mT + (dout * out).abs().sum(-1, keepdim=True))
    size, ds_off = p * sizes, off * sizes
    return AttentionSlopes(
        Total(ds @ k, size @ k.abs(), ds_off @ k.abs()),
        Total(ds.mT @ q, size.mT @ q.abs(), ds_off.mT @ q.abs()),
        Total(p.mT @ dout, p.mT @ dout.abs(), off.mT @ dout.abs()),
    )


def query_sizes(config: Values, places: Sequence[int]) -> Tensor:
    """Returns the factor on each position's query, as in Llama 4, fp64 (T, 1)."""
    yarn = config.model.yarn
    steps = [place // yarn.original_seq_len for place in places]
    return torch.tensor([[1 + yarn.query_growth * math.log1p(step)] for step in steps], dtype=torch.float64)


def rotated(x: Tensor, config: Values, places: Sequence[int], back: bool = False) -> Total:
    """Rotates adjacent pairs of x (..., T, R) by their positions' angles."""
    model = config.model
    angle = turns(model, config.seq_len, max(places) + 1, x)[list(places)]
    size = model.yarn.attention_factor if stretched(model, config.seq_len) else 1.0
    pairs = x.abs().unflatten(-1, (-1, 2)).sum(-1) * abs(size)
    return Total(rotate(x, -angle if back else angle, size), pairs.repeat_interleave(2, -1), None)


def key_excess(index_BTS: Tensor, chosen_BTS: Tensor, top_k: int) -> float:
    """Returns the smallest error of index scores that could have led a rank to its choice of keys."""
    kth_BT1 = index_BTS.sort(dim=-1, descending=True).values[..., top_k - 1 : top_k]
    worst_BT1 = index_BTS.masked_fill(~chosen_BTS, math.inf).amin(-1, keepdim=True)
    behind = (kth_BT1 - worst_BT1).nan_to_num(0.0, 0.0, 0.0)  # if a query sees fewer than top_k keys
    return behind.clamp_min(0).max().item() / 2


# --- Output head (paper 2.2) ----------------------------------------------------------------------------------------


class HeadSlopes(NamedTuple):
    """The loss, and its gradients with respect to states and weight."""

    loss: Total
    x: Total
    weight: Total


def head(
    x_ND: NearNumbers, weight_VD: Tensor, targets_N: Tensor, positions: float, high: PlainFormat, order: float
) -> HeadSlopes:
    """Returns the loss sum(-log softmax(x W^T)[target]) / positions, and its gradients.

    order: possible error due to summation order, relative to the sum of the terms' magnitudes.
    """
    summed = matmul(x_ND, NearNumbers(weight_VD))
    logits = rounded(summed, high, order * summed.size)
    off = torch.zeros_like(logits.x) if logits.off is None else logits.off.expm1()
    p, targets_N1 = logits.x.softmax(-1), targets_N[:, None]
    each = -logits.x.log_softmax(-1).gather(-1, targets_N1)
    mean_off = (p * off).sum(-1, keepdim=True)
    loss = Total(
        each.sum() / positions, each.abs().sum() / positions, (off.gather(-1, targets_N1) + mean_off).sum() / positions
    )
    slopes = (p - F.one_hot(targets_N, p.size(-1))) / positions
    # An error e of a logit changes this logit's probability by p (1 - p) e, and all others in the opposite direction.
    p_off = p * ((1 - p) * off + (mean_off - p * off))
    made = rounded(NearNumbers(slopes, p_off / positions), high, CURVED * (p + (slopes < 0)) / positions)
    return HeadSlopes(loss, matmul(made, NearNumbers(weight_VD.mT)), matmul(transposed(made), transposed(x_ND)))


# --- Router (paper 2.1.2) -------------------------------------------------------------------------------------------


class RouterSlopes(NamedTuple):
    """Gradients of the router's input and weight."""

    x: Total
    weight: Total


def route_scores(x_BTD: Tensor, weight_ED: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    """Returns the scores, and the sum of each logit's absolute terms: (B, T, E)."""
    logits_BTE = x_BTD @ weight_ED.T
    return logits_BTE.softmax(-1) if softmax else logits_BTE.sigmoid(), x_BTD.abs() @ weight_ED.abs().T


def gates(scores_BTE: Tensor, sizes_BTE: Tensor, ids_BTK: Tensor, route_scale: float) -> Total:
    """Returns the gates of these experts. An error e of every logit changes a gate by at most 2 e times the gate."""
    chosen_BTK = scores_BTE.gather(-1, ids_BTK)
    made = route_scale * chosen_BTK / (chosen_BTK.sum(-1, keepdim=True) + 1e-20)
    return Total(made, made * (1 + 2 * sizes_BTE.amax(-1, keepdim=True)), None)


def among_best(scores_BTE: Tensor, top_k: int) -> Tensor:
    """Returns 1 for the top_k best experts without bias, else 0, (B, T, E)."""
    return F.one_hot(best(scores_BTE, top_k), scores_BTE.size(-1)).sum(2).double()


def route_back(
    dgates_BTK: Tensor,
    x_BTD: Tensor,
    weight_ED: Tensor,
    ids_BTK: Tensor,
    route_scale: float,
    balance_BTE: Tensor,
    off_B1E: Tensor,
    softmax: bool,
) -> RouterSlopes:
    """Computes the gradients of the router's input and weight.

    - balance_BTE: derivative of the balance loss with respect to an expert's fraction of the scores.
    - off_B1E: possible error of this derivative.
    """
    scores_BTE, _ = route_scores(x_BTD, weight_ED, softmax)
    chosen_BTK = scores_BTE.gather(-1, ids_BTK)
    sum_BT1 = chosen_BTK.sum(-1, keepdim=True) + 1e-20
    factor_BT1 = route_scale / sum_BT1
    # gate = scale * s / sum(s), so this is the gradient of a quotient.
    inner_BT1 = (dgates_BTK * chosen_BTK).sum(-1, keepdim=True) / sum_BT1
    size_BT1 = (dgates_BTK * chosen_BTK).abs().sum(-1, keepdim=True) / sum_BT1
    total_BT1 = scores_BTE.sum(-1, keepdim=True)
    # The balance loss uses the fraction s / sum(s), where the sum runs over all experts.
    mean_BT1 = (scores_BTE * balance_BTE).sum(-1, keepdim=True) / total_BT1
    dscores = (balance_BTE - mean_BT1) / total_BT1
    size = (balance_BTE + mean_BT1).abs() / total_BT1
    off = (off_B1E + (scores_BTE * off_B1E).sum(-1, keepdim=True) / total_BT1) / total_BT1
    dscores = dscores.scatter_add(-1, ids_BTK, (dgates_BTK - inner_BT1) * factor_BT1)
    size = size.scatter_add(-1, ids_BTK, (dgates_BTK.abs() + size_BT1) * factor_BT1)
    if softmax:  # ds_i = s_i (dl_i - sum_j s_j dl_j)
        dscores = dscores - (dscores * scores_BTE).sum(-1, keepdim=True)
        size, off = (one + (one * scores_BTE).sum(-1, keepdim=True) for one in (size, off))
    slope = scores_BTE if softmax else scores_BTE * (1 - scores_BTE)
    dlogits, size, off = ((one * slope).flatten(0, 1) for one in (dscores, size, off))
    x = x_BTD.flatten(0, 1)
    return RouterSlopes(
        Total(dlogits @ weight_ED, size @ weight_ED.abs(), off @ weight_ED.abs()),
        Total(dlogits.T @ x, size.T @ x.abs(), off.T @ x.abs()),
    )


def choice_excess(model, biased_NE: Tensor, ids_NK: Tensor) -> float:
    """Returns the smallest error of router scores that could have led a rank to its choice of experts."""
    count = model.top_k // model.top_groups if model.group_top_k is None else model.group_top_k
    excess = 0.0
    open_NE = torch.ones_like(biased_NE, dtype=torch.bool)
    size = model.experts // model.groups
    if model.top_groups < model.groups:
        groups_NG = group_scores(model, biased_NE)
        least_N1 = groups_NG.sort(dim=-1, descending=True).values[:, model.top_groups - 1 : model.top_groups]
        behind_NK = (least_N1 - groups_NG.gather(1, ids_NK // size)).clamp_min(0)
        excess = behind_NK.max().item() / (2 * count)
        # If scores have errors up to `excess`, only a group this far above the limit is certainly chosen.
        open_NE = (groups_NG >= least_N1 + 2 * count * excess).repeat_interleave(size, 1)
    inside_NE = biased_NE.masked_fill(~open_NE, -math.inf)
    kth_N1 = inside_NE.sort(dim=-1, descending=True).values[:, model.top_k - 1 : model.top_k]
    behind_NK = (kth_N1 - biased_NE.gather(1, ids_NK)).clamp_min(0)
    return max(excess, behind_NK.max().item() / 2)
