"""Defines DeepSeek-V3. The same class is the complete model or a pipeline chunk with some parts of the model.

Parameter names are global in every chunk: `embedding.weight`, `layers.17.attention.kv_up.weight`,
`layers.17.moe.experts.w13`, `norm.weight`, `head.weight`, `mtp.0.projection.weight`.

The last chunk computes the main loss and the MTP losses, so it returns no logits. MTP needs the embedding, so the last
chunk also has `embedding.weight`. If the first and the last chunk are in one process, they share this table.

Shapes: B sequences, S = T + 1 tokens of a sample, T positions, D width, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.errors import UserError
from conf.own_code import subclass
from conf.schema import Model, Recompute
from train.model.block import Block
from train.model.indexer import Indexer, LearnAlone
from train.model.layers import AddedMatmul, Embedding, LayerPrecision, RMSNorm
from train.model.loss import cross_entropy, token_logprobs
from train.model.moe import Dispatcher, LocalDispatcher
from train.model.mtp import MTP
from train.model.offload import Host
from train.model.operations import Kernels
from train.model.rope import Rope
from train.model.router import Router
from train.model.sequence import Positions, SequenceShare
from train.model.token_losses import LossTokens, TokenLoss


class Losses:
    """Sums the losses of all micro-batches since the last `clear`, on the device, without gradient."""

    def __init__(self, depths: int):
        self._depths = depths
        self.clear()

    def clear(self) -> None:
        self.count = 0
        """Number of micro-batches."""
        self.main: Tensor | float = 0.0
        """Sum of the main model's losses."""
        self.mtp: list[Tensor | float] = [0.0] * self._depths
        """Sum of the losses of each MTP depth, without the MTP weight."""
        self.extra: Tensor | float = 0.0
        """Sum of the user's own loss term (optim.extra_loss)."""

    def add(self, main: Tensor, mtp: list[Tensor], extra: Tensor | None = None) -> None:
        self.count += 1
        self.main = self.main + main.detach()
        self.extra = self.extra if extra is None else self.extra + extra.detach()
        self.mtp = [total + loss.detach() for total, loss in zip(self.mtp, mtp, strict=True)]

    def means(self) -> Tensor:
        """Return means over micro-batches, (2 + depths,): main loss, MTP losses, and the user's loss term."""
        device = self.main.device if isinstance(self.main, Tensor) else None
        totals = [
            total if isinstance(total, Tensor) else torch.full((), total, device=device)
            for total in (self.main, *self.mtp, self.extra)
        ]
        return torch.stack(totals) / self.count


@dataclass(frozen=True)
class ModelOutputs:
    """Arguments of the user's loss term (optim.extra_loss), for one micro-batch's local positions."""

    hidden_BTD: Tensor
    """Hidden states after the final norm."""
    targets_BT: Tensor
    """The next tokens, int64."""
    head_VD: Tensor
    """The weight of the output head."""
    learnt_BT: Tensor
    """Whether a target is learnt, bool. In chats, only answers are learnt."""
    divisor: float
    """Divisor of sums over the local learnt positions. It gives all learnt targets of a step the same weight."""

    def mean(self, values_BT: Tensor) -> Tensor:
        """Return the sum of `values_BT` over the learnt tokens of this micro-batch, divided by `divisor`.

        The mean of the results of all micro-batches and ranks is the mean over all learnt tokens of the step.
        """
        return values_BT.masked_fill(~self.learnt_BT, 0).sum() / self.divisor

    def logits(self) -> Tensor:
        """Return the logits of all positions, fp32 (B, T, V), with gradient.

        This needs much memory; the cross-entropy stores the logits of only one chunk of positions at a time.
        """
        return F.linear(self.hidden_BTD, self.head_VD.to(self.hidden_BTD.dtype)).float()


class Head(nn.Module):
    """The output head. One call computes all depths, because a call may gather the weights from other ranks."""

    def __init__(self, width: int, vocab_size: int, chunk: int, kernels: Kernels, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width, **factory))
        self._chunk, self._kernels = chunk, kernels
        self.added: AddedMatmul | None = None
        """The adapter of the head's weight, set before adapter training; else None."""
        self.extra_loss: Callable[[ModelOutputs], Tensor] | None = None
        """The user's loss term, set when the model is built for training."""
        self.token_loss: TokenLoss | None = None
        """Replaces the cross-entropy as the loss of the main model, set before a step; None: the cross-entropy."""
        self.gives_logprobs = False
        """Whether eval mode returns log-probabilities (B, T) instead of a loss."""

    def forward(
        self,
        states: list[Tensor],
        tokens_BS: Tensor,
        positions: Positions,
        supervised_BS: Tensor | None = None,
        divisor: float | None = None,
        detaches_mtp: bool = False,
        tensors_BS: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> list[Tensor]:
        """Return the loss of the main model and the loss of each MTP depth.

        In training, the user's loss term, if given, is the last element. In eval mode with `gives_logprobs`, the result
        is log-probabilities.

        states: hidden states of the main model (B, T, D), then of each MTP depth, each one position shorter than the
            previous.
        divisor: divides each depth's sum of losses, although MTP depths have fewer targets (paper eq. 24). The sum
            covers supervised tokens, or all tokens if there is no mask. If divisor is None, it is the number of local
            positions of the main model.
        detaches_mtp: whether only the main model's loss trains the head's weight.
        tensors_BS: the tensors per token that `token_loss` needs.
        """
        if self.gives_logprobs and not self.training:
            return [self.logprobs(states[0], tokens_BS, positions, tensors_BS)]
        divisor = len(tokens_BS) * positions.count if divisor is None else divisor
        losses = []
        for depth, hidden_BTD in enumerate(states):
            left = positions.shorter(depth) if depth else positions
            learnt_N = None if supervised_BS is None else left.learnt(supervised_BS)
            if not depth and self.training and self.token_loss is not None:
                losses.append(self._token_loss(hidden_BTD, tokens_BS, positions, supervised_BS, divisor, tensors_BS))
                continue
            weight_VD = self.weight.detach() if detaches_mtp and depth else self.weight
            losses.append(self.loss(hidden_BTD, left.take(tokens_BS, depth + 1), divisor, learnt_N, weight_VD))
        if self.training and self.extra_loss is not None:
            targets_BT = positions.take(tokens_BS, 1)
            learnt_BT = torch.ones_like(targets_BT, dtype=torch.bool)
            if supervised_BS is not None:
                learnt_BT = positions.take(positions.learnt_BT(supervised_BS)).to(targets_BT.device)
            outputs = ModelOutputs(states[0], targets_BT, self.weight, learnt_BT, divisor)
            losses.append(_scalar(self.extra_loss(outputs)))
        return losses

    def logprobs(
        self,
        hidden_BTD: Tensor,
        tokens_BS: Tensor,
        positions: Positions,
        tensors_BS: Mapping[str, Tensor],
        rows_N: Tensor | None = None,
    ) -> Tensor:
        """Return log p(token | previous tokens) of every target of the complete sequences, fp32 (B, T).

        If the batch has a tensor `temperatures`, the logits are divided by it.

        rows_N: indices of the local positions to compute; all other local results are 0. None: compute all.
        """
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), positions.take(tokens_BS, 1).flatten()
        temperature_N = None
        if "temperatures" in tensors_BS:
            temperature_N = positions.take(tensors_BS["temperatures"], 1).flatten()
        if rows_N is not None:
            if not len(rows_N):
                # Use one row that has no effect on the loss. Without a row, the graph would be incomplete, and other
                # ranks would wait forever in backward. The temperature of this row is 1.
                rows_N, temperature_N = rows_N.new_zeros(1), None
            hidden_ND, targets_N = hidden_ND.index_select(0, rows_N), targets_N.index_select(0, rows_N)
            temperature_N = None if temperature_N is None else temperature_N.index_select(0, rows_N)
        hidden_ND, weight_VD = self.adapted(hidden_ND, self.weight)
        found_N = token_logprobs(hidden_ND, weight_VD, targets_N, temperature_N, self._chunk, self._kernels)
        if rows_N is not None:
            found_N = found_N.new_zeros(hidden_BTD.shape[:2].numel()).index_copy(0, rows_N, found_N)
        return positions.gather(found_N.view(hidden_BTD.shape[:2]))

    def _token_loss(
        self,
        hidden_BTD: Tensor,
        tokens_BS: Tensor,
        positions: Positions,
        supervised_BS: Tensor | None,
        divisor: float,
        tensors_BS: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the sum of `token_loss` over the learnt tokens, divided by divisor.

        If ranks share sequences, each rank computes the sum over complete sequences, divided by the number of these
        ranks.
        """
        assert self.token_loss is not None
        device, rows_N = hidden_BTD.device, None
        learnt_BT = samples_BT = torch.zeros(len(tokens_BS), positions.length, dtype=torch.int64)
        if supervised_BS is None:
            learnt_BT = learnt_BT == 0
        else:
            learnt_BT, rows_N = positions.learnt_BT(supervised_BS), positions.learnt(supervised_BS).to(device)
        if positions.documents_BT is not None:
            samples_BT = positions.documents_BT.long()
        given_BT = self.logprobs(hidden_BTD, tokens_BS, positions, tensors_BS, rows_N)
        learnt_BT = learnt_BT.to(device)
        # A token that is not learnt gets no gradient. Without this line, a log-probability that is not finite would
        # spoil the gradients of other tokens.
        logprobs_BT = given_BT.where(learnt_BT, 0)
        cut_BT = {name: tensor_BS[:, 1:] for name, tensor_BS in tensors_BS.items()}
        tensors_BT = {name: tensor.where(learnt_BT | tensor.isfinite(), 0) for name, tensor in cut_BT.items()}
        tokens = LossTokens(learnt_BT, samples_BT.to(device), tensors_BT)
        found_BT = self.token_loss(logprobs_BT, tokens)
        if not isinstance(found_BT, Tensor) or found_BT.shape != logprobs_BT.shape or not found_BT.is_floating_point():
            given = f"a tensor {tuple(found_BT.shape)}" if isinstance(found_BT, Tensor) else type(found_BT).__name__
            rule = f"must be the loss of every token, a tensor {tuple(logprobs_BT.shape)} of floats"
            raise UserError("loss", given, rule, "return it for all tokens: the engine selects the learnt tokens")
        if "weights" in tensors_BT:
            found_BT = found_BT * tensors_BT["weights"]
        parts = 1 if positions.share is None else positions.share.parts
        # Multiplication by 0 keeps all log-probabilities in the graph.
        return (found_BT.where(learnt_BT, 0) + 0 * given_BT).sum() / (divisor * parts)

    def adapted(self, hidden: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the operands of the logits' matmul for hidden states (..., D)."""
        return (hidden, weight_VD) if self.added is None else self.added.widen(hidden, weight_VD)

    def loss(
        self, hidden_BTD: Tensor, targets_BT: Tensor, divisor: float, learnt_N: Tensor | None, weight_VD: Tensor
    ) -> Tensor:
        """Return the sum of the cross-entropies, divided by `divisor`.

        learnt_N: indices of the rows to sum, on the host; None: all rows.
        """
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
        if learnt_N is not None and len(learnt_N) == 0:
            # Use one row with weight 0. Otherwise the graph would be incomplete, and other ranks would wait in
            # backward.
            learnt_N, divisor = learnt_N.new_zeros(1), math.inf
        if learnt_N is not None:
            learnt_N = learnt_N.to(hidden_ND.device)
            hidden_ND, targets_N = hidden_ND.index_select(0, learnt_N), targets_N.index_select(0, learnt_N)
        hidden_ND, weight_VD = self.adapted(hidden_ND, weight_VD)
        return cross_entropy(hidden_ND, weight_VD, targets_N, divisor, self._chunk, self._kernels)


def _scalar(loss: Tensor) -> Tensor:
    """Return the user's loss term as a scalar. Raises TypeError unless it is a tensor with one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        what = f"a tensor {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"optim.extra_loss gave {what}; it must return a tensor with one number: a mean over the positions"
        )
    return loss.float().reshape(())


class DeepSeekV3(nn.Module):
    """The complete model, or one chunk of it. After a build on the meta device, call `init.initialise` or load weights.

    seq_len: length of the run's sequences, which decides whether YaRN applies.
    layers: global indices of the chunk's blocks.
    has_head: whether the chunk has the final norm, the output head and the MTP modules.
    dispatcher: sends tokens to experts, for all MoE layers; None if all experts are local.
    local_experts: indices of this rank's experts in every layer; None: all experts.
    embedding: an embedding table that another chunk has too; None: build one.
    share: exchanges values with the ranks that have other positions of the same sequences; None if complete sequences
        are local.
    host: stores the activations that config.offload names; None if no backward follows.
    dtype, device: dtype and device of the parameters.
    """

    def __init__(
        self,
        config: Model,
        precision: LayerPrecision,
        *,
        seq_len: int,
        layers: range,
        has_embedding: bool,
        has_head: bool,
        dispatcher: Dispatcher | None = None,
        local_experts: range | None = None,
        embedding: Embedding | None = None,
        share: SequenceShare | None = None,
        host: Host | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        rope = Rope(config, seq_len)
        dispatcher = dispatcher or LocalDispatcher(config.experts, precision.kernels)
        local_experts = range(config.experts) if local_experts is None else local_experts
        self.config, self.has_embedding, self.has_head = config, has_embedding, has_head
        self.losses = Losses(config.mtp_depth)
        self.step = 0
        """Index of the current step, on which an adapter's dropout mask depends. Set before each step."""
        self.mtp_weight = 0.0
        """Weight lambda of the MTP losses, set before each step."""
        self.detaches_mtp = False
        """Whether MTP losses train only the MTP modules, set at build time."""
        self.warms_indexers = False
        """Whether training changes only the indexers, set at build time. If so, attention covers all keys."""
        self.loss_divisor: float | None = None
        """Number by which training divides the sum of the tokens' losses, set before each step; None: the number of
        local positions. If there is a mask of supervised tokens, eval mode does not divide; else it divides by the
        number of local positions."""
        self.index_weight = 0.0
        """Weight of the indexers' losses, divided by the number of micro-batches. Set before each step."""
        self.observer: Callable[[list[Tensor], Tensor, Positions], None] | None = None
        """A function that eval mode calls with the head's inputs, tokens_BS and the local positions.

        The head's inputs are the states (B, T, D) of the main model and of every MTP depth. Without an observer, eval
        mode skips the MTP modules.
        """
        self._share = share
        own = bool(config.block or config.router)
        self.backward_in_one_piece = own or (has_head and config.mtp_depth > 1) or config.sparse.heads > 0
        """Whether backward must compute input gradients and weight gradients together.

        torch cannot split the two in these cases:
        - A weight is used twice on one path: the embedding from MTP depth 2 on, or weights of the user's blocks and
        routers.
        - The model has indexers, whose inputs get no gradient.
        """
        self._dtype = precision.dtype
        if has_embedding or (has_head and config.mtp_depth):
            self.embedding = embedding or Embedding(config.vocab_size, config.hidden, **factory)
        # torch's container classes do not declare the types of their elements.
        self.layers = cast("MutableMapping[str, Block]", nn.ModuleDict())
        block = subclass("model.block", config.block, Block)
        for place, index in enumerate(layers):
            here, repeat = None if index < config.dense_layers else dispatcher, place < config.repeated_layers
            away = config.offloaded_part(place)
            more = {"chooses": True} if config.sparse.chooses(index) else {}
            made = block(config, precision, rope, here, local_experts, repeat, host, away, **more, **factory)
            if hasattr(made, "moe"):
                made.moe.router.layer = index - config.dense_layers
            if config.sparse.chooses(index):
                made.attention.indexer.layer = sum(map(config.sparse.chooses, range(index)))
            self.layers[str(index)] = made
        if has_head:
            recompute, kernels = Recompute.norm in config.recompute, precision.kernels
            self.norm = RMSNorm(config.hidden, config.norm_eps, recompute, kernels, **factory)
            self.head = Head(config.hidden, config.vocab_size, config.loss_chunk, kernels, **factory)
            mtp = (MTP(config, precision, rope, dispatcher, local_experts, **factory) for _ in range(config.mtp_depth))
            self.mtp = cast("Sequence[MTP]", nn.ModuleList(mtp))

    @classmethod
    def whole(cls, config: Model, precision: LayerPrecision, *, seq_len: int, **rest) -> "DeepSeekV3":
        """Build the complete model."""
        return cls(
            config,
            precision,
            seq_len=seq_len,
            layers=range(config.layers),
            has_embedding=True,
            has_head=True,
            **rest,
        )

    def forward(
        self,
        x: Tensor,
        *,
        tokens_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        supervised_BS: Tensor | None = None,
        experts_BTLK: Tensor | None = None,
        keys_BTLK: Tensor | None = None,
        **tensors_BS: Tensor,
    ) -> Tensor:
        """Return hidden states (B, T, D), or from the last chunk the loss, fp32 (1,).

        In training, the loss is main + mtp_weight / depths * sum of MTP losses, over the local positions. In eval mode,
        it is the main loss.

        x: tokens (B, S) for the first chunk, else hidden states of the local positions.
        tokens_BS: tokens of complete sequences. Needed if ranks share sequences, and for a last chunk that is not the
            first.
        documents_BS: document index of every token, on the host; a token attends only to its own document.
        supervised_BS: mask of the tokens that training supervises, on the host. If given, each document is a separate
            sample (`Positions.samples_BS`).
        experts_BTLK, keys_BTLK: see `Positions`.
        tensors_BS: the tensors per token that `Head.token_loss` needs.
        """
        tokens_BS = x if self.has_embedding else tokens_BS
        documents_BT = None if documents_BS is None else documents_BS[:, :-1]
        length = x.size(1) if tokens_BS is None else tokens_BS.size(1) - 1
        samples_BS = None if supervised_BS is None else documents_BS
        replayed = {"experts_BTLK": experts_BTLK, "keys_BTLK": keys_BTLK}
        positions = Positions(length, documents_BT, self._share, samples_BS=samples_BS, **replayed)
        if self.training and self.index_weight and self.config.sparse.heads:
            divisor = len(x) * positions.count if self.loss_divisor is None else self.loss_divisor or math.inf
            positions.choices.weight, positions.choices.supervised_BS = self.index_weight / divisor, supervised_BS
        if not (self.training and self.warms_indexers):
            return self._run(x, positions, tokens_BS, supervised_BS, tensors_BS)
        positions.choices.alone = gradients = {}
        with torch.no_grad():
            out = self._run(x, positions, tokens_BS, supervised_BS, tensors_BS)
        return LearnAlone.apply(out, x, gradients.values(), *gradients) if torch.is_grad_enabled() else out

    def _run(
        self,
        x: Tensor,
        positions: Positions,
        tokens_BS: Tensor | None,
        supervised_BS: Tensor | None,
        tensors_BS: dict[str, Tensor],
    ) -> Tensor:
        """Compute what `forward` returns, for these positions of the sequences."""
        embedding_BTD = None
        if self.has_embedding or self._depths:
            assert tokens_BS is not None
            embedding_BTD = self._embed(positions.take_with_next(tokens_BS, self._depths))
            if self.has_embedding:
                x = embedding_BTD if self._share is None else embedding_BTD.narrow(1, 0, positions.count)
        hidden_BTD = self._run_layers(x, positions)
        if not self.has_head:
            return hidden_BTD
        assert tokens_BS is not None
        loss = self._loss(self.norm(hidden_BTD), embedding_BTD, tokens_BS, positions, supervised_BS, tensors_BS)
        if loss.dim():
            return loss
        return torch.stack([loss])  # a new tensor, not a view, because pipeline schedules detach it in place

    def logits(self, x: Tensor, last: bool = False) -> Tensor:
        """Return fp32 logits (B, T, V).

        x: tokens (B, T), or hidden states for a last chunk without an embedding.
        last: whether to return only the logits of the last position.
        """
        hidden_BTD = self.norm(self._run_layers(self._embed(x) if self.has_embedding else x, Positions(x.size(1))))
        if last:
            hidden_BTD = hidden_BTD[:, -1:]
        return F.linear(*self.head.adapted(hidden_BTD, self.head.weight.to(hidden_BTD.dtype))).float()

    def routers(self) -> dict[str, Router]:
        """Return this chunk's routers, with those of MTP modules, by block name."""
        return {
            name.removesuffix(".moe.router").removesuffix(".block"): module
            for name, module in self.named_modules()
            if isinstance(module, Router)
        }

    def indexers(self) -> list[Indexer]:
        """Return this chunk's indexers, with those of MTP modules."""
        return [module for module in self.modules() if isinstance(module, Indexer)]

    def add_loss(self, extra_loss: Callable[[ModelOutputs], Tensor]) -> None:
        """Add the user's loss term to the last chunk, before a pipeline gets the chunk."""
        self.head.extra_loss = extra_loss
        self.backward_in_one_piece = True  # the graph of the user's loss term may use any weight twice

    @property
    def _depths(self) -> int:
        """Number of MTP modules that run in the current mode."""
        return len(self.mtp) if self.has_head and (self.training or self.observer is not None) else 0

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        return self.embedding(tokens_BT).to(self._dtype)

    def _run_layers(self, hidden_BTD: Tensor, positions: Positions) -> Tensor:
        for layer in self.layers.values():
            hidden_BTD = layer(hidden_BTD, positions)
        return hidden_BTD

    def _loss(
        self,
        hidden_BTD: Tensor,
        embedding_BTD: Tensor | None,
        tokens_BS: Tensor,
        positions: Positions,
        supervised_BS: Tensor | None = None,
        tensors_BS: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """Return the scalar loss, or log-probabilities, from the normed hidden states."""
        states = [hidden_BTD]
        for depth, module in zip(range(1, self._depths + 1), self.mtp, strict=False):
            assert embedding_BTD is not None
            if self.detaches_mtp and depth == 1:
                embedding_BTD, states = embedding_BTD.detach(), [hidden_BTD.detach()]
            left = positions.shorter(depth)
            later_BTD = positions.shifted(embedding_BTD, self._depths, depth)
            states.append(module(states[-1].narrow(1, 0, left.count), later_BTD, left))
        states[0] = hidden_BTD
        divisor = self.loss_divisor if self.training else None if supervised_BS is None else 1.0
        states_in = states if self.training else states[:1]
        given = tokens_BS, positions, supervised_BS, divisor, self.detaches_mtp, tensors_BS
        main, *mtp = self.head(states_in, *given)
        if not self.training:
            if self.observer is not None:
                self.observer(states, tokens_BS, positions)
            return main
        extra = mtp.pop() if self.head.extra_loss is not None else None
        self.losses.add(main, mtp, extra)
        main = main if extra is None else main + extra
        return main + sum(mtp) * (self.mtp_weight / len(mtp)) if mtp else main
