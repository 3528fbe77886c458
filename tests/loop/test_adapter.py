"""Adapters in complete runs: the base does not change, checkpoints have only the adapter, and bad input is refused
before a start."""

import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conf.adapters import ADAPTER_TARGETS, is_adapter
from conf.errors import UserError
from conf.load import compose
from conf.schema import AdapterTarget
from tests.layouts import run_layout
from tests.small import SMALL, arguments, metrics
from train.__main__ import check_before_start
from train.checkpoint.average import write_average
from train.checkpoint.manifest import holds_adapter, read_manifest
from train.checkpoint.stored_weights import load_hf_model, load_model
from train.checkpoint.trained_with import describe_base
from train.export.run import write_export
from train.hf.adapter_folder import ADAPTER_FILE, BASE_WEIGHTS
from train.hf.folder import open_folder

LORA = ["adapter=lora", "adapter.rank=8", "optim.bias_speed=[{value: 0}]", "optim.lr=0.01"]


SHARD = "model-00001-of-00001.safetensors"


def losses(folder: Path, name: str) -> list[float]:
    return [record["loss"] for _, record in sorted(metrics(folder, name).items())]


@pytest.mark.slow
def test_a_run_trains_the_adapter_alone_and_goes_on_in_another_layout(tmp_path):
    run_layout(tmp_path, "base", 1, "steps=2")
    start = [*LORA, f"init_from={tmp_path}/runs/base", f"data.tokenizer={tmp_path}/runs/base"]
    run_layout(tmp_path, "whole", 1, *start[3:], "steps=1")
    run_layout(tmp_path, "one", 1, *start, "steps=4", "optim.ema_decay=0.5")
    assert losses(tmp_path, "one")[0] == losses(tmp_path, "whole")[0], (
        "B is 0: the loss is that of the base, bit for bit"
    )

    checkpoint = read_manifest(tmp_path / "runs/one/checkpoints/step_00000004")
    kinds = {name.split(".", 1)[0] for name in checkpoint.tensors}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "ema", "running"}
    assert all(is_adapter(name) for name in checkpoint.tensors if not name.startswith("running."))
    assert checkpoint.meta["base"]["path"].endswith("base/checkpoints/step_00000002")

    run_layout(tmp_path, "two", 1, *start, "steps=4", "optim.ema_decay=0.5", "checkpoint.every=1")
    on_the_host = ["parallel.ep=2", "parallel.zero=2", "parallel.offload_optimizer=true"]
    for step, moved in ((1, on_the_host), (2, ["parallel.zero=3"])):
        for later in range(step + 1, 5):
            shutil.rmtree(tmp_path / f"runs/two/checkpoints/step_{later:08}")
        more = ["parallel.dp=2", *moved, "steps=4", "optim.ema_decay=0.5", "checkpoint.every=1"]
        run_layout(tmp_path, "two", 2, *start, *more)
    assert losses(tmp_path, "two")[1:] == pytest.approx(losses(tmp_path, "one")[1:], rel=1e-5)


def export(tmp_path: Path, name: str, *words: str) -> Path:
    config = compose(*arguments(tmp_path, "mode=export", f"export.to={tmp_path}/{name}", "export.dtype=fp32", *words))
    assert write_export(config, lambda *_: None)
    return tmp_path / name


def test_an_adapter_knows_every_weight_of_its_base(tmp_path, capsys):
    """One changed value of an expert, which no sample of the files' bytes has, and a base that has the adapter in it already."""
    run_layout(tmp_path, "base", 1, "steps=1")
    base = export(tmp_path, "base_hf", "name=base")
    start = [*LORA, f"init_from={base}", f"data.tokenizer={tmp_path}/runs/base", "checkpoint.every=1"]
    run_layout(tmp_path, "one", 1, *start, "steps=1")
    run_layout(tmp_path, "two", 2, *start, "steps=1", "parallel.dp=2", "parallel.ep=2", "parallel.zero=3")
    folders = [tmp_path / f"runs/{name}/checkpoints/step_00000001" for name in ("one", "two")]
    one, two = (read_manifest(folder).meta["base"] for folder in folders)
    assert one["weights"] == two["weights"]

    given = ["name=one", *start]
    adapter, merged = export(tmp_path, "adapter", *given), export(tmp_path, "merged", *given, "export.merge=true")
    load_hf_model(base, adapter=str(adapter))
    with pytest.raises(UserError, match="is an adapter of other base weights"):
        load_hf_model(merged, adapter=str(adapter))
    beside = ["name=base", f"adapter.path={adapter}", "export.merge=true"]
    assert load_file(export(tmp_path, "again", *beside) / SHARD).keys() == load_file(merged / SHARD).keys()

    older = shutil.copytree(adapter, tmp_path / "older")
    with safe_open(adapter / ADAPTER_FILE, framework="pt") as opened:
        said = {key: value for key, value in opened.metadata().items() if key != BASE_WEIGHTS}
    save_file(load_file(adapter / ADAPTER_FILE), older / ADAPTER_FILE, metadata=said)
    load_hf_model(base, adapter=str(older))
    assert "of an earlier version" in capsys.readouterr().out

    raw, quick = (base / SHARD).read_bytes(), describe_base(open_folder(base))
    size = int.from_bytes(raw[:8], "little")
    places = [one["data_offsets"][0] for name, one in json.loads(raw[8 : 8 + size]).items() if ".experts." in name]
    for place in (8 + size + place for place in places):
        (base / SHARD).write_bytes(raw[:place] + struct.pack("<f", 0.5) + raw[place + 4 :])
        if describe_base(open_folder(base)) == quick:
            break
    check_before_start(compose(*arguments(tmp_path, *given, "steps=2")))
    with pytest.raises(AssertionError, match="has other weights than the base of the adapter in"):
        run_layout(tmp_path, "one", 1, *start, "steps=2")
    with pytest.raises(UserError, match="has other weights than the base of the adapter in"):
        load_model(compose(*arguments(tmp_path, *given)), folders[0], torch.device("cpu"))


def test_an_adapter_beside_frozen_experts_trains_as_in_one_process(tmp_path):
    run_layout(tmp_path, "base", 1, "steps=2")
    start = [
        *LORA,
        f"init_from={tmp_path}/runs/base",
        f"data.tokenizer={tmp_path}/runs/base",
        "adapter.targets=[out,shared]",
    ]
    run_layout(tmp_path, "one", 1, *start, "steps=3", "parallel.zero=2")
    for zero in (1, 2, 3):
        run_layout(
            tmp_path, f"zero{zero}", 2, *start, "steps=3", "parallel.dp=2", "parallel.ep=2", f"parallel.zero={zero}"
        )
        assert losses(tmp_path, f"zero{zero}") == pytest.approx(losses(tmp_path, "one"), rel=1e-5)


def test_the_best_checkpoint_of_an_adapter_is_kept(tmp_path):
    """The rate is so large that the loss falls and then rises, so that the best is none of the last."""
    run_layout(tmp_path, "base", 1, "steps=2")
    rates = ["optim.lr_schedule=[{until: 0.5, value: 1.0}, {until: 1.0, value: 3000.0}]", "optim.warmup_steps=0"]
    kept = ["checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_best=true", "log.validate_every=1"]
    given = [f"init_from={tmp_path}/runs/base", f"data.tokenizer={tmp_path}/runs/base"]
    run_layout(tmp_path, "best", 1, *LORA, *given, *rates, *kept, "optim.clip=0", "steps=4")
    losses = {step: record["validation_loss"] for step, record in metrics(tmp_path, "best").items()}
    best = json.loads((tmp_path / "runs/best/best.json").read_text())
    assert best["step"] == min(losses, key=losses.get) < 4
    folders = sorted((tmp_path / "runs/best/checkpoints").glob("step_*"))
    assert [int(folder.name[5:]) for folder in folders] == [best["step"], 4]
    assert holds_adapter(read_manifest(folders[0]).meta)


@pytest.mark.slow
def test_a_base_in_block_fp8_is_the_rounded_one(tmp_path):
    run_layout(tmp_path, "base", 1, "steps=2")
    given = [f"init_from={tmp_path}/runs/base", f"data.tokenizer={tmp_path}/runs/base", "steps=3"]
    start = [*LORA, *given, "adapter.base=fp8", "precision=bf16"]
    run_layout(tmp_path, "one", 1, *start)
    run_layout(tmp_path, "zero3", 2, *start, "parallel.dp=2", "parallel.zero=3")
    assert losses(tmp_path, "zero3") == pytest.approx(losses(tmp_path, "one"), rel=2e-4)
    marks = [
        read_manifest(tmp_path / f"runs/{name}/checkpoints/step_00000003").meta["base"]["weights"]
        for name in ("one", "zero3")
    ]
    assert marks[0] == marks[1]

    # The merged weights of a run whose B is 0 are the base's blocks, which a tune of whole weights then starts from.
    first = [*start, "optim.lr=1e-30", "steps=1"]
    run_layout(tmp_path, "still", 1, *first)
    export(tmp_path, "rounded", *first, "name=still", "export.merge=true", "export.dtype=fp32")
    run_layout(tmp_path, "whole", 1, f"init_from={tmp_path}/rounded", *given[1:2], "steps=1", "precision=bf16", LORA[2])
    assert losses(tmp_path, "whole")[0] == losses(tmp_path, "one")[0] == losses(tmp_path, "still")[0]

    # Whoever reads the run has the rounded base and the adapter: its modes, its merged folder, and its adapter's folder beside the base.
    config = compose(*arguments(tmp_path, *start, "name=one", "precision=fp32"))
    own = load_model(config, tmp_path / "runs/one/checkpoints/step_00000003", torch.device("cpu")).state_dict()
    given = ["name=one", *start, "export.dtype=fp32"]
    base = export(tmp_path, "base_hf", "name=base", "export.dtype=fp32")
    merged, adapter = export(tmp_path, "merged", *given, "export.merge=true"), export(tmp_path, "adapter", *given)
    beside = export(
        tmp_path, "beside", "name=base", f"adapter.path={adapter}", "export.merge=true", "export.dtype=fp32"
    )
    for model in (load_hf_model(merged)[1], load_hf_model(base, adapter=str(adapter))[1], load_hf_model(beside)[1]):
        assert all(torch.equal(values, own[name]) for name, values in model.state_dict().items())
    with pytest.raises(UserError, match=r"set adapter\.base=fp8"):
        check_before_start(compose(*arguments(tmp_path, *start, "name=one", "adapter.base=plain", "steps=4")))


@pytest.mark.slow
def test_what_an_adapter_cannot_go_on_from(tmp_path):
    for name in ("base", "other"):
        run_layout(tmp_path, name, 1, "steps=1", f"seed={len(name)}")
    given = [f"data.tokenizer={tmp_path}/runs/base", "steps=2"]
    base = [f"init_from={tmp_path}/runs/base", *given]
    run_layout(tmp_path, "tuned", 1, *LORA, *base, "checkpoint.every=1")

    def refused(*words: str) -> str:
        config = compose(*arguments(tmp_path, *words))
        with pytest.raises(UserError) as error:
            check_before_start(config)
        return str(error.value)

    tuned = [*LORA, "name=tuned"]
    assert "has an adapter alone, and this run trains whole weights" in refused("name=tuned", *given)
    assert "has whole weights, and this run trains an adapter" in refused(*LORA, "name=base", *base)
    assert "adapter.rank=8" in refused(*tuned, *base, "adapter.rank=16")
    assert "adapter.targets=[q_up,kv_up,down,out,routed,shared,dense]" in refused(
        *tuned, *base, "adapter.targets=[out]"
    )
    assert "other weights than the base of the adapter" in refused(*tuned, *given, f"init_from={tmp_path}/runs/other")
    assert "merge the adapter first" in refused(*LORA, "name=next", *given, f"init_from={tmp_path}/runs/tuned")
    with pytest.raises(UserError, match="holds an adapter"):
        write_average(compose(*SMALL, "data.path=none", f"runs={tmp_path}/runs", "name=tuned", "mode=average",
                        "average.last=2", f"average.to={tmp_path}/mean"))  # fmt: skip


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["adapter.rank=8"], "adapter"),
        (["adapter.base=fp8"], "adapter"),
        (["adapter=lora"], "init_from"),
        (["adapter=lora", "init_from=X", "adapter.rank=0"], "adapter.rank"),
        (["adapter=lora", "init_from=X", "adapter.rank=4"], "adapter.rank"),
        (["adapter=lora", "init_from=X", "adapter.dropout=1"], "adapter.dropout"),
        (["adapter=lora", "init_from=X", "adapter.targets=[dense]", "model.dense_layers=0"], "adapter.targets"),
        (["adapter=lora", "init_from=X", "adapter.targets=[]"], "adapter.targets"),
        (["adapter=lora", "init_from=X", "adapter.targets=[out,out]"], "adapter.targets"),
        (["adapter=lora", "init_from=X", "adapter.targets=[routed]", "parallel.pp=2"], "adapter.targets"),
        (["adapter=lora", "init_from=X", "optim=muon"], "optim.name"),
        (["adapter=lora", "init_from=X"], "optim.bias_speed"),
        (["adapter=lora", "init_from=X", "optim=tune", "optim.qk_clip=100"], "optim.qk_clip"),
        (["adapter=lora", "init_from=X", "optim=tune", "adapter.targets=[head]", "optim.detach_mtp=true"], "adapter.targets"),
    ],
)  # fmt: skip
def test_what_no_adapter_can_be(words, key):
    with pytest.raises(UserError) as error:
        compose(*words)
    assert error.value.field == key


def test_targets_that_are_left_out_are_those_of_the_model():
    words = ["adapter=lora", "init_from=X", "optim=tune", "model.shared_experts=0", "model.dense_layers=0"]
    assert compose(*words).adapter.targets == ["q_up", "kv_up", "down", "out", "routed"]
    assert math.isclose(compose(*words, "adapter.alpha=8").adapter.scale, 0.5)


def test_every_target_says_what_it_adapts():
    assert [*ADAPTER_TARGETS] == [*AdapterTarget]
