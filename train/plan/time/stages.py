"""Seconds of every action of a pipeline: the work of a stage's layers, at the rates of a device.

The layers of a stage are those of train/parallelize.py. Each kind of block is counted once; a stage adds them up as
segments (passes.py), so that the schedule can overlap what it overlaps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
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
from train.plan.job import micro_batches_of
from train.plan.memory.chunk import chunk_of
from train.plan.memory.rank_memory import chunk_parts, scene_of
from train.plan.time import work
from train.plan.time.passes import ElapsedTime, Segment, alone, overlapped
from train.plan.time.rates import Rates
from train.plan.time.traffic import Spread, latent_bytes, spread_of
from train.plan.time.update import to_host
from train.plan.time.work import Passes, Sizes, Work


@dataclass
class PassTime:
    """One pass over some layers: segments for time, and the work in them by kind."""

    segments: list[Segment] = field(default_factory=list)
    pieces: list[list[Work]] = field(default_factory=list)

    @property
    def work(self) -> list[Work]:
        return list(chain.from_iterable(self.pieces))

    @classmethod
    def joined(cls, passes: Sequence["PassTime"]) -> "PassTime":
        """One after another."""
        return cls([one for each in passes for one in each.segments], [one for each in passes for one in each.pieces])


@dataclass
class Directions:
    """Forward; backward whole; its inputs alone; its weights alone."""

    forward: PassTime = field(default_factory=PassTime)
    backward: PassTime = field(default_factory=PassTime)
    inputs: PassTime = field(default_factory=PassTime)
    weights: PassTime = field(default_factory=PassTime)

    @classmethod
    def joined(cls, layers: Sequence["Directions"]) -> "Directions":
        """Layers one after another: backward comes to the last first."""
        back = layers[::-1]
        return cls(
            PassTime.joined([one.forward for one in layers]),
            *(PassTime.joined([getattr(one, name) for one in back]) for name in ("backward", "inputs", "weights")),
        )


class Stages:
    """Durations of the actions of a recipe's pipeline."""

    def __init__(self, config: Config, layout: Layout, rates: Rates, memo: dict | None = None):
        """memo: what was counted for other layouts of this recipe at the same rates, and is added to."""
        self.config, self.layout, self.rates = config, layout, rates
        self.placement = config.parallel.placement
        self.layers = stage_layers(config)
        self.taken = config.hardware.communication_share
        parallel = config.parallel
        self.sizes = Sizes(
            config,
            tokens=config.micro_batch_size * config.seq_len // parallel.cp,
            micro_batches=micro_batches_of(config),
            local_experts=config.model.experts // parallel.ep,
        )
        self._memo = {} if memo is None else memo
        words = tuple(sorted(word for word in config.model.recompute if not word.startswith(Recompute.layer)))
        self._alike = (self.sizes.tokens, self.sizes.micro_batches, parallel.cp, layout.ranks_per_node, words)
        """All that a layer without experts depends on, of what layouts differ in."""
        self._routed = (*self._alike, parallel.ep, parallel.dispatch, parallel.wire)
        self._sent: dict[int, float] = {}
        self._elapsed: dict[tuple, ElapsedTime] = {}
        self._kinds: dict[int, tuple] = {}

    def _remembered(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    @property
    def reduces_ahead(self) -> bool:
        """Whether gradients of a chunk are reduced beside the passes of others (parallel/zero/whole_weights.py). A CPU waits for them."""
        parallel = self.config.parallel
        return self.sizes.on_gpu and self.sizes.element == 2 and parallel.zero < 3 and not parallel.offload_optimizer

    @cached_property
    def spread(self) -> Spread:
        """Where the tokens of a layer of experts go."""
        return spread_of(self.config, self.layout)

    def directions(self, stage: int) -> Directions:
        """The passes of a stage. Stages with equal layers share them."""
        return self._passes(self.kind(stage))

    def kind(self, stage: int) -> tuple:
        """Equal for stages with equal layers and ends."""
        if stage not in self._kinds:
            dense, again = self.config.model.dense_layers, self.config.model.repeated_layers
            blocks = tuple((index < dense, place < again) for place, index in enumerate(self.layers[stage]))
            self._kinds[stage] = blocks, stage == 0, stage == len(self.layers) - 1
        return self._kinds[stage]

    def _passes(self, kind: tuple) -> Directions:
        more = Recompute.layer in self.config.model.recompute, self.config.parallel.zero == 3
        return self._remembered((*self._routed, "stage", kind, *more), lambda: self._stage(*kind))

    def balanced(self) -> list[int]:
        """Layers of every stage with which the ranks are as evenly busy as can be by these times, as parallel.split takes them."""
        model = self.config.model
        again = model.repeated_layers >= model.layers  # a share of every stage goes with the stage, not with the layer
        dense, moe = (self._pair(self._stage([(kind, again)], False, False)) for kind in (True, False))
        costs = [dense if index < model.dense_layers else moe for index in range(model.layers)]
        first, last = (self._pair(self._stage([], end == 0, end == 1)) for end in range(2))
        return [len(one) for one in split_layers(costs, first, last, self.placement)]

    def _pair(self, made: Directions) -> float:
        """Seconds of a forward and a backward, run together where the schedule does."""
        forward, backward = made.forward.segments, made.backward.segments
        if self.config.parallel.schedule_facts.pairs and self.config.parallel.overlap:
            return overlapped(forward, backward, self.taken).seconds
        return alone(forward, self.taken).seconds + alone(backward, self.taken).seconds

    def _stage(self, blocks: Sequence[tuple[bool, bool]], first: bool, last: bool) -> Directions:
        """blocks: whether each is dense, and whether it runs again in backward."""
        model = self.config.model
        layers: list[Directions] = []
        if first or (last and model.mtp_depth):
            layers.append(self._counted("embedding", lambda: work.embedding(self.sizes)))
        layers += [self._block(dense, again) for dense, again in blocks]
        if last:
            for depth in range(1, model.mtp_depth + 1):
                part = replace(self.sizes, tokens=self._positions(depth))
                layers.append(self._counted(f"join {depth}", lambda part=part: work.mtp_join(part)))
                layers.append(self._block(False, Recompute.layer in model.recompute))
            positions = [self._positions(depth) for depth in range(model.mtp_depth + 1)]
            layers.append(self._counted("head", lambda: work.head_work(self.sizes, positions)))
        made = Directions.joined(layers)
        if self.config.parallel.zero == 3 or (last and model.mtp_depth > 1):  # backward_in_one_piece
            made = Directions(made.forward, made.backward, made.backward, PassTime())
        elif first:  # nothing to send on: torch's split does nothing in I and everything in W
            made = Directions(made.forward, made.backward, PassTime(), made.backward)
        return made

    def _positions(self, depth: int) -> int:
        if self.config.parallel.cp > 1:  # of the ranks that have not the last piece
            return self.sizes.tokens
        return self.config.micro_batch_size * (self.config.seq_len - depth)

    def _counted(self, name: str, count: Callable[[], Passes]) -> Directions:
        return self._remembered((*self._alike, name), lambda: self._plain(count()))

    def _block(self, dense: bool, again: bool) -> Directions:
        return self._remembered((*self._routed, "block", dense, again), lambda: self._make_block(dense, again))

    def _make_block(self, dense: bool, again: bool) -> Directions:
        attention = self._remembered((*self._alike, "attention"), self._attention)
        once = Directions.joined([attention, self._counted("dense", self._dense) if dense else self._experts()])
        if not again:
            return once
        # before the backward of inputs, without the way back from the experts: the block's output is not wanted
        *segments, last = once.forward.segments
        if not dense:
            while not segments[-1].compute:
                segments.pop()
            segments[-1] = replace(segments[-1], transfer=0.0)
        repeated = PassTime(segments if not dense else [*segments, last], once.forward.pieces)
        backward, inputs = (PassTime.joined([repeated, passes]) for passes in (once.backward, once.inputs))
        return Directions(once.forward, backward, inputs, once.weights)

    def _dense(self) -> Passes:
        passes = work.norm(self.sizes, self.sizes.tokens, self.config.model.hidden)
        passes.add(work.ffn(self.sizes, self.config.model.dense_width, "dense"))
        residual = work.add(self.sizes, self.sizes.tokens, self.config.model.hidden)
        return passes.add(Passes([residual], [residual]))

    def _attention(self) -> Directions:
        """With ranks that share sequences also the latents' gathers and the scatter of their gradients, which are waited for where
        they are issued (parallel/context.py): nothing is counted as hidden.
        """
        made = self._plain(work.attention(self.sizes))
        if self.config.parallel.cp == 1:
            return made
        gather, scatter = self.latents()
        for part, seconds in (
            (made.forward, gather),
            (made.backward, gather + scatter),
            (made.inputs, gather + scatter),
        ):
            part.segments = [Segment(part.segments[0].compute + seconds)]
        return made

    def latents(self) -> tuple[float, float]:
        """Seconds of a gather of a layer's latents, and of the scatter of their gradients."""
        cp, moved = self.layout.cp, latent_bytes(self.config)
        where = "inside" if cp <= self.layout.ranks_per_node else "across"
        gather, scatter = (self.rates.of(Work(f"{name}_{where}", bytes=moved)) for name in ("gather", "all_to_all"))
        return gather, scatter

    def _plain(self, passes: Passes) -> Directions:
        """Computing without transfers."""

        def one(work: list[Work]) -> PassTime:
            return PassTime([Segment(self.seconds(work))], [work])

        backward = passes.weights + passes.inputs
        return Directions(one(passes.forward), one(backward), one(passes.inputs), one(passes.weights))

    def _experts(self) -> Directions:
        """Router, dispatch, experts and shared experts, combine (train/model/moe.py)."""
        sizes, model, seconds = self.sizes, self.config.model, self.seconds
        imbalance = self.config.plan.imbalance if self.layout.ep > 1 else 1.0
        rows = sizes.tokens * model.top_k * imbalance
        router, experts = work.router(sizes), work.experts(sizes, rows)
        shared = (
            work.ffn(sizes, model.shared_experts * model.expert_width, "shared") if model.shared_experts else Passes()
        )
        sums = [work.add(sizes, sizes.tokens, model.hidden)] * (2 if model.shared_experts else 1)
        out, back = work.permutation(sizes, self.spread)
        spread = self.spread
        begin, land = seconds(out) / 2, seconds(back) / 2  # half of the copying lies before an exchange, half behind it
        forward = PassTime(
            [
                *self._out(seconds(router.forward) + begin, spread.row_bytes, seconds(shared.forward)),
                *self._back(begin + seconds(experts.forward) + land, spread.high_bytes),
                Segment(land + seconds(sums)),
            ],
            [router.forward, out, shared.forward, experts.forward, back, sums],
        )

        def backward(inputs: bool, weights: bool) -> PassTime:
            def part(passes: Passes) -> list[Work]:
                return (passes.inputs if inputs else []) + (passes.weights if weights else [])

            parts = [part(experts), part(shared), part(router)]
            if not inputs:
                return PassTime([Segment(seconds([one for works in parts for one in works]))], parts)
            segments = [
                *self._out(seconds(sums) + begin, spread.gradient_bytes),
                *self._back(begin + seconds(parts[0]) + land, spread.high_gradient_bytes, seconds(parts[1])),
                Segment(land + seconds(parts[2])),
            ]
            return PassTime(segments, [sums, out, *parts, back])

        return Directions(forward, backward(True, True), backward(True, False), backward(False, True))

    def seconds(self, works: list[Work]) -> float:
        """Time of computing in a pass."""
        return self.rates.passes(works)

    def _out(self, compute: float, row_bytes: float, beside: float = 0.0) -> list[Segment]:
        first, *rest = self.exchange(row_bytes)
        return [Segment(compute, first, beside), *(Segment(0.0, one, yields=False) for one in rest)]

    def _back(self, compute: float, row_bytes: float, beside: float = 0.0) -> list[Segment]:
        last, *rest = self.exchange(row_bytes)
        if not rest:
            return [Segment(compute, last, beside)]
        return [Segment(compute, sum(rest), yields=False), Segment(0.0, last, beside)]

    def exchange(self, row_bytes: float) -> list[float]:
        """Seconds of one all-to-all of a micro-batch, of the rank that has most to move: of what is waited for at a time, on the way
        out. A GPU starts one hop behind the other and waits for the last; a CPU waits for each (parallel/expert/dispatcher.py).
        """
        spread = self.spread
        if spread.ranks == 1:
            return [0.0]
        tokens = self.sizes.tokens * self.config.plan.imbalance * row_bytes
        hops = [
            self.rates.of(Work(f"all_to_all_{where}", bytes=tokens * messages))
            for where, messages in (("across", spread.across), ("inside", spread.inside))
            if messages
        ]
        if not self.config.parallel.dispatch_facts.by_nodes:
            return [max(hops)]
        return [sum(hops)] if self.sizes.on_gpu else hops

    def elapsed(self, action: Action) -> ElapsedTime:
        """Time of an action."""
        halves = action.halves
        key = (action.kind, halves[0].stage, halves[1].stage) if halves else (action.kind, action.stage)
        if key not in self._elapsed:
            self._elapsed[key] = self._remembered(self._long_key(action), lambda: self._time(action))
        return self._elapsed[key]

    def _long_key(self, action: Action) -> tuple:
        """A key that is equal for every layout of which the stages do the same."""
        kinds = [self.kind(half.stage) for half in action.halves or (action,)]
        more = Recompute.layer in self.config.model.recompute, self.config.parallel.zero == 3
        return (*self._routed, action.kind, *kinds, *more, *self.config.model.offload)

    def _time(self, action: Action) -> ElapsedTime:
        return self._beside_copies(action, self._computing(action))

    def _beside_copies(self, action: Action, computed: ElapsedTime) -> ElapsedTime:
        """With what goes to the host or comes back meanwhile: a link takes both ways at once, and a CPU copies in its own time."""
        halves = action.halves or (action,)
        there = [self._copies(half.stage) for half in halves if half.kind == "F"]
        back = [self._copies(stage) for half in halves for stage, _ in reads(half)]
        if self.config.hardware.device == "cpu":
            return ElapsedTime(computed.seconds + sum(there) + sum(back), computed.exposed)
        return ElapsedTime(max(computed.seconds, *there, *back, 0.0), computed.exposed)

    def _copies(self, stage: int) -> float:
        """Seconds in which what a micro-batch keeps of a stage goes to the host."""
        if not self.config.model.offload:
            return 0.0
        if stage not in self._sent:
            self._sent[stage] = to_host(self.config, self.rates, self.count_sent(stage))
        return self._sent[stage]

    def count_sent(self, stage: int) -> int:
        """What a micro-batch keeps of a stage on the host."""
        rank = next(rank for rank, stages in enumerate(self.placement) if stage in stages)
        return chunk_of(scene_of(self.config), chunk_parts(self.config, self.layers)[rank][stage]).sent_bytes

    def _computing(self, action: Action) -> ElapsedTime:
        if action.halves:
            forward, backward = (self.directions(half.stage) for half in action.halves)
            return overlapped(forward.forward.segments, backward.backward.segments, self.taken)
        made = self.directions(action.stage)
        passes = {"F": made.forward, "B": made.backward, "I": made.inputs, "W": made.weights}
        return alone(passes[action.kind].segments, self.taken)


def require_rule(config: Config) -> None:
    """Raise UserError for a recipe whose step time this file has no rule for."""
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
            "the planner has no rule for the step time of FP8 as CPUs emulate it",
            "plan with precision=bf16, or for a GPU: hardware=h100",
        )
    if config.precision.fp8 is not None and not config.hardware.fp8_flops:
        raise UserError(
            "hardware.fp8_flops", 0, f"hardware={config.hardware.name} has no FP8 products", "choose precision=bf16"
        )
    mx = config.precision.fp8 is not None and has_mx_tiles(config.precision.fp8)
    if mx and config.plan.calibration is None and "fprop_mxfp8" not in config.hardware.rates:
        rule = f"takes products of tiles of 32, and hardware={config.hardware.name} has none: B200, B300, GB200 and GB300 do"
        raise UserError("precision.name", config.precision.name, rule, "choose precision=fp8, or hardware=b200")
