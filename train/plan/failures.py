"""The cost of failures: time for checkpoints, lost work and restarts, and the advised checkpoint interval.

    M   mean seconds between failures, which are random
    T   seconds of training between two checkpoints; at least w, because saves do not overlap
    s   seconds that a checkpoint stalls training
    w   seconds from the end of the stall until the checkpoint is complete
    R   seconds from a failure to the next step

T seconds of training take this time on average (Daly 2006, equation 20):

    M exp((R + w) / M) (exp((T + s) / M) - 1)

The effective share is T divided by this time. The plan advises the largest T whose share is at most FLAT below the best
share.
"""

import itertools
import math
from dataclasses import dataclass

from conf.schema import Config
from train.model.count import checkpoint_bytes
from train.plan.job import layout_of

HOUR = 3600.0
DETECTION = 600.0
"""Seconds to notice a failure and to replace the node (MegaScale, NSDI 2024, 6.3)."""
RESCHEDULING, OF_A_NODE = 11.1, 0.003
"""Seconds from the diagnosis to the first step: a constant, and the seconds that each node adds (bench/RESULTS.md)."""
WARM_UP_STEPS = 2.0
"""Extra time of the first steps after a start, in units of a normal step; measured on a CPU."""
FLAT = 0.005
"""Maximum loss of effective share at the advised checkpoint interval."""
REPAIR = 5.5 * 24 * HOUR
"""Mean seconds to repair a node (InfiniteHBD's trace of 400 servers, SIGCOMM 2025)."""
COVERED = 0.99
"""Fraction of the time in which the spare nodes are enough."""


@dataclass(frozen=True)
class SaveCosts:
    """Checkpoint and failure times of a run, in seconds."""

    between_failures: float
    restart: float
    """Seconds from a failure to the next step, loading included."""
    stall: float
    """Seconds that training waits at each checkpoint."""
    write: float
    """Seconds that a checkpoint is still being written after training has continued."""

    def effective(self, interval: float) -> float:
        """Returns the fraction of the time that trains. interval: seconds of training between checkpoints."""
        mean = self.between_failures
        lost, segment = (self.restart + self.write) / mean, (interval + self.stall) / mean
        return interval / mean * math.exp(-lost) / math.expm1(segment) if lost + segment < 500 else 0.0

    @property
    def best_interval(self) -> float:
        """The interval between checkpoints with the largest fraction of training time.

        x = (T + s) / M solves x = 1 + s / M - exp(-x), with the symbols at the top of this file. Newton's iteration
        approaches x from above.
        """
        stall = max(self.stall / self.between_failures, 1e-12)
        x = stall + math.sqrt(2 * stall)  # Young's formula never gives less than the solution
        for _ in range(20):
            x += (x - stall + math.expm1(-x)) / math.expm1(-x)
        return max(self.write, self.between_failures * x - self.stall)

    def longest_interval(self, loss: float) -> float:
        """Returns the longest interval whose effective share is at most `loss` below the best share."""
        best = self.best_interval
        low, high, least = best, best + 10 * self.between_failures, self.effective(best) - loss
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.effective(middle) >= least else (low, middle)
        return low


@dataclass(frozen=True)
class Failures:
    """Costs of failures in a plan. Shares are fractions from 0 to 1."""

    between_seconds: float
    restart_seconds: float
    restart_parts_seconds: dict[str, float]
    """Durations that add up to restart_seconds, by name. `loading` is missing if hardware.storage_bandwidth is unknown,
    or if the run has in-memory copies."""
    stall_seconds: float
    write_seconds: float
    interval_seconds: float
    """Seconds from one checkpoint or in-memory copy to the next."""
    effective_share: float
    """Fraction of the time that trains: without lost steps, restarts and checkpoints."""
    best_steps: int | None
    """Advised number of steps between checkpoints; None if hardware.storage_bandwidth is unknown."""
    best_share: float | None
    """`effective_share` if the run saves every best_steps steps."""
    spare_nodes: int
    """Number of spare nodes that is enough in the fraction COVERED of the time."""


def plan_failures(config: Config, step_seconds: float) -> Failures | None:
    """Returns the costs of failures; None if plan.failures is 0 or hardware.rates lacks `host` (as on CPUs)."""
    host, layout, checkpoint = config.hardware.rates.get("host"), layout_of(config), config.checkpoint
    if host is None or not config.plan.failures:
        return None
    between = HOUR / (config.plan.failures * layout.world)
    size, storage = checkpoint_bytes(config), config.hardware.storage_bandwidth
    moved, stall = size / storage if storage else 0.0, size / layout.world / host.bandwidth
    parts = {
        "detection": DETECTION,
        "rescheduling": RESCHEDULING + OF_A_NODE * layout.world / layout.ranks_per_node,
        "warm_up": WARM_UP_STEPS * step_seconds,
    } | ({"loading": moved} if storage else {})
    write = moved
    if 0 < checkpoint.staging_bytes < size / layout.world:  # a small staging buffer makes training wait for the disk
        stall, write = max(stall, moved), 0.0
    on_disk = SaveCosts(between, sum(parts.values()), stall, write)
    steps, saving, best = checkpoint.every or math.inf, on_disk, None
    if storage:
        best = max(1, math.ceil(write / step_seconds), math.floor(on_disk.longest_interval(FLAT) / step_seconds))
    if checkpoint.every_memory:  # a restart reads in-memory copies; checkpoints on disk still stall training
        steps = checkpoint.every_memory
        shared = on_disk.stall * steps / checkpoint.every if checkpoint.every else 0.0
        parts.pop("loading", None)
        sent = size / layout.world / config.hardware.rates["across"].bandwidth
        saving = SaveCosts(between, sum(parts.values()), on_disk.stall + shared, sent)
    interval = min(steps * step_seconds, 1e3 * between)
    return Failures(
        between_seconds=between,
        restart_seconds=saving.restart,
        restart_parts_seconds=parts,
        stall_seconds=saving.stall,
        write_seconds=saving.write,
        interval_seconds=interval,
        effective_share=saving.effective(interval),
        best_steps=best,
        best_share=None if best is None else on_disk.effective(best * step_seconds),
        spare_nodes=spares(REPAIR / between),
    )


def spares(mean: float) -> int:
    """Returns the smallest number of spare nodes that is enough in the fraction COVERED of the time.

    mean: mean number of nodes under repair (Poisson distributed)
    """
    shares = (math.exp(count * math.log(mean) - mean - math.lgamma(count + 1)) for count in itertools.count())
    return next(count for count, share in enumerate(itertools.accumulate(shares)) if share >= COVERED)
