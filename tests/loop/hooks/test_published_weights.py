"""checkpoint.weights_every: complete folders while the run trains, and a link to the newest folder that is never
broken."""

import json
import os

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from tests.hf.small import read_folder
from tests.layouts import train_on
from tests.small import arguments
from train.export.run import export
from train.loop.hooks.published_weights import publish_weights

torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_newest_folder_is_what_an_export_gives(tmp_path, ranks):
    words = arguments(tmp_path, "name=loop", "checkpoint.every=2", "checkpoint.weights_every=2", f"parallel.dp={ranks}")
    config = compose(*words, "log.progress=false", "log.sample_tokens=0", "export.dtype=fp32")
    train_on(config, ranks)
    folder = tmp_path / "runs" / "loop" / "weights"
    assert sorted(os.listdir(folder)) == ["newest", "step_00000004", "step_00000006"]
    assert os.readlink(folder / "newest") == "step_00000006"
    where = ["mode=export", "name=loop", f"runs={tmp_path}/runs", "export.dtype=fp32"]
    export(compose(*where, f"export.to={tmp_path}/out"))
    got, want = read_folder(folder / "newest"), read_folder(tmp_path / "out")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    earlier = read_folder(folder / "step_00000004")
    assert not torch.equal(earlier["lm_head.weight"], want["lm_head.weight"])
    assert publish_weights(config, 6) == folder / "step_00000006"  # again, as by a run that was cut off there


def test_a_run_that_goes_back_replaces_its_later_folders_and_an_ended_run_writes_a_missing_one(tmp_path):
    words = ["log.progress=false", "log.sample_tokens=0", "steps=3", "checkpoint.every=1", "checkpoint.weights_every=1"]
    words = arguments(tmp_path, "name=back", *words)
    train_on(compose(*words), 1)
    folder, checkpoints = (tmp_path / "runs" / "back" / name for name in ("weights", "checkpoints"))
    first = read_folder(folder / "newest")["lm_head.weight"]
    train_on(compose(*words, f"resume={checkpoints}/step_00000001", "optim.lr=0.01"), 1)
    assert sorted(os.listdir(folder)) == ["newest", "step_00000002", "step_00000003"]
    second = read_folder(folder / "newest")["lm_head.weight"]
    assert not torch.equal(first, second)
    (folder / "step_00000003").rename(folder / ".step_00000003.77.tmp")  # killed after its last checkpoint
    train_on(compose(*words, "optim.lr=0.01"), 1)
    assert sorted(os.listdir(folder)) == ["newest", "step_00000002", "step_00000003"]
    assert torch.equal(read_folder(folder / "newest")["lm_head.weight"], second)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["checkpoint.every=4", "checkpoint.weights_every=6"], "a multiple of checkpoint.every = 4"),
        (["checkpoint.weights_every=100", "model.router={_target_: a.B}"], "custom code"),
    ],
)
def test_what_cannot_be_published_is_refused(words, rule):
    with pytest.raises(UserError, match=rule) as error:
        compose("conf=tiny", *words)
    assert error.value.field == "checkpoint.weights_every"


def test_a_family_that_cannot_describe_the_model_is_refused_before_the_first_step(tmp_path):
    sparse = ["model.sparse.heads=2", "model.sparse.head_dim=12", "model.sparse.pattern=FSFS", "log.progress=false"]
    words = [*sparse, "log.sample_tokens=0", "checkpoint.weights_every=2", "steps=2"]
    config = compose(*arguments(tmp_path, "name=wrong", *words, "export.family=deepseek_v32"))
    with pytest.raises(AssertionError, match="needs an indexer in every layer"):
        train_on(config, 1)
    assert not list((tmp_path / "runs" / "wrong" / "checkpoints").glob("step_*"))
    train_on(compose(*arguments(tmp_path, "name=own", *words)), 1)
    body = json.loads((tmp_path / "runs" / "own" / "weights" / "newest" / "config.json").read_text())
    assert body["architectures"] == ["GlmMoeDsaForCausalLM"] and body["indexer_types"] == ["full", "shared"] * 2
