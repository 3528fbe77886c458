"""How a run's wall time is divided: every second is in one part, over failures, hangs, growth, waits and launches."""

import random

import pytest

from cluster.driver.time_split import TimePart, split_time

LAUNCH = {"time": 0, "kind": "launch", "world": 16}
FULL = {"kind": "attempt", "pp": 2, "dp": 8, "nodes": ["a", "b"], "spares": ["c"]}
HALF = {"kind": "attempt", "pp": 2, "dp": 4, "nodes": ["a"], "spares": []}
FAILED_AND_BACK = [
    LAUNCH,
    FULL | {"time": 4},
    {"time": 20, "kind": "first_step"},
    {"time": 110, "kind": "failure", "seconds": 10},
    {"time": 113, "kind": "waiting"},
    HALF | {"time": 133},
    {"time": 150, "kind": "recovered", "seconds": 40, "steps_again": 5},
    {"time": 150, "kind": "first_step"},
    {"time": 180, "kind": "caught_up", "step": 6},
    {"time": 280, "kind": "grow"},
    FULL | {"time": 285},
    {"time": 295, "kind": "first_step"},
    {"time": 400, "kind": "finish"},
]


def test_every_part_has_its_seconds_and_they_add_up():
    found = split_time(FAILED_AND_BACK)
    assert found.seconds_in == {
        TimePart.waiting: 4 + 20,
        TimePart.start: 16,
        TimePart.training: 80 + 100 + 105,
        TimePart.detection: 10,
        TimePart.restart: 3 + 17 + 5 + 10,
        TimePart.again: 30,
    }
    assert found.seconds == 400 and found.attempts == 3 and (found.nodes, found.spares) == (2, 1)


def test_half_of_the_ranks_count_half_and_spares_are_held_too():
    found = split_time(FAILED_AND_BACK)
    assert found.effective_seconds == 80 + 100 / 2 + 105
    assert found.effective_share == pytest.approx(235 / 400)
    held = 4 + 129 * 1.5 + (280 - 133) + 115 * 1.5 + 5
    assert found.held_share == pytest.approx(235 / held)


def test_nodes_of_a_smaller_layout_and_its_spares_are_those_that_are_held():
    """One of two nodes works, and three wait: twice what the whole run needs. More ranks than it wants count as all of them."""
    events = [LAUNCH, HALF | {"time": 0, "spares": ["b", "c", "d"]}, {"time": 0, "kind": "first_step"}]
    found = split_time(events, now=100)
    assert (found.effective_seconds, found.held_seconds) == (50, 200)
    small = split_time([LAUNCH | {"world": 8}, FULL | {"time": 0, "spares": []}, events[-1]], now=100)
    assert (small.effective_seconds, small.held_seconds) == (100, 100)


def test_a_hang_that_was_told_without_its_seconds_takes_them_from_the_training():
    """As earlier versions did: the first step after it says since when."""
    events = [
        *FAILED_AND_BACK[:3],
        {"time": 110, "kind": "failure"},
        FULL | {"time": 115},
        {"time": 120, "kind": "recovered", "seconds": 40},
    ]
    found = split_time(events, now=130)
    assert found.seconds_in[TimePart.detection] == 30 and found.seconds_in[TimePart.training] == 90 - 30 + 10
    assert found.effective_seconds == found.seconds_in[TimePart.training]


def test_a_failure_before_the_run_is_where_it_was_leaves_all_of_it_done_again():
    events = [*FAILED_AND_BACK[:8], {"time": 170, "kind": "failure", "seconds": 2}, HALF | {"time": 171}]
    found = split_time(events, now=180)
    assert found.seconds_in[TimePart.again] == 18 and found.seconds_in[TimePart.detection] == 12
    assert found.seconds == 180


def test_a_node_that_goes_and_holds_no_ranks_stops_nothing():
    events = [*FAILED_AND_BACK[:3], {"time": 30, "kind": "drain", "stops": False}, HALF | {"time": 40}]
    assert split_time(events).seconds_in[TimePart.training] == 20
    events[3]["stops"] = True
    assert split_time(events).seconds_in[TimePart.training] == 10


def test_any_order_of_events_adds_up_to_the_time_in_which_a_driver_ran():
    draw = random.Random(5)
    for _ in range(300):
        now, events, ran = 0.0, [LAUNCH], 0.0
        for _ in range(draw.randint(0, 30)):
            kind = draw.choice(
                ["launch", "attempt", "first_step", "recovered", "caught_up", "failure", "waiting", "grow", "note"]
            )
            later = now + draw.uniform(0, 50)
            ran += later - now if kind != "launch" else 0.0
            now = later
            fields = {"seconds": draw.uniform(0, 80), "steps_again": draw.randint(0, 3), "world": 16}
            events.append((FULL if kind == "attempt" else {}) | fields | {"time": now, "kind": kind})
        found = split_time(events)
        assert found.seconds == pytest.approx(ran)
        assert min(found.seconds_in.values()) >= 0
        assert 0 <= found.effective_share <= 1 and found.held_share <= found.effective_share + 1e-9
        spans = found.spans
        assert sum(end - begin for begin, end in spans) == pytest.approx(found.seconds_in[TimePart.training])
