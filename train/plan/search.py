"""plan.search=true: which layout is fastest on these devices, and why the others are not.

    1. Every combination of pipeline, experts, schedule, micro-batch, recomputation, dispatch and wire that the rules admit.
    2. A bound on its step without a simulation: the busiest rank's work, the schedule's idle time in closed form, the
       update. A bound on its memory: weights, gradients, optimizer, and the least that a micro-batch in flight keeps.
    3. From the smallest bound on time upwards: the memory model, and for what fits the simulation, until ten are found
       that no bound of the rest undercuts.

A family is all layouts of one pipeline length and schedule. Of each family that has no place among the best it is said
why: the rule that all of it breaks, how far its lightest layout is from fitting, or how much slower its best one is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

from conf.errors import UserError
from conf.schema import Config, Recompute
from parallel.pipeline.simulate import Action, idle_time, schedule_actions
from parallel.pipeline.split import SCHEDULES
from train.plan.budget import device_memory
from train.plan.changes import LIGHTEST, broken_rule, changed, fitted_ramp, overrides
from train.plan.memory import plan_memory, rank_memory, scene_of
from train.plan.rates import Rates, load_rates, require_hardware
from train.plan.stages import Stages
from train.plan.step import layout_of, plan_time
from train.plan.update import Held, held_weights, update_time
from train.plan.words import gib

SHOWN = 10
MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE = ([], [Recompute.norm, Recompute.swiglu], LIGHTEST)
SIMULATED = 40
"""Fitting layouts that are simulated at most; the bounds are within a few percent of the simulation."""


@dataclass(frozen=True)
class Found:
    """A layout that fits."""

    config: Config
    overrides: list[str]
    step_seconds: float
    room_bytes: int
    mfu_causal: float | None


@dataclass(frozen=True)
class Family:
    """Layouts of one kind that have no place among the best, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """One of the best, as plan.json has it."""

    overrides: list[str]
    step_seconds: float
    room_bytes: int
    mfu_causal: float | None


@dataclass(frozen=True)
class SearchRecord:
    devices: int
    tried: int
    best: list[Choice]
    rejected: list[Family]


@dataclass
class Search:
    """The outcome."""

    base: Config
    devices: int
    tried: int
    best: list[Found] = field(default_factory=list)
    rejected: list[Family] = field(default_factory=list)

    def record(self) -> SearchRecord:
        best = [Choice(one.overrides, one.step_seconds, one.room_bytes, one.mfu_causal) for one in self.best]
        return SearchRecord(self.devices, self.tried, best, self.rejected)

    def command(self, name: str) -> list[str]:
        """The arguments that use the best layout once it is written under this name."""
        rest = [part for part in self.best[0].overrides if not part.startswith("parallel.")]
        return [f"parallel={name}", *rest]


@dataclass
class _Candidate:
    config: Config
    family: str
    seconds: float = 0.0
    """Bound on the step."""
    least_bytes: int = 0
    """Bound on the memory of the fullest rank."""
    fullest: int = 0
    """The pipeline rank of that bound."""


def search(config: Config) -> Search:
    """The ten fastest layouts that fit. Raises UserError where none does."""
    require_hardware(config.hardware)
    devices = config.plan.devices or config.parallel.pp * config.parallel.dp
    rates = load_rates(config, alone=devices == 1)
    rules: dict[str, UserError] = {}
    admitted: list[_Candidate] = []
    found = Search(config, devices, tried=0)
    for candidate in _candidates(config, devices):
        found.tried += 1
        error = broken_rule(candidate.config)
        if error is None:
            admitted.append(candidate)
        else:
            rules.setdefault(candidate.family, error)
    for candidate in admitted:
        _bound(candidate, rates)
    memory = device_memory(_on(config, 1, devices))
    fitting, misses = _fitting(admitted, memory, rates)
    found.best = [_found(one, base=config) for one in fitting[:SHOWN]]
    found.rejected = _rejected(found, fitting, misses, rules, admitted, memory)
    if not found.best:
        raise _nothing_fits(config, found, devices)
    return found


def _on(config: Config, pp: int, devices: int) -> Config:
    return changed(config, pp=pp, dp=devices // pp, ep=1)


def _candidates(config: Config, devices: int) -> Iterator[_Candidate]:
    """Every combination for these devices, whatever the rules say of it."""
    model = config.model
    recompute = [list(what) for what in RECOMPUTE]
    if config.model.recompute not in recompute:
        recompute.append(config.model.recompute)
    ways = [("flat", "bf16"), ("flat", "fp8"), ("node_limited", "bf16"), ("node_limited", "fp8")]
    if config.parallel.dispatch == "deepep":
        ways += [("deepep", "bf16"), ("deepep", "fp8")]
    for pp in _divisors(devices):
        dp = devices // pp
        for schedule in SCHEDULES if pp > 1 else ("1f1b",):
            family = "pp=1" if pp == 1 else f"pp>{model.layers}" if pp > model.layers else f"pp={pp} {schedule}"
            for ep in (ep for ep in _divisors(dp) if model.experts % ep == 0):
                for size, again, (dispatch, wire), zero in product(
                    MICRO_BATCHES, recompute, ways if ep > 1 else ways[:1], (1,) if pp > 1 else (1, 2, 3)
                ):
                    one = changed(
                        fitted_ramp(config, size * dp, 2 * pp), pp=pp, dp=dp, ep=ep, schedule=schedule, micro_batch_size=size, recompute=again,
                        dispatch=dispatch, wire=wire, zero=zero, overlap=True,
                    )  # fmt: skip
                    yield _Candidate(one, family)


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _bound(candidate: _Candidate, rates: Rates) -> None:
    """Bounds on time and memory, without schedule and memory model."""
    config = candidate.config
    stages = Stages(config, layout_of(config), rates)
    parallel, count = config.parallel, stages.sizes.micro_batches
    busy = max(_busy(stages, ids) for ids in stages.placement) * count
    lengths = [_lengths(stages, stage) for stage in range(len(stages.layers))]
    forward, inputs, weights = (min(column) for column in zip(*lengths, strict=True))
    pair = min(_pair(stages, ids) for ids in stages.placement) if parallel.schedule == "dualpipev" else 0.0
    idle = max(0.0, idle_time(parallel.schedule, parallel.pp, forward, inputs, weights, pair))
    held = [held_weights(config, stages.layers, ids, len(stages.layers) - 1) for ids in stages.placement]
    update = max(update_time(config, stages.layout, rates, one).seconds for one in held)
    candidate.seconds = busy + idle + update
    flight = _in_flight(parallel.schedule, parallel.pp, count)
    least = [
        _state_bytes(config, one) + _kept_bytes(stages, ids, flight[rank])
        for rank, (one, ids) in enumerate(zip(held, stages.placement, strict=True))
    ]
    candidate.least_bytes = max(least)
    candidate.fullest = least.index(candidate.least_bytes)


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


def _state_bytes(config: Config, held: Held) -> int:
    """Weights, fp32 gradients, master weights and moments of a rank, sharded as ZeRO does."""
    parallel = config.parallel
    element = 4 if config.precision.name == "fp32" else 2
    shard = held.dense / parallel.dp + held.experts / (parallel.dp // parallel.ep)
    whole = held.dense + held.experts
    moments = 2 * (2 if config.precision.moments == "bf16" else 4)
    weights = shard if parallel.zero == 3 else whole
    gradients = shard if parallel.zero == 3 else whole
    return int(weights * element + gradients * 4 + shard * (4 + moments))


def _kept_bytes(stages: Stages, ids: list[int], flight: int) -> int:
    """The least that so many micro-batches of one stage keep: of a layer the inputs of both norms and the attention's output,
    with experts their inputs and those of their SwiGLU."""
    config, model, element = stages.config, stages.config.model, stages.sizes.element
    quantised = 1 if config.precision.fp8 is not None else element
    row = 2 * model.hidden * element + model.heads * model.v_head_dim * quantised
    routed = model.top_k * (model.hidden + 2 * model.expert_width) * quantised
    layers = [[row if index < model.dense_layers else row + routed for index in stages.layers[stage]] for stage in ids]
    return int(flight * min(sum(rows) for rows in layers) * stages.sizes.tokens)


@cache
def _in_flight(schedule: str, pp: int, micro_batches: int) -> list[int]:
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


@dataclass
class _Fit:
    candidate: _Candidate
    room_bytes: int
    step_seconds: float
    mfu_causal: float | None


def _fitting(admitted: list[_Candidate], memory: int, rates: Rates) -> tuple[list[_Fit], dict[str, int]]:
    """Layouts that fit, the fastest first, and by family how many bytes its lightest one that was looked at misses."""
    fitting: list[_Fit] = []
    misses: dict[str, int] = {}
    for candidate in sorted(admitted, key=lambda one: one.seconds):
        if candidate.least_bytes > memory:
            _miss(misses, candidate, candidate.least_bytes - memory)
            continue
        best = sorted(fit.step_seconds for fit in fitting)[:SHOWN]
        if len(fitting) >= SIMULATED or (len(best) == SHOWN and candidate.seconds > best[-1]):
            break
        lacking = _lacking(candidate, memory)
        if lacking > 0:
            _miss(misses, candidate, lacking)
            continue
        step = plan_time(candidate.config, rates)
        fitting.append(_Fit(candidate, -lacking, step.step_seconds, step.mfu_causal))
    return sorted(fitting, key=lambda fit: fit.step_seconds), misses


def _miss(misses: dict[str, int], candidate: _Candidate, lacking: int) -> None:
    misses[candidate.family] = min(lacking, misses.get(candidate.family, lacking))


def _lacking(candidate: _Candidate, memory: int) -> int:
    """Bytes that the fullest rank lacks (negative: has to spare); the likely ones are looked at first."""
    config, scene = candidate.config, scene_of(candidate.config)
    for rank in dict.fromkeys((candidate.fullest, 0, config.parallel.pp - 1)):
        lacking = rank_memory(config, rank, scene).peak_bytes - memory
        if lacking > 0:
            return lacking
    return max(rank.peak_bytes for rank in plan_memory(config)) - memory


def _found(fit: _Fit, base: Config) -> Found:
    config = replace(fit.candidate.config, plan=base.plan)
    return Found(config, overrides(config, base), fit.step_seconds, fit.room_bytes, fit.mfu_causal)


def _rejected(
    found: Search,
    fitting: list[_Fit],
    misses: dict[str, int],
    rules: dict[str, UserError],
    admitted: list[_Candidate],
    memory: int,
) -> list[Family]:
    """A reason for every family without a place among the best."""
    shown = {one.candidate.family for one in fitting[:SHOWN]}
    fastest = {fit.candidate.family: fit.step_seconds for fit in reversed(fitting)}
    by_family: dict[str, list[_Candidate]] = {}
    for candidate in admitted:
        by_family.setdefault(candidate.family, []).append(candidate)
    families = dict.fromkeys([*rules, *by_family])
    reasons = []
    for name in sorted(families, key=lambda name: (int("".join(filter(str.isdigit, name.split()[0]))), name)):
        if name in shown:
            continue
        members = by_family.get(name, [])
        if not members:
            reason = f"{rules[name].field} = {rules[name].value}: {rules[name].rule}"
        elif name in fastest:
            reason = f"{100 * (fastest[name] / fitting[0].step_seconds - 1):.1f} % slower than the best"
        else:
            reason = _distance(members, misses.get(name), memory, fitting)
        reasons.append(Family(name, reason))
    return reasons


def _distance(members: list[_Candidate], missed: int | None, memory: int, fitting: list[_Fit]) -> str:
    """Why a family in which nothing was found to fit has no place: too slow to look at, or how far from fitting."""
    possible = [one for one in members if one.least_bytes <= memory]
    if not possible:
        lacking = min(one.least_bytes for one in members) - memory
        return f"does not fit: even its lightest layout needs {gib(lacking)} more for weights, optimizer and what waits"
    quickest = min(one.seconds for one in possible)
    if fitting and quickest > fitting[0].step_seconds:
        slower = 100 * (quickest / fitting[0].step_seconds - 1)
        return f"at least {slower:.1f} % slower than the best, were it to fit"
    lightest = min(possible, key=lambda one: one.least_bytes)
    lacking = _lacking(lightest, memory)
    if missed is not None:
        lacking = min(lacking, missed)
    return f"does not fit: the nearest that was looked at lacks {gib(lacking)}" if lacking > 0 else "slower"


def _nothing_fits(config: Config, found: Search, devices: int) -> UserError:
    """No layout can hold the model on these devices."""
    reasons = "; ".join(f"{family.name}: {family.reason}" for family in found.rejected)
    return UserError(
        "plan.devices",
        devices,
        f"{devices} x {config.hardware.name} cannot hold this recipe under any of {found.tried} layouts ({reasons})",
        "take more devices or devices with more memory, or a smaller model, batch or sequence length",
    )
