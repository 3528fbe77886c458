"""Combines all ranks' measurements of a step by one all-reduce. Each rank adds the values that it measured:

- losses: the last pipeline stage
- tokens per expert: every rank of a stage
- balance biases: the first rank of a stage
- times and traffic: every rank

Dimensions: L MoE layers (including those of MTP modules), E experts.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import Model
from train.loop.step_work import StepWork
from train.loop.stop import StopKind
from train.model.count import attention_layers, moe_layers
from train.optim.qk_clip import QKClip
from train.rank_parts import ParallelModel, RankSetup


@dataclass
class MeasuredStep:
    """Measurements of one step over all ranks."""

    main_loss: float
    """Mean cross-entropy of the next token, in nats."""
    mtp_losses: list[float]
    """Loss of each MTP depth, without the MTP weight."""
    extra_loss: float
    """Value of the user's loss term (optim.extra_loss); 0 without a term."""
    balance_loss: float
    """Weighted balance loss of the routers, summed over layers."""
    index_loss: float
    """Weighted loss of the indexers, summed over layers."""
    loads_LE: Tensor
    """Tokens of the whole batch for each expert (float64)."""
    biases_LE: Tensor
    """Balance biases used in the step (float64)."""
    stop: StopKind
    """How the run must stop. If ranks were asked to stop in different ways, saving to disk has priority."""
    scores_L: list[float]
    """Largest attention score of each layer; empty without optim.qk_clip."""
    heads_clipped: int
    """Number of heads with an attention score above optim.qk_clip."""
    work: dict[str, float]
    """Measurements of the pipeline and the dispatchers, by metric name."""


class Measure:
    """Reads and resets the counters of this rank's chunks."""

    def __init__(self, model: Model, parts: ParallelModel, rank: RankSetup, clip: QKClip | None = None):
        self.model, self.mesh, self.device = model, rank.mesh, rank.device
        self.step_work = StepWork(parts, rank.mesh.layout)
        self.layers = moe_layers(model)
        self.attentions = attention_layers(model) if clip is not None else []
        self.clip = clip
        self.routers = parts.routers()
        self.indexers = [indexer for chunk in parts.chunks for indexer in chunk.indexers()]
        self.last = next((chunk for chunk in parts.chunks if chunk.has_head), None)
        self.micro_batches = 1.0
        """Losses are divided by this number: the mean number of micro-batches per data-parallel rank."""

    def clear(self) -> None:
        """Reset the counters for a new step."""
        for counting in (*self.routers.values(), *self.indexers):
            counting.clear()
        if self.last is not None:
            self.last.losses.clear()
        self.step_work.clear()
        if self.clip is not None:
            self.clip.clear()

    def collect(self, stop: StopKind) -> "CollectedMeasures":
        """Sum the measurements over all ranks, without waiting for the device."""
        depth, shape = self.model.mtp_depth, (len(self.layers), self.model.experts)
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        losses, loads_LE, biases_LE = zeros(4 + depth), zeros(shape), zeros(shape)
        if self.last is not None:
            weight = self.last.losses.count / self.micro_batches
            losses[: 2 + depth] = self.last.losses.means().double() * weight / self.mesh.layout.stage_ranks
        for name, router in self.routers.items():
            row = self.layers.index(name)
            loads_LE[row] = router.load_E
            losses[-2] += router.balance_loss.double() / self.mesh.layout.dp
            if self.mesh.stage_rank == 0:
                biases_LE[row] = router.bias_E
        for indexer in self.indexers:
            losses[-1] += indexer.loss / self.mesh.layout.stage_ranks
        scores_LH, scores_L, clipped = zeros(0), zeros(len(self.attentions)), zeros(1)
        if self.clip is not None:
            scores_LH = self.clip.largest()
            if self.mesh.stage_rank == 0:
                rows = [self.attentions.index(name) for name in self.clip.layers]
                scores_L[rows] = scores_LH.amax(1).double()
                clipped += (scores_LH > self.clip.limit).sum()
        asked = [float(stop is kind) for kind in (StopKind.on_disk, StopKind.in_memory)]
        own = torch.tensor([*asked, *self.step_work.collect()], dtype=torch.float64)
        sums = [losses, loads_LE.flatten(), biases_LE.flatten(), scores_L, clipped]
        parts = [*sums, to_device(own, self.device)]
        vector = torch.cat(parts)
        if self.mesh.layout.world > 1:
            dist.all_reduce(vector)
        return CollectedMeasures(self, vector, [part.numel() for part in parts], scores_LH)


class CollectedMeasures:
    """Summed measurements during their copy to the host."""

    def __init__(self, measure: Measure, vector: Tensor, sizes: list[int], scores_LH: Tensor):
        self._measure, self._sizes = measure, sizes
        self.scores_LH = scores_LH
        """Largest attention score of each layer and head, on the device."""
        losses, loads, *_ = vector.split(sizes)
        self.finite = losses[0].isfinite()
        """Whether the main loss is finite: bool, on the device."""
        self.loads_LE = loads.view(-1, measure.model.experts)
        """Tokens per expert, as in `MeasuredStep`, but on the device."""
        self._host = vector
        if vector.is_cuda:
            self._host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True).copy_(vector, non_blocking=True)

    def read(self) -> MeasuredStep:
        """Returns the summed measurements, after the asynchronous copy to the host."""
        losses, loads, biases, scores, clipped, own = self._host.split(self._sizes)
        main_loss, *mtp_losses, extra_loss, balance_loss, index_loss = losses.tolist()
        on_disk, in_memory, *work = own.tolist()
        shape = self.loads_LE.shape
        return MeasuredStep(
            main_loss=main_loss,
            mtp_losses=mtp_losses,
            extra_loss=extra_loss,
            balance_loss=balance_loss,
            index_loss=index_loss,
            loads_LE=loads.view(shape),
            biases_LE=biases.view(shape),
            stop=StopKind.on_disk if on_disk > 0 else StopKind.in_memory if in_memory > 0 else StopKind.none,
            scores_L=scores.tolist(),
            heads_clipped=int(clipped),
            work=self._measure.step_work.named(work),
        )


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor to the device without waiting."""
    return (x.pin_memory() if device.type == "cuda" and not x.is_cuda else x).to(device, non_blocking=True)
