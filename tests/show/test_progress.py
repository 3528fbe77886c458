"""What a person sees while a run trains, at any width and without a terminal."""

import io
import math
import threading

import pytest
from rich.console import Console

from train.metrics.quantities import duration, short
from train.show.screens import MIN_BAR, Progress, StepClock, fit, parts

RECORD = {
    "step": 120,
    "loss": 7.5,
    "main_loss": 5.31234,
    "tokens_per_second": 12345.6,
    "max_vio": 0.4,
    "validation_loss": 5.5,
}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(steps: int, clock: Clock, **more):
    stream = io.StringIO()
    return stream, Progress("tiny", steps, console=Console(file=stream, width=80), clock=clock, **more)


def test_line_never_exceeds_the_window_and_keeps_the_important_first():
    for width in range(1, 160):
        line = fit(parts(RECORD, 300, 75.0, "validation"), 0.4, width)
        assert len(line) <= width
        assert line.startswith("step 120/300"[:width])
        assert "loss 5.312" in line or width < 40


def test_wide_line_shows_everything():
    line = fit(parts(RECORD, 300, 75.0, "validation"), 0.4, 150)
    for piece in ("step 120/300", "loss 5.312", "held-out loss 5.5", "[validation]", "1:15 left", "12.3k tokens/s"):
        assert piece in line
    assert "7.5" not in line, "what is minimised moves with the weights of its parts"
    assert line.count("━") + line.count("╌") >= MIN_BAR and line.count("━") / line.count("╌") == pytest.approx(
        2 / 3, abs=0.15
    )


def test_without_a_terminal_the_lines_are_few_and_plain():
    clock = Clock()
    stream, progress = plain(1000, clock)
    for step in range(1, 1001):
        clock.now += 0.01
        progress.write({"step": step, "main_loss": 1.0, "tokens_per_second": 1e4})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[2] for line in lines[:3]] == ["1/1000", "2/1000", "3/1000"]
    assert lines[-1].split()[2] == "1000/1000" and "left" not in lines[-1]
    assert 12 <= len(lines) <= 16 and "\x1b" not in stream.getvalue()
    assert all(line.startswith("tiny  step ") and "loss 1" in line and "10k tokens/s" in line for line in lines)


@pytest.mark.parametrize("booted", [0.0, 1e6])
def test_slow_steps_get_a_line_every_few_seconds_and_fewer_in_a_long_run(booted):
    """By the time since the start, and not since the machine was switched on, from which the clock counts."""
    clock = Clock()
    clock.now = booted
    stream, progress = plain(100_000, clock)
    for step in range(1, 3601):
        clock.now += 1.0
        progress.write({"step": step})
    lines = stream.getvalue().splitlines()
    assert 50 < len(lines) < 250
    assert "8+" not in lines[-1] and "left" in lines[-1]


def test_the_last_held_out_loss_stays_in_view():
    stream, progress = plain(10, Clock())
    progress.write({"step": 1, "validation_loss": 3.5})
    progress.write({"step": 2, "main_loss": 4.0})
    assert "held-out loss 3.5" in stream.getvalue().splitlines()[1]


def test_disabled_progress_still_prints_notes():
    stream, progress = plain(10, Clock(), enabled=False)
    progress.write({"step": 1})
    progress.note("W&B is off: [no] reason")
    assert stream.getvalue() == "W&B is off: [no] reason\n"


def test_time_left_forgets_a_slow_start():
    clock = StepClock(0.0)
    assert math.isnan(clock.seconds_per_step())
    now = 10.0
    clock.tick(now)
    assert clock.seconds_per_step() == pytest.approx(10.0)
    for _ in range(200):
        now += 0.5
        clock.tick(now)
    assert clock.seconds_per_step() == pytest.approx(0.5, rel=0.01)


def test_live_line_on_a_terminal_from_two_threads():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=60, legacy_windows=False, _environ={"TERM": "xterm"})
    progress = Progress("tiny", 50, console=console)
    notes = threading.Thread(target=lambda: [progress.note(f"note {n}") for n in range(5)])
    notes.start()
    for step in range(1, 51):
        progress.event("checkpoint" if step == 50 else None)
        progress.write({"step": step, "loss": 2.0})
    notes.join()
    progress.close()
    shown = stream.getvalue()
    assert "step 50/50" in shown and "[checkpoint]" in shown and all(f"note {n}\n" in shown for n in range(5))


def test_numbers_are_short():
    assert [short(x) for x in (0.5, 999, 12345, 1.5e6, math.nan)] == ["0.5", "999", "12.3k", "1.5M", "nan"]
    assert [duration(x) for x in (5, 75, 7384, 273600)] == ["0:05", "1:15", "2:03:04", "3d 4h"]
