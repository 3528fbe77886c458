"""Sides of several ranks that take turns, and the table of layouts."""

import sys
import time
from functools import partial

import psutil
import pytest

from bench import layouts
from bench.layouts import LayoutCase, figures
from bench.sides import Side, SideResult, cpu_ratio, fastest, take_turns

STEPS = """
import os, time
from bench.sides import serve
rank = int(os.environ["RANK"])
def step():
    time.sleep(0.02 if rank == 0 else 0.05)
serve(lambda: step)
"""
FAILS = """
import os, time
from bench.sides import serve
def build():
    if os.environ["RANK"] == "1":
        raise ValueError("no such layout\\nin two lines")
    time.sleep(60)
serve(build)
"""


def result(*rates: float, cpu: float) -> SideResult:
    return SideResult(list(rates), first_step=1.0, peak_memory=10, cpu_seconds=[cpu] * len(rates), choice="fp32")


def test_rates_are_those_of_the_slowest_rank():
    side = Side([sys.executable, "-c", STEPS], tokens=100, ranks=2)
    try:
        rate, cpu = side.turn(0.1)
        assert 0 < rate <= 100 / 0.05
        assert 0 <= cpu < 0.05  # it sleeps
    finally:
        side.kill()


def test_a_side_that_cannot_run_says_what_its_first_failing_rank_said():
    began = time.monotonic()
    starts = {
        "stuck": lambda: Side([sys.executable, "-c", FAILS], tokens=1, ranks=2),
        "crashes": lambda: Side([sys.executable, "-c", "import sys; sys.exit('no answer')"], tokens=1),
    }
    found = take_turns(starts, rounds=1, seconds=0.1)
    assert found == {"stuck": "ValueError: no such layout in two lines", "crashes": "no answer"}
    assert time.monotonic() - began < 60  # nobody waited for the rank that sleeps


def test_a_side_works_in_the_way_that_is_fastest_and_waits_for_no_other(monkeypatch):
    monkeypatch.setattr("bench.sides.TRIAL", 0.1)
    limits = []

    def start(words: str, most: float, limit: float) -> Side:
        limits.append(limit)
        return Side([sys.executable, "-c", words], tokens=100, limit=min(limit, most))

    slow, hangs = STEPS.replace("0.02", "0.1"), "import time; time.sleep(60)"
    ways = {"fp32": partial(start, slow, 60), "bf16": partial(start, STEPS, 60), "fp8": partial(start, hangs, 1)}
    side = fastest(ways)
    side.kill()
    assert side.choice == "bf16" and side.tried["fp32"] <= 100 / 0.1 < side.tried["bf16"] <= 100 / 0.02
    assert side.tried["fp8"] == "ranks [0] did not answer within 1 s"
    assert 10 < limits[2] <= limits[1] < limits[0]  # by the first steps of those before
    with pytest.raises(RuntimeError, match="did not answer"):
        fastest({"fp8": ways["fp8"]})


def test_a_way_that_fails_in_a_trial_leaves_the_others(monkeypatch):
    monkeypatch.setattr("bench.sides.TRIAL", 0.1)
    fails = STEPS.replace("def step():", "steps = iter(range(5))\ndef step():\n    next(steps)")
    ways = {
        name: partial(Side, [sys.executable, "-c", words], 100) for name, words in (("bf16", fails), ("fp32", STEPS))
    }
    side = fastest({name: lambda limit, way=way: way(limit=limit) for name, way in ways.items()})
    side.kill()
    assert side.choice == "fp32" and str(side.tried["bf16"]).startswith("StopIteration")


def test_ratios_are_of_the_same_round_and_a_peer_may_be_missing(capsys):
    results = {
        "ours": result(200, 100, 400, cpu=1.0),
        "torchtitan": result(100, 100, 100, cpu=1.5),
        "autoep1": "ValueError: no",
    }
    found = figures(results)
    assert found["ours"]["median"] == 200 and "ours_to_peer" not in found["ours"]
    assert found["torchtitan"]["ours_to_peer"] == 2 and found["torchtitan"]["range"] == (1, 4)
    assert found["torchtitan"]["cpu_of_peer_to_ours"] == cpu_ratio(results["ours"], results["torchtitan"]) == 1.5
    layouts.show("ep2", LayoutCase("debug", dp=2, ep=2), found)
    table = capsys.readouterr().out.splitlines()
    assert "2 ranks, 1024 tokens" in table[1]
    assert " ".join(table[4].split()) == "torchtitan fp32 100 100 to 100 2.00 1.00 to 4.00 1.50 1.50 0.00 1.0"
    assert table[5].split(maxsplit=1) == ["autoep1", "cannot run: ValueError: no"]
    without = figures(results | {"ours": "RuntimeError: no"})
    assert "ours_to_peer" not in without["torchtitan"] and without["torchtitan"]["median"] == 100


@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_cases_are_whole_steps_of_every_layout(layout):
    case = LayoutCase("debug", **layouts.LAYOUTS[layout])
    config = case.config()
    assert config.batch_size == case.size[0] * config.parallel.dp == case.tokens // config.seq_len
    assert config.batch_size == config.micro_batch_size * case.micro_batches * config.parallel.dp
    assert (config.parallel.pp, config.parallel.dp, config.parallel.ep) == (case.pp, case.dp, case.ep)
    assert layouts.sides_of(case)[0] == "ours" and set(layouts.sides_of(case)) <= layouts.BUILDERS.keys()


@pytest.mark.slow
def test_ours_trains_over_two_ranks_and_takes_no_time_while_others_work():
    side = layouts.start("ours", LayoutCase("tiny", dp=2, ep=2, length=8))
    try:
        rate, cpu = side.turn(0.1)
        assert rate > 0 and cpu > 0
        ranks = [psutil.Process(process.pid) for process in side.processes]
        before = [sum(process.cpu_times()[:2]) for process in ranks]
        time.sleep(0.5)
        spent = [sum(process.cpu_times()[:2]) - one for process, one in zip(ranks, before, strict=True)]
        assert max(spent) < 0.25  # a rank that waits awake would take all of it
        assert side.first_step > 0 and side.peak_memory() > 0
    finally:
        side.kill()
