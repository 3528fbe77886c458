"""Whether a layout can run, before anything starts. No torch, which takes seconds to import, unless a rule needs it."""

from conf.micro_batches import micro_batch_counts
from conf.schema import Config
from parallel.pipeline.split import check_schedule, check_split


def check_layout(config: Config) -> None:
    """Raise UserError where the layout cannot run, for what needs more than one field to see. Starts nothing.

    One rank too: a pipeline of one stage still follows its schedule.
    """
    parallel = config.parallel
    for micro_batches in micro_batch_counts(config):
        check_schedule(parallel.schedule, parallel.pp, micro_batches, config.model.layers)
    if isinstance(parallel.split, list):
        check_split(parallel.split, parallel.schedule, parallel.pp, config.model.layers)
    if parallel.ep > 1 and parallel.dispatch == "node_limited":
        from parallel.expert.build import check_groups
        from parallel.mesh import read_layout

        layout = read_layout(config, parallel.world)
        check_groups(parallel.ep, layout.ep_ranks_per_node, config.model.groups)
