"""Defines the operations that layers need. train/kernels implements them for different machines.

A model is built with one `Kernels` object and calls it (`LayerPrecision.kernels`). train/kernels/choice.py chooses the
object for a run. If an operation has separate forward and backward methods, a custom autograd Function calls them.

Shapes: N rows (any leading axes flattened), D width, F inner width, B sequences, T positions or tokens, H heads, Q qk
width, V value width, R rows sorted by expert, E experts, K experts per token, I inputs and O outputs of a matmul, C
contraction.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from train.model.attention import AttentionCore, AttentionInput
from train.model.sequence import Positions, SeenKeys

if TYPE_CHECKING:
    from train.model.chosen_attention import ChosenInput, ChosenOutput
    from train.model.indexer import AttentionTarget, IndexLoss, IndexVectors

ExpertGroups = Tensor | list[int]
"""The rows of each expert: a list of row counts, or the end of each expert's rows as a tensor, int32 (E,)."""

RouterCounters = tuple[Tensor, Tensor, Tensor]
"""Buffers to which a forward adds: load_E, score_E and balance_loss of a `Router`."""


class RoutingRule(NamedTuple):
    """The rule by which experts are chosen and weighted."""

    top_k: int
    groups: int
    top_groups: int
    route_scale: float
    group_top_k: int
    softmax: bool = False
    """Whether scores are the softmax of the logits; otherwise each score is the sigmoid of its logit."""


class Kernels(Protocol):
    """Computes the operations of the model on one kind of machine."""

    parts: tuple[str, ...]
    """The parts of a step that use compiled code, as names in `train.kernels.cpu.libraries.LIBRARY_NAMES`."""
    core: AttentionCore
    """Computes attention."""

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return normalised x, and 1 / rms(x) as fp32 (..., 1)."""

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, x_needed: bool, weight_needed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and of the weight. A gradient that is not needed is None.

        With u = grad * weight: dx = rstd * (u - x * rstd^2 * mean(u * x)).
        """

    def swiglu(self, h_N2F: Tensor, gates_N: Tensor | None) -> Tensor:
        """Return silu(gate) * up of h = [gate | up], (N, F), multiplied by the row's gate value if given.

        The arithmetic is in fp32.
        """

    def swiglu_backward(self, grad_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of h and of the gate values."""

    def to_heads(
        self, q_BTHQ: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, table: Tensor, nope: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values with heads first and rotated rope parts. Differentiable.

        All heads get the same rope key. q_BTHQ: may be overwritten, so no code may read it later. kv_BTHX: [nope key |
        value] of each head. The returned values may be a view of it. table: see `Rope.table`.
        """

    def attention(self, given: AttentionInput) -> Tensor:
        """Return softmax(scale q k^T) v by `core`: (B, H, T, V). Differentiable."""

    def choose_keys(self, index: "IndexVectors", seen: SeenKeys, top_k: int) -> Tensor:
        """Return the top_k visible keys with the largest scores, for each local query.

        Keys are positions in ascending order, int32 (B, T, top_k). If fewer keys are visible, -1 fills the remaining
        entries. If scores are equal, the earlier key wins. seen: the keys of all positions as one block.
        """

    def index_loss(
        self,
        index: "IndexVectors",
        seen: SeenKeys,
        target: "AttentionTarget",
        weight_BT: Tensor,
    ) -> "IndexLoss":
        """Return the sum of weight * KL(p || softmax(I)) over the local queries, and its gradients.

        The softmax covers all keys that a query sees. train/model/indexer.py defines p and I.
        """

    def attend_chosen(self, given: "ChosenInput") -> "ChosenOutput":
        """Compute attention over chosen keys (train/model/chosen_attention.py)."""

    def attend_chosen_backward(
        self, dout_BTHV: Tensor, given: "ChosenInput", out_BTHV: Tensor, lse_BTH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries and latents in their dtypes, and of the weight in fp32.

        out, lse: results of `attend_chosen`.
        """

    def chosen_index_loss(
        self, index: "IndexVectors", chosen_BTK: Tensor, shares_BTK: Tensor, weight_BT: Tensor
    ) -> "IndexLoss":
        """Return the result of `index_loss` over the chosen keys only.

        shares: attention probability of each chosen key, averaged over heads.
        """

    def logits(self, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        """Return the router's logits x W^T in fp32, from operands in any dtype: (N, E)."""

    def logits_backward(
        self, grad_NE: Tensor, x_ND: Tensor, weight_ED: Tensor, x_needed: bool, weight_needed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x in its dtype, and of the weight in fp32. A gradient that is not needed is None."""

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
        """Return gate values (fp32) and expert ids (int64), (B, T, K), from the router's logits.

        Differentiable; the gradient includes the balance loss. When backward runs a block again, the method returns the
        ids of the first run and counts nothing (train/model/recompute.py). replayed_BTK: experts that replace the
        choice by scores. The gates of these experts are computed from this router's scores.
        """

    def sort_by_expert(self, expert_ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the row indices sorted by expert, the inverse order, the token of every sorted row, and the number of
        rows of each expert.
        """

    def sum_entries(self, rows_RD: Tensor, places_TK: Tensor) -> Tensor:
        """Return the sum of the K rows of every token: (T, D). places: row indices.

        The rows are added in order in fp32. Only the complete sum is rounded.
        """

    def cross_entropy(self, logits_NV: Tensor, targets_N: Tensor, scale: float | None) -> Tensor:
        """Return the sum of -log softmax(logits)[target] as an fp32 scalar.

        Overwrites the logits with their gradient times `scale`, unless scale is None.
        """

    def linear(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """Return x W^T. Differentiable."""

    def matmul(self, left_OC: Tensor, right_NC: Tensor, dtype: torch.dtype, into_ON: Tensor | None = None) -> Tensor:
        """Return left @ right^T: (O, N). into: tensor of this dtype; the result is added to it, and it is returned."""

    def groups(self, counts_E: Tensor, dtype: torch.dtype) -> ExpertGroups:
        """Return the groups for the two grouped GEMMs below, for operands in dtype. counts_E: row count of each
        expert."""

    def grouped_matmul(self, x_RI: Tensor, weight_EIO: Tensor, groups: ExpertGroups) -> Tensor:
        """Return each row of x times the weight of the row's expert: (R, O)."""

    def grouped_weight_gradient(
        self, grad_RO: Tensor, x_RI: Tensor, groups: ExpertGroups, dtype: torch.dtype, into_EOI: Tensor | None = None
    ) -> Tensor:
        """Return grad^T x, summed over the rows of each expert: (E, O, I). into: see `matmul`."""
