"""Clocks that jump and disks that fill are named once, and do not blur which rank failed first."""

import time

import pytest

from cluster.cause import Failure, RankReport, name_cause
from cluster.driver.vitals import Vitals
from cluster.node.agent import Answer
from cluster.node.preflight import SCRATCH_LIMIT
from cluster.steady_clock import SteadyClock


def told(vitals: Vitals, ahead: float = 0.0, free: float = 1e12, name: str = "n1") -> list[str]:
    answer = Answer(1, [], clock=time.time() + ahead, free_bytes=free)
    return [text for _, text in vitals.take(name, answer)]


@pytest.mark.parametrize(("jump", "words"), [(3600.0, "3600.0 s forward"), (-30.0, "30.0 s back")])
def test_a_jump_of_a_clock_is_named_once(jump, words):
    vitals = Vitals(SteadyClock())
    assert told(vitals) == told(vitals, ahead=1.0) == []
    said = [text for _ in range(4) for text in told(vitals, ahead=jump)]
    assert len(said) == 1 and said[0].startswith("n1: its clock jumped") and words in said[0]
    assert told(vitals, name="n2") == []


def test_the_drivers_own_clock_that_is_set_changes_no_time_that_is_compared(monkeypatch):
    clock, real = SteadyClock(), time.time
    vitals = Vitals(clock)
    assert told(vitals) == []
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    assert abs(clock.now() - real()) < 1
    assert told(vitals, ahead=-3600) == [], "of a node whose clock is right"


def test_an_answer_that_arrived_late_is_no_jump():
    vitals = Vitals(SteadyClock())
    assert told(vitals) == told(vitals, ahead=-20.0) == told(vitals) == []


def test_the_first_failure_is_found_beside_a_clock_that_is_off():
    vitals, now = Vitals(SteadyClock()), time.time()
    reports = []
    for rank, (seconds, ahead) in enumerate([(0.0, 0.0), (-2.0, 500.0), (-1.0, -500.0)]):
        failure = Failure(rank, now + seconds + ahead, "crash", f"rank {rank} broke", 1)
        answer = Answer(1, [RankReport(rank, 1, failure)], clock=time.time() + ahead)
        vitals.take(f"n{rank}", answer)
        reports += answer.ranks
    assert name_cause(reports, {}).ranks == (1,)


def test_a_full_disk_is_named_once_until_it_has_room():
    vitals = Vitals(SteadyClock())
    assert told(vitals) == []
    (said,) = told(vitals, free=5 << 20)
    assert "n1: 5 MiB free for temporary files" in said
    assert told(vitals, free=0) == told(vitals, free=SCRATCH_LIMIT) == []
    assert len(told(vitals, free=0)) == 1
