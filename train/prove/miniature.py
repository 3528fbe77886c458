"""Reduces a recipe to a miniature that runs in seconds. The miniature keeps every structure in which a layout can be
wrong.

These values become small: widths, vocabulary, sequence length, and numbers of layers, experts and micro-batches. Other
settings stay, such as parallelism and precision.

The number of ranks is the product of four degrees. If it exceeds `prove.ranks`, degrees above 1 become smaller:

    pipeline ranks                       to 2 (to 3, if possible)
    copies of every expert               to 2
    nodes of an expert group             to the smallest prime factor
    ranks of the group on a node         to the smallest prime factor

If there are still too many ranks, degrees become 1, in the order of `LOST`. Context parallelism splits a sequence over
two ranks.
"""

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from multiprocessing import get_context
from typing import Any

from conf.dispatches import FLAT_DISPATCH
from conf.errors import UserError
from conf.micro_batches import batch_sizes, in_lockstep
from conf.pipeline_schedules import check_schedule
from conf.schema import (
    Checkpoint,
    Cluster,
    Config,
    Data,
    DataFormat,
    DispatchKind,
    DryRun,
    Evaluate,
    Export,
    Generate,
    Hardware,
    Log,
    Mode,
    Model,
    Optim,
    Plan,
    SparseAttention,
)
from parallel.layout import Layout
from train.plan.job import layout_of
from train.prove.bounds import is_tiled
from train.prove.layouts import second_layout, with_pattern

STEPS = 4
SEQUENCE = 24
VOCABULARY = 97
MINIATURE_WIDTH, TILED_WIDTH = 32, 136
"""Hidden width of a miniature. TILED_WIDTH is for FP8 matmuls or an FP8 wire format: two tiles of 128, the second not
full."""
ROPE = 16
"""Width of the rotated part of a head: eight pairs."""
ODD = 15
"""Maximum width of the latent of keys and values on a CPU. An odd width makes the lengths of norm weight shards odd. On
a GPU, the maximum is 16, because GEMMs need multiples of 16 bytes."""
HEADS = 3
"""Number of heads. With only two, some wrong layouts are undetected."""
EXPERTS = 32
RANK = 8
"""Maximum rank of the miniature's LoRA adapter."""
CLIP = 0.1
"""Maximum of optim.clip, small enough that the miniature's gradients are clipped."""
RATE = 1e-3
"""Minimum learning rate, so that rounding cannot hide the weights' change."""
BUFFER = 4096.0
"""Maximum bytes of a host buffer, for checkpoints in several parts."""
SHOWN = (
    "model.",
    "adapter.",
    "optim.",
    "parallel.",
    "cluster.ranks_per_node",
    "checkpoint.staging_bytes",
    "steps",
    "seq_len",
    "batch_size",
    "micro_batch_size",
)
"""Prefixes of the configuration keys whose changes mode=prove shows."""
OWN = ("mode", "resume")
"""Configuration keys that always differ in mode=prove, and are not reported."""


@dataclass(frozen=True)
class Miniature:
    """The small configuration that a proof runs instead of the recipe."""

    cfg: Config
    cuts: list[str]
    """Sentences about all differences between the miniature and the recipe."""


@dataclass(frozen=True)
class _Degrees:
    pp: int
    edp: int
    nodes: int
    inside: int

    @property
    def ranks(self) -> int:
        return math.prod(vars(self).values())


LOST = {
    "inside": "several ranks of an expert group on one node",
    "edp": "several copies of an expert",
    "nodes": "expert groups over several nodes",
    "pp": "the pipeline",
}
"""If a layout has too many ranks, these degrees become 1. Maps each degree to the structure that is then lost."""


def shrink(cfg: Config) -> Miniature:
    """Returns the miniature of a recipe. Both pass check_layout."""
    model, optim = replace(cfg.model, block=None, router=None), replace(cfg.optim, extra_loss=None)
    whole = cfg = replace(cfg, model=model, optim=optim, callbacks=[])  # the reference does not run the user's own code
    if cfg.parallel.dispatch_facts.needs_gpu and not _has_gpu(cfg):
        cfg = replace(cfg, parallel=replace(cfg.parallel, dispatch=DispatchKind(FLAT_DISPATCH)))
    layout, structure = _shrink_layout(cfg)
    layers, split = _shrink_layers(cfg, layout)
    model = _shrink_model(cfg, layout, layers)
    micro_batch_size = min(cfg.micro_batch_size, 2)
    seq_len = _sequence(cfg, layout)
    sparse = _shrink_sparse(cfg, seq_len, model, split if isinstance(split, list) else [layers])
    model = replace(model, sparse=sparse, loss_chunk=_chunk(cfg, micro_batch_size * seq_len))
    start, full = _micro_batches(cfg, layout, model.layers)
    share, less = micro_batch_size * layout.dp, 0
    together = in_lockstep(replace(cfg.parallel, cp=layout.cp, ep=layout.ep))
    if cfg.parallel.uneven and layout.dp > together:
        start = full  # no batch ramp: its steps are larger than the difference between ranks' parts of the batch
        less = micro_batch_size * together
    adapter, rank = cfg.adapter, min(cfg.adapter.rank, RANK)
    if adapter.on:
        adapter = replace(adapter, rank=rank, alpha=adapter.scale * rank)
    small = replace(
        cfg,
        mode=Mode.prove,
        steps=STEPS,
        seq_len=seq_len,
        batch_size=full * share - less,
        micro_batch_size=micro_batch_size,
        resume="never",
        init_from=None,
        model=model,
        adapter=adapter,
        data=Data(
            mask_documents=cfg.data.mask_documents, format=DataFormat.chat if cfg.data.chats else DataFormat.auto
        ),
        optim=_shrink_optim(cfg.optim, start * share - less, (full - start) * share),
        parallel=replace(cfg.parallel, pp=layout.pp, dp=layout.dp, cp=layout.cp, ep=layout.ep, split=split),
        cluster=Cluster(
            device=cfg.cluster.device,
            threads=cfg.cluster.threads,
            compiled=cfg.cluster.compiled,
            ranks_per_node=layout.ranks_per_node,
        ),
        checkpoint=Checkpoint(
            staging_bytes=min(cfg.checkpoint.staging_bytes, BUFFER), keep_best=cfg.checkpoint.keep_best
        ),
        log=Log(progress=cfg.log.progress),
        hardware=Hardware(),
        plan=Plan(),
        dry_run=DryRun(),
        evaluate=Evaluate(),
        generate=Generate(),
        export=Export(),
    )
    if cfg.optim.qk_clip is not None:
        from train.prove.samples import middle_score  # imports torch

        with ProcessPoolExecutor(
            1, get_context("fork")
        ) as other:  # ranks are forks of this process, so this process must not have computed with torch
            limit = other.submit(middle_score, small).result()
        small = replace(small, optim=replace(small.optim, qk_clip=limit))
    axes, parallels = ("pp", "dp", "cp", "ep"), (small.parallel, second_layout(small, max(2, layout.world)))
    if few := [
        axis for axis in axes if getattr(cfg.parallel, axis) > 2 >= max(getattr(one, axis) for one in parallels)
    ]:
        structure = [
            *structure,
            f"No layout has three ranks along {', '.join(few)}: what only a third gets wrong is not seen.",
        ]
    if small.adapter.dropout:
        structure = [*structure, "Dropout acts only in check tiles, where single parts are judged with it."]
    return Miniature(small, [*structure, *_differences(whole, small)])


def _has_gpu(cfg: Config) -> bool:
    from train.kernels.device import usable_gpu  # this import loads torch, which takes seconds

    return cfg.cluster.device != "cpu" and usable_gpu(cfg.cluster.device)


def _shrink_layout(cfg: Config) -> tuple[Layout, list[str]]:
    """Returns a small layout, and a sentence for each dropped structure."""
    whole, most = layout_of(cfg), cfg.prove.ranks
    inside = whole.ep_ranks_per_node if cfg.parallel.dispatch_facts.by_nodes else whole.ep
    if whole.world <= most:
        return whole, []
    given = _Degrees(whole.pp, whole.edp, whole.ep // inside, inside)
    degrees = _Degrees(min(given.pp, 2), min(given.edp, 2), _least(given.nodes), _least(given.inside))
    lost = []
    for name, what in LOST.items():
        if degrees.ranks > most and getattr(degrees, name) > 1:
            degrees = replace(degrees, **{name: 1})
            lost.append(f"prove.ranks = {most} is too small for {what}, which this proof does not cover.")
    if given.pp >= 3 and degrees.pp == 2 and degrees.ranks // 2 * 3 <= most:
        degrees = replace(degrees, pp=3)  # the middle rank has neither the first nor the last stage
    ep = degrees.nodes * degrees.inside
    ranks, cp = degrees.edp * ep, 1
    if whole.cp > 1:
        # Two ranks split a sequence. A batch that several ranks divide is divided by two.
        wanted = 2 * min(whole.dp, 2)
        while ranks % wanted and 2 * ranks * degrees.pp <= most:
            ranks *= 2
        cp = 2 - ranks % 2
        if cp == 1:
            lost.append(
                f"prove.ranks = {most} is too small for ranks that share sequences, which this proof does not cover."
            )
    return Layout(degrees.pp, ranks // cp, ep, degrees.inside, cp), lost


def _sequence(cfg: Config, layout: Layout) -> int:
    """Returns a sequence length near SEQUENCE that context parallelism can split."""
    if layout.cp == 1:
        return min(cfg.seq_len, SEQUENCE)
    pieces = 2 * layout.cp
    return min(cfg.seq_len, pieces * max(-(-SEQUENCE // pieces), cfg.model.mtp_depth + 1))


def _least(degree: int) -> int:
    """Returns the smallest prime factor of a degree."""
    return next((part for part in range(2, degree + 1) if degree % part == 0), 1)


def _shrink_layers(cfg: Config, layout: Layout) -> tuple[int, str | list[int]]:
    """Returns the number of layers, and the value of parallel.split.

    An empty first or last stage stays empty. Inner stages of different lengths stay different.
    """
    model, given = cfg.model, cfg.parallel.split
    stages = layout.pp * cfg.parallel.schedule_facts.rank_stages(cfg.parallel.virtual_stages)
    dense, moe = min(model.dense_layers, 1), min(model.layers - model.dense_layers, 2)
    # With an adapter, every rank needs a block, even a rank with the embedding or the head.
    shares = "S" in model.sparse.pattern
    layers = min(model.layers, max(dense + moe, stages * (1 + (cfg.adapter.on or shares))))
    if not isinstance(given, list):
        if (shares or cfg.optim.index_warmup) and stages > 1:  # each stage must begin with a layer that has an indexer
            return layers, [layers // stages + (stage < layers % stages) for stage in range(stages)]
        return layers, given
    split = [1] * stages
    split[0], split[-1] = min(given[0], 1), min(given[-1], 1)
    longest = max(range(stages), key=lambda stage: given[stage * len(given) // stages])
    split[longest] += max(len({*given[1:-1]}) > 1, layers - sum(split))
    return sum(split), split


def _shrink_model(cfg: Config, layout: Layout, layers: int) -> Model:
    model, seq_len = cfg.model, _sequence(cfg, layout)
    multiple, width = cfg.parallel.dispatch_facts.width, TILED_WIDTH if is_tiled(cfg) else MINIATURE_WIDTH
    hidden = min(model.hidden, max(multiple, width // multiple * multiple))
    yarn = model.yarn
    if cfg.seq_len > yarn.original_seq_len:  # the recipe's sequence length makes YaRN active, so YaRN must stay active
        length = max(1, seq_len * yarn.original_seq_len // cfg.seq_len)
        # The ramp between fast and slow pairs must cover the same fraction of the pairs.
        by = length / yarn.original_seq_len
        yarn = replace(yarn, original_seq_len=length, beta_fast=by * yarn.beta_fast, beta_slow=by * yarn.beta_slow)
    return replace(
        model,
        vocab_size=min(model.vocab_size, VOCABULARY),
        hidden=hidden,
        layers=layers,
        dense_layers=min(model.dense_layers, 1) if model.dense_layers < model.layers else layers,
        heads=min(model.heads, HEADS),
        q_rank=None if model.q_rank is None else min(model.q_rank, 24),
        kv_rank=min(model.kv_rank, 16 if _has_gpu(cfg) else ODD),
        nope_head_dim=min(model.nope_head_dim, 16),
        rope_head_dim=min(model.rope_head_dim, ROPE),
        v_head_dim=min(model.v_head_dim, 12),
        dense_width=min(model.dense_width, 48),
        expert_width=min(model.expert_width, 16),
        experts=_experts(model, layout.ep),
        max_seq_len=min(model.max_seq_len, 2 * max(SEQUENCE, seq_len)),
        yarn=yarn,
    )


def _shrink_sparse(cfg: Config, seq_len: int, model: Model, stages: list[int]) -> SparseAttention:
    """Returns the settings of a small indexer. If top_k is below the recipe's seq_len, top_k becomes smaller too."""
    sparse = cfg.model.sparse
    if cfg.seq_len > sparse.top_k:
        share = sparse.top_k * seq_len // cfg.seq_len
        sparse = replace(sparse, top_k=max(1, seq_len // 4, min(seq_len // 2, share)))
    small = replace(sparse, heads=min(sparse.heads, HEADS), head_dim=min(sparse.head_dim, 2 * model.rope_head_dim))
    return with_pattern(small, stages)


def _experts(model: Model, ep: int) -> int:
    """Returns a number of experts near EXPERTS, divisible by groups and ranks. If possible, a token chooses among 2 *
    top_k or more experts."""
    size = model.experts // model.groups
    needed = max(model.resolved_group_top_k + 1, math.ceil(2 * model.top_k / model.top_groups))
    least = min(size, max(needed, EXPERTS // model.groups))
    return next(model.groups * few for few in itertools.count(least) if model.groups * few % ep == 0)


def _chunk(cfg: Config, tokens: int) -> int:
    """Returns the number of tokens per chunk of the loss. If the recipe has several chunks, the miniature does too."""
    whole = cfg.micro_batch_size * cfg.seq_len
    if cfg.model.loss_chunk >= whole:
        return tokens
    return max(1, min(tokens - 1, math.ceil(tokens * cfg.model.loss_chunk / whole) + 1))


def _micro_batches(cfg: Config, layout: Layout, layers: int) -> tuple[int, int]:
    """Returns the numbers of micro-batches per rank, at the start of the batch ramp and after it.

    They are enough to fill the pipeline, if the recipe's numbers are.
    """
    sizes = [batch // (cfg.micro_batch_size * cfg.parallel.dp) for batch in batch_sizes(cfg)]
    wanted = max(1, cfg.parallel.schedule_facts.least) * layout.pp + 1

    def allowed(count: int) -> bool:
        try:
            for each in {
                count,
                count - cfg.parallel.uneven,
            }:  # the largest and the smallest number of micro-batches of a rank
                check_schedule(cfg.parallel.schedule, layout.pp, each, layers, cfg.parallel.virtual_stages)
        except UserError:
            return False
        return True

    start = next(count for count in itertools.count(min(sizes[0], wanted)) if allowed(count))
    if len(sizes) == 1 or sizes[0] == sizes[-1]:
        return start, start
    return start, next(start + more for more in range(1, start + 1) if start % more == 0 and allowed(start + more))


def _shrink_optim(optim: Optim, start: int, more: int) -> Optim:
    """Returns the recipe's optimizer settings, with schedules for few steps.

    - start: batch size at the start of the batch ramp.
    - more: number of sequences that the ramp adds.
    """
    if optim.batch_ramp_start is not None:
        optim = replace(optim, batch_ramp_start=start, batch_ramp_steps=2, batch_ramp_increment=more or start)
    clip = min(optim.clip, CLIP)
    lr = max(optim.lr, RATE)
    return replace(optim, lr=lr, warmup_steps=min(optim.warmup_steps, 2), clip=clip)


def _differences(cfg: Config, small: Config) -> list[str]:
    """Returns a sentence per changed setting, and one about ignored settings."""
    changed = [
        (name, there, here) for name, there, here in _both_values("", cfg, small) if here != there and name not in OWN
    ]
    is_read = {name: name.startswith(SHOWN) for name, *_ in changed}
    found = [f"{name} is {_text(here)} instead of {_text(there)}." for name, there, here in changed if is_read[name]]
    if left_out := [name for name, *_ in changed if not is_read[name]]:
        found.append(f"Not in the proof, because nothing in it reads them: {', '.join(left_out)}.")
    return [*found, "The tokens are drawn at random, in documents of random length."]


def _both_values(prefix: str, cfg: Any, small: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields all keys, as (key, recipe's value, miniature's value)."""
    for entry in fields(cfg):
        there, here = getattr(cfg, entry.name), getattr(small, entry.name)
        if is_dataclass(there):
            yield from _both_values(f"{prefix}{entry.name}.", there, here)
        else:
            yield prefix + entry.name, there, here


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
