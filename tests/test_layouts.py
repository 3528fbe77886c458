"""Every layout trains the same model: losses, gradient norms and balance against one process, and checkpoints that move.

Tolerance 1e-5 relative for losses and norms in fp32: layouts sum gradients in another order (a few units in the last
place, 1e-7), and AdamW's division by sqrt(v) can enlarge that where gradients are tiny. What layouts get wrong for
real (a missing sum, a wrong scale, an untied copy) shows from 1e-3 up.
"""

import math

import pytest
import torch

from conf.load import compose
from parallel.shard import Shard
from tests.layouts import run_layout
from tests.small import arguments, metrics
from train.checkpoint.manifest import read_manifest
from train.checkpoint.read_shards import load_shards

STEPS = 5
FOUR_LAYERS = ["micro_batch_size=1", "checkpoint.every=0", f"steps={STEPS}", "optim.ema_decay=0.9"]
"""A dense layer and three of experts: enough where layers are not shared among ranks, at half the time."""
BASE = [*FOUR_LAYERS, "model.layers=8"]
HALF = ["checkpoint.every=2", "checkpoint.keep=0"]
TWO_STAGES = ["interleaved", "zbv", "dualpipev"]

LAYOUTS = {
    "dp2": (2, ["parallel.dp=2"]),
    "dp2_zero2": (2, ["parallel.dp=2", "parallel.zero=2"]),
    "ep2": (2, ["parallel.dp=2", "parallel.ep=2"]),
    "dp4_ep2": (4, ["parallel.dp=4", "parallel.ep=2"]),
    # 8 sequences over 3 ranks: 3, 3 and 2; over 3 expert groups of 2: 4 rounds are 2, 1 and 1.
    "dp3_uneven": (3, ["parallel.dp=3", "parallel.uneven=true"]),
    "dp6_ep2_uneven": (6, ["parallel.dp=6", "parallel.ep=2", "parallel.uneven=true", "parallel.zero=2"]),
    "pp2_dp3_uneven": (6, ["parallel.pp=2", "parallel.dp=3", "parallel.uneven=true"]),
    "dp3_cp2_ep2_uneven": (6, ["parallel.dp=3", "parallel.cp=2", "parallel.ep=2", "parallel.uneven=true"]),
    "ep4": (4, ["parallel.dp=4", "parallel.ep=4"]),
    "ep4_nodes": (4, ["parallel.dp=4", "parallel.ep=4", "parallel.dispatch=node_limited", "cluster.ranks_per_node=2"]),
    "pp2_1f1b": (2, ["parallel.pp=2"]),
    **{f"pp2_{name}": (2, ["parallel.pp=2", f"parallel.schedule={name}"]) for name in TWO_STAGES},
    **{
        f"pp2_interleaved_{each}": (
            2,
            ["parallel.pp=2", "parallel.schedule=interleaved", f"parallel.virtual_stages={each}"],
        )
        for each in (3, 4)
    },
    "pp2_zbv_split": (2, ["parallel.pp=2", "parallel.schedule=zbv", "parallel.split=[0,4,3,1]"]),
    "pp2_dp2_ep2_layers_again": (
        4,
        [
            "parallel.pp=2",
            "parallel.dp=2",
            "parallel.ep=2",
            "parallel.schedule=dualpipev",
            "model.recompute=[norm,layer:2]",
        ],
    ),
    "pp2_zbv_offload": (2, ["parallel.pp=2", "parallel.schedule=zbv", "model.offload=[layer]"]),
    "pp2_dp2_ep2_offload": (
        4,
        [
            "parallel.pp=2",
            "parallel.dp=2",
            "parallel.ep=2",
            "parallel.schedule=dualpipev",
            "model.recompute=[norm,layer:1]",
            "model.offload=[ffn]",
        ],
    ),
    # Without a pipeline, dualpipev runs the forward of one micro-batch together with the backward of another.
    "ep2_dualpipev": (2, ["parallel.dp=2", "parallel.ep=2", "parallel.schedule=dualpipev"]),
    # Two backwards of a chunk follow one another at the end of a step, and the weights of ZeRO 3 have one gradient at a time.
    "ep2_zero3_dualpipev": (
        2,
        ["parallel.dp=2", "parallel.ep=2", "parallel.schedule=dualpipev", "parallel.zero=3", "parallel.overlap=false"],
    ),
    # Ranks that share sequences take all of them, each in messages of every layer: two micro-batches, in a pipeline four.
    "cp2": (2, ["parallel.cp=2", "micro_batch_size=4"]),
    "cp4_zero3": (4, ["parallel.cp=4", "parallel.zero=3", "micro_batch_size=4"]),
    "cp2_dp2_ep4": (4, ["parallel.cp=2", "parallel.dp=2", "parallel.ep=4", "micro_batch_size=2"]),
    "pp2_cp2_zbv": (4, ["parallel.pp=2", "parallel.cp=2", "parallel.schedule=zbv", "micro_batch_size=2"]),
    "pp4_dualpipev": (4, ["parallel.pp=4", "parallel.schedule=dualpipev"]),
    "pp2_dp2_ep2_1f1b": (4, ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2"]),
    **{
        f"pp2_dp2_ep2_{name}": (4, ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", f"parallel.schedule={name}"])
        for name in TWO_STAGES
    },
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process, to the end, with checkpoints on the way."""
    tmp_path = tmp_path_factory.mktemp("layouts")
    run_layout(tmp_path, "one", 1, *BASE, *HALF)
    run_layout(tmp_path, "one_of_four_layers", 1, *FOUR_LAYERS)
    return tmp_path


def assert_same(tmp_path, name: str, other: str = "one", first: int = 1, rel: float = 1e-5) -> None:
    got, want = metrics(tmp_path, name), metrics(tmp_path, other)
    assert sorted(got) == sorted(want)
    for step in range(first, STEPS + 1):
        for key in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert got[step][key] == pytest.approx(want[step][key], rel=rel), (name, step, key)
        assert got[step]["load"] == want[step]["load"], (name, step)
    assert got[STEPS]["validation_loss"] == pytest.approx(want[STEPS]["validation_loss"], rel=rel)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(reference, name):
    world, overrides = LAYOUTS[name]
    base, one = (BASE, "one") if "parallel.pp" in overrides[0] else (FOUR_LAYERS, "one_of_four_layers")
    run_layout(reference, name, world, *base, *overrides)
    assert_same(reference, name, one)


@pytest.mark.slow
def test_mtp_of_depth_2_and_batch_ramp_over_a_pipeline(tmp_path):
    more = [
        *BASE,
        "model.mtp_depth=2",
        "batch_size=16",
        "optim.batch_ramp_start=8",
        "optim.batch_ramp_steps=3",
        "optim.batch_ramp_increment=8",
        "data.mask_documents=true",
    ]
    run_layout(tmp_path, "one", 1, *more)
    run_layout(
        tmp_path, "many", 4, *more, "parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.schedule=dualpipev"
    )
    assert_same(tmp_path, "many")
    assert {record["batch_size"] for record in metrics(tmp_path, "many").values()} == {8, 16}


def everything(tmp_path, name: str, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    folder = tmp_path / "runs" / name / "checkpoints" / f"step_{step:08}"
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}
    tensors = {
        key: torch.empty(math.prod(entry.shape), dtype=dtypes[entry.dtype])
        for key, entry in read_manifest(folder).tensors.items()
    }
    shapes = {key: entry.shape for key, entry in read_manifest(folder).tensors.items()}
    load_shards(folder, {key: Shard(tensor, 0, shapes[key]) for key, tensor in tensors.items()})
    return tensors


OFFLOAD = {
    "cp2": (2, ["parallel.cp=2", "micro_batch_size=4", "model.offload=[layer]"]),
    "cp2_zero3_bf16": (
        2,
        ["parallel.cp=2", "parallel.zero=3", "precision=bf16", "micro_batch_size=4", "model.offload=[attention]"],
    ),
    "ep2_zero3": (
        2,
        ["parallel.dp=2", "parallel.ep=2", "parallel.zero=3", "micro_batch_size=2", "model.offload=[layer]"],
    ),
    "ep2_zero3_fp8_again": (
        2,
        [
            "parallel.dp=2",
            "parallel.ep=2",
            "parallel.zero=3",
            "precision=fp8",
            "micro_batch_size=2",
            "model.recompute=[norm,mla_up,swiglu,layer:2]",
            "model.offload=[layer:3]",
        ],
    ),
    "dp2_zero3_dualpipev": (
        2,
        [
            "parallel.dp=2",
            "parallel.zero=3",
            "parallel.schedule=dualpipev",
            "parallel.overlap=false",
            "model.offload=[layer]",
        ],
    ),
    "pp2_cp2_dualpipev": (
        4,
        [
            "parallel.pp=2",
            "parallel.cp=2",
            "parallel.schedule=dualpipev",
            "micro_batch_size=2",
            "model.offload=[ffn]",
        ],
    ),
}
"""Ranks that share sequences, or weights, with activations on the host: the last word is what a run without them lacks."""


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLOAD)
def test_activations_on_the_host_change_no_bit_of_a_layout(tmp_path, name):
    """Losses, norms, and after three steps master weights and moments, which keep every gradient."""
    world, (*layout, offload) = OFFLOAD[name]
    more = [*FOUR_LAYERS, "steps=3", "checkpoint.every=3", *layout]
    run_layout(tmp_path, "here", world, *more)
    run_layout(tmp_path, "away", world, *more, offload)
    here, away = metrics(tmp_path, "here"), metrics(tmp_path, "away")
    assert sorted(here) == sorted(away)
    for step, record in here.items():
        for key in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm", "load"):
            assert away[step][key] == record[key], (step, key)
    want, got = everything(tmp_path, "here", 3), everything(tmp_path, "away", 3)
    assert got.keys() == want.keys() and {"master", "exp_avg"} <= {key.split(".")[0] for key in got}
    assert [key for key in want if not torch.equal(got[key], want[key])] == []


MOVES = [
    ("one", "dp2"),
    ("dp2", "pp2_dualpipev"),
    ("pp2_dualpipev", "ep4"),
    ("ep4", "pp2_1f1b"),
    ("pp2_1f1b", "dp2_zero2"),
    ("dp2_zero2", "pp2_dp2_ep2_zbv"),
    ("pp2_dp2_ep2_zbv", "pp2_interleaved_3"),
    ("pp2_interleaved_3", "one"),
]


@pytest.mark.slow
def test_checkpoints_move_between_layouts_bit_for_bit(reference):
    """A chain: each layout takes over the checkpoint of the one before, changes nothing, and passes it on."""
    layouts = LAYOUTS | {"one": (1, [])}
    before, source = everything(reference, "one", 2), "one"
    assert {"master", "exp_avg", "exp_avg_sq", "ema", "bias", "running"} <= {key.split(".")[0] for key in before}
    for number, (_, target) in enumerate(MOVES):
        world, overrides = layouts[target]
        checkpoint = reference / "runs" / source / "checkpoints" / "step_00000002"
        # steps=2: the run is already over, so loading and saving again is all that happens.
        run_layout(reference, f"move{number}", world, *BASE, *HALF, "steps=2", f"resume={checkpoint}", *overrides)
        after, source = everything(reference, f"move{number}", 2), f"move{number}"
        assert after.keys() == before.keys()
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), (target, key)


@pytest.mark.slow
def test_a_resumed_layout_follows_the_reference(reference):
    checkpoint = reference / "runs" / "one" / "checkpoints" / "step_00000002"
    world, overrides = LAYOUTS["pp2_dp2_ep2_dualpipev"]
    run_layout(reference, "second", world, *BASE, *HALF, f"resume={checkpoint}", *overrides)
    got, want = metrics(reference, "second"), metrics(reference, "one")
    assert sorted(got) == [3, 4, 5]
    for step, record in got.items():
        assert record["loss"] == pytest.approx(want[step]["loss"], rel=1e-5)
        assert record["samples"] == want[step]["samples"] and record["load"] == want[step]["load"]


def test_small_arguments_compose(tmp_path):
    assert compose(*arguments(tmp_path)).model.experts == 8
