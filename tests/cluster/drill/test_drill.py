"""The drill on a toy run: two faults, and losses equal to those of the unbroken run."""

import math
import random
import re
import signal

import pytest

from cluster.drill.__main__ import DEFAULTS, Drill, main, worst_difference
from cluster.drill.faults import DrillGround, small_disk
from cluster.drill.hosts import missing
from cluster.driver.journal import read_events
from conf.errors import EXIT_OK, EXIT_STOPPED
from tests.hold import HOLD, hold_at, site
from train.checkpoint.verify import main as verify

TOY = [
    "model.hidden=32",
    "model.layers=2",
    "model.experts=8",
    "model.vocab_size=512",
    "seq_len=32",
    "batch_size=4",
    "micro_batch_size=1",
]


def test_the_worst_difference_is_found():
    assert worst_difference({1: 4.0, 2: 2.0}, {1: 4.0, 2: 2.5}) == (2, 0.25)
    assert worst_difference({1: 4.0, 2: 2.0}, {1: 4.0}) == (2, math.inf)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_drill_of_two_faults(tmp_path, capsys, monkeypatch):
    hold, await_steps = tmp_path / HOLD, Drill._await_steps
    (tmp_path / "site").mkdir()
    for name, value in site(tmp_path / "site", hold).items():
        monkeypatch.setenv(name, value)
    steps = iter([20, 45, 70])

    def hold_and_await(drill: Drill, *words, **more) -> bool:
        """The run meets each fault before it has come so far."""
        hold_at(hold, next(steps))
        found = await_steps(drill, *words, **more)
        if not more.get("pause", True):
            hold.unlink()
        return found

    monkeypatch.setattr(Drill, "_await_steps", hold_and_await)
    words = f"--faults 2 --every 12 --seed 9 conf=tiny name=toy runs={tmp_path} steps=80 parallel.dp=2 checkpoint.every=5".split()
    assert main([*words, *TOY, "cluster.standby=false"]) == EXIT_OK, capsys.readouterr()
    said = capsys.readouterr().out
    assert "an agent with a rank is killed" in said and "the driver is killed and started again" in said
    at = [int(step) for step in re.findall(r"fault ./2 behind step (\d+):", said)]
    assert len(at) == 2 and at[0] >= 12 and at[1] >= 24 and "largest relative difference of a loss: 0 " in said


@pytest.mark.hosts
@pytest.mark.slow
def test_a_full_disk_costs_a_save_and_no_more(tmp_path):
    if why := missing():
        pytest.skip(why)
    words = [
        "conf=tiny",
        "name=full",
        f"runs={tmp_path}",
        "steps=100000",  # it is stopped
        "checkpoint.every=4",
        *TOY,
        *DEFAULTS,
        "cluster.standby=false",
    ]
    folder = tmp_path / "full"
    ground = DrillGround(folder, random.Random(1))
    with small_disk(folder / "checkpoints", 64):
        drill = Drill(words, ground, print)
        drill._launch()
        try:
            assert drill._await_steps()
            ground.fill_disk()
            assert drill._await_steps(new_attempt=False), "saves go on once there is room"
            assert ground.signal_driver(signal.SIGTERM) == EXIT_STOPPED
        finally:
            if ground.driver.poll() is None:
                ground.signal_driver(signal.SIGKILL)
        said = (folder / "logs" / "rank_0.log").read_text()
        assert "not written" in said and "No space left on device" in said
        assert "failure" not in [event["kind"] for event in read_events(folder)]
        assert verify([str(folder)]) == EXIT_OK
