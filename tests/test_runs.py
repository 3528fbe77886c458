"""`sluice runs`: what stands in a folder of runs, and what of it can go."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest

from conf.errors import EXIT_OK, EXIT_USER
from tests.ranks import run_module
from tests.small import environment
from train.command.runs import main

OLD = Path(__file__).parent / "old_runs" / "v0_1_0" / "runs" / "run"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A run that is done, with two checkpoints; one of a sweep that was stopped; one that never made a step."""
    for name, lines in (("done", 6), ("sweep/0", 5), ("empty", 0)):
        run = tmp_path / name
        shutil.copytree(OLD, run)
        metrics = run / "metrics.jsonl"
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:lines]) + '{"step": 7, "lo')
    shutil.rmtree(tmp_path / "empty" / "checkpoints")
    saved = tmp_path / "done" / "checkpoints"
    shutil.copytree(saved / "step_00000004", saved / "step_00000002")
    (saved / "step_00000002" / "rank_00000.safetensors").write_bytes(b"damaged")
    return tmp_path


def listed(runs: Path, capsys: pytest.CaptureFixture) -> dict[str, dict]:
    assert main([f"runs={runs}", "--json"]) == EXIT_OK
    return {run["name"]: run for run in json.loads(capsys.readouterr().out)}


def test_state_step_loss_and_disk_of_every_run(runs, capsys):
    found = listed(runs, capsys)
    assert {name: (run["state"], run["step"], run["steps"]) for name, run in found.items()} == {
        "done": ("done", 6, 6),
        "sweep/0": ("stopped", 5, 6),
        "empty": ("empty", 0, 6),
    }
    last = [json.loads(line) for line in (OLD / "metrics.jsonl").read_text().splitlines()][5]
    assert found["done"]["loss"] == last["main_loss"] != last["loss"] and found["empty"]["loss"] is None
    assert found["done"]["disk_bytes"] > found["sweep/0"]["disk_bytes"] > 100_000
    (runs / "empty" / "config.yaml").write_text("steps: [")
    assert listed(runs, capsys)["empty"]["steps"] is None
    assert main([f"runs={runs}"]) == EXIT_OK
    assert "sweep/0  stopped  5 of 6" in " ".join(capsys.readouterr().out.split(" ")).replace("   ", "  ")


def test_cleaning_shows_first_and_then_frees_what_a_run_can_do_without(runs, capsys):
    going = ["done/checkpoints/step_00000002", "empty"]
    for does in ([], ["--yes"]):
        assert all((runs / path).is_dir() for path in going)
        assert main(["clean", f"runs={runs}", *does]) == EXIT_OK
        said = capsys.readouterr()
        assert all(str(runs / path) in said.out for path in going) and "step_00000004" not in said.out
        assert ("add --yes to remove it" in said.err) == (not does)
    assert not any((runs / path).exists() for path in going)
    assert sorted(listed(runs, capsys)) == ["done", "sweep/0"]
    assert main(["clean", "done", f"runs={runs}", "--yes"]) == EXIT_OK
    capsys.readouterr()
    assert sorted(listed(runs, capsys)) == ["sweep/0"]


@pytest.mark.parametrize("every, stay", [(2, True), (4, False), (None, True)])
def test_checkpoints_that_are_to_stay_for_good_stay(runs, capsys, every, stay):
    """None: the settings cannot be read, and nobody knows."""
    config = runs / "done" / "config.yaml"
    text = "checkpoint: [" if every is None else config.read_text().replace("keep_every: 0", f"keep_every: {every}")
    config.write_text(text)
    assert every is None or f"keep_every: {every}" in text
    assert main(["clean", f"runs={runs}", "--yes"]) == EXIT_OK
    assert (runs / "done/checkpoints/step_00000002").is_dir() == stay
    assert (runs / "done/checkpoints/step_00000004").is_dir()


def test_a_run_that_trains_is_named_and_left_alone(runs, capsys):
    with (runs / "empty" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert listed(runs, capsys)["empty"]["state"] == "trains now"
        assert main(["clean", f"runs={runs}", "--yes"]) == EXIT_OK and (runs / "empty").is_dir()
        assert main(["clean", "empty", f"runs={runs}", "--yes"]) == EXIT_USER
        assert "trains now" in capsys.readouterr().err and (runs / "empty").is_dir()


@pytest.mark.parametrize("words", [["--jsn"], ["nothing"], ["clean", "../runs"], ["clean", "--json"]], ids=" ".join)
def test_other_words_are_errors_with_a_cure(runs, words, capsys):
    assert main([*words, f"runs={runs}"]) == EXIT_USER
    assert "cure: " in capsys.readouterr().err and len(listed(runs, capsys)) == 3


def test_the_command_itself_lists_them_and_a_sweep_leaves_nothing_of_its_own(runs):
    done = run_module("train", ["runs", f"runs={runs}"], runs, environment())
    assert done.returncode == EXIT_OK and "sweep/0" in done.stdout, done.stderr
    words = ["-m", "mode=evaluate", "name=one,two", f"runs={runs}"]
    assert run_module("train", words, runs, environment()).returncode == EXIT_USER
    assert not (runs / "sweeps").exists() and not [*runs.glob("multirun*")]
