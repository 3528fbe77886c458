"""`python -m train` as a user runs it: from the command to the last screen, stopped, killed, resumed, diverging."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.errors import EXIT_DIVERGED, EXIT_STOPPED, EXIT_USER
from conf.load import compose
from conf.schema import ROOT
from tests.ranks import run_module, start_module
from tests.show.wandb_file import run_records
from tests.small import Started, arguments, environment, metrics, train, train_in_shell, trajectory
from train.__main__ import main
from train.checkpoint.manifest import newest_intact, verify
from train.metrics.names import SCALARS
from train.metrics.origin import read_starts
from train.model.count import flops_per_token
from train.show.report import read_written_texts


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run of six steps; its folder is copied by tests that change it."""
    tmp_path = tmp_path_factory.mktemp("unbroken")
    done = train_in_shell(tmp_path, "name=whole", "log.wandb=offline", "optim.ema_decay=0.9", "log.sample_every=3")
    assert done.returncode == 0, done.stderr
    return tmp_path, done


def test_a_run_shows_and_leaves_what_it_promises(unbroken):
    tmp_path, done = unbroken
    folder = tmp_path / "runs" / "whole"
    for words in (
        "text sampled after step 4\n  | ",
        "step 6/6",
        "bits per byte",
        "Sample",
        "Checkpoint",
        "Report",
        "W&B",
    ):
        assert words in done.stdout, done.stdout
    assert (folder / "config.yaml").exists() and (folder / "report.html").stat().st_size > 10_000
    assert newest_intact(folder / "checkpoints", full=True).path == folder / "checkpoints" / "step_00000006"
    (start,) = read_starts(folder)
    assert start["command"].startswith("python -m train model.vocab_size=320") and start["ranks"] == 1
    page = (folder / "report.html").read_text()
    assert "The run trains" not in page
    assert "Samples of the model after step 6" in page and start["machine"]["host"] in page
    saved = [set(record.artifact.aliases) for record in run_records(folder) if record.artifact.type == "model"]
    assert saved == [{"latest", f"step_{step:08}"} for step in (2, 4, 6)]
    assert list(folder.glob("wandb/offline-run-*/files/media/table/samples_*"))
    assert [one["step"] for one in read_written_texts(folder)] == [4, 6], (
        "of the first checkpoint behind step 3, and of the last"
    )
    records = metrics(tmp_path, "whole")
    assert sorted(records) == list(range(1, 7))
    assert {metric.name for metric in SCALARS if not metric.when} <= set(records[2])
    assert {"mtp_loss", "validation_loss", "validation_bits_per_byte"} <= set(records[6])
    assert [step for step, record in records.items() if "validation_loss" in record] == [6], "of the last alone"
    assert records[6]["samples"] == 48 and records[6]["tokens"] == 48 * 24
    load = records[6]["load"]
    assert set(load) == {"layers.1", "layers.2", "layers.3", "mtp.0"}
    assert sum(load["layers.1"]) == 8 * 24 * 4 and sum(load["mtp.0"]) == 8 * 23 * 4


def test_the_figures_of_a_record_agree(unbroken):
    tmp_path, _ = unbroken
    model, records = compose(*arguments(tmp_path)).model, metrics(tmp_path, "whole")
    for step, record in records.items():
        minimised = record["main_loss"] + record["mtp_weight"] * record["mtp_loss"] + record["balance_loss"]
        assert record["loss"] == pytest.approx(minimised, rel=1e-6)
        assert record["epochs"] == pytest.approx(step * records[1]["epochs"])
        rate = record["batch_size"] * 24 / record["step_seconds"]
        assert record["tokens_per_second"] == pytest.approx(rate, rel=1e-5)
        for key, causal in (("mfu", True), ("mfu_full", False)):  # of log.peak_flops, on one rank
            assert record[key] == pytest.approx(rate * flops_per_token(model, 24, causal) / 1e11, rel=1e-5)
    assert all(records[1][key] > 0 for key in ("mtp_loss", "mtp_weight", "balance_loss"))


@pytest.mark.slow
def test_fp8_trains_and_reads_its_health(tmp_path):
    done = train(tmp_path, "precision=fp8_ue8m0", "precision.fp8.health.every=2", "log.sample_tokens=0")
    assert done.returncode == 0, done.stderr
    records = metrics(tmp_path, "tiny")
    assert "fp8_fprop_error" not in records[1]
    assert 0.001 < records[2]["fp8_fprop_error"] < 0.2 and 0 <= records[4]["fp8_gradient_flushed"] < 0.5
    layers = records[2]["layer_fp8_fprop_error"]
    assert "layers.0.attention.out" in layers and "mtp.0.block.moe.experts.w2" in layers
    assert "FP8: error of the GEMMs" in (tmp_path / "runs" / "tiny" / "report.html").read_text()


def test_resume_is_bit_equal(unbroken):
    tmp_path, _ = unbroken
    shutil.copytree(tmp_path / "runs" / "whole", tmp_path / "runs" / "half")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "runs" / "half" / "checkpoints" / f"step_{step:08}")
    done = train(tmp_path, "name=half", "optim.ema_decay=0.9")
    assert done.returncode == 0 and "resumed from step 2" in done.stdout, done.stderr
    assert trajectory(tmp_path, "half") == trajectory(tmp_path, "whole")
    first, second = (
        tmp_path / "runs" / name / "checkpoints" / "step_00000006" / "rank_00000.safetensors"
        for name in ("whole", "half")
    )
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_resume_is_bit_equal_with_deterministic_kernels(tmp_path):
    """In bf16, whose products on a CPU are chosen."""
    settings = ("precision=bf16", "cluster.deterministic=true", "steps=4", "log.sample_tokens=0")
    done = train(tmp_path, "name=whole", *settings)
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "runs" / "whole", tmp_path / "runs" / "half")
    shutil.rmtree(tmp_path / "runs" / "half" / "checkpoints" / "step_00000004")
    done = train(tmp_path, "name=half", *settings)
    assert done.returncode == 0 and "resumed from step 2" in done.stdout, done.stderr
    assert trajectory(tmp_path, "half") == trajectory(tmp_path, "whole")
    first, second = (
        tmp_path / "runs" / name / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
        for name in ("whole", "half")
    )
    assert first.read_bytes() == second.read_bytes()


def test_a_run_that_goes_on_with_another_seed_other_data_and_no_average_says_so(unbroken):
    tmp_path, _ = unbroken
    folder = tmp_path / "runs" / "changed"
    shutil.copytree(tmp_path / "runs" / "whole", folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    changes = ("seed=7", "data.validation_fraction=0.2", f"data.tokenizer={folder}")
    done = train(tmp_path, "name=changed", *changes)
    assert done.returncode == 0 and "seed was" in done.stdout, done.stderr
    assert "optim.ema_decay is 0: the checkpoint's average of the weights is dropped" in done.stdout
    assert "the data differ from the training data of step 4" in done.stdout


def test_a_finished_run_says_so(unbroken):
    tmp_path, _ = unbroken
    done = train(tmp_path, "name=whole", "optim.ema_decay=0.9")
    assert done.returncode == 0 and "all 6 steps of this run are complete" in done.stdout


def wait_for_step(tmp_path: Path, name: str, step: int) -> None:
    path = tmp_path / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if path.exists() and f'"step":{step},' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number):
    run = Started(tmp_path, "steps=5000", "checkpoint.every=0")
    wait_for_step(tmp_path, "tiny", 3)
    os.kill(run.pid, number)
    code, output = run.end()
    assert code == EXIT_STOPPED, output
    assert "stopped at step" in output and "Resume with" in output
    found = newest_intact(tmp_path / "runs" / "tiny" / "checkpoints", full=True)
    step = int(found.path.name.removeprefix("step_"))
    assert step == max(metrics(tmp_path, "tiny"))
    done = train(tmp_path, f"steps={step + 1}", "checkpoint.every=0")
    assert done.returncode == 0 and f"resumed from step {step}" in done.stdout


@pytest.mark.slow
def test_killed_at_random_moments_it_always_resumes_to_the_same_losses(tmp_path):
    steps = ["steps=60", "checkpoint.every=3", "checkpoint.keep=2"]
    assert train(tmp_path, *steps, "name=whole").returncode == 0
    moments = random.Random(1)
    command = "train", arguments(tmp_path, *steps, "name=killed"), ROOT, environment()
    for _ in range(6):
        process = start_module(*command, [tmp_path / "stdout", tmp_path / "stderr"])
        time.sleep(moments.uniform(0.0, 3.0))
        process.kill()
        process.join()
        for folder in (tmp_path / "runs" / "killed" / "checkpoints").glob("step_*"):
            assert verify(folder, full=True) == []
    assert train(tmp_path, *steps, "name=killed").returncode == 0
    assert trajectory(tmp_path, "killed") == trajectory(tmp_path, "whole")


def test_divergence_is_skipped_counted_named_and_ends(tmp_path):
    done = train(tmp_path, "optim.lr=1e30", "optim.warmup_steps=0", "optim.max_bad_steps=3", "steps=20")
    assert done.returncode == EXIT_DIVERGED
    assert "steps in a row" in done.stderr and "step 2 skipped" in done.stdout, done.stdout + done.stderr
    skipped = [record["skipped_steps"] for record in metrics(tmp_path, "tiny").values()]
    assert skipped == sorted(skipped) and skipped[-1] >= 2
    assert "3 steps in a row" in done.stderr and "skipped: again a non-finite" in done.stdout, "the second one"


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_whose_last_updates_were_all_skipped_does_not_end_well(tmp_path, steps):
    """Though they are fewer than optim.max_bad_steps; with two steps, of a second start, none was made."""
    settings = "optim.lr=1e30", "optim.warmup_steps=0"
    if steps == 2:
        assert train(tmp_path, *settings, "steps=1").returncode == 0
    done = train(tmp_path, *settings, f"steps={steps}")
    assert done.returncode == EXIT_DIVERGED, done.stdout + done.stderr
    assert f"{max(1, steps - 1)} steps in a row (optim.max_bad_steps, or at the end of the run)" in done.stderr
    assert "Lower optim.lr" in done.stderr


@pytest.mark.slow
def test_every_kind_of_bad_input_is_one_screen(unbroken):
    tmp_path, _ = unbroken
    checkpoint = tmp_path / "runs" / "whole" / "checkpoints" / "step_00000006"
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("something else entirely, again and again. " * 200)
    (other / "b.txt").write_text("yet another text that has nothing to do with it. " * 200)
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        "resume": [f"resume={tmp_path / 'nowhere'}", "name=new1"],
        "data.path": [f"data.path={empty}", "name=new2"],
        "data.tokenizer": [f"data.path={other}", f"resume={checkpoint}", "name=new3"],
        "steps": ["steps=3", f"resume={checkpoint}", "name=new4"],
        "batch_size": ["parallel.schedule=dualpipev", "micro_batch_size=8", "name=new6"],
        "cluster.device": ["cluster.device=cuda", "name=new5"],
    }
    for field, overrides in cases.items():
        done = train(tmp_path, *overrides)
        assert done.returncode == EXIT_USER, (field, done.stdout, done.stderr)
        assert f"error: {field} = " in done.stderr and "cure: " in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 15
    assert not [path for path in (tmp_path / "runs").glob("new*/checkpoints/*") if not path.name.startswith(".")]


def test_a_run_folder_serves_one_run_at_a_time(tmp_path):
    run = Started(tmp_path, "steps=5000")
    try:
        wait_for_step(tmp_path, "tiny", 1)
        done = train(tmp_path)
        assert done.returncode == EXIT_USER and f"process {run.pid}" in done.stderr
    finally:
        run.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "rank 1 ended by signal SIGKILL"), (signal.SIGSTOP, "rank 1 hangs")]
)
def test_a_rank_that_dies_or_hangs_is_named(tmp_path, number, words):
    run = Started(tmp_path, "steps=5000", "parallel.dp=2", "parallel.ep=2", "cluster.timeout=5", "checkpoint.every=0")
    try:
        wait_for_step(tmp_path, "tiny", 2)
        children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
        os.kill(next(pid for pid, environment in ranks.items() if b"RANK=1" in environment), number)
        code, output = run.end()
        assert code == 1 and words in output, output
    finally:
        run.kill()  # its ranks die with it


@pytest.mark.slow
def test_ranks_of_torchrun_train_like_ranks_of_one_command(unbroken):
    tmp_path, _ = unbroken
    layout = ["parallel.dp=2", "parallel.ep=2"]
    assert train(tmp_path, *layout, "name=children").returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train"]
    command = [*torchrun, *arguments(tmp_path, *layout, "name=torchrun")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Checkpoint") == 1  # one rank speaks
    assert trajectory(tmp_path, "torchrun") == trajectory(tmp_path, "children")
    given = environment() | {"RANK": "0", "WORLD_SIZE": "2"}  # by torchrun
    wrong = run_module("train", arguments(tmp_path, "parallel.ep=2", "parallel.dp=4", "name=wrong"), ROOT, given)
    assert wrong.returncode != 0 and "must equal WORLD_SIZE = 2" in wrong.stderr


@pytest.mark.slow
def test_a_job_of_a_sweep_says_that_it_diverged(tmp_path):
    bad = ["optim.lr=1e30", "optim.warmup_steps=0", "steps=20"]
    done = train(tmp_path, *bad, "optim.max_bad_steps=2,3", "-m")
    assert done.returncode == EXIT_DIVERGED, done.stderr
    assert done.stderr.count("rank 0 failed: ") == 2 and "steps in a row" in done.stderr, done.stderr


def test_a_stopped_job_ends_its_sweep(monkeypatch, capsys):
    codes = iter([EXIT_DIVERGED, EXIT_STOPPED])
    monkeypatch.setattr("train.__main__._train", lambda config, alone: next(codes))
    assert main([compose()] * 4) == EXIT_STOPPED
    assert next(codes, None) is None and "2 of 4 jobs of the sweep were not started" in capsys.readouterr().err


def test_metrics_lines_are_json_without_nan(unbroken):
    tmp_path, _ = unbroken
    for line in (tmp_path / "runs" / "whole" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
