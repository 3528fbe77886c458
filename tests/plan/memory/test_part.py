"""Scenes share the trace of a part only if they differ in nothing that the part depends on."""

from dataclasses import replace

import pytest

from conf.load import compose
from parallel.expert import stand_in
from train.plan.memory.part import Run, Scene, seen_by, trace_backward, trace_forward
from train.plan.memory.rank_memory import scene_of

UNSEEN = ("dispatch", "wire", "ep", "ranks_per_node", "load")


def scene(*more: str) -> Scene:
    return scene_of(compose("conf=tiny", "hardware=h800", "parallel.dp=8", "parallel.ep=8", "batch_size=64", *more))


@pytest.mark.parametrize("part", ["embedding", "dense", "dense_again", "dense_away_ffn", "end"])
def test_a_part_without_experts_takes_the_same_whatever_is_said_of_them(part):
    whole = scene("model.mtp_depth=0", "parallel.dispatch=node_limited", "cluster.ranks_per_node=4")
    seen = seen_by(part, whole)
    with Run(replace(seen, **{name: getattr(whole, name) for name in UNSEEN}), part) as run:
        forward, backward = run.forward(), run.backward(False)
    assert trace_forward(whole, part) == forward and trace_backward(whole, part, False, False) == backward


@pytest.mark.slow
def test_scenes_that_a_part_tells_apart_have_traces_of_their_own():
    flat, limited = scene(), scene("parallel.dispatch=node_limited", "cluster.ranks_per_node=4")
    assert seen_by("dense", flat) == seen_by("dense", limited)
    assert trace_forward(flat, "dense") is trace_forward(limited, "dense")
    for part in ("moe", "end"):
        assert seen_by(part, flat) != seen_by(part, limited)
    some, every = scene("model.recompute=[norm,layer:1]"), scene("model.recompute=[norm,layer]")
    for part in ("embedding", "moe", "moe_again"):
        assert seen_by(part, some) == seen_by(part, every)
    assert seen_by("end", some) != seen_by("end", every)  # whose MTP modules run again with all layers alone
    assert trace_forward(some, "moe") != trace_forward(some, "moe_again")


@pytest.mark.parametrize("dispatch", ["flat", "node_limited"])
def test_a_part_takes_the_same_whatever_was_traced_before(dispatch):
    """What stands in for the other ranks keeps things of its own between traces, and they are memory of no rank."""
    limited = scene(f"parallel.dispatch={dispatch}", "cluster.ranks_per_node=4")
    stand_in._ids.cache_clear()
    runs = []
    for _ in range(2):
        with Run(seen_by("moe", limited), "moe") as run:
            runs.append((run.forward(), run.backward(False)))
    assert runs[0] == runs[1]
