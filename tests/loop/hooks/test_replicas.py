"""Replicas of a weight that differ in one bit: the rank and the weight are named before an update uses the weight."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from conf.errors import UserError
from conf.load import compose
from parallel.shard import Shard
from tests.ranks import run_ranks
from train.loop.hooks.replicas import ReplicaCheck, ReplicasDiffer, StateChanged, StateCheck, sum_of_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_bit_counts(dtype):
    weight = torch.linspace(-3, 3, 64).to(dtype)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    before = sum_of_bits(weight)
    for bit in range(8 * weight.element_size()):
        flipped = weight.clone()
        flip = 1 << bit if bit < 8 * weight.element_size() - 1 or whole is torch.uint8 else -(1 << bit)
        flipped.view(whole)[7] ^= flip
        assert sum_of_bits(flipped) != before, bit


def be_rank(rank: int, wrong: int, world: int) -> None:
    """Two weights that all hold and one expert weight that pairs hold; rank `wrong` has another bit in one of them."""
    torch.manual_seed(1)
    shared, other, expert = (torch.nn.Parameter(torch.randn(4, 5)) for _ in range(3))
    expert.allreduce = False
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    mesh = SimpleNamespace(stage_group=dist.group.WORLD, edp_group=pairs[rank // 2])
    zero = SimpleNamespace(names={shared: "layers.0.a", other: "layers.1.b", expert: "layers.1.experts"})
    check = ReplicaCheck(5, zero, mesh)
    check.require_equal(5)
    with torch.no_grad():
        other.view(torch.int32)[2, 3] ^= int(rank == wrong)
    check.require_equal(6)  # not due
    with pytest.raises(
        ReplicasDiffer, match=rf"step 10: rank {wrong} has other weights than the other copies: layers.1.b\. "
    ) as error:
        check.require_equal(10)
    assert error.value.ranks == (wrong,)
    with torch.no_grad():
        other.view(torch.int32)[2, 3] ^= int(rank == wrong)
        expert.view(torch.int32)[0, 0] ^= int(rank == 3)
    if rank < 2:
        check.require_equal(15)
        check.require_equal(20)
        return
    with pytest.raises(
        ReplicasDiffer, match=r"ranks \[2, 3\] \(it is unknown which of them is wrong\) have .* layers.1.experts"
    ) as error:
        check.require_equal(15)
    assert error.value.ranks == (2, 3)
    with torch.no_grad():
        expert[0, 0] = float("nan") if rank == 3 else 0
    with pytest.raises(ReplicasDiffer, match="rank 3 has other weights") as error:
        check.require_equal(20)
    assert error.value.ranks == (3,), "a number does not turn into none by itself"


def test_a_flipped_bit_is_named_by_rank_and_weight_and_of_two_copies_none_is_guessed():
    run_ranks(be_rank, 1, 4, world_size=4)


def test_weights_without_copies_are_refused():
    with pytest.raises(UserError, match="each weight exists only once"):
        compose("parallel.zero=3", "parallel.dp=2", "log.replicas_every=5")


def test_a_bit_that_changes_behind_an_update_is_named_before_it_is_read():
    shards = {
        name: Shard(torch.randn(30).to(dtype), 0, (30,))
        for name, dtype in (("master.a", torch.float32), ("exp_avg.a", torch.bfloat16))
    }
    check = StateCheck(2, SimpleNamespace(shards=lambda copies: shards), 3)
    check.note(4)
    check.require_unchanged()
    shards["exp_avg.a"].local.view(torch.int16)[29] ^= 1
    with pytest.raises(StateChanged, match=r"rank 3: exp_avg.a changed after the update of step 4") as error:
        check.require_unchanged()
    assert error.value.ranks == (3,)
    check.note(5)
    check.require_unchanged()
