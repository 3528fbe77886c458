"""Three hosts in network namespaces, Ray on each, fake ranks: power-off, cut and healed links, dead agents, dead Ray."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from bench.drill import losses, worst_difference
from bench.hosts import Hosts, missing
from cluster.driver.journal import read_events
from conf.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER
from conf.load import compose
from tests.cluster.drive import hold, let_end
from tests.hold import HOLD, hold_at, site
from tests.layouts import train_on

pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.timeout(900)]
# Waits are long: beside other tests three trainers on three Rays took more than a minute to their first checkpoint.
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hosts():
    """Their folder has a short name, as Ray makes sockets in it, whose paths may have 107 bytes."""
    if why := missing():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        hosts = Hosts(Path(folder))
        hosts.environment |= site(Path(folder), Path(folder) / HOLD)
        with hosts:
            yield hosts


class Launch:
    """A driver on h0, as its own process."""

    def __init__(self, hosts: Hosts, runs: Path, *overrides: str, step_seconds: float = 0.1, **environment: str):
        self.hosts, self.runs, self.folder = hosts, runs, runs / "run"
        words = [sys.executable, "-m", *self.program(runs), f"cluster.address={hosts.address}"]
        words += ["parallel.dp=3", "checkpoint.every=10", *overrides]
        self.output = runs / "driver.log"
        self._began = self._marked = len(read_events(self.folder))
        self.process = subprocess.Popen(
            hosts.command(0, *words),
            env=hosts.environment | {"PYTHONPATH": str(ROOT), "FAKE_STEP": str(step_seconds)} | environment,
            cwd=runs,
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
        )

    def program(self, runs: Path) -> list[str]:
        return ["tests.cluster.drive", str(runs)]

    def wait_for(self, kind: str, seconds: float = 180, after: int = 0, **fields) -> dict:
        """The first event of this kind with these fields, behind so many others."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None  # looked at first: what it told last counts
            for event in self.events()[after:]:
                if event["kind"] == kind and all(event.get(key) == value for key, value in fields.items()):
                    return event
            assert not ended, self.output.read_text()
            time.sleep(0.05)
        raise AssertionError(f"no event {kind} {fields} in {seconds} s:\n{self.output.read_text()}")

    def wait_for_recovery(self) -> tuple[dict, dict]:
        """The first failure and the first step after it. The step that ended an earlier failure may be told after the
        checkpoint that `whole` waits for, so a "recovered" alone says nothing of this failure."""
        failure = self.wait_for("failure")
        return failure, self.wait_for("recovered", after=self.events().index(failure))

    def wait_for_step(self, step: int, seconds: float = 180) -> None:
        """Until metrics.jsonl has this step."""
        path, deadline = self.folder / "metrics.jsonl", time.monotonic() + seconds
        while not path.exists() or f'{{"step":{step},' not in path.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)

    def events(self) -> list[dict]:
        """Since the mark, or of this launch where none was set."""
        return read_events(self.folder)[self._marked :]

    def mark(self) -> None:
        """From here on a test counts events: another one used this launch before it."""
        self._marked = len(read_events(self.folder))

    def attempts(self) -> list[dict]:
        """All of the run, earlier launches included."""
        return [event for event in read_events(self.folder) if event["kind"] == "attempt"]

    def is_whole(self) -> bool:
        """Whether the newest attempt of this launch has three ranks and has written a checkpoint."""
        kinds = [event["kind"] for event in read_events(self.folder)[self._began :]]
        begun = len(kinds) - kinds[::-1].index("attempt") if "attempt" in kinds else len(kinds)
        return "checkpoint" in kinds[begun:] and self.attempts()[-1]["dp"] == 3

    def wait(self, seconds: float = 240) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()

    def dps(self) -> list[int]:
        return [event["dp"] for event in self.events() if event["kind"] == "attempt"]


class Shared:
    """A run that the tests of this file break one after another; each finds it whole. To start and to end one takes longer
    than most faults."""

    def __init__(self, hosts: Hosts, runs: Path):
        self._hosts, self._runs, self._launch = hosts, runs, None

    def launch(self) -> Launch:
        """A launch of the run, the first or a later one, which goes on until a test lets it end."""
        hold(self._runs / "run")
        self._launch = Launch(self._hosts, self._runs, "steps=10")
        return self._launch

    def whole(self) -> Launch:
        """The launch that runs, or a new one, with a rank on every host and a checkpoint; its events count from here on."""
        if self._launch is None or self._launch.process.poll() is not None:
            self.launch()
        deadline = time.monotonic() + 180
        while not self._launch.is_whole():
            assert self._launch.process.poll() is None and time.monotonic() < deadline, self._launch.output.read_text()
            time.sleep(0.05)
        self._launch.mark()
        return self._launch

    def close(self) -> None:
        if self._launch is not None and self._launch.process.poll() is None:
            self._launch.process.terminate()
            assert self._launch.wait() == EXIT_STOPPED, self._launch.output.read_text()


@pytest.fixture(scope="module")
def shared(hosts, tmp_path_factory):
    shared = Shared(hosts, tmp_path_factory.mktemp("shared"))
    yield shared
    shared.close()


def measure(launch: Launch, name: str, fault_time: float) -> dict:
    """Print what a fault cost, once it is over; the figures of the note come from here. Returns the event of its failure."""
    failure, recovered = launch.wait_for_recovery()
    print(
        json.dumps(
            {
                "fault": name,
                "detected": round(failure["time"] - fault_time, 2),
                "next_step": round(recovered["time"] - fault_time, 2),
                "steps_again": recovered["steps_again"],
                "load": os.getloadavg()[0],
            }
        )
    )
    return failure


def test_launch_reads_topology_from_labels_and_ends_well(hosts, tmp_path):
    launch = Launch(hosts, tmp_path, "steps=20")
    assert launch.wait() == EXIT_OK, launch.output.read_text()
    (attempt,) = [event for event in launch.events() if event["kind"] == "attempt"]
    assert attempt["nodes"] == ["h0", "h1", "h2"]
    assert next(event for event in launch.events() if event["kind"] == "network")["pairs"] == 3
    for rank in range(3):
        assert f"attempt 1 on h{rank}" in (launch.folder / "logs" / f"rank_{rank}.log").read_text()


def test_a_killed_rank(hosts, shared):
    launch = shared.whole()
    broke = time.time()
    assert hosts.signal(1, signal.SIGKILL, "fake_rank") == 1
    failure = measure(launch, "rank killed", broke)
    assert launch.dps() == [3]
    assert failure["text"].startswith("rank 1 on h1 ended by signal SIGKILL")


def test_a_dead_agent(hosts, shared):
    launch = shared.whole()
    broke = time.time()
    assert hosts.signal(2, signal.SIGKILL, "ray::Agent") >= 1
    failure = measure(launch, "agent killed", broke)
    launch.wait_for("attempt", dp=3)  # at once, or on a busy machine after one without the node
    assert failure["nodes"] == ["h2"] and "its agent died" in failure["text"]


def test_a_cut_link_that_heals(hosts, shared):
    launch = shared.whole()
    broke = time.time()
    hosts.cut(2)
    try:
        launch.wait_for("attempt", dp=2)
        measure(launch, "link cut", broke)
        seen = len(launch.events())
    finally:
        hosts.heal(2)
    launch.wait_for("attempt", after=seen, dp=3)
    assert launch.dps()[0] == 2 and launch.dps()[-1] == 3
    launch.wait_for("first_step", attempt=launch.attempts()[-1]["attempt"])
    assert len(hosts.pids(2, "fake_rank")) == 1, "that of before the cut has ended"


def test_power_off_and_return(hosts, shared):
    launch = shared.whole()
    before, broke = len(launch.attempts()), time.time()
    hosts.power_off(1)
    try:
        failure = measure(launch, "power off", broke)
    finally:
        hosts.power_on(1)
    assert failure["cause"] == "node" and failure["nodes"] == ["h1"]
    launch.wait_for("grow")
    launch.wait_for("attempt", attempt=before + 2, dp=3)


def test_a_dead_raylet(hosts, shared):
    launch = shared.whole()
    broke = time.time()
    assert hosts.signal(2, signal.SIGKILL, "/raylet/raylet") == 1
    try:
        measure(launch, "raylet killed", broke)
        assert launch.dps() == [2]
    finally:
        hosts.signal(2, signal.SIGKILL)
        hosts.power_on(2)


def test_a_node_that_ray_drains_is_left_at_a_checkpoint(hosts, shared):
    launch = shared.whole()
    next_attempt, told = len(launch.attempts()) + 1, time.time()
    leaving = hosts.leave(2)
    try:
        drained = launch.wait_for("drain")
        attempt = launch.wait_for("attempt", attempt=next_attempt)
        launch.wait_for("first_step", attempt=next_attempt)
        assert leaving.wait(90) == 0 and not hosts.pids(2, "/raylet/raylet"), "Ray ends once the run has left"
    finally:
        leaving.kill()
        hosts.signal(2, signal.SIGKILL)
        hosts.power_on(2)
    assert drained["node"] == "h2" and attempt["dp"] == 2
    assert not [event for event in launch.events() if event["kind"] == "failure"]
    print(json.dumps({"fault": "drain", "seen": drained["time"] - told, "restarted": attempt["time"] - told}))
    launch.wait_for("grow")


def test_sigterm_to_an_agent_is_a_drain(hosts, shared):
    launch = shared.whole()
    before = len(launch.attempts())
    assert hosts.signal(1, signal.SIGTERM, "ray::Agent") >= 1
    assert launch.wait_for("drain")["node"] == "h1"
    assert launch.wait_for("attempt", attempt=before + 1)["dp"] == 2
    launch.process.send_signal(signal.SIGTERM)  # this launch does not take h1 back
    assert launch.wait() == EXIT_STOPPED, launch.output.read_text()


def test_a_killed_driver_leaves_no_rank_and_a_new_launch_resumes(hosts, shared):
    launch = shared.whole()
    before = len(launch.attempts())
    hosts.signal(0, signal.SIGKILL, "tests.cluster.drive")
    launch.process.wait(60)
    deadline = time.monotonic() + 60  # at worst agents see after four heartbeats that nobody asks
    while any(hosts.pids(i, "fake_rank") for i in range(3)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(hosts.pids(i, "fake_rank") for i in range(3))
    again = shared.launch()
    again.wait_for("first_step", attempt=before + 1)
    let_end(again.folder)
    assert again.wait() == EXIT_OK, again.output.read_text()
    assert [event["attempt"] for event in again.attempts()[: before + 1]] == list(range(1, before + 2))


TOY = [
    "conf=tiny",
    "name=run",
    "model.hidden=32",
    "model.layers=2",
    "model.experts=8",
    "model.vocab_size=512",
    "seq_len=32",
    "batch_size=12",
    "micro_batch_size=1",
    "steps=28",
    "log.wandb=disabled",
    "log.sample_tokens=0",
    "cluster.threads=1",
]


class Training(Launch):
    """The trainer itself on a toy model, 12 sequences a step, so that dp may be 3 or 2; its run folder has a relative path. It waits at
    the step that a test names, until the test names a later one or lets it go on.
    """

    def program(self, runs: Path) -> list[str]:
        return ["train", *TOY, "runs=.", "cluster=ray"]

    def hold_at(self, step: int) -> None:
        hold_at(self.hosts.folder / HOLD, step)

    def go_on(self) -> None:
        (self.hosts.folder / HOLD).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Losses of the same training when nothing happens: three ranks of this machine, to the end."""
    runs = tmp_path_factory.mktemp("unbroken")
    train_on(compose(*TOY, f"runs={runs}", "parallel.dp=3", "checkpoint.every=0", "log.progress=false"), 3)
    return losses(runs / "run")


def test_training_through_a_killed_rank_and_a_lost_node_ends_with_the_same_losses(hosts, tmp_path, unbroken):
    hold_at(hosts.folder / HOLD, 8)
    launch = Training(hosts, tmp_path, "checkpoint.every=4")
    launch.wait_for("checkpoint")
    broke = time.time()
    workers = hosts.pids(1, "train.worker")  # no rank of the run that other tests share
    victim = next(pid for pid in workers if os.readlink(f"/proc/{pid}/fd/1").endswith("rank_1.log"))
    os.kill(victim, signal.SIGKILL)
    launch.hold_at(20)
    measure(launch, "training: rank killed", broke)
    launch.wait_for("checkpoint", attempt=2)
    broke = time.time()
    hosts.power_off(2)
    launch.go_on()
    try:
        launch.wait_for("attempt", dp=2)
        assert launch.wait() == EXIT_OK, launch.output.read_text()
    finally:
        hosts.power_on(2)
    recovered = [event for event in launch.events() if event["kind"] == "recovered"]
    print(json.dumps({"fault": "training: power off", "next_step": round(recovered[-1]["time"] - broke, 2)}))
    step, difference = worst_difference(unbroken, losses(launch.folder))
    print(json.dumps({"worst_relative_difference": difference, "step": step}))
    assert (
        difference < 2e-3
    )  # 2 ranks sum the gradients of 12 sequences in another order than 3; bf16 products amplify it


def test_a_lost_node_costs_at_most_the_steps_since_the_last_copy_in_memory(hosts, tmp_path, unbroken):
    (tmp_path / "memory").mkdir()
    memory = [f"checkpoint.memory_folder={tmp_path / 'memory'}", "checkpoint.every_memory=3", "checkpoint.every=1000"]
    memory.append("cluster.standby=false")  # the test above restarts from ranks in reserve
    (tmp_path / "run").mkdir()
    hold_at(hosts.folder / HOLD, 12)
    launch = Training(hosts, tmp_path / "run", *memory)
    launch.wait_for_step(11)
    broke = time.time()
    hosts.power_off(1)
    for folder in (tmp_path / "memory").glob("*-h1"):
        shutil.rmtree(folder)
    launch.go_on()
    try:
        assert launch.wait() == EXIT_OK, launch.output.read_text()
    finally:
        hosts.power_on(1)
    measure(launch, "training: power off, copies in memory", broke)
    assert launch.dps() == [3, 2]
    # the save after step 3n waits for the copy of step 3n - 3, so at worst that one counts when step 3n + 3 is under way
    assert next(event for event in launch.events() if event["kind"] == "recovered")["steps_again"] < 2 * 3
    assert "copies in memory" in (launch.folder / "logs" / "rank_0.log").read_text()
    assert worst_difference(unbroken, losses(launch.folder))[1] < 2e-3  # as above
    assert not list((tmp_path / "memory").glob("*-h[02]"))


BAD = {
    "head": (["cluster.address=10.77.0.1:1"], {}, "must be HOST:PORT of a running Ray"),
    "token": ([], {"RAY_AUTH_TOKEN": "f" * 64}, "does not accept it"),
    "nodes": (["parallel.dp=4", "cluster.wait=60"], {}, "parallel.dp=3, which fits"),
}


def test_bad_input_is_one_screen(hosts, tmp_path):
    """All at once, as one waits for a minute."""
    started, launches = time.monotonic(), {}
    for name, (overrides, environment, _) in BAD.items():
        (tmp_path / name).mkdir()
        launches[name] = Launch(hosts, tmp_path / name, *overrides, **environment)
    codes = {name: launch.wait() for name, launch in launches.items()}
    for name, launch in launches.items():
        assert is_one_screen(launch, codes[name], BAD[name][-1])
    assert time.monotonic() - started < 185


def is_one_screen(launch: Launch, code: int, *words: str) -> bool:
    text = launch.output.read_text()
    assert code == EXIT_USER and len(text.splitlines()) < 20 and "Traceback" not in text, text
    return all(word in text for word in words) or pytest.fail(text)


DIFFERENT = {
    # another torch: what Python finds first is a package of another version
    1: ('export PYTHONPATH={other}; exec "$@"', "refused: h1: torch is 2.0.0, the driver has"),
    # a folder of the same name on the node's own disk
    2: ('unshare --mount sh -c \'mount -t tmpfs none {runs}; exec "$@"\' sh "$@"', "refused: h2: cannot read"),
}


def test_nodes_that_differ_are_refused_on_one_screen(hosts, tmp_path):
    (tmp_path / "other" / "torch-2.0.0.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "torch-2.0.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.0.0\n")
    (tmp_path / "runs").mkdir()
    try:
        for index, (shell, _) in DIFFERENT.items():
            hosts.signal(index, signal.SIGKILL)
            shutil.rmtree(hosts.folder / f"h{index}", ignore_errors=True)
            shell = shell.format(other=tmp_path / "other", runs=tmp_path / "runs")
            command = hosts.command(index, "sh", "-c", shell, "sh", *hosts.ray_words(index))
            subprocess.run(command, env=hosts.environment, check=True, capture_output=True, timeout=120)
        launch = Launch(hosts, tmp_path / "runs", "cluster.wait=60")
        code = launch.wait()
    finally:
        for index in DIFFERENT:
            hosts.signal(index, signal.SIGKILL)
            hosts.power_on(index)
    assert is_one_screen(launch, code, *(words for _, words in DIFFERENT.values()), "parallel.dp=1, which fits")


def test_a_dead_head_ends_the_run_with_a_checkpoint_and_the_next_launch_resumes(hosts, tmp_path):
    hold(tmp_path / "run")
    launch = Launch(hosts, tmp_path, "steps=10")
    launch.wait_for("checkpoint")
    broke = time.time()
    assert hosts.signal(0, signal.SIGKILL, "gcs_server") == 1
    try:
        assert launch.wait() == EXIT_STOPPED, launch.output.read_text()
        stopped = time.time()
    finally:
        for index in range(hosts.count):
            hosts.signal(index, signal.SIGKILL)
            shutil.rmtree(hosts.folder / f"h{index}", ignore_errors=True)
        hosts.start_rays()
    text = launch.output.read_text()
    print(json.dumps({"fault": "head", "stopped": stopped - broke}))
    assert "stopped: Ray's head at 10.77.0.1:6379 has not answered" in text and "Traceback" not in text
    again = Launch(hosts, tmp_path, "steps=10")
    again.wait_for("first_step", attempt=2)
    again.process.send_signal(signal.SIGTERM)
    assert again.wait() == EXIT_STOPPED, again.output.read_text()
    assert "resumes at 0 " not in (again.folder / "logs" / "rank_0.log").read_text().split("attempt 2")[1]
