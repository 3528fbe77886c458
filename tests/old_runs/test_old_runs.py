"""What earlier versions left on disk goes on to work: see README.md beside this file.

Losses are those that the earlier version went on to. Another processor adds in another order, so they are equal to 1e-4, far
below what a changed step makes of them (5.741 at step 5, 5.724 at step 6).
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.ranks import run_module
from tests.small import environment

OLD = Path(__file__).parent / "v0_1_0"
STEP = 4
"""Of the checkpoint that is kept."""
EVALUATED = 5.7184
"""Loss of that checkpoint on its held-out text, as version 0.1.0 told it."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder in which the old run was started, as it was when the run was stopped after the checkpoint."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    metrics = folder / "runs" / "run" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:STEP]))
    return folder


def sluice(folder: Path, *words: str) -> str:
    """The command with these words, in this folder; returns what it prints."""
    done = run_module("train", list(words), folder, environment(), 240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(file: Path) -> dict[int, dict]:
    return {record["step"]: record for record in map(json.loads, file.read_text().splitlines())}


@pytest.mark.slow
def test_the_same_command_goes_on_from_the_old_checkpoint(old):
    run = old / "runs" / "run"
    started = json.loads((run / "starts.json").read_text())[0]["command"]
    sluice(old, *shlex.split(started)[3:])
    before, after = records(OLD / "runs" / "run" / "metrics.jsonl"), records(run / "metrics.jsonl")
    assert list(after) == list(before)
    for step, record in before.items():
        for name in ("loss", "mtp_loss", "grad_norm", "lr", "tokens", "bias_max"):
            assert after[step][name] == pytest.approx(record[name], rel=1e-4), (step, name)
    assert json.loads((run / "starts.json").read_text())[0]["command"] == started
    assert "run" in sluice(old, "mode=report", "name=run") and (run / "report.html").stat().st_size > 100_000


def test_an_old_run_is_evaluated_and_generates(old):
    sluice(old, "mode=evaluate", "name=run", "cluster.device=cpu")
    told = json.loads((old / "runs" / "run" / "evaluate.json").read_text())
    assert pytest.approx(told["total"]["loss"], abs=2e-4) == EVALUATED
    for source in ("name=run", "generate.checkpoint=export"):
        words = ["generate.prompt=The model", "generate.temperature=0", "generate.tokens=12", "cluster.device=cpu"]
        assert sluice(old, "mode=generate", source, *words).strip()


def test_an_old_run_is_exported_as_before_and_an_old_export_starts_a_run(old):
    sluice(old, "mode=export", "name=run", "export.to=again")
    before, after = (load_file(next((old / name).glob("*.safetensors"))) for name in ("export", "again"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    started = json.loads((old / "runs" / "run" / "starts.json").read_text())[0]["command"]
    words = [word for word in shlex.split(started)[3:] if not word.startswith(("name=", "steps="))]
    sluice(old, *words, "name=tuned", "steps=2", "init_from=export", "data.tokenizer=export")
    assert records(old / "runs" / "tuned" / "metrics.jsonl")[1]["main_loss"] < 5.76
