"""Seconds of a training step: the pipeline simulated action by action, then reduction, optimizer and gather.

The actions and their order are torch's own (parallel/pipeline/simulate.py); their lengths are those of stages.py. MFU is
counted as DeepSeek counts it: without MTP, against the bf16 peak.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from conf.schema import Config
from parallel.pipeline.simulate import Action, Simulation, simulate
from train.model.count import flops_per_token
from train.plan.job import actions_of, layout_of, require_hardware
from train.plan.time.rates import Rates, load_rates
from train.plan.time.stages import Stages, require_rule
from train.plan.time.update import UpdateTime, count_weights, stage3_seconds, update_time
from train.plan.time.work import Work


@dataclass
class StepTime:
    """What a plan says about speed. Seconds are of one optimizer step."""

    step_seconds: float
    pipeline_seconds: float
    """From the first action of any rank to the last."""
    bubble_seconds: float
    """Idle time of a rank, mean over the ranks of a pipeline."""
    bubble_share: float
    """The same as a share of pipeline_seconds."""
    action_seconds: dict[str, float]
    """Seconds by kind of action (F, B, I, W, FB), mean over the ranks of a pipeline."""
    exposed_communication_seconds: float
    """Waiting for experts' tokens inside actions, mean over the ranks of a pipeline."""
    work_seconds: dict[str, float]
    """Seconds of computing by kind of work, mean over the ranks of a pipeline."""
    exchange_seconds: float
    """Seconds of experts' exchanges, hidden or not, mean over the ranks of a pipeline."""
    update: UpdateTime
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    mfu_causal: float | None
    """Against the bf16 peak of the description; None where it has none."""
    mfu_full: float | None
    """The same with attention counted without its mask."""
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
    """Of a rank, where they were measured on a CPU."""


def plan_time(config: Config, rates: Rates | None = None) -> StepTime:
    """Plan the time of a step. Raises UserError for what cannot run, has no rule, or has no rates."""
    require_hardware(config.hardware)
    require_rule(config)
    layout = layout_of(config)
    rates = rates or load_rates(config, alone=layout.world == 1)
    stages = Stages(config, layout, rates)
    actions = actions_of(config)
    extra = _stage3(stages) if config.parallel.zero == 3 else {}

    def duration(action: Action) -> float:
        return stages.elapsed(action).seconds + extra.get(action.kind, 0.0)

    transfer = _transfer(stages)
    result = simulate(actions, duration, transfer)
    update = max((_update(stages, rank) for rank in range(layout.pp)), key=lambda update: update.seconds)
    seconds = result.makespan + update.seconds
    rate = config.batch_size * config.seq_len / seconds
    return StepTime(
        step_seconds=seconds,
        pipeline_seconds=result.makespan,
        bubble_seconds=result.bubble * result.makespan,
        bubble_share=result.bubble,
        action_seconds=_by_kind(actions, duration),
        exposed_communication_seconds=sum(stages.elapsed(a).exposed for line in actions for a in line) / layout.pp,
        work_seconds=_work(stages, rates),
        exchange_seconds=_exchanges(stages),
        update=update,
        tokens_per_second=rate,
        tokens_per_second_per_gpu=rate / layout.world,
        mfu_causal=_mfu(config, rate / layout.world, causal=True),
        mfu_full=_mfu(config, rate / layout.world, causal=False),
        actions=actions,
        length=duration,
        transfer_seconds=transfer,
        simulation=result,
        rates=rates.source,
        threads=rates.threads,
    )


def _transfer(stages: Stages) -> float:
    """Seconds from the end of a stage to its output on the next rank."""
    layout, sizes = stages.layout, stages.sizes
    if layout.pp == 1:
        return 0.0
    where = "inside" if layout.stage_ranks < layout.ranks_per_node else "across"
    moved = sizes.tokens * stages.config.model.hidden * sizes.element
    return stages.rates.of(Work(f"send_{where}", bytes=moved))


def _update(stages: Stages, rank: int) -> UpdateTime:
    held = count_weights(stages.config, stages.layers, stages.placement[rank], len(stages.layers) - 1)
    return update_time(stages.config, stages.layout, stages.rates, held)


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
    total: Counter[str] = Counter()
    for line in actions:
        for action in line:
            total[action.kind] += duration(action)
    return {kind: seconds / len(actions) for kind, seconds in total.items()}


def _work(stages: Stages, rates: Rates) -> dict[str, float]:
    """Computing of all micro-batches by kind of work, mean over ranks."""
    total: Counter[str] = Counter()
    for stage in range(len(stages.layers)):
        made = stages.directions(stage)
        for one in made.forward.work + made.backward.work:
            total[one.kind] += rates.of(one)
    scale = stages.sizes.micro_batches / stages.layout.pp
    return {kind: seconds * scale for kind, seconds in sorted(total.items(), key=lambda item: -item[1])}


def _exchanges(stages: Stages) -> float:
    passes = [stages.directions(stage) for stage in range(len(stages.layers))]
    seconds = sum(part.transfer for made in passes for part in made.forward.segments + made.backward.segments)
    return seconds * stages.sizes.micro_batches / stages.layout.pp


def _mfu(config: Config, tokens_per_second: float, causal: bool) -> float | None:
    if not config.hardware.bf16_flops:
        return None
    return tokens_per_second * flops_per_token(config.model, config.seq_len, causal) / config.hardware.bf16_flops
