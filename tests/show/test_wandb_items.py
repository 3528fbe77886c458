"""What W&B gets in addition to steps, offline, read back from its own file."""

import json

import pytest
import wandb

from conf.errors import DiskFailed
from conf.load import compose
from tests.show.wandb_file import history, run_records
from train.loop.hooks.skipped_steps import RunDiverged
from train.metrics.origin import code_version, record_start
from train.show.wandb_sink import checkpoint, evaluation_tables, sample_table
from train.show.writer import open_wandb, open_writer, tell_of_end, what_ended

FOUND = {"sequences": 3, "tokens": 72, "text_bytes": 200, "loss": 2.5, "perplexity": 12.2, "bits_per_byte": 1.3}
FOUND["positions"] = [{"first": 1, "last": 32, "loss": 2.5}]
EVALUATION = {"step": 4, "checkpoint": "c", "weights": "master", "total": FOUND, "tasks": {"quiz": {"acc": 0.5}}}
EVALUATION["needle"] = [{"length": 64, "depth": 0.5, "texts": 2, "found": 1, "nats": 3.0}]
EVALUATION["sources"] = [FOUND | {"name": name, "documents": "held out"} for name in ("first", "second")]


def of_kind(folder, kind):
    """All records of a kind, attempt after attempt."""
    return [getattr(record, kind) for record in run_records(folder) if record.HasField(kind)]


def tables(folder):
    """Columns and rows of every table that was logged, by name."""
    found = {}
    for path in folder.glob("wandb/offline-run-*/files/media/table/*.table.json"):
        found[path.name.rsplit("_", 2)[0]] = json.loads(path.read_text())
    return found


def alerts(folder):
    return [(alert.title, alert.text) for alert in of_kind(folder, "alert")]


def test_a_run_says_who_it_belongs_to_and_what_code_it_ran(tmp_path, monkeypatch):
    record_start(tmp_path)
    wandb.teardown()  # what another test of this process has set up has read its environment already
    for name, value in {"ENTITY": "team", "TAGS": "long,moe", "NOTES": "a try", "RUN_GROUP": "tries"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with open_writer(compose("log.wandb=offline", "name=rates/3"), tmp_path) as writer:
        for step, loss in enumerate((3.0, 2.0, 2.5), 1):
            writer.write({"step": step, "tokens": 100 * step, "main_loss": 3.0, "validation_loss": loss})
    run = of_kind(tmp_path, "run")[0]
    assert (run.entity, list(run.tags), run.notes, run.run_group) == ("team", ["long", "moe"], "a try", "tries")
    commit, modified = code_version()
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["code"] == {"commit": commit, "modified": modified} and run.git.commit == (commit or "")
    axes = {metric.name or metric.glob_name: metric for metric in of_kind(tmp_path, "metric")}
    assert axes["main_loss"].step_metric == axes["mtp_loss_*"].step_metric == "tokens"
    assert axes["validation_loss"].summary.min and axes["validation_loss"].summary.last
    summary = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for update in of_kind(tmp_path, "summary")
        for item in update.update
    }
    assert summary["validation_loss"] == {"min": 2.0, "last": 2.5}


@pytest.mark.slow
def test_checkpoints_are_references_and_samples_and_evaluations_tables(tmp_path):
    config = compose("log.wandb=offline", "name=shown")
    folder = tmp_path / "checkpoints" / "step_00000002"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * 1000)
    with open_writer(config, tmp_path) as writer:
        for step in (1, 2):
            writer.write({"step": step, "main_loss": 3.0})
        writer.show(checkpoint(2, folder))
        writer.show(sample_table(2, "def main():"))
    sink = open_wandb(config, tmp_path, print)
    sink.write(evaluation_tables(EVALUATION))
    sink.close()
    (artifact,) = [one for one in of_kind(tmp_path, "artifact") if one.type == "model"]
    (entry,) = artifact.manifest.contents
    assert entry.ref == f"{folder.as_uri()}/weights" and set(artifact.aliases) == {"step_00000002", "latest"}
    assert json.loads(artifact.metadata)["step"] == 2 and artifact.name.startswith("checkpoint-")
    shown = tables(tmp_path)
    assert shown["samples"]["data"] == [[2, "def main():"]]
    assert [row[3] for row in shown["evaluations"]["data"]] == ["first", "second", "together"]
    assert shown["evaluations"]["data"][0][-3:] == [2.5, 12.2, 1.3]
    assert shown["evaluated_positions"]["data"] == [[4, 1, 32, 2.5]]
    assert shown["evaluated_needle"]["columns"] == ["step", "length", "depth", "texts", "found", "nats"]
    assert shown["evaluated_needle"]["data"] == [[4, 64, 0.5, 2, 1, 3.0]]
    assert shown["evaluated_tasks"]["data"] == [[4, "quiz", "acc", 0.5]]
    assert [line["_step"] for line in history(tmp_path)] == [1, 2, 3, 3]  # a table stands behind the last step


@pytest.mark.parametrize(
    ("error", "title"),
    [
        (RunDiverged("10 steps in a row"), "diverged"),
        (DiskFailed("runs", "r", "is full", "free space"), "a file of the run could not be written"),
        (
            RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"),
            "a rank made no progress",
        ),
        (ValueError("what"), "crashed"),
    ],
)
def test_an_end_has_a_title(error, title):
    assert what_ended(error) == title


@pytest.mark.slow
def test_whoever_watches_is_told_of_divergence_restarts_slow_ranks_and_the_end(tmp_path, monkeypatch):
    def event(kind, text):
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": 1.0, "kind": kind, "attempt": 1, "text": text}) + "\n")

    event("straggler", "of an attempt before")
    event("failure", "rank 3 hung in a collective")
    monkeypatch.setenv("SLUICE_ATTEMPT", "2")
    config = compose("log.wandb=offline", "name=watched", "cluster=ray")
    with pytest.raises(RunDiverged), open_writer(config, tmp_path, resumed_step=40) as writer:
        writer.write({"step": 41})
        event("straggler", "rank 5 takes 1.4 times as long")
        writer.write({"step": 42})
        raise RunDiverged("10 steps in a row were not finite")
    event("failure", "rank 3 hung again")
    tell_of_end(config, tmp_path, 1)
    assert alerts(tmp_path) == [
        ("watched: restarted, attempt 2", "From step 40. rank 3 hung in a collective"),
        ("watched: a rank is slow", "rank 5 takes 1.4 times as long"),
        ("watched: diverged", "10 steps in a row were not finite"),
        ("watched: ended with exit code 1", "rank 3 hung again"),
    ]


@pytest.mark.slow
def test_a_full_disk_is_told(tmp_path):
    with open_writer(compose("log.wandb=offline", "name=told"), tmp_path) as writer:
        writer._sinks[0]._note("metrics.jsonl: a line could not be written")
    assert alerts(tmp_path) == [("told: metrics could not be written", "metrics.jsonl: a line could not be written")]


def test_an_item_that_fails_is_a_note_and_the_records_go_on(tmp_path):
    notes = []
    sink = open_wandb(compose("log.wandb=offline", "name=n"), tmp_path, notes.append)
    sink.write(checkpoint(1, tmp_path / "pruned" / "step_00000001"))
    sink.write({"step": 2})
    sink.close()
    assert len(notes) == 1 and "checkpoint" in notes[0] and "pruned" in notes[0]
    assert [line["_step"] for line in history(tmp_path)] == [2]
