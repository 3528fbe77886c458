"""The end of a step by hand, at rates of round numbers: collectives, stage 3's gathers, the host's part, matrices on their owners."""

from dataclasses import replace

import pytest

from conf.load import compose
from conf.schema import Config, Rate
from train.plan.job import layout_of
from train.plan.time.rates import Rates
from train.plan.time.stages import Stages
from train.plan.time.step_time import estimate_step, plan_time, simulate_step
from train.plan.time.update import Orthogonal, WeightCounts, count_weights, stage3_seconds, update_time

SMALL = ("conf=tiny", "precision=bf16", "hardware=h800", "micro_batch_size=2", "batch_size=32", "parallel.dp=2")
HELD = WeightCounts(dense=8e6, experts=2e6)
FREE = {name: Rate() for name in ("memory", "optimizer", "host_memory", "host", "inside", "across")}


def _rates(**given: Rate) -> Rates:
    """What is not given costs nothing."""
    return Rates(FREE | given, "round numbers")


def _update(config: Config, held: WeightCounts = HELD, **given: Rate) -> tuple[float, float, float]:
    found = update_time(config, layout_of(config), _rates(**given), held)
    return found.reduce, found.optimizer, found.gather


def test_gradients_are_summed_and_kept_and_weights_come_back_rounded():
    """Over two ranks half of everything travels, in an all-reduce there and back."""
    config = compose(*SMALL)
    half = (8e6 + 2e6) / 2
    assert _update(config, inside=Rate(bandwidth=1e9)) == pytest.approx((2 * 4 * half / 1e9, 0, 2 * half / 1e9))
    apart = compose(*SMALL, "parallel.ep=2")  # nobody else has these experts
    assert _update(apart, inside=Rate(bandwidth=1e9)) == pytest.approx((2 * 4 * 4e6 / 1e9, 0, 2 * 4e6 / 1e9))
    moved, read = 20 * (8e6 + 2e6) / 1e9, 4 * half / 1e9
    assert _update(config, memory=Rate(bandwidth=1e9), optimizer=Rate()) == pytest.approx((moved, read, 0))
    stage3 = replace(config, parallel=replace(config.parallel, zero=3))
    assert _update(stage3, memory=Rate(bandwidth=1e9), optimizer=Rate()) == pytest.approx((0, read * 3, 0))


def test_a_host_that_updates_gets_gradients_in_fp32_and_gives_weights_in_bf16():
    """It reads the gradients once more for their norm, beside what the update moves: 16 bytes, both moments twice, the weight."""
    config, shard = compose(*SMALL, "parallel.offload_optimizer=true"), 5e6
    assert _update(config, host=Rate(bandwidth=1e9)) == pytest.approx((4 * shard / 1e9, 2 * shard / 1e9, 0))
    moments = 2 * 2 * config.precision.moment_bytes
    expected = (16 + moments + 2 + 4) * shard / 1e9
    assert _update(config, host_memory=Rate(bandwidth=1e9)) == pytest.approx((0, expected, 0))


def test_stage_3_gathers_in_both_passes_and_reduces_in_one():
    config = compose(*SMALL, "parallel.zero=3")
    held = replace(HELD, frozen_dense=400, frozen_experts=600)  # which are gathered as they lie, and learn nothing
    forward, backward = stage3_seconds(config, layout_of(config), _rates(inside=Rate(bandwidth=1e9)), held)
    gather, reduce = (2 * 10e6 + 1000) / 2 / 1e9, 4 * 10e6 / 2 / 1e9
    assert (forward, backward) == pytest.approx((gather, gather + reduce))


def test_stage_3_waits_for_what_the_pass_does_not_hide():
    """Its gathers take some of the device's cores meanwhile; a link that is slow enough is all there is."""
    config = compose(*SMALL, "parallel.zero=3")
    hardware = replace(config.hardware, communication_share=0.25)
    config = replace(config, hardware=hardware)
    stages = Stages(config, layout_of(config), Rates(hardware.rates, "its own"))
    held = count_weights(config, stages.layers, [0], 0)
    for bandwidth in (1e3, 1e15):
        rates = Rates(dict(hardware.rates) | {"inside": Rate(bandwidth=bandwidth)}, "one link")
        stages = Stages(config, layout_of(config), rates)
        step, bare = simulate_step(stages), Stages(config, layout_of(config), rates).elapsed
        moved = stage3_seconds(config, layout_of(config), rates, held)
        for action in {action.kind: action for action in plan_time(config, rates).actions[0]}.values():
            passed, way = bare(action).seconds, moved[action.kind == "B"]
            assert step.length(action) == pytest.approx(max(way, passed + 0.25 * way))


@pytest.mark.parametrize(("depth", "tables"), [(1, 2), (0, 1)])
def test_the_last_stage_has_head_and_with_mtp_the_table_of_embeddings(depth, tables):
    words = *SMALL, "parallel.pp=2", f"model.mtp_depth={depth}"
    configs = [compose(*words, f"model.vocab_size={size}") for size in (8192, 4096)]
    more, less = (count_weights(config, [range(2), range(2, 4)], [1], 1).dense for config in configs)
    assert more - less == tables * 4096 * configs[0].model.hidden


def test_owners_are_as_busy_as_the_dearest_matrices_make_one():
    """Five matrices of one size over two ranks: one has three of them. A rank sends what it holds of others' and gets it back."""
    found = Orthogonal(elements=500.0, flops=50.0, largest=10.0, dearest=5)
    assert found.busiest(2) == 30.0 and found.busiest(1) == pytest.approx(1.05 * 50)
    assert found.moved(2) == 2 * 4 * 500 / 4 and found.moved(1) == 0
    config = compose(*SMALL, "optim=muon", "parallel.ep=2")  # experts stay where they are
    held = replace(HELD, orthogonal=(found, found))
    assert _update(config, held, fprop_bf16=Rate(flops=1.0))[1] == pytest.approx(30 + 1.05 * 50)
    assert _update(config, held, fprop_bf16=Rate(), inside=Rate(bandwidth=1.0))[1] == pytest.approx(1000)


def test_a_reduction_beside_passes_hides_less_where_it_takes_their_cores():
    config = compose(*SMALL, "parallel.pp=2", "parallel.schedule=dualpipev")
    hidden = {}
    for share in (0.0, 0.25):
        one = replace(config, hardware=replace(config.hardware, communication_share=share))
        stages = Stages(one, layout_of(one), Rates(one.hardware.rates, "its own"))
        update = simulate_step(stages).update
        whole = max(
            update_time(one, layout_of(one), stages.rates, count_weights(one, stages.layers, ids, 3)).reduce
            for ids in stages.placement
        )
        assert update.reduce + update.hidden <= whole * (1 + 1e-9)
        hidden[share] = update.hidden
    assert hidden[0.25] == pytest.approx(0.75 * hidden[0.0]) and hidden[0.0] > 0


def test_a_long_step_is_as_long_as_the_simulated_one():
    """Further micro-batches each take as long as those before them, so that a search does not simulate them."""
    config = compose(*SMALL, "parallel.pp=2", "parallel.schedule=1f1b", "batch_size=256", "micro_batch_size=2")
    stages = Stages(config, layout_of(config), Rates(config.hardware.rates, "its own"))
    assert stages.micro_batches == 64
    assert estimate_step(stages)[0] == pytest.approx(simulate_step(stages).seconds, rel=1e-6)
