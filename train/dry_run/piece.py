"""Chooses the part of a job that a dry run runs: a rank, and as much of it as fits the device.

- On a GPU, layers are left out first. The remaining layers do the same work as in the job.
- If even the fewest layers do not fit, or on a CPU, one number divides hidden width, heads, latents, FFNs, vocabulary
  and sequence length. On a CPU, it is the smallest power of two with which a step takes only seconds.

The number of experts, the layout and the schedule do not change.
"""

from dataclasses import dataclass, replace

import psutil
import torch

from conf.errors import UserError
from conf.schema import Config, DeviceKind, Hardware, Model
from parallel.expert.stand_in import Load
from train.model.count import head_flops, layer_flops
from train.parallelize import stage_layers
from train.plan.job import layout_of
from train.plan.memory.part import Scene
from train.plan.memory.rank_memory import plan_memory, rank_memory, scene_of
from train.plan.reserve import fragmentation

CPU_WORK = 4e11
"""Maximum FLOPs of a step on a CPU, some ten seconds."""
MOST_SHRINK = 256


@dataclass(frozen=True)
class DryRunPiece:
    """The part of a job that a dry run runs."""

    job: Config
    """The recipe as given."""
    config: Config
    """The recipe for this device, with widths divided by `shrink`."""
    rank: int
    layers: list[range]
    """Layers of every stage of the job. The stages of this rank list only the layers that run."""
    load: Load
    shrink: int
    left_out: int
    """Number of this rank's layers that do not run."""
    needed: int
    """Planned peak bytes with all layers, at the widths of `config`."""
    room: int
    """Available memory of the device, in bytes."""

    @property
    def pp_rank(self) -> int:
        return self.rank // self.job.parallel.stage_ranks

    @property
    def stages(self) -> list[int]:
        return self.job.parallel.placement[self.pp_rank]

    @property
    def whole(self) -> bool:
        """Whether the rank runs with all layers and at full width."""
        return self.shrink == 1 and self.left_out == 0

    @property
    def scene(self) -> Scene:
        """The planner's settings for the part that runs. This part sends no tensors to other ranks."""
        return _alone(self.config, self.load)


def choose_rank(config: Config) -> int:
    """Returns the rank that dry_run.rank selects. `worst` selects the rank with the highest planned peak."""
    if config.dry_run.rank != "worst":
        return int(config.dry_run.rank)
    fullest = max(plan_memory(config), key=lambda rank: rank.peak_bytes)
    return fullest.pp_rank * config.parallel.stage_ranks


def choose_piece(config: Config, rank: int, load: Load, device: torch.device) -> DryRunPiece:
    """Returns as much of the rank as fits this device. load: rows that the rank's experts receive.

    Raises UserError if nothing fits.
    """
    here, room, wanted = for_device(config, device), free_memory(device), config.dry_run.shrink
    factor = wanted or 1
    while factor <= MOST_SHRINK:
        small = shrunk(here, factor)
        quick = wanted or device.type == "cuda" or _work(config, small, rank) <= CPU_WORK
        if quick and (piece := _cut(config, small, rank, load, factor, room)) is not None:
            return piece
        if wanted:
            break
        factor *= 2
    raise UserError(
        "dry_run.shrink",
        wanted,
        f"rank {rank} does not fit the {room / 2**30:.1f} GiB of this device, even with only one layer",
        "raise dry_run.shrink, or set dry_run.shrink=0" if wanted else "raise parallel.ep or parallel.pp",
    )


def for_device(config: Config, device: torch.device) -> Config:
    """Returns the recipe for this device, with planned ranks per node."""
    cluster = replace(config.cluster, device=DeviceKind(device.type), ranks_per_node=layout_of(config).ranks_per_node)
    return replace(config, hardware=Hardware(), cluster=cluster)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that a dry run may use.

    On a GPU, these are the free bytes without the expected gaps between tensors; on a CPU, half of the free bytes.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free - fragmentation(total)
    return psutil.virtual_memory().available // 2


def shrunk(config: Config, factor: int) -> Config:
    """Returns the recipe with sizes divided by `factor`, down to a minimum for each size."""
    if factor == 1:
        return config

    def part(value: int, least: int) -> int:
        return max(min(value, least), value // factor // 8 * 8)

    model = config.model
    small: Model = replace(
        model,
        vocab_size=part(model.vocab_size, 256),
        hidden=part(model.hidden, 64),
        heads=max(1, model.heads // factor),
        q_rank=None if model.q_rank is None else part(model.q_rank, 32),
        kv_rank=part(model.kv_rank, 32),
        dense_width=part(model.dense_width, 64),
        expert_width=part(model.expert_width, 16),
        loss_chunk=part(model.loss_chunk, 64),
        sparse=replace(
            model.sparse, heads=-(-model.sparse.heads // factor), top_k=max(1, model.sparse.top_k // factor)
        ),
    )
    return replace(config, model=small, seq_len=part(config.seq_len, 64))


def _cut(job: Config, config: Config, rank: int, load: Load, factor: int, room: int) -> DryRunPiece | None:
    """Returns the rank with as many layers as fit; None if even the fewest possible layers do not fit.

    job: the recipe as given
    config: the recipe with divided widths
    room: available bytes
    """
    pp_rank, scene = rank // job.parallel.stage_ranks, _alone(config, load)
    placement = job.parallel.placement
    layers, stages = stage_layers(job), placement[pp_rank]
    last = sum(map(len, placement)) - 1
    needed = rank_memory(config, pp_rank, scene, layers).peak_bytes
    peak, left_out = needed, 0
    while peak > room:
        # Remove a layer from the longest stage. Only the first and the last stage may be empty.
        lengths = {stage: len(layers[stage]) - (stage not in (0, last)) for stage in stages}
        longest = max(lengths, key=lengths.__getitem__)
        if lengths[longest] == 0:
            return None
        layers = [one[:-1] if stage == longest else one for stage, one in enumerate(layers)]
        left_out += 1
        peak = rank_memory(config, pp_rank, scene, layers).peak_bytes
    return DryRunPiece(job, config, rank, layers, load, factor, left_out, needed, room)


def _alone(config: Config, load: Load) -> Scene:
    return replace(scene_of(config, load), gloo=False)


def _work(job: Config, config: Config, rank: int) -> float:
    """Returns the FLOPs of this rank's step at `config`'s widths."""
    model, seq_len, parallel = config.model, config.seq_len, config.parallel
    placement, layers = parallel.placement, stage_layers(job)
    stages = placement[rank // parallel.stage_ranks]
    dense = sum(index < model.dense_layers for stage in stages for index in layers[stage])
    moe = sum(len(layers[stage]) for stage in stages) - dense
    last = len(layers) - 1 in stages
    per_token = dense * layer_flops(model, seq_len, dense=True)
    per_token += (moe + last * model.mtp_depth) * layer_flops(model, seq_len, dense=False)
    per_token += last * (1 + model.mtp_depth) * head_flops(model)
    return per_token * config.batch_size * seq_len // parallel.stage_ranks
