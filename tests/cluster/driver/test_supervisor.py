"""The restart policy against simulated clusters: the cause is named, the run continues, and it always ends."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cause import Failure, RankReport
from cluster.comm_ring import CommRing, pack_ring
from cluster.driver import messages as m
from cluster.run_files import Age, ring_path
from conf.errors import EXIT_CRASH, EXIT_DIVERGED, EXIT_OK, EXIT_STOPPED, EXIT_USER
from tests.cluster.world import STEP, World


def last_failure(world: World) -> m.Note:
    return world.notes("failure")[-1]


def test_an_unbroken_run_is_one_attempt():
    world = World()
    world.run(60)
    assert world.finish.code == EXIT_OK and len(world.starts) == 1


def test_a_killed_rank_is_named_and_the_run_resumes_at_once():
    world = World()
    world.run(4)
    world.kill_rank(1)
    broke = world.now
    world.run(2)
    assert "rank 1 on n1 ended by signal SIGKILL" in last_failure(world).text
    assert last_failure(world).fields["ranks"] == [1]
    assert world.starts[-1].placement.dp == 3 and world.now - broke <= 2
    world.run(60)
    assert world.finish.code == EXIT_OK
    assert world.notes("recovered")[0].fields["steps_again"] < 5


def test_a_lost_node_is_named_not_the_ranks_that_lost_their_peer():
    world = World(nodes=4)
    world.run(4)
    world.power_off(2)
    world.run(10)
    assert last_failure(world).fields["cause"] == "node"
    assert last_failure(world).fields["nodes"] == ["n2"] and "no answer to a probe" in last_failure(world).text
    assert world.starts[-1].placement.dp == 3
    world.run(60)
    assert world.finish.code == EXIT_OK


def test_spares_come_first_and_a_smaller_layout_has_no_more_ranks_than_make_it_faster():
    world = World(nodes=9, words=("parallel.dp=8", "batch_size=8"), steps=100)
    world.run(4)
    world.power_off(0)
    world.run(10)
    assert world.starts[-1].placement.dp == 8 and len(world.starts) == 2 and not world.notes("idle")
    world.power_off(1)
    world.run(10)  # 8 sequences over 7 ranks take as long as over 4
    assert world.starts[-1].placement.dp == 4 and len(world.starts[-1].placement.spares) == 3
    assert world.notes("idle")[0].fields["nodes"] == ["n6", "n7", "n8"]
    assert "pp 1 x dp 8, takes 8 devices in blocks of 1, and 7 are available" in world.notes("idle")[0].text


def test_it_grows_back_at_a_checkpoint_when_a_node_returns():
    world = World(steps=40)
    world.run(4)
    world.machines[1].linked = False
    world.run(12)
    assert world.starts[-1].placement.dp == 2
    world.machines[1].linked = True
    world.run(8)
    assert world.starts[-1].placement.dp == 3
    assert world.notes("grow") and world.notes("node_back")
    world.run(60)
    assert world.finish.code == EXIT_OK and len(world.notes("failure")) == 1


def test_a_run_that_saves_nothing_grows_back_as_soon_as_it_can_and_not_before():
    world = World(steps=100, every=1000, saves=False)
    world.run(4)
    world.machines[1].linked = False
    world.run(12)
    assert world.starts[-1].placement.dp == 2 and not world.notes("grow")
    world.machines[1].linked = True
    world.run(4)
    assert world.starts[-1].placement.dp == 3 and len(world.notes("grow")) == 1


def test_a_hang_is_found_within_its_limit_and_named():
    world = World(hang_after=6.0)
    world.run(5)
    world.hung = {2}
    began = world.now
    while not world.notes("failure"):
        world.run(0.5)
    assert world.now - began <= 6 + 5 + 2 * STEP  # the time of a step, and that of a stack
    assert "rank 2 on n2 does not return a stack" in last_failure(world).text
    assert "ranks 0 on n0, 1 on n1, 2 on n2 are in step" in world.notes("quiet")[0].text
    world.run(60)
    assert world.finish.code == EXIT_OK
    assert world.notes("recovered")[0].fields["seconds"] > 6 + 5  # since the last step, not since it was noticed


def test_a_run_that_is_late_is_named_and_goes_on():
    world = World(steps=100, every=1000, hang_after=300.0)
    world.run(10)
    world.hung = {2}
    began = world.now
    while not world.notes("late"):
        world.run(STEP)
    assert 7 <= world.now - began <= 20
    assert world.notes("late")[0].fields["ranks"] == [2] and "ended in" in world.notes("late")[0].text
    world.run(5)
    world.hung = set()
    world.run(5)
    assert len(world.notes("late")) == len(world.notes("went_on")) == 1 and not world.notes("failure")
    world.hung = {1}
    began = world.now
    while not world.notes("failure"):
        world.run(STEP)
    assert len(world.notes("late")) == 2 and 60 <= world.now - began <= 130
    assert "rank 1 on n1 does not return a stack" in last_failure(world).text


def test_a_rank_that_fails_while_a_late_run_is_looked_at_is_the_cause():
    world = World(steps=100, every=1000, hang_after=300.0)
    world.run(10)
    world.hung = {2}
    while not world.notes("late"):
        world.run(STEP)
    world.kill_rank(1)
    world.run(5)
    assert last_failure(world).fields["cause"] == "killed" and last_failure(world).fields["ranks"] == [1]


@pytest.mark.parametrize("writes", [True, False])
def test_the_last_checkpoint_has_as_long_as_it_writes(writes):
    """That of a request to stop, and longer than cluster.timeout; one that does nothing is ended then."""
    world = World(nodes=1, steps=1000, every=1000, hang_after=300.0, start_timeout=900.0, timeout=100.0)
    world.run(10)
    world.hung, report = {0}, world.machines[0].ranks[0]
    world.tell(m.StopAsked("SIGTERM"))
    report.phase = "checkpoint"
    for _ in range(50):
        report.written += writes
        world.run(10)
    assert bool(world.notes("failure")) != writes


def test_nobody_waits_for_the_stack_of_a_rank_that_is_stopped():
    world = World(hang_after=6.0)
    world.run(5)
    world.hung, world.machines[2].ranks[2].state = {2}, "T"
    began = world.now
    while not world.notes("failure"):
        world.run(0.5)
    assert world.now - began <= 6 + 3 * STEP
    assert "rank 2 on n2 is stopped" in last_failure(world).text


@pytest.mark.parametrize("code", [-9, -6])
def test_what_ranks_communicated_is_waited_for_but_not_for_long(tmp_path, code):
    """A rank that joined with another size makes its peer abort, which is then not to blame."""
    world = World()
    world.run(4)
    world.sends_rings = False
    world.kill_rank(0, code)
    world.run(STEP)
    assert not world.notes("failure")
    rings = {}
    for rank in range(3):
        ring = CommRing(ring_path(tmp_path, rank), rank, 3)
        ring.begin(ring.name_group("0", "dp", range(3)), 1, "all_reduce", "float32", 1 + (rank == 1), 1, -1, 0)
        rings[rank] = pack_ring(ring_path(tmp_path, rank), 3)
    world.tell(m.StacksPrinted(1, {}, rings))
    world.run(STEP)
    assert last_failure(world).fields["ranks"] == [1 if code == -6 else 0]
    (kept,) = [action.incident for action in world.actions if isinstance(action, m.KeepIncident)]
    assert (kept["fault"], kept["ranks"]) == (("resized", [1]) if code == -6 else ("failed", [0]))
    world.run(6)
    world.kill_rank(0)
    broke = world.now
    world.run(3)  # rings that never come
    assert len(world.notes("failure")) == len(world.starts) - 1 == 2 and world.now - broke <= 3


def test_a_silent_link_is_found_by_the_heartbeat():
    world = World(nodes=3, heartbeat=5.0)
    world.run(4)
    world.machines[2].linked = False
    world.hung = {0, 1}  # no error reaches the others
    began = world.now
    while not world.notes("failure"):
        world.run(0.5)
    assert world.now - began <= 6 and "n2" in last_failure(world).text


def test_a_node_that_is_about_to_go_is_left_at_a_checkpoint_and_gets_no_rank_again():
    world = World(nodes=3, steps=40)
    world.run(8)
    world.tell(m.NodeDraining("id1", "preempted"))
    world.tell(m.NodeDraining("id1", "preempted"))
    world.run(3)
    assert [start.placement.dp for start in world.starts] == [3, 2] and len(world.notes("drain")) == 1
    assert {seat.node.name for seat in world.starts[-1].placement.seats} == {"n0", "n2"}
    world.run(60)
    assert world.finish.code == EXIT_OK and not world.notes("failure") and len(world.starts) == 2


def test_when_the_last_nodes_are_about_to_go_the_run_is_stopped_not_failed():
    world = World(nodes=2, wait=10.0)
    world.run(8)
    for index in range(2):
        world.tell(m.NodeDraining(f"id{index}", "preempted"))
    world.run(30)
    assert world.finish.code == EXIT_STOPPED and "add nodes" in world.finish.text


def test_a_copy_in_memory_counts_as_progress():
    world = World(steps=100, every=1000, restarts=1)
    for step in range(3, 30, 4):
        world.run(2)
        world.saved = step
        world.tell(m.CopyHeld(Age(world.starts[-1].attempt, step)))
        world.kill_rank(1)
        world.run(2)
    assert world.finish is None and len(world.starts) == 8
    assert world.notes("recovered")[-1].fields["steps_again"] <= 2


def test_bad_input_of_a_rank_is_never_tried_again():
    world = World()
    world.run(1)
    report = world.report_of(0)
    report.failure, report.code = Failure(0, world.now, "user", "data.path = nowhere", EXIT_USER), EXIT_USER
    world.run(5)
    assert world.finish.code == EXIT_USER and "data.path = nowhere" in world.finish.text and len(world.starts) == 1


def test_a_rank_that_says_bad_input_is_not_waited_beside():
    world = World(settle=30.0)
    world.run(4)
    world.sends_rings = False
    report = world.report_of(0)
    report.failure, report.code = Failure(0, world.now, "user", "data.path = nowhere", EXIT_USER), EXIT_USER
    world.hung = {1, 2}  # the others say nothing of it
    world.run(3)
    assert world.notes("failure") and last_failure(world).fields["cause"] == "user"


@pytest.mark.parametrize(
    ("code", "kind", "attempts", "exit_code"), [(-9, "rank killed", 4, EXIT_CRASH), (3, "not finite", 2, EXIT_DIVERGED)]
)
def test_a_budget_ends_what_cannot_get_past_a_step(code, kind, attempts, exit_code):
    world = World(steps=100)
    while world.finish is None:
        world.run(STEP)
        if world.step == 7 and (report := world.report_of(1)):
            if code > 0:
                report.failure = Failure(1, world.now, "crash", "loss not finite in 5 steps", code)
            world.kill_rank(1, code)
            world.run(STEP)
    assert world.finish.code == exit_code and len(world.starts) == attempts
    assert kind in world.finish.text and "newest checkpoint: step 5" in world.finish.text
    assert "what to do" in world.finish.text


def test_a_checkpoint_refills_the_budget():
    world = World(steps=60, restarts=1)
    for _ in range(6):
        world.kill_rank(0)
        world.run(9)
    assert world.finish is None or world.finish.code == EXIT_OK


def test_checkpoints_of_a_run_that_went_back_count_though_an_earlier_launch_got_further():
    """As with resume=FOLDER of an older checkpoint, or where the newest is damaged."""
    world = World(steps=200, restarts=1, first_attempt=2)
    world.tell(m.CheckpointSaved(Age(1, 500)))
    world.run(4)
    assert world.supervisor.saved == (2, 5)
    world.machines[1].linked = False
    world.run(9)
    assert world.starts[-1].placement.dp == 2
    world.machines[1].linked = True
    world.run(9)
    assert world.starts[-1].placement.dp == 3 and world.notes("grow")
    for _ in range(4):
        world.kill_rank(0)
        world.run(9)
    assert world.finish is None and len(world.notes("failure")) == 5


def test_steps_done_again_by_a_later_attempt_refill_no_budget():
    world = World(steps=100, every=4, restarts=2)
    while world.finish is None:
        world.run(STEP)
        if world.step == 11:  # in each attempt, behind the checkpoint of step 8, which turns out to be damaged
            world.kill_rank(0)
            world.saved = 4
    assert world.finish.code == EXIT_CRASH and len(world.starts) == 3
    assert world.supervisor.saved == (3, 8) and "newest checkpoint: step 8" in world.finish.text


def test_steps_done_again_are_counted_to_the_furthest_that_was_reached():
    world = World(steps=40)
    for step in (9, 7):  # the second attempt ends before it has caught up
        while world.step < step or len(world.starts) == len(world.notes("failure")):
            world.run(STEP)
        world.kill_rank(1)
        world.run(2)
    world.run(10)
    assert [note.fields["steps_again"] for note in world.notes("recovered")] == [9 - 6, 9 - 6]
    (caught_up,) = world.notes("caught_up")
    assert caught_up.fields["step"] == 10


def test_a_copy_of_an_earlier_attempt_is_no_moment_to_grow():
    world = World(steps=100, every=1000, copies=True)
    world.run(4)
    world.machines[1].linked = False
    world.run(12)
    world.machines[1].linked = True
    world.run(2)
    assert world.starts[-1].placement.dp == 2
    world.tell(m.CopyHeld(Age(1, 3)))  # whole again with the node that came back
    assert not world.notes("grow")
    world.tell(m.CopyHeld(Age(2, 9)))
    assert world.notes("grow")


def test_a_node_that_hears_only_now_that_its_attempt_ended_is_waited_for():
    world = World(steps=40)
    world.run(4)
    world.machines[1].linked = False
    while not world.notes("failure"):
        world.run(STEP)
    world.machines[1].linked = True
    world.run(2)
    assert [start.placement.dp for start in world.starts] == [3, 3]


@pytest.mark.parametrize("returning", [False, True])
def test_the_last_word_of_a_node_that_is_gone_changes_nothing(returning):
    """Its agent sent it before, and it came late."""
    world = World()
    world.run(4)
    world.tell(m.NodeLost("id1", "Ray marked it dead", returning))
    said = len(world.actions)
    world.tell(m.AgentBeat("id1", 1, [RankReport(1, step=3, phase="step")]))
    assert world.actions[said:] == [] and not world.supervisor.nodes["id1"].live


def test_an_agent_that_starts_again_is_waited_for_a_few_seconds_alone():
    world = World(steps=100)
    world.run(4)
    world.power_off(1)
    world.tell(m.NodeLost("id1", "its agent died", returning=True))
    while not world.notes("waiting"):
        world.run(STEP)
    began = world.now
    assert world.notes("waiting")[0].text == "for a node whose agent restarts, 6 s at most"
    while len(world.starts) < 2:
        world.run(STEP)
    assert world.starts[-1].placement.dp == 2 and 6 <= world.now - began <= 6 + 2 * STEP


def test_many_nodes_have_longer_to_answer_a_probe():
    """Four seconds, and as long as the driver takes to call all three."""
    world = World(heartbeat=60.0, calls=1.0)
    world.run(4)
    world.power_off(2)
    began = world.now
    while not world.notes("failure"):
        world.run(STEP)
    assert last_failure(world).fields["nodes"] == ["n2"] and 4 + 3 <= world.now - began <= 4 + 3 + 3 * STEP


def test_a_step_of_a_smaller_layout_may_take_longer_than_those_before():
    world = World(steps=100, hang_after=60.0)
    world.run(10)
    world.power_off(1)
    while len(world.starts) < 2 or not world.supervisor.current.stepping:
        world.run(STEP)
    world.hung = {0, 1}
    world.run(15)
    world.hung = set()
    world.run(5)
    assert world.starts[-1].placement.dp == 2 and len(world.notes("failure")) == 1


@pytest.mark.parametrize(("every", "code"), [(5, EXIT_STOPPED), (1000, EXIT_CRASH)])
def test_a_rank_that_hangs_in_the_checkpoint_of_a_stop_ends_it_long_before_its_time(every, code):
    """Stopped as was asked for is a run that can go on from a checkpoint alone."""
    world = World(every=every)
    world.run(7)
    world.hung = {1}
    world.tell(m.StopAsked("SIGTERM"))
    world.run(30)
    assert world.finish is not None and world.finish.code == code
    assert last_failure(world).fields["cause"] == "hang" and last_failure(world).fields["ranks"] == [1]


def test_stop_ends_with_75_also_while_a_restart_is_under_way():
    world = World()
    world.run(7)
    world.tell(m.StopAsked("SIGTERM"))
    world.run(5)
    assert world.finish.code == EXIT_STOPPED and world.finish.text == "SIGTERM"

    world = World()
    world.run(7)
    world.power_off(1)
    world.run(1)
    world.tell(m.StopAsked("SIGTERM"))
    world.run(5)
    assert world.finish.code == EXIT_STOPPED and len(world.starts) == 1


def test_a_stop_while_nodes_are_waited_for_ends_the_wait():
    world = World()
    world.run(7)
    world.power_off(1)
    world.tell(m.NodeLost("id1", "its agent died", returning=True))
    while not world.notes("waiting"):
        world.run(STEP)
    world.tell(m.StopAsked("SIGTERM"))
    world.tell(m.Tick())
    saved = world.supervisor.saved.step
    assert (
        world.finish.code == EXIT_STOPPED and world.finish.text == f"between attempts: SIGTERM; step {saved} is saved"
    )


def test_before_the_first_step_there_is_nothing_to_save_at_a_stop():
    world = World()
    world.tell(m.StopAsked("SIGTERM"))
    world.run(5)
    assert not any(isinstance(action, m.StopRanks) for action in world.actions)
    assert world.finish.code == EXIT_STOPPED and world.finish.text == "SIGTERM; no step was completed"


def test_before_the_first_step_a_node_that_is_about_to_go_is_left_at_once():
    world = World()
    world.tell(m.NodeDraining("id1", "maintenance"))
    world.run(5)
    assert [start.placement.dp for start in world.starts] == [3, 2]
    assert not world.notes("failure") and not any(isinstance(action, m.StopRanks) for action in world.actions)


def test_a_node_that_cannot_start_its_ranks_is_named_and_what_it_says_later_is_old():
    world = World(restarts=1)
    world.machines[1].ranks = {}
    world.tell(m.StartFailed(1, "id1", "no such folder"))
    world.run(2)
    failure = last_failure(world)
    assert failure.text == "n1 could not start its ranks: no such folder"
    assert (failure.fields["cause"], failure.fields["nodes"], failure.fields["ranks"]) == ("start", ["n1"], [])
    assert len(world.starts) == 2
    world.tell(m.StartFailed(1, "id1", "no such folder"))
    world.run(60)
    assert world.finish.code == EXIT_OK and len(world.notes("failure")) == 1


def test_ranks_that_survive_their_end_are_waited_for_but_not_for_ever():
    world = World(restarts=0)
    world.run(4)
    world.machines[1].kill, world.hung = (lambda: None), {1}  # it waits in the kernel
    world.kill_rank(0)
    while not world.notes("failure"):
        world.run(STEP)
    began = world.now
    world.run(60)
    assert world.notes("node_lost")[-1].text == "n1: its ranks are still alive after SIGKILL and 10 s"
    assert world.finish.code == EXIT_CRASH and 10 <= world.now - began <= 11


def test_a_driver_that_is_cut_off_says_what_becomes_of_the_ranks_that_it_does_not_reach():
    world = World()
    world.run(7)
    for index in range(len(world.machines)):
        world.power_off(index)
    world.tell(m.StopAsked("Ray's head has not answered for 6 s"))
    world.run(40)
    assert world.finish.code == EXIT_STOPPED
    assert world.finish.text.startswith("Ray's head has not answered for 6 s; ")
    assert re.search(
        r"ranks on n0, n1.* cannot be reached: their agents end them \d+ s after .* without a checkpoint",
        world.finish.text,
    )
    assert f"step {world.supervisor.saved.step} is saved" in world.finish.text
    (stop,) = world.notes("stop")
    assert stop.text.endswith("the driver asks the answering ranks for a checkpoint")


def test_too_few_nodes_is_the_users_to_mend():
    world = World(nodes=2, words=("parallel.dp=4",), wait=10.0)
    world.run(30)
    assert world.finish.code == EXIT_USER and "parallel.dp=2, which fits" in world.finish.text


def test_too_few_nodes_after_a_failure_names_no_checkpoint_where_there_is_none():
    world = World(nodes=2, words=("parallel.ep=2",), every=1000, wait=10.0)
    world.run(3)
    world.power_off(1)
    world.run(60)
    assert world.finish.code == EXIT_CRASH and "newest checkpoint: none" in world.finish.text
    assert "the smallest layout that may run, pp 1 x dp 2 (ep 2), takes 2 devices" in world.finish.text
    assert "pp 1 x dp 1 (ep 1) fits, but its memory per device is unknown" in world.finish.text


def test_a_slow_rank_is_named_with_numbers():
    world = World(steps=200)
    world.run(1)
    for _ in range(90):
        world.run(1)
        for rank in range(3):
            world.report_of(rank).busy = 0.9 if rank == 1 else 0.3
    assert [note.text for note in world.notes("straggler")] == [
        "rank 1 on n1 works 0.9 s per step, the median rank 0.3 s (3.0 times)"
    ]


def test_a_rank_is_slow_beside_those_of_its_stage():
    """The second stage has twice the work of the first by its layers."""
    world = World(nodes=4, steps=200, words=("parallel.pp=2", "parallel.dp=2"))
    world.run(1)
    for _ in range(90):
        world.run(1)
        for rank in range(4):
            world.report_of(rank).busy = 0.3 if rank < 2 else 0.6
    assert not world.notes("straggler")


@pytest.mark.parametrize("seconds", [1.5, 3, 3600])
@pytest.mark.parametrize("heartbeat", [2.0, 5.0])
def test_a_driver_that_slept_blames_nobody(heartbeat, seconds):
    world = World(heartbeat=heartbeat)
    world.run(5)
    world.now += heartbeat / 4  # no answer was due yet
    world.tell(m.Tick())
    world.now += seconds
    world.tell(m.Tick())
    world.run(60)
    assert world.finish.code == EXIT_OK and not world.notes("failure") and not world.notes("node_lost")


def test_a_driver_that_slept_still_misses_a_node_that_answers_no_more():
    world = World(hang_after=60.0)
    world.run(5)
    world.now += 3600
    world.run(STEP)  # answers come before the driver looks at its clock
    world.machines[2].linked, world.hung = False, {0, 1}
    world.run(8)
    assert last_failure(world).fields["cause"] == "node"


def fail(world: World, index: int, seconds: float) -> None:
    """The rank of a node failed so long ago, and the driver hears of it now."""
    failure = Failure(index, world.now - seconds, "crash", f"rank {index} broke", 1)
    world.tell(m.AgentBeat(f"id{index}", 1, [RankReport(index, 1, failure, step=3, phase="step")]))
    world.tell(m.Tick())


def test_a_driver_that_slept_over_a_failure_still_hears_what_all_ranks_have_to_say():
    world = World()
    world.run(4)
    fail(world, 0, 0.1)
    world.now += 4
    world.tell(m.Tick())
    assert not world.notes("failure")
    fail(world, 2, 4.1)
    fail(world, 1, 4.2)
    assert last_failure(world).fields["ranks"] == [1]


def test_a_node_that_was_held_up_has_its_time_to_say_why_its_ranks_failed():
    world = World()
    world.run(4)
    world.machines[1].linked = False
    fail(world, 0, 0.1)
    for _ in range(6):  # longer than the others have, and within the time of a probe
        world.now += STEP
        world.tell(m.Tick())
    world.tell(m.NodeProbed("id1"))
    world.tell(m.StacksPrinted(1, {}, {1: b""}))  # it answers that question, too
    world.tell(m.Tick())
    assert not world.notes("failure")
    fail(world, 2, 3.1)
    fail(world, 1, 3.2)
    assert last_failure(world).fields["ranks"] == [1]


def test_2048_ranks_cost_the_driver_little():
    world = World(
        nodes=256,
        devices=8,
        steps=1000,
        words=("conf=deepseek_v3", "data.path=none", "parallel.dp=128", "batch_size=15360"),
    )
    started = time.process_time()
    world.run(2 * STEP)
    assert (time.process_time() - started) / 2 < 0.5  # 256 answers; the driver asks each agent every 0.6 s


FAULTS = st.sampled_from(["kill", "crash", "cut", "heal", "off", "on", "agent", "hang", "wait", "drain"])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    faults=st.lists(st.tuples(FAULTS, st.integers(0, 3), st.floats(0.5, 9)), max_size=15),
    stop=st.booleans(),
    devices=st.integers(1, 2),
)
def test_any_schedule_of_faults(faults, stop, devices):
    """World checks at every start that attempt numbers rise and no rank of an older attempt lives where it can be reached."""
    world = World(nodes=4, devices=devices, steps=40)
    for fault, index, pause in faults:
        match fault:
            case "kill":
                world.kill_rank(index)
            case "crash":
                world.kill_rank(index, 1)
            case "cut":
                world.machines[index].linked = False
            case "heal":
                world.machines[index].linked = True
            case "off":
                world.power_off(index)
            case "on":
                world.power_on(index)
            case "agent":
                world.kill_agent(index)
            case "hang":
                world.hung = {index}
            case "drain":
                world.tell(m.NodeDraining(f"id{index}", "preempted"))
        world.run(pause)
    if stop:
        world.tell(m.StopAsked("SIGTERM"))
    world.run(400)
    assert world.finish is not None, world.supervisor.phase
    assert world.finish.code in (EXIT_OK, EXIT_CRASH, EXIT_STOPPED)
    stops = [note for kind in ("failure", "grow", "drain") for note in world.notes(kind)]
    assert len(world.starts) <= 1 + len(stops)


def test_losses_of_other_nodes_say_nothing_of_the_run_and_those_of_the_same_end_it():
    world = World(nodes=8, words=("parallel.dp=2",), every=1000, steps=1000, restarts=1)
    for index in range(5):  # each a node of the attempt, as the next one takes its place
        world.run(12)
        world.power_off(int(world.starts[-1].placement.nodes[-1].id.removeprefix("id")))
        world.run(12)
        assert world.finish is None and len(world.starts) == index + 2
    again = int(world.starts[-1].placement.nodes[0].id.removeprefix("id"))
    for _ in range(2):
        world.kill_agent(again)
        world.run(15)
    assert world.finish is not None and "failure 2 of kind 'node lost'" in world.finish.text
