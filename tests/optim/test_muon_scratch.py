"""A plan counts the memory that Muon's update takes in addition to its operands."""

from dataclasses import replace

import pytest
import torch

from conf.load import compose
from conf.optimizers import OPTIMIZERS
from conf.thresholds import THRESHOLDS
from parallel.shard import FlatShard, FlatWeight, Sharing
from tests.model.test_recompute import LiveBytes
from train.optim.adamw import WeightShapes
from train.optim.muon import Muon


class MostBytes(LiveBytes):
    """The most that was alive at a time."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        self.most = max(self.most, self.total())
        return out


@pytest.mark.parametrize("rows, columns, count", [(64, 64, 48), (32, 128, 48), (96, 24, 64)])
def test_an_update_takes_what_is_counted(rows, columns, count, monkeypatch):
    """Several packs of square, wide and tall matrices: never more than counted, and at least two thirds of it."""
    monkeypatch.setattr(
        "train.optim.muon.THRESHOLDS", replace(THRESHOLDS, muon_elements=12 * rows * columns, adamw_elements=1024)
    )
    config, size = compose("data.path=none", "optim=muon"), rows * columns
    weights = [
        FlatWeight(torch.nn.Parameter(torch.empty(0)), (rows, columns), [range(size)], number * size)
        for number in range(count)
    ]
    flat = torch.randn(count * size)
    flat.grad = torch.randn(count * size)
    muon = Muon.make([{"params": [flat], "weight_decay": 0.1}], config, ())
    rule, names = OPTIMIZERS["muon"].matrices, [f"layers.{number}.ffn.w2.weight" for number in range(count)]
    muon.handover.shards[flat] = FlatShard(rule, weights, Sharing(1, 0), None, names)
    operands = (
        flat.nbytes + flat.grad.nbytes + muon.allocate(flat)["momentum"].nbytes
    )  # which the update hands out as views
    with MostBytes() as live:
        muon.step()
    shapes = WeightShapes(rule, [(name, (rows, columns)) for name in names])
    counted = Muon.count_scratch_bytes("cpu", config, shapes, count * size, compiled=False)
    assert counted / 1.5 <= live.most - operands <= counted
