"""Describes the local positions of sequences, and exchanges values with processes that have the other positions.

Usually a process has complete sequences. With context parallelism, N processes share each sequence. Its T positions are
cut into 2 N equal pieces, and process r works on the pieces r and 2 N - 1 - r. Pieces near the end of the sequence see
more keys, so this balances the work. Each process has the tokens of the complete sequence. All other values, from the
embedding to the loss, exist only for local positions.

Three computations need other positions:
- attention (train/model/attention.py)
- the balance loss, which counts over all positions (train/model/router.py)
- MTP modules, which read the tokens after the end of a piece

Shapes: B sequences, S = T + 1 tokens of a sample, T positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from train.model.needed import Function

X = TypeVar("X")


class PendingGather(Protocol):
    """A gather in progress."""

    def wait(self) -> list[Tensor]:
        """Wait for the gathered pieces, and return them. Call this once."""


class SequenceShare(Protocol):
    """Exchanges values with the processes that share sequences. These processes must make the same calls."""

    parts: int
    """Number N of processes that share a sequence."""
    part: int
    """Index r of this process among those that share a sequence."""

    def gather_begin(self, own_BTX: Tensor, rows: Sequence[int]) -> PendingGather:
        """Start to gather the values of all pieces, in order. Piece j has the shape (B, rows[j], X).

        own_BTX: the values of the two local pieces.
        """

    def scatter_sum(self, pieces: list[Tensor]) -> Tensor:
        """Sum each piece over all processes, and return the local pieces, (B, local positions, X).

        This is the transpose of the gather.
        """

    def total(self, counts: Tensor) -> Tensor:
        """Return, on every process, the sum of `counts` over all processes."""


class Rectangle(NamedTuple):
    """A range of queries and a range of keys. Query i sees each key j with j - first_key <= i - first_query + before.

    i is the index of a local position, and j the index in a block of keys.

    sequence: index of the sequence; None for all sequences.
    before: number of keys in the range that are earlier than the first query.
    """

    sequence: int | None
    first_query: int
    last_query: int
    """End of the queries (exclusive)."""
    first_key: int
    last_key: int
    before: int


class PackedSamples:
    """The samples of sequences, in the form that routers need to count tokens for each sample.

    All layers use the same object for a micro-batch and MTP depth.
    """

    def __init__(self, number_BT: Tensor, lengths_N: Tensor):
        """Both tensors are on the host.

        number_BT: index of each local position's sample among the N samples of all sequences. N means that
            `Positions.counted_BT` excludes the position.
        lengths_N: number of counted positions in each sample, including positions of other processes.
        """
        self._number_BT, self._lengths_N = number_BT, lengths_N
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return number_BT and lengths_N, int64, on the device."""
        if device not in self._there:
            self._there[device] = self._number_BT.to(device), self._lengths_N.to(device)
        return self._there[device]


class SeenKeys:
    """Which local queries see which keys of one block. All layers share one object for each micro-batch and block."""

    def __init__(self, rectangles: list[Rectangle]):
        self.rectangles = rectangles
        self._made: dict[tuple, Any] = {}

    def once(self, make: Callable[..., X], *given: Any) -> X:
        """Return make(rectangles, *given), cached, so that kernels prepare data once for all layers."""
        key = (make, *given)
        if key not in self._made:
            self._made[key] = make(self.rectangles, *given)
        return self._made[key]


@dataclass
class KeyChoices:
    """Values that the layers with sparse attention share in one micro-batch.

    Training sets the first three fields (train/model/indexer.py).
    """

    weight: float = 0.0
    """Weight of the indexers' loss at each supervised query; 0 if indexers do not learn."""
    supervised_BS: Tensor | None = None
    """Mask of the supervised tokens, on the host; None: all tokens."""
    alone: dict[nn.Parameter, Tensor] | None = None
    """Collects the gradients of the indexers' weights if training changes only the indexers; else None."""
    chosen_BTK: Tensor | None = None
    """Key positions that the latest indexer selected, int32; -1 fills missing keys."""


@dataclass(frozen=True)
class Positions:
    """The positions of a micro-batch: T in each sequence, some or all of them local."""

    length: int
    """Number of positions in a sequence, T."""
    documents_BT: Tensor | None = None
    """Document index of every position, on the host; None if attention covers complete sequences. Documents are
    contiguous, and positions attend only to their own document."""
    share: SequenceShare | None = None
    """Exchanges values with the other processes of these sequences; None if complete sequences are local."""
    whole: int = field(default=-1)
    """Number of positions T of the main model, if this is an MTP depth; else -1."""
    samples_BS: Tensor | None = None
    """Sample index of every token, on the host, from 0 in each sequence; -1 means padding. None: there are no separate
    samples, so every next token in the sequence is a target."""
    experts_BTLK: Tensor | None = None
    """Expert ids for every position and MoE layer of the main model; None: routers choose."""
    keys_BTLK: Tensor | None = None
    """Key positions for every position and each indexer layer of the main model, instead of the indexers' choice; None:
    indexers choose. Int32, on the host; -1 fills missing keys."""
    choices: KeyChoices = field(default_factory=KeyChoices)
    """Values that the layers with sparse attention share."""

    @property
    def whole_length(self) -> int:
        """Number of positions of the main model, T."""
        return self.length if self.whole < 0 else self.whole

    @cached_property
    def pieces(self) -> list[range]:
        """All pieces of a sequence, as ranges of positions in order."""
        count = 1 if self.share is None else 2 * self.share.parts
        size = self.whole_length // count
        return [range(j * size, min((j + 1) * size, self.length)) for j in range(count - 1)] + [
            range((count - 1) * size, self.length)
        ]

    @cached_property
    def here(self) -> list[range]:
        """The pieces of this process, as ranges of positions."""
        if self.share is None:
            return self.pieces
        return [self.pieces[self.share.part], self.pieces[-1 - self.share.part]]

    @property
    def count(self) -> int:
        """Number of local positions."""
        return sum(map(len, self.here))

    @cached_property
    def counted_BT(self) -> Tensor | None:
        """Whether each position's target is in the same sample: bool, on the host; None if all positions count.

        Positions that do not count are at the end of their sample, so no position that counts attends to them.
        """
        if self.samples_BS is None:
            return None
        ahead = self.whole_length - self.length + 1
        here_BT, target_BT = self.samples_BS[:, : self.length], self.samples_BS[:, ahead : ahead + self.length]
        return (here_BT == target_BT) & (here_BT >= 0)

    @cached_property
    def packed(self) -> "PackedSamples | None":
        """The samples of all sequences; None without separate samples."""
        if self.samples_BS is None or self.counted_BT is None:
            return None
        samples_B = self.samples_BS.amax(1).long() + 1
        before_B, count = samples_B.cumsum(0) - samples_B, int(samples_B.sum())
        number_BT = self.samples_BS[:, : self.length].long() + before_B.unsqueeze(1)
        number_BT = number_BT.masked_fill(~self.counted_BT, count)
        lengths = torch.bincount(number_BT.flatten(), minlength=count + 1)[:count]
        return PackedSamples(self.take(number_BT), lengths)

    @cached_property
    def experts_here_BTLK(self) -> Tensor | None:
        """The entries of `experts_BTLK` at the local positions; None: routers choose."""
        return None if self.experts_BTLK is None else self.take(self.experts_BTLK)

    def learnt_BT(self, supervised_BS: Tensor) -> Tensor:
        """Return whether each position's target is supervised and in the same sample. Bool, on the host."""
        ahead = self.whole_length - self.length + 1
        learnt_BT = supervised_BS[:, ahead : ahead + self.length]
        return learnt_BT if self.counted_BT is None else learnt_BT & self.counted_BT

    def learnt(self, supervised_BS: Tensor) -> Tensor:
        """Return the indices of the local positions whose target is supervised and in the same sample.

        The result is int64, on the host. Indices run over the flattened axes (B, local positions).
        """
        return self.take(self.learnt_BT(supervised_BS)).flatten().nonzero().squeeze(-1)

    def gather(self, here_BT: Tensor) -> Tensor:
        """Gather the values of all positions, (B, length), from the processes that share the sequences.

        For a correct gradient, each process must compute the same loss from all values, divided by the number of
        processes.
        """
        return here_BT if self.share is None else _Gather.apply(here_BT, self)

    def shorter(self, by: int) -> "Positions":
        """Return the positions without the last `by` positions of each sequence, for an MTP depth.

        MTP modules do not replay experts or keys, because inference engines record only the main model's.
        """
        documents_BT = None if self.documents_BT is None else self.documents_BT[:, :-by]
        whole = self.whole_length
        changes = {"documents_BT": documents_BT, "experts_BTLK": None, "keys_BTLK": None}
        return replace(self, length=self.length - by, whole=whole, **changes)

    def take(self, x: Tensor, shift: int = 0) -> Tensor:
        """Return the entries of x at the local positions, shifted by `shift` positions.

        x: values of complete sequences, (B, S, ...).
        """
        return _joined([x[:, piece.start + shift : piece.stop + shift] for piece in self.here])

    def take_with_next(self, x: Tensor, more: int) -> Tensor:
        """Return x at the local positions, with up to `more` entries after each local piece.

        x: values of complete sequences, (B, S, ...).
        """
        after = [x[:, piece.stop : min(piece.stop + more, self.length)] for piece in self.here]
        return _joined([x[:, piece.start : piece.stop] for piece in self.here] + [y for y in after if y.size(1)])

    def shifted(self, x: Tensor, more: int, depth: int) -> Tensor:
        """Return the entries `depth` positions after the local positions.

        x: a result of `take_with_next`.
        """
        parts, first, after = [], 0, self.count
        for piece in self.here:
            next_ones = min(more, self.length - piece.stop)
            parts.append(x[:, first + depth : first + len(piece)])
            if next_ones and depth:
                parts.append(x[:, after : after + depth])
            first, after = first + len(piece), after + next_ones
        return _joined(parts)

    @cached_property
    def documents(self) -> list[tuple[int | None, range]]:
        """The documents, each as the index of its sequence and a range of positions.

        If documents_BT is None, one entry covers all sequences, with None as the index.
        """
        if self.documents_BT is None:
            return [(None, range(self.length))]
        found: list[tuple[int | None, range]] = []
        for sequence, documents_T in enumerate(self.documents_BT):
            ends = torch.unique_consecutive(documents_T, return_counts=True)[1].cumsum(0).tolist()
            found += [(sequence, range(*span)) for span in zip([0, *ends], ends, strict=False)]
        return found

    @cached_property
    def seen(self) -> list[SeenKeys]:
        """Which local queries see which keys, for each piece of a sequence."""
        return [SeenKeys(self._rectangles(block)) for block in self.pieces]

    @cached_property
    def seen_whole(self) -> SeenKeys:
        """Which local queries see which keys, with all positions' keys as one block."""
        return self.seen[0] if self.share is None else SeenKeys(self._rectangles(range(self.length)))

    def _rectangles(self, block: range) -> list[Rectangle]:
        found, row = [], 0
        for piece in self.here:
            for sequence, document in self.documents:
                keys = _common(document, block)
                queries = _common(document, piece)
                queries = range(max(queries.start, keys.start), queries.stop)
                if keys and queries:
                    first = row + queries.start - piece.start
                    found.append(
                        Rectangle(
                            sequence,
                            first,
                            first + len(queries),
                            keys.start - block.start,
                            keys.stop - block.start,
                            queries.start - keys.start,
                        )
                    )
            row += len(piece)
        return found


class _Gather(Function):
    """Gathers the values of all positions from the processes that share sequences."""

    @staticmethod
    def forward(ctx: Any, here_BT: Tensor, positions: Positions) -> Tensor:
        assert positions.share is not None
        ctx.positions, rows = positions, [len(piece) for piece in positions.pieces]
        pieces = positions.share.gather_begin(here_BT.unsqueeze(-1), rows).wait()
        return torch.cat(pieces, 1).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None]:
        # All processes have equal gradients, so their sum is the gradient times the number of processes.
        return ctx.positions.take(grad_BT) * ctx.positions.share.parts, None


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
