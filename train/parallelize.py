"""Builds the chunks of a rank: the model's parts in its pipeline stages."""

from collections import ChainMap
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.own_code import TARGET, CodeSection, make, require_arguments
from conf.pipeline_schedules import PLAIN_SCHEDULE
from conf.schema import BaseFormat, Config, Recompute
from parallel.context import ContextParallel
from parallel.expert.build import build_dispatcher
from parallel.expert.dispatcher import ExchangeDispatcher
from parallel.mesh import Mesh
from parallel.pipeline.host_store import HostStore
from parallel.pipeline.schedule import Pipeline
from parallel.pipeline.split import split_as_given, split_layers, split_layers_evenly
from parallel.zero.engine import WeightFacts, Zero, ZeroSettings
from train.kernels.choice import build_kernels
from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.fp8.frozen_blocks import draw_blocks, hold_in_blocks
from train.kernels.plain.high import HighPrecision
from train.kernels.precision import activation_dtype, build_precision
from train.model.adapter import add_adapters
from train.model.block import Block
from train.model.count import head_flops, layer_flops
from train.model.deepseek import DeepSeekV3, ModelOutputs
from train.model.init import first_draws, initialise, materialise
from train.model.mtp import MTP
from train.model.operations import Kernels
from train.optim.optimizer_classes import OPTIMIZER_CLASSES
from train.rank_parts import ParallelModel, RankModel


def parallelize(
    config: Config,
    mesh: Mesh,
    device: torch.device,
    kernels: Kernels,
    *,
    restored: bool = False,
    dispatcher: ExchangeDispatcher | None = None,
    layers: list[range] | None = None,
    share: ContextParallel | None = None,
) -> ParallelModel:
    """Build this rank's chunks with weights drawn from config.seed, and wrap them for training.

    restored: whether a checkpoint will fill all weights; then none are drawn. Only a dry run passes `dispatcher`,
    `layers` (of every stage) and `share`.
    """
    in_turn = config.parallel.zero == 3 and not config.adapter.on  # a weight gets its memory when it is sharded
    model = build_rank_model(config, mesh, device, kernels, restored, dispatcher, layers, share, hollow=in_turn)
    chunks, optim = model.chunks, config.optim
    draws = [first_draws(chunk, None if restored else config.seed) for chunk in chunks if in_turn]
    updates = OPTIMIZER_CLASSES[optim.facts.name]
    offload = config.parallel.offload_optimizer
    updating = build_kernels("cpu", config.cluster.compiled) if offload else kernels
    zero = Zero(
        chunks,
        lambda groups: updates.make(groups, config, updating.parts),
        mesh,
        ZeroSettings(config.parallel.zero, offload, optim.clip, optim.facts, optim.weight_decay),
        WeightFacts(
            is_expert=lambda name: ".experts." in name,
            is_frozen=lambda name: (
                (optim.freeze_routers and name.endswith(".router.weight"))
                or (optim.index_warmup if ".indexer." not in name else not optim.index_loss)
            ),
            tied=None if config.adapter.on else tied_embedding(config, mesh, chunks),
            units=(Block, MTP),
            draws=dict(ChainMap(*draws)),
        ),
    )
    model.pipeline.on_chunk_end = zero.reduce_ahead
    for chunk in chunks:
        model.precision.watch(chunk)
    return ParallelModel(chunks, model.pipeline, model.dispatcher, model.precision, model.share, zero)


def build_rank_model(
    config: Config,
    mesh: Mesh,
    device: torch.device,
    kernels: Kernels,
    restored: bool = False,
    dispatcher: ExchangeDispatcher | None = None,
    layers: list[range] | None = None,
    share: ContextParallel | None = None,
    hollow: bool = False,
) -> RankModel:
    """Builds a rank's model without an optimizer. hollow: see `build_chunks`."""
    if dispatcher is None and mesh.layout.ep > 1:
        dispatcher = make_dispatcher(config, mesh)
    if share is None and mesh.layout.cp > 1:
        share = make_share(mesh)
    recompute_swiglu = Recompute.swiglu in config.model.recompute
    precision = build_precision(config.precision, device, kernels, recompute_swiglu)
    host = HostStore(device) if config.model.offload else None
    chunks, stage_ids, num_stages = build_chunks(
        config, mesh, device, dispatcher, precision, layers, restored, share, host, hollow
    )
    if config.optim.extra_loss and chunks[-1].has_head:
        chunks[-1].add_loss(make_loss(config.optim.extra_loss))
    pipeline = build_pipeline(config, mesh, device, chunks, stage_ids, num_stages, config.parallel.overlap, host)
    return RankModel(chunks, pipeline, dispatcher, precision, share)


def make_loss(section: CodeSection) -> Callable[[ModelOutputs], Tensor]:
    """Returns the user's loss term. Raises UserError."""
    key = "optim.extra_loss"
    loss = make(key, section)
    require_arguments(key, section, loss, 1, "one argument, the outputs of the model")
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        rule = "has weights, and nothing trains or saves them: a loss is a function of the model's outputs"
        raise UserError(f"{key}.{TARGET}", section[TARGET], rule, "put them into a model.block of your own")
    return loss


def build_pipeline(
    config: Config,
    mesh: Mesh,
    device: torch.device,
    chunks: list[DeepSeekV3],
    stage_ids: list[int],
    num_stages: int,
    overlap: bool,
    host: HostStore | None = None,
) -> Pipeline[DeepSeekV3]:
    """Builds the pipeline. Without stages, the model is stage 0 of 1."""
    parallel = config.parallel
    fits = num_stages == sum(map(len, parallel.placement))
    return Pipeline(
        parallel.schedule if fits else PLAIN_SCHEDULE,
        chunks,
        stage_ids,
        num_stages,
        mesh.pp_group,
        device,
        hidden=config.model.hidden,
        dtype=activation_dtype(config.precision),
        cp=mesh.layout.cp,
        overlap=overlap,
        timeout=max(config.cluster.timeout, config.cluster.start_timeout),
        host=host,
    )


def stage_layers(config: Config) -> list[range]:
    """Returns the layers of every stage, as parallel.split says."""
    model, seq_len, parallel = config.model, config.seq_len, config.parallel
    if isinstance(parallel.split, list):
        return split_as_given(parallel.split)
    if parallel.split == "even":
        return split_layers_evenly(model.layers, sum(map(len, parallel.placement)))
    dense, moe = (layer_flops(model, seq_len, dense=kind) for kind in (True, False))
    costs = [dense] * model.dense_layers + [moe] * (model.layers - model.dense_layers)
    mtp = moe + 12 * model.hidden**2 + head_flops(model)
    last = head_flops(model) + model.mtp_depth * mtp
    return list(_split(tuple(costs), last, tuple(map(tuple, parallel.placement))))


@cache
def _split(costs: tuple[float, ...], last: float, placement: tuple[tuple[int, ...], ...]) -> tuple[range, ...]:
    """Splits the layers by cost. The result is cached, because the planner asks for the same splits many times."""
    return tuple(split_layers(costs, 0.0, last, placement))


def build_chunks(
    config: Config,
    mesh: Mesh,
    device: torch.device,
    dispatcher: ExchangeDispatcher | None,
    precision: HighPrecision | Fp8Precision,
    layers: list[range] | None = None,
    restored: bool = False,
    share: ContextParallel | None = None,
    host: HostStore | None = None,
    hollow: bool = False,
) -> tuple[list[DeepSeekV3], list[int], int]:
    """Builds this rank's chunks. Returns the chunks, the indices of their stages, and the number of stages.

    layers: the layers of every stage. host: stores offloaded activations. hollow: whether the caller allocates and
    draws the weights.
    """
    placement = config.parallel.placement
    stage_ids, num_stages = placement[mesh.pp_rank], sum(len(ids) for ids in placement)
    layers = layers or stage_layers(config)
    held = config.model.experts // mesh.layout.ep
    dtype, in_blocks = activation_dtype(config.precision), config.adapter.base is BaseFormat.fp8
    chunks: list[DeepSeekV3] = []
    embedding = None  # a rank with first and last stage uses one embedding
    for stage in stage_ids:
        chunk = DeepSeekV3(
            config.model,
            precision,
            seq_len=config.seq_len,
            layers=layers[stage],
            has_embedding=stage == 0,
            has_head=stage == num_stages - 1,
            dispatcher=dispatcher,
            local_experts=range(mesh.ep_rank * held, (mesh.ep_rank + 1) * held),
            embedding=embedding,
            share=share,
            host=host,
            dtype=dtype,
            device="meta" if hollow or in_blocks else device,  # otherwise memory would hold weights and FP8 blocks
        )
        if in_blocks:
            hold_in_blocks(chunk)
        if hollow:
            materialise(chunk, device, hollow)
        else:
            initialise(chunk, None if restored else config.seed, device)
        if not restored:
            draw_blocks(chunk, config.seed)
        if config.adapter.on:
            add_adapters(chunk, config.adapter, precision.kernels, config.seed)
        chunk.detaches_mtp, chunk.warms_indexers = config.optim.detach_mtp, config.optim.index_warmup
        for router in chunk.routers().values():
            router.frozen = config.optim.freeze_routers
        embedding = getattr(chunk, "embedding", embedding)
        chunks.append(chunk)
    return chunks, stage_ids, num_stages


def make_share(mesh: Mesh) -> ContextParallel:
    """Builds the object with which ranks exchange parts of a sequence."""
    return ContextParallel(mesh.cp_group, mesh.layout.cp > mesh.layout.ranks_per_node)


def make_dispatcher(config: Config, mesh: Mesh) -> ExchangeDispatcher:
    """Builds the object that sends tokens to experts on other ranks."""
    return build_dispatcher(
        config.parallel.dispatch,
        experts=config.model.experts,
        wire=config.parallel.wire,
        quantized=config.precision.fp8 is not None,
        ep_group=mesh.ep_group,
        inter_group=mesh.inter_group,
        intra_group=mesh.intra_group,
        ranks_per_node=mesh.layout.ep_ranks_per_node,
        groups=config.model.groups,
        width=config.model.hidden,
    )


def tied_embedding(config: Config, mesh: Mesh, chunks: list[DeepSeekV3]) -> nn.Parameter | None:
    """Returns this rank's embedding if another rank has a copy, or None."""
    placement = config.parallel.placement
    same_rank = sum(len(ids) for ids in placement) - 1 in placement[0]
    holders = [chunk.embedding.weight for chunk in chunks if hasattr(chunk, "embedding")]
    return holders[0] if config.model.mtp_depth and not same_rank and holders else None
