"""Simulated schedules: complete for every size that check_schedule admits, and as idle as the formulas say."""

from collections import Counter

import pytest

from conf.errors import UserError
from conf.pipeline_schedules import SCHEDULES, ActionSeconds, check_schedule
from parallel.pipeline.orders import Action, schedule_actions
from parallel.pipeline.simulate import simulate, stages_ahead, what_runs

ORDERS = [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("interleaved", 4), ("zbv", 2), ("dualpipev", 2)]
"""Names, and stages of a rank."""


def _durations(forward: float, inputs: float, weights: float, pair: float):
    seconds = {"F": forward, "B": inputs + weights, "I": inputs, "W": weights, "FB": pair}
    return lambda action: seconds[action.kind]


@pytest.mark.parametrize(
    ("stage", "one_piece", "runs"),
    [(2, False, ("I", "W")), (0, False, ("", "B")), (2, True, ("B", "")), (0, True, ("B", ""))],
)
def test_halves_of_a_backward_run_where_there_are_two(stage, one_piece, runs):
    """The first stage has no gradient to send, and does all in the second half; what cannot be split is done in the first."""
    assert tuple(what_runs(Action(kind, stage, 0), one_piece) for kind in "IW") == runs
    assert [what_runs(Action(kind, stage, 0), one_piece) for kind in "FB"] == ["F", "B"]


def test_a_reduction_goes_ahead_behind_the_last_backward_of_a_stage():
    """Of the stages 0 and 3 of a rank the one that ends first, and with which action."""
    order = [("F", 0), ("F", 3), ("I", 3), ("I", 0), ("W", 3), ("W", 0)]
    actions = [Action(kind, stage, 0) for kind, stage in order]
    assert stages_ahead(actions) == {3: 4} and stages_ahead(actions, one_piece={3}) == {3: 2}
    assert stages_ahead(actions[::2]) == {}


@pytest.mark.parametrize(("name", "each"), ORDERS)
@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
def test_every_admitted_size_runs_to_its_end(name, each, pp):
    """Each micro-batch passes each stage once, forward and backward, and no rank waits for ever."""
    refused = 0
    for micro_batches in range(1, 4 * pp + 2):
        try:
            check_schedule(name, pp, micro_batches, 99, each)
        except UserError:
            refused += 1
            if name != "1f1b":  # its order is written here; torch's class refuses the same sizes when it is made
                with pytest.raises(ValueError, match="microbatches"):
                    schedule_actions(name, pp, micro_batches, each)
            continue
        actions, placement = schedule_actions(name, pp, micro_batches, each), SCHEDULES[name].place_stages(pp, each)
        simulate(actions, _durations(1, 1, 1, 3))
        for rank, line in enumerate(actions):
            done = Counter(part[:3] for action in line for part in (action.halves or (action,)))
            assert set(done.values()) == {1} and {stage for _, stage, _ in done} == set(placement[rank])
            assert len(placement[rank]) == each
            for stage in placement[rank]:
                for m in range(micro_batches):
                    backward = ("B", stage, m) in done
                    assert ("F", stage, m) in done and backward != (("I", stage, m) in done)
                    assert backward != (("W", stage, m) in done)
    assert refused == {"1f1b": pp - 1, "zbv": 0, "dualpipev": 2 * pp - 1}.get(name, refused)


@pytest.mark.parametrize(("name", "each"), ORDERS)
@pytest.mark.parametrize("lengths", [(1, 1, 1, 3), (1, 1, 1, 2.4), (1, 1.1, 0.7, 2.6)])
@pytest.mark.parametrize("pp", [1, 2, 4, 8])
def test_idle_time_is_the_formulas(name, each, lengths, pp):
    result = simulate(schedule_actions(name, pp, 4 * pp, each), _durations(*lengths))
    idle = max(result.makespan - busy for busy in result.busy)
    assert idle == pytest.approx(SCHEDULES[name].count_idle_seconds(pp, ActionSeconds(*lengths)), abs=1e-9)


def test_dualpipev_is_the_papers_table_2():
    """(PP/2 - 1)(F&B + B - 3W) with PP stages on PP / 2 ranks, for F = I as in the paper's figure 5."""
    for pp in (2, 4, 8):
        f, w, pair = 10.0, 7.0, 24.0
        idle = SCHEDULES["dualpipev"].count_idle_seconds(pp, ActionSeconds(f, f, w, pair))
        assert idle == pytest.approx((2 * pp / 2 - 1) * (pair + (f + w) - 3 * w))


def test_transfers_between_ranks_take_time():
    actions = schedule_actions("1f1b", 2, 2)
    free, slow = simulate(actions, _durations(1, 1, 1, 3)), simulate(actions, _durations(1, 1, 1, 3), transfer=0.5)
    assert free.makespan == 9 and slow.makespan > free.makespan
    assert free.bubble == pytest.approx(1 - 12 / 18) and free.starts[1] == [1, 2, 4, 5]


def test_a_rank_that_works_longer_than_the_mean_is_told():
    """The second of two ranks takes three times as long for each action: 18 seconds, beside a mean of 12."""
    actions = schedule_actions("1f1b", 2, 2)
    assert simulate(actions, lambda action: 3.0).imbalance == 1
    uneven = simulate(actions, lambda action: 4.5 if action.stage else 1.5)
    assert uneven.imbalance == pytest.approx(18 / 12) and sorted(uneven.busy) == [6, 18]


def test_a_circle_is_found():
    with pytest.raises(AssertionError, match="waits for another"):
        simulate([[Action("B", 0, 0), Action("F", 0, 0)]], lambda action: 1.0)


def test_a_stage_of_two_ranks_waits_for_the_right_one():
    """Micro-batch 0 goes from rank 0 to rank 1, micro-batch 1 the other way: each pays one transfer."""
    lines = [[Action("F", 0, 0), Action("F", 1, 1)], [Action("F", 0, 1), Action("F", 1, 0)]]
    assert simulate(lines, lambda action: 1.0, transfer=0.5).starts == [[0, 1.5], [0, 1.5]]
