"""plan.search=true: finds the fastest layouts on a number of devices, and says why others are slower or do not fit.

1. The search first tries the recipe's layout, then the most similar layouts.
2. candidates.py lists all combinations that the rules allow.
3. lower_bounds.py bounds the memory of each combination and, if it may fit, its step time.
4. The search simulates layouts in the order of their time bounds, and plans their memory in the order of step times. It
   ends when ten layouts fit, and no other time bound is below the tenth step time.

If ranks have uneven work, the search also tries the stage split that the planned times suggest. The optimizer is on the
host only if needed. As few blocks as possible are recomputed or offloaded.

A family is all layouts with one pipeline length and schedule. If no layout of a family is among the best, the search
gives the reason: a broken rule, missing memory, or a slower step.
"""

import gc
import math
import shlex
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

from conf.check import check
from conf.dispatches import FLAT_DISPATCH
from conf.errors import UserError
from conf.micro_batches import divisors
from conf.schema import Config, Recompute, WireFormat
from train.metrics.quantities import gib
from train.plan.budget import budget_of, make_plan, room_words
from train.plan.failures import plan_failures
from train.plan.job import host_ranks, layout_of, require_hardware, require_host, require_matmuls
from train.plan.memory.rank_memory import RankMemory, host_lacking, plan_memory, rank_memory, scene_of
from train.plan.memory.schedule_memory import WalkDepth
from train.plan.reserve import tensor_memory
from train.plan.search.candidates import ActivationSaving, Candidate, Frame, frames
from train.plan.search.changes import broken_layout, overrides, with_changes
from train.plan.search.cures import WORTH, find_beyond
from train.plan.search.lower_bounds import OF_A_HOST, FrameBounds, traced_bound
from train.plan.time.rates import load_rates
from train.plan.time.stages import Stages, require_rule
from train.plan.time.step_time import estimate_step, mfu, plan_time, simulate_step

SHOWN_LAYOUTS = 10
REASONS = 3
"""Maximum number of families with a reason in the error."""
_UNSEEN = -1
"""Marks a candidate for which only bounds are known."""
NEARER = (1.0, 2.0, 3.0)
"""Growing limits on the distance of the tried layouts from the recipe.

Each limit is added to the distance (`_Finder._distance`) of the most similar layouts. The last step of the search has
no limit.
"""
UNEVEN = 1.03
"""If the busiest rank has this many times the mean work, the search tries another split of layers into stages."""


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
    """A family of layouts that has no layout among the best, and the reason."""

    name: str
    reason: str


def _choice(found: FoundLayout) -> dict[str, Any]:
    """Returns the entry in plan.json for one of the best layouts."""
    budget, failures = budget_of(found.config, plan_time(found.config)), plan_failures(found.config, found.step_seconds)
    return {
        "overrides": found.overrides,
        "step_seconds": found.step_seconds,
        "room_bytes": found.room_bytes,
        "mfu_causal": found.mfu_causal,
        "gpu_hours": budget.gpu_hours,  # for all tokens, without failures
        "cost": budget.cost,
        "effective_share": None if failures is None else failures.effective_share,
    }


@dataclass
class Search:
    """The result of a search."""

    base: Config
    devices: int
    tried: int
    complete: bool = True
    """False if the search was interrupted."""
    best: list[FoundLayout] = field(default_factory=list)
    rejected: list[Family] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The search's entry in plan.json."""
        return {
            "devices": self.devices,
            "tried": self.tried,
            "complete": self.complete,
            "best": list(map(_choice, self.best)),
            "rejected": list(map(vars, self.rejected)),
        }

    def command(self, name: str) -> list[str]:
        """Returns arguments that select the best layout. name: the layout's file in conf/parallel."""
        rest = [part for part in self.best[0].overrides if not part.startswith("parallel.")]
        return [f"parallel={name}", *rest]


def search(config: Config, tell: Callable[[FoundLayout], None] = lambda found: None) -> Search:
    """Finds the ten fastest layouts that fit; after SIGINT, the fastest so far.

    tell: called with each new fastest layout
    Raises UserError if no layout fits, and KeyboardInterrupt after SIGINT if none was found yet.
    """
    require_hardware(config.hardware)
    require_host(config)
    require_matmuls(config)
    check(config)
    require_rule(config)
    devices = config.plan.devices or config.parallel.world
    finder = _Finder(config, devices, tell)
    gc.freeze()  # garbage collections then skip torch's objects, which stay alive
    try:
        fits = finder.run()
    finally:
        gc.unfreeze()
    found = Search(config, devices, finder.tried)
    found.complete = finder.complete
    found.best = [finder.found(fit) for fit in fits]
    found.rejected = list(finder.rejected(fits)) if found.complete else []
    if not fits:
        raise _nothing_fits(config, found, finder.nearest) if finder.runs else _nothing_runs(config, found, devices)
    return found


@dataclass
class _Fit:
    config: Config
    family: str
    room_bytes: int
    step_seconds: float


def _step_seconds(fit: _Fit) -> float:
    return fit.step_seconds


class _Miss(NamedTuple):
    """A layout that does not fit."""

    lacking: int
    """Missing bytes of the device, or of its share of the host's memory; may be a lower bound."""
    what: str
    """Text about the kind of missing memory; empty for device memory."""
    config: Config

    @classmethod
    def of(cls, config: Config) -> "_Miss":
        """Plans a layout's memory completely. `lacking` (missing bytes) is at most 0 if the layout fits."""
        ranks = plan_memory(config)
        lacking = max(rank.peak_bytes for rank in ranks) - tensor_memory(config)
        if host := host_lacking(config, ranks) // host_ranks(config):
            return cls(max(lacking, 0) + host, OF_A_HOST if host > lacking else "", config)
        return cls(lacking, "", config)


@dataclass
class _Looked:
    """What a search has found about a family of layouts."""

    rule: UserError | None = None
    """The first broken rule that was found."""
    runs: bool = False
    """Whether at least one layout of the family breaks no rule."""
    lacking: list[tuple[int, str, Candidate]] = field(default_factory=list)
    """For each set of similar layouts, the ruled-out layout with the fewest missing bytes.

    An entry has missing bytes, text about the kind of memory, and the layout.
    """
    possible: list[Candidate] = field(default_factory=list)
    """Layouts that the memory bound does not rule out."""
    missed: list["_Miss"] = field(default_factory=list)
    """Layouts that were tried and do not fit."""
    nearest: "_Miss | None" = None
    """If no layout of the family fits: the layout with the fewest missing bytes."""
    steps: list[float] = field(default_factory=list)
    """Step times, in seconds, of the layouts that fit."""


class _Finder:
    """Runs one search."""

    def __init__(self, config: Config, devices: int, tell: Callable[[FoundLayout], None]):
        self._base, self._devices, self._tell, self.tried = config, devices, tell, 0
        self.complete = True
        self._rates, self._memo = load_rates(config, alone=devices == 1), {}
        self._families: defaultdict[str, _Looked] = defaultdict(_Looked)
        self._looked: dict[tuple[str, ...], tuple[int, str]] = {}
        """Results of `_look`, by the tuple of a layout's overrides."""
        self._blocks: dict[int, int | None] = {}
        """Cache of `_fewest`. The key is the id of a candidate."""
        self._estimated: dict[tuple[int, int], float] = {}
        """Cache of `_seconds`. A key has the id of a candidate, which stays valid because all candidates stay alive."""
        self._fitting: dict[tuple[str, ...], _Fit] = {}
        """Layouts that fit, by the tuple of their overrides."""
        self._on_devices: set[tuple[str, ...]] = set()
        """Overrides of layouts that fit with the optimizer on the devices."""

    @property
    def runs(self) -> bool:
        """Whether at least one layout breaks no rule."""
        return any(family.runs for family in self._families.values())

    def run(self) -> list[_Fit]:
        """Returns up to ten layouts that fit, the fastest first."""
        try:
            self._find()
        except KeyboardInterrupt:
            if not self._fitting:
                raise
            self.complete = False
        fits = sorted(self._fitting.values(), key=_step_seconds)[:SHOWN_LAYOUTS]
        for fit in fits:
            fit.step_seconds = simulate_step(self._stages(fit.config)).seconds
        return sorted(fits, key=_step_seconds)

    def _find(self) -> None:
        """Try the recipe's layout, then similar layouts, then all layouts."""
        every = list(frames(self._base, self._devices))
        self.tried = sum(frame.layouts for frame in every)
        every.sort(key=self._distance)
        nearest = next((self._distance(frame) for frame in every if self._ways(frame)), 0.0)
        near = [frame for frame in every if self._distance(frame) <= nearest]
        given = filter(None, map(self._as_given, near))
        own = [one for frame in given for one in FrameBounds(frame, self._rates, self._memo).candidates()]
        self._try(own, 1)
        bounded = 0
        for further in (0.0, *NEARER, math.inf):
            until = bisect_right(every, nearest + further, key=self._distance)
            for frame in every[bounded:until]:
                self._bound(frame)
            bounded = until
            possible = [one for family in self._families.values() for one in family.possible]
            self._try(possible, SHOWN_LAYOUTS if bounded == len(every) else 1)
            if bounded == len(every):
                break

    def _distance(self, frame: Frame) -> float:
        """Returns how far a frame (a set of similar layouts) is from the recipe.

        Unit: doublings or halvings of pp, cp, ep, zero and micro_batch_size.
        """
        one, base = frame.config, self._base
        pairs = [(getattr(one.parallel, name), getattr(base.parallel, name)) for name in ("pp", "cp", "ep", "zero")]
        return sum(abs(math.log2(a / b)) for a, b in (*pairs, (one.micro_batch_size, base.micro_batch_size)))

    def _as_given(self, frame: Frame) -> Frame | None:
        """Keeps only layouts with the recipe's schedule and dispatch, and with one of two activation savings.

        These savings are the recipe's, and recomputation of whole layers. Returns None if no layout is left.
        """
        base, model = self._base.parallel, self._base.model
        if (frame.config.parallel.schedule != base.schedule and base.pp > 1) or not (ways := self._ways(frame)):
            return None
        given = [way for way in ways if way == (base.dispatch, base.wire)] or ways[:1]
        own = ActivationSaving(model.recompute, model.offload)
        savings = [one for one in frame.savings if one == own or (Recompute.layer in one.recompute and not one.blocks)]
        return replace(frame, savings=savings, ways=given)

    def _bound(self, frame: Frame) -> None:
        """Add the frame's layouts that may fit to the family's `possible`.

        Add the ruled-out layout with the fewest missing bytes to the family's `lacking`.
        """
        family = self._families[frame.family]
        if ways := self._ways(frame):
            bounds = FrameBounds(replace(frame, ways=ways), self._rates, self._memo)
            family.possible += bounds.candidates()
            family.lacking += sorted(bounds.lacking, key=_bytes_lacking)[:1]

    def _try(self, possible: list[Candidate], wanted: int) -> None:
        """Store layouts that fit, and report each new fastest layout."""
        for fit in self._fits(possible, wanted):
            before = min(self._fitting.values(), key=_step_seconds, default=None)
            self._fitting[self._name(fit.config)] = fit
            if before is None or fit.step_seconds < before.step_seconds:
                self._tell(self.found(fit))

    def _ways(self, frame: Frame) -> list[tuple[str, WireFormat]]:
        """Returns the allowed pairs of dispatch and wire format.

        If the layout breaks a rule with flat dispatch, it breaks this rule with every dispatch.
        """
        flat, family = broken_layout(frame.config), self._families[frame.family]
        errors = {FLAT_DISPATCH: flat}
        if flat is None:
            others = {dispatch for dispatch, _ in frame.ways} - {FLAT_DISPATCH}
            errors |= {dispatch: broken_layout(with_changes(frame.config, dispatch=dispatch)) for dispatch in others}
        family.rule = family.rule or next(filter(None, errors.values()), None)
        ways = [way for way in frame.ways if way[0] in errors and errors[way[0]] is None]
        family.runs |= bool(ways)
        return ways

    def _fits(self, possible: list[Candidate], wanted: int) -> Iterator[_Fit]:
        """Yields layouts that fit, until no other layout can be among the fastest."""
        queue = [(one.seconds, number, _UNSEEN) for number, one in enumerate(possible)]
        heapify(queue)
        best: list[float] = []
        while queue and not (len(best) == wanted and queue[0][0] > best[-1]):
            seconds, number, blocks = heappop(queue)
            one = possible[number]
            if blocks == _UNSEEN:
                if (one.blocks or not self._needs_no_host(one.config)) and (fewest := self._fewest(one)) is not None:
                    heappush(queue, (self._seconds(one, fewest), number, fewest))
                continue
            config = one.saving.applied(one.config, blocks)
            if self._needs_no_host(config):
                continue
            lacking, what = self._look(one, config)
            if lacking <= 0 and (blocks or not one.blocks):  # with 0 blocks, another saving gives the same layout
                fit = self._fit(one.family, config, -lacking, seconds)
                best = sorted([*best, fit.step_seconds])[:wanted]
                yield fit
            elif lacking > 0 and blocks < one.blocks and not what:  # more offloaded blocks need more host memory
                heappush(queue, (self._seconds(one, blocks + 1), number, blocks + 1))

    def _fewest(self, one: Candidate) -> int | None:
        """Returns the smallest number of recomputed or offloaded blocks per stage with which the layout may fit.

        None: the layout does not fit even with the largest number.
        """
        if id(one) not in self._blocks:
            able = self._lacking(one, one.blocks) <= 0
            fewest = bisect_left(range(one.blocks * able), True, key=lambda blocks: self._lacking(one, blocks) <= 0)
            self._blocks[id(one)] = fewest if able else None
        return self._blocks[id(one)]

    def _lacking(self, one: Candidate, blocks: int) -> int:
        config = one.saving.applied(one.config, blocks)
        return traced_bound(one, config, scene_of(config)) - tensor_memory(config)

    def _seconds(self, one: Candidate, blocks: int) -> float:
        key = id(one), blocks
        if key not in self._estimated:
            self._estimated[key] = estimate_step(self._stages(one.saving.applied(one.config, blocks)))[0]
        return self._estimated[key]

    def _stages(self, config: Config) -> Stages:
        return Stages(config, layout_of(config), self._rates, self._memo)

    def _needs_no_host(self, config: Config) -> bool:
        """Whether the optimizer is on the host although the layout fits with it on the device."""
        host = config.parallel.offload_optimizer
        return host and self._name(with_changes(config, offload_optimizer=False)) in self._on_devices

    def _name(self, config: Config) -> tuple[str, ...]:
        return tuple(overrides(config, self._base))

    def _look(self, one: Candidate, config: Config) -> tuple[int, str]:
        """Returns a layout's missing bytes and the kind of memory (`_missed`).

        Results are cached, because several candidates can have the same recipe.
        """
        name = self._name(config)
        if name not in self._looked:
            self._looked[name] = _missed(config, one.fullest)
            if self._looked[name][0] > 0:
                self._families[one.family].missed.append(_Miss(*self._looked[name], config))
        return self._looked[name]

    def _fit(self, family: str, config: Config, room: int, seconds: float) -> _Fit:
        """Records a layout that fits, with a faster stage split if possible."""
        if not config.parallel.offload_optimizer:
            self._on_devices.add(self._name(config))
        fit = self._faster(_Fit(config, family, room, seconds))
        self._families[family].steps.append(fit.step_seconds)
        return fit

    def _faster(self, fit: _Fit) -> _Fit:
        """Returns the layout, with a balanced stage split if that is faster."""
        stages = self._stages(fit.config)
        if estimate_step(stages)[1] < UNEVEN:
            return fit
        config = with_changes(fit.config, split=stages.balanced())
        seconds, _ = estimate_step(self._stages(config))
        if seconds > fit.step_seconds * (1 - WORTH):
            return fit
        lacking, _ = _missed(config, 0)
        return fit if lacking > 0 else _Fit(config, fit.family, -lacking, seconds)

    def found(self, fit: _Fit) -> FoundLayout:
        """Converts a layout that fits to a `FoundLayout`."""
        config = replace(fit.config, plan=self._base.plan)
        causal = mfu(config, fit.step_seconds, causal=True)
        return FoundLayout(config, overrides(config, self._base), fit.step_seconds, fit.room_bytes, causal)

    def rejected(self, fits: list[_Fit]) -> Iterator[Family]:
        """Yields a reason for each family that is not among the best."""
        shown = {fit.family for fit in fits}
        names = (name for name in self._families if name not in shown)
        for name in sorted(names, key=lambda name: (int("".join(filter(str.isdigit, name.split()[0]))), name)):
            yield Family(name, self._reason(self._families[name], fits))

    def _reason(self, family: _Looked, fits: list[_Fit]) -> str:
        if not family.runs:
            assert family.rule is not None
            return f"{family.rule.field} = {family.rule.value}: {family.rule.rule}"
        if family.steps:
            return f"{100 * (min(family.steps) / fits[0].step_seconds - 1):.1f} % slower than the best"
        if not family.possible:
            lacking, what, _ = min(family.lacking, key=_bytes_lacking)
            return f"does not fit: even its smallest layout needs {gib(lacking)} more per device{what}"
        quickest = min(one.seconds for one in family.possible)
        if fits and quickest > fits[0].step_seconds:
            slower = 100 * (quickest / fits[0].step_seconds - 1)
            return f"at least {slower:.1f} % slower than the best, even if it fitted"
        lightest = min(family.possible, key=lambda one: one.least_bytes).config
        family.nearest = _Miss.of(
            min(family.missed, key=lambda miss: miss.lacking).config if family.missed else lightest
        )
        lacking, what, _ = family.nearest
        return f"does not fit: the nearest tested layout lacks {gib(lacking)}{what}" if lacking > 0 else "slower"

    @property
    def nearest(self) -> _Miss | None:
        """The tried layout with the fewest missing bytes. Call `rejected` first."""
        families = self._families.values()
        if nearest := [family.nearest for family in families if family.nearest is not None]:
            return min(nearest, key=lambda miss: miss.lacking)
        lacking = [one for family in families for one in family.lacking]
        return _Miss.of(min(lacking, key=_bytes_lacking)[2].config) if lacking else None


def _bytes_lacking(one: tuple[int, str, Candidate]) -> tuple[int, int]:
    """Sort key: fewest missing bytes first, then least needed memory."""
    return one[0], one[2].least_bytes


def _missed(config: Config, fullest: int) -> tuple[int, str]:
    """Returns the missing bytes of the fullest rank (negative: free bytes), and text about the kind of memory.

    fullest: fullest rank by the memory bound
    """
    scene, memory, last = scene_of(config), tensor_memory(config), config.parallel.pp - 1
    ranks: list[RankMemory] = []
    for depth in WalkDepth:  # bounds come first, because they rule out most layouts
        ranks = []
        likely = (last, fullest) if depth == WalkDepth.forwards else (fullest, 0, last, *range(last))
        for rank in dict.fromkeys(likely):
            ranks.append(rank_memory(config, rank, scene, shortest=True, depth=depth))
            if ranks[-1].peak_bytes > memory:
                return ranks[-1].peak_bytes - memory, ""
    if over := host_lacking(config, ranks):
        return over, OF_A_HOST
    return max(rank.peak_bytes for rank in ranks) - memory, ""


def _nothing_runs(config: Config, found: Search, devices: int) -> UserError:
    """Returns the error if no layout can run."""
    reasons = "; ".join(f"{family.name}: {family.reason}" for family in found.rejected[:REASONS])
    more = f"; and {len(found.rejected) - REASONS} more" if len(found.rejected) > REASONS else ""
    return UserError(
        "plan.devices",
        devices,
        f"no layout of {devices} devices is valid for this recipe, for any memory size ({reasons}{more})",
        _near(config, devices),
    )


def _near(config: Config, devices: int) -> str:
    """Suggests the nearest numbers of devices that suit the batch size and the number of layers."""
    longest = config.model.layers + 2
    shares = divisors(config.batch_size)
    able = {pp * dp for pp in range(1, longest + 1) for dp in shares}
    below, above = (
        max((n for n in able if n < devices), default=None),
        min((n for n in able if n > devices), default=None),
    )
    near = " or ".join(f"plan.devices={each}" for each in (below, above) if each is not None)
    return f"use {near}, or another batch_size"


def _nothing_fits(config: Config, found: Search, nearest: _Miss | None) -> UserError:
    """Returns the error if no layout fits. nearest: layout with the fewest missing bytes"""
    rule = f"{found.devices} x {config.hardware.name} cannot fit this recipe with any of {found.tried} layouts"
    cures = []
    if nearest is not None:
        plan = make_plan(nearest.config)
        host = host_lacking(plan.config, plan.ranks)
        lacks = [f"{gib(-plan.room_bytes)} of a device at the {plan.fullest.peak_event}"] * (plan.room_bytes < 0)
        lacks += [f"{gib(host)}{OF_A_HOST}"] * (host > 0)
        layout = " ".join(overrides(plan.config, config))
        rule += f": the nearest tested layout, {layout}, lacks {' and '.join(lacks)}"
        cures = [
            f"with that layout and {shlex.join(cure.overrides)} it fits"
            + (f" on plan.devices={cure.devices}" if cure.devices != found.devices else "")
            + f", {room_words(cure.room_bytes, plan.memory_bytes)}"
            for cure in find_beyond(plan)
        ]
    general = "use more devices, devices with more memory, or a smaller model, batch or sequence length"
    return UserError("plan.devices", found.devices, rule, "; ".join([*cures, general]))
