"""Lists the layouts that a search tries on a number of devices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from conf.dispatches import DISPATCHES, FLAT_DISPATCH
from conf.micro_batches import divisors
from conf.pipeline_schedules import PLAIN_SCHEDULE, SCHEDULES
from conf.schema import Config, PipelineSchedule, Recompute, WireFormat
from train.plan.job import can_offload, device_kind
from train.plan.search.changes import LIGHTEST, fitted_ramp, with_changes

MICRO_BATCHES = (1, 2, 4, 8)
VIRTUAL_STAGES = (2, 3, 4)
CONTEXT_TOKENS = 4096
"""If ranks share a sequence, each has at least this many tokens."""
WAYS = [*product(DISPATCHES, WireFormat)]
"""All pairs of a dispatch and a wire format."""


@dataclass(frozen=True)
class ActivationSaving:
    """Settings that reduce the activation memory on a device."""

    recompute: list[str]
    offload: list[str] = field(default_factory=list)
    blocks: str = ""
    """How the first blocks of each stage save more memory: `recompute`, `offload`, or empty for neither."""

    def applied(self, config: Config, blocks: int) -> Config:
        """Returns the recipe with these settings. blocks: number of first blocks per stage that save more memory"""
        more = [f"layer:{blocks}"] if self.blocks and blocks else []
        recompute = self.recompute + more * (self.blocks == "recompute")
        return with_changes(config, recompute=recompute, offload=self.offload + more * (self.blocks == "offload"))


SOME = [str(Recompute.norm), str(Recompute.swiglu)]
"""Entries for the setting `recompute` that cost little time."""
SAVINGS = (
    ActivationSaving([]), ActivationSaving(SOME), ActivationSaving(LIGHTEST), ActivationSaving(LIGHTEST, blocks="recompute"), ActivationSaving([str(Recompute.layer)]),
    ActivationSaving(SOME, blocks="offload"), ActivationSaving(LIGHTEST, blocks="offload"),
)  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """A set of layouts that differ only in `ActivationSaving`, dispatch, wire format, and the optimizer's place."""

    config: Config
    """The recipe in this layout, with flat bf16 dispatch, without offloaded optimizer."""
    family: str
    """Name of all layouts with the same pipeline length and schedule."""
    savings: Sequence[ActivationSaving]
    ways: Sequence[tuple[str, WireFormat]]
    hosts: list[bool]
    """Values of parallel.offload_optimizer that the search tries."""

    @property
    def layouts(self) -> int:
        """Number of layouts. Layouts that differ only in the number of blocks count once."""
        return len(self.savings) * len(self.ways) * len(self.hosts)


@dataclass
class Candidate:
    """A layout that the memory bound does not rule out (train/plan/search/lower_bounds.py)."""

    placed: Config
    """The recipe in this layout, before `saving` (activation memory) and `way` (dispatch, wire format) are applied."""
    way: tuple[str, WireFormat]
    family: str
    saving: ActivationSaving
    blocks: int
    """Largest possible number of blocks per stage that recompute or offload."""
    seconds: float
    """Lower bound on the step time."""
    least_bytes: int
    """Lower bound on the memory of the fullest rank."""
    fullest: int
    """The pipeline rank with the largest memory bound (`least_bytes`)."""
    kept_bytes: int
    """The part of `least_bytes` that consists of activations kept for backward."""

    @cached_property
    def config(self) -> Config:
        """The recipe with as many recomputed or offloaded blocks as possible."""
        dispatch, wire = self.way
        return with_changes(self.saving.applied(self.placed, self.blocks), dispatch=dispatch, wire=wire)


def frames(config: Config, devices: int) -> Iterator[Frame]:
    """Yields all sets of similar layouts for a number of devices. Some layouts may break a rule."""
    model, able = config.model, can_offload(config)
    savings = [one for one in SAVINGS if able or one.blocks != "offload"]
    own = ActivationSaving(model.recompute, model.offload)
    savings += [own] * (own not in savings)
    on_gpu = device_kind(config) == "cuda"
    hosts = [False, True] if able else [config.parallel.offload_optimizer]
    spreads = [(pp, cp) for pp in divisors(devices) for cp in _contexts(config, devices // pp)]
    for pp, cp in spreads:
        dp = devices // (pp * cp)
        groups = [ep for ep in divisors(dp * cp) if model.experts % ep == 0]
        for schedule, virtual in _orders(config, pp):
            family = "pp=1" if pp == 1 else f"pp>{model.layers}" if pp > model.layers else f"pp={pp} {schedule}"
            for size in MICRO_BATCHES:
                ramp = _ramp(config, size * dp, pp, schedule)
                for ep in groups:
                    ways = [way for way in WAYS if DISPATCHES[way[0]].is_able(ep, model.hidden, on_gpu)]
                    ways = ways if ep > 1 else ways[:1]
                    for zero in (1,) if pp > 1 else (1, 2, 3):
                        one = with_changes(
                            ramp, pp=pp, dp=dp, cp=cp, ep=ep, schedule=schedule, virtual_stages=virtual, micro_batch_size=size,
                            zero=zero, dispatch=FLAT_DISPATCH, wire="bf16", overlap=True, offload_optimizer=False,
                        )  # fmt: skip
                        yield Frame(one, family, savings, ways, hosts if zero < 3 else [False])


def _orders(config: Config, pp: int) -> Iterator[tuple[str, int]]:
    """Yields pairs of a schedule and a number of virtual stages.

    More than two virtual stages are only tried if at most two stages would have no layers.
    """
    if pp == 1:
        yield PLAIN_SCHEDULE, 2
        return
    for schedule in PipelineSchedule:
        more = {*VIRTUAL_STAGES, config.parallel.virtual_stages} if SCHEDULES[schedule].stages is None else {2}
        yield from ((schedule, each) for each in sorted(more) if each == 2 or each * pp - 2 <= config.model.layers)


def _contexts(config: Config, ranks: int) -> list[int]:
    """Returns the possible values of cp.

    The maximum is the recipe's cp or, if larger, the number of ranks with CONTEXT_TOKENS tokens each.
    """
    most = max(config.seq_len // CONTEXT_TOKENS, config.parallel.cp)
    return [cp for cp in divisors(ranks) if cp <= most and (cp == 1 or config.seq_len % (2 * cp) == 0)]


def _ramp(config: Config, share: int, pp: int, schedule: str) -> Config:
    """Returns the recipe with a batch ramp that fits the pipeline."""
    if SCHEDULES[schedule].rounds:
        whole = fitted_ramp(config, share * pp, 2)
        if whole is not config:
            return whole
    return fitted_ramp(config, share, 2 * pp)
