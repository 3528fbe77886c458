"""Defines `Shard`, an interval of a flattened logical tensor. Checkpoints and exports use this form.

A logical tensor is a tensor of the model as on a single rank. These classes describe parts of a weight:

    Shard        an interval of a logical tensor
    Fragment     elements of a rank's own parameter that the rank updates, with master and state
    ShardSlice   position of a parameter's elements in the rank's flat shard
    FlatShard    all weights of one flat parameter, and which rank holds which elements
    WeightPiece  rows and columns of one weight
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from conf.optimizers import UpdateRule


@dataclass
class Shard:
    """Elements [offset, offset + local.numel()) of the flattened logical tensor."""

    local: Tensor
    """The elements, 1-D and contiguous, in the live state's memory."""
    offset: int
    """Index of the shard's first element in the flattened logical tensor."""
    shape: tuple[int, ...]
    """Shape of the logical tensor over all ranks."""

    def __post_init__(self) -> None:
        assert self.local.dim() == 1 and self.local.is_contiguous()
        assert self.offset >= 0 and self.offset + self.local.numel() <= math.prod(self.shape)


@dataclass
class Fragment:
    """Elements [offset, offset + master.numel()) of this rank's flattened parameter, which this rank updates.

    For experts, offset 0 is the first element of the rank's first expert.
    """

    param: nn.Parameter
    offset: int
    master: Tensor
    """Master values, fp32 and 1-D. Like `state`, they share memory with the live state."""
    state: dict[str, Tensor]
    """The optimizer's state by name (conf/optimizers.py)."""


class Sharing(NamedTuple):
    """Number of ranks with the same weights, and this rank's index."""

    ranks: int
    rank: int


class WeightPiece(NamedTuple):
    """Some rows and columns of a weight."""

    rows: range
    columns: range

    @property
    def size(self) -> int:
        return len(self.rows) * len(self.columns)


def cut_pieces(elements: range, width: int) -> list[WeightPiece]:
    """Split an interval of a flattened weight into rectangles: part of a row, complete rows, part of a row."""
    if not elements:
        return []
    (first, start), (last, stop) = divmod(elements.start, width), divmod(elements.stop, width)
    if first == last:
        return [WeightPiece(range(first, first + 1), range(start, stop))]
    found = [
        WeightPiece(range(first, first + 1), range(start, width)),
        WeightPiece(range(first + 1, last), range(width)),
        WeightPiece(range(last, last + 1), range(stop)),
    ]
    return [one for one in found if one.size]


@dataclass
class FlatWeight:
    """A parameter, and its position in the flat shards of all ranks that share it."""

    param: nn.Parameter
    shape: tuple[int, ...]
    """Shape of the complete parameter; for experts, of this rank's experts."""
    held: list[range]
    """For each rank that shares the parameter: the interval of the flattened parameter that is in that rank's shard."""
    place: int
    """Offset of the parameter's first element in this rank's shard; negative if an earlier rank holds it."""

    def view(self, flat: Tensor, rows: range, columns: range, place: int | None = None) -> Tensor:
        """Return a view of some rows and columns of the parameter.

        flat: tensor that contains the elements. place: index of the parameter's first element in `flat`; None if `flat`
        is this rank's shard.
        """
        width = self.shape[-1]
        first = (self.place if place is None else place) + rows.start * width + columns.start
        return flat.as_strided((len(rows), len(columns)), (width, 1), flat.storage_offset() + first)


@dataclass
class FlatShard:
    """The weights of a flat parameter, for row or matrix updates."""

    rule: UpdateRule
    weights: list[FlatWeight]
    sharing: Sharing
    group: ProcessGroup
    """The ranks that share the weights."""
    names: list[str]
    """Global names of the weights."""

    def scale_rows(self, flat: Tensor, factors: Mapping[str, Tensor]) -> None:
        """Multiply rows of weights in place. factors: one per row, by weight name. flat: this rank's shard."""
        for name, weight in zip(self.names, self.weights, strict=True):
            if name in factors:
                factor_R1 = factors[name].to(flat).unsqueeze(1)
                for rows, columns in cut_pieces(weight.held[self.sharing.rank], weight.shape[-1]):
                    weight.view(flat, rows, columns).mul_(factor_R1[rows.start : rows.stop])


class ShardSlice(NamedTuple):
    """A parameter's elements in this rank's shard of a parameter group."""

    param: nn.Parameter
    offset: int
    """Index in the flattened parameter of its first element in this rank's shard."""
    place: slice
    """Position of the parameter's elements in this rank's shard."""


@dataclass
class GradientHandover:
    """Data from ZeRO for the optimizer's next update, besides the flat parameters' `.grad`."""

    shards: dict[Tensor, FlatShard] = field(default_factory=dict)
    """For each flat parameter: the weights that it consists of."""
    factor: Tensor | None = None
    """Factor of all gradients, for clipping: a scalar on the host; None means 1."""
    unreduced: dict[Tensor, list[Tensor]] = field(default_factory=dict)
    """Gradients of flat parameters that no other rank shares: the original fp32 buffers, 1-D, without padding. The
    `.grad` of such a flat parameter is only a placeholder.
    """
    row_factors: Mapping[str, Tensor] = field(default_factory=dict)
    """By weight name: one factor per row, applied after the update."""
    divisor: int = 1
    """Number of ranks over which gradients are averaged. The gradients in `unreduced` must be divided by it."""

    def of(self, param: Tensor) -> tuple[list[Tensor], Tensor | float | None]:
        """Return a flat parameter's gradient as adjacent 1-D tensors, and the factor to apply (None: no factor)."""
        if param not in self.unreduced:
            return [gradient_of(param).view(-1)], self.factor
        if self.divisor == 1:
            return self.unreduced[param], self.factor
        return self.unreduced[param], (1.0 if self.factor is None else self.factor) / self.divisor


def gradient_of(param: Tensor) -> Tensor:
    """Return the gradient of a parameter that must have one."""
    assert param.grad is not None
    return param.grad


def whole(tensor: Tensor) -> Shard:
    """Return the shard of a rank that holds the complete tensor."""
    return Shard(tensor.detach().view(-1), 0, tuple(tensor.shape))


class ShardedOptimizer(Protocol):
    """The optimizer interface for parallel/zero, which updates the flat fp32 parameters of ZeRO.

    Each parameter group has an update rule, `rule`.
    """

    param_groups: list[dict[str, Any]]
    handover: GradientHandover
    updates: int
    """Number of completed updates. The caller of `step` adds 1 after each update."""

    def allocate(self, param: Tensor) -> dict[str, Tensor]:
        """Return a flat parameter's state tensors by name, created at the first call."""

    def sums_of_squares(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return each flat fp32 tensor's sum of squares, fp64 (len(pieces),)."""

    def step(self, closure: None = None) -> None:
        """Update the parameters of every group that has gradients."""
