"""Reads and checks the headers of a PEFT adapter folder. No torch."""

import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from conf.adapters import ADAPTER_TARGETS, name_lora, target_of
from conf.files import read_json
from conf.schema import Adapter, Model, ModelFamily
from train.hf.config import some
from train.hf.folder import ADAPTER_CONFIG, PLAIN_TYPES, Folder, read_header
from train.hf.tensor_names import PlacedTensor, tensors

# Names of LoRA A and B in a PEFT folder, and their positions in our parameters. Each matrix has a separate A and B
# (conf/adapters.py). Each A and B is one interval of one of our parameters, which may stack several matrices.

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Prefix that adapter folders put before the base model's tensor names."""
BASE_MARK = "base_mark"
"""Metadata key: a hash of the base model's final norm weight and of its embedding of token 0."""
BASE_WEIGHTS = "base_weights"
"""Metadata key: fingerprint of the adapter's base weights (train/checkpoint/weights_mark.py). May be missing."""
BASE_FORMAT = "base_format"
"""Metadata key: storage format of the adapter's base weights in training (adapter.base)."""


class AdaptedTensor(NamedTuple):
    """A matrix of the base model, with its LoRA A and B."""

    base: PlacedTensor
    a: PlacedTensor
    """LoRA A, of shape (rank, inputs)."""
    b: PlacedTensor
    """LoRA B, of shape (outputs, rank)."""


def adapted_tensors(model: Model, family: ModelFamily, targets: Collection[str], rank: int) -> Iterator[AdaptedTensor]:
    """Yield every matrix that `targets` selects, with A and B, in folder order."""
    for base in tensors(model, family):
        name = base.ours.removeprefix("master.")
        if base.copy or target_of(name) not in targets:
            continue
        *stack, _, width = base.whole
        names, rows = name_lora(name), base.shape[0]
        number, half = divmod(base.start // (rows * width), len(names))
        stem, ours = PREFIX + base.theirs.removesuffix(".weight"), names[half]
        a, b = (rank, width), (rows, rank)
        yield AdaptedTensor(
            base,
            PlacedTensor(f"{stem}.lora_A.weight", a, f"master.{ours.a}", number * rank * width, (*stack, *a)),
            PlacedTensor(f"{stem}.lora_B.weight", b, f"master.{ours.b}", number * rows * rank, (*stack, *b)),
        )


def peft_config(adapter: Adapter, adapted: list[AdaptedTensor], base: str) -> dict[str, Any]:
    """Return the content of adapter_config.json. base: location of the adapter's base weights.

    Dense and shared FFNs are listed as parameters, because PEFT may apply their module names only to experts. Dropout
    is 0, because PEFT cannot apply it to parameters.
    """
    modules, parameters = set(), set()
    for one in adapted:
        path = one.base.theirs.split(".")
        if target_of(one.base.ours.removeprefix("master.")) in ("dense", "shared"):
            parameters.add(".".join(path[-3:]))
        else:
            modules.add(path[-2])
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


ADAPTER_FIELD = "adapter.path"
PEFT_FIXED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "use_dora": False,
    "use_qalora": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "alora_invocation_tokens": None,
}
"""Fields of adapter_config.json with one allowed value, which may be missing.

With these values the adapter computes y = W x + scale B A x.
"""


KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights with which PEFT leaves the base weights as they are. PiSSA, OLoRA, CorDA, LoftQ and
LoRA-GA change them when PEFT loads the adapter."""


class AdapterFolder(NamedTuple):
    """An adapter folder that was checked and fits the model."""

    folder: Folder
    adapted: list[AdaptedTensor]
    """The matrices for which the adapter has A and B."""
    scale: float
    """The factor by which B A is multiplied."""
    base: str
    """Location of the base weights, according to adapter_config.json."""


def open_adapter(path: Path, model: Model, family: ModelFamily) -> AdapterFolder:
    """Read and check the headers of adapter.path. Raises UserError."""
    folder = Folder(path, {}, ADAPTER_FIELD)
    if not os.path.isdir(path):
        raise folder.refuse("no such folder", f"give a folder with {ADAPTER_CONFIG} and {ADAPTER_FILE}")
    lacking = [name for name in (ADAPTER_CONFIG, ADAPTER_FILE) if not (path / name).is_file()]
    if lacking:
        raise folder.refuse(
            f"lacks {' and '.join(lacking)}", "give an adapter folder of PEFT or export.to, in safetensors"
        )
    body = read_json(path / ADAPTER_CONFIG, ADAPTER_FIELD, "export it again")
    rank, scale = _read_settings(folder, body)
    folder.stored.update(read_header(folder, ADAPTER_FILE))
    return AdapterFolder(
        folder, _match_lora(folder, model, family, rank), scale, str(body.get("base_model_name_or_path"))
    )


def _read_settings(folder: Folder, body: dict[str, Any]) -> tuple[int, float]:
    """Return the rank of A and B, and the scale of B A. Raises UserError."""
    for key, value in PEFT_FIXED.items():
        if (found := body.get(key, value)) not in (value, None):
            raise folder.refuse(f"{key} must be {value}, and is {found!r:.80}", "give a plain LoRA adapter of one rank")
    if (start := body.get("init_lora_weights")) not in KEEPS_BASE:
        rule = f"init_lora_weights is {start!r:.80}, which changes the base weights"
        raise folder.refuse(rule, "save it with PEFT's path_initial_model_for_weight_conversion, as a plain LoRA")
    rank, alpha = body.get("r"), body.get("lora_alpha")
    if not isinstance(rank, int) or rank is True or rank < 1:
        raise folder.refuse(f"r must be a rank of at least 1, and is {rank!r:.80}", "export it again")
    if not isinstance(alpha, int | float) or alpha is True or not 0 < alpha < math.inf:
        raise folder.refuse(f"lora_alpha must be a number above 0, and is {alpha!r:.80}", "export it again")
    return rank, alpha / (math.sqrt(rank) if body.get("use_rslora") else rank)


def _match_lora(folder: Folder, model: Model, family: ModelFamily, rank: int) -> list[AdaptedTensor]:
    stored = folder.stored
    possible = list(adapted_tensors(model, family, ADAPTER_TARGETS, rank))
    known = {part.theirs: part for one in possible for part in (one.a, one.b)}
    if stacked := [name for name in stored if ".experts.lora_" in name or ".experts.base_layer." in name]:
        raise folder.refuse(
            f"holds experts stacked as PEFT saves them from transformers 5: {some(stacked)}",
            f"store each expert under its own name, as in {PREFIX}model.layers.1.mlp.experts.0.gate_proj.lora_A.weight",
        )
    if unknown := [name for name in stored if name not in known]:
        raise folder.refuse(
            f"adapts weights that the model does not have, or that cannot be adapted: {some(unknown)}",
            "give an adapter of this base",
        )
    found = [one for one in possible if one.a.theirs in stored or one.b.theirs in stored]
    parts = [part for one in found for part in (one.a, one.b)]
    if missing := [part.theirs for part in parts if part.theirs not in stored]:
        raise folder.refuse(f"has only A or only B for {len(missing)} weights: {some(missing)}", "export it again")
    if wrong := [
        f"{p.theirs} {stored[p.theirs].shape}, not {p.shape}" for p in parts if stored[p.theirs].shape != p.shape
    ]:
        raise folder.refuse(
            f"{len(wrong)} tensors do not have the shape for rank {rank} and this base: {some(wrong)}",
            "give an adapter of this base",
        )
    if odd := [f"{name} is {one.dtype}" for name, one in stored.items() if one.dtype not in PLAIN_TYPES]:
        raise folder.refuse(f"has unsupported dtypes: {some(odd)}", f"give it in {', '.join(PLAIN_TYPES)}")
    if not found:
        raise folder.refuse("has no tensors", "export it again")
    return found
