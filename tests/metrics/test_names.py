"""The table of metric names against what a real run logs, to metrics.jsonl and to W&B, also over two attempts."""

import pytest

from tests.show.wandb_file import history
from tests.small import metrics, train
from train.metrics.names import EVENTS, LAYERS, SCALARS, WANDB, table_name

ELSEWHERE = {
    "after mode=plan of the same name and recipe",
    "after mode=plan of the same name and recipe, for this device",
    "parallel.pp > 1",
    "parallel.ep > 1",
    "parallel.schedule=dualpipev",
    "cluster=ray",
    "on GPUs",
    "model.sparse.heads > 0",
}
"""Conditions that this run does not meet; tests/loop/hooks/test_timeline_sampler.py, tests/test_layouts.py, tests/test_sparse_layouts.py and
tests/cluster do."""
TABLE = {metric.name for metric in (*SCALARS, *EVENTS, *LAYERS)}


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    """A run that reaches step 2, then one that resumes it to step 10."""
    tmp_path = tmp_path_factory.mktemp("names")
    options = ["model.mtp_depth=2", "precision=fp8_ue8m0", "precision.fp8.health.every=2", "name=names"]
    options += [
        "log.wandb=offline",
        "log.sample_tokens=0",
        "log.validate_every=2",
        "log.norms_every=2",
        "checkpoint.every=2",
        "optim.qk_clip=0.01",
        "optim.extra_loss={_target_: tests.own_term.squared_states}",
    ]
    for steps in (2, 10):
        done = train(tmp_path, *options, f"steps={steps}")
        assert done.returncode == 0, done.stderr
    return tmp_path


@pytest.mark.slow
def test_every_logged_name_is_documented_and_every_documented_one_logged(attempts):
    logged = {table_name(name) for record in metrics(attempts, "names").values() for name in record}
    assert logged == {metric.name for metric in (*SCALARS, *EVENTS, *LAYERS) if metric.when not in ELSEWHERE}


def test_what_has_no_condition_is_in_every_step(attempts):
    always = {metric.name for metric in (*SCALARS, *EVENTS, *LAYERS) if not metric.when}
    for record in metrics(attempts, "names").values():
        assert always <= set(record)


def test_types_are_those_of_the_table(attempts):
    for record in metrics(attempts, "names").values():
        for metric in SCALARS:
            if record.get(metric.name) is not None:
                kinds = (int, float) if metric.type is float else (int,)
                assert isinstance(record[metric.name], kinds), metric.name


def test_wandb_gets_documented_names_and_each_step_once(attempts):
    lines = history(attempts / "runs" / "names")
    assert [line["_step"] for line in lines] == list(range(1, 11))
    runs = {path.name.rpartition("-")[2] for path in (attempts / "runs/names/wandb").glob("offline-run-*")}
    assert len(runs) == 1, "both attempts belong to one W&B run"
    own = {"_step", "_runtime", "_timestamp"}  # W&B's
    parts = {"_type", "values", "bins", "packedBins"}  # of a histogram
    logged = set()
    for line in lines:
        for key in set(line) - own:
            name, _, part = key.rpartition("/")
            while part in parts or part in ("min", "size", "count"):
                key = name
                name, _, part = key.rpartition("/")
            logged.add(table_name(key))
    known = {metric.name for metric in SCALARS if metric.when not in ELSEWHERE} - {"step"}
    assert logged == known | {metric.name for metric in WANDB}
