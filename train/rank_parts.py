"""The parts of a rank: device, groups, model and optimizer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from parallel.context import ContextParallel
    from parallel.expert.dispatcher import ExchangeDispatcher
    from parallel.mesh import Mesh
    from parallel.pipeline.schedule import Pipeline
    from parallel.zero.engine import Zero
    from train.kernels.fp8.fp8 import Fp8Precision
    from train.kernels.plain.high import HighPrecision
    from train.model.deepseek import DeepSeekV3
    from train.model.router import Router


@dataclass(frozen=True)
class RankSetup:
    """A rank's device and process groups."""

    device: "torch.device"
    mesh: "Mesh"


@dataclass
class RankModel:
    """This rank's part of the model, with its schedule and communication."""

    chunks: "list[DeepSeekV3]"
    pipeline: "Pipeline[DeepSeekV3]"
    dispatcher: "ExchangeDispatcher | None"
    """Sends tokens to experts on other ranks; None if this rank has all experts of its layers."""
    precision: "HighPrecision | Fp8Precision"
    share: "ContextParallel | None"
    """Exchanges parts of a sequence; None if sequences are complete."""

    def routers(self) -> "dict[str, Router]":
        """Returns the routers of all chunks, by layer name."""
        return {name: router for chunk in self.chunks for name, router in chunk.routers().items()}


@dataclass
class ParallelModel(RankModel):
    """A rank's model, and the ZeRO object that updates its weights."""

    zero: "Zero"
