"""The cost of failures: time for checkpoints, lost work and restarts, and the best checkpoint interval.

Failures come at random, on average every M seconds. A checkpoint stalls training for s seconds and is complete w
seconds later; an incomplete checkpoint does not count. A failure loses the work since the newest complete checkpoint: on
average T / 2 + w seconds if a checkpoint starts every T seconds. Then R seconds pass until the next step. So T seconds
of training take, on average (Daly 2006, equation 20, where the write during training counts as time lost by a failure):

    M exp((R + w) / M) (exp((T + s) / M) - 1)

The best T has the lowest cost per second of training, but is at least w, because each save waits for the last.
"""

import itertools
import math
from dataclasses import dataclass

from conf.schema import Config
from train.model.count import checkpoint_bytes
from train.plan.job import layout_of

HOUR = 3600.0
NOTICED_AND_STARTED, START_OF_A_NODE = 16.0, 0.003
"""Restart times, in seconds: from a lost node to the next step of a toy model, and the addition per node.

Source: bench/RESULTS.md, a link that is cut, and starts of 64 to 4096 nodes.
"""
REPAIR = 5.5 * 24 * HOUR
"""Mean repair time of a node, in seconds (InfiniteHBD's trace of 400 servers, SIGCOMM 2025; median 0.85 days)."""
COVERED = 0.99
"""Share of the time in which the spare nodes must suffice."""
DISK_BANDWIDTH = 1e9
"""Bytes per second that each node writes or reads of a checkpoint, with all nodes active at once.

Source: Meta's storage for Llama 3 sustained 2 TB/s for 2048 nodes.
"""


@dataclass(frozen=True)
class SaveCosts:
    """Checkpoint and failure times of a run, in seconds."""

    between_failures: float
    restart: float
    """From a failure to the next step, including reading the checkpoint."""
    stall: float
    """Time that training waits at each checkpoint."""
    write: float
    """From the end of the stall until the checkpoint is complete."""

    def effective(self, interval: float) -> float:
        """Share of the time spent on lasting steps, with a checkpoint every `interval` seconds of training."""
        mean = self.between_failures
        lost, segment = (self.restart + self.write) / mean, (interval + self.stall) / mean
        return interval / mean * math.exp(-lost) / math.expm1(segment) if lost + segment < 500 else 0.0

    @property
    def best_interval(self) -> float:
        """The interval with the largest effective share.

        There, x = (T + s) / M solves x = 1 + s / M - exp(-x); Newton's steps approach x from above.
        """
        stall = max(self.stall / self.between_failures, 1e-12)
        x = stall + math.sqrt(2 * stall)  # Young's root is never below it
        for _ in range(20):
            x += (x - stall + math.expm1(-x)) / math.expm1(-x)
        return max(self.write, self.between_failures * x - self.stall)


@dataclass(frozen=True)
class Failures:
    """Failures and checkpoint intervals in a plan; seconds, and shares of 1."""

    between_seconds: float
    restart_seconds: float
    stall_seconds: float
    write_seconds: float
    interval_seconds: float
    """From one checkpoint, or copy in memory, to the next."""
    effective_share: float
    best_steps: int
    """Steps between checkpoints with the largest effective share."""
    best_share: float
    spare_nodes: int
    """Spare nodes that suffice in a share COVERED of the time, if every failure removes a node until its repair."""


def plan_failures(config: Config, step_seconds: float) -> Failures | None:
    """The costs of failures; None on CPUs, and if the bandwidth to the host is unknown."""
    host, layout, checkpoint = config.hardware.rates.get("host"), layout_of(config), config.checkpoint
    if host is None or not config.plan.failures:
        return None
    between = HOUR / (config.plan.failures * layout.world)
    nodes = layout.world / layout.ranks_per_node
    each = checkpoint_bytes(config) / layout.world
    moved = each * layout.ranks_per_node / DISK_BANDWIDTH
    started = NOTICED_AND_STARTED + START_OF_A_NODE * nodes
    on_disk = SaveCosts(between, started + moved, each / host.bandwidth, moved)
    if 0 < checkpoint.staging_bytes < each:  # training waits for the disk
        on_disk = SaveCosts(between, started + moved, moved, 0.0)
    best = math.ceil(on_disk.best_interval / step_seconds)
    steps, saving = checkpoint.every or math.inf, on_disk
    if checkpoint.every_memory:  # after the failure of a node; checkpoints on disk add their stalls
        steps = checkpoint.every_memory
        shared = on_disk.stall * steps / checkpoint.every if checkpoint.every else 0.0
        sent = each / config.hardware.rates["across"].bandwidth
        saving = SaveCosts(between, started, on_disk.stall + shared, sent)
    interval = min(steps * step_seconds, 1e3 * between)
    return Failures(
        between_seconds=between,
        restart_seconds=saving.restart,
        stall_seconds=saving.stall,
        write_seconds=saving.write,
        interval_seconds=interval,
        effective_share=saving.effective(interval),
        best_steps=best,
        best_share=on_disk.effective(best * step_seconds),
        spare_nodes=spares(REPAIR / between),
    )


def spares(mean: float) -> int:
    """The smallest number of spare nodes that suffices in a share COVERED of the time.

    mean: nodes under repair on average; their number has a Poisson distribution.
    """
    shares = (math.exp(count * math.log(mean) - mean - math.lgamma(count + 1)) for count in itertools.count())
    return next(count for count, share in enumerate(itertools.accumulate(shares)) if share >= COVERED)
