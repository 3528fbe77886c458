"""Counts the bytes that a device sends in a step."""

from collections import defaultdict
from itertools import pairwise

from train.plan.time.stages import Stages
from train.plan.time.traffic import latent_bytes
from train.plan.time.update import count_weights, sharers, stage3_passes


def count_traffic(stages: Stages) -> dict[str, dict[str, float]]:
    """Returns the bytes that a device sends in a step, as a mean over pipeline ranks.

    The outer keys are kinds of links (inside a node, across nodes, host), the inner keys are purposes.
    """
    config, layout, parallel = stages.config, stages.layout, stages.config.parallel
    model, element, last = config.model, stages.element, len(stages.layers) - 1
    tokens = stages.tokens * stages.micro_batches
    found: dict[str, defaultdict[str, float]] = {link: defaultdict(float) for link in ("inside", "across", "host")}
    moe = model.layers - model.dense_layers + model.mtp_depth
    for link, moved in zip(("inside", "across"), stages.spread.step_bytes(tokens), strict=True):
        found[link]["experts"] += moved * moe
    rank_of = {stage: rank for rank, ids in enumerate(stages.placement) for stage in ids}
    borders = sum(rank_of[stage] != rank_of[following] for stage, following in pairwise(range(last + 1)))
    link = "inside" if layout.stage_ranks < layout.ranks_per_node else "across"
    found[link]["stages"] += 2 * borders * tokens * model.hidden * element
    link = "inside" if layout.cp <= layout.ranks_per_node else "across"
    found[link]["contexts"] += 3 * latent_bytes(config) * stages.micro_batches * (model.layers + model.mtp_depth)
    for ids in stages.placement:
        held = count_weights(config, stages.layers, ids, last)
        # numbers of reductions and of gathers, and how often a step repeats both
        times = (*stage3_passes(config), stages.micro_batches) if parallel.zero == 3 else (2, 1, 1)
        for weights, group, per_node in sharers(layout, held):
            moved = weights * (group - 1) / group * times[2]
            across = 1 / per_node if group > per_node else 0.0  # in a ring, one rank per node sends to another node
            for link, share in (("inside", 1 - across), ("across", across)):
                found[link]["gradients"] += 4 * moved * times[0] * share
                found[link]["weights"] += element * moved * times[1] * share
            found["host"]["optimizer"] += weights / group * (4 + element) * parallel.offload_optimizer
        if model.offload:
            found["host"]["activations"] += 2 * stages.micro_batches * sum(map(stages.count_sent, ids))
    return {link: {what: moved / layout.pp for what, moved in each.items() if moved} for link, each in found.items()}
