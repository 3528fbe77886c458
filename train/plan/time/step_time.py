"""Seconds of a training step: the pipeline simulated action by action, then reduction, optimizer and gather.

The actions and their order are torch's own (parallel/pipeline/simulate.py); their lengths are those of stages.py. MFU is
counted as DeepSeek counts it: without MTP, against the bf16 peak.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from conf.schema import Config, Rate
from parallel.pipeline.orders import Action
from parallel.pipeline.simulate import Program, Simulation, stages_ahead
from train.model.count import flops_per_token
from train.plan.job import layout_of, program_of, require_hardware
from train.plan.time.rates import HOST_LAUNCH, Rates, load_rates
from train.plan.time.stages import Stages, require_rule
from train.plan.time.update import UpdateTime, WeightCounts, count_weights, stage3_seconds, update_time
from train.plan.work_recorder import Work


@dataclass
class StepTime:
    """What a plan says about speed. Seconds are of one optimizer step."""

    step_seconds: float
    pipeline_seconds: float
    """From the first action of any rank to the last."""
    bubble_seconds: float
    """Idle time of a rank, mean over the ranks of a pipeline."""
    bubble_share: float
    """Idle time as a share of pipeline_seconds."""
    action_seconds: dict[str, float]
    """Seconds by kind of action (F, B, I, W, FB), mean over the ranks of a pipeline."""
    exposed_communication_seconds: float
    """Waiting for experts' tokens inside actions, mean over the ranks of a pipeline."""
    work_seconds: dict[str, float]
    """Seconds of computing by kind of work, mean over the ranks of a pipeline."""
    host_seconds: float
    """Seconds that a core of the host takes to launch that computing, which it does ahead of the device, mean over the ranks of a pipeline; 0 where
    nobody says what a launch takes. In no other figure: where it is more than the computing, the host binds, and the step takes longer."""
    exchange_seconds: float
    """Seconds of experts' exchanges, hidden or not, mean over the ranks of a pipeline."""
    update: UpdateTime
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    mfu_causal: float | None
    """Against the bf16 peak of the description; None where it has none."""
    mfu_full: float | None
    """MFU with attention counted without its mask."""
    actions: list[list[Action]]
    """What every rank of a pipeline does, in order."""
    length: Callable[[Action], float]
    """Seconds of an action."""
    transfer_seconds: float
    """From the end of a stage to its output on the next rank."""
    simulation: Simulation
    rates: str
    """Where the rates come from."""
    threads: int | None
    """Threads of a rank, where they were measured on a CPU."""
    spread: float | None
    """See Rates.spread."""

    @property
    def host_binds(self) -> bool:
        """Whether launching the passes takes longer than computing them."""
        return self.host_seconds > sum(self.work_seconds.values())

    @property
    def interval_seconds(self) -> tuple[float, float] | None:
        """Between what and what four of five such jobs take a step; None for rates that were not held against jobs."""
        if self.spread is None:
            return None
        return self.step_seconds * math.exp(-self.spread), self.step_seconds * math.exp(self.spread)


@dataclass(frozen=True)
class SimulatedStep:
    """What a search asks of a step; a plan adds what it consists of."""

    simulation: Simulation
    update: UpdateTime
    length: Callable[[Action], float]
    transfer_seconds: float

    @property
    def seconds(self) -> float:
        return self.simulation.makespan + self.update.seconds


def simulate_step(stages: Stages, micro_batches: int | None = None) -> SimulatedStep:
    """The pipeline, action by action, and the update of the rank that takes longest over it. micro_batches: in place of all."""
    extra = _stage3(stages) if stages.config.parallel.zero == 3 else {}

    def duration(action: Action) -> float:
        return stages.elapsed(action).seconds + extra.get(action.kind, 0.0)

    transfer = _transfer(stages)
    program = program_of(stages.config, micro_batches)
    simulation = program.run(duration, transfer)
    return SimulatedStep(simulation, slowest_update(stages, program, simulation, duration), duration, transfer)


LONG = 12
"""Micro-batches per rank of a pipeline from which on further ones are not simulated: each takes as long as those before it."""


def estimate_step(stages: Stages) -> tuple[float, float]:
    """Seconds of a step, and the busiest rank's time over the mean, from a step that is long enough to tell."""
    pp, count = stages.layout.pp, stages.micro_batches
    if count <= (LONG + 1) * pp or count % pp:
        step = simulate_step(stages)
        return step.seconds, step.simulation.imbalance
    steps = [simulate_step(stages, few) for few in ((LONG - 1) * pp, LONG * pp)]
    shorter, longer = (step.simulation.makespan for step in steps)
    pipeline = longer + (longer - shorter) * (count / pp - LONG)
    return pipeline + steps[1].update.seconds, steps[1].simulation.imbalance


def plan_time(config: Config, rates: Rates | None = None) -> StepTime:
    """Plan the time of a step. Raises UserError for what cannot run, has no rule, or has no rates."""
    require_hardware(config.hardware)
    require_rule(config)
    layout = layout_of(config)
    rates = rates or load_rates(config, alone=layout.world == 1)
    stages = Stages(config, layout, rates)
    step, actions = simulate_step(stages), program_of(config).actions
    result, duration, seconds = step.simulation, step.length, step.seconds
    rate = config.batch_size * config.seq_len / seconds
    return StepTime(
        step_seconds=seconds,
        pipeline_seconds=result.makespan,
        bubble_seconds=result.bubble * result.makespan,
        bubble_share=result.bubble,
        action_seconds=_by_kind(actions, duration),
        exposed_communication_seconds=sum(stages.elapsed(a).exposed for line in actions for a in line) / layout.pp,
        work_seconds=_work(stages, rates.of),
        host_seconds=sum(_work(stages, lambda one: one.calls).values()) * rates.rates.get(HOST_LAUNCH, Rate()).seconds,
        exchange_seconds=_exchanges(stages),
        update=step.update,
        tokens_per_second=rate,
        tokens_per_second_per_gpu=rate / layout.world,
        mfu_causal=mfu(config, seconds, causal=True),
        mfu_full=mfu(config, seconds, causal=False),
        actions=actions,
        length=duration,
        transfer_seconds=step.transfer_seconds,
        simulation=result,
        rates=rates.source,
        threads=rates.threads,
        spread=rates.spread,
    )


def _transfer(stages: Stages) -> float:
    """Seconds from the end of a stage to its output on the next rank."""
    layout = stages.layout
    if layout.pp == 1:
        return 0.0
    where = "inside" if layout.stage_ranks < layout.ranks_per_node else "across"
    moved = stages.tokens * stages.config.model.hidden * stages.element
    return stages.rates.of(Work(f"send_{where}", bytes=moved))


def slowest_update(stages: Stages, *simulated: Any) -> UpdateTime:
    """Time of the update of the rank that takes longest over it, with what is left of the reduction when its passes are through.
    simulated: as for `_hidden`; without it all is hidden that may be, so that this is the least time.
    """
    updates: dict[WeightCounts, UpdateTime] = {}
    for rank, ids in enumerate(stages.placement):
        held = count_weights(stages.config, stages.layers, ids, len(stages.layers) - 1)
        if held not in updates:
            update = updates[held] = update_time(stages.config, stages.layout, stages.rates, held)
            if stages.reduces_ahead and len(ids) > 1:
                hidden = _hidden(stages, rank, update.reduce, *simulated) if simulated else update.reduce
                updates[held] = replace(update, reduce=update.reduce - hidden, hidden=hidden)
    return max(updates.values(), key=lambda update: update.seconds)


def _hidden(
    stages: Stages, rank: int, whole: float, program: Program, simulation: Simulation, length: Callable[[Action], float]
) -> float:
    """Seconds of a rank's reduction, which takes `whole`, that its passes hide, less what they lose to it: of all stages but the last to
    end, from the end of the first (parallel/zero/whole_weights.py).
    """
    actions = program.actions[rank]
    ahead = stages_ahead(actions)
    first, last = (simulation.starts[rank][place] + length(actions[place]) for place in (min(ahead.values()), -1))
    rest = [stage for stage in stages.placement[rank] if stage not in ahead]
    held = count_weights(stages.config, stages.layers, rest, len(stages.layers) - 1)
    late = update_time(stages.config, stages.layout, stages.rates, held).reduce
    return (1 - stages.taken) * min(whole - late, last - first)


def _stage3(stages: Stages) -> dict[str, float]:
    """Seconds that stage 3's gathers add to F and B: what the pass cannot hide, and the computing they take meanwhile."""
    held = count_weights(stages.config, stages.layers, stages.placement[0], len(stages.layers) - 1)
    forward, backward = stage3_seconds(stages.config, stages.layout, stages.rates, held)
    added = {}
    for kind, moved in (("F", forward), ("B", backward)):
        passed = stages.elapsed(Action(kind, 0, 0)).seconds
        added[kind] = max(moved, passed + stages.taken * moved) - passed
    return added


def _by_kind(actions: list[list[Action]], duration: Callable[[Action], float]) -> dict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)
    for line in actions:
        for action in line:
            total[action.kind] += duration(action)
    return {kind: seconds / len(actions) for kind, seconds in total.items()}


def _work(stages: Stages, measure: Callable[[Work], float]) -> dict[str, float]:
    """What this measures of the computing of all micro-batches, by kind of work, mean over ranks."""
    total: defaultdict[str, float] = defaultdict(float)
    for stage in range(len(stages.layers)):
        made = stages.directions(stage)
        for one in made.forward.work + made.backward.work:
            total[one.kind] += measure(one)
    scale = stages.micro_batches / stages.layout.pp
    return {kind: found * scale for kind, found in sorted(total.items(), key=lambda item: -item[1])}


def _exchanges(stages: Stages) -> float:
    passes = [stages.directions(stage) for stage in range(len(stages.layers))]
    seconds = sum(part.transfer for made in passes for part in made.forward.segments + made.backward.segments)
    return seconds * stages.micro_batches / stages.layout.pp


def mfu(config: Config, step_seconds: float, causal: bool) -> float | None:
    """Against the bf16 peak of all devices; None where the description has none."""
    if not config.hardware.bf16_flops:
        return None
    rate = config.batch_size * config.seq_len / step_seconds / config.parallel.world
    flops = flops_per_token(config.model, config.seq_len, causal, frozen=config.adapter.on)
    return rate * flops / config.hardware.bf16_flops
