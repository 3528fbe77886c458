"""Steps that torch's profiler records: names of our parts in the trace, the table, and an unchanged training."""

import gzip
import json

import pytest

from conf.errors import EXIT_OK, UserError
from conf.load import compose
from conf.schema import ROOT
from tests.ranks import run_module
from tests.small import arguments, environment
from train.loop.hooks.profiler import OTHER, PART_NAMES, TABLE_ROWS
from train.show.report import write_report


def watched(folder, name: str, *words: str):
    words = ("checkpoint.every=0", f"name={name}", *words)
    done = run_module("train", arguments(folder, *words), ROOT, environment())
    assert done.returncode == EXIT_OK, done.stdout + done.stderr
    return done.stdout


def names(file) -> set[str]:
    return {event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}


def losses(folder, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_is_watched_and_does_not_notice(tmp_path):
    said = watched(tmp_path, "watched", "steps=4", "profile.steps=[2,3]")
    run = tmp_path / "runs" / "watched"
    body = json.loads((run / "profile" / "rank_0.json").read_text())
    rows = body["rows"]
    assert body["steps"] == [2, 3] and len(rows) == TABLE_ROWS
    assert [row["seconds"] for row in rows] == sorted((row["seconds"] for row in rows), reverse=True)
    assert {row["part"] for row in rows} <= PART_NAMES | {OTHER} and len({row["part"] for row in rows}) > 2
    assert 0 < sum(row["share"] for row in rows) <= 1
    assert any("Backward" in row["operation"] and row["part"] != OTHER for row in rows), rows
    seen = names(run / "profile" / "rank_0.trace.json.gz")
    assert seen >= PART_NAMES and any("stage 0, micro-batch 0" in name for name in seen)
    assert "rank 0, steps 2 to 3" in said and "Perfetto" not in said and "ui.perfetto.dev" in said
    assert "Time by operation" in write_report(run).read_text()
    watched(tmp_path, "alone", "steps=4")
    assert losses(tmp_path, "watched") == losses(tmp_path, "alone")


@pytest.mark.slow
def test_of_several_ranks_those_that_are_named(tmp_path):
    layout = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.schedule=1f1b"]
    watched(tmp_path, "ranks", "steps=2", "profile.steps=[2,2]", "profile.ranks=[3]", *layout)
    run = tmp_path / "runs" / "ranks"
    assert [file.name for file in (run / "profile").iterdir() if file.suffix == ".json"] == ["rank_3.json"]
    seen = names(run / "profile" / "rank_3.trace.json.gz")
    assert {"dispatch", "attention", "optimizer"} <= seen and any("stage 1, micro-batch" in name for name in seen)
    assert "rank 3, step 2:" in (run / "logs" / "rank_3.log").read_text()


@pytest.mark.parametrize(
    "word, cure",
    [
        ("profile.steps=[3]", "write 'profile.steps=[10,12]'"),
        ("profile.steps=[4,3]", "write 'profile.steps=[10,12]'"),
        ("profile.steps=[300,301]", "raise steps, or choose earlier steps"),
        ("profile.ranks=[1]", "use 0"),
    ],
)
def test_wrong_steps_and_ranks_are_errors_with_a_cure(word, cure):
    with pytest.raises(UserError) as caught:
        compose(word)
    assert caught.value.cure == cure
