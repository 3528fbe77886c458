"""A plan as a whole: does it fit, how fast is it, and what does the run cost."""

from dataclasses import dataclass, replace
from enum import StrEnum

from conf.load import compose
from conf.schema import Config
from train.loop.layout_check import check_layout
from train.model.count import checkpoint_bytes, count_parameters
from train.optim.schedules import Schedules
from train.plan.failures import HOUR, Failures, plan_failures
from train.plan.job import device_memory, layout_of, require_hardware, require_host, require_products, with_nodes
from train.plan.memory.rank_memory import RankMemory, host_bytes, host_lacking, plan_memory
from train.plan.reserve import reserve_of
from train.plan.time.step_time import StepTime, plan_time

KWH_IN_JOULES, TRILLION = 3.6e6, 1e12


class Verdict(StrEnum):
    """What a plan says of a run."""

    fits = "fits"
    barely = "fits barely"
    lacks = "does not fit"


BARELY = 0.03
"""Share of a device that must be left beside reserve and imbalance: planned tensors have been within 1 % of measured ones, and the
reserve is an estimate that may be off by a third."""


def verdict_of(room: int, memory: int) -> Verdict:
    """Whether a peak that leaves `room` of a device's memory, its reserve apart, is one that a run can rely on."""
    return Verdict.lacks if room < 0 else Verdict.barely if room < BARELY * memory else Verdict.fits


@dataclass
class Budget:
    """What all tokens of the run take, step by step through its ramp of batch sizes, without failures."""

    tokens: float
    days: float
    gpu_hours: float
    gpu_hours_per_trillion_tokens: float
    cost: float | None
    """In hardware.currency; None without hardware.price_per_hour."""
    energy_kwh: float | None
    """Energy of the devices at their limit of power; None where it is not given."""

    def lasting(self, share: float) -> "Budget":
        """The budget where only a share of the time is spent on steps that last."""
        cost, energy = (None if value is None else value / share for value in (self.cost, self.energy_kwh))
        hours = self.gpu_hours / share
        return Budget(self.tokens, self.days / share, hours, hours * TRILLION / self.tokens, cost, energy)

    def __add__(self, other: "Budget") -> "Budget":
        """One run after another. Costs that are not known stay so."""
        tokens, hours = self.tokens + other.tokens, self.gpu_hours + other.gpu_hours
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        energy = None if self.energy_kwh is None or other.energy_kwh is None else self.energy_kwh + other.energy_kwh
        return Budget(tokens, self.days + other.days, hours, hours * TRILLION / tokens, cost, energy)


@dataclass(frozen=True)
class DiskBytes:
    """Bytes on disk."""

    checkpoint: int
    """Bytes of one checkpoint."""
    checkpoints: int
    """How many there are at one time: those that stay, and the one that is being written."""
    export: int
    """Bytes of a folder of weights; 0 where the run writes none."""
    has: int
    """Bytes of the disk; 0 for not known."""

    @property
    def whole(self) -> int:
        """Bytes of the run, with the three folders of weights that there are while the newest is written."""
        return self.checkpoints * self.checkpoint + 3 * self.export

    @property
    def lacking(self) -> int:
        return max(0, self.whole - self.has) if self.has else 0

    @property
    def most_kept(self) -> int:
        """The largest checkpoint.keep that the disk has room for, 0 for none."""
        return max(0, (self.has - 3 * self.export) // self.checkpoint - 1)


def disk_of(config: Config) -> DiskBytes:
    """What a run keeps on disk (train/checkpoint/commit.py), where each save may have to wait for the next to be whole."""
    saves, steps = config.checkpoint, config.steps
    every = -(-steps // saves.every) if saves.every else 1
    stay = min(saves.keep + 1 if saves.keep else every, every)
    stay += (steps // saves.keep_every if saves.keep and saves.keep_every else 0) + saves.keep_best
    exported = 2 * (count_parameters(config.model).total + count_parameters(config.model).mtp)
    wanted = bool(saves.weights_every) and not config.adapter.on
    return DiskBytes(checkpoint_bytes(config), stay, exported * wanted, int(config.hardware.disk_bytes))


@dataclass
class RunPlan:
    """All that mode=plan knows of a recipe."""

    config: Config
    ranks: list[RankMemory]
    step: StepTime
    budget: Budget
    failures: Failures | None
    """None where nobody knows how long a checkpoint takes: on CPUs."""
    memory_bytes: int
    """Memory of one device."""

    @property
    def fullest(self) -> RankMemory:
        """The rank with the least room."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    @property
    def reserve(self) -> dict[str, int]:
        """What of a device no tensor can have, by name (train/plan/reserve.py)."""
        return reserve_of(self.config)

    @property
    def room_bytes(self) -> int:
        """What the fullest rank leaves free beside the reserve; negative: what it lacks."""
        return self.memory_bytes - sum(self.reserve.values()) - self.fullest.peak_bytes

    @property
    def host_bytes(self) -> int:
        """What the ranks of the fullest node keep in the host's memory."""
        return host_bytes(self.config, self.ranks)

    @property
    def disk(self) -> DiskBytes:
        """What the run has on disk at one time."""
        return disk_of(self.config)

    @property
    def fits(self) -> bool:
        return self.room_bytes >= 0 and not host_lacking(self.config, self.ranks) and not self.disk.lacking

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.room_bytes, self.memory_bytes) if self.fits else Verdict.lacks


def make_plan(config: Config) -> RunPlan:
    """Plan a recipe. Raises UserError for a layout that cannot run and for what the planner has no rule for."""
    require_hardware(config.hardware)
    require_host(config)
    require_products(config)
    config = with_nodes(config)
    check_layout(config)
    step = plan_time(config)
    failures = plan_failures(config, step.step_seconds)
    return RunPlan(config, plan_memory(config), step, budget_of(config, step), failures, device_memory(config))


def budget_of(config: Config, step: StepTime) -> Budget:
    """Days, GPU hours, cost and energy of the token budget."""
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
    """Tokens of the run, and seconds of its steps. A step of the ramp is priced by its batch: the smallest and the full one are planned,
    and the time between them grows evenly, as every further micro-batch takes as long as the one before."""
    sizes = Schedules(config).batch_sizes
    wanted = config.plan.tokens and config.plan.tokens / config.seq_len  # sequences
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
    if wanted:  # whole steps no longer count: to the token
        seconds += (wanted - samples) / config.batch_size * step.step_seconds
        samples = wanted
    return samples * config.seq_len, seconds


def with_batch(config: Config, batch: int) -> Config:
    """The recipe with another batch, always that one."""
    return replace(config, batch_size=batch, optim=replace(config.optim, batch_ramp_start=None, batch_ramp_steps=0))


def later_phases(config: Config) -> list[tuple[str, RunPlan]]:
    """plan.phases, each planned with this plan's devices, for its time alone."""
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
