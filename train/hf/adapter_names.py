"""What an adapter's pairs are called in a folder of PEFT's, and where each lies in ours. No torch.

A matrix of theirs is one matrix of ours, or one of several that stand in one parameter, each with a pair of its own (conf/adapters.py).
So each of their A and B is one interval of a parameter of ours, and nothing is permuted: the names are those of the base's
folder, `base_model.model.` in front, and experts are named one by one, as vLLM and PEFT read them.
"""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from conf.adapters import name_pairs, target_of
from conf.schema import Adapter, Model, ModelFamily
from train.hf.tensor_names import PlacedTensor, tensors

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""In front of the names of the base."""
BASE_MARK = "base_mark"
"""In the file's metadata: by what the base is known again without reading it, two of its rows."""
BASE_WEIGHTS = "base_weights"
"""In the file's metadata: the mark of all weights of the base (train/checkpoint/weights_mark.py). Earlier versions wrote none."""
BASE_FORMAT = "base_format"
"""In the file's metadata: in what the base lay when the adapter was trained beside it, as adapter.base has it."""


class AdaptedTensor(NamedTuple):
    """A matrix of the base's folder and its pair."""

    base: PlacedTensor
    a: PlacedTensor
    """(rank, inputs)."""
    b: PlacedTensor
    """(outputs, rank)."""


def adapted_tensors(model: Model, family: ModelFamily, targets: Collection[str], rank: int) -> Iterator[AdaptedTensor]:
    """Every matrix of the targets in a folder of this family, in its order; MTP modules' copies of the head left out."""
    for base in tensors(model, family):
        name = base.ours.removeprefix("master.")
        if base.copy or target_of(name) not in targets:
            continue
        *stack, _, width = base.whole
        pairs, rows = name_pairs(name), base.shape[0]
        number, half = divmod(base.start // (rows * width), len(pairs))
        stem, ours = PREFIX + base.theirs.removesuffix(".weight"), pairs[half]
        a, b = (rank, width), (rows, rank)
        yield AdaptedTensor(
            base,
            PlacedTensor(f"{stem}.lora_A.weight", a, f"master.{ours.a}", number * rank * width, (*stack, *a)),
            PlacedTensor(f"{stem}.lora_B.weight", b, f"master.{ours.b}", number * rows * rank, (*stack, *b)),
        )


def peft_config(adapter: Adapter, adapted: list[AdaptedTensor], base: str) -> dict[str, Any]:
    """adapter_config.json. base: where the weights are that it belongs to.

    Where transformers holds experts as one parameter, PEFT takes every target that ends in gate_proj, up_proj or down_proj for them
    and for nothing else. So those of dense and shared FFNs are named as parameters, which PEFT adapts without dropout; it
    acts in training alone, and is 0 here.
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
