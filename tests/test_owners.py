"""Matrices that several ranks hold are computed whole, once, and every element comes back to where it lies."""

import pytest
import torch
import torch.distributed as dist

from parallel.owners import MatrixOwners, SharedMatrix, choose_owners
from parallel.shard import WeightPiece
from tests.ranks import run_ranks

WIDTHS = (7, 12, 5)
ROWS = (9, 8, 30)


def matrices(ranks: int, costs: float = 1.0) -> list[SharedMatrix]:
    """Of three weights, of which one is split by columns and one by rows; shards are cut where it is."""
    total = sum(rows * width for rows, width in zip(ROWS, WIDTHS, strict=True))
    size, first, found = -(-total // ranks), 0, []
    for weight, (rows, width) in enumerate(zip(ROWS, WIDTHS, strict=True)):
        held = [
            range(
                min(max(rank * size - first, 0), rows * width),
                max(min((rank + 1) * size - first, rows * width), min(max(rank * size - first, 0), rows * width)),
            )
            for rank in range(ranks)
        ]
        places = {
            0: [WeightPiece(range(rows), range(width))],
            1: [WeightPiece(range(rows), range(first, first + 4)) for first in range(0, width, 4)],
            2: [WeightPiece(range(first, first + 6), range(width)) for first in range(0, rows, 6)],
        }[weight]
        found += [SharedMatrix(weight, width, held, place, costs * place.size) for place in places]
        first += rows * width
    return found


def values(weight: int) -> torch.Tensor:
    return (torch.arange(ROWS[weight] * WIDTHS[weight], dtype=torch.float64) + 1000 * weight).view(ROWS[weight], -1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 11])
def test_the_pieces_of_all_ranks_are_the_matrix(ranks):
    for matrix in matrices(ranks):
        counted = torch.zeros(ROWS[matrix.weight], WIDTHS[matrix.weight])
        for rank in range(ranks):
            for rows, columns in matrix.pieces(rank):
                counted[rows.start : rows.stop, columns.start : columns.stop] += 1
                held = matrix.held[rank]
                assert held.start <= rows.start * matrix.width + columns.start
                assert (rows.stop - 1) * matrix.width + columns.stop <= held.stop
        place = torch.zeros_like(counted)
        place[
            matrix.place.rows.start : matrix.place.rows.stop, matrix.place.columns.start : matrix.place.columns.stop
        ] = 1
        assert torch.equal(counted, place)


def test_a_matrix_stays_where_it_is_whole_and_the_dearest_are_spread():
    whole = [
        SharedMatrix(0, 4, [range(16), range(16, 32)], WeightPiece(range(r, r + 2), range(4)), 1.0)
        for r in range(0, 8, 2)
    ]
    assert choose_owners(whole, 2) == [0, 0, 1, 1]
    crowded = [one._replace(held=[range(32), range(0)]) for one in whole]
    owners = choose_owners(crowded, 2)
    assert sorted(owners) == [0, 0, 1, 1]


def transform(rank: int, ranks: int, elements: int) -> None:
    """Each matrix comes back turned round, with its number added: both need all of it, and the right one."""
    owners = MatrixOwners(matrices(ranks), dist.group.WORLD if ranks > 1 else None, ranks, rank, elements)
    assert owners.packs > (1 if elements < 50 else 0)
    results = [torch.full((rows, width), -1.0, dtype=torch.float64) for rows, width in zip(ROWS, WIDTHS, strict=True)]
    computed = []

    def read(weight: int, piece: WeightPiece) -> torch.Tensor:
        return values(weight)[piece.rows.start : piece.rows.stop, piece.columns.start : piece.columns.stop]

    def compute(numbers: list[int], whole: list[torch.Tensor]) -> list[torch.Tensor]:
        computed.extend(numbers)
        return [matrix.flip(0, 1) + number for number, matrix in zip(numbers, whole, strict=True)]

    def write(number: int, weight: int, piece: WeightPiece, result: torch.Tensor) -> None:
        results[weight][piece.rows.start : piece.rows.stop, piece.columns.start : piece.columns.stop] = result

    owners.each(read, compute, write, torch.empty(0, dtype=torch.float64))
    for number, matrix in enumerate(matrices(ranks)):
        rows, columns = matrix.place
        wanted = torch.full((ROWS[matrix.weight], WIDTHS[matrix.weight]), -1.0, dtype=torch.float64)
        here = values(matrix.weight)[rows.start : rows.stop, columns.start : columns.stop]
        wanted[rows.start : rows.stop, columns.start : columns.stop] = here.flip(0, 1) + number
        for piece_rows, piece_columns in matrix.pieces(rank):
            at = slice(piece_rows.start, piece_rows.stop), slice(piece_columns.start, piece_columns.stop)
            assert torch.equal(results[matrix.weight][at], wanted[at])
    times = torch.zeros(len(matrices(ranks)))
    times[computed] += 1
    if ranks > 1:
        dist.all_reduce(times)
    assert times.eq(1).all()


@pytest.mark.parametrize("elements", [40, 10**6])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_matrix_is_computed_once_and_comes_back(ranks, elements):
    run_ranks(transform, ranks, elements, world_size=ranks)


def matrices_of(*costs: float, holder: int, ranks: int = 2) -> list[SharedMatrix]:
    """Matrices of 2 by 3 elements that lie on one rank."""
    held = [range(6) if rank == holder else range(0) for rank in range(ranks)]
    return [SharedMatrix(number, 3, held, WeightPiece(range(2), range(3)), cost) for number, cost in enumerate(costs)]


@pytest.mark.parametrize(
    ("holder", "costs", "owners"),
    [
        (0, [1, 1, 1, 1], [0, 0, 1, 1]),  # half of the work stays where all of it lies
        (0, [3, 3, 6], [1, 1, 0]),  # the dearest first, and the others are as much work
        (1, [10, 1, 1], [1, 0, 0]),  # more than its share, and one matrix is not cut
        (1, [2, 2, 2, 2, 2], [1, 1, 0, 0, 0]),
    ],
)
def test_the_dearest_matrix_stays_where_it_lies_and_the_work_is_shared(holder, costs, owners):
    assert choose_owners(matrices_of(*costs, holder=holder), 2) == owners


def test_a_row_that_is_cut_in_the_middle_of_a_matrix_of_columns_comes_back():
    """The matrix is the right half of a weight, and the last element of its last row lies elsewhere."""
    weight = torch.arange(12.0).view(2, 6)
    matrix = SharedMatrix(0, 6, [range(11)], WeightPiece(range(2), range(3, 6)), 1.0)
    found = {}

    def cut(piece: WeightPiece) -> torch.Tensor:
        return weight[piece.rows.start : piece.rows.stop, piece.columns.start : piece.columns.stop]

    MatrixOwners([matrix], None, 1, 0, 100).each(
        lambda number, piece: cut(piece),
        lambda numbers, whole: [2 * one for one in whole],
        lambda number, of, piece, result: found.update({piece: result.clone()}),
        weight,
    )
    assert sorted(piece.size for piece in found) == [2, 3]
    assert all(torch.equal(result, 2 * cut(piece)) for piece, result in found.items())


@pytest.mark.parametrize(("elements", "packs"), [(100, 1), (30, 1), (29, 2), (12, 3), (11, 5), (1, 5)])
def test_a_pack_has_as_many_elements_as_there_is_room_for_or_one_matrix(elements, packs):
    assert MatrixOwners(matrices_of(*[1.0] * 5, holder=0, ranks=1), None, 1, 0, elements).packs == packs
