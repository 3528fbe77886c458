"""Failures: the formula against runs that fail at random, the best checkpoint interval, and the figures of a plan."""

import math
import random
from dataclasses import replace

import pytest

from conf.load import compose
from train.metrics.quantities import amount
from train.model.count import checkpoint_bytes
from train.plan.budget import later_phases, make_plan, with_batch
from train.plan.failures import DETECTION, FLAT, SaveCosts, plan_failures
from train.plan.report import plan_page
from train.plan.report.plan_record import failure_words
from train.plan.time.step_time import plan_time

SMALL = ("conf=tiny", "hardware=h800", "micro_batch_size=2", "batch_size=32", "parallel.dp=2")


def _simulated(saving: SaveCosts, interval: float, wanted: float) -> float:
    """Effective share of a run that saves, writes, fails and starts again, event by event."""
    draw, now, done = random.Random(0), 0.0, 0.0
    fails = draw.expovariate(1 / saving.between_failures)
    while done < wanted:  # a stretch of training, until what it did counts
        ends = now + interval + saving.stall
        if fails > ends + saving.write:
            now, done = ends, done + interval
            continue
        now = fails + saving.restart  # the stretch is lost, also where it only was not written yet
        fails = now + draw.expovariate(1 / saving.between_failures)
    return done / now


@pytest.mark.parametrize(
    ("mean", "interval", "stall", "write", "restart"),
    [
        (86400, 12_850, 0.1, 10, 30),
        (86400, 600, 2, 60, 120),
        (7200, 900, 20, 60, 300),
        (3600, 3600, 5, 30, 60),
        (3600, 1800, 5, 900, 60),
    ],
)
def test_the_formula_is_what_random_failures_leave(mean, interval, stall, write, restart):
    saving = SaveCosts(mean, restart, stall, write)
    assert saving.effective(interval) == pytest.approx(_simulated(saving, interval, 4000 * mean), rel=0.02)


def test_the_best_interval_is_the_best_and_leaves_time_to_write():
    saving = SaveCosts(86400, 60, 10, 30)
    best = saving.best_interval
    assert best == pytest.approx((2 * 10 * 86400) ** 0.5, rel=0.02), "Young's root for a short stall"
    assert all(saving.effective(best) >= saving.effective(best * other) for other in (0.5, 0.9, 1.1, 2))
    assert SaveCosts(86400, 60, 0.01, 3000).best_interval == 3000
    longest = saving.longest_interval(FLAT)
    assert saving.effective(longest) == pytest.approx(saving.effective(best) - FLAT) and longest > 1.5 * best
    assert SaveCosts(10, 60, 10, 30).effective(1e7) == 0.0


STORAGE = "hardware.storage_bandwidth=2e12"
"""As Llama 3's."""


def test_rare_saves_lose_work_and_copies_in_memory_lose_less():
    config = compose("conf=deepseek_v3", "hardware=h800", "mode=plan", STORAGE)
    found = plan_failures(config, 25.7)
    assert found.between_seconds == pytest.approx(24.4 * 3600, rel=0.01)
    assert 0.91 < found.effective_share < 0.93 < found.best_share < 1, "500 steps between saves lose about 7 %"
    often = plan_failures(replace(config, checkpoint=replace(config.checkpoint, every_memory=20)), 25.7)
    assert often.effective_share > 0.985 and often.restart_seconds < found.restart_seconds
    assert plan_failures(replace(config, plan=replace(config.plan, failures=0)), 25.7) is None
    assert plan_failures(compose("conf=tiny", "hardware=cpu"), 1.0) is None


@pytest.mark.parametrize(("devices", "least", "most"), [(16384, 0.90, 0.95), (9600, 0.95, 0.98)])
def test_published_runs_were_effective_for_as_much_of_the_time(devices, least, most):
    """Llama 3: over 90 % on 16,384 GPUs. ByteRobust: 97 % on 9,600."""
    layout = f"parallel.dp={devices // 16}", "parallel.ep=8", f"batch_size={2 * devices}", "optim.batch_ramp_start=null"
    config = compose("conf=deepseek_v3", "hardware=h100", "mode=plan", STORAGE, "optim.batch_ramp_steps=0", *layout)
    assert least < plan_failures(config, 20.0).best_share < most


def test_the_storage_bounds_the_advised_interval_and_is_not_guessed():
    words = "conf=deepseek_v3", "hardware=h800", "mode=plan"
    quick, slow, unknown = (
        plan_failures(compose(*words, f"hardware.storage_bandwidth={rate}"), 25.7) for rate in ("2e12", "1e9", "0")
    )
    assert 10 < quick.best_steps < 60, "not every 96 s"
    assert slow.best_steps * 25.7 >= slow.write_seconds == pytest.approx(checkpoint_bytes(compose(*words)) / 1e9)
    assert unknown.best_steps is unknown.best_share is None and unknown.write_seconds == 0
    assert "loading" not in unknown.restart_parts_seconds
    told = [failure_words(make_plan(compose(*SMALL, "mode=plan", *more))) for more in ([STORAGE], [])]
    assert "the best interval is a checkpoint every" in told[0] and "loading" in told[0]
    assert "not counted" in told[1] and "hardware.storage_bandwidth" in told[1]


def test_cost_and_hours_of_the_page_include_failures():
    plan = make_plan(compose(*SMALL, "mode=plan", "checkpoint.every=100", "plan.failures=0.5", STORAGE))
    cards = {card.label: card.value for card in plan_page._cards(plan)}
    share = plan.failures.effective_share
    assert 0.01 < share < 0.9 and plan.lasting.cost == pytest.approx(plan.budget.cost / share)
    assert cards["Cost"] == f"{amount(plan.lasting.cost)} USD" and cards["Device hours"] == amount(
        plan.lasting.gpu_hours
    )


def test_a_ramp_is_priced_by_its_batches():
    words = "steps=20", "optim.batch_ramp_start=8", "optim.batch_ramp_increment=8", "optim.batch_ramp_steps=12"
    config = compose(*SMALL, *words, "parallel.pp=2", "parallel.schedule=1f1b")
    plan = make_plan(config)
    counts = {8: 4, 16: 4, 24: 4, 32: 8}
    seconds = sum(number * plan_time(with_batch(plan.config, batch)).step_seconds for batch, number in counts.items())
    assert plan.budget.days * 86400 == pytest.approx(seconds, rel=1e-3)
    assert plan.budget.tokens == 256 * sum(batch * number for batch, number in counts.items())
    assert plan.budget.days * 86400 > plan.budget.tokens / plan.step.tokens_per_second


def test_what_a_save_and_a_restart_take_follows_from_bytes_and_rates():
    config = compose("conf=deepseek_v3", "hardware=h800", "mode=plan", "checkpoint.every=500", STORAGE)
    world, node, hardware = 2048, 8, config.hardware
    assert config.parallel.world == world and config.checkpoint.staging_bytes == 0
    whole = checkpoint_bytes(config)
    each = whole / world  # of a rank
    link, moved, start = hardware.rates["host"].bandwidth, whole / 2e12, 11.1 + 0.003 * world / node
    found = plan_failures(config, 25.7)
    assert found.restart_seconds == pytest.approx(DETECTION + start + moved + 2 * 25.7)
    assert found.restart_seconds == pytest.approx(sum(found.restart_parts_seconds.values()))
    assert (found.stall_seconds, found.write_seconds) == pytest.approx((each / link, moved))
    assert found.spare_nodes == _enough(5.5 * 24 * 3600 / found.between_seconds)

    def of(**changes) -> tuple[float, float]:
        found = plan_failures(replace(config, checkpoint=replace(config.checkpoint, **changes)), 25.7)
        return found.stall_seconds, found.write_seconds

    assert of(staging_bytes=each / 2) == pytest.approx((moved, 0.0)), "the training waits for the disk"
    assert of(staging_bytes=each) == pytest.approx((each / link, moved)), "all of it has room"
    sent = each / hardware.rates["across"].bandwidth
    assert of(every_memory=20) == pytest.approx((each / link * (1 + 20 / 500), sent)), "one in 25 goes to disk as well"
    assert of(every_memory=20, every=0) == pytest.approx((each / link, sent))


def _enough(mean: float) -> int:
    """Spare nodes of which no more than 1 % of the time one is lacking, where so many are away in the mean."""
    count, share = 0, math.exp(-mean)
    while share < 0.99:
        count += 1
        share += math.exp(-mean) * mean**count / math.factorial(count)
    return count


def test_a_budget_of_tokens_is_met_to_the_token_and_failures_make_it_longer():
    plan = make_plan(compose(*SMALL, "plan.tokens=1e6", "hardware.price_per_hour=2", "hardware.watts=700"))
    seconds = 1e6 / (32 * 256) * plan.step.step_seconds
    assert plan.budget.tokens == 1e6 and plan.budget.days == pytest.approx(seconds / 86400)
    hours = 2 * seconds / 3600
    assert (plan.budget.gpu_hours, plan.budget.cost) == pytest.approx((hours, 2 * hours))
    assert plan.budget.energy_kwh == pytest.approx(0.7 * hours)
    longer = plan.budget.lasting(0.8)
    for name in ("days", "gpu_hours", "gpu_hours_per_trillion_tokens", "cost", "energy_kwh"):
        assert getattr(longer, name) == pytest.approx(getattr(plan.budget, name) / 0.8)
    assert longer.tokens == plan.budget.tokens


def test_phases_add_up():
    plan = make_plan(compose(*SMALL, "plan.phases=[tiny]"))
    ((name, phase),) = later_phases(plan.config)
    whole = plan.budget + phase.budget
    assert name == "tiny" and phase.config.hardware == plan.config.hardware
    assert whole.gpu_hours == pytest.approx(plan.budget.gpu_hours + phase.budget.gpu_hours)
    assert whole.gpu_hours_per_trillion_tokens == pytest.approx(whole.gpu_hours * 1e12 / whole.tokens)
    assert (whole + replace(phase.budget, cost=None)).cost is None
