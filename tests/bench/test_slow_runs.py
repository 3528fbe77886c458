"""Healthy runs that are slow: all cases of the benchmark under a driver's watch with a simulated clock, and one real
run."""

import json
import subprocess
import sys

import pytest

from bench.slow_hooks import SLOW_AT, WAYS
from bench.slow_runs import CASES, STEPS, SlowCase, run_slow
from cluster.cause import RankReport
from cluster.patience import patience_of
from cluster.rank_watch import RankWatch
from conf.load import compose
from conf.schema import ROOT
from tests.small import environment

HOOKS = ("on_step", "on_checkpoint", "on_end")
WHERE = {
    "first_step": (1, "step"),
    "loader": (SLOW_AT, "step"),
    "step": (SLOW_AT, "step"),
    "first_validation": (3, "validation"),
    "validation": (9, "validation"),
    "first_save": (2, "checkpoint"),
    "save": (SLOW_AT + 2, "checkpoint"),
    "stop": (SLOW_AT + 1, "checkpoint"),
    "last_save": (STEPS, "checkpoint"),
    "commit": (STEPS, "checkpoint"),
    "report": (STEPS, "checkpoint"),
    "sample": (SLOW_AT, "validation"),
    "publish": (SLOW_AT, "checkpoint"),
    "on_step": (SLOW_AT, "on_step"),
    "on_checkpoint": (SLOW_AT, "on_checkpoint"),
    "on_end": (STEPS, "on_end"),
}
"""By what is slow, the step and the phase that a rank says meanwhile."""
RANKS = 4


class Watched:
    """Ranks of a run that exist only as reports; asks at every second whether they are to be ended."""

    def __init__(self, *words: str) -> None:
        self.watch, self.now = RankWatch(range(RANKS), {}, patience_of(compose(*words).cluster), 0.0), 0.0
        self._done = self._written = 0
        self.late = 0

    def report(self, step: int, phase: str, ranks: tuple[int, ...] = (), ended: bool = False) -> None:
        self.watch.take(
            self.now,
            [
                RankReport(rank, 0 if ended else None, step=step, phase=phase, done=self._done, written=self._written)
                for rank in ranks or range(RANKS)
            ],
        )

    def wait(self, seconds: float) -> bool:
        """Whether the run would be ended before so many seconds are over."""
        ends = self.now + seconds
        while self.now < ends:
            self.now = min(ends, self.now + 1.0)
            if self.watch.is_late(self.now):
                self.watch.name_late()
                self.late += 1
            if self.watch.is_hung(self.now):
                return True
        self.watch.went_on()
        return False

    def is_slow(self, case: SlowCase, step: int, phase: str) -> bool:
        """Whether the run would be ended while it is as slow as in this case."""
        left = case.seconds
        while left > 0:
            if self.wait(min(left, case.every or left)):
                return True
            left -= case.every or left
            self._done += bool(case.every and phase != "checkpoint")
            self._written += bool(case.every and phase == "checkpoint")
            self.report(step, phase, case.ranks)
        return False

    def train(self, case: SlowCase) -> bool:
        """Whether the run of this case would be ended."""
        at, where = WHERE[case.what]
        for step in range(1, STEPS + 1):
            phases = ["step", *["validation"] * (step % 3 == 0), *["checkpoint"] * (step % 2 == 0 or step == STEPS)]
            phases += [where] * (step == at and where not in phases)
            for phase in phases:
                self.report(step, phase)
                if (step, phase) == (at, where) and self.is_slow(case, step, phase):
                    return True
                self.wait(0.1)
        return False


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_nobody_is_ended_who_is_only_slow(case):
    assert not Watched().train(case)


def test_the_table_has_forty_cases_of_everything_that_may_be_slow():
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    assert {case.what for case in CASES} == WHERE.keys() == {*WAYS, *HOOKS}
    assert {case.launcher for case in CASES} == {"local", "torchrun", "ray"}


@pytest.mark.parametrize(("what", "seconds"), [("loader", 61.0), ("validation", 61.0), ("last_save", 601.0)])
def test_a_silence_of_all_ranks_ends_a_run_after_its_floor_and_the_key_moves_it(what, seconds):
    case = SlowCase(what, seconds)
    assert Watched().train(case)
    assert not Watched("cluster.kill_after=700").train(case)
    assert Watched("cluster.kill_after=8", "cluster.timeout=8").train(case._replace(seconds=35.0))


@pytest.mark.slow
def test_a_run_whose_loader_pauses_ends_well_and_says_who_held_it_up(tmp_path):
    case = "loader_12s_silent_1_dp4_local"
    words = [sys.executable, "-m", "bench.slow_runs", "--only", case, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=170)
    assert "of 1 slow runs 1 ended well" in done.stdout, done.stdout + done.stderr
    assert json.loads((tmp_path / "out.json").read_text())[0]["warnings"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("what", "well"), [("first_step", True), ("step", False)])
def test_ranks_wait_longer_for_each_other_until_the_first_step_is_done(tmp_path, what, well):
    """A rank that compiles for longer than cluster.timeout is waited for; later it has failed its peers."""
    case = SlowCase(what, 10.0, ranks=(1,), settings=("cluster.timeout=3",))
    assert run_slow(case, tmp_path).right == well
