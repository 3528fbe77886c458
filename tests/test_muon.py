"""Muon with QK-clip trains the same model in every layout, and goes on in another one.

Tolerance 1e-4 relative: layouts sum gradients in another order (1e-7), and Newton-Schulz multiplies what lies in directions with a
small singular value by up to 3.4^5 = 485 in its five steps. A matrix that is cut or orthogonalised wrongly shows from 1e-2 up.
"""

from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from parallel.shard import whole
from tests.layouts import run_layout
from tests.small import MODEL, metrics, train
from train.checkpoint.manifest import read_manifest
from train.checkpoint.read_shards import load_shards

STEPS = 4
BASE = [
    "model.layers=4",
    "micro_batch_size=1",
    "checkpoint.every=0",
    f"steps={STEPS}",
    "optim=muon",
    "optim.qk_clip=0.01",
]
SHARING = ["parallel.cp=2", "parallel.zero=3", "micro_batch_size=4"]
"""Two micro-batches: ranks that share sequences take all of them, each in messages of every layer."""
LAYOUTS = {
    "dp2": (2, ["parallel.dp=2"]),
    "dp2_zero2_offload": (2, ["parallel.dp=2", "parallel.zero=2", "parallel.offload_optimizer=true"]),
    "dp3_uneven": (3, ["parallel.dp=3", "parallel.uneven=true"]),
    "cp2_zero3": (2, SHARING),
    "dp4_ep2": (4, ["parallel.dp=4", "parallel.ep=2"]),
    "pp2_dp2_ep2_dualpipev": (
        4, ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.schedule=dualpipev"]
    ),
    "pp2_interleaved": (2, ["parallel.pp=2", "parallel.schedule=interleaved"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("muon")
    run_layout(tmp_path, "one", 1, *BASE, "checkpoint.every=2", "checkpoint.keep=0")
    return tmp_path


def assert_same(tmp_path, name: str, first: int = 1) -> None:
    got, want = metrics(tmp_path, name), metrics(tmp_path, "one")
    for step in range(first, STEPS + 1):
        for key in ("loss", "main_loss", "mtp_loss", "grad_norm", "attention_score_max"):
            assert got[step][key] == pytest.approx(want[step][key], rel=1e-4), (name, step, key)
        assert got[step]["heads_clipped"] == want[step]["heads_clipped"] > 0, (name, step)
    assert got[STEPS]["validation_loss"] == pytest.approx(want[STEPS]["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(reference, name):
    world, overrides = LAYOUTS[name]
    run_layout(reference, name, world, *BASE, *overrides)
    assert_same(reference, name)


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(reference):
    start = reference / "runs" / "one" / "checkpoints" / "step_00000002"
    run_layout(reference, "moved", 2, *BASE, *SHARING, f"resume={start}")
    assert_same(reference, "moved", first=3)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_goes_on_with_another_optimizer_which_starts_anew(tmp_path, first, then):
    """Its steps are those of a run that begins with these weights at that place in the data, with nothing kept of earlier gradients."""
    words = [word for word in BASE if not word.startswith(("optim", "checkpoint"))]
    words += ["optim.warmup_steps=0", "optim.lr=1e-2", "optim.weight_decay=0"]
    run_layout(tmp_path, "one", 1, *words, f"optim={first}", "checkpoint.every=2", "checkpoint.keep=0")
    start = tmp_path / "runs" / "one" / "checkpoints" / "step_00000002"
    run_layout(tmp_path, "other", 2, *words, f"optim={then}", "parallel.dp=2", f"resume={start}", "checkpoint.every=3")
    own, other = metrics(tmp_path, "one"), metrics(tmp_path, "other")
    assert other[3]["tokens"] == own[3]["tokens"]  # the data go on
    for key in ("loss", "grad_norm"):  # with the weights
        assert other[3][key] == pytest.approx(own[3][key], rel=1e-5)
    assert other[4]["loss"] != pytest.approx(own[4]["loss"], rel=1e-4)
    meta = read_manifest(tmp_path / "runs" / "other" / "checkpoints" / "step_00000003").meta
    assert meta["updates"] == 1 and meta["step"] == 3
    if then == "adamw":  # the very first update of AdamW is the sign of the gradient, times the rate
        before, after = (masters(tmp_path / "runs" / name / "checkpoints" / f"step_0000000{step}", "layers.1.attention.q_down.weight")
                         for name, step in (("one", 2), ("other", 3)))  # fmt: skip
        moved = (before - after).abs()
        assert moved.max() <= 1.001 * other[3]["lr"] and moved.median() == pytest.approx(other[3]["lr"], rel=1e-2)


def masters(checkpoint: Path, name: str) -> torch.Tensor:
    """Those of a weight in a checkpoint."""
    shape = tuple(read_manifest(checkpoint).tensors[f"master.{name}"].shape)
    found = torch.empty(shape)
    load_shards(checkpoint, {f"master.{name}": whole(found)})
    return found


@pytest.mark.parametrize(
    "words, said",
    [
        (["optim.muon.momentum=0.9", "optim.muon.by_head=false"], "optim.muon.momentum, optim.muon.by_head"),
        (["optim=muon", "optim.muon.iteration=cubic"], "quintic, polar_express, deepseek_v4"),
        (["optim=moun"], "optim"),
        (["optim=muon", "optim.qk_clip=0"], "above 0"),
        (["optim=muon", "optim.muon.momentum=1"], "below 1"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_words_that_do_not_fit_are_named_before_the_start(words, said):
    with pytest.raises(UserError) as error:
        compose(*words)
    assert said in str(error.value)


@pytest.mark.slow
def test_a_plan_says_what_one_matrix_is(tmp_path):
    done = train(tmp_path, "mode=plan", "optim=muon", "hardware=h800")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    heads, nope, rope = MODEL["heads"], MODEL["nope_head_dim"], MODEL["rope_head_dim"]
    assert f"attention.q_up {heads} of {nope + rope} x {MODEL['q_rank']}" in said
    assert f"moe.experts.w13 {2 * MODEL['experts']} of {MODEL['expert_width']} x {MODEL['hidden']}" in said
    assert "projection 1 of" in said and "router" not in said.split("Matrices")[1].split("Experts")[0]
