"""A folder of safetensors, by its headers: every tensor's file, type and shape, and whether they are those of our model.

Reads no weights and imports no torch: the driver checks a folder before anything is started. Nothing in it is executed:
files that only pickle can open are refused.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from conf.errors import UserError
from conf.read_json import read_json
from conf.schema import Model
from train.hf.config import BLOCK, read_model, scale_shape, some
from train.hf.names import SCALE, Placed, tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PLAIN = ("F32", "BF16", "F16")
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")
FP8 = "F8_E4M3"


@dataclass(frozen=True)
class Stored:
    """One tensor of the folder."""

    file: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Folder:
    """The headers of a folder, read and checked for damage."""

    path: Path
    stored: dict[str, Stored]
    field: str = "init_from"
    """What errors name."""

    def refuse(self, rule: str, cure: str) -> UserError:
        return UserError(self.field, self.path, rule, cure)


def open_folder(path: Path, field: str = "init_from") -> Folder:
    """Read all headers. Raises UserError for a folder without safetensors, a missing or truncated file."""
    folder = Folder(path, {}, field)
    if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise folder.refuse("no such folder", "give a downloaded Hugging Face folder")
    try:
        files = _index(folder)
    except OSError as error:
        raise folder.refuse(f"cannot be read: {error}", "give a folder that you may read") from error
    for file, names in files.items():
        here = _header(folder, file)
        if absent := [name for name in names if name not in here]:
            raise folder.refuse(f"{file} must hold what {INDEX} says, and lacks {some(absent)}", "download it again")
        if twice := [name for name in here if name in folder.stored]:
            raise folder.refuse(f"{file} holds what another file holds too: {some(twice)}", "download it again")
        folder.stored.update(here)
    return folder


def open_model(path: Path, field: str = "init_from") -> tuple[Folder, Model, list[str]]:
    """The headers of a folder, its model, and notes for the user: the one way to weights from elsewhere.

    MTP modules that config.json names and the weights lack, as transformers writes folders, are left out of the model.
    Raises UserError for a damaged folder and for a model that cannot be expressed.
    """
    folder, model = open_folder(path, field), read_model(path, field)
    found = 0
    while found < model.mtp_depth and any(
        name.startswith(f"model.layers.{model.layers + found}.") for name in folder.stored
    ):
        found += 1
    if found == model.mtp_depth:
        return folder, model, []
    note = f"{path}: its config.json names {model.mtp_depth} MTP modules and its weights hold {found}: the rest is left out"
    return folder, replace(model, mtp_depth=found), [note]


def _index(folder: Folder) -> dict[str, list[str]]:
    """The names that each file is said to hold; of a single file nothing is said."""
    path = folder.path / INDEX
    if not path.is_file():
        if (folder.path / SINGLE).is_file():
            return {SINGLE: []}
        pickles = [file.name for kind in PICKLES for file in sorted(folder.path.glob(kind))]
        if pickles:
            raise folder.refuse(
                f"holds no safetensors but {some(pickles)}: pickle files can run any code and are never opened",
                "convert them to safetensors with a program that you trust",
            )
        raise folder.refuse(f"must hold {INDEX} or {SINGLE}", "give a downloaded Hugging Face folder")
    weight_map = read_json(path, folder.field, "download it again", value=folder.path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise folder.refuse(
            f"{INDEX} cannot be read: its weight_map must give tensors their files", "download it again"
        )
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, []).append(name)
    if outside := [file for file in files if Path(file).name != file]:
        raise folder.refuse(f"{INDEX} must name files of this folder, not {some(outside)}", "download it again")
    here = {file.name for file in folder.path.iterdir()}
    if missing := [file for file in files if file not in here]:
        raise folder.refuse(f"lacks {len(missing)} of {len(files)} files: {some(missing)}", "download them")
    return files


def _header(folder: Folder, file: str) -> dict[str, Stored]:
    try:
        with safe_open(folder.path / file, framework="np") as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118, no mapping
            return {name: Stored(file, each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise folder.refuse(f"{file} is damaged or cut short: {error}", "download it again") from error


def match(folder: Folder, model: Model) -> list[Placed]:
    """The model's tensors that the folder holds, in its order. Raises UserError where they do not make up the model.

    MTP modules' copies of embedding and head may be absent. Modules beyond model.mtp_depth are left alone.
    """
    expected = list(tensors(model))
    absent = [each.theirs for each in expected if each.theirs not in folder.stored]
    needed = [name for name in absent if not name.endswith(("embed_tokens.weight", "shared_head.head.weight"))]
    needed += [name for name in absent if name == "model.embed_tokens.weight"]
    if needed:
        mtp = all(name.startswith(f"model.layers.{model.layers}.") for name in needed)
        raise folder.refuse(
            f"lacks {len(needed)} of the model's {len(expected)} tensors: {some(needed)}",
            "set model.mtp_depth=0: the folder has no MTP module" if mtp else "give the whole folder",
        )
    known = {each.theirs for each in expected}
    _check_scales(folder)
    weights = [name for name in folder.stored if not name.endswith(SCALE)]
    # a tensor without elements, as transformers writes for no shared experts, says nothing
    extra = [
        name
        for name in weights
        if name not in known and not _beyond(name, model) and 0 not in folder.stored[name].shape
    ]
    if extra:
        raise folder.refuse(
            f"holds {len(extra)} tensors that the model has no place for: {some(extra)}",
            "give weights of a plain DeepSeek-V3",
        )
    wrong = [
        f"{each.theirs} {folder.stored[each.theirs].shape}, not {each.shape}"
        for each in expected
        if each.theirs in folder.stored and folder.stored[each.theirs].shape != each.shape
    ]
    if wrong:
        raise folder.refuse(
            f"{len(wrong)} tensors have another shape than its config.json says: {some(wrong)}", "download it again"
        )
    return [each for each in expected if each.theirs in folder.stored]


def _beyond(name: str, model: Model) -> bool:
    """Whether a tensor belongs to an MTP module that this model does without."""
    layer = re.match(r"model\.layers\.([0-9]{1,9})\.", name)
    return layer is not None and int(layer[1]) >= model.layers + model.mtp_depth


def _check_scales(folder: Folder) -> None:
    """Every FP8 weight has its scales, of the right shape, and every scale its weight."""
    stored = folder.stored
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            continue
        if tensor.dtype not in (*PLAIN, FP8):
            raise folder.refuse(f"{name} has type {tensor.dtype}", f"give weights in {', '.join((*PLAIN, FP8))}")
        if tensor.dtype != FP8:
            continue
        scale = stored.get(name + SCALE)
        if scale is None:
            raise folder.refuse(f"{name} is FP8, and its scales {name + SCALE} are missing", "give the whole folder")
        blocks = scale_shape(tensor.shape)
        if scale.shape != blocks or len(blocks) != 2 or scale.dtype not in SCALE_TYPES:
            raise folder.refuse(
                f"{name + SCALE} must hold one number for each {BLOCK}x{BLOCK} block of {tensor.shape}, and is "
                f"{scale.dtype} {scale.shape}",
                "give weights with DeepSeek's blocks",
            )
    alone = [
        name for name in stored if name.endswith(SCALE) and getattr(stored.get(name[: -len(SCALE)]), "dtype", "") != FP8
    ]
    if alone:
        raise folder.refuse(f"holds scales without an FP8 weight: {some(alone)}", "give the whole folder")
