"""Plain values between ranks, and that no pickle crosses."""

import math
import pickle
import sys

import pytest
import torch
import torch.distributed as dist

from parallel.exchange import from_rank_0, gather
from tests.ranks import run_ranks


def check_values(rank):
    mine = {"rank": rank, "text": "é" * 1000 * rank, "list": [1, (2.5, None)], "inf": math.inf}
    assert gather(mine) == [
        {"rank": other, "text": "é" * 1000 * other, "list": [1, [2.5, None]], "inf": math.inf} for other in range(3)
    ]
    assert math.isnan(gather(math.nan)[2]) and gather(0.1 + 0.2)[0] == 0.1 + 0.2 and gather(None) == [None] * 3
    pair = dist.new_group([0, 2])
    if rank != 1:
        assert gather(rank, pair) == [0, 2]
    assert from_rank_0(lambda: ["first", rank]) == ["first", 0]
    with pytest.raises(TypeError, match="JSON"):
        gather({1, 2})


def test_every_rank_gets_every_value():
    run_ranks(check_values, world_size=3)


class Bomb:
    """Unpickled, it leaves a mark."""

    def __reduce__(self):
        return exec, ("import sys; sys.exploded = True",)


def check_refused(rank):
    box = [None, None]
    for collective in (
        lambda: dist.all_gather_object(box, Bomb()),
        lambda: dist.broadcast_object_list(box, src=rank),
        lambda: dist.gather_object(Bomb(), box if rank == 0 else None),
        lambda: dist.scatter_object_list([None], [Bomb(), Bomb()], src=rank),
        lambda: dist.send_object_list([Bomb()], dst=1 - rank),  # as the stages of torch's pipeline do
    ):
        with pytest.raises(RuntimeError, match="must not exchange pickles"):
            collective()


def test_collectives_of_objects_raise():
    run_ranks(check_refused, world_size=2)


def check_read(rank):
    """Rank 0 is a stranger that sends what torch's own functions would; rank 1 must not read it."""
    bomb = torch.frombuffer(bytearray(pickle.dumps(Bomb())), dtype=torch.uint8)
    if rank == 0:
        for _ in range(2):
            dist.broadcast(torch.tensor([bomb.numel()]), src=0)
            dist.broadcast(bomb, src=0)
        dist.send(torch.tensor([bomb.numel()]), dst=1)
        dist.send(bomb, dst=1)
        return
    with pytest.raises(ValueError):
        from_rank_0(lambda: None)
    with pytest.raises(RuntimeError, match="must not exchange pickles"):
        dist.broadcast_object_list([None], src=0)
    with pytest.raises(RuntimeError, match="must not exchange pickles"):
        dist.recv_object_list([None], src=0)
    assert not hasattr(sys, "exploded")


def test_a_pickle_that_arrives_is_not_read():
    run_ranks(check_read, world_size=2)
