"""What failures cost a run: the time that its checkpoints, its losses and its restarts take, and how often to save.

Failures come at random, M seconds apart in the mean. A checkpoint holds the training up for s seconds and is written w seconds later; one
that is not written yet does not count. A failure loses what was done since the newest that counts, T / 2 + w in the mean where one is
begun every T seconds, and R seconds until the next step. So T seconds of training take, in the mean (Daly 2006, equation 20, with the
writing beside the training counted as time that is lost with a failure)

    M exp((R + w) / M) (exp((T + s) / M) - 1)

and the best T is the one with the least of it for a second of training, but not less than w, as the next save waits for the last.
"""

import itertools
import math
from dataclasses import dataclass

from conf.schema import Config
from train.model.count import checkpoint_bytes
from train.plan.job import layout_of

HOUR = 3600.0
NOTICED_AND_STARTED, START_OF_A_NODE = 16.0, 0.003
"""Seconds from a lost node to the next step of a toy model, and what each node adds to a start (bench/RESULTS.md: a link that is cut;
starts of 64 to 4096 nodes)."""
REPAIR = 5.5 * 24 * HOUR
"""Seconds in which a node is repaired, in the mean (InfiniteHBD's trace of 400 servers, SIGCOMM 2025; the median is 0.85 days)."""
COVERED = 0.99
"""Share of the time in which spare nodes are to be enough."""
DISK_BANDWIDTH = 1e9
"""Bytes a second that each node writes of a checkpoint, and reads of it, all at once: Meta's storage for Llama 3 sustained 2 TB/s for 2048
nodes."""


@dataclass(frozen=True)
class SaveCosts:
    """Checkpoints of a run that fails now and then. Seconds."""

    between_failures: float
    restart: float
    """From a failure to the next step, with reading the checkpoint."""
    stall: float
    """For which the training waits at each checkpoint."""
    write: float
    """From then until it counts."""

    def effective(self, interval: float) -> float:
        """Share of the time that is spent on steps which last, with a checkpoint every `interval` seconds of training."""
        mean = self.between_failures
        lost, segment = (self.restart + self.write) / mean, (interval + self.stall) / mean
        return interval / mean * math.exp(-lost) / math.expm1(segment) if lost + segment < 500 else 0.0

    @property
    def best_interval(self) -> float:
        """With the largest effective share: there x = (T + s) / M is 1 + s / M - exp(-x), which Newton's steps come down to from above."""
        stall = max(self.stall / self.between_failures, 1e-12)
        x = stall + math.sqrt(2 * stall)  # Young's root is never below it
        for _ in range(20):
            x += (x - stall + math.expm1(-x)) / math.expm1(-x)
        return max(self.write, self.between_failures * x - self.stall)


@dataclass(frozen=True)
class Failures:
    """What a plan says of them; seconds, shares of 1."""

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
    """Spare nodes that are enough in COVERED of the time, where each failure takes a node away until it is repaired."""


def plan_failures(config: Config, step_seconds: float) -> Failures | None:
    """None on CPUs, and where the link to the host is not known."""
    host, layout, checkpoint = config.hardware.rates.get("host"), layout_of(config), config.checkpoint
    if host is None or not config.plan.failures:
        return None
    between = HOUR / (config.plan.failures * layout.world)
    nodes = layout.world / layout.ranks_per_node
    each = checkpoint_bytes(config) / layout.world
    moved = each * layout.ranks_per_node / DISK_BANDWIDTH
    started = NOTICED_AND_STARTED + START_OF_A_NODE * nodes
    on_disk = SaveCosts(between, started + moved, each / host.bandwidth, moved)
    if 0 < checkpoint.staging_bytes < each:  # the training waits for the disk
        on_disk = SaveCosts(between, started + moved, moved, 0.0)
    best = math.ceil(on_disk.best_interval / step_seconds)
    steps, saving = checkpoint.every or math.inf, on_disk
    if checkpoint.every_memory:  # a node's failure; checkpoints on disk hold it up beside them
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
    """The least number that is enough in COVERED of the time where so many are out in the mean (a Poisson distribution)."""
    shares = (math.exp(count * math.log(mean) - mean - math.lgamma(count + 1)) for count in itertools.count())
    return next(count for count, share in enumerate(itertools.accumulate(shares)) if share >= COVERED)
