"""mode=average: the mean of checkpoints from any layouts, and who may read the result."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from conf.errors import UserError
from parallel.shard import Shard
from tests.small import metrics, train
from train.api import compose
from train.checkpoint import average as averaging
from train.checkpoint.average import write_average
from train.checkpoint.manifest import read_manifest, verify
from train.checkpoint.read_shards import load_shards

KEPT = "checkpoints/step_0000000{}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of one process and one of two ranks, as both began."""
    folder = tmp_path_factory.mktemp("averaged")
    for words in (
        ["name=alone"],
        ["name=two", "parallel.dp=2", "parallel.ep=2", "seed=2", "data.tokenizer=runs/alone"],
    ):
        words = [word.replace("runs/", f"{folder}/runs/") for word in words]
        done = train(folder, *words)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything of a checkpoint that is averaged."""
    found = {}
    for name, entry in read_manifest(checkpoint).tensors.items():
        if name.startswith(averaging.AVERAGED_KINDS):
            found[name] = Shard(torch.empty(math.prod(entry.shape)), 0, entry.shape)
    load_shards(checkpoint, found)
    return {name: shard.local for name, shard in found.items()}


def made(folder: Path, *words: str) -> Path:
    """The checkpoint that mode=average wrote."""
    target = folder / "runs" / "mean"
    shutil.rmtree(target, ignore_errors=True)
    write_average(compose("mode=average", f"runs={folder / 'runs'}", f"average.to={target}", *words))
    return next(target.glob("checkpoints/step_*"))


@pytest.mark.slow
@pytest.mark.parametrize("elements", [1000, averaging.AVERAGED_ELEMENTS])
def test_it_is_the_mean_of_every_weight_and_bias(folder, monkeypatch, elements, capsys):
    monkeypatch.setattr(averaging, "AVERAGED_ELEMENTS", elements)
    runs = folder / "runs"
    sources = [runs / "alone" / KEPT.format(4), runs / "alone" / KEPT.format(6), runs / "two" / KEPT.format(6)]
    mean = made(folder, "average.last=2", f"average.of=[{runs / 'alone'},{sources[2]}]")
    assert not verify(mean, full=True)
    assert (read_manifest(mean).world_size == 1) == (elements > 1000)
    before, found = [weights(source) for source in sources], weights(mean)
    assert found.keys() == before[0].keys() and any(name.startswith("bias.") for name in found)
    for name, values in found.items():
        exact = sum(one[name].double() for one in before) / 3
        assert torch.equal(values, exact.float()), name
        assert name.startswith("bias.") or not torch.equal(values, before[1][name])
    assert "have different seeds" in capsys.readouterr().out


def test_the_mean_of_equal_weights_is_those_weights(folder):
    """And the new run has all files of the tokenizer."""
    (folder / "runs" / "alone" / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "runs" / "alone" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    shutil.copytree(folder / "runs" / "alone", folder / "runs" / "copy", dirs_exist_ok=True)
    mean = made(folder, f"average.of=[{folder}/runs/alone,{folder}/runs/copy]")
    one, other = weights(mean), weights(folder / "runs" / "alone" / KEPT.format(6))
    assert all(torch.equal(values, other[name]) for name, values in one.items())
    assert (folder / "runs" / "mean" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


@pytest.mark.slow
def test_a_mean_is_evaluated_exported_and_begun_from_but_no_training_goes_on_with_it(folder):
    made(folder, "name=alone", "average.last=3")
    run = folder / "runs" / "mean"
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "mean"
    for words in (
        ["mode=evaluate", "name=mean"],
        ["mode=generate", "name=mean", "generate.prompt=the", "generate.tokens=3"],
        ["mode=export", "name=mean", f"export.to={folder / 'exported'}"],
        ["name=begun", f"init_from={run}", "steps=1", f"data.tokenizer={run}"],
        ["name=exported", f"init_from={folder / 'exported'}", "steps=1", f"data.tokenizer={run}"],
    ):
        done = train(folder, *words)
        assert done.returncode == 0, done.stdout + done.stderr
    held_out = json.loads((run / "evaluate.json").read_text())["total"]["loss"]
    assert held_out == pytest.approx(metrics(folder, "begun")[1]["main_loss"], abs=0.2)
    losses = [metrics(folder, name)[1]["loss"] for name in ("begun", "exported")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # exported in bf16
    refused = train(folder, "name=mean")
    assert refused.returncode == 2 and "init_from=" in refused.stderr and "optimizer state" in refused.stderr


@pytest.mark.slow
def test_what_does_not_fit_together_is_refused_with_nothing_left_behind(folder):
    other = train(folder, "name=other", "model.route_scale=1.0", "steps=1", f"data.tokenizer={folder}/runs/alone")
    assert other.returncode == 0, other.stdout + other.stderr
    alone = folder / "runs" / "alone"
    damaged = folder / "runs" / "damaged" / KEPT.format(6)
    shutil.copytree(alone / KEPT.format(6), damaged, dirs_exist_ok=True)
    (damaged / "rank_00000.safetensors").write_bytes(b"")
    for words, said in (
        ([f"average.of=[{alone},{folder}/runs/other]"], "route_scale = 1.0 and not 2.5"),
        ([f"average.of=[{alone},{alone}]"], "these are 1"),
        ([f"average.of=[{alone},{damaged}]"], "must be intact"),
        ([f"average.of=[{alone},{folder}/nothing]"], "does not exist"),
        (["name=alone"], "average.last=3"),
    ):
        with pytest.raises(UserError, match=r"average\.of") as error:
            made(folder, *words)
        assert said in str(error.value)
        assert not list((folder / "runs").glob("*mean*"))
    with pytest.raises(UserError, match="must be empty"):
        write_average(
            compose("mode=average", "name=alone", f"runs={folder}/runs", "average.last=2", f"average.to={alone}")
        )
