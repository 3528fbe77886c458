"""The layouts that a search looks at: every combination of its choices for a number of devices."""

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
"""Tokens of a sequence that a rank has at least where ranks share sequences."""
WAYS = [*product(DISPATCHES, WireFormat)]
"""Dispatch and wire."""


@dataclass(frozen=True)
class ActivationSaving:
    """What a layout does to keep fewer activations on a device."""

    recompute: list[str]
    offload: list[str] = field(default_factory=list)
    blocks: str = ""
    """recompute or offload, where beside that the first blocks of every stage run again or wait on the host: as few as memory
    asks for."""

    def applied(self, config: Config, blocks: int) -> Config:
        """The recipe with so many such blocks a stage."""
        more = [f"layer:{blocks}"] if self.blocks and blocks else []
        recompute = self.recompute + more * (self.blocks == "recompute")
        return with_changes(config, recompute=recompute, offload=self.offload + more * (self.blocks == "offload"))


SOME = [str(Recompute.norm), str(Recompute.swiglu)]
"""What is recomputed for a small part of a step."""
SAVINGS = (
    ActivationSaving([]), ActivationSaving(SOME), ActivationSaving(LIGHTEST), ActivationSaving(LIGHTEST, blocks="recompute"), ActivationSaving([str(Recompute.layer)]),
    ActivationSaving(SOME, blocks="offload"), ActivationSaving(LIGHTEST, blocks="offload"),
)  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """Layouts that differ in nothing but what is kept of activations, how rows travel, and where the optimizer lies."""

    config: Config
    """With flat dispatch in bf16, and the optimizer on the device."""
    family: str
    """All layouts of one pipeline length and schedule."""
    savings: Sequence[ActivationSaving]
    ways: Sequence[tuple[str, WireFormat]]
    hosts: list[bool]
    """Whether the optimizer lies on the host."""

    @property
    def layouts(self) -> int:
        """How many; those that differ in a number of blocks count as one."""
        return len(self.savings) * len(self.ways) * len(self.hosts)


@dataclass
class Candidate:
    """One layout that bounds do not rule out (train/plan/search/lower_bounds.py)."""

    placed: Config
    """Without its saving, with flat dispatch in bf16."""
    way: tuple[str, WireFormat]
    family: str
    saving: ActivationSaving
    blocks: int
    """Most of those that a stage has."""
    seconds: float
    """Bound on the step."""
    least_bytes: int
    """Bound on the memory of the fullest rank."""
    fullest: int
    """The pipeline rank of that bound."""
    kept_bytes: int
    """What of it waits for backward."""

    @cached_property
    def config(self) -> Config:
        """With all blocks that its saving may have. Made when it is asked for, as a search looks at one of ten."""
        dispatch, wire = self.way
        return with_changes(self.saving.applied(self.placed, self.blocks), dispatch=dispatch, wire=wire)


def frames(config: Config, devices: int) -> Iterator[Frame]:
    """Every combination for these devices, whatever the rules say of it."""
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
    """Schedules, each with its virtual stages: where it has a choice, as many as leave every inner stage a layer."""
    if pp == 1:
        yield PLAIN_SCHEDULE, 2
        return
    for schedule in PipelineSchedule:
        more = {*VIRTUAL_STAGES, config.parallel.virtual_stages} if SCHEDULES[schedule].stages is None else {2}
        yield from ((schedule, each) for each in sorted(more) if each == 2 or each * pp - 2 <= config.model.layers)


def _contexts(config: Config, ranks: int) -> list[int]:
    """Over how many ranks of a stage sequences may be shared: 1, and more where each still has CONTEXT_TOKENS of one."""
    most = max(config.seq_len // CONTEXT_TOKENS, config.parallel.cp)
    return [cp for cp in divisors(ranks) if cp <= most and (cp == 1 or config.seq_len % (2 * cp) == 0)]


def _ramp(config: Config, share: int, pp: int, schedule: str) -> Config:
    """The recipe with a ramp for this pipeline; where micro-batches come in rounds of pp, so does its batch if the full one does."""
    if SCHEDULES[schedule].rounds:
        whole = fitted_ramp(config, share * pp, 2)
        if whole is not config:
            return whole
    return fitted_ramp(config, share, 2 * pp)
