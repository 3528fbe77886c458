"""Sparse attention, written like its formulas. An indexer chooses the keys of every query, and learns from the
attention.

    index score     I_ts = sum_j w_tj ReLU(q_tj . k_s)                               DeepSeek-V3.2 (arXiv 2512.02556), 2.1, eq. 1
    choice          the top_k keys with the largest scores of those that a query sees               eq. 2
    warm-up         KL(p_t || softmax(I_t)) over all keys, p the attention, all else frozen         eq. 3
    sparse stage    the same over the chosen keys, beside the language loss                         eq. 4
    shared choice   a layer without an indexer takes the keys of the last layer with one            arXiv 2603.12201

The indexer's inputs and p count as constants, so the indexer's loss has no gradient for other weights. The paper does
not say which of two keys with equal scores is chosen. This reference chooses the earlier key.

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
"""Epsilon of the LayerNorm of the indexer's keys. All released models use it."""


def indexer_shapes(model: Values, layer: int | None) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of an indexer's weights, in a layer of the main model or in an MTP module (layer None).
    Returns an empty mapping for a layer without an indexer."""
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
    """Whether a weight is not trained. In a warm-up of indexers, only indexers are trained."""
    return optim.index_warmup and ".indexer." not in name


def turned(x: Tensor, angle: Tensor, size: float, interleaved: bool) -> Tensor:
    """Rotates the first elements of each vector by the angle of its position. Pairs are adjacent (GLM-5), or element j
    with j + R/2 (DeepSeek-V3.2)."""
    width = 2 * angle.size(-1)
    first, rest = x[..., :width], x[..., width:]
    a, b = (first[..., 0::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)
    cos, sin = angle.cos() * size, angle.sin() * size
    pairs = a * cos - b * sin, a * sin + b * cos
    return torch.cat([torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1), rest], -1)


def score_keys(
    model: Values, w: dict[str, Tensor], x_BTD: Tensor, latent_BTC: Tensor, angle: Tensor, size: float
) -> Tensor:
    """Returns the index scores I of all queries and keys: (B, T, T). latent: the latent of the queries, after its
    norm."""
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
    """Whether each query attends to each key. It attends to the top_k keys with the largest scores above -inf. Of equal
    scores, the earlier key comes first."""
    order = index_BTT.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(index_BTT, dtype=torch.bool).scatter(-1, order, True) & (index_BTT > -math.inf)


def index_kl(index_BTT: Tensor, scores_BHTT: Tensor, open_BTT: Tensor) -> Tensor:
    """Returns the KL divergence (B, T) between the attention and the softmax of I, both over the open keys. The
    attention is summed over heads and normalised."""
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
    """Returns the scores of attention, with -inf for keys that a query does not attend to. Also adds the indexer's loss
    to the pass.

    plain: the PlainModel. name: name of the attention. scores: attention scores, with -inf for keys that a query must
    not attend to. seen: the pass.
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
