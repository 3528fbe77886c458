"""The one shape in which state leaves and enters a rank: an interval of a flattened logical tensor.

Parts of a weight have these names, from the whole run to a row:

    Shard        elements of the logical tensor, which is that of all ranks: what checkpoints and exports know
    Fragment     elements of a rank's own parameter, with their master and state: what the rank updates of it
    ShardSlice   where such elements lie in the rank's flat shard
    FlatShard    all weights of one flat parameter, each a `FlatWeight` that knows which rank has which of its elements: for
                 updates of whole matrices
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
    """Elements [offset, offset + local.numel()) of the flattened logical tensor of `shape`.

    ZeRO fragments, a rank's experts and whole tensors are all shards, so a checkpoint written under one layout
    is read under any other by intersecting intervals.
    """

    local: Tensor
    """1-D, contiguous; shares memory with the live state, so that loading fills it in place."""
    offset: int
    """First element, in elements of the flattened logical tensor."""
    shape: tuple[int, ...]
    """Shape of the logical tensor over all ranks."""

    def __post_init__(self) -> None:
        assert self.local.dim() == 1 and self.local.is_contiguous()
        assert self.offset >= 0 and self.offset + self.local.numel() <= math.prod(self.shape)


@dataclass
class Fragment:
    """What this rank updates of one parameter: elements [offset, offset + master.numel()) of it, flattened.

    The parameter is the rank's own, so experts count from the rank's first expert.
    """

    param: nn.Parameter
    offset: int
    master: Tensor
    """fp32, 1-D; shares memory with the live state, as the optimizer's state does."""
    state: dict[str, Tensor]
    """The optimizer's, by the names of its rule (conf/optimizers.py)."""


class Sharing(NamedTuple):
    """How many ranks hold the same weights, and which of them this rank is."""

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
    """What an interval of a flattened weight of so many columns is: a part of a row, whole rows, a part of a row."""
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
    """A parameter in the flat shards of the ranks that share it."""

    param: nn.Parameter
    shape: tuple[int, ...]
    """Shape of the whole parameter; of experts, those that this rank holds."""
    held: list[range]
    """By rank of those that share it: the elements of the flattened parameter in that rank's shard."""
    place: int
    """Where the parameter's first element would lie in this rank's shard; below 0 where another rank holds it."""

    def view(self, flat: Tensor, rows: range, columns: range, place: int | None = None) -> Tensor:
        """Some rows and columns that this rank holds, in its shard or in a tensor that holds the parameter from `place` on."""
        width = self.shape[-1]
        first = (self.place if place is None else place) + rows.start * width + columns.start
        return flat.as_strided((len(rows), len(columns)), (width, 1), flat.storage_offset() + first)


@dataclass
class FlatShard:
    """What lies in a flat parameter, for an update that needs more than single elements."""

    rule: UpdateRule
    weights: list[FlatWeight]
    sharing: Sharing
    group: ProcessGroup
    """The ranks that share the weights."""
    names: list[str]
    """Global ones."""

    def scale_rows(self, flat: Tensor, factors: Mapping[str, Tensor]) -> None:
        """Multiply the rows of weights, by name, each with its factor."""
        for name, weight in zip(self.names, self.weights, strict=True):
            if name in factors:
                factor_R1 = factors[name].to(flat).unsqueeze(1)
                for rows, columns in cut_pieces(weight.held[self.sharing.rank], weight.shape[-1]):
                    weight.view(flat, rows, columns).mul_(factor_R1[rows.start : rows.stop])


class ShardSlice(NamedTuple):
    """The elements of a parameter that lie in this rank's shard of its group."""

    param: nn.Parameter
    offset: int
    """First element, in the flattened parameter."""
    place: slice
    """In the shard."""


@dataclass
class GradientHandover:
    """What ZeRO hands to the optimizer for its next update, beside the `.grad` of the flat parameters. The one object that both
    know; ZeRO fills it and the optimizer reads it.
    """

    shards: dict[Tensor, FlatShard] = field(default_factory=dict)
    """By flat parameter what lies in it."""
    factor: Tensor | None = None
    """All gradients are multiplied with it on their way into the update, which so clips them; a scalar on the host."""
    unreduced: dict[Tensor, list[Tensor]] = field(default_factory=dict)
    """By flat parameter the gradients of one that no other rank shares, where they lie: 1-D, fp32, one after another from its
    first element on, none for padding at its end. Its `.grad` is a stand-in."""
    row_factors: Mapping[str, Tensor] = field(default_factory=dict)
    """By weight what its rows are multiplied with behind the update."""
    divisor: int = 1
    """Those are sums over so many ranks' data, of which the mean is wanted."""

    def of(self, param: Tensor) -> tuple[list[Tensor], Tensor | float | None]:
        """The gradient of a flat parameter in pieces, and what to multiply them with."""
        if param not in self.unreduced:
            return [gradient_of(param).view(-1)], self.factor
        if self.divisor == 1:
            return self.unreduced[param], self.factor
        return self.unreduced[param], (1.0 if self.factor is None else self.factor) / self.divisor


def gradient_of(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one by now."""
    assert param.grad is not None
    return param.grad


def whole(tensor: Tensor) -> Shard:
    """The shard of a rank that holds all of a tensor."""
    return Shard(tensor.detach().view(-1), 0, tuple(tensor.shape))


class ShardedOptimizer(Protocol):
    """What updates the flat fp32 parameters that ZeRO hands over, and so what parallel/zero asks of an optimizer. It is a
    torch.optim.Optimizer; every group has the rule of its weights as `rule` (conf/optimizers.py).
    """

    param_groups: list[dict[str, Any]]
    handover: GradientHandover
    updates: int
    """Made before this step; the owner advances it, once per step."""

    def allocate(self, param: Tensor) -> dict[str, Tensor]:
        """The state of a flat parameter by name, made on first use; each of its shape, so that it is cut where the parameter is."""

    def sums_of_squares(self, pieces: Sequence[Tensor]) -> Tensor:
        """The sum of squares of every flat fp32 tensor, in fp64: (pieces,)."""

    def step(self, closure: None = None) -> None:
        """One update of every group that has gradients."""
