"""Sparse attention: the indexer's scores, its choice, its loss in both stages, and what ranks exchange of it."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.zero.engine import Zero
from parallel.zero.sharded_weights import ShardedWeights
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, REDUCTION, UPDATE, VALIDATION, mutation
from tests.prove.mutations.seams import Seams
from train.kernels.plain import plain_indexer
from train.kernels.plain.plain_kernels import PlainKernels
from train.loop import training_engine
from train.model import indexer, mla
from train.model.indexer import Indexer, IndexLoss, IndexVectors, LayerNorm
from train.model.mla import MLA
from train.model.recompute import is_repeated

CHOICE = r"chosen keys|attention|layers|index_loss"


# Scores


@mutation(f"{OURS}: scores are summed without ReLU", "sparse", FORWARD, CHOICE)
def index_without_relu(bug: Seams) -> None:
    def scores(_, q_CHI, k_SI, w_CH, elements):
        return torch.einsum("chi,si,ch->cs", q_CHI, k_SI, w_CH)

    bug.around(plain_indexer, "index_scores", scores)


@mutation(
    f"{OURS}: the factors on the indexer's weights are left out, which no choice shows", "sparse", FORWARD, "index_loss"
)
def index_weights_without_their_factors(bug: Seams) -> None:
    def forward(original, self, *given):
        made = original(self, *given)
        return made._replace(w_BTH=made.w_BTH * (self._config.heads * self._config.head_dim) ** 0.5)

    bug.around(Indexer, "forward", forward)


@mutation(f"{OURS}: all heads of the indexer weigh the same", "sparse", FORWARD, CHOICE)
def index_heads_weigh_the_same(bug: Seams) -> None:
    def forward(original, self, *given):
        made = original(self, *given)
        return made._replace(w_BTH=made.w_BTH.mean(-1, keepdim=True).expand_as(made.w_BTH))

    bug.around(Indexer, "forward", forward)


@mutation(
    "ml-explore/mlx-lm#1419: the indexer's RoPE turns neighbours where the weights want halves",
    "sparse",
    FORWARD,
    CHOICE,
)
def index_rope_of_the_other_family(bug: Seams) -> None:
    def turn(original, self, x_BTHI, table):
        other = copy(self)
        other._config = replace(self._config, interleaved=not self._config.interleaved)
        return original(other, x_BTHI, table)

    bug.around(Indexer, "_turn", turn)


@mutation(
    f"{OURS}: the indexer's RoPE turns the last elements of a head, as attention's does", "sparse", FORWARD, CHOICE
)
def index_rope_at_the_end(bug: Seams) -> None:
    def turn(original, self, x_BTHI, table):
        return original(self, x_BTHI.roll(self._rope_width, -1), table)

    bug.around(Indexer, "_turn", turn)


@mutation(f"{OURS}: the LayerNorm of the index keys has no bias", "sparse", FORWARD, CHOICE)
def index_keys_without_bias(bug: Seams) -> None:
    bug.around(LayerNorm, "forward", lambda original, self, x: original(self, x) - self.bias)


@mutation(f"{OURS}: an RMSNorm stands in the place of the index keys' LayerNorm", "sparse", FORWARD, CHOICE)
def index_keys_with_their_mean(bug: Seams) -> None:
    def forward(_, self, x):
        return x / (x.square().mean(-1, keepdim=True) + indexer.LAYER_NORM_EPS).sqrt() * self.weight + self.bias

    bug.around(LayerNorm, "forward", forward)


@mutation(f"{OURS}: the indexer takes the query latent before its norm", "sparse", FORWARD, CHOICE)
def index_queries_before_the_norm(bug: Seams) -> None:
    def index(original, self, indexer, x_BTD, q_latent, remake, positions):
        other = copy(self)
        vars(other)["_modules"] = {**self._modules, "q_norm": _NoNorm()}
        return original(other, indexer, x_BTD, q_latent, remake, positions)

    bug.around(MLA, "_index", index)


class _NoNorm(torch.nn.Module):
    def with_remake(self, x):
        return x, None


# The choice


@mutation(f"{OURS}: the newest keys are chosen, whatever their scores", "sparse", FORWARD, CHOICE)
def keys_chosen_by_position(bug: Seams) -> None:
    def best(original, self, scores_TS, top_k):
        places_S = torch.arange(scores_TS.size(-1), dtype=scores_TS.dtype)
        return original(self, places_S.where(scores_TS > -torch.inf, -torch.inf), top_k)

    bug.around(PlainKernels, "best_keys", best)


@mutation(f"{OURS}: of equal scores the later key wins", "sparse", FORWARD, CHOICE)
def ties_go_to_the_later_key(bug: Seams) -> None:
    def best(original, self, scores_TS, top_k):
        found = scores_TS.size(-1) - 1 - original(self, scores_TS.flip(-1), top_k)
        none = found == scores_TS.size(-1)
        ordered = found.masked_fill(none, scores_TS.size(-1)).sort(-1).values
        return ordered.masked_fill(ordered == scores_TS.size(-1), -1)

    bug.around(PlainKernels, "best_keys", best)


@mutation(f"{OURS}: a query does not choose its own position", "sparse", FORWARD, CHOICE)
def index_mask_one_off(bug: Seams) -> None:
    def best(original, self, scores_TS, top_k):
        seen_TS = scores_TS > -torch.inf
        own_T1 = seen_TS.sum(-1, keepdim=True) - 1
        without = scores_TS.scatter(-1, own_T1.clamp(min=0), -torch.inf)
        return original(self, without.where(own_T1 > 0, scores_TS), top_k)

    bug.around(PlainKernels, "best_keys", best)


@mutation(f"{OURS}: a key fewer than top_k is chosen", "sparse", FORWARD, CHOICE)
def one_key_too_few(bug: Seams) -> None:
    def choose(original, self, index, seen, top_k):
        return F.pad(original(self, index, seen, top_k - 1), (0, 1), value=-1)

    bug.around(PlainKernels, "choose_keys", choose)


@mutation(f"{OURS}: keys are chosen from all documents", "sparse documents", FORWARD, CHOICE)
def keys_of_other_documents(bug: Seams) -> None:
    def choose(original, self, x_BTD, q_latent, remake, positions):
        whole = replace(positions, documents_BT=None)
        return original(self, x_BTD, q_latent, remake, whole)

    bug.around(MLA, "_choose", choose)


@mutation(
    f"{OURS}: a layer without an indexer takes the keys of the first layer, not of the last with one",
    "sparse",
    FORWARD,
    CHOICE,
)
def shared_keys_of_the_first_layer(bug: Seams) -> None:
    def choose(original, self, x_BTD, q_latent, remake, positions):
        index, chosen = original(self, x_BTD, q_latent, remake, positions)
        first = vars(positions.choices).setdefault("first", chosen)
        return index, chosen if self.indexer is not None else first

    bug.around(MLA, "_choose", choose)


@mutation(
    f"{OURS}: a layer that runs again takes the newest choice of keys, which is another layer's",
    "sparse again",
    BACKWARD,
    r"attention|layers|gradients",
)
def keys_of_another_layer_when_it_runs_again(bug: Seams) -> None:
    def choose(original, self, x_BTD, q_latent, remake, positions):
        newest = positions.choices.chosen_BTK
        index, chosen = original(self, x_BTD, q_latent, remake, positions)
        return index, newest if is_repeated() else chosen

    bug.around(MLA, "_choose", choose)


@mutation(f"{OURS}: validation takes all keys", "sparse", VALIDATION, "held-out", "fp32")
def validation_is_dense(bug: Seams) -> None:
    def choose(original, self, *given):
        return original(self, *given) if self.training else (None, None)

    bug.around(MLA, "_choose", choose)


# Its loss


@mutation(
    f"{OURS}: the indexer's input is not detached, and its loss moves the model",
    "sparse",
    BACKWARD,
    r"layers|attention|embedding",
)
def index_input_not_detached(bug: Seams) -> None:
    def choose(original, self, x_BTD, *given):
        vars(self)["attached"] = x_BTD
        return original(self, x_BTD, *given)

    def index(original, self, indexer, x_BTD, *given):
        return original(self, indexer, self.attached, *given)

    bug.around(MLA, "_choose", choose)
    bug.around(MLA, "_index", index)


def _learnt(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], all_keys: bool = False) -> Callable:
    """The loss of an indexer over chosen keys by autograd, for whole sequences. loss_of: takes p and I (B, T, S), and the chosen keys.
    all_keys: I of all keys that a query sees, also of those that it did not choose."""

    def index_loss(_, self, index, chosen_BTK, shares_BTK, weight_BT):
        vectors = IndexVectors(*(each.detach().requires_grad_() for each in index))
        with torch.enable_grad():
            products_BHTS = torch.einsum("bthi,bsi->bhts", vectors.q_BTHI, vectors.k_BSI).relu()
            index_BTS = torch.einsum("bhts,bth->bts", products_BHTS, vectors.w_BTH)
            length = index_BTS.size(-1)
            place_BTK = chosen_BTK.long().where(chosen_BTK >= 0, length)
            p_BTS = index_BTS.new_zeros(*index_BTS.shape[:2], length + 1).scatter(-1, place_BTK, shares_BTK)[
                ..., :length
            ]
            open_BTS = torch.zeros_like(p_BTS, dtype=torch.bool)
            open_BTS = F.pad(open_BTS, (0, 1)).scatter(-1, place_BTK, True)[..., :length]
            seen_BTS = torch.ones_like(open_BTS).tril() if all_keys else open_BTS
            loss = (loss_of(p_BTS, index_BTS, seen_BTS) * weight_BT).sum()
        return IndexLoss(loss.detach(), IndexVectors(*torch.autograd.grad(loss, vectors)))

    return index_loss


def _log_softmax(index_BTS: Tensor, open_BTS: Tensor) -> Tensor:
    return index_BTS.masked_fill(~open_BTS, -torch.inf).log_softmax(-1).masked_fill(~open_BTS, 0)


def _kl(p_BTS: Tensor, index_BTS: Tensor, open_BTS: Tensor) -> Tensor:
    return (torch.xlogy(p_BTS, p_BTS) - p_BTS * _log_softmax(index_BTS, open_BTS)).sum(-1)


@mutation(f"{OURS}: the KL divergence is that of the attention from the scores", "sparse", FORWARD, "index_loss")
def kl_the_other_way(bug: Seams) -> None:
    def other(p_BTS, index_BTS, open_BTS):
        log_BTS = _log_softmax(index_BTS, open_BTS)
        return (log_BTS.exp() * (log_BTS - p_BTS.clamp_min(1e-30).log()) * open_BTS).sum(-1)

    bug.around(PlainKernels, "chosen_index_loss", _learnt(other))


@mutation(f"{OURS}: in the sparse stage scores are normalised over all keys", "sparse", FORWARD, "index_loss")
def kl_over_all_keys(bug: Seams) -> None:
    bug.around(PlainKernels, "chosen_index_loss", _learnt(_kl, all_keys=True))


@mutation(
    f"{OURS}: in the sparse stage the target is the attention over all keys, not normalised over the chosen",
    "sparse",
    FORWARD,
    "index_loss",
)
def target_not_normalised_over_the_chosen(bug: Seams) -> None:
    def index_loss(original, self, index, chosen_BTK, shares_BTK, weight_BT):
        return original(self, index, chosen_BTK, 0.6 * shares_BTK, weight_BT)

    bug.around(PlainKernels, "chosen_index_loss", index_loss)


@mutation(f"{OURS}: the attention of the heads is summed and not divided", "sparse warm-up", FORWARD, "index_loss")
def target_summed_over_heads(bug: Seams) -> None:
    def attention(original, self, target, b, queries, k_HSQ, bias_CS):
        return original(self, target, b, queries, k_HSQ, bias_CS) * len(k_HSQ)

    bug.around(PlainKernels, "mean_attention", attention)


@mutation(f"{OURS}: the indexer learns from the first head alone", "sparse warm-up", FORWARD, "index_loss")
def target_of_the_first_head(bug: Seams) -> None:
    def attention(original, self, target, b, queries, k_HSQ, open_CS):
        one = replace(target, q_BHTQ=target.q_BHTQ[:, :1], lse_BHT=target.lse_BHT[:, :1])
        return original(self, one, b, queries, k_HSQ[:1], open_CS)

    bug.around(PlainKernels, "mean_attention", attention)


@mutation(f"{OURS}: the gradient of the indexer forgets its target", "sparse warm-up", BACKWARD, "indexer")
def index_gradient_without_target(bug: Seams) -> None:
    def gradients(original, grads, index, b, queries, keys, dscores_CS):
        original(grads, index, b, queries, keys, dscores_CS.clamp(min=0))

    bug.around(plain_indexer, "_add_gradients", gradients)


@mutation(
    f"{OURS}: the losses of indexers are not divided by the number of micro-batches", "sparse", FORWARD, "index_loss"
)
def index_loss_of_every_micro_batch(bug: Seams) -> None:
    def weights(original, chunks, plan, balance_weight, index_weight):
        original(chunks, plan, balance_weight, 2 * index_weight)

    bug.around(training_engine, "set_weights", weights)


@mutation(f"{OURS}: indexers of MTP modules learn nothing", "sparse", FORWARD, "index_loss")
def mtp_indexers_learn_nothing(bug: Seams) -> None:
    def learn(original, self, y_BTD, index, positions, *given):
        return y_BTD if positions.whole_length > positions.length else original(self, y_BTD, index, positions, *given)

    bug.around(MLA, "_learn", learn)


@mutation(f"{OURS}: queries that are not learnt count for the indexers", "sparse chats", FORWARD, "index_loss")
def index_loss_of_all_queries(bug: Seams) -> None:
    def weights(original, positions, batch, device):
        return torch.full_like(original(positions, batch, device), positions.choices.weight)

    bug.around(mla, "query_weights", weights)


# Both stages, and ranks


@mutation(
    f"{OURS}: attention is sparse in a warm-up too, before the indexer has learnt anything",
    "sparse warm-up",
    FORWARD,
    r"outputs|index_loss|chosen",
)
def warmup_is_sparse(bug: Seams) -> None:
    def choose(original, self, x_BTD, q_latent, remake, positions):
        alone, positions.choices.alone = positions.choices.alone, None
        try:
            return original(self, x_BTD, q_latent, remake, positions)
        finally:
            positions.choices.alone = alone

    bug.around(MLA, "_choose", choose)


@mutation(f"{OURS}: weights that a warm-up leaves alone decay", "sparse warm-up", UPDATE, r"master|decay", "fp32")
def warmup_lets_weights_decay(bug: Seams) -> None:
    def set_lr(original, self, lr):
        original(self, lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    bug.around(Zero, "set_lr", set_lr)


@mutation(
    f"{OURS}: gradients of weights that are sharded by then are lost",
    "sparse warm-up zero 3",
    REDUCTION,
    "gradients of weights|reduced gradients",
)
def gradients_of_sharded_weights_are_lost(bug: Seams) -> None:
    def keep(original, self, param, gradient):
        return original(self, param, None if gradient is None or param.numel() else 0 * gradient)

    bug.around(ShardedWeights, "_keep_for_freed", keep)


def _by_rank(original: Callable, positions, k_BTI: Tensor) -> Tensor:
    """Keys of all positions in the order of the ranks that have them."""
    whole, pieces = original(positions, k_BTI), positions.pieces
    order = [at for part in range(len(pieces) // 2) for at in (part, len(pieces) - 1 - part)]
    return torch.cat([whole[:, pieces[at].start : pieces[at].stop] for at in order], 1)


@mutation(
    f"{OURS}: index keys of other ranks are in the order of the ranks, not of their positions",
    "sparse shared",
    FORWARD,
    CHOICE,
)
def index_keys_in_the_order_of_ranks(bug: Seams) -> None:
    bug.around(mla, "whole_keys", _by_rank)


@mutation(
    f"{OURS}: the loss takes index keys of other ranks in the order of the ranks",
    "sparse shared",
    FORWARD,
    "index_loss",
)
def loss_with_index_keys_in_the_order_of_ranks(bug: Seams) -> None:
    bug.around(indexer, "whole_keys", _by_rank)


@mutation(
    "modelscope/ms-swift#9720: ranks that share a sequence choose from their own keys alone",
    "sparse shared",
    FORWARD,
    CHOICE,
)
def keys_of_this_rank_alone(bug: Seams) -> None:
    def whole(original, positions, k_BTI):
        found = torch.zeros_like(original(positions, k_BTI))
        for piece, own in zip(positions.here, k_BTI.split([len(piece) for piece in positions.here], 1), strict=True):
            found[:, piece.start : piece.stop] = own
        return found

    bug.around(mla, "whole_keys", whole)
