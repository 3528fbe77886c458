"""The layouts of a search: every combination of its choices for a number of devices."""

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
"""Minimum tokens per rank of a sequence that several ranks share."""
WAYS = [*product(DISPATCHES, WireFormat)]
"""Pairs of dispatch and wire."""


@dataclass(frozen=True)
class ActivationSaving:
    """Settings of a layout that reduce the activations on a device."""

    recompute: list[str]
    offload: list[str] = field(default_factory=list)
    blocks: str = ""
    """recompute or offload, if the first blocks of every stage are also recomputed or wait on the host. Their number
    is as small as memory allows."""

    def applied(self, config: Config, blocks: int) -> Config:
        """The recipe with this number of such blocks per stage."""
        more = [f"layer:{blocks}"] if self.blocks and blocks else []
        recompute = self.recompute + more * (self.blocks == "recompute")
        return with_changes(config, recompute=recompute, offload=self.offload + more * (self.blocks == "offload"))


SOME = [str(Recompute.norm), str(Recompute.swiglu)]
"""Recomputed items that take little time."""
SAVINGS = (
    ActivationSaving([]), ActivationSaving(SOME), ActivationSaving(LIGHTEST), ActivationSaving(LIGHTEST, blocks="recompute"), ActivationSaving([str(Recompute.layer)]),
    ActivationSaving(SOME, blocks="offload"), ActivationSaving(LIGHTEST, blocks="offload"),
)  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """Layouts that differ only in activation saving, dispatch and wire, and place of the optimizer."""

    config: Config
    """With flat dispatch in bf16, and the optimizer on the device."""
    family: str
    """Name for all layouts of one pipeline length and schedule."""
    savings: Sequence[ActivationSaving]
    ways: Sequence[tuple[str, WireFormat]]
    hosts: list[bool]
    """Choices for the optimizer on the host: True or False."""

    @property
    def layouts(self) -> int:
        """Number of layouts; layouts that differ only in a number of blocks count as one."""
        return len(self.savings) * len(self.ways) * len(self.hosts)


@dataclass
class Candidate:
    """A layout that bounds do not rule out (train/plan/search/lower_bounds.py)."""

    placed: Config
    """Without its saving, with flat dispatch in bf16."""
    way: tuple[str, WireFormat]
    family: str
    saving: ActivationSaving
    blocks: int
    """Maximum number of the saving's blocks in a stage."""
    seconds: float
    """Lower bound on the step's time."""
    least_bytes: int
    """Lower bound on the memory of the fullest rank."""
    fullest: int
    """The pipeline rank of that bound."""
    kept_bytes: int
    """The bytes of that bound that wait for backward."""

    @cached_property
    def config(self) -> Config:
        """With all blocks that its saving may have. Built on access, because a search needs one in ten."""
        dispatch, wire = self.way
        return with_changes(self.saving.applied(self.placed, self.blocks), dispatch=dispatch, wire=wire)


def frames(config: Config, devices: int) -> Iterator[Frame]:
    """Every combination for these devices, before any rule is checked."""
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
    """Schedules, each with its virtual stages. If there is a choice, every inner stage must keep a layer."""
    if pp == 1:
        yield PLAIN_SCHEDULE, 2
        return
    for schedule in PipelineSchedule:
        more = {*VIRTUAL_STAGES, config.parallel.virtual_stages} if SCHEDULES[schedule].stages is None else {2}
        yield from ((schedule, each) for each in sorted(more) if each == 2 or each * pp - 2 <= config.model.layers)


def _contexts(config: Config, ranks: int) -> list[int]:
    """Numbers of ranks that may share sequences: 1, and more if each rank still has CONTEXT_TOKENS of a sequence."""
    most = max(config.seq_len // CONTEXT_TOKENS, config.parallel.cp)
    return [cp for cp in divisors(ranks) if cp <= most and (cp == 1 or config.seq_len % (2 * cp) == 0)]


def _ramp(config: Config, share: int, pp: int, schedule: str) -> Config:
    """The recipe with a batch ramp that fits this pipeline.

    For a schedule with rounds of pp micro-batches, the ramp's steps have whole rounds too, if the full batch has.
    """
    if SCHEDULES[schedule].rounds:
        whole = fitted_ramp(config, share * pp, 2)
        if whole is not config:
            return whole
    return fitted_ramp(config, share, 2 * pp)
