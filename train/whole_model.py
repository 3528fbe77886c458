"""The whole model of a checkpoint, in one process."""

from pathlib import Path

import psutil
import torch

from conf.errors import UserError
from conf.schema import Config, Model
from parallel.shard import whole
from train.checkpoint.load import load
from train.model.count import count
from train.model.deepseek import DeepSeekV3
from train.model.init import materialise
from train.precision.build import activation_dtype, build_precision


def weight_bytes(config: Model, item_bytes: int) -> int:
    """Memory of all weights, MTP modules included."""
    counts = count(config)
    return item_bytes * (counts.total + counts.mtp)


def fits_here(config: Config, device: torch.device) -> bool:
    """Whether machine and device have memory for the whole model beside a run, in fp32 while it loads."""
    room = psutil.virtual_memory().available
    if device.type == "cuda":
        room = min(room, torch.cuda.mem_get_info(device)[0])
    return weight_bytes(config.model, 4) < room / 2


def require_memory(model: Model, item_bytes: int, field: str, what: Path) -> None:
    """UserError if one process cannot hold the weights while they load. what: where they come from, the value of field."""
    needed, free = weight_bytes(model, item_bytes), psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            field,
            what,
            f"needs {needed / 1e9:.1f} GB of memory in one process, and {free / 1e9:.1f} GB are free",
            "take a machine with more memory, or a smaller model",
        )


def load_model(config: Config, checkpoint: Path, device: torch.device) -> DeepSeekV3:
    """The whole model in eval mode, from a checkpoint of any layout."""
    dtype, precision = activation_dtype(config.precision), build_precision(config.precision, device)
    model = DeepSeekV3.whole(config.model, precision, seq_len=config.seq_len, device="meta")
    materialise(model, "cpu")
    shards = {f"master.{name}": whole(param) for name, param in model.named_parameters()}
    load(checkpoint, shards | {f"bias.{name}": whole(router.bias_E) for name, router in model.routers().items()})
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model.to(device).eval()
