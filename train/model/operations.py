"""Defines the operations that layers need. train/kernels implements them for different machines.

A model is built with one `Kernels` object (`LayerPrecision.kernels`). Operations with separate forward and backward
methods are called by a custom autograd Function.

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
"""The rows of each expert: a list of counts, or the index after each expert's last row, int32 (E,)."""

RouterCounters = tuple[Tensor, Tensor, Tensor]
"""Buffers load_E, score_E and balance_loss of a `Router`; each forward adds to them."""


class RoutingRule(NamedTuple):
    """How a router chooses experts and computes gate values."""

    top_k: int
    groups: int
    top_groups: int
    route_scale: float
    group_top_k: int
    softmax: bool = False
    """Whether scores are the logits' softmax instead of their sigmoid."""


class Kernels(Protocol):
    """Computes the operations of the model on one kind of machine."""

    parts: tuple[str, ...]
    """Names of the compiled CPU libraries in use (`train.kernels.cpu.libraries.LIBRARY_NAMES`)."""
    core: AttentionCore
    """Computes attention."""

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x / rms(x) * weight, and 1 / rms(x) as fp32 (..., 1)."""

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, x_needed: bool, weight_needed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and of the weight; None if not needed.

        With u = grad * weight: dx = rstd * (u - x * rstd^2 * mean(u * x)).
        """

    def swiglu(self, h_N2F: Tensor, gates_N: Tensor | None) -> Tensor:
        """Return silu(gate) * up of h = [gate | up], times each row's gate value if given: (N, F). Computed in fp32."""

    def swiglu_backward(self, grad_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of h and of the gate values."""

    def to_heads(
        self, q_BTHQ: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, table: Tensor, nope: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values with heads before positions, and with RoPE applied. Differentiable.

        All heads get the same rope key.

        q_BTHQ: queries, which may be overwritten.
        kv_BTHX: [nope key | value] of each head; the result may be a view of it.
        table: see `Rope.table`.
        """

    def attention(self, given: AttentionInput) -> Tensor:
        """Return softmax(scale q k^T) v, computed by `core`: (B, H, T, V). Differentiable."""

    def choose_keys(self, index: "IndexVectors", seen: SeenKeys, top_k: int) -> Tensor:
        """Return each local query's top_k visible keys with the largest scores, as positions: int32 (B, T, top_k).

        Positions ascend; -1 fills missing keys. Of equal scores, the earlier key wins.

        seen: which keys are visible, with the keys of all positions as one block.
        """

    def index_loss(
        self,
        index: "IndexVectors",
        seen: SeenKeys,
        target: "AttentionTarget",
        weight_BT: Tensor,
    ) -> "IndexLoss":
        """Return the sum of weight * KL(p || softmax(I)) over the local queries, and its gradients.

        The softmax covers all visible keys. train/model/indexer.py defines p and I.
        """

    def attend_chosen(self, given: "ChosenInput") -> "ChosenOutput":
        """Compute attention over chosen keys (train/model/chosen_attention.py)."""

    def attend_chosen_backward(
        self, dout_BTHV: Tensor, given: "ChosenInput", out_BTHV: Tensor, lse_BTH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries and latents in their dtypes, and of the weight in fp32.

        out_BTHV, lse_BTH: results of `attend_chosen`.
        """

    def chosen_index_loss(
        self, index: "IndexVectors", chosen_BTK: Tensor, shares_BTK: Tensor, weight_BT: Tensor
    ) -> "IndexLoss":
        """Return `index_loss` with a softmax over only the chosen keys.

        shares_BTK: attention probability of each chosen key, averaged over heads.
        """

    def logits(self, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        """Return the router's logits x W^T, fp32 (N, E), for operands of any dtype."""

    def logits_backward(
        self, grad_NE: Tensor, x_ND: Tensor, weight_ED: Tensor, x_needed: bool, weight_needed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x, in its dtype, and of the weight, in fp32; None if not needed."""

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
        """Return gate values (fp32) and expert ids (int64), both (B, T, K), from the router's logits.

        Differentiable; the gradient includes the balance loss. In a block's second run (train/model/recompute.py), the
        method returns the first run's ids and counts nothing.

        replayed_BTK: ids of experts to use instead of the best experts. The gate values still come from this router.
        """

    def sort_by_expert(self, expert_ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sort the T * K (token, expert) entries by expert.

        Returns the entry of every sorted row, the sorted row of every entry, the token of every sorted row, and each
        expert's number of rows.
        """

    def sum_entries(self, rows_RD: Tensor, places_TK: Tensor) -> Tensor:
        """Return the sum of every token's K rows: (T, D). Adds in fp32, in the order of K, and rounds once.

        places_TK: indices of each token's rows.
        """

    def cross_entropy(self, logits_NV: Tensor, targets_N: Tensor, scale: float | None) -> Tensor:
        """Return the sum of -log softmax(logits)[target] over the rows, as an fp32 scalar.

        Overwrites the logits with the gradient of this sum times `scale`, unless `scale` is None.
        """

    def linear(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """Return x W^T. Differentiable."""

    def matmul(self, left_OC: Tensor, right_NC: Tensor, dtype: torch.dtype, into_ON: Tensor | None = None) -> Tensor:
        """Return left @ right^T in `dtype`: (O, N). If `into_ON` is given, add the product to it and return it."""

    def groups(self, counts_E: Tensor, dtype: torch.dtype) -> ExpertGroups:
        """Return the argument `groups` of `grouped_matmul` and `grouped_weight_gradient`, for operands in `dtype`.
        counts_E: number of rows of each expert.
        """

    def grouped_matmul(self, x_RI: Tensor, weight_EIO: Tensor, groups: ExpertGroups) -> Tensor:
        """Multiply rows by their expert's weight: (R, O)."""

    def grouped_weight_gradient(
        self, grad_RO: Tensor, x_RI: Tensor, groups: ExpertGroups, dtype: torch.dtype, into_EOI: Tensor | None = None
    ) -> Tensor:
        """Return each expert's weight gradient, grad^T x over its rows: (E, O, I). into_EOI: see `matmul`."""
