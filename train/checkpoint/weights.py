"""The weights of a checkpoint of ours, without optimizer and gradients: in the chunks of a layout, or whole in one process."""

import math
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from conf.errors import UserError
from conf.schema import Adapter, Config, Model
from parallel.mesh import Mesh
from parallel.pipeline.schedule import Pipeline
from parallel.shard import Shard, whole
from train.checkpoint.stored_weights import StoredWeights
from train.kernels.choice import build_kernels, choose_kernels
from train.kernels.precision import activation_dtype, build_precision
from train.model.count import count_parameters
from train.model.deepseek import DeepSeekV3
from train.model.init import materialise
from train.parallelize import build_chunks, build_pipeline, make_dispatcher, make_share


def weight_bytes(config: Model, item_bytes: int) -> int:
    """Memory of all weights, MTP modules included."""
    counts = count_parameters(config)
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
    kernels = build_kernels(device.type, config.cluster.compiled)
    dtype, precision = activation_dtype(config.precision), build_precision(config.precision, device, kernels)
    model = DeepSeekV3.whole(config.model, precision, seq_len=config.seq_len, device="meta")
    materialise(model, "cpu")
    read_into_chunks([model], StoredWeights(config, checkpoint))
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model.to(device).eval()


def load_pipeline(config: Config, mesh: Mesh, device: torch.device, checkpoint: Path) -> Pipeline[DeepSeekV3]:
    """This rank's part of the model, ready to evaluate, whatever layout wrote the checkpoint."""
    dispatcher = None if mesh.layout.ep == 1 else make_dispatcher(config, mesh)
    kernels, _ = choose_kernels(config, device)
    precision = build_precision(config.precision, device, kernels)
    share = None if mesh.layout.cp == 1 else make_share(mesh)
    plain = replace(config, adapter=Adapter())  # what an adapter does is in the weights
    chunks, stage_ids, num_stages = build_chunks(plain, mesh, device, dispatcher, precision, restored=True, share=share)
    kind = "ema" if config.evaluate.ema else "master"
    read_into_chunks(chunks, StoredWeights(config, checkpoint, kind), kind, mesh.ep_rank, mesh.layout.ep)
    return build_pipeline(config, mesh, device, chunks, stage_ids, num_stages, overlap=False)


@torch.no_grad()
def read_into_chunks(
    chunks: list[DeepSeekV3], stored: StoredWeights, kind: str = "master", ep_rank: int = 0, ep: int = 1
) -> None:
    """Read weights (kind: master, or ema, their average) and balance biases into the chunks, which hold the experts of
    rank ep_rank of ep.
    """
    weights, wanted = {}, {}
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            offset, shape = 0, tuple(param.shape)
            if ".experts." in name:  # split over ep along their first dimension
                offset, shape = ep_rank * math.prod(shape), (shape[0] * ep, *shape[1:])
            in_place = param.dtype == torch.float32 and param.device.type == "cpu"
            weights[param] = param.view(-1) if in_place else torch.empty(param.numel(), dtype=torch.float32)
            wanted[f"{kind}.{name}"] = Shard(weights[param], offset, shape)
        wanted |= {f"bias.{name}": whole(router.bias_E) for name, router in chunk.routers().items()}
    stored.fill(wanted)
    for param, weight in weights.items():
        param.copy_(weight.view(param.shape))
