"""Lower bounds on the memory and the time of a layout, without its memory model and its simulation.

memory   weights, gradients and optimizer of each rank, and the least that its micro-batches in flight keep
time     the busiest rank's work, the schedule's idle time in closed form, the update
"""

from functools import cache

from conf.schema import Config
from parallel.pipeline.simulate import Action, idle_time, schedule_actions
from train.plan.job import layout_of
from train.plan.search.candidates import Candidate
from train.plan.time.rates import Rates
from train.plan.time.stages import Stages
from train.plan.time.update import WeightCounts, count_weights, update_time

STEADY = 4
"""Micro-batches per rank of the pipeline after which no more of them are in flight than before."""


def bound(candidate: Candidate, rates: Rates, memory: int) -> None:
    """Bounds on memory, and where that may fit on time, without schedule and memory model."""
    config = candidate.config
    stages = Stages(config, layout_of(config), rates)
    parallel, count = config.parallel, stages.sizes.micro_batches
    held = [count_weights(config, stages.layers, ids, len(stages.layers) - 1) for ids in stages.placement]
    flight = in_flight(parallel.schedule, parallel.pp, min(count, STEADY * parallel.pp))
    least = [
        _state_bytes(config, one) + _kept_bytes(stages, ids, flight[rank])
        for rank, (one, ids) in enumerate(zip(held, stages.placement, strict=True))
    ]
    candidate.least_bytes = max(least)
    candidate.fullest = least.index(candidate.least_bytes)
    if candidate.least_bytes > memory:
        return
    busy = max(_busy(stages, ids) for ids in stages.placement) * count
    lengths = [_lengths(stages, stage) for stage in range(len(stages.layers))]
    forward, inputs, weights = (min(column) for column in zip(*lengths, strict=True))
    pair = min(_pair(stages, ids) for ids in stages.placement) if parallel.schedule == "dualpipev" else 0.0
    idle = max(0.0, idle_time(parallel.schedule, parallel.pp, forward, inputs, weights, pair))
    update = max(update_time(config, stages.layout, rates, one).seconds for one in held)
    candidate.seconds = busy + idle + update


def _busy(stages: Stages, ids: list[int]) -> float:
    """Seconds of one micro-batch on the stages of a rank; with dualpipev its pairs."""
    if stages.config.parallel.schedule == "dualpipev":
        return 2 * _pair(stages, ids)
    return sum(stages.elapsed(Action(kind, stage, 0)).seconds for stage in ids for kind in "FB")


def _pair(stages: Stages, ids: list[int]) -> float:
    """Mean of the two pairs that a rank of dualpipev runs."""
    pairs = [(ids[0], ids[1]), (ids[1], ids[0])]
    return sum(_overlapped(stages, *pair) for pair in pairs) / 2


def _overlapped(stages: Stages, forward: int, backward: int) -> float:
    halves = Action("F", forward, 0), Action("B", backward, 0)
    return stages.elapsed(Action("FB", forward, 0, halves)).seconds


def _lengths(stages: Stages, stage: int) -> tuple[float, float, float]:
    whole = {kind: stages.elapsed(Action(kind, stage, 0)).seconds for kind in "FBW"}
    return whole["F"], whole["B"] - whole["W"], whole["W"]


def _state_bytes(config: Config, held: WeightCounts) -> int:
    """Weights, fp32 gradients, master weights and moments of a rank, sharded as ZeRO does."""
    parallel = config.parallel
    element = config.precision.weight_bytes
    shard = held.dense / parallel.stage_ranks + held.experts / (parallel.stage_ranks // parallel.ep)
    whole = held.dense + held.experts
    moments = 2 * config.precision.moment_bytes
    weights = shard if parallel.zero == 3 else whole
    gradients = shard if parallel.zero == 3 else whole
    state = 0 if parallel.offload_optimizer else shard * (4 + moments)
    return int(weights * element + gradients * 4 + state)


def _kept_bytes(stages: Stages, ids: list[int], flight: int) -> int:
    """The least that so many micro-batches of one stage keep: of a layer the inputs of both norms and the attention's output,
    with experts their inputs and those of their SwiGLU; of one that runs again its input."""
    config, model, element = stages.config, stages.config.model, stages.sizes.element
    quantised = 1 if config.precision.fp8 is not None else element
    row = 2 * model.hidden * element + model.heads * model.v_head_dim * quantised
    routed = model.top_k * (model.hidden + 2 * model.expert_width) * quantised
    again = model.hidden * element
    layers = [
        [
            again if place < model.repeated_layers else row if index < model.dense_layers else row + routed
            for place, index in enumerate(stages.layers[stage])
        ]
        for stage in ids
    ]
    return int(flight * min(sum(rows) for rows in layers) * stages.sizes.tokens)


@cache
def in_flight(schedule: str, pp: int, micro_batches: int) -> list[int]:
    """Most micro-batches of its stages that a rank has sent forward and not yet back, per rank."""
    most = []
    for line in schedule_actions(schedule, pp, micro_batches):
        now = peak = 0
        for action in line:
            kinds = [half.kind for half in action.halves or (action,)]
            now += kinds.count("F")
            peak = max(peak, now)
            now -= kinds.count("B") + kinds.count("I")
        most.append(peak)
    return most
