"""Derives the configurations of mode=prove's checks from a recipe."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm

from conf.check import check
from conf.dispatches import FLAT_DISPATCH
from conf.errors import UserError
from conf.pipeline_schedules import PLAIN_SCHEDULE, SCHEDULES
from conf.schema import (
    Config,
    DispatchKind,
    HighFormat,
    Parallel,
    Phase,
    PipelineSchedule,
    Precision,
    PrecisionName,
    SparseAttention,
    WireFormat,
)
from train.loop.layout_check import check_layout
from train.optim.schedules import Schedules
from train.prove.bounds import is_tiled


def in_fp32(config: Config) -> Config:
    """Returns the recipe in fp32 without dropout, with a wire format and a dispatch that support fp32."""
    config = without_dropout(config)
    parallel = replace(config.parallel, wire=WireFormat.bf16)  # the wire uses the activation dtype
    if parallel.dispatch_facts.in_bf16:
        parallel = replace(parallel, dispatch=DispatchKind(FLAT_DISPATCH))
    return replace(config, precision=Precision(name=PrecisionName.fp32, moments=HighFormat.fp32), parallel=parallel)


def in_loop(config: Config) -> Config:
    """Returns the recipe in fp32 without optim.qk_clip, which forbids padding."""
    return in_fp32(replace(config, optim=replace(config.optim, qk_clip=None)))


def without_dropout(config: Config) -> Config:
    """Returns the recipe without dropout, which the reference cannot reproduce."""
    return replace(config, adapter=replace(config.adapter, dropout=0.0))


TILED = 136
"""Width in check `tiles`: two tiles, the second not full."""
TILED_HEADS = 4
WARP, WIDE_RANKS = 32, 2
"""WARP: number of threads in a warp. If the recipe has at least WARP experts, each rank has more than WARP experts in
check `tiles`. WIDE_RANKS: the rule applies only to expert groups of at most this number of ranks, to save memory.
"""
SLOW = 1e-9
"""Learning rate of check `tiles` with FP8. It keeps small norm weights small."""
FAINT = 1e-13
"""Weight of the MTP loss in check `tiles` with FP8. It gives some tiles of the loss's gradient the smallest FP8
scale."""


def with_two_tiles(config: Config) -> Config:
    """Returns the recipe for check `tiles`: few wide layers, no pipeline."""
    model, parallel, ranks = config.model, config.parallel, config.parallel.world
    dense, depth, multiple = min(model.dense_layers, 1), min(model.mtp_depth, 1), parallel.dispatch_facts.width
    length, experts = (TILED + 2) * parallel.cp, model.experts
    if experts >= WARP and parallel.ep <= WIDE_RANKS:
        step = lcm(model.groups, parallel.ep)
        experts = max(experts, (WARP * parallel.ep // step + 1) * step)
    layers = max(1, dense + min(model.layers - model.dense_layers, 1))
    wide = replace(
        model,
        hidden=-(-TILED // multiple) * multiple,
        layers=layers,
        dense_layers=dense,
        mtp_depth=depth,
        heads=TILED_HEADS,
        q_rank=model.q_rank and TILED,
        kv_rank=TILED,
        nope_head_dim=TILED // TILED_HEADS - model.rope_head_dim,
        v_head_dim=TILED // TILED_HEADS,
        dense_width=TILED,
        expert_width=TILED,
        experts=experts,
        max_seq_len=max(model.max_seq_len, length),
        sparse=with_pattern(model.sparse, [layers]),
    )
    dp, kept = ranks // parallel.cp, ("cp", "ep", "dispatch", "wire", "overlap")
    plain = Parallel(dp=dp, **{name: getattr(parallel, name) for name in kept})
    optim = replace(config.optim, batch_ramp_start=None, batch_ramp_steps=0, qk_clip=None)
    if is_tiled(config):
        optim = replace(optim, mtp_weight=[Phase(value=FAINT)], lr=SLOW)
    small = replace(config, model=wide, parallel=plain, optim=optim, seq_len=length, steps=2)
    return replace(small, batch_size=max(2, dp), micro_batch_size=1)


def with_pattern(sparse: SparseAttention, stages: Sequence[int]) -> SparseAttention:
    """Returns settings of sparse attention in which most layers reuse the keys of an earlier layer.

    stages: number of layers of each stage. The first layer of a stage chooses keys. In a stage of three or more layers,
    the second layer does too.
    """
    if "S" not in sparse.pattern:
        return sparse
    letters = {0: "", 1: "F", 2: "FS"}
    return replace(sparse, pattern="".join(letters.get(count, "FF" + "S" * (count - 2)) for count in stages))


PROOFS: dict[str, Callable[[Config], Config]] = {
    "exact": in_fp32,
    "loop": in_loop,
    "fp32": in_fp32,
    "recipe": without_dropout,
    "tiles": with_two_tiles,
}
"""Maps each check to the function that derives its configuration."""
IN_FP64 = ("exact", "loop")
"""Checks that compute in fp64. They run no optimizer."""


LOOSE_CLIP = 1e4
"""Value of optim.clip after the resume, so that nothing is clipped."""


@dataclass(frozen=True)
class RunPart:
    """Consecutive steps of a run in one layout."""

    number: int
    """0 before the resume, 1 after it."""
    config: Config
    last: int
    """Last step of this part of the run. After this step, the run saves a checkpoint."""
    spoilt: int | None
    """Step in which one rank gets a non-finite gradient; None: no step."""


def save_step(config: Config) -> int:
    """Returns the step whose checkpoint the second part resumes from."""
    return max(1, config.steps // 2)


def stop_step(config: Config) -> int:
    """Returns the last step before the resume."""
    return save_step(config) + 1


def watched_steps(config: Config) -> set[int]:
    """Returns the steps in which single layers are also judged.

    This is the first step after the checkpoint. A run makes this step twice: before the resume and after it. Before the
    resume, the step shows whether cached casts of weights were updated.
    """
    return {stop_step(config)}


def run_part(config: Config, number: int, ranks: int) -> RunPart:
    """Configures a check's run before (0) or after (1) the resume."""
    held_out = replace(config.log, validation_sequences=_held_out(config, ranks))
    if number:
        return RunPart(number, replace(_go_on(config, ranks), log=held_out), config.steps, None)
    stop, saved = stop_step(config), save_step(config)
    own = config.optim
    first = replace(
        config,
        optim=replace(own, name=config.prove.first_optimizer or own.name),
        steps=max(stop, config.steps ^ 1),  # another number of steps, for which save_step is the same
        log=replace(held_out, validate_every=1 if config.checkpoint.keep_best else stop),
        checkpoint=replace(config.checkpoint, every=saved),
    )
    return RunPart(number, first, stop, saved if saved > 1 else None)


def run_parts(proof: str, config: Config, ranks: int, numbers: Sequence[int]) -> list[RunPart]:
    """Returns the parts of a check's run (before and after the resume) with their configurations."""
    if proof == "tiles":
        return [RunPart(0, config, config.steps, None) for number in numbers if number == 0]
    return [run_part(config, number, ranks) for number in numbers]


def _go_on(config: Config, ranks: int) -> Config:
    """Returns the configuration of the second part, with another layout and batch size.

    A correct run reads its position in the data from the checkpoint.
    """
    other = in_layout(config, second_layout(config, ranks))
    optim = replace(
        config.optim, batch_ramp_start=None, batch_ramp_steps=0, clip=LOOSE_CLIP if config.optim.clip else 0.0
    )
    other = replace(other, optim=optim)
    batch, saved = config.batch_size, save_step(config)
    after = Schedules(config).samples[saved]
    for size in (*range(batch - 1, 0, -1), *range(batch + 1, 4 * batch)):
        changed = replace(other, batch_size=size)
        if saved * size != after and _is_allowed(changed):
            return changed
    return other


def _held_out(config: Config, ranks: int) -> int:
    """Returns a number of validation sequences that neither layout divides evenly."""
    other = second_layout(config, ranks)
    passes = {config.micro_batch_size * config.parallel.dp, other.dp} - {1}
    return next(count for count in itertools.count(3) if all(count % size for size in passes))


def _is_allowed(config: Config) -> bool:
    try:
        check(replace(config, name="proof"))
        check_layout(config)
    except UserError:
        return False
    return True


def second_layout(config: Config, ranks: int) -> Parallel:
    """Returns another allowed layout for these ranks, or else the recipe's."""
    return next((each for each in _others(config, ranks) if _is_allowed(in_layout(config, each))), config.parallel)


def in_layout(config: Config, parallel: Parallel) -> Config:
    """Returns the recipe in another layout, with one sequence per micro-batch."""
    ranks_per_node = 0 if parallel.dispatch_facts.per_expert else config.cluster.ranks_per_node
    cluster = replace(config.cluster, ranks_per_node=ranks_per_node)
    return replace(config, parallel=parallel, micro_batch_size=1, cluster=cluster)


def _others(config: Config, world: int) -> Iterator[Parallel]:
    """Yields candidates for the second layout, most different ones first."""
    own = config.parallel
    plain = replace(
        own,
        pp=1,
        dp=world,
        cp=1,
        ep=1,
        zero=1,
        schedule=PipelineSchedule(PLAIN_SCHEDULE),
        virtual_stages=2,
        dispatch=DispatchKind(FLAT_DISPATCH),
    )
    shared = gcd(world, config.model.experts)
    if own.pp > 1:
        for zero in (3, 2, 1):
            yield replace(plain, ep=1 if own.ep == shared else shared, zero=zero)
    elif own.stage_ranks == 1:
        yield replace(plain, ep=shared, zero=2)
    if own.pp == 1 and world % 2 == 0:
        half = world // 2
        split = next(name for name, facts in SCHEDULES.items() if facts.splits)
        for name in (split, PLAIN_SCHEDULE):
            schedule = PipelineSchedule(name)
            yield replace(plain, pp=2, dp=half, ep=gcd(half, config.model.experts), schedule=schedule)
    yield from (replace(plain, ep=ep, zero=zero) for ep in {shared, 1} for zero in {1, 2, 3} - {own.zero})
    kept = replace(plain, pp=own.pp, dp=own.dp, cp=own.cp)  # for a batch that can be divided only as in the recipe
    shared, experts = own.stage_ranks, config.model.experts
    sizes = [ep for ep in range(shared, 0, -1) if shared % ep == 0 and experts % ep == 0 and ep != own.ep]
    yield from (replace(kept, ep=ep, zero=zero) for ep in sizes for zero in (2, 1))


def layout_name(config: Config) -> str:
    """Returns the layout as text for the user."""
    parallel = config.parallel
    parts = [f"{name} {value}" for name in ("pp", "dp", "cp", "ep") if (value := getattr(parallel, name)) > 1]
    parts += [parallel.schedule_words] if parallel.pp > 1 or len(parallel.placement[0]) > 1 else []
    parts += [parallel.dispatch] if parallel.ep > 1 else []
    parts += (
        ["shares that differ"]
        if parallel.uneven and config.batch_size % (config.micro_batch_size * parallel.dp)
        else []
    )
    return ", ".join([*parts, f"ZeRO {parallel.zero}"])
