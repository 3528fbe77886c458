"""Clocks that jump and disks that fill up are named once, and the rank that failed first is still found."""

import time
from dataclasses import replace

import pytest

from cluster.cause import Failure, RankReport, name_cause
from cluster.clocks import SteadyClock
from cluster.driver.vitals import Vitals
from cluster.node.agent import Agent, Answer, Order
from cluster.node.preflight import SCRATCH_LIMIT, Preflight, Question, gather_facts
from cluster.topology import Node

NODES = [Node(f"id{i}", f"n{i}", "127.0.0.1", 1) for i in range(4)]


@pytest.fixture
def vitals():
    found = Vitals()
    for node in NODES:
        found.know(node, 0.0)
    return found


def told(vitals: Vitals, clock_set: float = 0.0, free: float = 1e12, node: int = 1) -> list[str]:
    answer = Answer(1, [], clock_set=clock_set, free_bytes=free)
    return [text for _, text in vitals.take(NODES[node], answer)]


@pytest.mark.parametrize(("jump", "words"), [(3600.0, "3600.0 s forward"), (-30.0, "30.0 s back")])
def test_a_jump_of_a_clock_is_named_once(vitals, jump, words):
    assert told(vitals) == told(vitals, clock_set=1.0) == []
    said = [text for _ in range(4) for text in told(vitals, clock_set=jump)]
    assert len(said) == 1 and said[0].startswith("n1: its clock jumped") and words in said[0]
    assert told(vitals, node=2) == []


def test_an_agent_gives_the_times_of_failures_as_before_its_clock_was_set(tmp_path, monkeypatch):
    """As a rank fails after its node's clock, or its own alone, was set an hour ahead."""
    agent, real = Agent(lease=60.0), time.time
    try:
        program = "import os, pathlib, time; from cluster.cause import Failure; from cluster.clocks import uptime; "
        program += "Failure(0, uptime(), 'crash', 'broke', 1).write(pathlib.Path(os.environ['SLUICE_LOGS']))"
        began = real()
        monkeypatch.setattr(time, "time", lambda: real() + 3600)
        agent.start(Order(1, [(0, 0)], ["-c", program], {"WORLD_SIZE": "1"}, "127.0.0.1"))
        while (answer := agent.ask({}, 1, patience=5.0)).ranks[0].failure is None and real() < began + 60:
            pass
        assert 3599 < answer.clock_set < 3601
        assert began - 0.1 < answer.ranks[0].failure.time < real() + 0.1
        agent.facts(Question(str(tmp_path), "", "id0", 1, False))
        assert abs(agent.ask({}, 1).clock_set) < 1, "a node that is checked again starts anew"
    finally:
        agent.close()


@pytest.mark.parametrize("ahead", [0.0, 500.0, -500.0])
def test_the_first_failure_is_found_beside_a_clock_that_was_off_when_its_node_was_checked(vitals, tmp_path, ahead):
    (tmp_path / "config.yaml").write_text("steps: 1")
    preflight, now = Preflight(tmp_path, False, SteadyClock()), time.time()
    facts = gather_facts(preflight.question(NODES[1]))
    found = preflight.ahead(NODES[1], replace(facts, clock=facts.clock + ahead))
    assert found == (0.0 if ahead == 0 else pytest.approx(ahead, abs=5.0))
    vitals.know(NODES[1], found)
    reports = []
    for rank, (seconds, off) in enumerate([(0.0, 0.0), (-20.0, ahead), (-10.0, 0.0)]):
        failure = Failure(rank, now + seconds + off, "crash", f"rank {rank} broke", 1)
        answer = Answer(1, [RankReport(rank, 1, failure)])
        vitals.take(NODES[rank], answer)
        reports += answer.ranks
    assert name_cause(reports, {}).ranks == (1,)


def test_a_full_disk_is_named_once_until_it_has_room(vitals):
    assert told(vitals) == []
    (said,) = told(vitals, free=5 << 20)
    assert "n1: 5 MiB free for temporary files" in said
    assert told(vitals, free=0) == told(vitals, free=SCRATCH_LIMIT) == []
    assert len(told(vitals, free=0)) == 1
