"""The error about a NaN names the right rank, layer and pass, and gives fitting advice."""

import json
from pathlib import Path

import pytest
import torch

from tests.layouts import run_layout, train_rank
from tests.small import metrics, trajectory
from train.loop.hooks.nonfinite import Origin, RankSightings, Sighting, find_origin

END, START = Sighting(2, 3, "the output of layers.2.attention"), Sighting(2, 1, "the input of layers.2.attention")
LATER = Sighting(3, 0, "the input of layers.3")
CAUGHT = Sighting(2, 4, "the weight layers.2.moe.experts.w13", catching=True)


def saw(rank: int, replica: int, forward=None, backward=None, weights=(), loss=None, gradients=()) -> RankSightings:
    return RankSightings(rank, replica, loss, list(gradients), list(weights), forward, backward)


def test_the_first_in_the_forward_pass_is_the_origin_and_later_ones_caught_it():
    found = find_origin(False, [saw(0, 0), saw(1, 1, END), saw(2, 0), saw(3, 1, LATER, LATER)])
    assert found == Origin("non-finite loss", "forward", END.name, (1,), True, ())
    assert found.text == "non-finite loss: it began in the forward pass on rank 1, at the output of layers.2.attention"
    assert "rate is not the cause" in found.advice(9, "8 to 15") and "samples 8 to 15" in found.advice(9, "8 to 15")
    assert "device of rank 1" in found.advice(9, "8 to 15") and "Lower" not in found.advice(9, "8 to 15")


def test_the_last_layer_is_the_origin_in_the_backward_pass_and_experts_catch_what_others_sent():
    found = find_origin(True, [saw(0, 0, None, CAUGHT), saw(1, 1, None, Sighting(2, 9, "the output of layers.2.moe"))])
    assert found.ranks == (1,) and found.phase == "backward" and found.alone
    assert found.text.endswith("in the backward pass on rank 1, at the gradient of the output of layers.2.moe")


def test_what_all_ranks_see_is_blamed_on_none_of_them():
    found = find_origin(False, [saw(0, 0, END), saw(1, 1, END)])
    assert not found.ranks and not found.alone and "on all ranks that have it" in found.text
    assert found.advice(5, "0 to 7").startswith("Lower optim.lr, or resume from an older checkpoint")
    before = found.advice(0, "0 to 7")
    assert "There was no update yet" in before and "Lower" not in before


def test_one_rank_alone_in_the_run_is_named_without_being_told_from_others():
    found = find_origin(False, [saw(0, 0, START)])
    assert found.ranks == (0,) and not found.alone and "Lower optim.lr" in found.advice(3, "0 to 7")


def test_broken_weights_come_before_what_they_cause():
    found = find_origin(False, [saw(0, 0, END), saw(1, 1, END, weights=["layers.2.moe.experts.w2"])])
    assert found.text == "non-finite loss: weights are not finite on rank 1: layers.2.moe.experts.w2"
    assert "resume from an older checkpoint" in found.advice(3, "0 to 7") and "rate" not in found.advice(3, "0 to 7")


def test_what_does_not_come_again_is_a_matter_of_the_device():
    found = find_origin(False, [saw(0, 0, loss=True), saw(1, 1, loss=False)])
    assert found.phase is None and found.ranks == (1,)
    assert "the loss on rank 1 was not finite, and was finite when the step was repeated" in found.text
    assert "test the device and its memory of rank 1" in found.advice(3, "0 to 7")
    found = find_origin(True, [saw(0, 0, gradients=["head.weight"]), saw(1, 1)])
    assert "the gradient of head.weight was not finite" in found.text and not found.ranks


def test_what_ranks_tell_each_other_is_json():
    for each in (saw(0, 0), saw(1, 1, END, CAUGHT, ["a"], False, ["b"])):
        assert RankSightings.from_plain(json.loads(json.dumps(each.plain()))) == each


class _NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return torch.full_like(dx, torch.nan)


def train_with_nan(rank: int, config_path: str, world: int, store: str) -> None:
    """One rank; `nan.json` beside the runs says where to put NaN: rank, module, phase, and whether it comes again."""
    from train import worker
    from train.loop.hooks import skipped_steps
    from train.loop.hooks.nonfinite import Watch

    where = json.loads((Path(config_path).parents[2] / "nan.json").read_text())
    parallelize, watching, calls = worker.parallelize, [], []

    class Noticed(Watch):
        def __enter__(self):
            watching.append(self)
            return super().__enter__()

    def corrupt(module, inputs, output):
        calls.append(module)
        if (watching and not where["again"]) or ("calls" in where and len(calls) not in where["calls"]):
            return output
        return output * torch.nan if where["phase"] == "forward" else _NanBackward.apply(output)

    def broken(*arguments, **keywords):
        parts = parallelize(*arguments, **keywords)
        for chunk in parts.chunks:
            modules = dict(chunk.named_modules())
            if rank == where["rank"] and where["phase"] == "weight":
                with torch.no_grad():
                    dict(chunk.named_parameters())[where["module"]].view(-1)[3] = torch.nan
            elif rank == where["rank"] and where["module"] in modules:
                modules[where["module"]].register_forward_hook(corrupt)
        return parts

    worker.parallelize, skipped_steps.Watch = broken, Noticed
    if not where.get("look", True):
        skipped_steps.SkippedSteps._find_origin = lambda *_: Origin("non-finite loss", None, "", (), False, ())
    train_rank(rank, config_path, world, store)


def diverge(tmp_path: Path, monkeypatch, world: int, where: dict, *layout: str) -> str:
    """What a run says in which NaN is put somewhere from its first step on."""
    monkeypatch.setattr("tests.layouts.train_rank", train_with_nan)
    (tmp_path / "nan.json").write_text(json.dumps({"again": True} | where))
    once = ["checkpoint.every=0", "log.validate_every=0", "log.validation_sequences=2", "optim.max_bad_steps=2"]
    with pytest.raises(AssertionError) as caught:
        run_layout(tmp_path, "nan", world, "steps=4", *once, *layout)
    return str(caught.value)


EP = ("parallel.dp=2", "parallel.ep=2")
PP = ("model.layers=8", "micro_batch_size=1", "parallel.pp=2")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_rank_and_layer_are_named(tmp_path, monkeypatch, phase):
    where = {"rank": 1, "module": "layers.2.attention", "phase": phase}
    said = diverge(tmp_path, monkeypatch, 2, where, *EP)
    place = (
        "the output of layers.2.attention" if phase == "forward" else "the gradient of the output of layers.2.attention"
    )
    assert f"began in the {phase} pass on rank 1, at {place}" in said, said
    assert "rate is not the cause" in said and "Lower optim.lr" not in said and "samples 12 to 15" in said
    assert '"ranks": [1]' in said


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.dp=2", "parallel.zero=3"),
        ("parallel.dp=2", "parallel.ep=2", "precision=bf16"),
        PP,
        (*PP, "parallel.schedule=interleaved"),
        (*PP, "parallel.schedule=zbv"),
        (*PP, "parallel.schedule=dualpipev"),
    ],
    ids=["zero3", "ep_bf16", "1f1b", "interleaved", "zbv", "dualpipev"],
)
def test_the_rank_and_layer_are_named_in_every_layout(tmp_path, monkeypatch, phase, layout):
    split = any("pp=2" in word for word in layout)
    where = {"rank": 1, "module": "layers.7.moe" if split else "layers.2.attention", "phase": phase}
    if layout[-1].startswith("parallel.schedule="):
        where["module"] = "layers.3.moe"  # of four stages, rank 1 holds the second
    said = diverge(tmp_path, monkeypatch, 2, where, *layout)
    assert f"began in the {phase} pass on rank 1, at " in said and f"the output of {where['module']}" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("layout", [EP, ("parallel.dp=2", "parallel.zero=3"), (*PP, "parallel.schedule=dualpipev")])
def test_a_look_at_a_skipped_step_changes_nothing(tmp_path, monkeypatch, layout):
    """The third step is bad, and the run goes on; whether somebody looked or not, its losses are the same bits."""
    monkeypatch.setattr("tests.layouts.train_rank", train_with_nan)
    per_step = 8 if "micro_batch_size=1" in layout else 2
    where = {"rank": 1, "module": "layers.3.moe", "phase": "forward", "again": False, "calls": [2 * per_step + 1]}
    once = ["checkpoint.every=0", "log.validate_every=0", "log.validation_sequences=2", *layout]
    for look in (True, False):
        (tmp_path / "nan.json").write_text(json.dumps(where | {"look": look}))
        run_layout(tmp_path, f"look{look}", 2, "steps=6", *once)
    assert metrics(tmp_path, "lookTrue")[6]["skipped_steps"] == 1
    assert trajectory(tmp_path, "lookTrue") == trajectory(tmp_path, "lookFalse")


def test_bad_steps_that_do_not_follow_one_another_end_no_run(tmp_path, monkeypatch):
    """The second and the fourth of steps of four forward passes; two in a row would end it."""
    monkeypatch.setattr("tests.layouts.train_rank", train_with_nan)
    where = {"rank": 0, "module": "layers.3.moe", "phase": "forward", "again": True, "calls": [5, 13], "look": False}
    (tmp_path / "nan.json").write_text(json.dumps(where))
    once = ["checkpoint.every=0", "log.validate_every=0", "log.validation_sequences=2", "optim.max_bad_steps=2"]
    run_layout(tmp_path, "nan", 1, "steps=5", *once)
    assert [record["skipped_steps"] for record in metrics(tmp_path, "nan").values()] == [0, 1, 1, 2, 2]


@pytest.mark.slow
def test_a_broken_weight_is_named(tmp_path, monkeypatch):
    where = {"rank": 0, "module": "layers.2.ffn_norm.weight", "phase": "weight"}
    said = diverge(tmp_path, monkeypatch, 1, where)
    assert "weights are not finite on rank 0: layers.2.ffn_norm.weight" in said and "init_from" in said


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_what_does_not_come_again_is_said(tmp_path, monkeypatch, phase):
    where = {"rank": 1, "module": "layers.2.attention", "phase": phase, "again": False}
    monkeypatch.setattr("tests.layouts.train_rank", train_with_nan)
    (tmp_path / "nan.json").write_text(json.dumps(where))
    once = ["checkpoint.every=0", "log.validate_every=0", "log.validation_sequences=2", "optim.max_bad_steps=1"]
    with pytest.raises(AssertionError, match="was finite when the step was repeated") as caught:
        run_layout(tmp_path, "nan", 2, "steps=4", *once, *EP)
    assert ("the loss on rank 1" in str(caught.value)) == (phase == "forward")
