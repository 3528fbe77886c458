"""The whole model of a Hugging Face folder in one process."""

from pathlib import Path

import torch

from conf.schema import Model
from parallel.shard import whole
from train.checkpoint.stored_weights import open_pairs
from train.hf.families import FAMILIES
from train.hf.folder import match, open_model
from train.hf.read import folder_reader
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.deepseek import DeepSeekV3
from train.model.init import materialise
from train.model.operations import Kernels


def load_hf_model(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    field: str = "init_from",
    kernels: Kernels | None = None,
    text_only: bool = False,
    adapter: str | None = None,
) -> tuple[Model, DeepSeekV3, Path | None]:
    """The whole model of a folder on CPU in eval mode, its configuration, and the path of its tokenizer.json, if any.

    Weights are held and multiplied in dtype, and read straight into it: memory for the model once. field: what errors
    name. kernels: that the model computes with; torch's operations if not given. text_only: leave out what belongs to no language
    model. adapter: a folder of PEFT's to be added to the weights. Raises UserError for a folder that is no sound DeepSeek-V3.
    """
    path = Path(folder).expanduser()
    headers, config, _ = open_model(path, field, text_only)
    placed = match(headers, config)
    seq_len = min(config.max_seq_len, config.yarn.original_seq_len)
    model = DeepSeekV3.whole(
        config, HighPrecision(dtype, kernels or PlainKernels()), seq_len=seq_len, dtype=dtype, device="meta"
    )
    materialise(model, "cpu")
    wanted = {f"master.{name}": whole(param) for name, param in model.named_parameters()}
    if FAMILIES[headers.family].has_biases:
        wanted |= {f"bias.{name}": whole(router.bias_E) for name, router in model.routers().items()}
    read = folder_reader(headers, placed)
    pairs = open_pairs(adapter, config, headers.family, read)
    if pairs is None:
        read(wanted)
    else:
        pairs.fill_added(read, wanted)
    tokenizer = path / "tokenizer.json"
    return config, model.eval(), tokenizer if tokenizer.is_file() else None
