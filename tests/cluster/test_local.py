"""The driver of local ranks: it names the cause, ends the others, and passes exit codes and signals on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import local
from cluster.local import run_local
from cluster.spawn import lives
from conf.errors import EXIT_CRASH, EXIT_DIVERGED, EXIT_STOPPED, EXIT_USER

PROLOGUE = """
import os, sys, time, signal
from pathlib import Path
from cluster.cause import Failure, begin_work, end_work
from cluster.clocks import uptime
rank, logs, started = int(os.environ["RANK"]), Path(sys.argv[1]), time.time()
def fail(kind, message, code=1):
    Failure(rank, uptime(), kind, message, code).write(logs); sys.exit(code)
def wait(): time.sleep(60)
def abort_by_nccl():
    print(f"[Rank {rank}] Watchdog caught collective operation timeout: WorkNCCL(OpType=ALLREDUCE)", flush=True)
    os.abort()
(logs / f"began{rank}").touch()  # on a busy machine one may start seconds after the others
while time.time() < started + 60 and not all((logs / f"began{r}").exists() for r in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.01)
"""


def run(body: str, logs: Path, world: int = 3) -> int:
    return run_local([sys.executable, "-c", PROLOGUE + body, str(logs)], world, logs)


@pytest.mark.slow
def test_contract_and_success(tmp_path):
    code = run(
        "(logs / f'env{rank}').write_text(' '.join(os.environ[k] for k in "
        "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'SLUICE_STORE')));"
        "(logs / f'mode{rank}').write_text(f'{os.stat(os.path.dirname(os.environ[\"SLUICE_STORE\"])).st_mode:o}')",
        tmp_path,
    )
    assert code == 0
    *places, store = (tmp_path / "env2").read_text().split()
    assert places == ["2", "2", "3", "3"] and (tmp_path / "mode2").read_text() == "40700"
    assert not Path(store).parent.exists(), "the folder where the ranks met is gone"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        # the victim reports at once, the cause was killed without a word
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else fail('crash', 'connection closed')", EXIT_CRASH,
         "rank 1 ended by signal SIGKILL"),
        # the earliest error by its own clock wins, though its rank writes it last
        ("began = time.time(); time.sleep(1) if rank == 2 else None;"
         "Failure(rank, began if rank == 2 else began + 60, 'crash', 'boom' if rank == 2 else 'lost peer', 1).write(logs);"
         "sys.exit(1)", EXIT_CRASH,
         "rank 2 failed: boom"),
        # a rank that never answers while the others time out
        ("wait() if rank == 1 else fail('timeout', 'timed out in all_reduce')", EXIT_CRASH, "rank 1 hangs"),
        # bad input is one screen with the user's exit code
        ("fail('user', 'data.path = x', 2) if rank == 0 else wait()", EXIT_USER, "error: data.path = x"),
        # the code of a rank that diverged is passed on
        ("fail('crash', 'not finite', 3)", 3, "not finite"),
        # a peer that lost its connection may abort; the one that was killed outright is no victim
        ("os.kill(os.getpid(), signal.SIGKILL if rank == 2 else signal.SIGABRT)", EXIT_CRASH,
         "error: rank 2 ended by signal SIGKILL (out of memory?)\n"),
        # torch aborts a rank that waited too long for others on GPUs
        ("wait() if rank == 1 else abort_by_nccl()", EXIT_CRASH, "rank 1 hangs"),
        ("abort_by_nccl()", EXIT_CRASH, "rank 0, rank 1, rank 2 waited longer than cluster.timeout in a collective"),
        # who left before the end of its work broke the run, whatever its exit code means elsewhere
        *((f"begin_work(logs, rank); os._exit({code}) if rank == 1 else fail('crash', 'connection closed')", EXIT_CRASH,
           f"rank 1 ended by exit code {code} before the end of its work") for code in (0, 2, 3, 75)),
        # it said so before it left
        ("begin_work(logs, rank); end_work(logs, rank); sys.exit(75)", EXIT_STOPPED, ""),
        # the disk was full when it wanted to say why, and the terminal has it
        ("sys.exit('no room') if rank == 0 else time.sleep(1)", EXIT_CRASH, "rank 0 ended by exit code 1; its output is above"),
        # what a rank without an error file printed last
        ("(print('no such device'), sys.exit(7)) if rank == 1 else time.sleep(1)", EXIT_CRASH, "no such device"),
    ],
)  # fmt: skip
def test_the_cause_is_named(tmp_path, capfd, monkeypatch, body, code, words):
    # A busy machine holds a rank for seconds. Where one waits for ever, those are paid for.
    monkeypatch.setattr("cluster.local.SETTLE", 5.0 if "wait()" in body else 30.0)
    started = time.monotonic()
    assert run(body, tmp_path) == code
    assert words in capfd.readouterr().err
    assert time.monotonic() - started < 50  # a rank that waits would do so for 60


@pytest.mark.slow
def test_a_rank_that_closes_what_it_writes_to_is_let_end_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.local.SETTLE", 0.5)
    slow = "(time.sleep({}), (logs / 'closed').touch()) if rank == 0 else None; fail('crash', 'not finite', 3)"
    assert run(slow.format(2), tmp_path) == EXIT_DIVERGED and (tmp_path / "closed").exists()
    monkeypatch.setattr("cluster.local.CLOSE", 0.5)
    started = time.monotonic()
    assert run(slow.format(60), tmp_path) == EXIT_DIVERGED and time.monotonic() - started < 50


def alive(folder: Path) -> list[int]:
    pids = [int(path.name.removeprefix("pid")) for path in folder.glob("pid*")]
    return [pid for pid in pids if lives(pid)]


DRIVER = """
import sys
from pathlib import Path
from cluster.local import run_local
sys.exit(run_local([sys.executable, "-c", sys.argv[2], sys.argv[1]], 2, Path(sys.argv[1])))
"""


def start_driver(tmp_path: Path, body: str) -> subprocess.Popen:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), PROLOGUE + body])
    deadline = time.monotonic() + 50
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return driver


NOTE_PID = "(logs / f'pid{os.getpid()}').touch();"


@pytest.mark.slow
def test_a_signal_reaches_every_rank_and_the_code_comes_back(tmp_path):
    body = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({EXIT_STOPPED}));" + NOTE_PID + "wait()"
    driver = start_driver(tmp_path, body)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(50) == EXIT_STOPPED
    assert not alive(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["wait()", "(time.sleep(0.5), fail('crash', 'connection closed'))"])
def test_a_signal_to_ranks_that_still_import_stops_the_run(tmp_path, other):
    late = f"signal.signal(signal.SIGTERM, lambda *_: {other});" + NOTE_PID + "wait()"
    driver = start_driver(tmp_path, f"if rank == 0: {NOTE_PID} wait()\n{late}")
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(50) == EXIT_STOPPED
    assert not alive(tmp_path)


def test_a_rank_that_waits_in_a_library_for_one_that_has_stopped_does_not_hold_the_run_up(tmp_path):
    """As for a key of the store, where Python hears no signal."""
    deaf = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])"
    stops = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({EXIT_STOPPED}))"
    driver = start_driver(tmp_path, f"{deaf} if rank == 0 else {stops}\n{NOTE_PID} wait()")
    driver.send_signal(signal.SIGINT)
    assert driver.wait(40) == EXIT_STOPPED
    assert not alive(tmp_path)


def test_a_signal_reaches_the_run_also_while_its_ranks_are_started(tmp_path, monkeypatch):
    def spawn_and_interrupt(*words):
        process = spawn(*words)
        if not signalled:
            signalled.append(process.pid)
            os.kill(os.getpid(), signal.SIGINT)
        return process

    signalled, spawn = [], local.spawn
    monkeypatch.setattr(local, "spawn", spawn_and_interrupt)
    assert run("wait()", tmp_path) == EXIT_STOPPED


@pytest.mark.slow
def test_no_rank_is_late_while_the_driver_itself_is_held_up(tmp_path, monkeypatch, capfd):
    """A second at every look here; one rank takes longer than that to say that it failed first."""
    monkeypatch.setattr(local, "SETTLE", 2.0)
    monkeypatch.setattr(local, "time", SimpleNamespace(sleep=lambda _: time.sleep(1.0), monotonic=time.monotonic))
    late = "(time.sleep(4), Failure(rank, 0.0, 'crash', 'boom', 1).write(logs), sys.exit(1))"
    assert run(f"{late} if rank == 2 else fail('crash', 'lost peer')", tmp_path) == EXIT_CRASH
    assert "rank 2 failed: boom" in capfd.readouterr().err


@pytest.mark.slow
def test_a_second_ctrl_c_ends_ranks_that_do_not_stop(tmp_path):
    stubborn = (
        "signal.signal(signal.SIGTERM, lambda *_: (logs / f'told{rank}').touch());"
        + NOTE_PID
        + "[wait() for _ in range(9)]"
    )
    driver = start_driver(tmp_path, stubborn)
    driver.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 50
    while len(list(tmp_path.glob("told*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert driver.poll() is None and len(alive(tmp_path)) == 2
    driver.send_signal(signal.SIGINT)
    assert driver.wait(50) == -signal.SIGINT  # as Python ends by KeyboardInterrupt
    assert not alive(tmp_path)


@pytest.mark.slow
def test_no_rank_outlives_a_killed_driver(tmp_path):
    driver = start_driver(tmp_path, NOTE_PID + "wait()")
    assert len(alive(tmp_path)) == 2
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 50
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(tmp_path)
