"""The weights of a checkpoint of ours, in the chunks of a layout, without optimizer and gradients."""

import math
from pathlib import Path

import torch

from conf.schema import Config
from parallel.mesh import Mesh
from parallel.pipeline.schedule import Pipeline, build_schedule
from parallel.shard import Shard, whole
from train.checkpoint.load import load
from train.model.deepseek import DeepSeekV3
from train.parallelize import build_chunks, make_dispatcher
from train.precision.build import activation_dtype, build_precision


def load_pipeline(config: Config, mesh: Mesh, device: torch.device, checkpoint: Path) -> Pipeline:
    """This rank's part of the model, ready to evaluate, whatever layout wrote the checkpoint."""
    dispatcher = None if mesh.layout.ep == 1 else make_dispatcher(config, mesh)
    precision = build_precision(config.precision, device)
    chunks, stage_ids, num_stages = build_chunks(config, mesh, device, dispatcher, precision, restored=True)
    fill(chunks, checkpoint, mesh, "ema" if config.evaluate.ema else "master")
    return make_pipeline(config, mesh, device, chunks, stage_ids, num_stages)


def make_pipeline(
    config: Config, mesh: Mesh, device: torch.device, chunks: list[DeepSeekV3], stage_ids: list[int], num_stages: int
) -> Pipeline:
    """The schedule over these chunks; a whole model is one chunk, stage 0 of 1."""
    return build_schedule(
        config.parallel.schedule if num_stages > 1 else "1f1b",
        chunks,
        stage_ids,
        num_stages,
        mesh.pp_group,
        device,
        hidden=config.model.hidden,
        dtype=activation_dtype(config.precision),
        overlap=False,
        timeout=config.cluster.timeout,
    )


@torch.no_grad()
def fill(chunks: list[DeepSeekV3], checkpoint: Path, mesh: Mesh, kind: str) -> None:
    """Read weights (kind: master, or ema, their average) and balance biases into the chunks."""
    weights, wanted = {}, {}
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            offset, shape = 0, tuple(param.shape)
            if ".experts." in name:  # split over ep along their first dimension
                offset, shape = mesh.ep_rank * math.prod(shape), (shape[0] * mesh.layout.ep, *shape[1:])
            weights[param] = torch.empty(param.numel(), dtype=torch.float32)
            wanted[f"{kind}.{name}"] = Shard(weights[param], offset, shape)
        wanted |= {f"bias.{name}": whole(router.bias_E) for name, router in chunk.routers().items()}
    load(checkpoint, wanted)
    for param, weight in weights.items():
        param.copy_(weight.view(param.shape))
