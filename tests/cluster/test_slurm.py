"""The events that cluster/docs/slurm.md describes, on real Slurm with three nodes and the script unchanged; Ray and the
driver are stand-ins."""

import tempfile
import time
from pathlib import Path

import pytest

from bench.hosts import missing as no_hosts
from conf.files import atomic_write_text
from conf.schema import ROOT
from tests.cluster.slurm import Slurm
from tests.cluster.slurm import missing as no_slurm

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
SCRIPT = ROOT / "cluster" / "files" / "sluice.sbatch"
STAND_INS = {
    # Ray: the first node has the driver, the others end when that has ended. A dead node they do not notice, as Ray does not
    # for many minutes.
    "ray": """
        while [ "$1" != -- ]; do shift; done; shift
        [ ! -e "$CALLS/no_cluster" ] || { echo "Ray waits for nodes"; sleep 120; }
        if [ "$SLURM_NODEID" = 0 ]; then rm -f "$CALLS/ended"; "$@"; code=$?; touch "$CALLS/ended"; exit $code; fi
        until [ -e "$CALLS/started" ]; do sleep 0.1; done
        while [ ! -e "$CALLS/ended" ]; do sleep 0.3; done""",
    # The driver: counts its starts, goes on from the step that is saved, and saves on SIGTERM, which ends it while it imports.
    "python": """
        step=$(cat "$CALLS/saved" 2>/dev/null || echo 0); echo "driver from step $step on $(hostname)"; touch "$CALLS/started"
        [ ! -e "$CALLS/imports" ] || exec sleep 120
        trap 'echo $((step + 1)) > "$CALLS/saved"; echo "driver saved"; exit 75' TERM
        for i in $(seq 3000); do sleep 0.1; [ ! -e "$CALLS/end" ] || exit "$(cat "$CALLS/end")"; done""",
}


@pytest.fixture(scope="module")
def slurm():
    if why := no_hosts() or no_slurm():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder, Slurm(Path(folder), 3) as slurm:
        yield slurm


class Job:
    """A job of all three nodes whose driver has started, or is about to."""

    def __init__(self, slurm: Slurm, calls: Path, *options: str, hung: str | None = None):
        """hung: what takes long now, `no_cluster` or `imports`."""
        self._slurm, self._calls, self._output = slurm, calls, calls / "output"
        (calls / "bin").mkdir()
        for name, body in STAND_INS.items():
            path = calls / "bin" / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        if hung is not None:
            (calls / hung).touch()
        environment = {
            "SLUICE_VENV": str(calls),
            "CALLS": str(calls),
            "SLUICE_HEAD_PAUSE": "0.5",
            "SLUICE_HEAD_WATCH": "2",
        }
        self.number = slurm.submit(SCRIPT, self._output, "conf=tiny", options=options, **environment)
        # Every node has to wait before a test lets them go on: a late one would find nothing to wait for.
        begun, count = ("Ray waits", 3) if hung == "no_cluster" else ("driver from", 1)
        slurm.await_state(lambda: self.said().count(begun) >= count, said=lambda: self.said() + slurm.log())

    def await_start(self, count: int, seconds: float = 180) -> str:
        """Until the driver has started so many times; returns the last line of those starts."""
        self._slurm.await_state(lambda: len(self.starts()) >= count, seconds, lambda: self.said() + self._slurm.log())
        return self.starts()[-1]

    def starts(self) -> list[str]:
        return [line for line in self.said().splitlines() if line.startswith("driver from")]

    def said(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def end(self, code: int) -> None:
        """Let the driver end by itself."""
        atomic_write_text(self._calls / "end", str(code))

    def await_end(self, **wanted: str) -> dict[str, str]:
        return self._slurm.await_job(self.number, **wanted)

    @property
    def facts(self) -> dict[str, str]:
        return self._slurm.job(self.number)


@pytest.fixture
def job(slurm, tmp_path, request):
    """A parameter: options of sbatch, or what takes long."""
    given = getattr(request, "param", ())
    job = Job(slurm, tmp_path, hung=given) if isinstance(given, str) else Job(slurm, tmp_path, *given)
    yield job
    slurm.run("scancel", "--quiet", str(job.number))
    slurm.await_state(lambda: not slurm.run("squeue", "-h"), 60, slurm.log)


@pytest.mark.parametrize(("code", "state"), [(0, "COMPLETED"), (3, "FAILED")])
def test_the_code_of_the_run_is_that_of_the_job(job, code, state):
    job.end(code)
    facts = job.await_end(JobState=state)
    assert facts["ExitCode"] == f"{code}:0" and facts["Restarts"] == "0"


def test_a_cancel_with_notice_saves_and_queues_the_job_again(slurm, job):
    slurm.run("scancel", "--batch", "--signal=TERM", str(job.number))
    assert job.await_start(2).startswith("driver from step 1")
    assert "SIGTERM: the run writes a checkpoint" in job.said() and "queued again" in job.said()
    assert job.facts["Restarts"] == "1"


@pytest.mark.parametrize("job", ["no_cluster", "imports"], indirect=True)
def test_a_notice_before_there_is_anything_to_save_queues_the_job_again(slurm, job, tmp_path, request):
    before = len(job.starts())
    (tmp_path / request.node.callspec.params["job"]).unlink()
    slurm.run("scancel", "--batch", "--signal=TERM", str(job.number))
    assert job.await_start(before + 1).startswith("driver from step 0")
    assert "queued again" in job.said() and job.facts["Restarts"] == "1"


@pytest.mark.parametrize("job", [(), "no_cluster", "imports"], indirect=True)
def test_a_cancel_without_notice_ends_the_job(slurm, job):
    slurm.run("scancel", str(job.number))
    job.await_end(JobState="CANCELLED")
    slurm.await_state(lambda: not [pid for i in (1, 2, 3) for pid in slurm.hosts.pids(i, "bin/python")])
    time.sleep(7)  # longer than a job that was queued again would wait
    assert job.facts["Restarts"] == "0" and job.facts["JobState"] == "CANCELLED"


@pytest.mark.parametrize("job", [("--time=2", "--signal=B:TERM@85")], indirect=True)  # 35 s after its start
def test_before_the_time_limit_the_run_saves_and_the_job_is_queued_again(job):
    assert job.await_start(2).startswith("driver from step 1")


def test_a_job_that_makes_room_for_another_saves_and_goes_on_behind_it(slurm, job):
    other = slurm.folder / "other.sh"
    other.write_text("#!/bin/bash\nsleep 1\n")
    slurm.submit(other, slurm.folder / "other", options=("--partition=high",))
    assert job.await_start(2).startswith("driver from step 1")


def test_the_first_node_dies_and_another_one_queues_the_job_again(slurm, job):
    first = job.facts["BatchHost"]
    slurm.power_off(int(first.removeprefix("h")))
    try:
        slurm.await_state(lambda: job.facts["Restarts"] == "1", said=slurm.log)
    finally:
        slurm.power_on(int(first.removeprefix("h")))
    assert "driver from step 0" in job.await_start(2)


def test_another_node_dies_and_the_job_goes_on(slurm, job):
    last = next(f"h{i}" for i in (3, 2, 1) if f"h{i}" != job.facts["BatchHost"])
    slurm.power_off(int(last.removeprefix("h")))
    try:
        slurm.await_state(lambda: last not in slurm.run("sinfo", "-h", "-N", "-r", "-t", "alloc,idle,mix", "-o", "%N"))
        assert job.facts["JobState"] == "RUNNING" and job.facts["Restarts"] == "0"
        job.end(0)
        job.await_end(JobState="COMPLETED")
    finally:
        slurm.power_on(int(last.removeprefix("h")))
