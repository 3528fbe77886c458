"""The drill on a toy run: two faults, and losses equal to those of the unbroken run."""

import math
import random
import re
import signal

import pytest

from bench.drill import DEFAULTS, Drill, main, worst_difference
from bench.drill_ground import DrillGround, small_disk
from bench.hosts import missing
from cluster.driver.journal import read_events
from cluster.run_files import MANIFEST, Age
from conf.errors import EXIT_OK, EXIT_STOPPED, UserError
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


class PlayedGround(DrillGround):
    """A run that takes a step whenever somebody looks, and ends behind step 100; it is its own driver."""

    def __init__(self, folder):
        super().__init__(folder, random.Random(1))
        self.attempt = self.step = 0
        self.injected: list[tuple[str, int, int]] = []
        self.driver = self

    def launch(self, words: list[str]) -> None:
        self.attempt += 1

    def poll(self) -> int | None:
        return EXIT_OK if self.step > 100 else None

    def wait(self) -> int:
        self.step = 101
        return EXIT_OK

    def faults(self) -> list:
        return [self.kill_rank, self.fill_disk]

    def kill_rank(self) -> None:
        """a rank is killed"""
        self.injected.append(("kill_rank", self.attempt, self.step))
        self.attempt += 1

    def fill_disk(self) -> None:
        """the disk is full for a while"""
        self.injected.append(("fill_disk", self.attempt, self.step))


@pytest.fixture
def played(tmp_path, monkeypatch) -> PlayedGround:
    ground = PlayedGround(tmp_path)

    def look(_) -> Age:
        ground.step += 1
        return Age(ground.attempt, ground.step)

    monkeypatch.setattr("bench.drill.newest", look)
    monkeypatch.setattr("bench.drill.last_record", lambda path: {"step": look(path).step})
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return ground


def test_faults_come_in_turn_each_behind_its_step(played):
    """The attempt goes on through a full disk, and a new one is waited for behind a killed rank."""
    said: list[str] = []
    drill = Drill([], played, said.append, only="fill_disk,kill_rank", every=10)
    assert drill.run(4) == EXIT_OK
    assert [name for name, _, _ in played.injected] == ["fill_disk", "kill_rank"] * 2
    assert [attempt for _, attempt, _ in played.injected] == [1, 1, 2, 2]
    assert all(step >= 10 * number for number, (_, _, step) in enumerate(played.injected, 1))
    assert drill.met.keys() == {"the disk is full for a while", "a rank is killed"}
    assert [len(times) for times in drill.met.values()] == [2, 2] and said[-1] == "the run goes on to its end"


def test_faults_that_do_not_exist_are_named(played):
    with pytest.raises(UserError, match="no such fault here") as error:
        Drill([], played, print, only="kill_rank,earthquake").run(1)
    assert error.value.value == "earthquake" and "stop_driver" in error.value.cure and not played.attempt


def test_no_fault_comes_behind_the_end_of_the_run(played):
    assert Drill([], played, print, only="kill_rank", every=60).run(5) == EXIT_OK
    assert len(played.injected) == 1


def test_the_newest_checkpoint_is_damaged_where_there_is_another(tmp_path, monkeypatch):
    ground = DrillGround(tmp_path, random.Random(1))
    monkeypatch.setattr(ground, "processes", list)
    sizes = {}
    for step in (2, 4):
        folder = tmp_path / "checkpoints" / f"step_{step:08}"
        folder.mkdir(parents=True)
        for name, size in ((MANIFEST, 100), ("rank_00000.json", 50), ("rank_00000.safetensors", 1000)):
            (folder / name).write_bytes(bytes(size))
        ground.damage()
        sizes[step] = {path.name: path.stat().st_size for path in folder.iterdir()}
    whole = {MANIFEST: 100, "rank_00000.json": 50, "rank_00000.safetensors": 1000}
    assert sizes == {2: whole, 4: whole | {"rank_00000.safetensors": 500}}


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
