"""Folders and targets that cannot work: each is named before anything starts, and nothing is half-written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conf.errors import EXIT_USER, UserError
from conf.load import compose
from conf.run_paths import RunPaths
from conf.schema import Model
from parallel.shard import whole
from tests.checkpoint.world import checkpointers, save
from tests.hf.small import FP8, MODEL, random_tensors, write_folder
from tests.small import arguments, train
from tests.test_read_json import BAD
from train.checkpoint.stored_weights import load_hf_model
from train.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from train.export.run import export
from train.generate.source import start_token
from train.hf.folder import is_hf_folder, match, open_folder
from train.hf.tensor_names import tensors
from train.hf.tokenizer_files import check_tokenizer, with_words_of, write_tokenizer

torch.set_num_threads(1)

MTP = Model(**(MODEL | {"mtp_depth": 1}))
TOKENIZER = Tokenizer(train_bpe(["some text"], 300))
FP8_WEIGHT = "model.layers.1.self_attn.o_proj.weight"


def check(folder: Path, model: Model = MTP) -> None:
    match(open_folder(folder), model)


def refused(folder: Path, rule: str, model: Model = MTP) -> UserError:
    with pytest.raises(UserError, match=rule) as caught:
        check(folder, model)
    assert caught.value.field == "init_from" and caught.value.value == folder and caught.value.cure
    return caught.value


@pytest.fixture
def sound(tmp_path) -> Path:
    folder = write_folder(tmp_path / "in", MTP, random_tensors(MTP, "fp8"), **FP8)
    check(folder)
    return folder


def test_no_folder_no_weights_or_only_pickles(tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    refused(
        Path("someone/Model-16B"),
        r"`hf download someone/Model-16B --local-dir Model-16B`, then set init_from=Model-16B",
    )
    refused(tmp_path / ("a" * 300), "no such folder")
    assert not is_hf_folder(tmp_path / ("a" * 300))
    with pytest.raises(UserError, match="File name too long"):
        load_tokenizer("a" * 300)
    refused(tmp_path, r"must contain model\.safetensors\.index\.json or model\.safetensors")
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    refused(tmp_path, r"no safetensors, only pytorch_model-00001-of-00002\.bin: pickle files can run any code")
    (tmp_path / "pytorch_model-00001-of-00002.bin").rename(tmp_path / "weights.pt")
    refused(tmp_path, r"weights\.pt")


def test_missing_truncated_and_garbled_files(sound):
    second = sound / "model-00002-of-00003.safetensors"
    data = second.read_bytes()
    for damaged in (data[: len(data) // 2], data[:5], b"", b"x" * 100):
        second.write_bytes(damaged)
        refused(sound, r"model-00002-of-00003\.safetensors is damaged or truncated")
    second.unlink()
    refused(sound, r"lacks 1 of 3 files: model-00002-of-00003\.safetensors")
    shutil.copy(sound / "model-00001-of-00003.safetensors", second)
    refused(sound, r"lacks tensors that model\.safetensors\.index\.json assigns to it")


def test_a_broken_index(sound):
    index = sound / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        refused(sound, r"index\.json cannot be read")
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other/model.safetensors"}}))
    refused(sound, r"must name files of this folder, not \.\./other")
    index.unlink()
    refused(sound, r"must contain model\.safetensors\.index\.json")


def changed(path: Path, kind: str, change, model: Model = MTP) -> Path:
    found = random_tensors(model, kind)
    change(found)
    return write_folder(path, model, found, **(FP8 if kind == "fp8" else {}))


@pytest.mark.parametrize("name", BAD)
def test_no_json_of_a_folder_ends_in_a_traceback(sound, name):
    content, _ = BAD[name]
    write_tokenizer(sound, TOKENIZER, 100)
    load_hf_model(sound)
    for file, read in (
        ("config.json", lambda: load_hf_model(sound)),
        ("model.safetensors.index.json", lambda: load_hf_model(sound)),
        ("tokenizer.json", lambda: check_tokenizer(sound, TOKENIZER, None)),
        ("tokenizer.json", lambda: load_tokenizer(str(sound))),
        ("tokenizer_config.json", lambda: load_tokenizer(str(sound))),
        ("tokenizer_config.json", lambda: start_token(sound, TOKENIZER)),
        ("tokenizer_config.json", lambda: write_tokenizer(sound, with_words_of(TOKENIZER, sound, None), 100)),
    ):
        path = sound / file
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read()
        assert file in str(caught.value) or (file == "tokenizer.json" and str(sound) in str(caught.value))
        assert caught.value.cure and len(str(caught.value)) < 500
        path.write_bytes(before)
    header = len(content).to_bytes(8, "little") + content
    (sound / "model-00002-of-00003.safetensors").write_bytes(header)
    refused(sound, r"model-00002-of-00003\.safetensors is damaged or truncated")


def test_values_of_a_wrong_type_in_the_other_files(sound):
    write_tokenizer(sound, TOKENIZER, 100)
    index, settings = sound / "model.safetensors.index.json", sound / "tokenizer_config.json"
    for weight_map in ({"a": 3}, {"a": ["b"]}, None, [], "a"):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(sound, "its weight_map must map tensors to files")
    index.write_text(json.dumps({"weight_map": {"a": "b" * 300, "b": "a\0"}}))
    refused(sound, "lacks 2 of 2 files")
    for token in (5, ["a"], {"content": {}}):
        settings.write_text(json.dumps({"eos_token": token, "bos_token": token, "add_bos_token": True}))
        with pytest.raises(UserError, match="its eos_token must be the name of a token"):
            load_tokenizer(str(sound))
        with pytest.raises(UserError, match="its bos_token must be the name of a token"):
            start_token(sound, TOKENIZER)
    settings.write_text(json.dumps({"add_bos_token": True, "bos_token": None}))
    with pytest.raises(UserError, match="its bos_token None is not in the tokenizer"):
        start_token(sound, TOKENIZER)


@pytest.mark.parametrize("name", ["model.layers", "model.layers.\u00b2.a", "model.layers." + "9" * 5000 + ".a"])
def test_names_of_tensors_that_are_no_layers(tmp_path, name):
    refused(
        changed(tmp_path / "a", "bf16", lambda t: t.update({name: torch.ones(3)})), "do not belong to .*: model.layers"
    )


def test_scales_without_weights_and_weights_without_scales(tmp_path):
    scale = FP8_WEIGHT + "_scale_inv"
    refused(changed(tmp_path / "a", "fp8", lambda t: t.pop(scale)), rf"{FP8_WEIGHT} is FP8, and its scales .* missing")
    refused(
        changed(tmp_path / "b", "fp8", lambda t: t.update({FP8_WEIGHT: t[FP8_WEIGHT].bfloat16()})), "scales without"
    )
    refused(
        changed(tmp_path / "c", "bf16", lambda t: t.update({scale: torch.ones(1, 1)})), "scales without an FP8 weight"
    )
    refused(
        changed(tmp_path / "d", "fp8", lambda t: t.update({scale: torch.ones(2, 1)})), "one number for each 128x128"
    )


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scales_that_no_quantiser_writes(tmp_path, scale):
    bad = changed(tmp_path / "a", "fp8", lambda t: t[FP8_WEIGHT + "_scale_inv"].view(-1)[-1:].fill_(scale))
    with pytest.raises(UserError, match=rf"{FP8_WEIGHT}_scale_inv must have only scales above 0"):
        load_hf_model(bad)


def test_wrong_shapes_missing_and_extra_tensors(tmp_path):
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    error = refused(
        changed(tmp_path / "a", "bf16", lambda t: t.update({name: t[name][:8]})),
        rf"1 tensors do not have the shape.*{name}",
    )
    assert "(8, 32), not (16, 32)" in error.rule
    refused(changed(tmp_path / "b", "bf16", lambda t: t.pop(name)), rf"lacks 1 of the model's \d+ tensors: {name}")
    refused(
        changed(tmp_path / "c", "bf16", lambda t: t.update(odd=torch.ones(3))), "1 tensors .* do not belong to .*: odd"
    )
    refused(changed(tmp_path / "d", "bf16", lambda t: t.update({name: t[name].int()})), "has type I32")
    plain = write_folder(tmp_path / "e", Model(**MODEL), random_tensors(Model(**MODEL), "bf16"))
    assert refused(plain, "lacks").cure.startswith("set model.mtp_depth=0")
    check(changed(tmp_path / "f", "bf16", lambda t: None), Model(**MODEL))  # one module too many is left alone
    copies = [each.theirs for each in tensors(MTP) if each.copy]
    check(changed(tmp_path / "g", "bf16", lambda t: [t.pop(name) for name in copies]))  # and copies may be left out


def test_values_that_mean_nothing(tmp_path):
    bad = changed(tmp_path / "a", "bf16", lambda t: t["lm_head.weight"].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(UserError, match=r"lm_head\.weight has values that are not finite"):
        load_hf_model(bad)
    copy = "model.layers.3.embed_tokens.weight"
    other = changed(tmp_path / "b", "bf16", lambda t: t[copy].view(-1)[-1:].add_(1))
    with pytest.raises(UserError, match=rf"{copy} must be a copy of embedding\.weight"):
        load_hf_model(other)


def test_another_tokenizer(tmp_path):
    ours = Tokenizer(train_bpe(["some text of ours, some text"], 300))
    theirs = Tokenizer(train_bpe(["quite other words were here"], 300))
    assert "has no tokenizer.json" in check_tokenizer(tmp_path, ours, None)[0]
    write_tokenizer(tmp_path, theirs, 100)
    with pytest.raises(UserError, match="must be the tokenizer of the weights") as caught:
        check_tokenizer(tmp_path, ours, None)
    assert caught.value.field == "data.tokenizer" and caught.value.cure == f"set data.tokenizer={tmp_path}"
    body = json.loads(ours.json_text)
    body["model"]["merges"] = [" ".join(merge) for merge in body["model"]["merges"]]  # an older spelling
    (tmp_path / "tokenizer.json").write_text(json.dumps(body, indent=3))
    assert check_tokenizer(tmp_path, ours, None) == []
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        check_tokenizer(tmp_path, ours, None)


def checkpoint(tmp_path: Path, model: Model, **meta) -> list[str]:
    """A checkpoint of random weights; returns overrides that export it."""
    base = arguments(tmp_path, "name=a", *(f"model.{key}={getattr(model, key)}" for key in MODEL))
    paths = RunPaths(compose(*base))
    shards = {}
    for each in tensors(model):
        shards.setdefault(each.ours, whole(torch.randn(each.whole)))
    tokenizer = Tokenizer(train_bpe(["a few words"], 300))
    known = {"has_ema": False, "tokenizer": tokenizer.fingerprint, "seq_len": 24} | meta
    assert save(checkpointers(paths.checkpoints, 1), 1, [shards], **known)[0].ok
    tokenizer.save(paths.path)
    return [*base, "mode=export"]


@pytest.mark.slow
def test_targets_that_cannot_be(tmp_path, monkeypatch):
    base = checkpoint(tmp_path, MTP)
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("")
    for target, rule in (
        (full, "must be empty"),
        (full / "precious", "is a file"),
        (full / "precious" / "out", "cannot be written"),
    ):
        with pytest.raises(UserError, match=rule) as caught:
            export(compose(*base, f"export.to={target}"))
        assert caught.value.field == "export.to"
    with pytest.raises(UserError, match="needs a folder"):
        compose(*base)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"no disk space: the folder takes 0\.1 GB, and 0\.0 GB are free"):
        export(compose(*base, f"export.to={tmp_path / 'out'}"))
    assert {file.name for file in tmp_path.iterdir()} == {"corpus", "runs", "full"}


@pytest.mark.slow
def test_checkpoints_that_cannot_be_exported(tmp_path):
    base = checkpoint(tmp_path, MTP)
    to = f"export.to={tmp_path / 'out'}"
    step = next((tmp_path / "runs" / "a" / "checkpoints").glob("step_*"))
    for overrides, field, rule in (
        (["export.ema=true"], "export.ema", "holds no average"),
        (["name=other"], "name", "must be a run with a checkpoint"),
        (["export.checkpoint=/nowhere"], "export.checkpoint", "does not exist"),
        (["model.layers=2"], "export.checkpoint", r"\d+ tensors do not fit"),
        (["model.hidden=64"], "export.checkpoint", r"\d+ tensors do not fit, such as master\.embedding"),
    ):
        with pytest.raises(UserError, match=rule) as caught:
            export(compose(*base, to, *overrides))
        assert caught.value.field == field
    Tokenizer(train_bpe(["other words"], 300)).save(tmp_path / "runs" / "a")
    with pytest.raises(UserError, match="its fingerprint differs"):
        export(compose(*base, to))
    (tmp_path / "runs" / "a" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        export(compose(*base, to))
    data = next(step.glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-9])
    with pytest.raises(UserError, match="no checkpoint of this run is intact"):
        export(compose(*base, to))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("train.export.run.SHARD_BYTES", 1e4)
    base = checkpoint(tmp_path, MTP)
    data = next((tmp_path / "runs" / "a" / "checkpoints").glob("step_*/*.safetensors"))
    raw = bytearray(data.read_bytes())
    raw[-5] ^= 1  # its size is right, its checksum is not
    data.write_bytes(raw)
    with pytest.raises(UserError, match="checksum of block"):
        export(compose(*base, f"export.to={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_exit_code_2_before_anything_is_started(tmp_path):
    save_file({"odd": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    done = train(tmp_path, "name=a", f"init_from={tmp_path}")
    assert done.returncode == EXIT_USER, done.stderr
    assert "error: init_from = " in done.stderr and "names LlamaForCausalLM" in done.stderr
    (tmp_path / "config.json").write_text("[" * 200_000)
    done = train(tmp_path, "name=a", f"init_from={tmp_path}")
    assert done.returncode == EXIT_USER and "Traceback" not in done.stderr
    assert f"error: init_from = {tmp_path / 'config.json'}" in done.stderr and "too many nested" in done.stderr
    assert "cure: download it again" in done.stderr and not (tmp_path / "runs").exists()
