"""Plans the memory of ZeRO stage 3: this rank's shards, and the gathered weights (parallel/zero/sharded_weights.py).

The model's units run in sequence: embedding, blocks, final norm, MTP modules and head. Backward runs in reverse. While
a unit runs, its weights and those of the next units are gathered (zero3_gather.py). Backward reduces gradients through
a permanent bucket (zero3_scatter.py). All sizes are in bytes.
"""

from collections.abc import Sequence
from functools import cached_property

from conf.schema import Config
from conf.thresholds import THRESHOLDS
from train.plan.job import micro_batches_of
from train.plan.memory.chunk import ChunkMemory
from train.plan.memory.part import FrozenSection, PassMemory
from train.plan.memory.rank_weights import FP32_BYTES, Shards, Weight, part_weights, scratch_bytes, state_bytes
from train.plan.memory.zero3_gather import GatheredBytes, SharedWeight, follow_change, follow_gathers
from train.plan.memory.zero3_scatter import (
    NOTHING,
    Bucket,
    Visit,
    WaitingGradients,
    trace_unit_backward,
    trace_unit_evaluation,
    trace_unit_forward,
    unit_of,
)


class Zero3Memory:
    """Memory of one rank that has all layers of the model in one chunk."""

    def __init__(self, config: Config, weights: Sequence[Weight], groups: Sequence[Shards], chunk: ChunkMemory):
        """groups: parameter groups of trained weights
        chunk: memory of the rank's only chunk
        """
        self._config, self._groups, self._chunk = config, groups, chunk
        self._warms = config.optim.index_warmup
        self._frozen = [weight for weight in weights if not weight.is_trained]
        self._element = config.precision.weight_bytes

    def state(self) -> dict[str, int]:
        """Returns the bytes that are allocated for the whole run, by item."""
        owned = sum(group.scattered for group in self._groups)
        return {
            "weights": self._element * owned + sum(self._shared(weight).shard_bytes for weight in self._frozen),
            "master": FP32_BYTES * owned,
            "moments": state_bytes(self._config, self._groups, lambda group: group.scattered),
            "gradients": FP32_BYTES * owned,
            "reduction": FP32_BYTES * self._bucket.limit,
        }

    def schedule(self) -> tuple[int, str]:
        """Returns the passes' peak bytes, and the unit at the peak."""
        forward, (backward, _) = self._forward, self._backward
        held = self._held
        moments = []
        for number, (visit, gathered) in enumerate(zip((*forward, *backward), held, strict=True)):
            most = max(visit.peak + gathered.working, visit.start + gathered.fetching)
            moments.append((most, f"{'forward' if number < len(forward) else 'backward'}: {visit.unit}"))
        if (
            micro_batches_of(self._config) > 1
        ):  # the last gradients of a micro-batch are reduced when the next micro-batch begins
            moments.append((self.reduction(), "reduction between micro-batches"))
        return max(moments)

    def evaluation(self) -> int:
        """Returns the peak bytes of a forward without gradients.

        This forward skips the MTP modules, but DeepSpeed gathers their weights until the head runs.
        """
        visits = [visit for part in self._chunk.parts for visit in trace_unit_evaluation(self._chunk.scene, part)]
        held = self._held[: len(visits)]
        if len(self._forward) > len(visits):
            units, learnt, limit = self._learnt
            held[-1] = follow_change(units, learnt, limit, number=len(visits), unit=len(units) - 1)
        return max(
            max(visit.peak + gathered.working, visit.start + gathered.fetching)
            for visit, gathered in zip(visits, held, strict=True)
        )

    def reduction(self) -> int:
        """Returns the peak bytes when a micro-batch's last gradients are reduced.

        DeepSpeed keeps the embedding's weights gathered, because it does not notice the end of the embedding's
        backward.
        """
        _, left = self._backward
        outside = 0 if self._bucket.takes(left.elements) else FP32_BYTES * left.elements
        return self._bucket.reduction(left) + outside + self._held[-1].working

    @cached_property
    def _bucket(self) -> Bucket:
        parallel, limit = (
            self._config.parallel,
            min(sum(group.elements for group in self._groups), THRESHOLDS.bucket_elements),
        )
        return Bucket(limit, parallel.stage_ranks, parallel.stage_ranks // parallel.ep, self._chunk.scene.gloo)

    @cached_property
    def _forward(self) -> list[Visit]:
        scene = self._chunk.scene
        return [
            visit.lifted(below) for part, below in self._chunk.ascent() for visit in trace_unit_forward(scene, part)
        ]

    @cached_property
    def _backward(self) -> tuple[list[Visit], WaitingGradients]:
        """Executions of units in backward, and the gradients that are not yet reduced when backward ends."""
        scene, waiting = self._chunk.scene, NOTHING
        visits: tuple[Visit, ...] = ()

        def run_of(part: str, held: bool) -> PassMemory:
            nonlocal visits, waiting
            run, visits, waiting = trace_unit_backward(scene, part, held, self._bucket, waiting)
            return run

        found = [visit.lifted(below) for _, _, below in self._chunk.descent(run_of) for visit in visits]
        return found, waiting

    @cached_property
    def _held(self) -> list[GatheredBytes]:
        """Gathered bytes at each execution of a unit: forward, then backward.

        In a warm-up of indexers, backward gathers nothing.
        """
        last = len(self._learnt[0]) - 1
        held = follow_gathers(*self._learnt)
        if self._warms:
            return held[1 : last + 1] + [GatheredBytes(0, 0)] * len(self._backward[0])
        return held[1 : last + 1] + held[-last:]

    @cached_property
    def _learnt(self) -> tuple[list[list[SharedWeight]], list[tuple[int, bool]], int]:
        """The arguments of `follow_gathers`: weights of each unit, executions of units in order, limit in elements."""
        units = self._units()
        limit = max(sum(weight.elements for weight in unit) for unit in units)
        last, depths = len(units) - 1, self._config.model.mtp_depth
        down = range(last, 0, -1)  # each pass starts with the model itself, a unit without weights
        if self._warms:
            return units, [(unit, True) for unit in (*range(last + 1), 0)], limit
        visits = [*range(last + 1), 0, *[last] * depths, *down]  # the head runs once for every output
        done = [True] * (last + 2) + [False] * depths + [True] * last
        return units, list(zip(visits, done, strict=True)), limit

    def _units(self) -> list[list[SharedWeight]]:
        """Weights of each unit. The first unit is the model itself, and has no weights of its own."""
        found: list[list[SharedWeight]] = [[]]
        for part in self._chunk.parts:
            by_unit: dict[str, list[SharedWeight]] = {}
            for weight in self._weights(part):
                by_unit.setdefault(unit_of(weight.name) if part == "end" else part, []).append(self._shared(weight))
            head = by_unit.pop("head", None)  # the head runs last
            found += [*by_unit.values(), *([head] if head else [])]
        return found

    def _shared(self, weight: Weight) -> SharedWeight:
        parallel = self._config.parallel
        experts = weight.is_expert and parallel.ep > 1
        return SharedWeight(
            weight.elements,
            "experts" if experts else "dense",
            parallel.stage_ranks // (parallel.ep if experts else 1),
            weight.item_bytes or self._element,
        )

    def _weights(self, part: str) -> Sequence[Weight]:
        share = self._config.model.experts // self._config.parallel.ep
        return part_weights(FrozenSection(self._config.model), part, share, FrozenSection(self._config.adapter))

    def update(self) -> int:
        """Returns the peak bytes of the update: gradient copy and scratch."""
        return max(
            FP32_BYTES * group.scattered + scratch_bytes(self._config, group, group.scattered, self._chunk.scene)
            for group in self._groups
        )
