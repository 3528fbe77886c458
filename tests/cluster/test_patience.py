"""A hanging run is noticed by comparison with its usual pace, and a run with an uneven pace is left alone."""

import random
import subprocess
import sys

import pytest

from cluster.cause import RankReport
from cluster.incident import PASSED, newest_incident, pass_incident, write_incident
from cluster.local import run_local
from cluster.patience import Patience
from cluster.rank_watch import RankWatch
from conf.errors import EXIT_CRASH
from tests.cluster.test_local import PROLOGUE

HANG_AFTER, START = 300.0, 900.0


class Run:
    """Ranks that exist only as reports, on a clock of their own."""

    def __init__(self, ranks: int = 4):
        self.now, self.patience = 0.0, Patience(HANG_AFTER, START)
        self.watch = RankWatch(range(ranks), {}, self.patience, self.now)

    def wait(self, seconds: float) -> bool:
        """Nothing happens for so long; returns whether whoever holds the run up is named then."""
        self.now += seconds
        return self.watch.is_late(self.now)

    def step(self, number: int, phase: str = "step", sequences: float = 16.0, done: int = 0) -> None:
        reports = [
            RankReport(rank, step=number, phase=phase, sequences=sequences, done=done) for rank in self.watch.reports
        ]
        self.watch.take(self.now, reports)

    def steps(self, seconds: float, count: int = 20) -> None:
        for number in range(1, count + 1):
            self.step(number)
            assert not self.wait(seconds)


@pytest.mark.parametrize(("seconds", "noticed"), [(30.0, 120.0), (0.05, 10.0), (0.3, 10.0), (2.0, 10.0)])
def test_a_hang_is_named_by_how_long_steps_take(seconds, noticed):
    run = Run()
    run.steps(seconds)
    assert not run.wait(1.5 * seconds) and run.wait(noticed - 1.5 * seconds)


def test_no_limit_is_above_what_the_recipe_says_nor_learned_from_nothing():
    patience = Patience(HANG_AFTER, START)
    assert (patience.limit("step"), patience.limit("checkpoint")) == (HANG_AFTER, START)
    patience.take("step", 1.0)
    patience.take("checkpoint", 1.0)
    assert (patience.limit("step"), patience.limit("checkpoint")) == (HANG_AFTER, START), "none of its kind is done"
    patience.take("step", 1000.0)
    patience.finish("step")
    assert patience.limit("step") == HANG_AFTER


def test_the_room_beside_the_longest_step_is_smaller_the_more_were_seen():
    patience = Patience(HANG_AFTER, START)
    patience.finish("step")
    for count in (1, 2, 3):
        patience.take("step", 10.0)
        assert patience.limit("step") == pytest.approx(10 * (2.5 + 9 / count))
    patience.take_work(4.0)  # its batch is four times that of the steps before
    assert patience.limit("step") == pytest.approx(4 * 10 * (2.5 + 9 / 3))
    patience.take_work(2.0)  # a smaller one is no reason for less patience
    assert patience.limit("step") == pytest.approx(4 * 10 * (2.5 + 9 / 3))


def test_ten_thousand_noisy_steps_are_no_hang():
    """Lognormal noise, now and then a step of three times as long, a batch that grows, checkpoints, validations, a machine that slept."""
    draw = random.Random(7)
    run, sequences = Run(), 8.0
    for number in range(1, 10_001):
        if number % 1000 == 0:
            sequences *= draw.choice((1.2, 1.5, 2.0))
        run.step(number, sequences=sequences)
        seconds = 0.2 * sequences / 8 * draw.lognormvariate(0.0, 0.3) * (3.0 if draw.random() < 0.01 else 1.0)
        assert not run.wait(seconds), (number, seconds, run.patience.limit("step"))
        for every, phase, usual in ((250, "checkpoint", 20.0), (400, "validation", 45.0)):
            if number % every == 0:
                run.step(number, phase, sequences)
                assert not run.wait(usual * draw.lognormvariate(0.0, 0.4)), (number, phase)
        if draw.random() < 0.001:
            run.now += 3600.0
            run.watch.forgive(run.now, 3600.0)


def test_a_quiet_run_says_once_who_is_behind():
    run = Run()
    run.steps(2.0)
    run.watch.take(run.now, [RankReport(rank, step=21, phase="step") for rank in (0, 1, 3)])
    run.wait(5.0)
    assert run.watch.tell_quiet(run.now) is None
    run.wait(1.5)
    assert (
        (text := run.watch.tell_quiet(run.now)) and "no progress for 6.5 s" in text and "rank 2 is in step 20" in text
    )
    assert "and a step takes 2.0 s" in text and f"ended in {run.patience.kill_limit('step') - 6.5:.0f} s" in text
    assert run.watch.tell_quiet(run.now) is None
    run.step(22)
    run.wait(6.5)
    assert "no progress for 6.5 s" in run.watch.tell_quiet(run.now), "another silence"


def test_the_first_step_is_a_start_until_it_is_done():
    """That of a run from its beginning, and of one that goes on from a checkpoint; a rank that is first seen later has done it."""
    for saved, seen, stepping in ((0, 1, False), (7, 8, False), (7, 9, True)):
        watch = RankWatch(range(2), {}, Patience(HANG_AFTER, START), 0.0, saved)
        watch.take(1.0, [RankReport(rank, step=seen, phase="step") for rank in range(2)])
        assert (watch.stepping, watch.doing) == (stepping, "step" if stepping else "start")
        watch.take(2.0, [RankReport(0, step=seen + 1, phase="step")])
        assert watch.stepping


def test_a_resumed_first_step_has_the_time_of_a_start_where_no_checkpoint_is_known():
    """On one machine and under torchrun; also after a callback at the start, which reports the step before."""
    for before in ([], [RankReport(0, step=100, phase="on_start")]):
        watch = RankWatch([0], {}, Patience(HANG_AFTER, START), 0.0)
        watch.take(1.0, before)
        watch.take(2.0, [RankReport(0, step=101, phase="step")])
        assert watch.doing == "start" and not watch.is_hung(HANG_AFTER + 10) and watch.is_hung(START + 10)
        watch.take(500.0, [RankReport(0, step=102, phase="step")])
        assert watch.doing == "step" and watch.is_hung(500 + HANG_AFTER + 10)


@pytest.mark.parametrize("phase", ["on_batch", "on_update", "on_skip", "on_step"])
def test_a_callback_in_a_step_has_the_time_of_a_collective(phase):
    patience = Patience(2000.0, START, timeout=600.0)
    patience.take("step", 1.0)
    patience.finish("step")
    assert (patience.kill_limit("step"), patience.kill_limit(phase)) == (60.0, 600.0)


def test_what_a_rank_did_that_has_ended_says_nothing_of_the_others():
    run = Run(2)
    run.steps(1.0)
    run.watch.take(run.now, [RankReport(0, step=21, phase="checkpoint")])
    assert run.watch.doing == "checkpoint"
    run.watch.take(run.now, [RankReport(0, 0, step=21, phase="checkpoint"), RankReport(1, step=21, phase="step")])
    assert run.watch.doing == "step" and not run.watch.ended
    run.watch.take(run.now, [RankReport(1, 0, step=21, phase="step")])
    assert run.watch.ended


def test_a_rank_that_has_no_core_on_a_busy_machine_is_not_late():
    run = Run()
    run.steps(0.3)
    moved = run.watch.moved
    run.now += 20.0
    late = [RankReport(rank, step=20, phase="step", waited_for_core=15.0 if rank == 2 else 0.1) for rank in range(4)]
    run.watch.take(run.now, late)
    assert run.watch.moved == moved + 15.0 and not run.watch.is_late(run.now)
    run.watch.take(run.now, late)
    assert run.wait(5.0)
    run.watch.take(run.now, [RankReport(0, step=20, phase="step", waited_for_core=900.0)])  # of many threads
    assert run.watch.moved == run.now


HANGS = """
from cluster.run_files import progress_path
from cluster.stacks import answer_requests
import queue
answer_requests(logs, rank)
begin_work(logs, rank)
def all_reduce(): time.sleep(60)
def load_batch(): queue.Queue().get()
for step in range(1, 21):
    path = progress_path(logs, rank).with_suffix(".new")
    path.write_text('{"step": %d, "phase": "step"}' % step)
    path.rename(progress_path(logs, rank))
    time.sleep(0.1)
load_batch() if rank == 1 else all_reduce()
"""


@pytest.mark.slow
def test_local_ranks_that_hang_are_named_by_where_they_are(tmp_path, capfd):
    """The one that waits for its loader, and not those that wait for it."""
    assert (
        run_local([sys.executable, "-c", PROLOGUE + HANGS, str(tmp_path)], 3, tmp_path, Patience(60.0, 60.0, 10.0))
        == EXIT_CRASH
    )
    said = capfd.readouterr().err
    assert "error: no step finished for" in said and ": rank 1 is not in a collective, at File " in said
    assert "in load_batch" in said and "also ended: ranks [0, 2]" in said


STEPS = """
from cluster.run_files import progress_path
for step in range(1, 21):
    path = progress_path(logs, rank).with_suffix(".new")
    path.write_text('{"step": %d, "phase": "step"}' % step)
    path.rename(progress_path(logs, rank))
    time.sleep(0.1)
time.sleep(4)
"""


@pytest.mark.slow
def test_ranks_that_nobody_watches_may_be_quiet(tmp_path, capfd):
    """As those of a proof, which pause between its passes."""
    assert run_local([sys.executable, "-c", PROLOGUE + STEPS, str(tmp_path)], 2, tmp_path) == 0
    assert capfd.readouterr().err == ""


ALONE = """
import queue, sys, time
from pathlib import Path
from cluster.place import Place
from cluster.patience import Patience
from cluster.run_files import progress_path
from cluster.self_watch import SelfWatch
logs = Path(sys.argv[1])
progress_path(logs, 5).write_text('{"step": 900, "phase": "step"}')  # of a run before
def load_batch(): queue.Queue().get(timeout=float(sys.argv[2]))
with SelfWatch(logs, Place(5, 6), Patience(60.0, 60.0, 10.0), ends=sys.argv[3] == "ends"):
    for step in range(1, 21):
        path = progress_path(logs, 5).with_suffix(".new")
        path.write_text('{"step": %d, "phase": "step"}' % step)
        path.rename(progress_path(logs, 5))
        time.sleep(0.3)
    try:
        load_batch()
    except queue.Empty:
        print("goes on")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "ends", "code"), [(50, "ends", EXIT_CRASH), (12, "stays", 0)])
def test_a_rank_without_a_driver_sees_by_itself_that_it_hangs(tmp_path, seconds, ends, code):
    command = [sys.executable, "-c", ALONE, str(tmp_path), str(seconds), ends]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == code and ("goes on" in done.stdout) == (code == 0)
    assert "rank 5 in step 20 is not in a collective, at File " in done.stderr and "no step finished for" in done.stderr


def test_a_run_is_named_early_and_ended_late():
    """By the key, by the defaults of CPUs and GPUs, and at cluster.timeout where a disk or code of the user's works in silence."""
    patience = Patience(HANG_AFTER, START)
    for _ in range(5):
        for phase in ("step", "checkpoint", "validation"):
            patience.take(phase, 0.1)
            patience.finish(phase)
    assert [patience.limit(phase) for phase in ("step", "checkpoint", "validation")] == [7.0, 30.0, 30.0]
    phases = ("start", "step", "validation", "checkpoint", "on_step", "on_checkpoint", "on_end")
    assert [patience.kill_limit(phase) for phase in phases] == [900, 60, 60, 600, 300, 900, 900]
    patience.on_gpu = True
    assert [patience.kill_limit(phase) for phase in phases[:4]] == [900, 120, 120, 600]
    for kill_after, timeout, limits in ((10.0, 20.0, [10, 30]), (250.0, 20.0, [250, 250]), (4000.0, 20.0, [300, 900])):
        patience = Patience(HANG_AFTER, START, kill_after, timeout)
        patience.finish("checkpoint")
        patience.take("checkpoint", 0.1)
        patience.take("step", 0.1)
        patience.finish("step")
        assert [patience.kill_limit("step"), patience.kill_limit("checkpoint")] == limits


def test_ranks_that_come_one_after_another_say_nothing_of_the_first_step():
    run = Run()
    for rank, second in enumerate((15.0, 0.1, 0.1, 24.8)):
        run.now += second
        run.watch.take(run.now, [RankReport(rank, step=1, phase="step")])
    run.now += 600.0  # it compiles
    assert run.patience.limit("start") == START and not run.watch.is_hung(run.now)


def test_pieces_of_work_keep_a_run_alive_though_no_step_ends():
    run = Run()
    run.steps(0.1)
    for piece in range(100):
        run.watch.take(run.now, [RankReport(0, step=20, phase="step", sequences=16, done=piece)])
        run.now += 20.0
        assert not run.watch.is_hung(run.now)
    assert run.watch.is_late(run.now), "named all the same"
    run.now += 50.0
    assert run.watch.is_hung(run.now)


@pytest.mark.parametrize(("phase", "hung"), [("checkpoint", False), ("step", True)])
def test_bytes_of_a_checkpoint_count_where_a_rank_waits_for_it(phase, hung):
    """Beside the steps they say nothing of the steps."""
    run = Run()
    run.steps(0.1)
    for piece in range(1, 80):
        slow = RankReport(3, step=20, phase="step", sequences=16, written=piece << 24)
        run.watch.take(run.now, [RankReport(0, step=20, phase=phase, sequences=16), slow])
        run.now += 10.0
    assert run.watch.is_hung(run.now) == hung


def test_a_silence_is_named_once_and_its_end_is_told_once():
    run = Run()
    run.steps(0.1)
    assert run.wait(8.0)
    run.watch.name_late()
    assert not run.wait(10.0) and run.watch.went_on() is None
    run.step(21)
    assert run.watch.went_on() == pytest.approx(18.1) and run.watch.went_on() is None
    assert run.wait(100.0), "another silence, longer than the one that was"


def test_a_word_on_silence_waits_for_five_steps_and_is_of_whole_steps():
    """Ranks that come one after another in steps of 7 to 20 s."""
    run = Run()
    for number in range(1, 12):
        for rank in range(4):
            run.watch.take(run.now, [RankReport(rank, step=number, phase="step", sequences=16)])
            run.now += 0.1
        run.now += 7.0 if number % 2 else 20.0
        assert run.watch.tell_quiet(run.now) is None
    run.now += 60.0
    assert "and a step takes 20.4 s" in run.watch.tell_quiet(run.now)


PAUSE_AT_10 = STEPS.replace("    time.sleep(0.1)\n", "    time.sleep(9 if step == 10 else 0.1)\n").replace(
    "time.sleep(4)\n", ""
)


@pytest.mark.slow
def test_local_ranks_that_are_late_are_named_and_go_on(tmp_path, capfd):
    command = [sys.executable, "-c", PROLOGUE + PAUSE_AT_10, str(tmp_path)]
    assert run_local(command, 2, tmp_path, Patience(60.0, 60.0)) == 0
    said = capfd.readouterr().err
    assert "warning: no step finished for 7 s" in said and "the run is ended in" in said and "error" not in said
    assert "the run makes progress again after 9 s" in said


def test_the_incident_of_a_run_that_went_on_says_so(tmp_path):
    incident = {"time": 7.0, "kind": "hang", "text": "rank 1 hangs\nmore", "fault": "absent", "ranks": [1], "among": []}
    incident |= {"waits": [], "where": "", "advice": ""}
    path = write_incident(tmp_path, incident)
    for _ in range(2):
        pass_incident(tmp_path, 9.4)
    assert newest_incident(tmp_path) == (
        path,
        incident | {"kind": PASSED, "text": "rank 1 hangs; the run went on after 9 s"},
    )
