"""Simulated months: the parts add up, the losses equal those of a calculation by hand, and the real supervisor
decides."""

import json
import math

import pytest

from bench.outages import DAY, RATE_PER_DEVICE, Outage, _trace, by_chance, traced
from bench.simulate import Scenario, main, play_scenario
from bench.simulated_run import CopySet, Pace, SimulatedRun
from cluster.driver.shapes import Shapes
from cluster.driver.time_split import TimePart, split_time
from cluster.run_files import Age
from cluster.show import nodes_of
from conf.errors import EXIT_USER
from conf.load import compose
from train.plan.failures import SaveCosts

SMALL = ["conf=tiny", "cluster=ray", "parallel.dp=8", "batch_size=24", "micro_batch_size=1", "cluster.ranks_per_node=2"]
PACE = Pace(step=10.0, start=30.0, stall=0.0, write=5.0, send=1.0)


def play(outages, *words, nodes=5, seconds=20_000.0):
    config = compose(*SMALL, "checkpoint.every=100", *words)
    run = SimulatedRun(config, Shapes(config), nodes_of(f"{nodes}x2"), outages, seconds, PACE)
    events = run.play()
    return events, split_time(events, now=None if run.ended else run.now), run


def test_a_lost_node_costs_its_detection_a_start_and_the_steps_since_the_copy():
    events, split, _ = play([Outage(1, 10_003.0, 12_000.0)], "checkpoint.every_memory=20")
    (failure,) = [one for one in events if one["kind"] == "failure"]
    assert failure["cause"] == "node" and failure["nodes"] == ["n1"]
    assert failure["time"] - 10_003 == pytest.approx(5 + 1, abs=0.6), "a heartbeat, and an answer to the probe"
    attempts = [one for one in events if one["kind"] == "attempt"]
    assert ([one["dp"] for one in attempts] == [8, 8] and attempts[1]["nodes"] == ["n0", "n2", "n3", "n4"]) or len(
        attempts
    ) == 2
    (recovered,) = [one for one in events if one["kind"] == "recovered"]
    assert 0 < recovered["steps_again"] <= 20
    assert split.seconds_in[TimePart.again] == pytest.approx(10 * (recovered["steps_again"] - 1), abs=11)
    assert split.seconds == pytest.approx(20_000) and split.seconds_in[TimePart.restart] == pytest.approx(31, abs=1)


def test_without_copies_steps_since_the_checkpoint_are_done_again():
    _, split, _ = play([Outage(1, 9_990.0, 12_000.0)])
    assert split.seconds_in[TimePart.again] == pytest.approx(9_990 - 30 - 9_000, abs=60)


def test_without_a_spare_it_shrinks_and_grows_again_from_a_copy():
    events, split, _ = play([Outage(1, 5_000.0, 9_000.0)], "checkpoint.every_memory=20", nodes=4)
    assert [one["dp"] for one in events if one["kind"] == "attempt"] == [8, 6, 8]
    smaller = split.seconds_in[TimePart.training] - split.effective_seconds
    assert smaller == pytest.approx(4_000 / 4, rel=0.1)


def test_two_neighbours_at_once_take_the_copies_with_them():
    ring = CopySet(Age(1, 20), ("a", "b", "c", "d"))
    assert ring.whole and CopySet(ring.age, ring.ring, frozenset("ac")).whole
    assert not CopySet(ring.age, ring.ring, frozenset("ad")).whole
    both = [Outage(1, 9_990.0, 12_000.0), Outage(2, 9_990.0, 12_000.0)]
    _, split, _ = play(both, "checkpoint.every_memory=20", nodes=6)
    assert split.seconds_in[TimePart.again] > 900, "from the disk"


def test_the_trace_is_that_of_its_page():
    assert len(_trace()) == 582 and len({one.node for one in _trace()}) == 231
    assert sum(one.end - one.begin for one in _trace()) / 582 / DAY == pytest.approx(5.55, abs=0.01)
    assert len(traced(400, 400, 3)) == 582 and traced(100, 50, 1) == traced(100, 50, 1)
    found = by_chance(256, 100, 1, 8 * RATE_PER_DEVICE)
    assert len(found) == pytest.approx(100 * 256 * 8 * 24 * RATE_PER_DEVICE, rel=0.2)


def test_faults_by_chance_cost_what_the_plan_says_of_them():
    """Against Daly's formula with the plan's terms: a difference of a tenth of what is lost."""
    config = compose(*SMALL, "checkpoint.every=50")
    per_node, seconds, lost = 1 / 30_000 * 3600 / 5, 4e6, []
    for seed in (1, 2, 3):
        outages = [Outage(one.node, one.begin, one.begin + 60) for one in by_chance(5, seconds / DAY, seed, per_node)]
        run = SimulatedRun(config, Shapes(config), nodes_of("5x2"), outages, seconds, PACE)
        events = run.play()
        split = split_time(events, now=None if run.ended else run.now)
        between = seconds / sum(one["kind"] == "failure" for one in events)
        plan = SaveCosts(between, restart=30 + 5 + 2, stall=0.0, write=5.0).effective(500.0)
        lost.append((1 - split.effective_seconds / run.now) / (1 - plan))
    assert math.fsum(lost) / 3 == pytest.approx(1.0, abs=0.1)


def test_the_command_has_json_whose_shares_add_up_and_refuses_what_the_trace_lacks(capsys):
    words = ["--spares", "1", "--days", "30", "--json", *SMALL]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["shares"].values()) == pytest.approx(1) and 0.9 < found["effective"] <= 1 and found["devices"] == 8
    assert main(["--spares", "500", *SMALL]) == EXIT_USER
    assert "the trace has 400 servers" in capsys.readouterr().err


def test_memory_decides_how_small_an_expert_group_may_become():
    words = [*SMALL, "parallel.ep=8", "checkpoint.every_memory=20"]
    stays, smaller = (play_scenario(Scenario(words, "trace", 0, 349, least), PACE).effective for least in (None, 1))
    assert stays < smaller
