"""mode=plan from end to end: the files, the verdict, cures that cure, a search whose layout loads and is the fastest."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from conf.errors import UserError
from conf.load import compose
from conf.schema import ROOT, Config, PipelineSchedule, Rate
from parallel.pipeline.orders import Action
from tests.small import environment
from train.model.count import count_parameters
from train.parallelize import stage_layers
from train.plan import reserve
from train.plan.budget import Verdict, make_plan, verdict_of
from train.plan.job import layout_of
from train.plan.memory.rank_memory import HELD_COPIES, host_bytes, plan_memory, rank_memory, scene_of
from train.plan.memory.schedule_memory import WalkDepth
from train.plan.report import plan_page
from train.plan.report.plan_record import interval_words, verdict
from train.plan.reserve import host_memory, reserve_of, tensor_memory
from train.plan.search import candidates
from train.plan.search import lower_bounds as bounds
from train.plan.search import search as searching
from train.plan.search.candidates import ActivationSaving, Frame, frames
from train.plan.search.changes import broken_rule, fitted_ramp, overrides, with_changes, write_parallel
from train.plan.search.cures import WORTH, find_cures, find_stages
from train.plan.search.search import search
from train.plan.time.rates import INTERVALS, OURS_UNTIMED, TUNED, load_rates
from train.plan.time.step_time import plan_time
from train.plan.time.update import count_weights

SMALL = ("conf=tiny", "hardware=h800", "micro_batch_size=2", "batch_size=32")


@pytest.mark.slow
def test_the_command_writes_json_and_page_and_starts_nothing(tmp_path):
    command = [sys.executable, "-m", "train", *SMALL, "mode=plan", f"runs={tmp_path}", "parallel.pp=2", "parallel.dp=2",
               "parallel.ep=2", "parallel.schedule=dualpipev", "name=planned"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "planned").iterdir()) == ["plan.html", "plan.json"]
    plan = json.loads((tmp_path / "planned" / "plan.json").read_text())
    assert plan["fits"] and plan["room_bytes"] > 0 and plan["devices"] == 4
    assert "planned on 4 x h800: fits, with" in done.stdout
    parts = plan["pipeline_seconds"] + plan["reduce_seconds"] + plan["optimizer_seconds"] + plan["gather_seconds"]
    assert plan["step_seconds"] == pytest.approx(parts)
    assert sum(plan["action_seconds"].values()) + plan["bubble_seconds"] == pytest.approx(plan["pipeline_seconds"])
    assert plan["tokens_per_second_per_gpu"] == pytest.approx(32 * 256 / plan["step_seconds"] / 4)
    assert plan["gpu_hours"] == pytest.approx(plan["tokens"] / plan["tokens_per_second"] * 4 / 3600)
    assert plan["cost"] == pytest.approx(2.0 * plan["gpu_hours"])
    assert [rank["peak_bytes"] for rank in plan["ranks"]] == [
        sum(rank["items_bytes"].values()) for rank in plan["ranks"]
    ]
    assert all(max(rank["phase_peak_bytes"].values()) == rank["peak_bytes"] for rank in plan["ranks"])
    assert plan["link_bytes"]["across"] == {} and plan["link_bytes"]["inside"].keys() == {
        "experts", "stages", "gradients", "weights",
    }  # fmt: skip
    assert plan["link_bytes"]["inside"]["stages"] == 2 * 16 * 256 * 256 * 2, "two borders, there and back, of two ranks"
    page = (tmp_path / "planned" / "plan.html").read_text()
    assert all(f"plot-{figure}" in page for figure in ("memory", "host", "interval", "traffic", "time", "timeline"))
    assert 'src="http' not in page and "reduction of gradients</td>" in page


MEASURED = {"dp": reserve.COMMUNICATOR, "pair": reserve.PAIR_COMMUNICATOR}
CONNECTIONS = 16 * reserve.INSIDE
"""Between two ranks of a node of H800: two channels for each of eight links."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "communicators", "exchange"),
    [
        ([], 0, 0),
        (["parallel.dp=2", "parallel.ep=2"], MEASURED["pair"], CONNECTIONS),  # of all, who are also the ranks of dp
        (["parallel.dp=4", "parallel.ep=2"], MEASURED["dp"] + MEASURED["pair"], CONNECTIONS),  # and of copies of experts
        (["parallel.pp=2", "parallel.dp=4", "parallel.ep=4", "parallel.dispatch=node_limited"],
         2 * MEASURED["dp"] + MEASURED["pair"] + CONNECTIONS, 3 * CONNECTIONS),  # all, dp and the pipeline, which also has a neighbour
    ],
)  # fmt: skip
def test_the_reserve_is_beside_the_peak_of_every_rank(layout, communicators, exchange):
    config = compose(*SMALL, *layout)
    plan = make_plan(config)
    assert (plan.reserve["communicators"], plan.reserve["exchange"]) == (communicators, exchange)
    assert plan.room_bytes == plan.memory_bytes - sum(plan.reserve.values()) - plan.fullest.peak_bytes
    assert plan.room_bytes == tensor_memory(config) - plan.fullest.peak_bytes
    assert reserve_of(compose(*SMALL, *layout, "hardware=cpu")) == {}
    assert reserve_of(compose(*SMALL, *layout, "plan.reserve=3e9")) == {"given": 3_000_000_000}


def test_copies_of_experts_on_several_nodes_have_few_channels():
    """Two, four and eight ranks, each on a node of its own: a ring over the network, and a tree of one, three and three neighbours."""
    for copies, neighbours in ((2, 1), (4, 3), (8, 3)):
        found = reserve_of(compose(*SMALL, f"parallel.dp={8 * copies}", "parallel.ep=8", "batch_size=128"))
        assert found["communicators"] == MEASURED["dp"] + 4 * (1 + neighbours) * reserve.ACROSS
        assert found["exchange"] == 7 * CONNECTIONS, "the ranks of an expert group share a node"


@pytest.mark.slow
def test_exchanges_that_were_measured_or_have_a_formula():
    """Eight H100: 3.28 GB (nccl issue 1685). Over 64 ranks the channels are shared out; DeepEP's are its own formulas."""
    eight = compose(
        "conf=deepseek_v3_16b", "data.path=none", "hardware=h100", "batch_size=64", "parallel.dp=8", "parallel.ep=8"
    )
    assert reserve_of(eight)["exchange"] == pytest.approx(3.28e9, rel=0.15)
    paper = ("conf=deepseek_v3", "data.path=none", "hardware=h800")
    sizes = {
        name: reserve_of(compose(*paper, f"parallel.dispatch={name}"))["exchange"]
        for name in ("flat", "deepep", "node_limited")
    }
    assert sizes["flat"] < sizes["deepep"] < sizes["node_limited"]
    assert sizes["deepep"] == 10 * 8 * 288 * 16392 + 2 * 10 * 8 * 128 * 16392


def test_the_verdict_has_a_margin():
    assert [verdict_of(room, 1000) for room in (-1, 0, 29, 30)] == [
        Verdict.lacks,
        Verdict.barely,
        Verdict.barely,
        Verdict.fits,
    ]


@pytest.mark.parametrize("recipe, layout", [("moonlight_16b", ["parallel.dp=32", "parallel.ep=8"]), ("kimi_k2", [])])
def test_recipes_of_models_that_muon_trained_fit_their_gpus(recipe, layout):
    """On H800, which Kimi K2 was trained on; orthogonal factors take less than a hundredth of a step."""
    plan = make_plan(compose(f"conf={recipe}", "data.path=none", "hardware=h800", *layout))
    assert plan.fits and plan.config.optim.name == "muon"
    assert 0 < plan.step.update.optimizer < 0.01 * plan.step.step_seconds


@pytest.mark.slow
def test_cures_are_evaluated_and_make_it_fit():
    config = compose("conf=deepseek_v3_16b", "data.path=none", "hardware=h800", "parallel.dp=8", "parallel.ep=8",
                     "batch_size=64", "model.recompute=[]", "micro_batch_size=8")  # fmt: skip
    plan = make_plan(config)
    assert not plan.fits and plan.room_bytes < 0
    cures = find_cures(plan)
    assert cures and [cure.gpu_seconds for cure in cures] == sorted(cure.gpu_seconds for cure in cures)
    for cure in cures:
        cured = make_plan(compose("conf=deepseek_v3_16b", "data.path=none", "hardware=h800", "parallel.dp=8",
                                  "parallel.ep=8", "batch_size=64", "model.recompute=[]", "micro_batch_size=8",
                                  *cure.overrides))  # fmt: skip
        assert cured.fits and cured.room_bytes == cure.room_bytes
        assert cured.step.step_seconds == pytest.approx(cure.step_seconds)


@pytest.fixture(scope="module")
def found():
    return search(compose(*SMALL, "mode=plan", "plan.search=true", "plan.devices=4", "model.layers=6"))


@pytest.mark.slow
def test_a_search_finds_the_fastest_and_explains_the_rest(found):
    times = [one.step_seconds for one in found.best]
    assert len(times) == 10 and times == sorted(times) and found.devices == 4
    base = compose(*SMALL, "model.layers=6", "parallel.dp=4")
    for dp, ep, size in ((4, 1, 2), (4, 4, 2), (4, 2, 4), (2, 2, 2)):
        config = with_changes(base, pp=4 // dp, dp=dp, ep=ep, micro_batch_size=size)
        assert broken_rule(config) is None and plan_time(config).step_seconds >= times[0] * (1 - 1e-9)
    shown = {f"pp={one.config.parallel.pp}" for one in found.best}
    assert shown | {family.name.split()[0] for family in found.rejected} == {"pp=1", "pp=2", "pp=4"}
    assert all(family.reason for family in found.rejected)
    record = found.record()
    best = record["best"][0]
    assert best["cost"] == 2 * best["gpu_hours"] > 0 and 0 < best["effective_share"] < 1
    assert "".join(plan_page._search({"search": record})).count("<tr>") == 1 + 10 and not plan_page._search({})


def test_a_search_answers_with_the_recipes_own_layout_first_and_an_interrupt_keeps_it(monkeypatch):
    bounded, told = [], []

    class Counted(bounds.FrameBounds):
        def candidates(self):
            bounded.append(self)
            return super().candidates()

    def tell(found: searching.FoundLayout) -> None:
        told.append(found)
        raise KeyboardInterrupt

    monkeypatch.setattr(searching, "FrameBounds", Counted)
    config = compose(*SMALL, "mode=plan", "parallel.dp=2", "parallel.ep=2", "plan.search=true", "plan.devices=4")
    found = search(config, tell)
    own = ["parallel.dp=4", "micro_batch_size=2"]
    assert not found.complete and found.rejected == [] and [one.overrides for one in found.best] == [own]
    assert told[0].overrides == own and len(bounded) == 1 < found.tried


FEW = (*SMALL, "mode=plan", "plan.search=true", "plan.devices=4", "plan.reserve=0", "model.layers=6", "model.hidden=128",
       "model.recompute=[]")  # fmt: skip


@pytest.fixture
def few_choices(monkeypatch):
    """So that a test can try everything; whole layers again with DeepEP under every schedule among it."""
    monkeypatch.setattr(candidates, "MICRO_BATCHES", (2,))
    savings = (
        ActivationSaving([]),
        ActivationSaving(["layer"]),
        ActivationSaving([], blocks="recompute"),
        ActivationSaving([], blocks="offload"),
    )
    monkeypatch.setattr(candidates, "SAVINGS", savings)
    monkeypatch.setattr(candidates, "WAYS", (("flat", "bf16"), ("deepep", "fp8")))


def _layouts(frame: Frame) -> Iterator[list[Config]]:
    """Layouts that differ in the number of blocks that a saving takes, the fewest first."""
    longest = max(map(len, stage_layers(frame.config)))
    for saving, (dispatch, wire), host in product(frame.savings, frame.ways, frame.hosts):
        one = with_changes(frame.config, dispatch=dispatch, wire=wire, offload_optimizer=host)
        yield [saving.applied(one, blocks) for blocks in range((longest if saving.blocks else 0) + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_search_finds_what_trying_everything_finds(share, few_choices, monkeypatch):
    """share: of the layouts, how many fit."""
    monkeypatch.setattr(
        searching, "UNEVEN", float("inf")
    )  # other splits of the stages are tried of layouts that fit alone
    base = compose(*FEW)
    every = [each for frame in frames(base, 4) for each in _layouts(frame) if broken_rule(each[0]) is None]
    peaks = [[max(rank.peak_bytes for rank in plan_memory(one)) for one in each] for each in every]
    memory = sorted(map(min, peaks))[round(share * len(peaks))]
    chosen = [
        next(one for one, peak in zip(each, peak_of, strict=True) if peak <= memory)
        for each, peak_of in zip(every, peaks, strict=True)
        if min(peak_of) <= memory
    ]
    fitting = list({tuple(overrides(one, base)): one for one in chosen}.values())
    alone = [one for one in fitting if not one.parallel.offload_optimizer]
    hosted = [one for one in fitting if one.parallel.offload_optimizer]
    needed = [one for one in hosted if with_changes(one, offload_optimizer=False) not in alone]
    assert needed and {one.parallel.dispatch for one in fitting} == {"flat", "deepep"}
    times = sorted(plan_time(one).step_seconds for one in (*alone, *needed))
    found = search(replace(base, hardware=replace(base.hardware, memory_bytes=float(memory))))
    assert [one.step_seconds for one in found.best] == pytest.approx(times[:10])
    assert all(one.room_bytes >= 0 for one in found.best)


@pytest.mark.slow
def test_bounds_are_below_what_they_bound(few_choices):
    base = compose(*FEW)
    rates, memo = load_rates(base, alone=False), {}
    admitted = [frame for frame in frames(base, 4) if broken_rule(frame.config) is None]
    bounded = [one for frame in admitted for one in bounds.FrameBounds(frame, rates, memo).candidates()]
    assert {one.config.parallel.schedule for one in bounded} == set(PipelineSchedule)
    for one in bounded:
        for blocks in {min(1, one.blocks), one.blocks}:
            config = one.saving.applied(one.config, blocks)
            ranks, scene = plan_memory(config), scene_of(config)
            peak = max(rank.peak_bytes for rank in ranks)
            if config.parallel.offload_optimizer:
                layers, has = stage_layers(config), host_memory(config)
                held = [count_weights(config, layers, ids, len(layers) - 1) for ids in config.parallel.placement]
                bound = bounds._host_lacking(config, held) * layout_of(config).ranks_per_node + has
                assert bound <= host_bytes(config, ranks) + 8, one
            for depth, rank in product(WalkDepth, range(config.parallel.pp)):
                assert rank_memory(config, rank, scene, shortest=True, depth=depth).peak_bytes <= peak, (depth, one)
            assert max(one.least_bytes, bounds.traced_bound(one, config, scene)) <= peak, one
            assert one.seconds <= plan_time(config).step_seconds * (1 + 1e-9), one


@pytest.mark.slow
def test_a_search_that_finds_nothing_names_the_nearest_and_the_fewest_devices_that_hold_it(monkeypatch):
    monkeypatch.setattr(candidates, "MICRO_BATCHES", (2,))
    monkeypatch.setattr(candidates, "SAVINGS", (ActivationSaving(["layer"]),))
    recipe = [*FEW, "plan.devices=2", "model.recompute=[layer]", "hardware.memory_bytes=38e6"]
    with pytest.raises(
        UserError, match=r"nearest tested layout, (.*), lacks 4 MiB of a device at the forward of"
    ) as caught:
        search(compose(*recipe))
    nearest = re.search("tested layout, (.*), lacks", caught.value.rule).group(1).split()
    more, devices = re.search(
        r"and (.*) it fits on plan.devices=(\d+), (?:only )?2 MiB (?:to spare|free)", caught.value.cure
    ).groups()
    near, cured = (make_plan(compose(*recipe, *nearest, *cure)) for cure in ([], more.split()))
    assert -4.5 < near.room_bytes / 2**20 < -3.5 and cured.fits and cured.config.parallel.world == int(devices) == 3


@pytest.mark.slow
def test_stages_of_a_rank_are_named_where_they_make_a_step_faster():
    plan = make_plan(compose(*SMALL, "parallel.pp=4", "parallel.schedule=1f1b", "model.layers=16", "mode=plan"))
    found = find_stages(plan)
    every = {each: with_changes(plan.config, schedule="interleaved", virtual_stages=each) for each in (2, 3, 4)}
    times = {each: plan_time(config).step_seconds for each, config in every.items()}
    best = min(times, key=times.get)
    assert found.overrides == overrides(every[best], plan.config)
    assert found.step_seconds == times[best] < plan.step.step_seconds * (1 - WORTH)
    assert found.room_bytes == make_plan(every[best]).room_bytes
    assert find_stages(make_plan(every[best])) is None
    tight = replace(plan, config=replace(plan.config, hardware=replace(plan.config.hardware, memory_bytes=1e9)))
    assert find_stages(tight) is None
    assert find_stages(make_plan(with_changes(plan.config, schedule="zbv"))) is None


def test_virtual_stages_are_tried_where_the_layers_allow_and_leave_with_interleaved():
    base = compose(*FEW, "parallel.pp=2", "parallel.schedule=interleaved", "parallel.virtual_stages=3")
    spreads = [one.config.parallel for one in frames(base, 4)]
    tried = {(spread.pp, spread.virtual_stages) for spread in spreads if spread.schedule == "interleaved"}
    assert tried == {(2, 2), (2, 3), (2, 4), (4, 2)}
    assert "parallel.virtual_stages=4" in overrides(with_changes(base, virtual_stages=4), base)
    assert broken_rule(with_changes(base, schedule=PipelineSchedule.zbv)) is None


def test_the_choice_is_a_group_file_that_loads(found):
    name = "written_by_a_test"
    path = write_parallel(found.best[0].config, name, found.base)
    try:
        loaded = compose(*SMALL, "model.layers=6", *found.command(name))
        assert loaded.parallel == found.best[0].config.parallel
        assert loaded.micro_batch_size == found.best[0].config.micro_batch_size
        assert loaded.model == found.best[0].config.model
    finally:
        path.unlink()


def test_a_file_of_ones_own_is_not_written_over(found):
    with pytest.raises(UserError, match="was not written by a search"):
        write_parallel(found.best[0].config, "single", found.base)


@pytest.mark.slow
def test_a_cluster_that_cannot_hold_the_model_is_an_error():
    config = compose("conf=deepseek_v3", "data.path=none", "hardware=h800", "plan.search=true", "plan.devices=8", "parallel=single",
                     "batch_size=3072", "optim.batch_ramp_start=null", "optim.batch_ramp_steps=0")  # fmt: skip
    with pytest.raises(UserError, match="cannot fit this recipe with any of") as caught:
        search(config)
    assert caught.value.field == "plan.devices" and "GiB of a device at the" in caught.value.rule
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize(("devices", "near"), [(7, "plan.devices=6 or plan.devices=8"), (100_000, "plan.devices=96, ")])
def test_devices_that_no_layout_divides_are_no_matter_of_memory(devices, near):
    config = compose("conf=tiny", "hardware=h800", "plan.search=true", f"plan.devices={devices}")
    with pytest.raises(UserError, match="for any memory size") as caught:
        search(config)
    assert near in caught.value.cure and "GiB" not in caught.value.rule


def test_deep_ep_is_tried_whatever_the_recipe_has():
    base = compose("conf=deepseek_v3_16b", "data.path=none", "hardware=h100", "batch_size=64", "parallel=single")
    tried = {(dispatch, one.config.parallel.ep) for one in frames(base, 8) for dispatch, _ in one.ways}
    assert ("deepep", 8) in tried and ("deepep", 1) not in tried
    on_cpus = list(frames(replace(base, hardware=compose("hardware=cpu").hardware), 8))
    assert "deepep" not in {dispatch for one in on_cpus for dispatch, _ in one.ways}
    assert {host for one in on_cpus for host in one.hosts} == {False}, "there the host's memory is the device's"


def test_a_ramp_is_fitted_to_a_layout_and_shown():
    base = compose("conf=deepseek_v3", "data.path=none", "parallel=single", "optim.batch_ramp_start=3072")
    fitted = fitted_ramp(base, share=256, least=16)
    assert (fitted.optim.batch_ramp_increment, fitted.optim.batch_ramp_start) == (256, 4096)
    assert overrides(fitted, base) == ["optim.batch_ramp_start=4096", "optim.batch_ramp_increment=256"]
    assert fitted_ramp(base, share=2048, least=4) == base, "15360 is no multiple of 2048"


def test_faster_links_and_kernels_make_faster_plans():
    config = compose(*SMALL, "parallel.dp=4", "parallel.ep=4")
    before = plan_time(config)
    rates = dict(config.hardware.rates)
    rates["inside"] = Rate(0.0, 0.0, 2 * rates["inside"].bandwidth)
    quick = plan_time(replace(config, hardware=replace(config.hardware, rates=rates)))
    assert quick.step_seconds < before.step_seconds and quick.exchange_seconds < before.exchange_seconds
    slow = plan_time(replace(config, plan=replace(config.plan, imbalance=2.0)))
    assert slow.step_seconds > before.step_seconds, "the busiest rank sets the pace"


@pytest.mark.slow
def test_a_plan_without_hardware_is_for_h800():
    assert compose("conf=tiny", "mode=plan").hardware == compose("conf=tiny", "mode=plan", "hardware=h800").hardware
    with pytest.raises(UserError, match="a plan needs the devices"):
        make_plan(compose("conf=tiny"))


@pytest.mark.slow
def test_the_largest_recipe_fits_as_it_is_typed():
    plan = make_plan(compose("conf=deepseek_v3", "mode=plan"))
    assert (
        plan.fits
        and plan.room_bytes > 2**30
        and len(plan.ranks) == 16
        and plan.step.step_seconds > 0
        and plan.config.hardware.name == "h800"
    )


OFFLOAD = ["conf=deepseek_v3", "mode=plan", "hardware=h200", "parallel.pp=8", "parallel.dp=8", "parallel.ep=8", "parallel.schedule=1f1b",
           "parallel.offload_optimizer=true"]  # fmt: skip


@pytest.mark.slow
def test_the_host_has_what_the_device_has_not():
    """The paper's model on 64 H200: its state lies in the memory of the nodes, which are filled rank by rank."""
    there, here = (plan_memory(compose(*OFFLOAD, *more)) for more in ([], ["parallel.offload_optimizer=false"]))
    for one, other in zip(there, here, strict=True):
        assert {"master", "moments", "checkpoint"} <= one.host_items.keys() and other.host_items.keys() == {
            "checkpoint"
        }
        assert not {"master", "moments"} & one.items.keys()
        moved = sum(other.items[name] for name in ("master", "moments"))
        assert one.peak_bytes == other.peak_bytes - moved and one.host_bytes > moved


@pytest.mark.slow
def test_an_unknown_or_small_host_is_named():
    with pytest.raises(UserError, match=r"hardware\.host_memory_bytes = 0"):
        make_plan(compose(*OFFLOAD, "hardware.host_memory_bytes=0"))
    with pytest.raises(UserError, match=r"parallel\.offload_optimizer = True"):
        compose("parallel.dp=2", "parallel.zero=3", "parallel.offload_optimizer=true")
    with pytest.raises(UserError, match=r"model\.offload use the host's memory"):
        make_plan(compose(*OFFLOAD[:-1], "model.offload=[layer]", "hardware.host_memory_bytes=0"))
    with pytest.raises(UserError, match=r"model\.offload = \['layer'\]\n  rule: has no tensors to offload"):
        compose("model.offload=[layer]", "model.recompute=[layer]")
    with pytest.raises(UserError, match=r"first 20 blocks of every stage, and no stage has more than"):
        make_plan(compose(*OFFLOAD, "model.offload=[layer]", "model.recompute=[norm,layer:20]"))


@pytest.mark.slow
def test_activations_wait_on_the_host_and_copies_that_take_longer_than_the_computing_set_its_pace():
    """With a link so slow that copies of F and B take longer than their computing, each lasts as long as its bytes on the link."""
    here, there, slow = (
        make_plan(compose(*OFFLOAD, *more))
        for more in ([], ["model.offload=[layer]"], ["model.offload=[layer]", "hardware.rates.host.bandwidth=1e9"])
    )
    first, other = there.ranks[0], here.ranks[0]
    assert "activations" not in other.host_items
    assert first.host_items["activations"] > other.peak_bytes - first.peak_bytes > 0
    assert there.host_bytes == 8 * max(rank.host_bytes for rank in there.ranks)  # the ranks of a stage fill a node
    assert here.step.step_seconds <= there.step.step_seconds < slow.step.step_seconds
    copies = slow.step.length(Action("F", 0, 0))
    assert copies == slow.step.length(Action("B", 0, 0)) > here.step.length(Action("B", 0, 0))


def test_a_step_has_the_intervals_of_published_jobs_by_kind_unless_its_rates_were_measured():
    step = plan_time(compose(*SMALL))
    tuned, ours = step.interval_seconds[TUNED], step.interval_seconds[OURS_UNTIMED]
    assert ours[0] < step.step_seconds < ours[1] and tuned[1] - tuned[0] < ours[1] - ours[0]
    words = interval_words(step)
    assert "with tuned Megatron: " in words and "which no GPU has timed: " in words
    assert f"{100 * INTERVALS[TUNED].held:.0f} of 100 jobs" in words
    measured = plan_time(compose(*SMALL), replace(load_rates(compose(*SMALL), alone=True), intervals={}))
    assert measured.interval_seconds == {} and interval_words(measured) == ""


def test_a_plan_warns_where_the_host_may_bind():
    """Half of the computing time: launch times are an estimate."""
    step = plan_time(compose(*SMALL))
    free, bound = (replace(step, work_seconds={"all": step.host_seconds / share}) for share in (0.4, 0.6))
    assert not free.host_binds and bound.host_binds


def test_a_plan_names_its_rates():
    assert "MXFP8 kernels; FP8 is H800's, scaled" in plan_time(compose("conf=tiny", "hardware=b200")).rates


def test_an_average_of_the_weights_lies_on_the_host_twice_in_fp32():
    plain, averaged = (make_plan(compose(*SMALL, *more)) for more in ([], ["optim.ema_decay=0.999"]))
    assert averaged.fullest.host_items["average"] == 2 * averaged.fullest.items["master"]
    assert averaged.fullest.items == plain.fullest.items
    assert not make_plan(compose(*SMALL, "optim.ema_decay=0.999", "hardware.host_memory_bytes=1e6")).fits
    assert make_plan(compose(*SMALL, "optim.ema_decay=0.999", "hardware.host_memory_bytes=0")).fits, "nobody knows"


def test_stages_that_are_alike_are_one_row_of_the_page():
    stages = [
        {"stage": number, "pp_rank": number, "first_layer": 2 * number, "layers": 2, "forward_seconds": 1.0 + (number == 3), "backward_seconds": 2.0}
        for number in range(4)
    ]  # fmt: skip
    shown = plan_page._stages({"stages": stages})
    assert shown.count("<tr>") == 3 and "0 to 2" in shown and "0 to 5, 2 each" in shown and "6 to 7" in shown


@pytest.mark.slow
def test_a_checkpoint_waits_on_the_host_until_it_is_written_and_copies_stay_there():
    whole = make_plan(compose(*OFFLOAD))
    rank = whole.fullest
    assert rank.host_items["checkpoint"] == rank.host_items["master"] + rank.host_items["moments"]
    assert not whole.fits and "checkpoint.staging_bytes less than" in verdict(whole)
    pieces = make_plan(compose(*OFFLOAD, "checkpoint.staging_bytes=4e9", "hardware.storage_bandwidth=1e10"))
    assert pieces.fits and pieces.fullest.host_items["checkpoint"] == 4e9
    assert pieces.failures.stall_seconds > 50 * whole.failures.stall_seconds, "the disk, not the link"
    small = (*SMALL, "parallel.dp=2", "cluster=ray", "checkpoint.every_memory=2")
    kept = make_plan(compose(*small)).fullest.host_items
    assert kept["copies"] == HELD_COPIES * kept["checkpoint"]


@pytest.mark.slow
def test_stage_3_starts_with_its_shards_and_beside_an_adapter_with_all_weights_of_a_rank():
    words = ("conf=deepseek_v3_16b", "data.path=none", "hardware=h200", "batch_size=64", "parallel.dp=64", "parallel.zero=3", "model.experts=64",
             "model.hidden=4096")  # fmt: skip
    counted = count_parameters(compose(*words).model)
    rank = make_plan(compose(*words)).fullest
    assert not rank.peak_event.startswith("start") and rank.peak_bytes < 2 * (counted.total + counted.mtp)
    rank = make_plan(compose(*words, "adapter=lora", "optim=tune", "init_from=none", "model.mtp_depth=0")).fullest
    assert rank.items == {"weights": rank.peak_bytes} and rank.peak_event.startswith("start")
    assert rank.peak_bytes >= 2 * counted.total


def test_a_model_whose_queries_grow_is_planned():
    """Its code asks torch for a dtype, which is no tensor, while it is traced."""
    assert make_plan(
        compose("conf=tiny", "hardware=h100", "precision=bf16", "model.yarn.always=true", "model.yarn.query_growth=0.1")
    ).fits
