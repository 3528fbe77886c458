"""Checks whether a layout can run. Imports torch only if needed, because this takes seconds."""

from conf.dispatches import check_groups
from conf.errors import UserError
from conf.micro_batches import micro_batch_counts
from conf.pipeline_schedules import check_schedule, check_split
from conf.schema import Config


def check_layout(config: Config) -> None:
    """Raise UserError if several settings of the layout do not fit together."""
    parallel = config.parallel
    for micro_batches in micro_batch_counts(config):
        check_schedule(parallel.schedule, parallel.pp, micro_batches, config.model.layers, parallel.virtual_stages)
    if isinstance(parallel.split, list):
        check_split(parallel.split, parallel.schedule, parallel.pp, config.model.layers, parallel.virtual_stages)
    if config.model.offload and config.model.repeated_layers:
        _check_offload(config)
    if config.adapter.on and parallel.pp > 1:
        _check_adapter(config)
    if "S" in config.model.sparse.pattern or config.optim.index_warmup:
        _check_choices(config)
    if parallel.ep > 1 and parallel.dispatch_facts.by_nodes:
        from parallel.layout import read_layout

        layout = read_layout(config, parallel.world)
        check_groups(parallel.ep, layout.ep_ranks_per_node, config.model.groups)


def _check_offload(config: Config) -> None:
    """Raise UserError if every block is recomputed: nothing is left to offload."""
    from train.parallelize import stage_layers

    again, longest = config.model.repeated_layers, max(map(len, stage_layers(config)))
    if again >= longest:
        raise UserError(
            "model.offload",
            config.model.offload,
            f"has nothing to offload: model.recompute recomputes the first {again} blocks of every stage, and no stage has more than {longest}",
            "lower N of layer:N in model.recompute, or omit one of the two keys",
        )


def _check_adapter(config: Config) -> None:
    """Raise UserError if a pipeline rank has no block for an adapter."""
    from train.parallelize import stage_layers

    layers = stage_layers(config)
    for rank, stages in enumerate(config.parallel.placement):
        if not any(len(layers[stage]) for stage in stages):
            raise UserError(
                "parallel.pp",
                config.parallel.pp,
                f"leaves rank {rank} of the pipeline without a block, so an adapter has nothing to train there",
                "lower parallel.pp, or give parallel.split",
            )


def _check_choices(config: Config) -> None:
    """Raise UserError if a stage begins with a layer that uses the attention keys of an earlier layer.

    With optim.index_warmup, the first stage must contain a layer.
    """
    from train.parallelize import stage_layers

    stages, sparse = stage_layers(config), config.model.sparse
    if config.optim.index_warmup and not stages[0]:
        rule = "has no layer in its first stage, so optim.index_warmup has nothing to train there"
        raise UserError("parallel.split", config.parallel.split, rule, "give the first stage a layer")
    for number, layers in enumerate(stages):
        if layers and sparse.heads and not sparse.chooses(layers.start):
            rule = f"puts layer {layers.start} first in stage {number}, and by model.sparse.pattern it uses the keys selected by layer {sparse.pattern.rindex('F', 0, layers.start)}, which is in an earlier stage"
            starts = [at for at, letter in enumerate(sparse.pattern) if letter == "F"]
            cure = f"give parallel.split so that each stage begins with one of the layers {starts}"
            raise UserError("parallel.split", config.parallel.split, rule, cure)
