"""Computes the seconds of a pipeline's actions, from the work of its stages and a device's rates.

Each part of a stage runs once (train/plan/memory/part.py), and train/plan/work_recorder.py counts its work. This file
converts the work to segments (passes.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import chain
from typing import Any

from conf.errors import UserError
from conf.schema import Config, Recompute
from parallel.layout import Layout
from parallel.pipeline.host_store import reads
from parallel.pipeline.orders import Action
from parallel.pipeline.split import split_layers
from train.kernels.fp8.hopper import has_mx_tiles
from train.parallelize import stage_layers
from train.plan.job import device_kind, micro_batches_of
from train.plan.memory.chunk import Parts, chunk_of
from train.plan.memory.part import AGAIN, PassMemory, Scene, trace_backward, trace_forward, trace_split_backward
from train.plan.memory.rank_memory import block_of, parts_of_stage, scene_of
from train.plan.time.passes import ElapsedTime, Segment, alone, overlapped
from train.plan.time.rates import LINKS, Rates
from train.plan.time.traffic import Spread, spread_of
from train.plan.time.update import to_host
from train.plan.work_recorder import ONCE, Exchange, Work

FEW_MICRO_BATCHES = 16
"""If a step has at most this many micro-batches, the first backward is planned separately from the others.

The first backward creates the gradient sums.
"""


@dataclass
class PassTime:
    """The planned time of one pass over some layers, and its work."""

    segments: list[Segment] = field(default_factory=list)
    pieces: list[Sequence[Work]] = field(default_factory=list)

    @property
    def work(self) -> list[Work]:
        return list(chain.from_iterable(self.pieces))

    @classmethod
    def joined(cls, passes: Sequence["PassTime"]) -> "PassTime":
        """Joins passes that run in sequence into one pass."""
        return cls([one for each in passes for one in each.segments], [one for each in passes for one in each.pieces])


def _computing(one: PassTime) -> float:
    return sum(segment.compute + segment.beside for segment in one.segments)


class Directions:
    """The passes over some layers, by kind of action."""

    def __init__(self, make: Callable[[str], PassTime]):
        self.of = cache(make)
        """Returns the pass of an action F, B, I or W."""

    @property
    def forward(self) -> PassTime:
        return self.of("F")

    @property
    def backward(self) -> PassTime:
        """The complete backward pass."""
        return self.of("B")

    @property
    def inputs(self) -> PassTime:
        return self.of("I")

    @property
    def weights(self) -> PassTime:
        return self.of("W")


class Stages:
    """Computes the durations of all actions in a recipe's pipeline."""

    def __init__(self, config: Config, layout: Layout, rates: Rates, memo: dict | None = None):
        """memo: cache that layouts of one recipe share, if their rates are equal"""
        self.config, self.layout, self.rates = config, layout, rates
        self.placement = config.parallel.placement
        self.layers = stage_layers(config)
        self.taken = config.hardware.communication_share
        parallel = config.parallel
        self.tokens = config.micro_batch_size * config.seq_len // parallel.cp
        """Tokens of a micro-batch on one rank."""
        self.micro_batches = micro_batches_of(config)
        self.element = config.precision.weight_bytes
        """Bytes of one element of an activation or a weight."""
        self.on_gpu = device_kind(config) == "cuda"
        self._memo = {} if memo is None else memo
        words = tuple(sorted(word for word in config.model.recompute if not word.startswith(f"{Recompute.layer}:")))
        self._alike: tuple = (
            self.tokens, self.micro_batches, parallel.cp, layout.ranks_per_node, words, parallel.ep, parallel.dispatch, parallel.wire,
            config.holds_weights,
        )  # fmt: skip
        """Part of cache keys: the layout's settings that affect times."""
        self._sent: dict[int, float] = {}
        self._elapsed: dict[tuple, ElapsedTime] = {}
        self._kinds: dict[int, Parts] = {}

    def _remembered(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    @property
    def reduces_ahead(self) -> bool:
        """Whether gradients are reduced while other chunks still run passes."""
        parallel = self.config.parallel
        return self.on_gpu and self.element == 2 and parallel.zero < 3 and not parallel.offload_optimizer

    @cached_property
    def spread(self) -> Spread:
        """Expected messages per token in an expert layer, and their sizes."""
        return spread_of(self.config, self.layout)

    @cached_property
    def _scene(self) -> Scene:
        return scene_of(self.config)

    def directions(self, stage: int) -> Directions:
        """Returns the passes of a stage. Equal stages have the same passes."""
        return self._passes(self.kind(stage))

    def kind(self, stage: int) -> Parts:
        """Returns a stage's part names. Equal names mean equal work."""
        if stage not in self._kinds:
            self._kinds[stage] = parts_of_stage(self.config, self.layers, stage)
        return self._kinds[stage]

    def _passes(self, parts: Parts) -> Directions:
        key = *self._alike, "stage", parts, self.config.parallel.zero == 3
        return self._remembered(key, lambda: Directions(lambda way: self._stage(parts, way)))

    def balanced(self) -> list[int]:
        """Returns layers per stage that best balance the ranks' planned times."""
        model = self.config.model
        # If only some layers are recomputed, the costs assume no recomputation.
        again = model.repeated_layers >= model.layers
        end = AGAIN if again and Recompute.layer in model.recompute else ""
        costs = [self._pair((block_of(model, index) + end,)) for index in range(model.layers)]
        first, last = self._pair(("embedding",)), self._pair(("end",))
        return [len(one) for one in split_layers(costs, first, last, self.placement)]

    def _pair(self, parts: Parts) -> float:
        """Returns the seconds of forward and backward, overlapped if the schedule does so."""
        made = self._passes(parts)
        forward, backward = made.forward.segments, made.backward.segments
        if self.config.parallel.schedule_facts.pairs and self.config.parallel.overlap:
            return overlapped(forward, backward, self.taken).seconds
        return alone(forward, self.taken).seconds + alone(backward, self.taken).seconds

    def _stage(self, parts: Parts, way: str) -> PassTime:
        """Returns the time of one pass over model parts. way: kind of action (F, B, I or W)."""
        first, depth = parts[0] == "embedding", self.config.model.mtp_depth if parts[-1] == "end" else 0
        whole = (
            self.config.parallel.zero == 3 or depth > 1 or self.config.model.sparse.heads > 0
        )  # the backward cannot be split, as in DeepSeekV3.backward_in_one_piece
        if way in "IW" and (whole or first):
            # On the first stage, torch's split does everything in W, because no gradient is sent.
            return self._stage(parts, "B") if (way == "I") == whole else PassTime()
        if depth and not first:
            parts = ("embedding", *parts)
        ordered = parts if way == "F" else parts[::-1]
        return PassTime.joined(
            [self._remembered((*self._alike, one, way), lambda one=one: self._part(one, way)) for one in ordered]
        )

    def _part(self, part: str, way: str) -> PassTime:
        """Returns the mean time of a pass through a model part."""
        if part == "end" and self._scene.ep > 1 and self.config.model.mtp_depth:
            return self._end(way)
        if way == "F":
            trace_backward(self._scene, part, False, False)  # this traces and caches the forward, too
            return self._timed([(1.0, trace_forward(self._scene, part).run)])
        share = 1 / self.micro_batches if self.micro_batches <= FEW_MICRO_BATCHES else 0.0
        shares = {True: share, False: 1 - share}
        return self._timed([(share, self._backward(part, way, first)) for first, share in shares.items() if share])

    def _end(self, way: str) -> PassTime:
        """Returns the time of a pass through the part `end`, for a model with MTP modules and ep above 1.

        The result is the time at ep 1, but with the MTP blocks of this layout. Tracing `end` for every layout would be
        slow.
        """
        model, parallel = self.config.model, replace(self.config.parallel, ep=1)
        block = "moe" + AGAIN * (Recompute.layer in model.recompute)
        here = Stages(replace(self.config, parallel=parallel), self.layout, self.rates)
        end, less = (here._part(part, way) for part in ("end", block))
        more = [self._remembered((*self._alike, block, way), lambda: self._part(block, way))] * model.mtp_depth
        compute = _computing(end) - model.mtp_depth * _computing(less)
        gone = [Work(kind, *(-model.mtp_depth * amount for amount in amounts)) for kind, *amounts in less.work]
        rest = PassTime([Segment(compute)], [end.work, gone])
        # In forward, the head and the loss run after the MTP blocks.
        return PassTime.joined([*more, rest] if way == "F" else [rest, *more])

    def _backward(self, part: str, way: str, first: bool) -> PassMemory:
        if way == "B":
            return trace_backward(self._scene, part, first, False)
        if part == "embedding":  # with MTP modules, the gradient of the embedding is computed in W
            return trace_backward(self._scene, part, first, False) if way == "W" else PassMemory(0, ())
        return trace_split_backward(self._scene, part, first)[way == "W"]

    def _timed(self, passes: list[tuple[float, PassMemory]]) -> PassTime:
        """Returns the mean time of passes. A pass is weighted by the fraction of the micro-batches that run it."""
        made = PassTime()
        for segments in zip(*(run.work for _, run in passes), strict=True):
            weighed = list(zip([share for share, _ in passes], segments, strict=True))
            compute, beside = (
                [self._scaled(work, share) for share, one in weighed for work in getattr(one, name)]
                for name in ("compute", "beside")
            )
            transfer = sum(map(self._exchange_seconds, segments[0].exchanges))
            seconds = self.seconds(compute), transfer, self.seconds(beside)
            made.segments.append(Segment(*seconds, segments[0].yields))
            made.pieces += [[one for one in works if one.kind not in LINKS] for works in (compute, beside)]
        return made

    def _scaled(self, work: Work, share: float) -> Work:
        """Returns the work multiplied by `share`. Work that a step does only once is spread over all micro-batches."""
        kind = work.kind.removeprefix(ONCE)
        if kind != work.kind:
            share /= self.micro_batches
        if kind in ("gather", "all_to_all"):
            kind = f"{kind}_{'inside' if self.layout.cp <= self.layout.ranks_per_node else 'across'}"
        return Work(kind, work.flops * share, work.bytes * share, work.calls * share)

    def seconds(self, works: Sequence[Work]) -> float:
        """Returns the seconds of work in a pass, including transfers that block the pass."""
        sent = [one for one in works if one.kind in LINKS]
        return self.rates.passes([one for one in works if one.kind not in LINKS]) + self.rates.seconds(sent)

    def _exchange_seconds(self, hop: Exchange) -> float:
        """Returns the seconds of a dispatch or combine on the busiest rank."""
        tokens = self.tokens * self.config.plan.imbalance * hop.row_bytes
        return max(
            (
                self.rates.of(Work(f"all_to_all_{where}", bytes=tokens * messages))
                for where, messages in (("across", self.spread.across), ("inside", self.spread.inside))
                if messages and hop.link in ("", where)
            ),
            default=0.0,
        )

    def elapsed(self, action: Action) -> ElapsedTime:
        """Returns the time of an action, including the waits for transfers."""
        halves = action.halves
        key = (action.kind, halves[0].stage, halves[1].stage) if halves else (action.kind, action.stage)
        if key not in self._elapsed:
            self._elapsed[key] = self._remembered(self._long_key(action), lambda: self._time(action))
        return self._elapsed[key]

    def _long_key(self, action: Action) -> tuple:
        """Returns the cache key of an action's time. Actions with equal work have equal keys."""
        kinds = [self.kind(half.stage) for half in action.halves or (action,)]
        return (*self._alike, action.kind, *kinds, self.config.parallel.zero == 3)

    def _time(self, action: Action) -> ElapsedTime:
        return self._beside_copies(action, self._computing(action))

    def _beside_copies(self, action: Action, computed: ElapsedTime) -> ElapsedTime:
        """Returns the time of an action with copies to and from the host.

        computed: time without copies. On a GPU, the copies overlap with the computation.
        """
        halves = action.halves or (action,)
        there = [self._copies(half.stage) for half in halves if half.kind == "F"]
        back = [self._copies(stage) for half in halves for stage, _ in reads(half)]
        if self.config.hardware.device == "cpu":
            return ElapsedTime(computed.seconds + sum(there) + sum(back), computed.exposed)
        return ElapsedTime(max(computed.seconds, *there, *back, 0.0), computed.exposed)

    def _copies(self, stage: int) -> float:
        """Returns the seconds to copy a stage's offloaded activations."""
        if not self.config.model.offload:
            return 0.0
        if stage not in self._sent:
            self._sent[stage] = to_host(self.config, self.rates, self.count_sent(stage))
        return self._sent[stage]

    def count_sent(self, stage: int) -> int:
        """Returns a stage's offloaded bytes per micro-batch."""
        return chunk_of(self._scene, self.kind(stage)).sent_bytes

    def _computing(self, action: Action) -> ElapsedTime:
        if action.halves:
            forward, backward = (self.directions(half.stage) for half in action.halves)
            return overlapped(forward.forward.segments, backward.backward.segments, self.taken)
        return alone(self.directions(action.stage).of(action.kind).segments, self.taken)


def require_rule(config: Config) -> None:
    """Raise UserError if this file cannot plan the step time."""
    if config.data.mask_documents:
        raise UserError(
            "data.mask_documents",
            True,
            "the planner has no rule for attention inside documents: its work depends on their lengths",
            "plan with data.mask_documents=false, an upper bound",
        )
    if config.hardware.device == "cpu" and config.precision.fp8 is not None:
        raise UserError(
            "precision.name",
            config.precision.name,
            "the planner has no rule for the step time of the FP8 emulation of CPUs",
            "plan with precision=bf16, or for a GPU: hardware=h100",
        )
    if config.precision.fp8 is not None and not config.hardware.fp8_flops:
        raise UserError(
            "hardware.fp8_flops", 0, f"hardware={config.hardware.name} has no FP8 GEMMs", "choose precision=bf16"
        )
    mx = config.precision.fp8 is not None and has_mx_tiles(config.precision.fp8)
    if mx and config.plan.calibration is None and "fprop_mxfp8" not in config.hardware.rates:
        rule = f"needs GEMMs for tiles of 32, which hardware={config.hardware.name} does not have; B200, B300, GB200 and GB300 have them"
        raise UserError("precision.name", config.precision.name, rule, "choose precision=fp8, or hardware=b200")
