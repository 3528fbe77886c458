"""Assigns each matrix that is sharded over ranks to an owner: a rank that computes the whole matrix.

ZeRO may cut a weight at any element, but some updates need complete matrices. So every rank sends its elements of a
matrix to the owner. The owner computes the update and returns each rank's elements.

The most expensive matrix gets its owner first: the rank that holds most of it or, if this rank has enough work, the
rank with the least work. Every rank computes the same owners.

Packs of several matrices are sent one after another, which bounds memory:

    gather pack 0 | gather pack 1, compute 0 | gather pack 2, compute 1, return 0 | ...
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.shard import WeightPiece, cut_pieces

KEEPS = 1.05
"""A rank owns the matrices of which it holds the largest part, while the rank's cost is at most KEEPS * max(mean cost
of a rank, largest cost of a matrix).
"""


class SharedMatrix(NamedTuple):
    """A matrix that is part of a weight with `width` columns. Every rank holds an interval of the flattened weight."""

    weight: int
    """Position of the weight among the weights of its flat shard."""
    width: int
    held: Sequence[range]
    """For each rank: the interval of the flattened weight that the rank holds."""
    place: WeightPiece
    cost: float

    def pieces(self, rank: int) -> list[WeightPiece]:
        """Return the elements of the matrix that a rank holds, as at most three rectangles."""
        cut = [
            WeightPiece(_common(rows, self.place.rows), _common(columns, self.place.columns))
            for rows, columns in cut_pieces(self.held[rank], self.width)
        ]
        return [piece for piece in cut if piece.size]

    def elements(self, rank: int) -> int:
        return sum(piece.size for piece in self.pieces(rank))


def choose_owners(matrices: Sequence[SharedMatrix], ranks: int) -> list[int]:
    """Return each matrix's owner; see the top of the file."""
    mean = sum(matrix.cost for matrix in matrices) / ranks
    most = KEEPS * max([mean, *(matrix.cost for matrix in matrices)])
    loads, owners = [0.0] * ranks, [0] * len(matrices)
    for number in sorted(range(len(matrices)), key=lambda number: -matrices[number].cost):
        matrix = matrices[number]
        holder = max(range(ranks), key=matrix.elements)
        if loads[holder] + matrix.cost > most:
            holder = min(range(ranks), key=loads.__getitem__)
        owners[number] = holder
        loads[holder] += matrix.cost
    return owners


@dataclass
class MatrixPack:
    """Matrices that are sent together."""

    numbers: list[int]
    sent: list[int]
    """Number of elements of this pack that this rank sends to each owner."""
    received: list[int]


class MatrixOwners:
    """The matrices of one flat shard and their owners.

    group: ranks that share the flat shard; None for this rank alone. elements: maximum per owner in a pack.
    """

    def __init__(
        self, matrices: Sequence[SharedMatrix], group: ProcessGroup | None, ranks: int, rank: int, elements: int
    ):
        self._matrices, self._group, self._ranks, self._rank = list(matrices), group, ranks, rank
        self.owners = choose_owners(self._matrices, ranks)
        self._packs = [self._pack(numbers) for numbers in self._cut(elements)]

    @property
    def packs(self) -> int:
        return len(self._packs)

    def each(
        self,
        read: Callable[[int, WeightPiece], Tensor],
        compute: Callable[[list[int], list[Tensor]], list[Tensor]],
        write: Callable[[int, int, WeightPiece, Tensor], None],
        like: Tensor,
    ) -> None:
        """Compute every matrix on its owner. Collective over the group.

        read: gets a weight's index and a rectangle; returns a view of this rank's elements in the rectangle
        compute: gets indices of matrices, and the matrices; returns results of the same shapes
        write: gets a matrix's index, its weight's index, a rectangle, and the results in the rectangle; stores them
        like: tensor with the dtype and device of all sent elements
        """
        gathered: tuple[MatrixPack, Callable[[], dict[int, Tensor]]] | None = None
        returned: Callable[[], None] | None = None
        for pack in [*self._packs, None]:
            coming = None if pack is None else (pack, self._gather(pack, read, like))
            if gathered is not None:
                here, wait = gathered
                whole = wait()
                numbers = [number for number in here.numbers if self.owners[number] == self._rank]
                done = dict(zip(numbers, compute(numbers, [whole[number] for number in numbers]), strict=True))
                del whole
                going = self._return(here, done, write, like)
                if returned is not None:
                    returned()
                returned = going
            gathered = coming
        if returned is not None:
            returned()

    def _cut(self, most: int) -> Iterator[list[int]]:
        """Yield the indices of each pack's matrices, equal shapes together if possible.

        most: maximum number of elements per owner in a pack.
        """
        shapes = {number: (len(m.place.rows), len(m.place.columns)) for number, m in enumerate(self._matrices)}
        by_owner = [
            sorted((n for n, owner in enumerate(self.owners) if owner == rank), key=lambda n: (shapes[n], n))
            for rank in range(self._ranks)
        ]
        while any(by_owner):
            pack = []
            for waiting in by_owner:
                taken = 0
                while waiting and (not taken or taken + self._matrices[waiting[0]].place.size <= most):
                    taken += self._matrices[waiting[0]].place.size
                    pack.append(waiting.pop(0))
            yield sorted(pack)

    def _pack(self, numbers: list[int]) -> MatrixPack:
        sent, received = [0] * self._ranks, [0] * self._ranks
        for number in numbers:
            owner, matrix = self.owners[number], self._matrices[number]
            if owner != self._rank:
                sent[owner] += matrix.elements(self._rank)
                continue
            for rank in range(self._ranks):
                received[rank] += matrix.elements(rank) if rank != self._rank else 0
        return MatrixPack(numbers, sent, received)

    def _gather(self, pack: MatrixPack, read: Callable[[int, WeightPiece], Tensor], like: Tensor) -> Callable[[], dict]:
        """Start to send a pack's matrices to their owners. The returned function waits for this rank's matrices and
        returns them by index."""
        outgoing = [
            read(self._matrices[number].weight, piece).reshape(-1)
            for owner in range(self._ranks)
            if owner != self._rank
            for number, piece in self._travelling(pack, owner, self._rank)
        ]
        arriving, wait = self._exchange(outgoing, pack.sent, pack.received, like)

        def finish() -> dict[int, Tensor]:
            wait()
            whole, first = {}, 0
            for number in pack.numbers:
                if self.owners[number] == self._rank:
                    matrix = self._matrices[number]
                    whole[number] = like.new_empty(len(matrix.place.rows), len(matrix.place.columns))
                    for piece in matrix.pieces(self._rank):
                        _at(whole[number], matrix, piece).copy_(read(matrix.weight, piece))
            for rank in range(self._ranks):
                for number, piece in self._travelling(pack, self._rank, rank):
                    part = arriving[first : first + piece.size]
                    _at(whole[number], self._matrices[number], piece).copy_(part.view(len(piece.rows), -1))
                    first += piece.size
            return whole

        return finish

    def _return(
        self,
        pack: MatrixPack,
        done: dict[int, Tensor],
        write: Callable[[int, int, WeightPiece, Tensor], None],
        like: Tensor,
    ) -> Callable[[], None]:
        """Start to send a pack's results to the ranks that hold the elements. The returned function waits for this
        rank's elements and writes them."""
        for number, result in done.items():
            matrix = self._matrices[number]
            for piece in matrix.pieces(self._rank):
                write(number, matrix.weight, piece, _at(result, matrix, piece))
        outgoing = [
            _at(done[number], self._matrices[number], piece).reshape(-1)
            for rank in range(self._ranks)
            for number, piece in self._travelling(pack, self._rank, rank)
        ]
        arriving, wait = self._exchange(outgoing, pack.received, pack.sent, like)

        def finish() -> None:
            wait()
            first = 0
            for owner in range(self._ranks):
                if owner == self._rank:
                    continue
                for number, piece in self._travelling(pack, owner, self._rank):
                    part = arriving[first : first + piece.size].view(len(piece.rows), -1)
                    write(number, self._matrices[number].weight, piece, part)
                    first += piece.size

        return finish

    def _travelling(self, pack: MatrixPack, owner: int, rank: int) -> Iterator[tuple[int, WeightPiece]]:
        """Yield what `rank` sends to `owner`: the index of a matrix, and a rectangle of the matrix's weight."""
        if owner != rank:
            for number in pack.numbers:
                if self.owners[number] == owner:
                    yield from ((number, piece) for piece in self._matrices[number].pieces(rank))

    def _exchange(
        self, outgoing: list[Tensor], sent: list[int], received: list[int], like: Tensor
    ) -> tuple[Tensor, Callable[[], object]]:
        arriving = like.new_empty(sum(received))
        if self._ranks == 1:
            return arriving, lambda: None
        packed = torch.cat(outgoing) if outgoing else like.new_empty(0)
        work = dist.all_to_all_single(arriving, packed, received, sent, group=self._group, async_op=True)
        assert work is not None, "this rank is in the group"

        def wait() -> None:
            work.wait()
            packed.record_stream(torch.cuda.current_stream()) if packed.is_cuda else None

        return arriving, wait


def _at(whole: Tensor, matrix: SharedMatrix, piece: WeightPiece) -> Tensor:
    """Return a view of some elements of a matrix. piece: a rectangle of the weight."""
    first, left = matrix.place.rows.start, matrix.place.columns.start
    return whole[
        piece.rows.start - first : piece.rows.stop - first, piece.columns.start - left : piece.columns.stop - left
    ]


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
