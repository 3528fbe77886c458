"""Plans the seconds of a training step: simulates the pipeline, then adds reduction, optimizer and gather.

The actions are in parallel/pipeline/simulate.py, their durations in stages.py. MFU is relative to the bf16 peak, and
excludes MTP, as DeepSeek defines it.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from conf.schema import Config, Rate
from parallel.pipeline.orders import Action
from parallel.pipeline.simulate import Program, Simulation, stages_ahead
from train.model.count import flops_per_token
from train.plan.job import layout_of, program_of, require_hardware
from train.plan.time.rates import HOST_LAUNCH, JobInterval, Rates, load_rates
from train.plan.time.stages import Stages, require_rule
from train.plan.time.update import UpdateTime, WeightCounts, count_weights, stage3_seconds, update_time
from train.plan.work_recorder import Work

HOST_BINDS = 0.5
"""Fraction of the computing time above which kernel launches may limit the step.

A published job with the fraction 0.52 took twice the planned time (Megatron-LM's guide for GB200).
"""


@dataclass
class StepTime:
    """The planned time and speed of one step.

    Seconds of actions, work, launches and exchanges are means over the ranks of a pipeline.
    """

    step_seconds: float
    pipeline_seconds: float
    """Seconds from the first action's start to the last action's end."""
    bubble_seconds: float
    """Mean idle time of a rank."""
    bubble_share: float
    """bubble_seconds divided by pipeline_seconds."""
    action_seconds: dict[str, float]
    """Seconds by kind of action (F, B, I, W, FB)."""
    exposed_communication_seconds: float
    """Seconds in which actions wait for dispatch or combine."""
    work_seconds: dict[str, float]
    """Seconds of computing by kind of work."""
    host_seconds: float
    """Seconds of a host core to launch a step's kernels; 0 if unknown. No other field includes them."""
    exchange_seconds: float
    """Seconds of all dispatches and combines, including those that run while a rank computes."""
    update: UpdateTime
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    mfu_causal: float | None
    """MFU relative to the bf16 peak; None if unknown."""
    mfu_full: float | None
    """MFU whose attention FLOPs ignore the causal mask; None if unknown."""
    actions: list[list[Action]]
    """The actions of every rank of a pipeline, in order."""
    length: Callable[[Action], float]
    """Function that returns the seconds of an action."""
    transfer_seconds: float
    """Seconds to send a stage's output to the next rank."""
    simulation: Simulation
    rates: str
    """Describes the source of the rates."""
    threads: int | None
    """Threads per rank, if the rates were measured on a CPU."""
    intervals: Mapping[str, JobInterval]
    """See `Rates.intervals`."""

    @property
    def host_share(self) -> float:
        """Time to launch the passes' kernels, divided by the computing time of these kernels."""
        return self.host_seconds / sum(self.work_seconds.values())

    @property
    def host_binds(self) -> bool:
        """Whether launching the passes may take longer than computing them."""
        return self.host_share > HOST_BINDS

    @property
    def interval_seconds(self) -> dict[str, tuple[float, float]]:
        """Expected ranges of the step time in seconds, by the keys of INTERVALS (rates.py)."""
        return {kind: one.around(self.step_seconds) for kind, one in self.intervals.items()}


@dataclass(frozen=True)
class SimulatedStep:
    """The parts of a `StepTime` that a search needs."""

    simulation: Simulation
    update: UpdateTime
    length: Callable[[Action], float]
    transfer_seconds: float

    @property
    def seconds(self) -> float:
        return self.simulation.makespan + self.update.seconds


def simulate_step(stages: Stages, micro_batches: int | None = None) -> SimulatedStep:
    """Simulates the pipeline and adds the slowest update. micro_batches: None for all."""
    extra = _stage3(stages) if stages.config.parallel.zero == 3 else {}

    def duration(action: Action) -> float:
        return stages.elapsed(action).seconds + extra.get(action.kind, 0.0)

    transfer = _transfer(stages)
    program = program_of(stages.config, micro_batches)
    simulation = program.run(duration, transfer)
    return SimulatedStep(simulation, slowest_update(stages, program, simulation, duration), duration, transfer)


LONG = 12
"""Maximum number of micro-batches per pipeline rank that is simulated. Times of longer steps are extrapolated."""


def estimate_step(stages: Stages) -> tuple[float, float]:
    """Returns a step's seconds, and the busiest rank's time divided by the mean."""
    pp, count = stages.layout.pp, stages.micro_batches
    if count <= (LONG + 1) * pp or count % pp:
        step = simulate_step(stages)
        return step.seconds, step.simulation.imbalance
    steps = [simulate_step(stages, few) for few in ((LONG - 1) * pp, LONG * pp)]
    shorter, longer = (step.simulation.makespan for step in steps)
    pipeline = longer + (longer - shorter) * (count / pp - LONG)
    return pipeline + steps[1].update.seconds, steps[1].simulation.imbalance


def plan_time(config: Config, rates: Rates | None = None) -> StepTime:
    """Plan a step's time. Raises UserError if the recipe cannot run or be planned."""
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
        intervals=rates.intervals,
    )


def _transfer(stages: Stages) -> float:
    """Returns the seconds to send a stage's output."""
    layout = stages.layout
    if layout.pp == 1:
        return 0.0
    where = "inside" if layout.stage_ranks < layout.ranks_per_node else "across"
    moved = stages.tokens * stages.config.model.hidden * stages.element
    return stages.rates.of(Work(f"send_{where}", bytes=moved))


def slowest_update(stages: Stages, *simulated: Any) -> UpdateTime:
    """Returns the slowest rank's update time, which excludes reduction during passes.

    simulated: the arguments `program`, `simulation` and `length` of `_hidden`; without them, the result is a lower
        bound
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
    """Returns the seconds that reduction during passes saves, minus the slowdown of passes.

    whole: seconds of the complete reduction. The reduction of the stage that ends last cannot overlap.
    """
    actions = program.actions[rank]
    ahead = stages_ahead(actions)
    first, last = (simulation.starts[rank][place] + length(actions[place]) for place in (min(ahead.values()), -1))
    rest = [stage for stage in stages.placement[rank] if stage not in ahead]
    held = count_weights(stages.config, stages.layers, rest, len(stages.layers) - 1)
    late = update_time(stages.config, stages.layout, stages.rates, held).reduce
    return (1 - stages.taken) * min(whole - late, last - first)


def _stage3(stages: Stages) -> dict[str, float]:
    """Returns the seconds that ZeRO stage 3 adds to a forward (F) and a backward (B)."""
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
    """Applies `measure` to a step's kernels. Returns the sums by kind of work, averaged over ranks."""
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
    """Returns the MFU, if known. causal: whether attention counts only visible keys."""
    if not config.hardware.bf16_flops:
        return None
    rate = config.batch_size * config.seq_len / step_seconds / config.parallel.world
    flops = flops_per_token(config.model, config.seq_len, causal, frozen=config.adapter.on)
    return rate * flops / config.hardware.bf16_flops
