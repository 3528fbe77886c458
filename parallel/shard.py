"""Defines `Shard`, an interval of a flattened logical tensor. All state enters and leaves a rank in this form.

A logical tensor is a tensor of the model, as it would be on a single rank. These classes describe parts of a weight,
from the whole run down to a row:

    Shard        an interval of a logical tensor; checkpoints and exports consist of shards
    Fragment     the elements of a rank's own parameter that the rank updates, with master and state
    ShardSlice   position of such elements in the rank's flat shard
    FlatShard    all weights of one flat parameter, for updates of whole matrices. Each weight is a `FlatWeight`, which
                 says which rank holds which elements of the weight
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
    """Elements [offset, offset + local.numel()) of the flattened logical tensor with shape `shape`.

    ZeRO fragments, a rank's experts and complete tensors are all stored as shards. So a run with any layout can read a
    checkpoint of another layout: it intersects the intervals of both.
    """

    local: Tensor
    """The elements of the shard: 1-D and contiguous. The tensor shares memory with the live state, so that loading a
    checkpoint fills the state in place.
    """
    offset: int
    """Index of the shard's first element in the flattened logical tensor."""
    shape: tuple[int, ...]
    """Shape of the logical tensor over all ranks."""

    def __post_init__(self) -> None:
        assert self.local.dim() == 1 and self.local.is_contiguous()
        assert self.offset >= 0 and self.offset + self.local.numel() <= math.prod(self.shape)


@dataclass
class Fragment:
    """The elements [offset, offset + master.numel()) of a flattened parameter that this rank updates.

    The offset refers to this rank's own parameter. For experts, offset 0 is the first element of the rank's first
    expert.
    """

    param: nn.Parameter
    offset: int
    master: Tensor
    """Master values of these elements, fp32 and 1-D. The tensor shares memory with the live state, and so do the
    tensors of `state`.
    """
    state: dict[str, Tensor]
    """The optimizer's state of these elements, by the state names of the update rule (conf/optimizers.py)."""


class Sharing(NamedTuple):
    """Number of ranks that hold the same weights, and the index of this rank among these ranks."""

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
    """Split an interval of a flattened weight with `width` columns into at most three rectangles: part of a row,
    complete rows, part of a row.
    """
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
    """A parameter, and its position in the flat shards of the ranks that share the parameter."""

    param: nn.Parameter
    shape: tuple[int, ...]
    """Shape of the complete parameter; for experts, of this rank's experts only."""
    held: list[range]
    """For each rank that shares the parameter: the elements of the flattened parameter that the rank's shard holds."""
    place: int
    """Offset of the parameter's first element in this rank's shard. It is negative if an earlier rank holds that
    element.
    """

    def view(self, flat: Tensor, rows: range, columns: range, place: int | None = None) -> Tensor:
        """Return a view of some rows and columns of the parameter.

        flat: this rank's shard, which must hold these elements. With `place`, it is instead a tensor that holds the
        parameter; the parameter's first element is at index `place`.
        """
        width = self.shape[-1]
        first = (self.place if place is None else place) + rows.start * width + columns.start
        return flat.as_strided((len(rows), len(columns)), (width, 1), flat.storage_offset() + first)


@dataclass
class FlatShard:
    """The weights of a flat parameter, for updates that need whole rows or matrices."""

    rule: UpdateRule
    weights: list[FlatWeight]
    sharing: Sharing
    group: ProcessGroup
    """The ranks that share the weights."""
    names: list[str]
    """Global names of the weights."""

    def scale_rows(self, flat: Tensor, factors: Mapping[str, Tensor]) -> None:
        """Multiply rows of weights in place. factors: for each weight name, one factor per row; other weights do not
        change. flat: this rank's shard.
        """
        for name, weight in zip(self.names, self.weights, strict=True):
            if name in factors:
                factor_R1 = factors[name].to(flat).unsqueeze(1)
                for rows, columns in cut_pieces(weight.held[self.sharing.rank], weight.shape[-1]):
                    weight.view(flat, rows, columns).mul_(factor_R1[rows.start : rows.stop])


class ShardSlice(NamedTuple):
    """The elements of a parameter that are in this rank's shard of a parameter group."""

    param: nn.Parameter
    offset: int
    """Index of the first of these elements in the flattened parameter."""
    place: slice
    """Position of the elements in the shard."""


@dataclass
class GradientHandover:
    """Data that ZeRO passes to the optimizer for the next update, besides the `.grad` of the flat parameters.

    ZeRO writes this object and the optimizer reads it. ZeRO and the optimizer share no other object.
    """

    shards: dict[Tensor, FlatShard] = field(default_factory=dict)
    """For each flat parameter: the weights that it consists of."""
    factor: Tensor | None = None
    """Factor by which the update multiplies all gradients, for clipping. It is a scalar on the host; None means 1."""
    unreduced: dict[Tensor, list[Tensor]] = field(default_factory=dict)
    """Gradients of flat parameters that this rank shares with no other rank. Each gradient is a list of the original
    buffers: 1-D, fp32, in order from the first element, without the padding at the end. The `.grad` of such a flat
    parameter is a placeholder.
    """
    row_factors: Mapping[str, Tensor] = field(default_factory=dict)
    """For each weight name: one factor per row, by which the row is multiplied after the update."""
    divisor: int = 1
    """Unreduced gradients are sums over the data of this number of ranks. To get the mean, divide a gradient by this
    number."""

    def of(self, param: Tensor) -> tuple[list[Tensor], Tensor | float | None]:
        """Return the gradient of a flat parameter as a list of parts, and the factor by which the caller must multiply
        each part; None for no factor.
        """
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
    """The optimizer interface that parallel/zero needs. The optimizer updates the flat fp32 parameters that ZeRO passes
    to it.

    Implementations are torch.optim.Optimizer objects. Every parameter group has the update rule of its weights as
    `rule` (conf/optimizers.py).
    """

    param_groups: list[dict[str, Any]]
    handover: GradientHandover
    updates: int
    """Number of updates before this step. The code that created the optimizer adds 1 per step."""

    def allocate(self, param: Tensor) -> dict[str, Tensor]:
        """Return the state tensors of a flat parameter by name. They are created at the first call.

        Each tensor has the parameter's shape, so that an interval of the parameter is also an interval of its state.
        """

    def sums_of_squares(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the sum of the squares of each tensor in `pieces`, as an fp64 tensor of shape (len(pieces),). The
        tensors are flat and fp32.
        """

    def step(self, closure: None = None) -> None:
        """Update the parameters of every group that has gradients."""
