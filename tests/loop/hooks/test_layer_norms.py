"""Norms of weights and updates by layer: what checkpoints say, and the same in every layout."""

import math
from pathlib import Path

import pytest
import torch

from conf.thresholds import THRESHOLDS
from parallel.shard import Shard
from tests.small import MODEL, metrics, train
from train.checkpoint.manifest import read_manifest
from train.checkpoint.read_shards import load_shards
from train.loop.hooks import layer_norms
from train.show.report import write_report

LAYOUTS = {
    "alone": [],
    "spread": ["parallel.dp=2", "parallel.ep=2", "parallel.zero=3"],
    "staged": ["parallel.pp=2", "parallel.schedule=1f1b", "parallel.dp=2", "parallel.ep=2"],
}
LAYERS = ["embedding", *(f"layers.{i}" for i in range(MODEL["layers"])), "norm", "head", "mtp.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("norms")
    for name, layout in LAYOUTS.items():
        done = train(
            folder, f"name={name}", "steps=4", "checkpoint.every=1", "log.norms_every=2", "log.every=3", *layout
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def masters(folder: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = folder / "runs" / "alone" / "checkpoints" / f"step_{step:08}"
    entries = {name: one for name, one in read_manifest(checkpoint).tensors.items() if name.startswith("master.")}
    found = {name: Shard(torch.empty(math.prod(one.shape)), 0, one.shape) for name, one in entries.items()}
    load_shards(checkpoint, found)
    return {name.removeprefix("master."): shard.local.double() for name, shard in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_they_are_those_of_the_checkpoints_before_and_after(folder, step):
    record = metrics(folder, "alone")[step]
    after, before = masters(folder, step), masters(folder, step - 1)
    squares = {name: [0.0, 0.0] for name in LAYERS}
    for name, weight in after.items():
        parts = name.split(".")
        layer = squares[".".join(parts[:2]) if parts[0] in ("layers", "mtp") else parts[0]]
        layer[0] += float(weight.square().sum())
        layer[1] += float((weight - before[name]).square().sum())
    for place, kind in enumerate(("weight_norm", "update_norm")):
        assert list(record[f"layer_{kind}"]) == LAYERS
        for name, value in record[f"layer_{kind}"].items():
            assert value == pytest.approx(math.sqrt(squares[name][place]), rel=2e-6), (kind, name)
        assert record[kind] == pytest.approx(math.sqrt(sum(one[place] for one in squares.values())), rel=2e-6)
        assert min(record[f"layer_{kind}"].values()) > 0


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "alone"])
def test_every_layout_measures_those_of_one_process(folder, name):
    alone, spread = metrics(folder, "alone"), metrics(folder, name)
    for step in (2, 4):
        for kind in ("layer_weight_norm", "layer_update_norm"):
            for layer, value in alone[step][kind].items():
                assert spread[step][kind][layer] == pytest.approx(value, rel=1e-4), (step, kind, layer)


def test_steps_between_have_none_and_the_report_draws_the_others(folder):
    assert [step for step, record in metrics(folder, "alone").items() if "update_norm" in record] == [2, 4]
    assert 'id="plot-norms"' in write_report(folder / "runs" / "alone").read_text()


def test_a_large_weight_is_compared_in_parts(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(THRESHOLDS, "compared_elements", 7)

    class Client:
        def sums_of_squares(self, pieces):
            return torch.stack([piece.double().square().sum() for piece in pieces])

    class FakeZero:
        client = Client()
        weight = torch.arange(50, dtype=torch.float32)

        def shards(self):
            return {"master.head.weight": Shard(self.weight, 0, (5, 10))}

    from conf.load import compose

    monkeypatch.setattr(layer_norms.dist, "all_reduce", lambda tensor: None)
    zero = FakeZero()
    norms = layer_norms.LayerNorms(compose("log.norms_every=1"), zero, torch.device("cpu"))
    norms.keep(1)
    zero.weight += 2
    found = norms.collect(1)
    assert found["update_norm"] == pytest.approx(2 * math.sqrt(50))
    assert found["layer_weight_norm"]["head"] == pytest.approx(float(zero.weight.norm()))
