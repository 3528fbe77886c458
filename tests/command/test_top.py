"""`sluice top`: what it reads from a run folder, and what it shows at any width."""

import fcntl
import io
import json
import os
import pty
import struct
import sys
import termios
import time

import pytest
from rich.console import Console

from conf.errors import EXIT_OK, EXIT_USER
from train.command import top
from train.command.top import MAPS, run_screen
from train.command.top_state import read_picture

NOW = time.time()
INCIDENT = {
    "time": NOW,
    "kind": "hang",
    "fault": "skipped",
    "ranks": [1],
    "among": [],
    "where": "",
    "advice": "",
    "waits": [],
}


@pytest.fixture
def run(tmp_path):
    """A run of two stages and three replicas without a driver that tells, which was killed after step 8 of 20."""
    folder = tmp_path / "runs" / "mine"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: mine\nsteps: 20\nparallel: {pp: 2, dp: 3, cp: 1}\n")
    (folder / "starts.json").write_text(
        json.dumps([{"time": NOW - 100, "command": "sluice", "folder": "/", "commit": None, "modified": False}])
    )
    records = [
        {"step": n, "main_loss": 9 - n / 2, "step_seconds": 4.0, "mfu": 0.31, "time": NOW - 100 + 10 * n}
        for n in range(1, 9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    for rank in range(6):
        said = {
            "step": 8,
            "phase": "step",
            "time": NOW - 20,
            "busy": 1.0 + rank,
            "seconds": 7.0,
            "memory": 2**30,
            "pid": 1,
            "host": f"h{rank}",
        }
        (folder / "logs" / f"rank_{rank}.progress.json").write_text(json.dumps(said))
    (folder / "logs" / "rank_2.log").write_text("first\nsecond\x1b[2J\n")
    return folder


def shown(group, width: int, height: int = 60) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width, height=height, color_system=None).print(group)
    return output.getvalue().splitlines()


def test_a_run_without_a_driver_is_read_from_the_files_of_its_ranks(run):
    picture = read_picture(run, "mine")
    assert picture["state"] == "stopped" and picture["seconds_left"] is None
    assert [picture[name] for name in ("step", "steps", "stages", "replicas", "restarts")] == [8, 20, 2, 3, 0]
    assert [one["rank"] for one in picture["ranks"]] == list(range(6))
    assert picture["ranks"][4]["waiting"] == 2.0 and picture["ranks"][4]["node"] == "h4"
    assert picture["wall"]["seconds"] == pytest.approx(80, abs=1)
    assert picture["wall"]["seconds_in"]["start"] == pytest.approx(10)


def test_with_a_driver_its_table_counts_and_says_the_layout_of_now(run):
    events = [
        {"time": NOW, "kind": "launch", "attempt": 0, "text": "mine", "world": 6},
        {"time": NOW + 1, "kind": "failure", "attempt": 1, "text": "rank 1 died"},
        {"time": NOW + 1, "kind": "incident", "attempt": 1, "text": "culprit: rank 1\n  what: it died"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    table = {
        "time": NOW,
        "attempt": 2,
        "phase": "running",
        "pp": 2,
        "dp": 1,
        "ranks": [[0, "n0", 9, "step", 1.0, 2.0, 5, False], [1, "n1", 9, "checkpoint", None, None, 0, True], "odd"],
    }
    (run / "ranks.json").write_text(json.dumps(table))
    picture = read_picture(run, "mine")
    assert (picture["stages"], picture["replicas"]) == (2, 1)
    assert [one["node"] for one in picture["ranks"]] == ["n0", "n1"]
    assert picture["ranks"][1]["ended"] and picture["ranks"][1]["waiting"] is None
    lines = shown(run_screen(picture, 80), 80)
    assert any("rank 1 died" in line for line in lines) and any("culprit: rank 1" in line for line in lines)
    (run / "logs" / "incident_1.json").write_text(json.dumps(INCIDENT | {"text": "rank 1 left"}))
    lines = shown(run_screen(read_picture(run, "mine"), 80), 80)
    assert any("incident: rank 1 left" in line for line in lines) and not any("culprit" in line for line in lines)


def test_numbers_that_are_none_are_null(run, capsys):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "main_loss": float("nan"), "time": NOW}) + "\n")
    assert read_picture(run, "mine")["record"]["main_loss"] is None
    assert top.main(["mine", f"runs={run.parent}"]) == EXIT_OK and "step 9/20" in capsys.readouterr().out


def test_a_run_that_failed_or_is_done_says_so_and_damaged_files_are_left_out(run):
    (run / "logs" / "rank_3.progress.json").write_text("{")
    (run / "logs" / "rank_3.error.json").write_text("{}")
    (run / "logs" / "incident_1.json").write_text(json.dumps(INCIDENT | {"text": "rank 3 left out all_reduce 7"}))
    (run / "ranks.json").write_text("[]")
    picture = read_picture(run, "mine")
    assert picture["state"] == "failed" and [one["rank"] for one in picture["ranks"]] == [0, 1, 2, 4, 5]
    assert any("left out all_reduce 7" in line for line in shown(run_screen(picture, 80), 80))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "time": NOW}) + "\n")
    assert read_picture(run, "mine")["state"] == "done"


def picture_of(stages: int, replicas: int) -> dict:
    about = {"step": 5, "phase": "step", "seconds": 2.5, "ended": False, "age": 1.0, "waiting": 1.0}
    ranks = [
        about
        | {"rank": rank, "node": f"n{rank // 8}", "busy": 2.0 if rank == 1 else 1.0, "memory": 2**30 * (1 + rank % 3)}
        for rank in range(stages * replicas)
    ]
    return {
        "name": "run",
        "state": "trains",
        "step": 5,
        "steps": 10,
        "record": {"main_loss": 2.5, "tokens_per_second": 1e6},
        "seconds_left": 65.0,
        "stages": stages,
        "replicas": replicas,
        "ranks": ranks,
        "wall": None,
        "events": [{"time": NOW - one, "kind": "straggler", "text": "x" * 300} for one in range(9)],
        "restarts": 2,
    }


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 3), (16, 128), (40, 500)])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (40, 12)])
def test_no_line_is_longer_than_the_terminal_and_no_screen_higher(width, height, stages, replicas):
    picture = picture_of(stages, replicas)
    lines = shown(run_screen(picture, width, height), width)
    assert len(lines) <= height and max(map(len, lines)) <= width
    assert any(line.startswith("busy:") for line in lines) and any(line.startswith("  rank") for line in lines)
    lines = shown(run_screen(picture, width), width, 200)
    assert max(map(len, lines)) <= width and all(any(line.startswith(f"{name}:") for line in lines) for name in MAPS)


def test_the_map_shows_which_rank_stands_out_and_noise_takes_two_shades_at_most():
    lines = shown(run_screen(picture_of(2, 4), 80, 24), 80)
    row = next(line for line in lines if line.startswith("stage 0"))
    assert row.split()[2] == "·" * 6 + "█" * 6 + "·" * 12
    assert any("1 s to 2 s (rank 1), median 1 s" in line for line in lines)
    even = picture_of(2, 4)
    even["ranks"] = [rank | {"busy": 1.0 + rank["rank"] / 200, "memory": None} for rank in even["ranks"]]
    rows = [line.split()[2] for line in shown(run_screen(even, 80, 24), 80) if line.startswith("stage")]
    assert len(set("".join(rows))) <= 2


def test_a_pipe_gets_one_picture_and_scripts_get_json(run, capsys):
    words = ["mine", f"runs={run.parent}"]
    assert top.main(words) == EXIT_OK
    said = capsys.readouterr().out
    assert "mine  stopped  step 8/20" in said and "memory: its peak" in said and "effective" in said
    assert top.main([*words, "--json"]) == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "stopped" and found["ranks"][5]["waiting"] == 1.0 and found["record"]["mfu"] == 0.31


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nope"], "is no run in"),
        ([], "needs the name of one run"),
        (["a", "b"], "needs the name"),
        (["mine", "--jsn"], "is not a flag"),
    ],
)
def test_what_is_no_run_is_an_error_with_its_cure(run, words, said, capsys):
    assert top.main([*words, f"runs={run.parent}"]) == EXIT_USER
    assert said in (text := capsys.readouterr().err) and "sluice runs" in text


@pytest.mark.slow
def test_in_a_terminal_it_goes_on_until_ctrl_c_and_the_terminal_is_as_before(run):
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(
            sys.executable,
            [
                sys.executable,
                "-c",
                "import sys; from train.command.top import main; sys.exit(main(sys.argv[1:]))",
                "mine",
                f"runs={run.parent}",
            ],
        )
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(terminal)[3]
    read_until(terminal, b"step 8/20")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "time": NOW}) + "\n")
    read_until(terminal, b"step 9/20")
    os.write(terminal, b"\x03")
    read_until(terminal, b"\x1b[?1049l")  # the screen of before is there again
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == EXIT_OK
    assert termios.tcgetattr(terminal)[3] == before
    os.close(terminal)


def read_until(terminal: int, words: bytes) -> bytes:
    said, ends = b"", time.time() + 120
    while words not in said:
        assert time.time() < ends, said
        said += os.read(terminal, 65536)
    return said
