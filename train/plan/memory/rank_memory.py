"""Plans the memory of every rank: its permanent state, and its peak over all actions of a step.

    state       weights, master weights and moments in DeepSpeed's shards (rank_weights.py)
    schedule    passes in the order of torch's action list (schedule_memory.py)
    step end    reduction of gradients and update of weights (step_end.py)
    run         start of the run, and work outside of steps, such as checkpoints

Ranks at the same pipeline position differ only in their experts' rows. `plan.imbalance` is the busiest rank's rows
divided by the mean.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache

from conf.micro_batches import share_of
from conf.schema import Config, Model
from conf.thresholds import THRESHOLDS
from parallel.expert.stand_in import Group, Load
from parallel.pipeline.orders import ORDERS
from parallel.pipeline.simulate import stages_ahead
from train.checkpoint.manifest import CRC_BLOCK
from train.export.run import EXPORTED_ELEMENTS
from train.hf.read import READ_ELEMENTS
from train.kernels.choice import build_kernels
from train.model.count import count_parameters
from train.parallelize import stage_layers
from train.plan.job import actions_of, device_kind, host_ranks, layout_of
from train.plan.memory.chunk import Parts, chunk_of
from train.plan.memory.ledger import PhaseBytes
from train.plan.memory.part import AGAIN, AWAY, SHARED_KEYS, FrozenSection, Scene, kind_of, trace_casts
from train.plan.memory.rank_weights import (
    FP32_BYTES,
    Shards,
    held_bytes,
    needs_table,
    part_weights,
    rank_weights,
    shards,
    state_bytes,
)
from train.plan.memory.schedule_memory import MemoryPeak, ScheduleWalk, StagePlan, WalkDepth
from train.plan.memory.step_end import StepEnd, kept_elements
from train.plan.memory.zero3 import Zero3Memory
from train.plan.reserve import copies_memory, host_memory

HELD_COPIES = 5
"""Number of copies of rank states in a node's memory, per rank, if checkpoint.every_memory is set.

Two copies are of the rank, two are of its neighbour, and one is being written.
"""


LATER = ("activations", "checkpoint", "copies")
"""Items of host memory that a run allocates after its start and never frees."""
IS_FINITE_BYTES = 7
"""Bytes per element that torch.isfinite allocates: 4 for absolute values, 3 for booleans."""
STARTS = ("start", "resume", "init_from")


@dataclass(frozen=True)
class RankMemory:
    """Peak memory of the ranks at one pipeline position, in bytes."""

    pp_rank: int
    layers: list[range]
    """Layers of each of the rank's stages, in order of stages."""
    items: dict[str, int]
    """Bytes at the peak by item, without empty items.

    Names: weights, casts (FP8 casts of weights), master, moments, gradients, activations (with hidden states inside
    stages), dispatch, logits, in_flight (hidden states and gradients between stages), reduction, workspace, buffers.
    """
    peak_bytes: int
    """Peak bytes of the device: the sum of `items`."""
    peak_event: str
    """Name of the action or phase with the peak."""
    in_flight: int
    """Number of micro-batches that wait for backward at the schedule's peak."""
    phases: dict[str, PhaseBytes]
    """Peak bytes of each phase (see the function `phases`)."""
    host_items: dict[str, int]
    """Bytes of host memory by item. Empty on a CPU, where `items` has them.

    Names: master, moments, buffers, activations, average, checkpoint (until it is on disk), copies (in-memory copies).
    """

    @property
    def host_bytes(self) -> int:
        """Peak of host memory over all phases."""
        return max(one.host for one in self.phases.values())


def plan_memory(config: Config) -> list[RankMemory]:
    """Plans the memory of each pipeline rank, on the meta device."""
    scene = scene_of(config)
    return [rank_memory(config, pp_rank, scene) for pp_rank in range(config.parallel.pp)]


def host_bytes(config: Config, ranks: Sequence[RankMemory]) -> int:
    """Returns the host memory of the fullest node's ranks. ranks: one entry per pipeline rank"""
    return node_bytes(config, [rank.host_bytes for rank in ranks])


def node_bytes(config: Config, sizes: Sequence[int]) -> int:
    """Returns the sum of `sizes` on the fullest host. sizes: bytes of a rank at each pipeline position"""
    layout, together = layout_of(config), host_ranks(config)
    copies = min(layout.world // layout.pp, together)  # number of ranks at one pipeline position on a node
    most = sorted(sizes, reverse=True)[: max(1, together // copies)]
    return copies * sum(most)


def host_lacking(config: Config, ranks: Sequence[RankMemory]) -> int:
    """Returns the bytes that a host lacks for tensors or for in-memory copies, whichever is more."""
    has = host_memory(config)
    return max(host_bytes(config, ranks) - has if has else 0, copies_lacking(config, ranks), 0)


def copies_bytes(config: Config, ranks: Sequence[RankMemory]) -> int:
    """Returns the bytes of in-memory copies on the fullest host."""
    return node_bytes(config, [rank.host_items.get("copies", 0) * (HELD_COPIES - 1) // HELD_COPIES for rank in ranks])


def copies_lacking(config: Config, ranks: Sequence[RankMemory]) -> int:
    """Returns the bytes of in-memory copies for which their folder on the fullest host has no room."""
    room = copies_memory(config)
    return 0 if room is None else max(0, copies_bytes(config, ranks) - room)


def rank_memory(
    config: Config,
    pp_rank: int,
    scene: Scene,
    layers: list[range] | None = None,
    shortest: bool = False,
    depth: WalkDepth = WalkDepth.whole,
) -> RankMemory:
    """Plans the memory of one pipeline rank.

    scene: settings of all passes (`scene_of`)
    layers: layers of every stage; None: the layout's split
    shortest: plan only enough micro-batches to find the memory peak
    depth: which passes are measured. With all passes, the peak is exact; else it is a lower bound.
    """
    state, host, moments = _moments(config, pp_rank, 0, scene, layers, shortest, depth)
    peak = max(moments.values(), key=lambda moment: moment.total)
    items, event = {name: size for name, size in (state + peak.items).items() if size}, peak.event
    found = _phases(config, pp_rank, 0, scene, layers, state, host, moments)
    start = max((name for name in STARTS if name in found), key=lambda name: found[name].device)
    if (most := found[start].device) > sum(items.values()):
        if start == "start":
            items, event = {"weights": most}, "start, where each weight is drawn before it is sharded"
        else:
            items, event = {name: size for name, size in state.items() if size and name not in LATER}, start
            items["workspace"] = most - sum(items.values())
    return RankMemory(
        pp_rank,
        _layers(config, layers)[pp_rank],
        items,
        sum(items.values()),
        event,
        moments["schedule"].in_flight,
        found,
        dict(+host),
    )


def phases(
    config: Config, pp_rank: int, stage_rank: int, scene: Scene, layers: list[range] | None = None
) -> dict[str, PhaseBytes]:
    """Returns the peaks of one rank in each phase of its run.

        start        weights and the optimizer's state are built
        schedule     passes of a step
        reduction    reduction of gradients
        update       update of weights
        resume       start from a checkpoint
        init_from    start from a Hugging Face folder

    Phases outside of steps, if the recipe enables them: average, validation, checkpoint, copies, export.
    """
    state, host, moments = _moments(config, pp_rank, stage_rank, scene, layers)
    return _phases(config, pp_rank, stage_rank, scene, layers, state, host, moments)


def _phases(
    config: Config,
    pp_rank: int,
    stage_rank: int,
    scene: Scene,
    layers: list[range] | None,
    state: Counter,
    host: Counter,
    moments: dict[str, MemoryPeak],
) -> dict[str, PhaseBytes]:
    """Returns the peaks by phase. state, host, moments: results of `_moments`"""
    held, kept = sum(state.values()), sum(host.values())

    def on_host(device: int, host: int, more: int) -> PhaseBytes:
        return PhaseBytes(device + more, 0) if scene.kind == "cpu" else PhaseBytes(device, host + more)

    built = _built_bytes(config, pp_rank, sum(size for name, size in state.items() if name not in LATER), layers)
    early = sum(size for name, size in host.items() if name not in LATER)
    found = {"start": PhaseBytes(built, early)}
    found |= {name: PhaseBytes(held + moment.total, kept) for name, moment in moments.items()}
    if "export" in found and scene.kind != "cpu":
        found["export"] = PhaseBytes(held, kept + export_bytes(config))
    in_files = (
        (state + host)["copies"] * (HELD_COPIES - 1) // HELD_COPIES
    )  # the files of in-memory copies still exist after the previous start has ended
    found["resume"] = on_host(built, early, CRC_BLOCK + in_files)
    if config.init_from is not None and not config.adapter.on:
        groups = shards(config, rank_weights(config, list(chunk_parts(config, layers)[pp_rank].values())))
        experts = (
            config.model.experts // config.parallel.ep
        )  # in a Hugging Face folder, each expert and each of its gate and up matrices is a separate tensor
        largest = max(
            min(size, one.elements // (experts if one.is_expert else 1) // (2 if "w13" in one.name else 1))
            for one, size in kept_elements(config, groups, stage_rank)
        )
        largest = min(largest, READ_ELEMENTS)
        found["init_from"] = on_host(built, early, (FP32_BYTES + IS_FINITE_BYTES) * largest)
    return found


def export_bytes(config: Config) -> int:
    """Returns the peak bytes of an export, which holds weights in fp32 and checks them."""
    counts, model = count_parameters(config.model), FrozenSection(config.model)
    kinds = ("embedding", "dense", "moe")
    largest = max(weight.elements for kind in kinds for weight in part_weights(model, kind, config.model.experts))
    read = min(
        counts.total + counts.mtp, 2 * EXPORTED_ELEMENTS
    )  # the export frees weights only after it has read the next ones
    return FP32_BYTES * read + IS_FINITE_BYTES * min(largest, EXPORTED_ELEMENTS)


def _built_bytes(config: Config, pp_rank: int, held: int, layers: list[range] | None) -> int:
    """Returns the peak bytes while a rank starts. held: bytes in use afterwards

    ZeRO stage 3 initialises and shards one expert after the other. With an adapter, all weights exist before they are
    sharded.
    """
    if config.parallel.zero < 3:
        return held
    weights = rank_weights(config, list(chunk_parts(config, layers)[pp_rank].values()))
    if config.adapter.on:
        return max(held, held_bytes(config, weights))
    element, share = config.precision.weight_bytes, config.model.experts // config.parallel.ep
    drawn = [
        element * weight.elements + FP32_BYTES * weight.elements // (share if weight.is_expert else 1)
        for weight in weights
    ]
    return max(held, element * sum(group.scattered for group in shards(config, weights)) + max(drawn))


def _moments(
    config: Config,
    pp_rank: int,
    stage_rank: int,
    scene: Scene,
    layers: list[range] | None,
    shortest: bool = False,
    depth: WalkDepth = WalkDepth.whole,
) -> tuple[Counter, Counter, dict[str, MemoryPeak]]:
    """Returns a rank's permanent device bytes and host bytes by item, and each phase's peak without permanent bytes."""
    chunks = chunk_parts(config, layers)[pp_rank]
    weights = rank_weights(config, list(chunks.values()))
    groups = shards(config, weights)
    if config.parallel.zero == 3:
        chunk = chunk_of(scene, chunks[0])
        stage3, host = Zero3Memory(config, weights, groups, chunk), Counter(activations=chunk.host_bytes[0])
        size, event = stage3.schedule()
        schedule, reduced, updated = (
            MemoryPeak(size, Counter(workspace=size), event, 1),
            stage3.reduction(),
            stage3.update(),
        )
        state, evaluated = Counter(stage3.state()), stage3.evaluation
    else:
        ended = [*stages_ahead(actions_of(config, shortest=True)[pp_rank], one_piece_stages(config))]
        ahead, reduced, updated = StepEnd(config, groups, stage_rank, scene).peaks([*map([*chunks].index, ended)])
        (schedule, waiting), state, evaluated = (
            _walk(config, pp_rank, chunks, scene, shortest, depth, dict(zip(ended, ahead, strict=False))),
            state_items(config, groups),
            lambda: max(chunk_of(scene, parts).evaluation for parts in chunks.values()),
        )
        state["weights"] += held_bytes(config, [weight for weight in weights if not weight.is_trained])
        casts = sum(trace_casts(scene, part) for parts in chunks.values() for part in parts)
        schedule = replace(schedule, total=schedule.total + casts, items=schedule.items + Counter(casts=casts))
        host = Counter(activations=waiting)
        if config.parallel.offload_optimizer:
            host += Counter(
                {name: state.pop(name) for name in ("master", "moments")}
                | {"buffers": _offload_buffers(config, groups)}
            )
    owned = sum(group.scattered if config.parallel.zero == 3 else group.partition for group in groups)
    averaged, copied = config.optim.ema_decay > 0, config.checkpoint.every_memory > 0
    host["average"] = (
        averaged * 2 * FP32_BYTES * owned
    )  # the average, and a copy of the newest weights (train/loop/hooks/averaged_weights.py)
    copy = {
        weight: size
        for weight, size in kept_elements(config, groups, stage_rank)
        if pp_rank and weight.name.startswith("embedding")
    }

    def saves(group: Shards) -> int:
        """Returns the number of elements that this rank saves in a checkpoint.

        If two ranks have the embedding, only pipeline rank 0 saves it.
        """
        whole = group.scattered if config.parallel.zero == 3 else group.partition
        return whole - sum(copy.get(weight, 0) for weight in group.weights)

    saved = FP32_BYTES * sum(map(saves, groups)) * (1 + averaged) + state_bytes(config, groups, saves)
    pieces = config.checkpoint.staging_bytes and max(int(config.checkpoint.staging_bytes), THRESHOLDS.staging_bytes)
    host["checkpoint"] = min(saved, pieces or saved)
    host["copies"] = HELD_COPIES * saved * copied
    if scene.kind == "cpu":
        state, host = state + host, Counter()
    state["buffers"] += buffer_bytes(config, chunks)
    moments = {
        "schedule": schedule,
        "reduction": MemoryPeak(reduced, Counter(reduction=reduced), "reduction of gradients"),
        "update": MemoryPeak(updated, Counter(reduction=updated), "update of weights"),
    }
    moments |= {"average": MemoryPeak()} if averaged else {}
    if not shortest:  # validation needs less memory than a forward of the schedule
        moments["validation"] = MemoryPeak(size := evaluated(), Counter(workspace=size), "validation")
    moments |= {"checkpoint": MemoryPeak()} | ({"copies": MemoryPeak()} if copied else {})
    if config.checkpoint.weights_every and pp_rank == stage_rank == 0 and not config.adapter.on:
        exported = export_bytes(config) * (scene.kind == "cpu")
        moments["export"] = MemoryPeak(exported, Counter(workspace=exported), "export of weights")
    return state, host, moments


def scene_of(config: Config, load: Load | None = None) -> Scene:
    """Returns the settings that all passes share.

    load: rows of this rank's experts; None: plan.imbalance times the mean, equal for all experts
    """
    model, parallel = config.model, config.parallel
    layout = layout_of(config)
    if load is None:
        group = Group(parallel.ep, 1, model.experts, model.top_k, model.groups, model.top_groups)
        load = Load.even(group, config.plan.imbalance if parallel.ep > 1 else 1.0)
    return Scene(
        FrozenSection(model),
        FrozenSection(config.precision),
        device_kind(config),
        config.seq_len,
        config.micro_batch_size,
        parallel.dispatch if parallel.ep > 1 else "local",
        parallel.wire if parallel.ep > 1 else "bf16",
        parallel.ep,
        layout.ep_ranks_per_node,
        load,
        gloo=device_kind(config) == "cpu",
        compiled=_is_compiled(device_kind(config), config.cluster.compiled),
        cp=parallel.cp,
        adapter=FrozenSection(config.adapter),
        holds_weights=config.holds_weights,
        learns_index=model.sparse.heads > 0 and config.optim.index_loss > 0 and not config.adapter.on,
        warms_index=config.optim.index_warmup,
    )


@cache
def _is_compiled(kind: str, wanted: bool) -> bool:
    return bool(build_kernels(kind, wanted).parts)


def chunk_parts(config: Config, layers: list[range] | None = None) -> list[dict[int, Parts]]:
    """Returns the parts of every stage, by pipeline rank. layers: as in `rank_memory`"""
    layers = layers or stage_layers(config)
    return [{stage: parts_of_stage(config, layers, stage) for stage in stages} for stages in config.parallel.placement]


def parts_of_stage(config: Config, layers: list[range], stage: int) -> Parts:
    """Returns the part names of one stage. layers: layers of every stage"""
    blocks = [block_of(config.model, index) + _behind(config.model, place) for place, index in enumerate(layers[stage])]
    return (*["embedding"] * (stage == 0), *blocks, *["end"] * (stage == len(layers) - 1))


def block_of(model: Model, layer: int) -> str:
    """Returns the name of a layer's block, without the suffix for recomputation or offloading."""
    shares = model.sparse.heads > 0 and not model.sparse.chooses(layer)
    return ("dense" if layer < model.dense_layers else "moe") + SHARED_KEYS * shares


def _behind(model: Model, place: int) -> str:
    """Returns the name suffix of the block at this position in a stage."""
    if place < model.repeated_layers:
        return AGAIN
    part = model.offloaded_part(place)
    return AWAY + part if part else ""


def _layers(config: Config, layers: list[range] | None = None) -> list[list[range]]:
    placement = config.parallel.placement
    layers = layers or stage_layers(config)
    return [[layers[stage] for stage in stages] for stages in placement]


def one_piece_stages(config: Config) -> Collection[int]:
    """Stages whose backward cannot be split (`DeepSeekV3.backward_in_one_piece`)."""
    model, stages = config.model, range(sum(map(len, config.parallel.placement)))
    if model.sparse.heads or model.block or model.router:
        return stages
    return stages[-1:] if model.mtp_depth > 1 or config.optim.extra_loss else ()


def state_items(config: Config, groups: list[Shards]) -> Counter:
    """Returns a rank's permanent state in bytes, by item."""
    owned = sum(group.partition for group in groups)
    whole = sum(group.partition * group.ranks for group in groups)
    return Counter(
        weights=config.precision.weight_bytes * whole,
        master=FP32_BYTES * owned,
        moments=state_bytes(config, groups, lambda group: group.partition),
    )


def _offload_buffers(config: Config, groups: list[Shards]) -> int:
    """Returns the bytes of ZeRO-Offload's host buffers: the shard's gradients and updated weights, and the largest
    weight."""
    owned, element = sum(group.partition for group in groups), config.precision.weight_bytes
    largest = max(weight.elements for group in groups for weight in group.weights)
    return (FP32_BYTES + element) * owned + element * largest


def buffer_bytes(config: Config, chunks: dict[int, Parts]) -> int:
    """Returns the bytes of RoPE tables, routers' counters, and a step's tokens."""
    model = config.model
    tables = len(chunks) * 8 * config.seq_len * model.rope_head_dim // 2
    routers = sum(
        (kind_of(part) == "moe") + (part == "end") * model.mtp_depth for parts in chunks.values() for part in parts
    )
    per_token = 8 + 4 * config.data.mask_documents
    tokens = share_of(config, config.batch_size, 0)[1] * (config.seq_len + 1)
    return tables + routers * 16 * model.experts + per_token * tokens


def _walk(
    config: Config,
    pp_rank: int,
    chunks: dict[int, Parts],
    scene: Scene,
    shortest: bool,
    depth: WalkDepth,
    ahead: dict[int, tuple[int, int]],
) -> tuple[MemoryPeak, int]:
    """Returns the schedule's peak on the device, and the peak bytes of activations on the host."""
    model, parallel = config.model, config.parallel
    share = model.experts // parallel.ep
    last = max(max(stages) for stages in parallel.placement)

    def gradients(*names: str) -> int:
        """Returns the bytes of the weight gradients of these model parts.

        With optim.index_warmup, only indexers have gradients.
        """
        found = (w for name in names for w in part_weights(scene.model, name, share, scene.adapter) if w.is_trained)
        return FP32_BYTES * sum(w.elements for w in found if ".indexer." in w.name or not scene.warms_index)

    whole = one_piece_stages(config)
    stages = {
        stage: StagePlan(
            chunk_of(scene, parts),
            gradients(*(part for part in parts if part != "embedding")),
            gradients("embedding") * needs_table(model, parts),
            one_piece=stage in whole,
        )
        for stage, parts in chunks.items()
    }
    holds_sent = scene.gloo and ORDERS[parallel.schedule].is_multi  # torch waits for sends at the end of a step
    walk = ScheduleWalk(stages, last + 1, holds_sent, depth, ahead)
    return walk.run(actions_of(config, shortest and not holds_sent)[pp_rank]), walk.host_peak
