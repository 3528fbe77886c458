"""Ctrl-C at any moment of a command, as a terminal sends it: to all processes of its group."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.interrupts import interrupt
from conf.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED
from conf.schema import ROOT
from tests.ranks import run_module
from tests.small import arguments, environment
from train.loop.stop import StopRequest

SHARES = [0.2, 0.45, 0.7, 0.95]
"""Of the time to the first step, from where Python itself has started: imports, composing, data, kernels, the first step."""


def start(folder: Path, *words: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments(folder, *words)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def steps(folder: Path) -> int:
    file = folder / "runs" / "tiny" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def wait_for_steps(folder: Path, run: subprocess.Popen, count: int) -> None:
    while steps(folder) < count:
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)


def ended(run: subprocess.Popen, codes: tuple[int, ...]) -> str:
    """The last words, which are no more than two lines beside those on data; behind them what a run says that got as far as its steps."""
    screen, words = run.communicate(timeout=120)
    lines = [line for line in words.splitlines() if not line.startswith(("data: ", "note: "))]
    assert run.returncode in codes and "Traceback" not in words and "Exception" not in words, words
    assert len(lines) <= 2, words
    return "\n".join([*lines, screen])


@pytest.mark.slow
@pytest.mark.timeout(900)  # five starts from nothing; on a busy machine each takes a minute
@pytest.mark.parametrize("layout", [[], ["parallel.dp=2"]], ids=["one process", "two ranks"])
def test_at_any_moment_of_the_start_it_ends_in_a_line_and_the_same_command_goes_on(tmp_path, layout):
    words = [*layout, "steps=5000", "checkpoint.every=0"]
    began = time.monotonic()
    run = start(tmp_path / "whole", *words)
    wait_for_steps(tmp_path / "whole", run, 1)
    whole = time.monotonic() - began
    os.killpg(run.pid, signal.SIGINT)
    run.communicate()
    assert run.returncode == EXIT_STOPPED
    for share in SHARES:
        run = start(tmp_path / "cut", *words)
        time.sleep(share * whole)
        os.killpg(run.pid, signal.SIGINT)
        assert "stopped" in ended(run, (EXIT_STOPPED, EXIT_INTERRUPTED)) or steps(tmp_path / "cut")
    done = run_module("train", arguments(tmp_path / "cut", *layout, "steps=3"), ROOT, environment())
    left = steps(tmp_path / "cut")
    assert done.returncode == EXIT_OK or left > 3, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_twice_while_it_trains_and_saves_it_ends_at_once_and_nothing_is_lost(tmp_path, pause):
    words = ["steps=5000", "checkpoint.every=1", "checkpoint.keep=2"]
    run = start(tmp_path, *words)
    wait_for_steps(tmp_path, run, 3)
    os.killpg(run.pid, signal.SIGINT)
    time.sleep(pause)
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGINT)
    ended(run, (EXIT_STOPPED, EXIT_INTERRUPTED, -signal.SIGINT))
    before = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    run = start(tmp_path, *words[1:], f"steps={len(before) + 2}")
    out, _ = run.communicate(timeout=120)
    assert run.returncode == EXIT_OK and "resumed from step" in out


@pytest.mark.slow
def test_other_modes_end_with_130(tmp_path):
    run = start(tmp_path, "mode=plan", "plan.search=true", "plan.devices=64", "batch_size=256", "hardware=h800")
    time.sleep(3)
    os.killpg(run.pid, signal.SIGINT)
    assert "stopped by Ctrl-C" in ended(run, (EXIT_INTERRUPTED, EXIT_OK)) or run.returncode == EXIT_OK


def test_one_that_waits_for_the_end_of_an_import_does_not_outlive_the_command(tmp_path):
    """An alarm that nobody handles any more would kill the process, whatever its exit code."""
    code = (
        "import signal, time\n"
        "from cluster.interrupts import Interrupts, interrupt\n"
        "with Interrupts():\n"
        "    signal.signal(signal.SIGALRM, interrupt)\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.2)\n"
        "signal.signal(signal.SIGALRM, signal.SIG_DFL)\n"
        "time.sleep(0.5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), timeout=60)
    assert done.returncode == 0


def test_before_the_first_step_a_signal_ends_a_run_at_once_and_later_after_the_step():
    stop = StopRequest()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(1)
            stop.signal = None
        stop.has_stepped = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.pending.name == "on_disk"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        stop.close()


def test_in_an_import_it_comes_after_the_import(tmp_path, monkeypatch):
    """There it would become another error."""
    before = signal.signal(signal.SIGINT, interrupt), signal.getsignal(signal.SIGALRM)
    (tmp_path / "slow_to_import.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nDONE = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(KeyboardInterrupt):
            import slow_to_import

            time.sleep(1)
        assert slow_to_import.DONE
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGALRM, before[1])
