"""Reference for sparse attention, written like its formulas. An indexer chooses the keys of each query, and learns to
predict the attention probabilities.

    index score     I_ts = sum_j w_tj ReLU(q_tj . k_s)                         DeepSeek-V3.2 (arXiv 2512.02556), 2.1,
                                                                               eq. 1
    choice          among the allowed keys, the top_k keys with the largest I  eq. 2
    warm-up         loss KL(p_t || softmax(I_t)) over all keys,
                    p: attention probabilities; only indexers are trained      eq. 3
    sparse stage    loss over the chosen keys, added to the language loss      eq. 4
    shared choice   a layer without an indexer uses the keys of the
                    last layer with an indexer                                 arXiv 2603.12201

The indexer's inputs and p are constants in its loss. Of two equal scores, the reference chooses the earlier key.

Shapes: B sequences, T queries or keys, D width, H heads of the indexer, I width of these heads. In scores_BHTT, H are
the heads of attention.
"""

import math
from typing import Any

import torch
from torch import Tensor

from train.prove.recipe_values import Values
from train.prove.reference_adapter import is_adapted

INDEX_NORM_EPS = 1e-6
"""Epsilon of the LayerNorm of the indexer's keys."""


def indexer_shapes(model: Values, layer: int | None) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a layer's indexer weights, if any. layer: None for MTP."""
    sparse = model.sparse
    if not sparse.heads or (layer is not None and sparse.pattern and sparse.pattern[layer] != "F"):
        return {}
    shapes = {
        "weight": (sparse.heads, model.hidden),
        "q.weight": (sparse.heads * sparse.head_dim, model.q_rank),
        "k.weight": (sparse.head_dim, model.hidden),
        "k_norm.weight": (sparse.head_dim,),
        "k_norm.bias": (sparse.head_dim,),
    }
    return {f"attention.indexer.{part}": shape for part, shape in shapes.items()}


def is_frozen(optim: Values, name: str) -> bool:
    """Returns whether a weight is frozen. Indexers are frozen if they have no loss. All other weights are frozen in an
    indexer warm-up.
    """
    return not optim.index_loss if ".indexer." in name else optim.index_warmup


def turned(x: Tensor, angle: Tensor, size: float, interleaved: bool) -> Tensor:
    """Rotates pairs among the first R elements of each vector. Pairs are adjacent (`interleaved`, GLM-5), or j and j +
    R/2 (DeepSeek-V3.2)."""
    width = 2 * angle.size(-1)
    first, rest = x[..., :width], x[..., width:]
    a, b = (first[..., 0::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)
    cos, sin = angle.cos() * size, angle.sin() * size
    pairs = a * cos - b * sin, a * sin + b * cos
    return torch.cat([torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1), rest], -1)


def score_keys(
    model: Values, w: dict[str, Tensor], x_BTD: Tensor, latent_BTC: Tensor, angle: Tensor, size: float
) -> Tensor:
    """Returns the index scores I, (B, T, T). latent_BTC: normed query latent."""
    heads, width, interleaved = model.sparse.heads, model.sparse.head_dim, model.sparse.interleaved
    q_BHTI = (latent_BTC @ w["q.weight"].T).unflatten(-1, (heads, width)).transpose(1, 2)
    k_BTI = x_BTD @ w["k.weight"].T
    apart = k_BTI - k_BTI.mean(-1, keepdim=True)
    k_BTI = (
        apart / (apart.square().mean(-1, keepdim=True) + INDEX_NORM_EPS).sqrt() * w["k_norm.weight"] + w["k_norm.bias"]
    )
    q_BHTI, k_BTI = (turned(each, angle, size, interleaved) for each in (q_BHTI, k_BTI))
    products_BHTT = (q_BHTI @ k_BTI.unsqueeze(1).mT * width**-0.5).relu()
    w_BTH = x_BTD @ w["weight"].T * heads**-0.5
    return (w_BTH.mT.unsqueeze(-1) * products_BHTT).sum(1)


def chosen_keys(index_BTT: Tensor, top_k: int) -> Tensor:
    """Returns a mask of each query's top_k best keys with scores above -inf. Of two equal scores, the earlier key comes
    first."""
    order = index_BTT.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(index_BTT, dtype=torch.bool).scatter(-1, order, True) & (index_BTT > -math.inf)


def index_kl(index_BTT: Tensor, scores_BHTT: Tensor, open_BTT: Tensor) -> Tensor:
    """Returns the KL divergence (B, T) of the index scores' softmax from the attention probabilities.

    It covers the keys in open_BTT. Attention probabilities are summed over heads and normalised.
    """
    p_BTT = scores_BHTT.detach().masked_fill(~open_BTT.unsqueeze(1), -math.inf).softmax(-1).sum(1)
    p_BTT = p_BTT / p_BTT.sum(-1, keepdim=True)
    log_BTT = index_BTT.masked_fill(~open_BTT, -math.inf).log_softmax(-1).masked_fill(~open_BTT, 0)
    return (torch.xlogy(p_BTT, p_BTT) - p_BTT * log_BTT).sum(-1)


def over_chosen(
    plain: Any,
    name: str,
    x_BTD: Tensor,
    latent_BTC: Tensor,
    turn: tuple[Tensor, float],
    scores_BHTT: Tensor,
    learnt_BT: Tensor | None,
    seen: Any,
) -> Tensor:
    """Returns the attention scores, with -inf for keys that were not chosen. Also adds the indexer's loss to `seen`.

    - plain: the PlainModel.
    - turn: rotation angles and their factor.
    """
    config, weights = plain.config, plain.weights
    model, optim, top_k = config.model, config.optim, config.model.sparse.top_k
    visible_BTT = scores_BHTT[:, 0] > -math.inf
    index_BTT = None
    if f"{name}.indexer.weight" in weights:
        w = {
            part.removeprefix(f"{name}.indexer."): weight
            for part, weight in weights.items()
            if part.startswith(f"{name}.indexer.")
        }
        index_BTT = score_keys(model, w, x_BTD.detach(), latent_BTC.detach(), *turn).masked_fill(
            ~visible_BTT, -math.inf
        )
        index_BTT = seen.keep(f"{name}.index", index_BTT)
        seen.open_BTT = plain.choices.get(f"{name}.keys", chosen_keys(index_BTT.detach(), top_k))
    open_BTT = seen.open_BTT
    if optim.index_warmup and seen.trains:
        open_BTT = visible_BTT
    elif scores_BHTT.size(-1) > top_k:
        seen.values[f"{name}.keys"] = open_BTT
    if index_BTT is not None and seen.trains and not is_adapted(config):
        kl_BT = index_kl(index_BTT, scores_BHTT, open_BTT)
        seen.index = (
            seen.index + optim.index_loss * (kl_BT if learnt_BT is None else kl_BT[learnt_BT]).sum() / seen.learnt
        )
    return scores_BHTT.masked_fill(~open_BTT.unsqueeze(1), -math.inf)
