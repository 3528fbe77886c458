"""Sparse attention in every layout: choice, losses of indexers and gradients against one process, in both stages of its training.

Tolerance as in tests/test_layouts.py: 1e-5 of losses and norms. A key chosen otherwise shows from 1e-3 up.
"""

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from tests.layouts import run_layout
from tests.small import arguments, metrics
from tests.test_layouts import everything
from train.loop.layout_check import check_layout

STEPS = 4
BASE = [
    *("micro_batch_size=1", "checkpoint.every=0", f"steps={STEPS}", "model.layers=8", "model.init_std=0.1", "seed=2"),
    *("model.sparse.heads=4", "model.sparse.head_dim=12", "model.sparse.top_k=6", "model.sparse.pattern=FSFSFSFS"),
]
WARMUP = ["optim.index_warmup=true", "optim.bias_speed=[{value: 0}]", "optim.lr=1e-2"]
FOUR_LAYERS = ["model.layers=4", "model.sparse.pattern=FSFF"]
STAGES = "parallel.split=[2,2,2,2]"

LAYOUTS = {
    "dp2_zero2": (2, ["parallel.dp=2", "parallel.zero=2"]),
    "ep2_zero3": (2, ["parallel.dp=2", "parallel.ep=2", "parallel.zero=3"]),
    "cp2": (2, ["parallel.cp=2", "micro_batch_size=4"]),
    "cp2_zero3_again": (2, ["parallel.cp=2", "parallel.zero=3", "micro_batch_size=4", "model.recompute=[layer]"]),
    "pp2_zbv": (2, ["parallel.pp=2", "parallel.schedule=zbv", STAGES]),
    "pp2_dp2_ep2_dualpipev": (
        4,
        [
            *("parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.schedule=dualpipev", STAGES),
            "model.recompute=[norm,layer:1]",
        ],
    ),
    "pp2_cp2_1f1b": (4, ["parallel.pp=2", "parallel.cp=2", "micro_batch_size=2", "parallel.split=[4,4]"]),
}
KEYS = ("loss", "main_loss", "mtp_loss", "balance_loss", "index_loss", "grad_norm")


def layout_words(name: str) -> tuple[int, list[str]]:
    world, words = LAYOUTS[name]
    return world, [*BASE, *([] if "parallel.pp=2" in words else FOUR_LAYERS), *words]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process in both stages, with eight layers and with four."""
    tmp_path = tmp_path_factory.mktemp("sparse")
    for stage, more in (("sparse", []), ("warmup", WARMUP)):
        run_layout(tmp_path, f"{stage}_eight", 1, *BASE, *more)
        run_layout(tmp_path, f"{stage}_four", 1, *BASE, *FOUR_LAYERS, *more)
    return tmp_path


def assert_same(tmp_path, name: str, other: str, rel: float = 1e-5) -> None:
    got, want = metrics(tmp_path, name), metrics(tmp_path, other)
    assert sorted(got) == sorted(want)
    for step in range(1, STEPS + 1):
        for key in KEYS:
            assert got[step][key] == pytest.approx(want[step][key], rel=rel), (name, step, key)
        assert got[step]["load"] == want[step]["load"], (name, step)
    assert got[STEPS]["validation_loss"] == pytest.approx(want[STEPS]["validation_loss"], rel=rel)


@pytest.mark.parametrize(
    ("name", "stage"),
    [(name, stage) for name in LAYOUTS for stage in ("sparse", "warmup")],
)
def test_a_layout_of_sparse_attention_equals_one_process(reference, name, stage):
    world, words = layout_words(name)
    more = WARMUP if stage == "warmup" else []
    run_layout(reference, f"{stage}_{name}", world, *words, *more)
    assert_same(reference, f"{stage}_{name}", f"{stage}_{'eight' if 'parallel.pp=2' in words else 'four'}")


def test_a_warmup_moves_the_indexers_alone_and_lowers_their_loss(tmp_path):
    more = [*BASE, *FOUR_LAYERS, *WARMUP, "checkpoint.every=1", "steps=12", "optim.weight_decay=0.3"]
    run_layout(tmp_path, "warm", 1, *more)
    first, last = (everything(tmp_path, "warm", step) for step in (1, 12))
    moved = {
        key.removeprefix("master.")
        for key in first
        if key.startswith("master.") and not torch.equal(first[key], last[key])
    }
    assert moved == {key.removeprefix("master.") for key in first if key.startswith("master.") and ".indexer." in key}
    assert [key for key in first if key.startswith("bias.") and not torch.equal(first[key], last[key])] == []
    found = metrics(tmp_path, "warm")
    assert found[12]["index_loss"] < 0.7 * found[1]["index_loss"]


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_indexers_without_a_loss_are_frozen(tmp_path, optim):
    more = ["optim.index_loss=0", "checkpoint.every=1", "optim.weight_decay=0.3", f"optim={optim}"]
    run_layout(tmp_path, "still", 1, *BASE, *FOUR_LAYERS, *more)
    first, last = (everything(tmp_path, "still", step) for step in (1, STEPS))
    indexers = [key for key in first if key.startswith("master.") and ".indexer." in key]
    assert indexers and all(torch.equal(first[key], last[key]) for key in indexers)


def test_a_stage_that_begins_with_shared_keys_is_refused(tmp_path):
    words = arguments(tmp_path, *BASE, "parallel.pp=2", "parallel.split=[3,5]")
    with pytest.raises(UserError, match=r"(?s)puts layer 3 first in stage 1.*layer 2.*\[0, 2, 4, 6\]"):
        check_layout(compose(*words))


BESIDE = {
    "documents": ["data.mask_documents=true", "parallel.cp=2", "micro_batch_size=4"],
    # at this rate no expert is chosen by rounding; at the recipe's, one choice of step 3 moves its balance loss by 3e-5
    "muon": ["optim=muon", "optim.lr=0.0017", "parallel.dp=2", "parallel.zero=2"],
    "offload": ["model.offload=[layer]", "parallel.cp=2", "micro_batch_size=4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BESIDE)
def test_sparse_attention_beside_other_parts_equals_one_process(tmp_path, name):
    words = BESIDE[name]
    plain = [word for word in words if not word.startswith(("parallel.", "micro_batch_size", "model.offload"))]
    run_layout(tmp_path, "one", 1, *BASE, *FOUR_LAYERS, *plain)
    run_layout(tmp_path, "many", 2, *BASE, *FOUR_LAYERS, *words)
    assert_same(tmp_path, "many", "one")


@pytest.mark.slow
def test_fp8_and_its_layouts_choose_alike_but_for_rounding(tmp_path):
    """The products of indexers are FP8 too; a sum in another order moves a cast, so that losses agree as in tests of FP8."""
    run_layout(tmp_path, "one", 1, *BASE, *FOUR_LAYERS, "precision=fp8")
    run_layout(tmp_path, "many", 2, *BASE, *FOUR_LAYERS, "precision=fp8", "parallel.dp=2", "parallel.ep=2")
    one, many = metrics(tmp_path, "one"), metrics(tmp_path, "many")
    for step in range(1, STEPS + 1):
        assert many[step]["loss"] == pytest.approx(one[step]["loss"], rel=5e-3)
        assert one[step]["index_loss"] > 0


def test_lora_leaves_the_indexers_as_they_are(tmp_path):
    run_layout(tmp_path, "base", 1, *BASE, *FOUR_LAYERS, "steps=1")
    more = ["adapter=lora", "optim.bias_speed=[{value: 0}]", f"init_from={tmp_path / 'runs' / 'base'}", "steps=2"]
    run_layout(tmp_path, "lora", 1, *BASE, *FOUR_LAYERS, *more)
    assert not [key for key in everything(tmp_path, "lora", 2) if ".indexer." in key]
    assert metrics(tmp_path, "lora")[2]["index_loss"] == 0
