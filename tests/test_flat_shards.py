"""Flat shards: the pieces of any interval of a weight, where they lie, and gradients as they are handed over."""

from itertools import combinations_with_replacement

import pytest
import torch

from parallel.shard import FlatWeight, GradientHandover, WeightPiece, cut_pieces


@pytest.mark.parametrize("width", [1, 4, 5])
def test_the_pieces_of_every_interval_are_its_elements_in_order(width):
    """Within a row, of whole rows, and across; at most three rectangles that are not empty."""
    for start, stop in combinations_with_replacement(range(3 * width + 1), 2):
        pieces = cut_pieces(range(start, stop), width)
        assert len(pieces) <= 3 and all(piece.size for piece in pieces)
        elements = [row * width + column for rows, columns in pieces for row in rows for column in columns]
        assert elements == list(range(start, stop))
    assert cut_pieces(range(1, 3), 4) == [WeightPiece(range(1), range(1, 3))]


def test_a_piece_is_seen_where_it_lies_in_a_shard_or_elsewhere():
    """A weight of 3 by 4 of which a shard has all but the first two elements, behind five of another one."""
    weight = torch.arange(12.0).view(3, 4)
    shard = torch.cat([torch.full((5,), -1.0), weight.flatten()[2:]])
    param = torch.nn.Parameter(weight)
    flat = FlatWeight(param, (3, 4), [range(2, 12)], place=5 - 2)
    assert torch.equal(flat.view(shard, range(1, 3), range(4)), weight[1:])
    assert torch.equal(flat.view(shard, range(1), range(2, 4)), weight[:1, 2:])
    assert torch.equal(flat.view(weight.flatten(), range(1, 3), range(1, 3), place=0), weight[1:3, 1:3])


def test_sums_of_gradients_that_nobody_shares_become_means_with_the_factor():
    param, grad = torch.nn.Parameter(torch.zeros(4)), torch.ones(4)
    param.grad = grad.clone()
    shared = GradientHandover(factor=torch.tensor(0.5), divisor=4)
    (found,), factor = shared.of(param)
    assert torch.equal(found, grad) and factor == 0.5, "it is a mean already"
    for given, divisor, expected in ((0.5, 4, 0.125), (None, 4, 0.25), (0.5, 1, 0.5), (None, 1, None)):
        own = GradientHandover(factor=None if given is None else torch.tensor(given), divisor=divisor)
        own.unreduced[param] = [grad]
        assert own.of(param) == ([grad], expected)
