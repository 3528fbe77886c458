"""Step times: schedules beside their formulas, lanes by hand, volumes and FLOPs beside their own counts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conf.load import compose
from conf.pipeline_schedules import SCHEDULES, ActionSeconds
from conf.schema import Rate
from parallel.pipeline.orders import Action
from train.kernels.choice import build_kernels
from train.kernels.precision import build_precision
from train.model.count import flops_per_token
from train.parallelize import build_chunks
from train.plan.job import layout_of
from train.plan.memory.part import trace_forward
from train.plan.memory.rank_memory import scene_of
from train.plan.time.passes import Segment, alone, overlapped
from train.plan.time.rates import Rates, load_rates
from train.plan.time.stages import Stages
from train.plan.time.step_time import plan_time
from train.plan.time.update import count_weights, update_time
from train.plan.work_recorder import Work

V3 = ("conf=deepseek_v3", "data.path=none", "parallel=single", "hardware=h800", "parallel.dispatch=deepep",
      "parallel.wire=fp8", "optim.batch_ramp_start=null", "optim.batch_ramp_steps=0")  # fmt: skip
EVEN = ("model.layers=8", "model.dense_layers=0", "model.mtp_depth=0", "model.vocab_size=64")


def _products_only(config):
    """Rates under which nothing but products of matrices takes time."""
    forms = ("fp32", "bf16", "fp8")
    names = [f"{way}_{form}" for way in ("fprop", "grouped_fprop") for form in forms]
    free = {name: Rate() for name in ("memory", "inside", "across")}
    core = {f"attention_{way}": Rate(flops=1e12) for way in ("forward", "backward")}
    return Rates({name: Rate(flops=1e12) for name in names} | free | core, "products at 1 TFLOP/s")


@pytest.mark.parametrize("recipe", ["tiny", "deepseek_v3_16b", "deepseek_v3"])
def test_work_is_the_models_flops(recipe):
    """Operations of a step at 1 TFLOP/s each: those of train/model/count.py, with MTP and the router, which it leaves out.

    Attention's backward is 832 / 640 of twice its forward for heads of 192 and 128, as scores are recomputed.
    """
    config = compose(f"conf={recipe}", "data.path=none", "hardware=h800", "parallel=single", "precision=bf16", "model.recompute=[]",
                     "optim.batch_ramp_start=null", "optim.batch_ramp_steps=0")  # fmt: skip
    model, tokens = config.model, config.batch_size * config.seq_len
    planned = plan_time(config, _products_only(config))
    moe = model.layers - model.dense_layers + model.mtp_depth
    router = 10 * moe * model.hidden * model.experts  # its gradient as two numbers of bf16, each with two products
    qk, value = model.nope_head_dim + model.rope_head_dim, model.v_head_dim
    again = (model.layers + model.mtp_depth) * config.seq_len * model.heads * (3 * qk + 2 * value - 2 * (qk + value))
    expected = tokens * (flops_per_token(model, config.seq_len, mtp=True) + router + again) / 1e12
    # MTP positions are one less a sequence, which train/model/count.py does not follow: 1 / seq_len of a module.
    assert planned.pipeline_seconds == pytest.approx(expected, rel=1e-3 + 0.5 / config.seq_len)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_bubble_is_that_of_the_formula(schedule):
    """Stages that are alike, transfers free: idle time in closed form (deepseek_v3.md 5.2). The ends of a pipeline hold
    embedding and head besides, 0.1 % of a stage here."""
    config = compose(*V3, *EVEN, "parallel.pp=4", "parallel.dp=64", "parallel.ep=64", f"parallel.schedule={schedule}",
                     "batch_size=1024", "model.recompute=[]")  # fmt: skip
    rates = load_rates(config, alone=False)
    rates = Rates(dict(rates.rates) | {"send_across": Rate()}, "transfers between stages are free")
    stages, step = Stages(config, layout_of(config), rates), plan_time(config, rates)
    whole = {kind: stages.elapsed(Action(kind, 1, 0)).seconds for kind in "FBW"}
    halves = Action("F", 1, 0), Action("B", 1, 0)
    pair = stages.elapsed(Action("FB", 1, 0, halves)).seconds
    expected = SCHEDULES[schedule].count_idle_seconds(
        4, ActionSeconds(whole["F"], whole["B"] - whole["W"], whole["W"], pair)
    )
    idle = step.pipeline_seconds - max(step.simulation.busy)
    assert idle == pytest.approx(expected, rel=0.15, abs=0.02 * step.pipeline_seconds)


def test_alone_a_pass_waits_for_what_it_cannot_hide():
    segments = [Segment(1.0, transfer=2.0, beside=0.5), Segment(1.0)]
    assert alone(segments, 0.0).seconds == pytest.approx(4.0) and alone(segments, 0.0).exposed == pytest.approx(1.5)
    assert alone([Segment(1.0, transfer=2.0, beside=3.0)], 0.0).seconds == pytest.approx(4.0)
    halved = alone([Segment(1.0, transfer=4.0, beside=1.0)], 0.5)  # half of the device computes twice as long
    assert halved.seconds == pytest.approx(1 + 4) and halved.exposed == pytest.approx(4 - 2)
    assert alone([Segment(1.0, transfer=1.0, beside=2.0)], 0.5).seconds == pytest.approx(1 + 2.5)


def test_a_pair_hides_the_transfers_of_each_under_the_other():
    lane = [Segment(1.0, transfer=1.0), Segment(1.0, transfer=1.0), Segment(1.0)]
    hidden = overlapped(lane, lane, 0.0)
    assert hidden.seconds == pytest.approx(6.0) and hidden.exposed == 0.0, "computing of both, and nothing else"
    assert 2 * alone(lane, 0.0).seconds == pytest.approx(10.0)
    slow = [Segment(0.1, transfer=5.0), Segment(0.1)]
    assert overlapped(slow, slow, 0.0).seconds == pytest.approx(0.1 + 5 + 5 + 0.1), "transfers follow one another"
    assert overlapped(lane, lane, 1.0).seconds > hidden.seconds, "a transfer that takes the cores hides nothing"
    second_hop = [Segment(1.0, transfer=1.0), Segment(0.0, transfer=0.5, yields=False), Segment(1.0)]
    assert overlapped(second_hop, second_hop, 0.0).exposed == pytest.approx(1.5 + 0.5), "it waits behind the other's"


@pytest.mark.slow
def test_overlap_and_the_fp8_wire_save_time():
    base = (*V3, "parallel.pp=16", "parallel.dp=128", "parallel.ep=64", "parallel.schedule=dualpipev")
    times = {
        name: plan_time(compose(*base, *more)).step_seconds
        for name, more in {"both": (), "alone": ("parallel.overlap=false",), "bf16": ("parallel.wire=bf16",)}.items()
    }
    assert times["both"] < times["alone"] and times["both"] <= times["bf16"]


@pytest.mark.parametrize(
    ("more", "hops", "sent", "sorted_row", "cast_on_arrival"),
    [
        ((), 1, 7168 + 4 * 56 + 8 * 12, 7168 + 4 * 56, 2),  # scales in fp32; ids and gates of eight experts
        (("precision=bf16",), 1, 7168 + 4 * 56 + 8 * 12, 2 * 7168, 1),
        (("parallel.dispatch=node_limited",), 2, 7168 + 56 + 6 * 8, 7168 + 4 * 56, 2),
    ],
)
def test_rows_of_an_fp8_wire_stay_so_up_to_the_product(more, hops, sent, sorted_row, cast_on_arrival):
    """Two casts behind the exchange are of the second product's rows and of weights, none of the rows that arrived; to bf16 it is one."""
    config = compose(*V3, "parallel.pp=16", "parallel.dp=128", "parallel.ep=64", "parallel.schedule=dualpipev", *more)
    out, arrived = trace_forward(scene_of(config), "moe").run.work[:2]
    found = {one.kind: one for one in arrived.compute}
    assert [one.row_bytes for one in out.exchanges] == [sent] * hops
    assert found["permute"].bytes / (2 * 8 * 4096 * config.plan.imbalance) == pytest.approx(sorted_row, rel=0.01)
    assert found["cast"].calls == cast_on_arrival


def test_weights_of_a_rank_are_those_that_it_builds():
    config = compose("model.dense_layers=1", "parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "micro_batch_size=2",
                     "parallel.schedule=dualpipev", "hardware=h800")  # fmt: skip
    layout = layout_of(config)
    for pp_rank in range(2):
        mesh = SimpleNamespace(layout=layout, pp_rank=pp_rank, ep_rank=0)
        precision = build_precision(config.precision, torch.device("cpu"), build_kernels("cpu"))
        chunks, ids, count = build_chunks(config, mesh, torch.device("cpu"), None, precision)
        params = {param: name for chunk in chunks for name, param in chunk.named_parameters()}
        experts = sum(param.numel() for param, name in params.items() if ".experts." in name)
        stages = Stages(config, layout, Rates({}, ""))
        held = count_weights(config, stages.layers, ids, count - 1)
        assert held.experts == experts and held.dense == sum(param.numel() for param in params) - experts


def test_matrices_that_are_made_orthogonal_are_those_of_the_rule():
    config = compose(
        "conf=tiny", "optim=muon", "parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "mode=plan", "hardware=h800"
    )
    layout = layout_of(config)
    precision = build_precision(config.precision, torch.device("cpu"), build_kernels("cpu"))
    for pp_rank in range(2):
        mesh = SimpleNamespace(layout=layout, pp_rank=pp_rank, ep_rank=0)
        chunks, ids, count = build_chunks(config, mesh, torch.device("cpu"), None, precision)
        params = [(name, param) for chunk in chunks for name, param in chunk.named_parameters()]
        whole = [one for one in params if config.optim.facts.choose_rule(one[0], one[1].dim()).is_whole]
        stages = Stages(config, layout, Rates({}, ""))
        dense, experts = count_weights(config, stages.layers, ids, count - 1).orthogonal
        assert experts.elements == sum(param.numel() for name, param in whole if ".experts." in name)
        assert dense.elements == sum(param.numel() for name, param in whole) - experts.elements
        w1 = 5 * (4 * 128 * 128 * 256 + 2 * 128**3)  # and w3 and w2, which has as many operations
        assert experts.largest == w1 and experts.flops == 3 * w1 * experts.elements / (3 * 128 * 256)


def test_time_to_make_matrices_orthogonal():
    """One rank: the products alone. Two: half of them, or the way there and back where that takes longer."""
    plain, muon = (
        compose("conf=tiny", f"optim={name}", "mode=plan", "hardware=h800", "parallel.dp=2")
        for name in ("adamw", "muon")
    )
    rates, layout = load_rates(muon, alone=False), layout_of(muon)
    held = count_weights(muon, [range(4)], [0], 0)
    before, after = (
        update_time(one, layout, rates, held if one is muon else replace(held, orthogonal=())) for one in (plain, muon)
    )
    both = 0.0
    for one in held.orthogonal:
        moved = 2 * 4 * one.elements / 4
        both += max(
            rates.of(Work("fprop_bf16", 1.05 * max(one.flops / 2, one.largest))),
            rates.of(Work("all_to_all_inside", bytes=moved)),
        )
    less_state = update_time(muon, layout, rates, replace(held, orthogonal=())).optimizer
    assert after.optimizer - less_state == pytest.approx(both) and both > 0
    assert less_state <= before.optimizer


def test_a_ring_over_nodes_brings_the_adapters_of_all_its_ranks():
    config = compose(*V3, "parallel.pp=16", "parallel.dp=128", "parallel.ep=64")
    rates, layout = load_rates(config, alone=False), layout_of(config)
    stages = Stages(config, layout, rates)
    held = count_weights(config, stages.layers, [5], 15)
    update = update_time(config, layout, rates, held)
    dense = 2 * held.dense * 127 / 128 * 4 / min(134e9, 8 * 44.6e9)
    experts = 2 * held.experts / 2 * 4 / 44.6e9
    device = (held.dense + held.experts) * 20 / 3.0e12
    assert update.reduce == pytest.approx(dense + experts + device, rel=0.01)
