"""Memory at the end of a step: DeepSpeed reduces and shards gradients, and updates the weights.

The simulation follows DeepSpeed buffer by buffer (parallel/zero/private_names.py). After the passes, all gradients are
in fp32 and not yet sharded (parallel/zero/whole_weights.py). A group below is a parameter group.

    fill       A gradient that fits is copied into the bucket, and its memory is freed.
    reduce     The slices of every group in the full bucket are joined in a copy, and summed over the group's ranks.
    keep       With bf16 weights, this rank's sums go into one flat shard per group, allocated when first needed. With
               fp32 weights, each gradient with a slice of this rank is copied as a whole into one buffer.
    update     The optimizer updates one group after the other, with scratch memory. With fp32 weights, the shard's
               gradients are first joined in one tensor.

Special cases:

- bf16 weights, and no other rank shares a group: the group's gradients are neither copied nor reduced.
- Offload (ZeRO 1 and 2): the shard's gradients are copied to the host during the reduction. A complete gradient is
  freed once this rank's slices are copied. Scratch memory is on the host, and gradients are not joined.
- bf16 weights, and a chunk ends before another chunk: the ended chunk's gradients are reduced first. After this, the
  shards of all groups are allocated.
- This rank keeps no slice of a gradient: stage 2 frees it after its reduction, stage 1 after all reductions.

All sizes are in bytes, unless a name says elements.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from conf.schema import Config
from conf.thresholds import THRESHOLDS
from train.plan.memory.part import Scene
from train.plan.memory.rank_weights import FP32_BYTES, Shards, Weight, scratch_bytes


@dataclass
class _Bytes:
    """Counts the bytes in use, and their maximum since `mark`."""

    now: int = 0
    peak: int = 0

    def take(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def mark(self) -> int:
        peak, self.peak = self.peak, self.now
        return peak


@dataclass(frozen=True)
class Slice:
    """A slice of a gradient, kept by one rank, the owner."""

    owner: int
    elements: int


@dataclass(frozen=True)
class Gradient:
    """The gradient of one weight."""

    group: int
    """Index of the parameter group."""
    weight: Weight
    slices: list[Slice]
    mine: bool
    """Whether this rank keeps a slice of this gradient."""

    @property
    def size(self) -> int:
        return FP32_BYTES * self.weight.elements


def _gradients(groups: Sequence[Shards], ranks: Sequence[int]) -> Iterator[Gradient]:
    """Yields all gradients in DeepSpeed's order. ranks: this rank's index in each group."""
    for number, (group, rank) in enumerate(zip(groups, ranks, strict=True)):
        begin, part = 0, group.partition
        for weight in group.weights:
            end, slices = begin + weight.elements, []
            while begin < end:
                until = min(end, (begin // part + 1) * part)
                slices.append(Slice(begin // part, until - begin))
                begin = until
            yield Gradient(number, weight, slices, any(one.owner == rank for one in slices))


def kept_elements(config: Config, groups: Sequence[Shards], stage_rank: int) -> list[tuple[Weight, int]]:
    """Returns this rank's slices of weights, with their numbers of elements."""
    if config.parallel.zero == 3:
        return [(weight, -(-weight.elements // group.ranks)) for group in groups for weight in group.weights]
    ranks = [stage_rank * group.ranks // config.parallel.stage_ranks for group in groups]
    return [
        (gradient.weight, one.elements)
        for gradient in _gradients(groups, ranks)
        for one in gradient.slices
        if one.owner == ranks[gradient.group]
    ]


class StepEnd:
    """Follows a rank's gradients from the last pass to the next step."""

    def __init__(self, config: Config, groups: Sequence[Shards], stage_rank: int, scene: Scene):
        self._groups, self._scene = groups, scene
        self._stage, self._bf16 = config.parallel.zero, config.precision.name != "fp32"
        self._offload = config.parallel.offload_optimizer
        self._config = config
        self._has_expert_groups = config.parallel.ep > 1
        """Whether experts' gradients are summed over fewer ranks than other gradients."""
        self._ranks = [stage_rank * group.ranks // config.parallel.stage_ranks for group in groups]
        self._own = [group for group in groups if self._is_own(group)]
        self._gradients = [one for one in _gradients(groups, self._ranks) if not self._is_own(groups[one.group])]
        self._bucket = min(max(1, sum(one.weight.elements for one in self._gradients)), THRESHOLDS.bucket_elements)

    def peaks(self, ended: Sequence[int]) -> tuple[list[tuple[int, int]], int, int]:
        """Returns the peak bytes of early reductions, of the final reduction, and of the update.

        ended: chunks whose gradients are reduced early, in order
        An early reduction has two numbers: its peak bytes, and the bytes after it. Both are relative to the bytes
        before it.
        """
        meter = self._meter = _Bytes()
        meter.take(sum(one.size for one in self._gradients))
        meter.take(FP32_BYTES * sum(group.elements for group in self._own))
        self._shards: set[int] = set()
        self._whole = False
        ahead, rest = [], self._gradients
        for chunk in ended if self._bf16 and not self._offload else ():
            before = meter.now
            meter.mark()
            self._reduce_all([one for one in rest if one.weight.chunk == chunk], ahead=True)
            rest = [one for one in rest if one.weight.chunk != chunk]
            ahead.append((meter.mark() - before, meter.now - before))
        self._reduce_all(rest)
        return ahead, meter.mark(), self._update()

    def _reduce_all(self, gradients: Sequence[Gradient], ahead: bool = False) -> None:
        """Simulates the reduction of gradients. ahead: whether other chunks' passes follow."""
        self._meter.take(FP32_BYTES * self._bucket)
        waiting: list[Gradient] = []
        for one in gradients:
            if sum(w.weight.elements for w in waiting) + one.weight.elements > self._bucket:
                self._reduce(waiting)
                waiting = []
            if self._fits(one):
                self._meter.take(-one.size)
            waiting.append(one)
        self._reduce(waiting)
        self._end(gradients, ahead)

    def _is_own(self, group: Shards) -> bool:
        return self._bf16 and group.ranks == 1

    def _fits(self, one: Gradient) -> bool:
        return one.weight.elements <= self._bucket

    def _reduce(self, waiting: Sequence[Gradient]) -> None:
        """Simulates a reduction of gradients, and that this rank stores its slices of the sums."""
        meter = self._meter
        if self._bf16:
            for one in waiting:
                if one.mine and one.group not in self._shards:
                    self._shards.add(one.group)
                    meter.take(FP32_BYTES * self._groups[one.group].partition)
        for experts in (False, True):  # gradients of dense weights and of experts are summed over different ranks
            slices = [one for one in waiting if (self._has_expert_groups and one.weight.is_expert) == experts]
            for copied in self._copies(slices):
                meter.take(FP32_BYTES * copied)
                meter.take(-FP32_BYTES * copied)
        for one in waiting:
            if not one.mine:
                if self._stage == 2 and not self._fits(one):
                    meter.take(-one.size)
            elif self._offload:
                if not self._fits(one):
                    meter.take(-one.size)
            elif not self._bf16:
                if not self._whole:
                    self._whole = True
                    meter.take(self._whole_size)
                if not self._fits(one):
                    meter.take(-one.size)

    @property
    def _whole_size(self) -> int:
        """Bytes of the buffer for complete gradients, with fp32 weights."""
        return sum(one.size for one in self._gradients if one.mine)

    def _copies(self, gradients: Sequence[Gradient]) -> Iterator[int]:
        """Yields the number of elements of each copy that joins slices.

        The number is 0 for a slice that is larger than the bucket, because it is not copied.
        """
        slices: list[int] = []
        for mine, run in groupby(
            ((one, piece) for one in gradients for piece in one.slices),
            key=lambda pair: (pair[0].group, pair[1].owner) if not self._is_kept(*pair) else pair,
        ):
            del mine
            slices.append(sum(piece.elements for _, piece in run))
        copied: list[int] = []
        for elements in slices:
            copied.append(elements)
            if sum(copied) > self._bucket:
                yield sum(copied) if len(copied) > 1 else 0
                copied = []
        if len(copied) > 1:
            yield sum(copied)

    def _is_kept(self, one: Gradient, piece: Slice) -> bool:
        return self._bf16 and piece.owner == self._ranks[one.group]

    def _end(self, gradients: Sequence[Gradient], ahead: bool) -> None:
        """Frees the bucket, and the reduced gradients that are larger than the bucket.

        After an early reduction (`ahead`), first allocates missing shards.
        """
        stays = (
            one
            for one in gradients
            if not self._fits(one) and (self._bf16 and not self._offload if one.mine else self._stage == 1)
        )
        for number, group in enumerate(self._groups) if ahead else ():
            if number not in self._shards and not self._is_own(group):
                self._shards.add(number)
                self._meter.take(FP32_BYTES * group.partition)
        self._meter.take(-FP32_BYTES * self._bucket - sum(one.size for one in stays))

    def _update(self) -> int:
        meter, last = self._meter, len(self._groups) - 1
        for number, group in enumerate(self._groups):
            shard = 0 if self._is_own(group) else FP32_BYTES * group.partition
            if not self._bf16 and self._offload:
                shard = 0
            elif not self._bf16:
                meter.take(shard)
                if number == last:
                    meter.take(-self._whole_size)
            scratch = scratch_bytes(self._config, group, group.partition, self._scene)
            if self._offload and self._scene.kind == "cuda":
                scratch = 0
            meter.take(scratch)
            meter.take(-scratch)
            meter.take(-shard)
        return meter.mark()
