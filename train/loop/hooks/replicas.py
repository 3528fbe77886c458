"""Detects flipped bits in weights that have copies on several ranks, and in optimizer state between two uses.

Weights: ranks compare the copies of a weight after the backward passes, before the update. After the update, the flip
would be gone, but not its effect: the update computes the weights again from the master weights, with wrong gradients.
Each rank sums the bits of each weight as integers, so one flipped bit changes the sum. One all-reduce finds the
smallest and the largest sum among all copies of each weight. Not detected:
- a flip that disappeared before the comparison
- a flip in an expert that only one rank holds
- any flip with ZeRO 3, because no weight has a copy

State: no code writes master weights and moments between two updates. So each rank sums the bits of its shard's tensors
after the update of a checked step, and again before the next update or checkpoint reads the tensors. Not detected:
- a flip during an update
- a flip after a step that is not checked
- a flip in a gradient or an activation
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from conf.errors import EXIT_CRASH, RunEnded
from conf.words import some_of
from parallel.mesh import Mesh
from parallel.zero.engine import Zero
from train.loop.live_run import LiveRun

SHOWN_WEIGHTS = 4
"""Maximum number of names in a sentence."""
TAKE_OUT = "a resume from the last checkpoint restores the correct weights. If this happens again on the same device, replace the device"
"""The end of an error message: what to do after a flipped bit."""


class ReplicasDiffer(RunEnded):
    """Copies of a weight differ, so the gradients of this step are wrong. The update did not run."""

    code = EXIT_CRASH


class ReplicaCheck:
    """Compares this rank's weights with their copies on other ranks. every: interval in steps; 0: never."""

    def __init__(self, every: int, zero: Zero, mesh: Mesh):
        self._every = every
        shared = {param: name for param, name in zero.names.items() if getattr(param, "allreduce", True)}
        experts = {param: name for param, name in zero.names.items() if param not in shared}
        self._sets = [
            (group, list(named), list(named.values()))
            for group, named in ((mesh.stage_group, shared), (mesh.edp_group, experts))
            if named and dist.get_world_size(group) > 1
        ]

    def on_phase(self, run: LiveRun, step: int, phase: str) -> None:
        if phase == "reduction":
            self.require_equal(step)

    def require_equal(self, step: int) -> None:
        """Compare the copies every `every` steps. Call this method before the update of every step, on all ranks.

        Raises ReplicasDiffer on every rank that holds a weight whose copies differ.
        """
        if not self._every or step % self._every:
            return
        for group, params, names in self._sets:
            sums = torch.stack([sum_of_bits(param) for param in params])
            ends = torch.stack([sums, ~sums])  # ~x reverses the order of integers like -x, but never overflows
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
            if bool((ends[0] != ~ends[1]).any()):
                finite = torch.stack([param.detach().isfinite().all() for param in params])
                self._tell(step, group, torch.stack([sums, finite.to(sums)]), names)

    def _tell(self, step: int, group: ProcessGroup, facts: Tensor, names: Sequence[str]) -> None:
        """Raise ReplicasDiffer, which names the ranks whose copies differ from the majority.

        Without a majority, it names the ranks whose copies are not finite. facts: two rows, with one element for each
        weight of this rank: the sum of its bits, and whether it is finite.
        """
        of_rank = [torch.empty_like(facts) for _ in range(dist.get_world_size(group))]
        dist.all_gather(of_rank, facts, group=group)
        ranks = dist.get_process_group_ranks(group)
        sums, finite = torch.stack(of_rank, 1).tolist()
        odd, weights = set[int](), []
        for place, name in enumerate(names):
            values = [row[place] for row in sums]
            (most, count), *others = Counter(values).most_common()
            if others:
                weights.append(name)
                wrong = (
                    [value != most for value in values]
                    if 2 * count > len(values)
                    else [not row[place] for row in finite]
                )
                odd |= {rank for rank, is_wrong in zip(ranks, wrong, strict=True) if is_wrong and not all(wrong)}
        who = (
            f"rank {', '.join(map(str, sorted(odd)))} has"
            if odd
            else f"ranks {ranks} (it is unknown which of them is wrong) have"
        )
        raise ReplicasDiffer(
            f"step {step}: {who} other weights than the other copies: {some_of(weights, SHOWN_WEIGHTS)}. They were not used for an update; {TAKE_OUT}",
            sorted(odd) or ranks,
        )


def sum_of_bits(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor's bits modulo 2^64, as an int64 scalar on the tensor's device.

    The tensor is summed as 8-byte integers, and the remaining elements are added one by one. Every single flipped bit
    changes the sum.
    """
    flat = tensor.detach().contiguous().view(-1)
    size = flat.element_size()
    if flat.storage_offset() * size % 8:
        flat = flat.clone()
    whole = flat.numel() * size // 8 * 8 // size
    sums = flat[:whole].view(torch.int64).sum()
    if whole == flat.numel():
        return sums
    return sums + flat[whole:].view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]).sum(dtype=torch.int64)


class StateChanged(RunEnded):
    """Master weights or moments changed between an update and their next read. The changed values were not used."""

    code = EXIT_CRASH


class StateCheck:
    """Checks that the state of one rank's shard has not changed since an update.

    every: interval in steps; 0: never.
    """

    def __init__(self, every: int, zero: Zero, rank: int):
        self._every, self._zero, self._rank = every, zero, rank
        self._left: tuple[int, dict[str, Tensor]] | None = None
        """The newest step, and checksums (`sum_of_bits`) of the state after it; None if this step is not checked."""

    def on_phase(self, run: LiveRun, step: int, phase: str) -> None:
        if phase in ("update", "checkpoint"):
            self.require_unchanged()

    def on_update(self, run: LiveRun, step: int) -> None:
        self.note(step)

    on_skip = on_update

    def note(self, step: int) -> None:
        """If this step is checked, compute and store the checksums (`sum_of_bits`) of the state. Call this method after
        every update."""
        self._left = (step, self._sums()) if self._every and step % self._every == 0 else None

    def require_unchanged(self) -> None:
        """Compare the state with the checksums that `note` stored. Call this method before anything reads the state.

        Raises StateChanged on the rank whose state changed.
        """
        if self._left is None:
            return
        (step, before), now = self._left, self._sums()
        equal = (torch.stack([*before.values()]) == torch.stack([*now.values()])).tolist()
        names = [name for name, same in zip(now, equal, strict=True) if not same]
        if names:
            raise StateChanged(
                f"rank {self._rank}: {some_of(names, SHOWN_WEIGHTS)} changed after the update of step {step}, when no code writes them: a bit flip in memory. They were used for neither an update nor a checkpoint; {TAKE_OUT}",
                (self._rank,),
            )

    def _sums(self) -> dict[str, Tensor]:
        return {name: sum_of_bits(shard.local) for name, shard in self._zero.shards(copies=True).items()}
