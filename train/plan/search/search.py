"""plan.search=true: which layout is fastest on these devices, and why the others are not.

    1. Every combination of pipeline, contexts, experts, schedule, micro-batch, recomputation, dispatch and wire that the rules admit
       (candidates.py). Where ranks of a pipeline work unevenly, the split of stages that the planned times call for is tried too.
    2. Bounds on its memory and its step (bounds.py).
    3. From the smallest bound on time upwards: the memory model, and for what fits the simulation, until ten are found
       that no bound of the rest undercuts.

A family is all layouts of one pipeline length and schedule. Of each family that has no place among the best it is said
why: the rule that all of it breaks, how far its lightest layout is from fitting, or how much slower its best one is.
"""

from dataclasses import dataclass, field, replace

from conf.errors import UserError
from conf.micro_batches import divisors
from conf.schema import Config
from train.metrics.words import gib
from train.plan.job import device_memory, layout_of, require_hardware
from train.plan.memory.rank import plan_memory, rank_memory, scene_of
from train.plan.reserve import tensor_memory
from train.plan.search.bounds import bound
from train.plan.search.candidates import Candidate, candidates
from train.plan.search.changes import broken_rule, changed, overrides
from train.plan.search.cures import WORTH
from train.plan.time.rates import Rates, load_rates
from train.plan.time.stages import Stages
from train.plan.time.step import plan_time

SHOWN = 10
REASONS = 3
"""Kinds of layouts whose rule is told where none runs."""
UNEVEN = 1.03
"""The busiest rank's work over the mean from which on another split of the stages is looked at."""
SIMULATED = 40
"""Fitting layouts that are simulated at most; the bounds are within a few percent of the simulation."""


@dataclass(frozen=True)
class FoundLayout:
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
    best: list[FoundLayout] = field(default_factory=list)
    rejected: list[Family] = field(default_factory=list)

    def record(self) -> SearchRecord:
        best = [Choice(one.overrides, one.step_seconds, one.room_bytes, one.mfu_causal) for one in self.best]
        return SearchRecord(self.devices, self.tried, best, self.rejected)

    def command(self, name: str) -> list[str]:
        """The arguments that use the best layout once it is written under this name."""
        rest = [part for part in self.best[0].overrides if not part.startswith("parallel.")]
        return [f"parallel={name}", *rest]


def search(config: Config) -> Search:
    """The ten fastest layouts that fit. Raises UserError where none does."""
    require_hardware(config.hardware)
    devices = config.plan.devices or config.parallel.world
    rates = load_rates(config, alone=devices == 1)
    rules: dict[str, UserError] = {}
    admitted: list[Candidate] = []
    found = Search(config, devices, tried=0)
    for candidate in candidates(config, devices):
        found.tried += 1
        error = broken_rule(candidate.config)
        if error is None:
            admitted.append(candidate)
        else:
            rules.setdefault(candidate.family, error)
    memory = device_memory(_on(config, 1, devices))
    for candidate in admitted:
        bound(candidate, rates, memory)
    fitting, misses = _fitting(admitted, memory, rates)
    found.best = [_found(one, base=config) for one in fitting[:SHOWN]]
    found.rejected = _rejected(found, fitting, misses, rules, admitted, memory)
    if not found.best:
        raise _nothing_fits(config, found, devices) if admitted else _nothing_runs(config, found, devices)
    return found


def _on(config: Config, pp: int, devices: int) -> Config:
    return changed(config, pp=pp, dp=devices // pp, cp=1, ep=1)


@dataclass
class _Fit:
    candidate: Candidate
    room_bytes: int
    step_seconds: float
    mfu_causal: float | None
    imbalance: float


def _fitting(admitted: list[Candidate], memory: int, rates: Rates) -> tuple[list[_Fit], dict[str, int]]:
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
        lacking = _lacking(candidate)
        if lacking > 0:
            _miss(misses, candidate, lacking)
            continue
        fitting.append(_faster(_Fit(candidate, -lacking, *_speed(candidate.config, rates)), rates))
    return sorted(fitting, key=lambda fit: fit.step_seconds), misses


def _speed(config: Config, rates: Rates) -> tuple[float, float | None, float]:
    """Seconds of a step, MFU, and how much longer than the mean the busiest rank of a pipeline works."""
    step = plan_time(config, rates)
    return step.step_seconds, step.mfu_causal, step.simulation.imbalance


def _faster(fit: _Fit, rates: Rates) -> _Fit:
    """The same layout with the split of stages that the planned times call for, where that is faster and fits."""
    config = fit.candidate.config
    if fit.imbalance < UNEVEN:
        return fit
    split = changed(config, split=Stages(config, layout_of(config), rates).balanced())
    speed = _speed(split, rates)
    if speed[0] > fit.step_seconds * (1 - WORTH):
        return fit
    other = replace(fit.candidate, config=split)
    lacking = _lacking(other)
    return fit if lacking > 0 else _Fit(other, -lacking, *speed)


def _miss(misses: dict[str, int], candidate: Candidate, lacking: int) -> None:
    misses[candidate.family] = min(lacking, misses.get(candidate.family, lacking))


def _lacking(candidate: Candidate) -> int:
    """Bytes that the fullest rank lacks (negative: has to spare); the likely ones are looked at first."""
    config, scene = candidate.config, scene_of(candidate.config)
    memory = tensor_memory(config)
    for rank in dict.fromkeys((candidate.fullest, 0, config.parallel.pp - 1)):
        lacking = rank_memory(config, rank, scene).peak_bytes - memory
        if lacking > 0:
            return lacking
    return max(rank.peak_bytes for rank in plan_memory(config)) - memory


def _found(fit: _Fit, base: Config) -> FoundLayout:
    config = replace(fit.candidate.config, plan=base.plan)
    return FoundLayout(config, overrides(config, base), fit.step_seconds, fit.room_bytes, fit.mfu_causal)


def _rejected(
    found: Search,
    fitting: list[_Fit],
    misses: dict[str, int],
    rules: dict[str, UserError],
    admitted: list[Candidate],
    memory: int,
) -> list[Family]:
    """A reason for every family without a place among the best."""
    shown = {one.candidate.family for one in fitting[:SHOWN]}
    fastest = {fit.candidate.family: fit.step_seconds for fit in reversed(fitting)}
    by_family: dict[str, list[Candidate]] = {}
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


def _distance(members: list[Candidate], missed: int | None, memory: int, fitting: list[_Fit]) -> str:
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
    lacking = _lacking(lightest)
    if missed is not None:
        lacking = min(lacking, missed)
    return f"does not fit: the nearest that was looked at lacks {gib(lacking)}" if lacking > 0 else "slower"


def _nothing_runs(config: Config, found: Search, devices: int) -> UserError:
    """No layout on so many devices keeps the rules: it is a matter of numbers that divide, not of memory."""
    reasons = "; ".join(f"{family.name}: {family.reason}" for family in found.rejected[:REASONS])
    more = f"; and so for {len(found.rejected) - REASONS} more" if len(found.rejected) > REASONS else ""
    return UserError(
        "plan.devices",
        devices,
        f"no layout of {devices} devices divides this recipe, whatever their memory ({reasons}{more})",
        _near(config, devices),
    )


def _near(config: Config, devices: int) -> str:
    """The nearest numbers of devices that a pipeline no longer than the model and the batch divide among."""
    longest = config.model.layers + 2
    shares = divisors(config.batch_size)
    able = {pp * dp for pp in range(1, longest + 1) for dp in shares}
    below, above = (
        max((n for n in able if n < devices), default=None),
        min((n for n in able if n > devices), default=None),
    )
    near = " or ".join(f"plan.devices={each}" for each in (below, above) if each is not None)
    return f"take {near}, or another batch_size"


def _nothing_fits(config: Config, found: Search, devices: int) -> UserError:
    """No layout can hold the model on these devices."""
    reasons = "; ".join(f"{family.name}: {family.reason}" for family in found.rejected)
    return UserError(
        "plan.devices",
        devices,
        f"{devices} x {config.hardware.name} cannot hold this recipe under any of {found.tried} layouts ({reasons})",
        "take more devices or devices with more memory, or a smaller model, batch or sequence length",
    )
