"""The ways to submit a run to Ray, for real, with token authentication: a Ray job, and `ray symmetric-run` on two hosts."""

import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from bench.hosts import Hosts, missing
from cluster.driver.journal import read_events
from cluster.interfaces import free_port
from conf.errors import EXIT_STOPPED
from conf.schema import ROOT
from tests.cluster.drive import hold

RAY = str(Path(sys.executable).with_name("ray"))
FAKE = ["steps=30", "checkpoint.every=5", "parallel.dp=2"]


@pytest.mark.hosts
@pytest.mark.slow
def test_symmetric_run_on_two_hosts(tmp_path):
    """As in cluster/files/sluice.sbatch. A process namespace per host, as the command ends every Ray that it sees."""
    if why := missing():
        pytest.skip(why)
    with Hosts(tmp_path, count=2, ray=False) as hosts:
        driver = [sys.executable, "-m", "tests.cluster.drive", str(tmp_path), f"cluster.address={hosts.address}", *FAKE]
        start = [RAY, "symmetric-run", "--address", hosts.address, "--min-nodes=2", "--num-cpus=1"]
        start += ["--object-store-memory=80000000", "--disable-usage-stats", "--", *driver]
        own = 'mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && exec "$@"'
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", own, "sh"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = hosts.environment | {"PATH": path, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": hosts.address}
        with (tmp_path / "out0").open("w") as out, (tmp_path / "out1").open("w") as other:
            head, worker = (
                subprocess.Popen(
                    hosts.command(i, *alone, *start), env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
                )
                for i, file in enumerate((out, other))
            )
            try:
                code = head.wait(240)
            finally:
                head.kill()
                worker.kill()
        assert code == 0, (tmp_path / "out0").read_text()[-3000:]
    kinds = [event["kind"] for event in read_events(tmp_path / "run")]
    assert kinds[-1] == "finish" and kinds.count("node_joined") == 2 and "failure" not in kinds


@pytest.fixture
def dashboard(tmp_path):
    """A Ray with its dashboard, as a cluster has it, and the environment of whoever submits to it."""
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("needs ray[default]")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | token
    # The agent takes jobs for the dashboard. Its own port is fixed unless given, and another Ray of this machine may hold it.
    ports = {name: free_port("127.0.0.1") for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    words = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    words += [f"--{name}={port}" for name, port in ports.items()]
    folder = tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True)  # short: sockets go there
    words += [
        f"--temp-dir={folder.name}",
        "--num-cpus=2",
        "--object-store-memory=80000000",
        "--disable-usage-stats",
    ]
    with (tmp_path / "ray.log").open("w") as log:
        ray = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    environment |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}"}
    try:
        deadline = time.monotonic() + 120
        while not (listens(ports["dashboard-port"]) and lists_jobs(environment)):
            assert ray.poll() is None and time.monotonic() < deadline, (tmp_path / "ray.log").read_text()
            time.sleep(0.2)
        yield environment
    finally:
        ray.terminate()
        try:
            ray.wait(40)
        except subprocess.TimeoutExpired:
            ray.kill()
        folder.cleanup()


def listens(port: int) -> bool:
    """Before it does, no command of Ray's need be started, which takes seconds of a core."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def lists_jobs(environment: dict[str, str]) -> bool:
    return subprocess.run([RAY, "job", "list"], env=environment, capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_ray_job_is_stopped_with_a_checkpoint_and_resumes(dashboard, tmp_path):
    runtime = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    submit = [RAY, "job", "submit", "--no-wait", "--working-dir", str(shipped(tmp_path)), "--runtime-env-json", runtime]
    run = ["--", sys.executable, "-m", "tests.cluster.drive", str(tmp_path), "cluster.address=auto", *FAKE]
    hold(tmp_path / "run")
    must([*submit, "--submission-id=first", *run], dashboard)
    await_event(tmp_path / "run", "checkpoint")
    must([RAY, "job", "stop", "first"], dashboard)
    assert await_event(tmp_path / "run", "finish")["code"] == EXIT_STOPPED
    must([*submit, "--submission-id=second", *run], dashboard)
    await_event(tmp_path / "run", "first_step", attempt=2)
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "resumes at 0 " not in log.split("attempt 2")[1]
    must([RAY, "job", "stop", "--no-wait", "second"], dashboard)


def must(words: list[str], environment: dict[str, str]) -> None:
    """Run a command of Ray's; what it printed is the message where it fails."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def shipped(tmp_path: Path) -> Path:
    """A folder with the program, as a user would submit it, and the fake ranks of the tests."""
    folder = tmp_path / "program"
    for name in (
        "conf",
        "train",
        "parallel",
        "cluster",
        "tests",
    ):  # copies: bytecode that other tests write meanwhile comes and goes
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def await_event(folder: Path, kind: str, seconds: float = 240, **fields) -> dict:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in read_events(folder):
            if event["kind"] == kind and all(event[name] == value for name, value in fields.items()):
                return event
        time.sleep(0.1)
    raise AssertionError(f"no {kind} {fields}: {[event['text'] for event in read_events(folder)]}")
