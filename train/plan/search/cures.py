"""Finds changes that make a plan fit or make its step faster.

Every shown change has been planned completely.
"""

from dataclasses import dataclass
from itertools import combinations

from conf.schema import Config, PipelineSchedule
from train.plan.budget import RunPlan
from train.plan.job import layout_of
from train.plan.memory.rank_memory import host_lacking, plan_memory, rank_memory, scene_of
from train.plan.reserve import tensor_memory
from train.plan.search.candidates import VIRTUAL_STAGES
from train.plan.search.changes import broken_rule, lighter, overrides, unsearched, with_changes
from train.plan.time.rates import load_rates
from train.plan.time.stages import Stages
from train.plan.time.step_time import plan_time

SHOWN_CURES = 3
PAIRED = 5
"""Number of changes that are combined in pairs if no single change is enough: those that save the most memory."""

WORTH = 0.01
"""Minimum fraction of the step time that a change of stages must save."""


@dataclass(frozen=True)
class Cure:
    """A change that makes the recipe fit."""

    overrides: list[str]
    room_bytes: int
    step_seconds: float
    gpu_seconds: float
    """Device-seconds of one step: step_seconds times the number of devices."""
    devices: int


def find_cures(plan: RunPlan) -> list[Cure]:
    """Returns up to three changes that make the plan fit, with the fewest device-seconds per step.

    If no single change is enough, pairs of changes are tried.
    """
    saved: list[tuple[int, Config]] = []
    found = []
    for config in lighter(plan.config):
        if broken_rule(config) is None:
            peak = _peak_of_fullest(config, plan)
            saved.append((peak, config))
            found += _cure(config, plan, peak)
    if not found:
        best = [config for _, config in sorted(saved, key=lambda pair: pair[0])[:PAIRED]]
        for one, other in combinations(best, 2):
            both = _both(plan.config, one, other)
            if both is not None and broken_rule(both) is None:
                found += _cure(both, plan, _peak_of_fullest(both, plan))
    return sorted(found, key=lambda cure: cure.gpu_seconds)[:SHOWN_CURES]


def find_beyond(plan: RunPlan) -> list[Cure]:
    """Returns changes that make the plan fit and that no search tries: other settings, or up to twice the devices."""
    parallel = plan.config.parallel
    more = [with_changes(plan.config, pp=pp) for pp in range(parallel.pp + 1, 2 * parallel.pp + 1)]
    more += [with_changes(plan.config, dp=dp) for dp in range(parallel.dp + 1, 2 * parallel.dp + 1)]
    more.sort(key=lambda config: config.parallel.world)
    found = []
    for config in (*unsearched(plan.config), *more):
        if broken_rule(config) is None:
            found += _cure(config, plan, _peak_of_fullest(config, plan))
        if found and found[-1].devices > parallel.world:
            break
    return found


@dataclass(frozen=True)
class FasterSplit:
    """Another split of the layers into stages, which makes the step faster than planned.

    room_bytes: free bytes of the fullest device; negative if memory is lacking
    """

    layers: list[int]
    step_seconds: float
    room_bytes: int


def find_split(plan: RunPlan) -> FasterSplit | None:
    """Returns the layer split that best balances planned times; None if it saves too little time (WORTH)."""
    layout = layout_of(plan.config)
    if layout.pp == 1:
        return None
    lengths = Stages(plan.config, layout, load_rates(plan.config, alone=False)).balanced()
    config = with_changes(plan.config, split=lengths)
    seconds = plan_time(config).step_seconds
    if seconds > plan.step.step_seconds * (1 - WORTH):
        return None
    return FasterSplit(lengths, seconds, tensor_memory(config) - max(rank.peak_bytes for rank in plan_memory(config)))


def find_stages(plan: RunPlan) -> Cure | None:
    """Returns the change to the fastest number of stages per rank; None if no change fits and saves enough (WORTH)."""
    schedule = plan.config.parallel.schedule_facts.in_parts
    if plan.config.parallel.pp == 1 or schedule is None:
        return None
    tried = [
        with_changes(plan.config, schedule=PipelineSchedule(schedule), virtual_stages=each) for each in VIRTUAL_STAGES
    ]
    found = [
        cure for one in tried if broken_rule(one) is None for cure in _cure(one, plan, _peak_of_fullest(one, plan))
    ]
    best = min(found, key=lambda cure: cure.step_seconds, default=None)
    return best if best is not None and best.step_seconds <= plan.step.step_seconds * (1 - WORTH) else None


def _peak_of_fullest(config: Config, plan: RunPlan) -> int:
    """Returns this recipe's peak bytes on the rank that is fullest in `plan`, as a quick check."""
    rank = min(plan.fullest.pp_rank, config.parallel.pp - 1)
    return rank_memory(config, rank, scene_of(config)).peak_bytes


def _cure(config: Config, plan: RunPlan, first_look: int) -> list[Cure]:
    memory = tensor_memory(config)
    if first_look > memory:
        return []
    ranks = plan_memory(config)
    room = memory - max(rank.peak_bytes for rank in ranks)
    if room < 0 or host_lacking(config, ranks):
        return []
    seconds, devices = plan_time(config).step_seconds, layout_of(config).world
    return [Cure(overrides(config, plan.config), room, seconds, seconds * devices, devices)]


def _both(base: Config, one: Config, other: Config) -> Config | None:
    """Returns a recipe with both changes; None if they share a field."""
    values = [_values(config, base) for config in (one, other)]
    if values[0].keys() & values[1].keys():
        return None
    return with_changes(base, **values[0], **values[1])


def _values(config: Config, base: Config) -> dict[str, object]:
    found = {name: value for name, value in vars(config.parallel).items() if value != getattr(base.parallel, name)}
    for name, mine, theirs in (
        ("micro_batch_size", config.micro_batch_size, base.micro_batch_size),
        ("recompute", config.model.recompute, base.model.recompute),
        ("offload", config.model.offload, base.model.offload),
        ("loss_chunk", config.model.loss_chunk, base.model.loss_chunk),
        ("moments", config.precision.moments, base.precision.moments),
    ):
        if mine != theirs:
            found[name] = mine
    return found
