"""Small changes to a sound folder, every tensor and every field in turn: each is refused by name, or the same values go to the
same places. Weights that are read wrong without a word look like a model that trained badly."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conf.errors import UserError
from conf.schema import Model
from tests.hf.small import FP8, MODEL, random_tensors, released_config, write_folder
from train.checkpoint.stored_weights import load_hf_model
from train.export.written_tensors import write_json
from train.hf.config import read_model
from train.hf.folder import Folder, StoredTensor, match, open_model
from train.hf.tensor_names import tensors

SMALL = Model(**(MODEL | {"layers": 2, "experts": 4, "groups": 2, "top_k": 2, "mtp_depth": 1}))
KINDS = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
OWN = {"rope_theta", "rms_norm_eps", "routed_scaling_factor", "num_experts_per_tok", "topk_group", "n_group"}
"""Fields that no tensor can contradict: they change the model, as they say. Beside them the longest text."""


def headers(kind: str, model: Model = SMALL) -> dict[str, StoredTensor]:
    found = random_tensors(model, kind).items()
    return {name: StoredTensor("a.safetensors", KINDS[values.dtype], tuple(values.shape)) for name, values in found}


def renamed(name: str) -> list[str]:
    """Names near to this one."""
    parts = name.split(".")
    number = int(parts[2]) if parts[1] == "layers" else None
    layers = [] if number is None else [str(number + 1), str(number + 7), f"0{number}", f"+{number}", str(number - 1)]
    near = [".".join([*parts[:2], layer, *parts[3:]]) for layer in layers]
    return [
        *near,
        name.removesuffix(".weight"),
        f"{name}.weight",
        name.replace("model.", "module.model."),
        name.upper(),
    ]


def near(stored: dict[str, StoredTensor]) -> list[tuple[str, dict[str, StoredTensor]]]:
    """(what was done, the headers after it)."""
    found = []
    for name, tensor in stored.items():
        rest = {other: each for other, each in stored.items() if other != name}
        found.append((f"without {name}", rest))
        for other in renamed(name):
            found.append((f"{name} under the name {other}", rest | {other: tensor}))
            found.append((f"{name} also under the name {other}", {other: tensor} | stored))
        for shape in (tensor.shape[::-1], (*tensor.shape, 1), (tensor.shape[0] + 1, *tensor.shape[1:]), ()):
            found.append((f"{name} of shape {shape}", rest | {name: replace(tensor, shape=shape)}))
        for dtype in ("F64", "I8", "U32", "BOOL", "F8_E5M2", "F8_E8M0", "F8_E4M3"):
            found.append((f"{name} as {dtype}", rest | {name: replace(tensor, dtype=dtype)}))
    return [(done, changed) for done, changed in found if changed != stored]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("depth", [0, 1])
def test_every_tensor_goes_to_its_place_or_is_named(tmp_path, kind, depth):
    stored, model = headers(kind), replace(SMALL, mtp_depth=depth)
    sound = {
        (each.theirs, each.ours, each.start): stored[each.theirs] for each in match(Folder(tmp_path, stored), model)
    }
    copies = {each.theirs for each in tensors(SMALL) if each.copy}
    accepted = set()
    for done, changed in near(stored):
        try:
            placed = match(Folder(tmp_path, changed), model)
        except UserError as error:
            assert len(str(error)) < 3000 and error.cure, done
            continue
        read = {(each.theirs, each.ours, each.start): changed[each.theirs] for each in placed}
        missing = {name for name, *_ in sound.keys() - read.keys()}
        assert missing <= copies and read.items() <= sound.items(), done
        accepted.add(done)
    # a copy may be left out, and scales held in another type
    without = {f"without {name}" for name in copies}
    assert accepted <= without | {f"{name} as F8_E8M0" for name in stored if name.endswith("_scale_inv")}


def test_every_field_is_honoured_contradicted_by_the_tensors_or_refused(tmp_path):
    folder, body = Folder(tmp_path, headers("bf16")), released_config(SMALL)
    write_json(tmp_path / "config.json", body)
    before = read_model(tmp_path)
    match(folder, before)
    for name, value in body.items():
        for other in others(value):
            write_json(tmp_path / "config.json", body | {name: other})
            try:
                model = read_model(tmp_path)
                match(folder, replace(model, mtp_depth=min(model.mtp_depth, 1)))
            except UserError:
                continue
            if model != before:
                modules = name == "num_nextn_predict_layers"  # of which a note says how many there are
                assert name in OWN or name.startswith("max_position") or modules, f"{name} = {other!r}"


def others(value) -> list:
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int | float):
        return [value + 1, value - 1, value * 2, -value, str(value), None]
    return [None, f"other {value}", [value], {}]


@dataclass
class Case:
    """A folder whose config.json says less or more than its weights hold."""

    stored: Model
    said: Model
    rule: str


CASES = [
    Case(
        Model(**(MODEL | {"layers": 4})),
        Model(**MODEL),
        r"do not belong to the model of its config.json: model\.layers\.3\.",
    ),
    Case(
        Model(**(MODEL | {"layers": 4})),
        Model(**(MODEL | {"mtp_depth": 1})),
        r"do not belong to the model of its config.json: model\.layers\.3\.",
    ),
    Case(
        Model(**(MODEL | {"layers": 5})),
        Model(**MODEL),
        r"do not belong to the model of its config.json: model\.layers\.3\.",
    ),
    Case(
        Model(**(MODEL | {"mtp_depth": 1})),
        Model(**(MODEL | {"layers": 4})),
        r"do not belong to the model of its config.json: .*model\.layers\.3\.enorm",
    ),
    Case(
        Model(**(MODEL | {"layers": 4, "mtp_depth": 1})),
        Model(**(MODEL | {"mtp_depth": 1})),
        r"do not belong to the model of its config.json: model\.layers\.3\.",
    ),
    Case(Model(**(MODEL | {"dense_layers": 2})), Model(**MODEL), r"lacks .*model\.layers\.1\.mlp\.gate\.weight"),
    Case(Model(**MODEL), Model(**(MODEL | {"dense_layers": 0})), r"lacks .*model\.layers\.0\.mlp\.gate\.weight"),
    Case(
        Model(**MODEL),
        Model(**(MODEL | {"shared_experts": 0})),
        r"do not belong to the model of its config.json: model\.layers\.1\.mlp\.shared_experts",
    ),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_layers_that_config_json_does_not_name_are_refused(tmp_path, case, kind):
    folder = write_folder(
        tmp_path / "a", case.stored, random_tensors(case.stored, kind), **(FP8 if kind == "fp8" else {})
    )
    load_hf_model(folder)
    write_json(folder / "config.json", released_config(case.said) | (FP8 if kind == "fp8" else {}))
    with pytest.raises(UserError, match=case.rule) as caught:
        load_hf_model(folder)
    assert caught.value.value == folder and caught.value.cure


def test_a_module_that_config_json_does_not_name_is_said(tmp_path):
    model = Model(**(MODEL | {"mtp_depth": 1}))
    folder = write_folder(tmp_path / "a", model, random_tensors(model, "bf16"), num_nextn_predict_layers=0)
    _, found, notes = open_model(folder)
    assert (
        found.mtp_depth == 0
        and "names 0 MTP modules and its weights have 1: the other modules are left out" in notes[0]
    )
    whole = random_tensors(model, "bf16")
    del whole["model.layers.3.enorm.weight"]
    with pytest.raises(UserError, match=r"lacks 1 of .*: model\.layers\.3\.enorm\.weight"):
        load_hf_model(write_folder(tmp_path / "b", model, whole))


def test_weights_beside_those_of_the_index_are_refused(tmp_path):
    model = Model(**MODEL)
    folder = write_folder(tmp_path / "a", model, random_tensors(model, "bf16"))
    (folder / "._model-00001-of-00003.safetensors").write_bytes(b"of another system")
    load_hf_model(folder)
    for name in ("model.safetensors", "model-00004-of-00004.safetensors", "adapter_model.safetensors"):
        save_file({"lm_head.weight": torch.zeros(64, 32)}, folder / name)
        with pytest.raises(UserError, match=f"model.safetensors.index.json does not list: {name}"):
            load_hf_model(folder)
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has an adapter \(adapter_config\.json\)"):
        load_hf_model(folder)
    (folder / "adapter_config.json").unlink()
    single = write_folder(tmp_path / "b", model, random_tensors(model, "bf16"), files=1)
    (single / "model.safetensors.index.json").unlink()
    (single / "model-00001-of-00001.safetensors").rename(single / "model.safetensors")
    load_hf_model(single)
    save_file({"lm_head.weight": torch.zeros(64, 32)}, single / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors.* does not list: model-00002"):
        load_hf_model(single)


def test_an_index_that_names_what_is_not_there(tmp_path):
    model = Model(**MODEL)
    folder = write_folder(tmp_path / "a", model, random_tensors(model, "bf16"))
    index = folder / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    for changes, rule in (
        ({"model.norm.weight": "model-00009-of-00009.safetensors"}, "lacks 1 of 4 files"),
        (
            {"model.layers.9.input_layernorm.weight": "model-00001-of-00003.safetensors"},
            "lacks tensors that .*: model.layers.9.input",
        ),
        ({"lm_head.weight": other(body, "lm_head.weight")}, "lacks tensors that .* assigns to it: lm_head.weight"),
    ):
        index.write_text(json.dumps({"weight_map": body["weight_map"] | changes}))
        with pytest.raises(UserError, match=rule):
            load_hf_model(folder)


def other(index: dict, name: str) -> str:
    """A file of the folder that does not hold the tensor."""
    return next(file for file in sorted(index["weight_map"].values()) if file != index["weight_map"][name])


def test_a_tensor_twice_in_two_files_is_refused(tmp_path):
    model = Model(**MODEL)
    found = random_tensors(model, "bf16")
    folder: Path = write_folder(tmp_path / "a", model, found)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    second = sorted(set(index.values()))[1]
    here = {name: found[name] for name in found if index[name] == second}
    again = next(name for name in found if index[name] != second)
    save_file(here | {again: torch.zeros_like(found[again])}, folder / second)
    with pytest.raises(UserError, match=f"has tensors that another file has, too: {again}"):
        load_hf_model(folder)
