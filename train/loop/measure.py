"""What the ranks know of a step, put together by one all-reduce.

Each rank holds some layers and some of the tokens. The vector below has a place for every number of every layer;
a rank fills in its own and the sum over all ranks is the whole: losses from the last pipeline stage, expert loads
from every stage, balance biases from the first rank of a stage, times and traffic from every rank.

L MoE layers (MTP modules included), E experts.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import Model
from train.loop.step_work import StepWork
from train.loop.stop import StopKind
from train.model.count import moe_layers
from train.parallelize import Parallelized
from train.rank import RankSetup


@dataclass
class Measured:
    """One step over all ranks."""

    main_loss: float
    """Mean cross-entropy of the next token, nats."""
    mtp_losses: list[float]
    """The same for each MTP depth, unweighted."""
    balance_loss: float
    """Weighted, summed over layers."""
    loads_LE: Tensor
    """Tokens routed to each expert, over the whole batch (float64)."""
    biases_LE: Tensor
    """Balance biases that were in force (float64)."""
    stop: StopKind
    """What some rank was asked for; the disk counts more than memory."""
    work: dict[str, float]
    """What pipeline and dispatchers did, by metric name."""


class Measure:
    """Collects and clears the counters of this rank's chunks."""

    def __init__(self, model: Model, parts: Parallelized, rank: RankSetup):
        self.model, self.mesh, self.device = model, rank.mesh, rank.device
        self.step_work = StepWork(parts, rank.mesh.layout)
        self.layers = moe_layers(model)
        self.routers = parts.routers()
        self.last = next((chunk for chunk in parts.chunks if chunk.has_head), None)
        self._weight = 1.0

    def clear(self, weight: float) -> None:
        """Start a new step. weight: of this rank's mean losses, its share of the batch over the mean share."""
        self._weight = weight
        for router in self.routers.values():
            router.clear()
        if self.last is not None:
            self.last.losses.clear()
        self.step_work.clear()

    def collect(self, stop: StopKind) -> Measured:
        """Sum over all ranks; every rank gets the same."""
        depth, shape = self.model.mtp_depth, (len(self.layers), self.model.experts)
        scalars = torch.zeros(4 + depth, dtype=torch.float64, device=self.device)
        loads_LE = torch.zeros(shape, dtype=torch.float64, device=self.device)
        biases_LE = torch.zeros(shape, dtype=torch.float64, device=self.device)
        scalars[0], scalars[1] = float(stop is StopKind.on_disk), float(stop is StopKind.in_memory)
        if self.last is not None:
            scalars[2 : 3 + depth] = self.last.losses.means().double() * self._weight / self.mesh.layout.stage_ranks
        for name, router in self.routers.items():
            row = self.layers.index(name)
            loads_LE[row] = router.load_E
            scalars[-1] += router.balance_loss.double() / self.mesh.layout.dp
            if self.mesh.stage_rank == 0:
                biases_LE[row] = router.bias_E
        work = torch.tensor(self.step_work.collect(), dtype=torch.float64, device=self.device)
        parts = [scalars, loads_LE.flatten(), biases_LE.flatten(), work]
        vector = torch.cat(parts)
        if self.mesh.layout.world > 1:
            dist.all_reduce(vector)
        scalars, loads, biases, work = vector.cpu().split([part.numel() for part in parts])
        return Measured(
            main_loss=scalars[2].item(),
            mtp_losses=scalars[3 : 3 + depth].tolist(),
            balance_loss=scalars[-1].item(),
            loads_LE=loads.view(shape),
            biases_LE=biases.view(shape),
            stop=StopKind.on_disk if scalars[0] > 0 else StopKind.in_memory if scalars[1] > 0 else StopKind.none,
            work=self.step_work.named(work.tolist()),
        )
