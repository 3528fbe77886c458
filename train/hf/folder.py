"""Reads the headers of a folder of safetensors and checks whether its tensors match our model.

No torch. Nothing in the folder is executed.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from conf.disk import cure_of_reading, is_refusal
from conf.errors import UserError
from conf.files import read_json
from conf.schema import Model, ModelFamily
from train.hf.config import SCALE_BLOCK, read_model, scale_shape, some
from train.hf.families import FAMILIES, INDEX_ROPE, read_fields
from train.hf.tensor_names import MTP_NAMES, SCALE, PlacedTensor, tensors

STEMS = tuple({facts.stem: None for facts in FAMILIES.values()})
"""Prefixes of the names of weight files, such as `model`."""
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PLAIN_TYPES = ("F32", "BF16", "F16")
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")
FP8 = "F8_E4M3"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, as the header of a weight file describes it."""

    file: str
    dtype: str
    """The dtype's name in the safetensors format."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Folder:
    """The headers of a folder with safetensors, already checked for damage."""

    path: Path
    stored: dict[str, StoredTensor]
    field: str = "init_from"
    """The configuration key that error messages name."""
    family: ModelFamily = ModelFamily.deepseek_v3

    def refuse(self, rule: str, cure: str) -> UserError:
        return UserError(self.field, self.path, rule, cure)


def open_folder(path: Path, field: str = "init_from") -> Folder:
    """Read the headers of all weight files in a folder. Raises UserError."""
    folder = Folder(path, {}, field)
    if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        hub = re.fullmatch(r"[\w.-]+/([\w.-]+)", str(path))  # a name on the Hugging Face Hub
        cure = (
            f"`hf download {path} --local-dir {hub[1]}`, then set {field}={hub[1]}"
            if hub
            else "give a downloaded Hugging Face folder"
        )
        raise folder.refuse("no such folder", cure)
    try:
        files = _index(folder)
        _refuse_others(folder, files)
    except OSError as error:
        raise folder.refuse(f"cannot be read: {error.strerror or error}", cure_of_reading(error)) from error
    for file, names in files.items():
        here = read_header(folder, file)
        if absent := [name for name in names if name not in here]:
            raise folder.refuse(
                f"{file} lacks tensors that {_listing(folder)} assigns to it: {some(absent)}", "download it again"
            )
        if twice := [name for name in here if name in folder.stored]:
            raise folder.refuse(f"{file} has tensors that another file has, too: {some(twice)}", "download it again")
        folder.stored.update(here)
    return folder


def is_hf_folder(folder: Path) -> bool:
    """Whether this is a Hugging Face folder, not a run or checkpoint."""
    described = any(os.path.isfile(folder / facts.config_file) for facts in FAMILIES.values())
    return described and not os.path.exists(folder / "config.yaml")


def open_model(path: Path, field: str = "init_from", text_only: bool = False) -> tuple[Folder, Model, list[str]]:
    """Return the headers of a folder with external weights, its model, and notes for the user. Raises UserError.

    text_only: leave out tensors outside of the language model; otherwise they are an error. MTP modules are left out
    unless both config.json and the weights have them.
    """
    folder, model = open_folder(path, field), read_model(path, field)
    facts, _, body = read_fields(path, field)
    folder, notes = _language_model(replace(folder, family=facts.name), text_only)
    if facts.interleaved and INDEX_ROPE not in body:
        notes.append(
            f"{path}: its config.json lacks {INDEX_ROPE}: as in transformers, the RoPE of indexers rotates adjacent elements; if these weights need the other form, add the field with false"
        )
    found = _count_mtp(folder, model.layers)
    if found == model.mtp_depth:
        return folder, model, notes
    note = f"{path}: its config.json names {model.mtp_depth} MTP modules and its weights have {found}: the other modules are left out"
    return folder, replace(model, mtp_depth=min(found, model.mtp_depth)), [*notes, note]


def _language_model(folder: Folder, text_only: bool) -> tuple[Folder, list[str]]:
    """Return the folder with only the language model's tensors, and notes. Raises UserError."""
    parts = FAMILIES[folder.family].others
    counts = {part: sum(name.startswith(part) for name in folder.stored) for part in parts}
    named = ", ".join(f"{part}* ({count} tensors)" for part, count in counts.items() if count)
    if not named:
        return folder, []
    if not text_only:
        raise folder.refuse(
            f"has more than a language model: {named}, which Sluice does not train",
            "set text_only=true to read only the language model",
        )
    stored = {name: tensor for name, tensor in folder.stored.items() if not name.startswith(parts)}
    return replace(folder, stored=stored), [f"{folder.path}: left out because of text_only: {named}"]


def _count_mtp(folder: Folder, layers: int) -> int:
    """Return the number of MTP modules. They are stored as further layers; the first has the index `layers`."""
    found, name_of = 0, FAMILIES[folder.family].name_of
    while any(name_of(f"model.layers.{layers + found}.{name}") in folder.stored for name in MTP_NAMES):
        found += 1
    return found


def _refuse_others(folder: Folder, files: dict[str, list[str]]) -> None:
    """Raise UserError for weights that only another program would read."""
    names = sorted(file.name for file in folder.path.iterdir() if not file.name.startswith("."))
    if others := [name for name in names if name.endswith(".safetensors") and name not in files]:
        raise folder.refuse(
            f"has weight files that {_listing(folder)} does not list: {some(others)}",
            "move them out of the folder; if they belong to the model, download the index that lists them",
        )
    if ADAPTER_CONFIG in names:
        raise folder.refuse(
            f"has an adapter ({ADAPTER_CONFIG}), which would be ignored",
            "move the adapter to another folder and give it as adapter.path, or merge it into the weights",
        )


def index_of(stem: str) -> str:
    """Return the name of the index file. stem: prefix of file names."""
    return f"{stem}.safetensors.index.json"


def _listing(folder: Folder) -> str:
    """Return the file that lists the weights: an index or weight file."""
    for name in (*map(index_of, STEMS), *(f"{stem}.safetensors" for stem in STEMS)):
        if (folder.path / name).is_file():
            return name
    return f"{STEMS[0]}.safetensors"


def _index(folder: Folder) -> dict[str, list[str]]:
    """Return each weight file's tensor names, if there is an index. Raises UserError."""
    listing = _listing(folder)
    path = folder.path / listing
    if not listing.endswith(".json"):
        if path.is_file():
            return {listing: []}
        pickles = [file.name for kind in PICKLES for file in sorted(folder.path.glob(kind))]
        if pickles:
            raise folder.refuse(
                f"has no safetensors, only {some(pickles)}: pickle files can run any code and are never opened",
                "convert them to safetensors with a program that you trust",
            )
        raise folder.refuse(
            f"must contain {index_of(STEMS[0])} or {STEMS[0]}.safetensors", "give a downloaded Hugging Face folder"
        )
    weight_map = read_json(path, folder.field, "download it again", value=folder.path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise folder.refuse(f"{listing} cannot be read: its weight_map must map tensors to files", "download it again")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, []).append(name)
    if outside := [file for file in files if Path(file).name != file]:
        raise folder.refuse(f"{listing} must name files of this folder, not {some(outside)}", "download it again")
    here = {file.name for file in folder.path.iterdir()}
    if missing := [file for file in files if file not in here]:
        raise folder.refuse(f"lacks {len(missing)} of {len(files)} files: {some(missing)}", "download them")
    return files


def read_header(folder: Folder, file: str) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name. Raises UserError."""
    try:
        with safe_open(folder.path / file, framework="np") as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118, no mapping
            return {
                name: StoredTensor(file, each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()
            }
    except (SafetensorError, OSError) as error:
        if is_refusal(error):
            raise folder.refuse(f"{file} cannot be read: {error}", cure_of_reading(error)) from error
        raise folder.refuse(f"{file} is damaged or truncated: {error}", "download it again") from error


def match(folder: Folder, model: Model) -> list[PlacedTensor]:
    """Return the model's tensors that the folder contains. Raises UserError if they do not form the model.

    MTP modules' copies of embedding and head may be missing. MTP modules beyond model.mtp_depth are only checked.
    """
    held, stored = _count_mtp(folder, model.layers), folder.stored
    expected = list(tensors(replace(model, mtp_depth=max(model.mtp_depth, held)), folder.family))
    needed = [each.theirs for each in expected if each.theirs not in stored and not each.copy]
    if needed:
        name_of = FAMILIES[folder.family].name_of
        after = tuple(name_of(f"model.layers.{model.layers + depth}.") for depth in range(held, model.mtp_depth))
        raise folder.refuse(
            f"lacks {len(needed)} of the model's {len(expected)} tensors: {some(needed)}",
            f"set model.mtp_depth={held}: the folder has {held or 'no'} MTP module{'s' * (held > 1)}"
            if all(name.startswith(after) for name in needed)
            else "give the whole folder",
        )
    known = {each.theirs for each in expected}
    _check_scales(folder)
    # transformers writes an empty tensor without shared experts
    extra = [name for name in stored if not name.endswith(SCALE) and name not in known and 0 not in stored[name].shape]
    if extra:
        raise folder.refuse(
            f"has {len(extra)} tensors that do not belong to the model of its config.json: {some(extra)}",
            f"give weights of a plain {FAMILIES[folder.family].title}, with their config.json",
        )
    wrong = [
        f"{each.theirs} {stored[each.theirs].shape}, not {each.shape}"
        for each in expected
        if each.theirs in stored and stored[each.theirs].shape != each.shape
    ]
    if wrong:
        raise folder.refuse(
            f"{len(wrong)} tensors do not have the shape of its config.json: {some(wrong)}", "download it again"
        )
    wanted = {each.theirs for each in tensors(model, folder.family)}
    return [each for each in expected if each.theirs in stored and each.theirs in wanted]


def _check_scales(folder: Folder) -> None:
    """Raise UserError unless every FP8 weight has scales of the right shape, and all scales belong to an FP8 weight."""
    stored = folder.stored
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            continue
        if tensor.dtype not in (*PLAIN_TYPES, FP8):
            raise folder.refuse(f"{name} has type {tensor.dtype}", f"give weights in {', '.join((*PLAIN_TYPES, FP8))}")
        if tensor.dtype != FP8:
            continue
        scale = stored.get(name + SCALE)
        if scale is None:
            raise folder.refuse(f"{name} is FP8, and its scales {name + SCALE} are missing", "give the whole folder")
        blocks = scale_shape(tensor.shape)
        if scale.shape != blocks or len(blocks) != 2 or scale.dtype not in SCALE_TYPES:
            raise folder.refuse(
                f"{name + SCALE} must have one number for each {SCALE_BLOCK}x{SCALE_BLOCK} block of {tensor.shape}, and is "
                f"{scale.dtype} {scale.shape}",
                "give weights with DeepSeek's blocks",
            )
    alone = [
        name for name in stored if name.endswith(SCALE) and getattr(stored.get(name[: -len(SCALE)]), "dtype", "") != FP8
    ]
    if alone:
        raise folder.refuse(f"has scales without an FP8 weight: {some(alone)}", "give the whole folder")
