"""The key choice and the loss of an indexer in torch operations on any device (formulas: train/model/indexer.py).

The functions process one block of queries with all visible keys, a few heads at a time, to save memory.

Shapes as in train/model/indexer.py; C queries of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from conf.thresholds import THRESHOLDS
from train.kernels.plain.plain_attention import query_blocks
from train.model.indexer import AttentionTarget, IndexLoss, IndexVectors, best_keys, head_slices, index_scores
from train.model.sequence import SeenKeys


def block_scores(q_CHI: Tensor, k_SI: Tensor, w_CH: Tensor) -> Tensor:
    """Returns the scores I of one sequence, fp32 (C, S)."""
    return index_scores(q_CHI, k_SI, w_CH, THRESHOLDS.attention_scores)


def choose_keys(
    index: IndexVectors,
    seen: SeenKeys,
    top_k: int,
    best_keys: Callable[[Tensor, int], Tensor] = best_keys,
    scores_of: Callable[[Tensor, Tensor, Tensor], Tensor] = block_scores,
) -> Tensor:
    """Implements `train.model.operations.Kernels.choose_keys`.

    scores_of: function that computes a block's scores. best_keys: function that chooses the largest scores.
    """
    q_BTHI, k_BSI, _ = index
    batch, length = q_BTHI.shape[:2]
    chosen_BTK = torch.full((batch, length, top_k), -1, dtype=torch.int32, device=q_BTHI.device)
    for sequences, queries, keys, bias_CS in query_blocks(seen, k_BSI.size(1), batch, q_BTHI.device):
        for b in sequences:
            scores_CS = _scores(index, b, queries, keys, scores_of).add_(bias_CS)
            found_CK = best_keys(scores_CS, top_k)
            chosen_BTK[b, queries] = found_CK.add_(keys.start).masked_fill_(found_CK < keys.start, -1)
    return chosen_BTK


def index_loss(
    index: IndexVectors,
    seen: SeenKeys,
    target: AttentionTarget,
    weight_BT: Tensor,
    scores_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    attention_of: Callable[[AttentionTarget, int, slice, Tensor, Tensor], Tensor],
) -> IndexLoss:
    """Implements `train.model.operations.Kernels.index_loss`.

    scores_of: function that computes the scores of a block of queries.
    attention_of: function that computes the mean attention of a block, like `mean_attention`.
    """
    q_BTHI, k_BSI, _ = index
    batch, device = len(q_BTHI), q_BTHI.device
    grads = IndexVectors(*(torch.zeros(t.shape, device=device) for t in index))
    loss = torch.zeros((), device=device)
    lse_BT = torch.full(q_BTHI.shape[:2], -torch.inf, device=device)

    for sequences, queries, keys, bias_CS in query_blocks(seen, k_BSI.size(1), batch, device):
        for b in sequences:
            lse_BT[b, queries] = (_scores(index, b, queries, keys, scores_of) + bias_CS).logsumexp(-1)
    for k_BHLQ, seen_here, first in target.blocks():
        for sequences, queries, own, bias_CS in query_blocks(seen_here, k_BHLQ.size(2), batch, device):
            keys = slice(first + own.start, first + own.stop)
            for b in sequences:
                p_CS = attention_of(target, b, queries, k_BHLQ[b, :, own], bias_CS)
                log_CS = (
                    _scores(index, b, queries, keys, scores_of).add_(bias_CS).sub_(lse_BT[b, queries].unsqueeze(-1))
                )
                weight_C1 = weight_BT[b, queries].unsqueeze(-1)
                apart_CS = torch.xlogy(p_CS, p_CS) - (p_CS * log_CS).masked_fill_(p_CS == 0, 0)
                loss += (apart_CS * weight_C1).sum()
                _add_gradients(grads, index, b, queries, keys, (log_CS.exp_() - p_CS) * weight_C1)
    return IndexLoss(loss, IndexVectors(*(grad.to(of.dtype) for grad, of in zip(grads, index, strict=True))))


def _scores(
    index: IndexVectors,
    b: int,
    queries: slice,
    keys: slice,
    scores_of: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    return scores_of(index.q_BTHI[b, queries], index.k_BSI[b, keys], index.w_BTH[b, queries])


def mean_attention(target: AttentionTarget, b: int, queries: slice, k_HSQ: Tensor, bias_CS: Tensor) -> Tensor:
    """Returns the attention probabilities, averaged over the heads: (C, S)."""
    heads = len(k_HSQ)
    p_CS = torch.zeros_like(bias_CS)
    for some in head_slices(heads, bias_CS.numel(), THRESHOLDS.attention_scores):
        scores_HCS = torch.baddbmm(
            bias_CS - target.lse_BHT[b, some, queries].unsqueeze(-1),
            target.q_BHTQ[b, some, queries].float(),
            k_HSQ[some].float().mT,
            alpha=target.scale,
        )
        p_CS += scores_HCS.exp_().sum(0)
    return p_CS.div_(heads)


def _add_gradients(
    grads: IndexVectors, index: IndexVectors, b: int, queries: slice, keys: slice, dscores_CS: Tensor
) -> None:
    """Add to `grads` the gradients of q, k and w, from the scores' gradient."""
    k_SI = index.k_BSI[b, keys].float()
    for heads in head_slices(index.w_BTH.size(-1), dscores_CS.numel(), THRESHOLDS.attention_scores):
        q_HCI = index.q_BTHI[b, queries, heads].float().transpose(0, 1)
        products_HCS = (q_HCI @ k_SI.mT).relu_()
        grads.w_BTH[b, queries, heads] += (products_HCS * dscores_CS).sum(-1).mT
        w_HC1 = index.w_BTH[b, queries, heads].float().mT.unsqueeze(-1)
        dproducts_HCS = (products_HCS > 0) * dscores_CS * w_HC1
        grads.q_BTHI[b, queries, heads] += (dproducts_HCS @ k_SI).transpose(0, 1)
        grads.k_BSI[b, keys] += (dproducts_HCS.mT @ q_HCI).sum(0)
