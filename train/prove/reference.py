"""Implements DeepSeek-V3 in one file, as its formulas are written. mode=prove compares every layout with this
reference.

Read the file from top to bottom to learn the model. The code is slow, and shares no code with the judged program. Its
dtype is that of the weights.

    forward                embedding -> blocks -> head and MTP modules -> losses             PlainModel
    backward               autograd                                                          gradients

reference_sparse.py has sparse attention. reference_step.py has the settings of a step and the update. Numbers of
equations and sections refer to the DeepSeek-V3 report (arXiv 2412.19437).

Shapes: B sequences, S = T + 1 tokens of a sample, T positions, D width, V vocabulary, H heads, Q = nope + rope width of
a head, R rope width, N = B*T flattened tokens, E experts, G groups, K experts of a token, F inner width.
"""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from train.prove.recipe_values import Values
from train.prove.reference_adapter import adapted, adapter_shapes, is_adapted
from train.prove.reference_sparse import indexer_shapes, over_chosen

Weights = dict[str, Tensor]
"""Weights by name. Experts are stacked: w13 (E, 2F, D) has the rows of w1, then of w3; w2 is (E, D, F)."""


def weight_shapes(model: Values) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all weights, in forward order."""
    D, H, E, F_ = model.hidden, model.heads, model.experts, model.expert_width
    Q = model.nope_head_dim + model.rope_head_dim
    queries: dict[str, tuple[int, ...]] = {"q.weight": (H * Q, D)}
    if model.q_rank is not None:
        queries = {"q_down.weight": (model.q_rank, D), "q_norm.weight": (model.q_rank,)}
        queries["q_up.weight"] = (H * Q, model.q_rank)
    attention = queries | {
        "kv_down.weight": (model.kv_rank + model.rope_head_dim, D),
        "kv_norm.weight": (model.kv_rank,),
        "kv_up.weight": (H * (model.nope_head_dim + model.v_head_dim), model.kv_rank),
        "out.weight": (D, H * model.v_head_dim),
    }

    def ffn(width: int) -> dict[str, tuple[int, ...]]:
        return {"w13.weight": (2 * width, D), "w2.weight": (D, width)}

    def under(name: str, parts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{part}": shape for part, shape in parts.items()}

    shared = under("shared", ffn(model.shared_experts * F_)) if model.shared_experts else {}
    moe = {"router.weight": (E, D), "experts.w13": (E, 2 * F_, D), "experts.w2": (E, D, F_)} | shared
    parts = {True: under("ffn", ffn(model.dense_width)), False: under("moe", moe)}

    def block(layer: int | None, dense: bool) -> dict[str, tuple[int, ...]]:
        own = under("attention", attention) | indexer_shapes(model, layer)
        return {"attention_norm.weight": (D,)} | own | {"ffn_norm.weight": (D,)} | parts[dense]

    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (model.vocab_size, D)}
    for layer in range(model.layers):
        shapes |= under(f"layers.{layer}", block(layer, layer < model.dense_layers))
    shapes |= {"norm.weight": (D,), "head.weight": (model.vocab_size, D)}
    joined = {"embedding_norm.weight": (D,), "hidden_norm.weight": (D,), "projection.weight": (D, 2 * D)}
    for depth in range(model.mtp_depth):
        shapes |= under(f"mtp.{depth}", joined | under("block", block(None, False)) | {"norm.weight": (D,)})
    return shapes


def trained_shapes(config: Values) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the trained weights; for an adapter, those of LoRA A and B."""
    shapes = weight_shapes(config.model)
    return adapter_shapes(config, shapes) if is_adapted(config) else shapes


def layers_with_experts(model: Values) -> list[str]:
    """Returns the names of layers with experts, in forward order."""
    main = [f"layers.{layer}" for layer in range(model.dense_layers, model.layers)]
    return main + [f"mtp.{depth}" for depth in range(model.mtp_depth)]


# --- Parts of a block -----------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Returns x divided by its root mean square, times norm weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D


def swiglu(x_ND: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    """Computes the feed-forward network: w2 (silu(w1 x) * w3 x)."""
    gate_NF, up_NF = (x_ND @ w13_2FD.T).chunk(2, -1)
    return (F.silu(gate_NF) * up_NF) @ w2_DF.T


def turns(model: Values, seq_len: int, length: int, like: Tensor) -> Tensor:
    """Returns the rotation angle of each pair j at each position t, (T, R/2). Without YaRN, it is t / theta^(2j/R).

    For long sequences, YaRN changes the angle (paper 4.3). The change depends on how often the pair rotates over
    original_seq_len positions:

        more than beta_fast    unchanged
        less than beta_slow    divided by `factor`
        in between             interpolated linearly
    """
    yarn, width = model.yarn, model.rope_head_dim
    pair = torch.arange(width // 2, dtype=like.dtype, device=like.device)
    frequency = model.rope_theta ** (-2 * pair / width)
    if stretched(model, seq_len):

        def pair_that_turns(times: float) -> float:
            return width / 2 * math.log(yarn.original_seq_len / (2 * math.pi * times)) / math.log(model.rope_theta)

        low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        slow = ((pair - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        frequency = frequency * (1 - slow) + frequency / yarn.factor * slow
    return torch.outer(torch.arange(length, dtype=like.dtype, device=like.device), frequency)


def stretched(model: Values, seq_len: int) -> bool:
    """Returns whether YaRN is active at this sequence length."""
    return model.yarn.always or seq_len > model.yarn.original_seq_len


def rotate(x: Tensor, angle: Tensor, size: float) -> Tensor:
    """Rotates adjacent pairs of the last axis: (a, b) -> size * (a cos - b sin, a sin + b cos)."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angle.cos() * size, angle.sin() * size
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


# --- The model (paper 2.1, 2.2) -------------------------------------------------------------------------------------


@dataclass
class WatchedPass:
    """The results of a forward pass. Backward adds gradients."""

    values: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of the parts by name, in order of computation."""
    main: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Mean cross-entropy of the next token, in nats."""
    mtp: list[Tensor] = field(default_factory=list)
    """Loss of every MTP depth, not multiplied by its weight."""
    balance: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Sum of all layers' sequence-wise balance losses, multiplied by its weight."""
    index: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Sum of all indexers' losses, multiplied by its weight."""
    loads: dict[str, Tensor] = field(default_factory=dict)
    """Tokens per expert, by the name of the layer."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """Largest score of each head, (H,), by the attention's name."""
    trains: bool = True
    """Whether to compute MTP modules and indexers' losses."""
    learnt: int = 1
    """Number of learnt targets of the main model, at least 1."""
    open_BTT: Tensor | None = None
    """Keys that the latest layer with an indexer chose."""

    def keep(self, name: str, value: Tensor) -> Tensor:
        if value.requires_grad:
            value.retain_grad()
        self.values[name] = value
        return value


class PlainBatch(Protocol):
    """The interface of a batch: the sequences of one step."""

    @property
    def tokens_BS(self) -> Tensor: ...

    @property
    def documents_BS(self) -> Tensor | None:
        """Index of each token's document; -1 for padding."""
        ...

    @property
    def supervised_BS(self) -> Tensor | None:
        """Which tokens are learnt; None for all. If set, every document is an independent sample."""
        ...


@dataclass(frozen=True)
class Seats:
    """Documents, samples and learnt targets at MTP depth k."""

    documents_BT: Tensor | None
    samples_BT: Tensor | None = None
    """Index of each position's sample; -1 for an unused target."""
    learnt_BT: Tensor | None = None
    """Whether each position's target is learnt; None for all."""
    samples: int = 0
    """Number of samples in the batch."""

    @classmethod
    def of(cls, batch: PlainBatch, depth: int) -> "Seats":
        documents_BS, supervised_BS = batch.documents_BS, batch.supervised_BS
        if documents_BS is None:
            return cls(None)
        documents_BT, targets_BT = documents_BS[:, : -depth - 1], documents_BS[:, depth + 1 :]
        if supervised_BS is None:
            return cls(documents_BT)
        samples_BT = torch.where(documents_BT == targets_BT, documents_BT, -1)
        learnt_BT = supervised_BS[:, depth + 1 :] & (samples_BT >= 0)
        samples = sum(len(row[row >= 0].unique()) for row in documents_BS)
        return cls(documents_BT, samples_BT, learnt_BT, samples)


class PlainModel:
    """The model with given weights and router biases.

    choices: replacements for the model's choices. A router's name maps to experts (N, K), an attention's name plus
    `.keys` to keys (B, T, T).
    """

    def __init__(
        self, config: Values, weights: Weights, biases: Weights, choices: dict[str, Tensor] | None = None
    ) -> None:
        self.config, self.model, self.optim = config, config.model, config.optim
        self.weights, self.biases, self.choices = weights, biases, choices or {}
        self.is_whole = False
        """Whether the adapter is already added to the weights."""
        self.watched: type[WatchedPass] = WatchedPass
        self.best_without_bias: Callable[[Tensor, int], Tensor] = best

    def losses(self, batch: PlainBatch, trains: bool = True) -> WatchedPass:
        """Runs a forward pass with all losses. trains: as in `WatchedPass`."""
        if is_adapted(self.config) and not self.is_whole:
            whole = copy(self)
            whole.is_whole, whole.weights = True, adapted(self.config, self.weights)
            return whole.losses(batch, trains)
        model, seen = self.model, self.watched(trains=trains)
        tokens_BS, seats = batch.tokens_BS, Seats.of(batch, 0)
        inputs_BT = tokens_BS[:, :-1]
        embedded_BTD = seen.keep("embedding", self.weights["embedding.weight"][inputs_BT])
        seen.learnt = inputs_BT.numel() if seats.learnt_BT is None else max(1, int(seats.learnt_BT.sum()))
        x_BTD, learnt = embedded_BTD, seen.learnt
        for layer in range(model.layers):
            x_BTD = self.block(f"layers.{layer}", layer < model.dense_layers, x_BTD, seats, seen)
        state_BTD = seen.keep("norm", rms_norm(x_BTD, self.weights["norm.weight"], model.norm_eps))
        seen.main = self.cross_entropy(state_BTD, tokens_BS[:, 1:], seats, learnt)
        for depth in range(1, model.mtp_depth + 1) if trains else ():
            # At depth k, position i sees tokens up to i + k, and predicts token i + k + 1.
            seats = Seats.of(batch, depth)
            if self.optim.detach_mtp and depth == 1:
                state_BTD, embedded_BTD = state_BTD.detach(), embedded_BTD.detach()
            state_BTD = self.mtp(f"mtp.{depth - 1}", state_BTD[:, :-1], embedded_BTD[:, depth:], seats, seen)
            seen.mtp.append(
                self.cross_entropy(state_BTD, tokens_BS[:, depth + 1 :], seats, learnt, self.optim.detach_mtp)
            )
        return seen

    def cross_entropy(
        self, state_BTD: Tensor, targets_BT: Tensor, seats: "Seats", learnt: int, alone: bool = False
    ) -> Tensor:
        """Returns the sum of -log softmax(head state)[target] over all learnt targets, divided by `learnt`.

        - learnt: number of the main model's targets. The losses of MTP are divided by it too (eq. 24).
        - alone: whether the head gets no gradient from this loss.
        """
        head_VD = self.weights["head.weight"]
        logits_NV = state_BTD.flatten(0, 1) @ (head_VD.detach() if alone else head_VD).T
        each_N = F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="none")
        return (each_N if seats.learnt_BT is None else each_N[seats.learnt_BT.flatten()]).sum() / learnt

    def mtp(self, name: str, state_BTD: Tensor, next_BTD: Tensor, seats: "Seats", seen: WatchedPass) -> Tensor:
        """Runs one MTP module: concatenation, projection and a block (eq. 21, 22)."""
        w, eps = self.weights, self.model.norm_eps
        embedding_BTD = rms_norm(next_BTD, w[f"{name}.embedding_norm.weight"], eps)
        hidden_BTD = rms_norm(state_BTD, w[f"{name}.hidden_norm.weight"], eps)
        joined = torch.cat([embedding_BTD, hidden_BTD], -1) @ w[f"{name}.projection.weight"].T
        x_BTD = self.block(f"{name}.block", False, joined, seats, seen)
        return seen.keep(name, rms_norm(x_BTD, w[f"{name}.norm.weight"], eps))

    def block(self, name: str, dense: bool, x_BTD: Tensor, seats: "Seats", seen: WatchedPass) -> Tensor:
        """Runs one block: x += attention(norm(x)); x += ffn(norm(x))."""
        w, eps = self.weights, self.model.norm_eps
        normed_BTD = rms_norm(x_BTD, w[f"{name}.attention_norm.weight"], eps)
        x_BTD = x_BTD + self.attention(f"{name}.attention", normed_BTD, seats, seen)
        normed_BTD = rms_norm(x_BTD, w[f"{name}.ffn_norm.weight"], eps)
        if dense:
            ffn_BTD = swiglu(normed_BTD, w[f"{name}.ffn.w13.weight"], w[f"{name}.ffn.w2.weight"])
            return seen.keep(name, x_BTD + seen.keep(f"{name}.ffn", ffn_BTD))
        return seen.keep(name, x_BTD + self.experts(f"{name}.moe", normed_BTD, seats, seen))

    def attention(self, name: str, x_BTD: Tensor, seats: "Seats", seen: WatchedPass) -> Tensor:
        """Computes multi-head latent attention (eq. 1-11)."""
        model, w = self.model, self.weights
        (B, T, _), H, nope, R = x_BTD.shape, model.heads, model.nope_head_dim, model.rope_head_dim
        eps = model.norm_eps if model.latent_norm_eps is None else model.latent_norm_eps
        q_latent, up = x_BTD, "q"
        if model.q_rank is not None:
            q_latent = rms_norm(x_BTD @ w[f"{name}.q_down.weight"].T, w[f"{name}.q_norm.weight"], eps)
            up = "q_up"
        q = q_latent @ w[f"{name}.{up}.weight"].T
        latent, k_rope_BTR = (x_BTD @ w[f"{name}.kv_down.weight"].T).split([model.kv_rank, R], -1)
        kv = rms_norm(latent, w[f"{name}.kv_norm.weight"], eps) @ w[f"{name}.kv_up.weight"].T
        q_BHTQ = q.view(B, T, H, -1).transpose(1, 2)
        k_BHTn, v_BHTV = kv.view(B, T, H, -1).transpose(1, 2).split([nope, model.v_head_dim], -1)
        yarn = stretched(model, self.config.seq_len)
        angle, size = turns(model, self.config.seq_len, T, x_BTD), model.yarn.attention_factor if yarn else 1.0
        q_BHTQ = torch.cat([q_BHTQ[..., :nope], rotate(q_BHTQ[..., nope:], angle, size)], -1)
        k_rope_BHTR = rotate(k_rope_BTR, angle, size).unsqueeze(1).expand(B, H, T, R)
        k_BHTQ = torch.cat([k_BHTn, k_rope_BHTR], -1)
        scale = (nope + R) ** -0.5
        if yarn and model.yarn.factor > 1:
            scale *= (0.1 * model.yarn.mscale * math.log(model.yarn.factor) + 1) ** 2
        # Late positions have larger queries, as in Llama 4.
        steps_T1 = torch.arange(T, device=x_BTD.device)[:, None] // model.yarn.original_seq_len
        scale *= 1 + model.yarn.query_growth * steps_T1.to(x_BTD.dtype).log1p()
        unseen_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)
        if (documents_BT := seats.documents_BT) is not None:
            unseen_TT = unseen_TT | (documents_BT[:, None, :, None] != documents_BT[:, None, None, :])
        scores_BHTT = (q_BHTQ @ k_BHTQ.transpose(2, 3) * scale).masked_fill(unseen_TT, -math.inf)
        if model.sparse.heads:
            scores_BHTT = over_chosen(self, name, x_BTD, q_latent, (angle, size), scores_BHTT, seats.learnt_BT, seen)
        seen.scores[name] = scores_BHTT.detach().amax((0, 2, 3))
        out_BHTV = scores_BHTT.softmax(-1) @ v_BHTV
        return seen.keep(name, out_BHTV.transpose(1, 2).flatten(2) @ w[f"{name}.out.weight"].T)

    def experts(self, name: str, x_BTD: Tensor, seats: "Seats", seen: WatchedPass) -> Tensor:
        """Computes the shared experts plus the gated sum of the chosen experts (eq. 12)."""
        w, x_ND = self.weights, x_BTD.flatten(0, 1)
        gates_NK, ids_NK = self.route(f"{name}.router", x_BTD, seats, seen)
        y_ND = torch.zeros_like(x_ND)
        for expert in range(self.model.experts):
            token, place = (ids_NK == expert).nonzero(as_tuple=True)
            if len(token):
                out = swiglu(x_ND[token], w[f"{name}.experts.w13"][expert], w[f"{name}.experts.w2"][expert])
                y_ND = y_ND.index_add(0, token, gates_NK[token, place, None] * out)
        if self.model.shared_experts:
            shared = swiglu(x_ND, w[f"{name}.shared.w13.weight"], w[f"{name}.shared.w2.weight"])
            y_ND = y_ND + seen.keep(f"{name}.shared", shared)
        return seen.keep(name, y_ND.view(x_BTD.shape))

    def route(self, name: str, x_BTD: Tensor, seats: "Seats", seen: WatchedPass) -> tuple[Tensor, Tensor]:
        """Returns the gates (N, K) and ids (N, K) of the chosen experts (eq. 13-16). The bias affects only the choice.

        Token counts and the balance loss ignore positions that predict a token of another sample.
        """
        layer = name.removesuffix(".moe.router").removesuffix(".block")
        weight_ED = self.weights[f"{name}.weight"]
        logits_NE = x_BTD.flatten(0, 1) @ (weight_ED.detach() if self.optim.freeze_routers else weight_ED).T
        scores_NE = logits_NE.softmax(-1) if self.model.scores == "softmax" else logits_NE.sigmoid()
        biased_NE = seen.keep(f"{name}.biased", (scores_NE + self.biases[layer]).detach())
        ids_NK = self.choices.get(name, choose(self.model, biased_NE))
        chosen_NK = scores_NE.gather(1, ids_NK)
        gates_NK = self.model.route_scale * chosen_NK / (chosen_NK.sum(1, keepdim=True) + 1e-20)
        counted_NK = ids_NK if seats.samples_BT is None else ids_NK[seats.samples_BT.flatten() >= 0]
        seen.loads[layer] = torch.bincount(counted_NK.flatten(), minlength=self.model.experts)
        scores_BTE = scores_NE.view(*x_BTD.shape[:2], -1)
        seen.balance = seen.balance + self.optim.balance_loss * self.balance_losses(scores_BTE, seats)
        seen.values[f"{name}.ids"] = ids_NK
        return seen.keep(f"{name}.gates", gates_NK), ids_NK

    def balance_losses(self, scores_BTE: Tensor, seats: "Seats") -> Tensor:
        """Returns the mean balance loss over sequences or independent samples."""
        if seats.samples_BT is None:
            return self.balance_loss(scores_BTE)
        total = scores_BTE.new_zeros(())
        for scores_TE, samples_T in zip(scores_BTE, seats.samples_BT, strict=True):
            for sample in samples_T[samples_T >= 0].unique():
                total = total + self.balance_loss(scores_TE[samples_T == sample].unsqueeze(0))
        return total / seats.samples

    def balance_loss(self, scores_BTE: Tensor) -> Tensor:
        """Computes sum_i f_i P_i for every sequence (eq. 17-20), and returns the mean over sequences.

        - f_i: number of tokens with expert i among the K best without bias, relative to the mean over experts.
        - P_i: expert i's fraction of a token's summed scores, averaged over tokens.
        """
        model, (B, T, E) = self.model, scores_BTE.shape
        best_BTK = self.best_without_bias(scores_BTE.detach(), model.top_k)
        f_BE = F.one_hot(best_BTK, E).sum((1, 2)).to(scores_BTE.dtype) * (E / (model.top_k * T))
        P_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
        return (f_BE * P_BE).sum() / B


def best(scores: Tensor, count: int) -> Tensor:
    """Returns the indices of the largest values; in ties, lower indices first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def choose(model: Values, biased_NE: Tensor) -> Tensor:
    """Returns the K experts with the best biased scores in the top_groups best groups (paper 2.1.2)."""
    if model.top_groups < model.groups:
        open_NG = torch.zeros(len(biased_NE), model.groups, dtype=torch.bool, device=biased_NE.device)
        open_NG.scatter_(1, best(group_scores(model, biased_NE), model.top_groups), True)
        closed_NE = ~open_NG.repeat_interleave(model.experts // model.groups, 1)
        biased_NE = biased_NE.masked_fill(closed_NE, -math.inf)
    return best(biased_NE, model.top_k)


def group_scores(model: Values, biased_NE: Tensor) -> Tensor:
    """Returns each group's score, (N, G): the sum of its best scores."""
    count = model.top_k // model.top_groups if model.group_top_k is None else model.group_top_k
    return biased_NE.unflatten(1, (model.groups, -1)).sort(dim=-1, descending=True).values[..., :count].sum(-1)


# --- Backward and update (paper 4.2) --------------------------------------------------------------------------------


def gradients(plain: PlainModel, batch: PlainBatch, mtp_weight: float) -> WatchedPass:
    """Runs forward and backward of a batch, and sets all gradients.

    The minimised loss is

        main + mtp_weight / depths * sum of MTP losses + balance_loss * sum over layers of sequence-wise losses
        + index_loss * sum of the indexers' losses

    In a warm-up of indexers, the loss is only the last term.
    """
    seen = plain.losses(batch)
    loss = seen.index if plain.optim.index_warmup else seen.main + seen.balance + seen.index
    if seen.mtp and not plain.optim.index_warmup:
        loss = loss + mtp_weight / len(seen.mtp) * sum(seen.mtp)
    loss.backward()
    return seen
