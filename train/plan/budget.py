"""Plans a recipe completely: whether the run fits, its speed, and its cost."""

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

from conf.load import compose
from conf.schema import Config
from train.export.run import SHARD_BYTES
from train.export.written_tensors import plan_files
from train.hf.tensor_names import tensors
from train.loop.layout_check import check_layout
from train.metrics.quantities import gib
from train.model.count import checkpoint_bytes
from train.optim.schedules import Schedules
from train.plan.failures import HOUR, Failures, plan_failures
from train.plan.job import device_memory, layout_of, require_hardware, require_host, require_matmuls, with_nodes
from train.plan.memory.rank_memory import RankMemory, host_bytes, host_lacking, plan_memory
from train.plan.reserve import reserve_of
from train.plan.time.step_time import StepTime, plan_time

KWH_IN_JOULES, TRILLION = 3.6e6, 1e12


class Verdict(StrEnum):
    """The plan's result for memory and disk: whether the run fits."""

    fits = "fits"
    barely = "fits barely"
    lacks = "does not fit"


BARELY = 0.03
"""Fraction of a device's memory that must be free, after the reserve, for the verdict `fits`.

Planned bytes of tensors were at most 1 % wrong when measured. The reserve may be wrong by a third.
"""


def verdict_of(room: int, memory: int) -> Verdict:
    """Returns whether a run fits.

    room: free device bytes at the peak, after the reserve; negative if memory is lacking.
    """
    return Verdict.lacks if room < 0 else Verdict.barely if room < BARELY * memory else Verdict.fits


def room_words(room: int, memory: int) -> str:
    """Returns text about free device memory. room: as in `verdict_of`."""
    if room < 0:
        return f"{gib(-room)} too little"
    return f"{gib(room)} to spare" if room >= BARELY * memory else f"only {gib(room)} free"


@dataclass
class Budget:
    """Time and cost of training on all tokens, without failures."""

    tokens: float
    days: float
    gpu_hours: float
    gpu_hours_per_trillion_tokens: float
    cost: float | None
    """Cost in the currency `hardware.currency`; None without hardware.price_per_hour."""
    energy_kwh: float | None
    """Energy at the devices' power limit; None if unknown."""

    def lasting(self, share: float) -> "Budget":
        """Returns the budget with failures. share: useful fraction of the time."""
        cost, energy = (None if value is None else value / share for value in (self.cost, self.energy_kwh))
        hours = self.gpu_hours / share
        return Budget(self.tokens, self.days / share, hours, hours * TRILLION / self.tokens, cost, energy)

    def __add__(self, other: "Budget") -> "Budget":
        """Returns the budget of two runs together. Cost and energy are None if one of the runs has no value."""
        tokens, hours = self.tokens + other.tokens, self.gpu_hours + other.gpu_hours
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        energy = None if self.energy_kwh is None or other.energy_kwh is None else self.energy_kwh + other.energy_kwh
        return Budget(tokens, self.days + other.days, hours, hours * TRILLION / tokens, cost, energy)


@dataclass(frozen=True)
class DiskBytes:
    """Disk usage of a run."""

    checkpoint: int
    """Bytes of one checkpoint."""
    checkpoints: int
    """Maximum number of checkpoints on disk, including an unfinished one."""
    export: int
    """Bytes of an exported folder of weights; 0 without exports."""
    has: int
    """Capacity of the disk in bytes; 0 if unknown."""

    @property
    def whole(self) -> int:
        """Bytes of the run's checkpoints and of up to three exported folders."""
        return self.checkpoints * self.checkpoint + 3 * self.export

    @property
    def lacking(self) -> int:
        return max(0, self.whole - self.has) if self.has else 0

    @property
    def most_kept(self) -> int:
        """The largest checkpoint.keep for which the disk has room, or 0."""
        return max(0, (self.has - 3 * self.export) // self.checkpoint - 1)


def disk_of(config: Config) -> DiskBytes:
    """Returns the largest disk usage of a run."""
    saves, steps = config.checkpoint, config.steps
    every = -(-steps // saves.every) if saves.every else 1
    stay = min(saves.keep + 1 if saves.keep else every, every)
    stay += (steps // saves.keep_every if saves.keep and saves.keep_every else 0) + saves.keep_best
    exported = 0
    if saves.weights_every and not config.adapter.on:
        files = plan_files(list(tensors(config.model)), config.export.dtype, SHARD_BYTES)
        exported = sum(written.nbytes for file in files for written in file.written)
    return DiskBytes(checkpoint_bytes(config), stay, exported, int(config.hardware.disk_bytes))


@dataclass
class RunPlan:
    """The complete plan of a recipe, for mode=plan."""

    config: Config
    ranks: list[RankMemory]
    step: StepTime
    budget: Budget
    failures: Failures | None
    """Costs of failures; None if not planned, as on CPUs."""
    memory_bytes: int
    """Memory of one device."""

    @property
    def fullest(self) -> RankMemory:
        """The rank with the least free memory."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    @property
    def reserve(self) -> dict[str, int]:
        """Device memory that tensors cannot use, by name (train/plan/reserve.py)."""
        return reserve_of(self.config)

    @property
    def room_bytes(self) -> int:
        """Free bytes of the fullest rank after the reserve; may be negative."""
        return self.memory_bytes - sum(self.reserve.values()) - self.fullest.peak_bytes

    @property
    def lasting(self) -> Budget:
        """The budget with failures; the budget without failures if these cost 99 % of the time or more."""
        share = self.failures.effective_share if self.failures is not None else 1.0
        return self.budget.lasting(share) if share > 0.01 else self.budget

    @property
    def host_bytes(self) -> int:
        """Host memory used by the ranks of the fullest node."""
        return host_bytes(self.config, self.ranks)

    @cached_property
    def disk(self) -> DiskBytes:
        """The run's disk usage."""
        return disk_of(self.config)

    @property
    def fits(self) -> bool:
        return self.room_bytes >= 0 and not host_lacking(self.config, self.ranks) and not self.disk.lacking

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.room_bytes, self.memory_bytes) if self.fits else Verdict.lacks


def make_plan(config: Config) -> RunPlan:
    """Plan a recipe. Raises UserError if it cannot run or be planned."""
    require_hardware(config.hardware)
    require_host(config)
    require_matmuls(config)
    config = with_nodes(config)
    check_layout(config)
    step = plan_time(config)
    failures = plan_failures(config, step.step_seconds)
    return RunPlan(config, plan_memory(config), step, budget_of(config, step), failures, device_memory(config))


def budget_of(config: Config, step: StepTime) -> Budget:
    """Returns the time, cost and energy of training on all tokens."""
    hardware, devices = config.hardware, layout_of(config).world
    tokens, seconds = _whole_run(config, step)
    hours = seconds / HOUR
    return Budget(
        tokens=tokens,
        days=hours / 24,
        gpu_hours=hours * devices,
        gpu_hours_per_trillion_tokens=hours * devices * TRILLION / tokens,
        cost=None if hardware.price_per_hour is None else hours * devices * hardware.price_per_hour,
        energy_kwh=None if hardware.watts is None else hours * HOUR * devices * hardware.watts / KWH_IN_JOULES,
    )


def _whole_run(config: Config, step: StepTime) -> tuple[float, float]:
    """Returns the run's tokens and seconds. Step times in the batch ramp are interpolated."""
    sizes = Schedules(config).batch_sizes
    wanted = config.plan.tokens and config.plan.tokens / config.seq_len  # number of sequences
    samples, seconds = 0.0, 0.0
    least = min(sizes)
    first = step.step_seconds
    if least < config.batch_size:
        first = plan_time(with_batch(config, least)).step_seconds
    for size in sizes:
        if wanted and samples >= wanted:
            break
        share = (config.batch_size - size) / max(1, config.batch_size - least)
        samples, seconds = samples + size, seconds + share * first + (1 - share) * step.step_seconds
    if wanted:  # end at the exact token, not at the end of a step
        seconds += (wanted - samples) / config.batch_size * step.step_seconds
        samples = wanted
    return samples * config.seq_len, seconds


def with_batch(config: Config, batch: int) -> Config:
    """Returns the recipe with this batch size, without a ramp."""
    return replace(config, batch_size=batch, optim=replace(config.optim, batch_ramp_start=None, batch_ramp_steps=0))


def later_phases(config: Config) -> list[tuple[str, RunPlan]]:
    """Returns each name in plan.phases with its plan, on this recipe's devices."""
    planned = []
    for name in config.plan.phases:
        phase = compose(f"conf={name}", "data.path=none", "mode=plan")
        planned.append(
            (
                name,
                make_plan(replace(phase, hardware=config.hardware, plan=replace(config.plan, phases=[], tokens=None))),
            )
        )
    return planned
