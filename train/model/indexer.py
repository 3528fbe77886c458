"""The indexer of sparse attention (DSA; DeepSeek-V3.2, 2.1), which selects the keys that a query attends to.

    I_ts = sum_j w_tj ReLU(q_tj . k_s)          score of query t and key s over the heads j of the indexer, fp32
    q = W_Q c_Q,  k = LayerNorm(W_K x),  w = W_W x * heads^-0.5 * head_dim^-0.5          RoPE on the first part of q and k

c_Q is the query latent after its norm, and x is the input of the block. All heads share one key. A query attends to the
top_k visible keys with the largest scores. If scores are equal, the earlier key wins, so all layouts select the same
keys.

The loss is the mean of KL(p || softmax(I)) over the learnt queries: those whose next token training supervises. The
target p is the attention probability of each key, summed over heads and normalised to a sum of 1. Both p and the
softmax cover only the selected keys. The loss trains only the indexer: x, c_Q and p are constants. The backward of
attention's output adds the gradient of the loss.

Shapes: B sequences, T queries, S keys, D width, H heads of the indexer, I width of an indexer head, K chosen keys, Q qk
width of attention.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.schema import Model
from train.model.layers import LayerPrecision, Linear
from train.model.needed import Function, is_recorded, once_differentiable
from train.model.rope import rotate
from train.model.router import exact_matmul
from train.model.sequence import Positions, SeenKeys

LAYER_NORM_EPS = 1e-6
"""Epsilon of the keys' LayerNorm, as in every released model."""


class IndexVectors(NamedTuple):
    """The vectors from which an indexer computes its scores."""

    q_BTHI: Tensor
    k_BSI: Tensor
    w_BTH: Tensor
    """Weight w of each indexer head, fp32, already multiplied by heads^-0.5 * head_dim^-0.5."""


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, in fp32."""

    def __init__(self, width: int, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, **factory))
        self.bias = nn.Parameter(torch.empty(width, **factory))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, LAYER_NORM_EPS).to(x.dtype)


class Indexer(nn.Module):
    """The indexer of one layer. `loss` sums its training losses since the last `clear`."""

    def __init__(self, config: Model, precision: LayerPrecision, **factory):
        super().__init__()
        assert config.q_rank is not None, "conf/check.py"
        heads, width = config.sparse.heads, config.sparse.head_dim
        self.q = Linear(config.q_rank, heads * width, precision, **factory)
        self.k = Linear(config.hidden, width, precision, **factory)
        self.k_norm = LayerNorm(width, **factory)
        self.weight = nn.Parameter(torch.empty(heads, config.hidden, **factory))
        self._config, self._rope_width, self._kernels = config.sparse, config.rope_head_dim, precision.kernels
        self.loss: Tensor | float = 0.0
        self.layer: int | None = None
        """Index of this indexer among the main model's indexers, set by the model; None in an MTP module."""

    def forward(
        self,
        x_BTD: Tensor,
        q_latent_BTC: Tensor,
        table: Tensor,
        remake_x: AbstractContextManager | None = None,
        remake_q: AbstractContextManager | None = None,
    ) -> IndexVectors:
        """Return the vectors from which the scores are computed.

        table: RoPE table of these positions.
        remake_x, remake_q: context managers inside which autograd does not save x_BTD or q_latent_BTC; backward
            recomputes the tensor.
        """
        with remake_q or nullcontext():
            q = self.q(q_latent_BTC).unflatten(-1, (self._config.heads, -1))
        with remake_x or nullcontext():
            k = self.k(x_BTD)
            w_BTH = exact_matmul(x_BTD, self.weight, self._kernels)
        k = self._turn(self.k_norm(k).unsqueeze(2), table).squeeze(2)
        return IndexVectors(self._turn(q, table), k, w_BTH * (self._config.heads * self._config.head_dim) ** -0.5)

    def clear(self) -> None:
        """Reset `loss` for a new step."""
        self.loss = 0.0

    def _turn(self, x_BTHI: Tensor, table: Tensor) -> Tensor:
        turning, rest = x_BTHI.split([self._rope_width, x_BTHI.size(-1) - self._rope_width], -1)
        if not self._config.interleaved:  # make elements j and j + R/2 adjacent, in q and in k, so q . k is the same
            turning = turning.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return torch.cat([rotate(turning, table).to(x_BTHI.dtype), rest], -1)


@dataclass(frozen=True)
class AttentionTarget:
    """The attention whose probabilities an indexer learns to predict."""

    q_BHTQ: Tensor
    lse_BHT: Tensor
    """Log-sum-exp of each query's scaled scores over the keys that it attends to."""
    scale: float
    blocks: Callable[[], Iterator[tuple[Tensor, SeenKeys, int]]]
    """Iterates over blocks of keys: keys (B, H, L, Q), each query's visible keys, and the first key's position."""


class IndexLoss(NamedTuple):
    """An indexer's loss over the local queries, and the gradients of its vectors in their dtypes."""

    loss: Tensor
    gradients: IndexVectors


def query_weights(positions: Positions, batch: int, device: torch.device) -> Tensor:
    """Return each local query's weight in the indexer's loss, fp32 (B, T); 0 for unsupervised targets."""
    choices = positions.choices
    if choices.supervised_BS is None:
        return torch.full((batch, positions.count), choices.weight, device=device)
    weight_N = torch.zeros(batch * positions.count)
    weight_N[positions.learnt(choices.supervised_BS)] = choices.weight
    return weight_N.view(batch, -1).to(device)


def whole_keys(positions: Positions, k_BTI: Tensor) -> Tensor:
    """Gather the keys of all positions from all ranks, in order."""
    if positions.share is None:
        return k_BTI
    return torch.cat(positions.share.gather_begin(k_BTI, [len(piece) for piece in positions.pieces]).wait(), 1)


def learn(index: IndexVectors, weight_BT: Tensor, positions: Positions, loss_of: Callable[..., IndexLoss]) -> IndexLoss:
    """Compute an indexer's loss, and its gradients for the vectors of this rank's positions.

    weight_BT: weight of each local query in the loss.
    loss_of: computes the loss and the gradients from the vectors of all keys.
    """
    loss, found = loss_of(index._replace(k_BSI=whole_keys(positions, index.k_BSI)), weight_BT=weight_BT)
    if positions.share is not None:
        pieces = list(found.k_BSI.split([len(piece) for piece in positions.pieces], 1))
        found = found._replace(k_BSI=positions.share.scatter_sum(pieces))
    return IndexLoss(loss, found)


class Learn(Function):
    """Returns y unchanged. Its backward returns the gradients of the indexer's loss for the indexer's vectors.

    compute: computes the loss and the gradients for these vectors.
    count: receives the loss.
    """

    @staticmethod
    def forward(
        ctx,
        y: Tensor,
        q_BTHI: Tensor,
        k_BTI: Tensor,
        w_BTH: Tensor,
        compute: Callable[[IndexVectors], IndexLoss],
        count: Callable[[Tensor], None],
    ) -> Tensor:
        assert is_recorded(ctx), "an indexer learns where gradients are recorded"
        loss, gradients = compute(IndexVectors(q_BTHI, k_BTI, w_BTH))
        count(loss)
        ctx.save_for_backward(*gradients)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return dy, *ctx.saved_tensors, None, None


class LearnAlone(Function):
    """Returns a chunk's output unchanged. Used when training changes only the indexers.

    Backward returns `gradients` for the weights, and zeros for the chunk's input x. The forward has already computed
    the gradients. So backward needs no weights, and ZeRO stage 3 does not gather them.
    """

    @staticmethod
    def forward(ctx, out: Tensor, x: Tensor, gradients: Iterable[Tensor], *weights: nn.Parameter) -> Tensor:
        ctx.x = x.shape, x.dtype, x.device
        ctx.save_for_backward(*gradients)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        shape, dtype, device = ctx.x
        dx = torch.zeros(shape, dtype=dtype, device=device) if ctx.needs_input_grad[1] else None
        return None, dx, None, *ctx.saved_tensors


def index_scores(q_CHI: Tensor, k_SI: Tensor, w_CH: Tensor, elements: int) -> Tensor:
    """Compute the scores I of one sequence, fp32 (C, S).

    elements: largest number of products (query, key, head) in memory at once.
    """
    scores_CS = torch.zeros(len(q_CHI), len(k_SI), device=q_CHI.device)
    for heads in head_slices(w_CH.size(1), scores_CS.numel(), elements):
        products_HCS = (q_CHI[:, heads].float().transpose(0, 1) @ k_SI.float().mT).relu_()
        scores_CS += products_HCS.mul_(w_CH[:, heads].float().mT.unsqueeze(-1)).sum(0)
    return scores_CS


def head_slices(heads: int, each: int, elements: int) -> Iterator[slice]:
    """Split the heads into slices of at most `elements` elements, but at least one head each.

    each: number of elements of one head.
    """
    count = max(1, elements // max(1, each))
    for first in range(0, heads, count):
        yield slice(first, min(first + count, heads))


def best_keys(scores_TS: Tensor, top_k: int) -> Tensor:
    """Return the indices of the top_k largest scores along the last axis, in ascending order: int32 (..., top_k).

    If scores are equal, the lower index wins. If fewer than top_k scores are above -inf, -1 fills the end of the row.
    """
    size = scores_TS.size(-1)
    count = min(top_k, size)
    least_T1 = scores_TS.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above_TS = scores_TS > least_T1
    level_TS = (scores_TS == least_T1) & (scores_TS > -torch.inf)
    chosen_TS = above_TS | (level_TS & (level_TS.cumsum(-1) <= count - above_TS.sum(-1, keepdim=True)))
    numbers_S = torch.arange(size, dtype=torch.int32, device=scores_TS.device)
    found = torch.where(chosen_TS, numbers_S, size).topk(count, largest=False, sorted=True).values
    return F.pad(found.masked_fill_(found == size, -1), (0, top_k - count), value=-1)
