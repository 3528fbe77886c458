"""Computes lower bounds on the memory and the step time of layouts, without tracing or simulating them.

    memory   each rank's weights, gradients, optimizer state, and least activations for backward
    time     the busiest rank's work, the schedule's idle time (by a formula), and the update

All layouts of a `Frame` (candidates.py) have the same weights and update. The memory bound assumes that all blocks are
recomputed or offloaded, if the layout allows it. The time bound assumes no offloaded blocks, and the fewest recomputed
blocks that may fit.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from itertools import accumulate
from operator import add

from conf.micro_batches import divisors
from conf.pipeline_schedules import ActionSeconds
from conf.schema import Config, Parallel
from parallel.pipeline.orders import Action, schedule_actions
from train.plan.job import STEADY, host_ranks, layout_of, micro_batches_of
from train.plan.memory.chunk import chunk_of
from train.plan.memory.part import Scene
from train.plan.memory.rank_memory import chunk_parts, node_bytes, scene_of
from train.plan.reserve import host_memory, tensor_memory
from train.plan.search.candidates import ActivationSaving, Candidate, Frame
from train.plan.search.changes import with_changes
from train.plan.time.rates import Rates
from train.plan.time.stages import Stages
from train.plan.time.step_time import slowest_update
from train.plan.time.update import WeightCounts, count_weights
from train.plan.work_recorder import Work

OF_A_HOST = " of a node's own memory"
HELD_AND_WAITING = " for weights, optimizer and what waits"


class FrameBounds:
    """Bounds on the layouts of one `Frame` (a set of similar layouts)."""

    def __init__(self, frame: Frame, rates: Rates, memo: dict):
        """memo: a cache for the complete search, as in `Stages`."""
        self._frame, self._rates, self._memo = frame, rates, memo
        self.lacking: list[tuple[int, str, Candidate]] = []
        """Layouts that the memory bound rules out, with missing bytes and kind of memory."""

    def candidates(self) -> Iterator[Candidate]:
        """Yields the layouts that the memory bound does not rule out."""
        frame = self._frame
        stages = self._stages(frame.config)
        last = len(stages.layers) - 1
        held = [count_weights(frame.config, stages.layers, ids, last) for ids in stages.placement]
        parallel, count = frame.config.parallel, stages.micro_batches
        flight, _ = _waiting(parallel, count)
        placed = [with_changes(frame.config, offload_optimizer=host) for host in frame.hosts]
        state = [[_state_bytes(config, one) for one in held] for config in placed]
        hosts = [_host_lacking(config, held) for config in placed]
        memory = {way[0]: tensor_memory(with_changes(frame.config, dispatch=way[0])) for way in frame.ways}
        updates: dict[bool, float] = {}
        longest = max(map(len, stages.layers))
        passes: dict[tuple, float] = {}
        for saving in frame.savings:
            kept = cache(partial(self._kept, saving, stages, flight))
            blocks = longest if saving.blocks else 0
            least = [list(map(add, each, kept(blocks))) for each in state]  # bytes by value in `placed`, then by rank
            for dispatch, wire in frame.ways:
                way = dispatch, wire
                for number, each in enumerate(least):
                    total, lacking = max(each), max(each) - memory[dispatch]
                    rank = each.index(total)
                    one = Candidate(
                        placed[number], way, frame.family, saving, blocks, 0.0, total, rank, kept(blocks)[rank]
                    )
                    if lacking > 0 or hosts[number] > 0:
                        what = OF_A_HOST if hosts[number] > lacking else HELD_AND_WAITING
                        self.lacking.append((max(lacking, 0) + max(hosts[number], 0), what, one))
                        continue
                    host, fewest = frame.hosts[number], 0
                    if saving.blocks == "recompute":  # with offload, the bound assumes 0 blocks
                        holds = partial(_holds, kept, state[number], memory[dispatch])
                        fewest = bisect_left(range(blocks), True, key=holds)
                    key = (*saving.recompute, "", *saving.offload, dispatch, wire, fewest)
                    if key not in passes:
                        fastest = with_changes(saving.applied(frame.config, fewest), dispatch=dispatch, wire=wire)
                        passes[key] = _pipeline_seconds(QuickStages(fastest, self._rates, self._memo))
                    if host not in updates:
                        updates[host] = slowest_update(self._stages(placed[number])).seconds
                    one.seconds = passes[key] + updates[host]
                    yield one

    def _kept(self, saving: ActivationSaving, stages: Stages, flight: list[int], blocks: int) -> list[int]:
        """Returns a lower bound on the activations (bytes) that each rank keeps for backward.

        blocks: number of recomputed or offloaded blocks per stage
        """
        config = saving.applied(self._frame.config, blocks)
        model, longest = config.model, max(map(len, stages.layers))
        light = sum(place < model.repeated_layers or bool(model.offloaded_part(place)) for place in range(longest))
        return [_kept_bytes(config, stages, light, *pair) for pair in zip(stages.placement, flight, strict=True)]

    def _stages(self, config: Config) -> Stages:
        return Stages(config, layout_of(config), self._rates, self._memo)


SPREAD_WORK = 0.97
"""Smallest work of a stage at any ep, as a fraction of its work at the largest ep."""


class QuickStages(Stages):
    """Lower bounds on stage times of similar layouts, from one trace with the fewest experts per rank."""

    def __init__(self, config: Config, rates: Rates, memo: dict):
        super().__init__(config, layout_of(config), rates, memo)
        self._alike = (*self._alike, "quick")

    @cached_property
    def _scene(self) -> Scene:
        config, parallel = self.config, self.config.parallel
        ranks = divisors(parallel.dp * parallel.cp)
        ep = max(ep for ep in ranks if config.model.experts % ep == 0) if parallel.ep > 1 else 1
        return scene_of(with_changes(config, ep=ep))

    def seconds(self, works: Sequence[Work]) -> float:
        return super().seconds(works) * (SPREAD_WORK if self.config.parallel.ep > 1 else 1.0)


def _holds(kept: Callable[[int], list[int]], held: list[int], room: int, blocks: int) -> bool:
    """Whether every rank has memory for its state and for the activations that wait for backward.

    kept: function that maps `blocks` to each rank's bytes of activations
    held: bytes of state by rank
    room: bytes of memory of a rank
    blocks: number of blocks per stage that recompute or offload
    """
    return max(map(add, held, kept(blocks))) <= room


def traced_bound(candidate: Candidate, config: Config, scene: Scene) -> int:
    """Returns a lower bound on a candidate's memory, closer than `least_bytes`, from a traced forward.

    config: the candidate's recipe, with any number of blocks that recompute or offload
    """
    rank = candidate.fullest
    chunks = [chunk_of(scene, parts) for parts in chunk_parts(config)[rank].values()]
    kept = min(sum(chunk.kept.values()) for chunk in chunks)
    whole, others = (each[rank] for each in _waiting(config.parallel, micro_batches_of(config)))
    passing = others * kept + min(chunk.forward.peak for chunk in chunks) if others >= 0 else 0
    return candidate.least_bytes - candidate.kept_bytes + max(whole * kept, passing)


def _waiting(parallel: Parallel, count: int) -> tuple[list[int], list[int]]:
    """Returns two lower bounds per rank on the number of micro-batches that wait for backward.

    - The first bounds the maximum over the step.
    - The second bounds the maximum while another micro-batch runs forward. It is negative if
      no forward runs after each stage of the rank has run its first backward.

    If two micro-batches overlap, only one counts, because the other does not have all activations in memory.
    """
    most = in_flight(parallel.schedule, parallel.pp, min(count, STEADY * parallel.pp), parallel.virtual_stages)
    paired = parallel.schedule_facts.pairs
    return [each - paired for each, _ in most], [each - 1 - paired for _, each in most]


def _pipeline_seconds(stages: Stages) -> float:
    """Returns a lower bound on the seconds of the pipeline: a rank's work, plus its idle time.

    - Backward is not split: a rank idles for a forward and a backward of every earlier stage. The rank with the largest
      sum of work and idle time counts.
    - Backward is split: the schedule's formula gives the idle time, from the shortest action times of all stages.
    """
    parallel, ids = stages.config.parallel, range(len(stages.layers))
    busy = [_busy(stages, own) * stages.micro_batches for own in stages.placement]
    if not parallel.schedule_facts.splits:
        before = accumulate((_busy(stages, [stage]) for stage in range(parallel.pp - 1)), initial=0.0)
        return max(map(sum, zip(busy, before, strict=True)))
    lengths = {stages.kind(stage): _lengths(stages, stage) for stage in ids}
    forward, inputs, weights = (min(column) for column in zip(*lengths.values(), strict=True))
    pair = 0.0
    if parallel.schedule_facts.pairs:
        # Longer W actions mean less idle time. Stage 0 does not count, because its W is its complete backward.
        pair = min(_pair(stages, own) for own in stages.placement)
        weights = max(each[2] for kind, each in lengths.items() if kind != stages.kind(0))
    shortest = ActionSeconds(forward, inputs, weights, pair)
    return max(busy) + max(0.0, parallel.schedule_facts.count_idle_seconds(parallel.pp, shortest))


def _busy(stages: Stages, ids: list[int]) -> float:
    """Returns the seconds of a micro-batch's passes on these stages.

    If the schedule overlaps passes, this is the overlapped time.
    """
    if stages.config.parallel.schedule_facts.pairs:
        return 2 * _pair(stages, ids)
    return sum(stages.elapsed(Action(kind, stage, 0)).seconds for stage in ids for kind in "FB")


def _pair(stages: Stages, ids: list[int]) -> float:
    """Returns the mean seconds of two overlapped pairs of passes.

    One pair has its forward on the rank's first stage and its backward on the second; the other pair is the reverse.
    """
    pairs = [(ids[0], ids[1]), (ids[1], ids[0])]
    return sum(_overlapped(stages, *pair) for pair in pairs) / 2


def _overlapped(stages: Stages, forward: int, backward: int) -> float:
    halves = Action("F", forward, 0), Action("B", backward, 0)
    return stages.elapsed(Action("FB", forward, 0, halves)).seconds


def _lengths(stages: Stages, stage: int) -> tuple[float, float, float]:
    whole = {kind: stages.elapsed(Action(kind, stage, 0)).seconds for kind in "FBW"}
    return whole["F"], whole["B"] - whole["W"], whole["W"]


def _state_bytes(config: Config, held: WeightCounts) -> int:
    """Returns bytes of weights, gradients, master weights and moments on a rank."""
    parallel = config.parallel
    element = config.precision.weight_bytes
    copies = parallel.stage_ranks, parallel.stage_ranks // parallel.ep
    shard = _shard(config, held)
    whole = held.dense + held.experts
    weights = shard if parallel.zero == 3 else whole
    gradients = shard if parallel.zero == 3 else whole
    dense, experts = copies if parallel.zero == 3 else (1, 1)
    frozen = held.frozen_dense / dense + held.frozen_experts / experts
    state = 0 if parallel.offload_optimizer else shard * (4 + _moment_bytes(config))
    return int(weights * element + frozen + gradients * 4 + state)


def _host_lacking(config: Config, held: list[WeightCounts]) -> int:
    """Returns the bytes per device that the host lacks; 0 or less if the host has enough."""
    has = host_memory(config)
    if not config.parallel.offload_optimizer or not has:
        return 0
    element = config.precision.weight_bytes
    sizes = [int(_shard(config, one) * (8 + element + _moment_bytes(config))) for one in held]
    return (node_bytes(config, sizes) - has) // host_ranks(config)


def _shard(config: Config, held: WeightCounts) -> float:
    """Returns the number of trained weights whose optimizer state a rank has."""
    parallel = config.parallel
    return held.dense / parallel.stage_ranks + held.experts / (parallel.stage_ranks // parallel.ep)


def _moment_bytes(config: Config) -> int:
    return min(rule.count_state_bytes(config.precision.moment_bytes) for rule in config.optim.facts.rules)


def _kept_bytes(config: Config, stages: Stages, light: int, ids: list[int], flight: int) -> int:
    """Returns a lower bound on the bytes of activations that a rank keeps for backward.

    light: number of a stage's first layers that keep only their input (recomputed or offloaded)
    ids: stages of the rank; the bound uses the stage with the fewest bytes
    flight: number of micro-batches that wait for backward

    Other layers keep both norms' inputs and attention's output. Experts keep their inputs and their SwiGLU's inputs.
    """
    model, element = config.model, stages.element
    if config.optim.index_warmup:  # only the indexers are trained, so layers keep nothing for backward
        return 0
    quantised = 1 if config.precision.fp8 is not None else element
    row = 2 * model.hidden * element + model.heads * model.v_head_dim * quantised
    routed = model.top_k * (model.hidden + 2 * model.expert_width) * quantised
    again = model.hidden * element

    def rows(layers: range) -> int:
        once = layers[light:]
        dense = len(once[: max(0, model.dense_layers - once.start)])
        return (len(layers) - len(once)) * again + len(once) * row + (len(once) - dense) * routed

    return int(flight * min(rows(stages.layers[stage]) for stage in ids) * stages.tokens)


@cache
def in_flight(schedule: str, pp: int, micro_batches: int, virtual: int = 2) -> list[tuple[int, int]]:
    """Returns two maximum numbers of micro-batches that wait for backward, for each rank.

    The first is the maximum over time, the second the maximum while a forward runs. Both maxima leave out the time
    before all stages of the rank have run their first backward.
    """
    most = []
    for line in schedule_actions(schedule, pp, micro_batches, virtual):
        parts = [action.halves or (action,) for action in line]
        without = {part.stage for each in parts for part in each}
        now = peak = forward = 0
        for each in parts:
            kinds = [part.kind for part in each]
            now += kinds.count("F")
            if not without:
                peak = max(peak, now)
                forward = max(forward, now * ("F" in kinds))
            now -= kinds.count("B") + kinds.count("I")
            without -= {part.stage for part in each if part.kind in "BW"}
        most.append((peak, forward))
    return most
