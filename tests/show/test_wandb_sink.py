"""W&B without an account, without a server, and after a killed process: records are read back from its own files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from conf.load import compose
from conf.schema import WandbMode
from tests.show.wandb_file import history, records, run_records
from train.checkpoint.run_folder import RunFolder
from train.show.wandb_sink import (
    LOAD_BINS,
    WandbSink,
    has_netrc_key,
    load_histogram,
    place_at_wandb,
    run_id,
    wants_wandb,
)

ATTEMPT = """
import os, signal, sys, threading, time
from pathlib import Path
from conf.schema import WandbMode
from train.show.wandb_sink import WandbSink

written, start = threading.Event(), WandbSink._start

def start_behind_the_records(self, wandb):
    assert written.wait(60), "a record waits for W&B"
    return start(self, wandb)

WandbSink._start = start_behind_the_records

def attempt(first, last, *, kill_after=None, online_seconds=10.0):
    sink = WandbSink(Path(sys.argv[1]), name="n", config={"seed": 1}, mode=WandbMode.auto,
                     note=lambda text: print("NOTE", text, flush=True), online_seconds=online_seconds)
    for step in range(first, last + 1):
        sink.write({"step": step, "loss": 1.0 / step, "main_loss": 0.5 / step, "layer_max_vio": {"layers.1": 0.5, "mtp.0": 0.25},
                    "load": {"layers.1": [1, 2, 3, 2], "mtp.0": [2, 2, 2, 2]}})
    written.set()
    if kill_after is not None:
        done = Path(sys.argv[1]) / "wandb/last_step"
        while not done.exists() or int(done.read_text() or 0) < last:
            time.sleep(0.02)
        for _ in range(round(kill_after / 0.05)):  # W&B has the time, also where a machine holds both up
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    sink.close()
    print("WHERE", sink.where)
"""


def attempt(folder: Path, call: str, **environment: str) -> subprocess.CompletedProcess:
    """Run one attempt in a process of its own, without the account of whoever runs the tests."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    clean |= {"NETRC": str(folder / "no-netrc"), "HOME": str(folder), **environment}
    code = ATTEMPT + f"\nattempt({call})\n"
    return subprocess.run(
        [sys.executable, "-c", code, folder],
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def steps(folder: Path) -> list[int]:
    return [line["_step"] for line in history(folder)]


@pytest.mark.slow
def test_offline_without_a_key_says_nothing_and_keeps_everything(tmp_path):
    result = attempt(tmp_path, "1, 5", WANDB_PROJECT="p")
    assert result.returncode == 0 and result.stderr == ""
    (path,) = tmp_path.glob("wandb/offline-run-*")
    assert result.stdout == f"WHERE {path}\n"
    lines = history(tmp_path)
    assert [line["_step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[1]["loss"] == 0.5
    assert lines[0]["layer_max_vio/layers_1"] == 0.5 and lines[0]["layer_max_vio/mtp_0"] == 0.25
    assert lines[0]["load/_type"] == "histogram" and sum(lines[0]["load/values"]) == 8
    run = next(record.run for record in records(next(path.glob("*.wandb"))) if record.HasField("run"))
    assert run.run_id == run_id(tmp_path) and run.project == "p"
    assert {item.key: item.value_json for item in run.config.update}["seed"] == "1"
    summed = [record.summary for record in records(next(path.glob("*.wandb"))) if record.HasField("summary")]
    shown = {"/".join(item.nested_key): item.value_json for summary in summed for item in summary.update}
    assert shown["main_loss"] == "0.1" and "loss" not in shown


OLD = {"wandb": "auto", "wandb_project": "mine", "wandb_entity": None, "wandb_group": "rates"}


@pytest.mark.slow
def test_an_old_run_goes_on_in_the_project_that_its_config_names(tmp_path, monkeypatch):
    """Its keys are gone, and so is its config.yaml at the first start of this version; at the second the file beside the id says it."""
    monkeypatch.setenv("WANDB_PROJECT", "another")
    config = compose("name=old", f"runs={tmp_path}")
    with RunFolder(config) as folder:
        pass
    folder.wandb.mkdir()
    run_id(folder.path)
    settings = yaml.safe_load(folder.config_path.read_text())
    folder.config_path.write_text(yaml.safe_dump(settings | {"log": settings["log"] | OLD}))
    assert place_at_wandb(folder.path) == {"project": "mine", "entity": None, "group": "rates"}, (
        "a mode that looks at it"
    )
    for step in (1, 2):
        with RunFolder(config):
            attempt(folder.path, f"{step}, {step}", WANDB_PROJECT="another", WANDB_RUN_GROUP="other")
    runs = [record.run for record in run_records(folder.path) if record.HasField("run")]
    assert {(run.project, run.run_group) for run in runs} == {("mine", "rates")} and steps(folder.path) == [1, 2]


@pytest.mark.parametrize("text", ["log: [", "log: 1", "[]", "log: {wandb_project: x}", "a: " + "[" * 5000])
def test_a_folder_that_does_not_say_where_takes_what_the_environment_says(tmp_path, monkeypatch, text):
    monkeypatch.setenv("WANDB_PROJECT", "p")
    (tmp_path / "wandb").mkdir()
    run_id(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    assert place_at_wandb(tmp_path)["project"] == "p"


@pytest.mark.slow
def test_a_killed_run_loses_a_second_at_most_and_its_next_attempt_repeats_no_step(tmp_path):
    killed = attempt(tmp_path, "1, 8, kill_after=1.5")
    assert killed.returncode == -signal.SIGKILL
    assert steps(tmp_path) == list(range(1, 9))
    resumed = attempt(tmp_path, "6, 12")
    assert resumed.returncode == 0 and "NOTE" not in resumed.stdout
    assert steps(tmp_path) == list(range(1, 13))
    ids = {path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")}
    assert ids == {run_id(tmp_path)}


@pytest.mark.slow
def test_kill_right_after_a_record_leaves_a_readable_file_and_no_step_twice(tmp_path):
    attempt(tmp_path, "1, 8, kill_after=0.0")
    before = steps(tmp_path)
    assert before == list(range(1, len(before) + 1))
    attempt(tmp_path, "6, 12")
    assert steps(tmp_path) == [*before, 9, 10, 11, 12]


@pytest.mark.slow
def test_an_unreachable_server_costs_the_limit_and_one_line(tmp_path):
    started = time.monotonic()
    result = attempt(tmp_path, "1, 5, online_seconds=3.0", WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert time.monotonic() - started < 25
    assert result.returncode == 0 and result.stderr == ""
    notes = [line for line in result.stdout.splitlines() if line.startswith("NOTE")]
    assert len(notes) == 1 and "offline" in notes[0]
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_failure_is_one_note_and_never_an_exception(tmp_path, monkeypatch):
    notes: list[str] = []

    def broken(self, wandb):
        raise RuntimeError("the server\nis on fire")

    monkeypatch.setattr(WandbSink, "_start", broken)
    sink = WandbSink(tmp_path, name="n", config={}, mode=WandbMode.offline, note=notes.append)
    for step in range(1, 4):
        sink.write({"step": step})
    sink.close()
    sink.write({"step": 4})
    assert notes == ["W&B is off for the rest of this run: RuntimeError: the server. metrics.jsonl is still written."]


def test_a_stuck_thread_is_given_up(tmp_path, monkeypatch):
    notes: list[str] = []
    monkeypatch.setattr("train.show.wandb_sink.WAITING_RECORDS", 10)
    monkeypatch.setattr("train.show.wandb_sink.FINISH_SECONDS", 0.1)
    monkeypatch.setattr(WandbSink, "_start", lambda self, wandb: time.sleep(5))
    sink = WandbSink(tmp_path, name="n", config={}, mode=WandbMode.offline, note=notes.append, online_seconds=0.1)
    for step in range(1, 20):
        sink.write({"step": step})
    sink.close()
    assert len(notes) == 1 and "10 records are waiting" in notes[0]


def test_mode_of_the_environment_counts_for_auto(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not wants_wandb(WandbMode.auto) and wants_wandb(WandbMode.offline)
    monkeypatch.delenv("WANDB_MODE")
    assert wants_wandb(WandbMode.auto) and not wants_wandb(WandbMode.disabled)


def test_netrc_key_is_found_for_its_server_only(tmp_path, monkeypatch):
    path = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(path))
    assert not has_netrc_key("https://api.wandb.ai")
    path.write_text("machine api.wandb.ai login user password k\n")
    path.chmod(0o600)
    assert has_netrc_key("https://api.wandb.ai") and not has_netrc_key("https://wandb.example.org")


def test_histogram_counts_experts_in_fair_shares():
    values, edges = load_histogram({"layers.1": [1, 1, 2, 0], "mtp.0": [0, 0, 0, 80]})
    assert len(values) == LOAD_BINS and values.sum() == 8
    assert values[0] == 4 and values[10] == 2 and values[20] == 1 and values[-1] == 1 and edges[10] == 1.0
