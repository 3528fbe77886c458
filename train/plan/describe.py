"""Sentences about a plan that the terminal and the page share."""

from train.plan.budget import RunPlan
from train.plan.words import gib


def verdict(plan: RunPlan) -> str:
    """Fits or does not, by how much, which rank."""
    rank = f"pipeline rank {plan.fullest.pp_rank}"
    if plan.fits:
        return f"fits, with {gib(plan.room_bytes)} of {gib(plan.memory_bytes)} to spare on {rank}"
    return f"does not fit, {gib(-plan.room_bytes)} over the {gib(plan.memory_bytes)} of a device on {rank}"


def layout_words(plan: RunPlan) -> str:
    """How the work is spread."""
    config, parallel = plan.config, plan.config.parallel
    micro_batches = config.batch_size // (config.micro_batch_size * parallel.dp)
    again = ", ".join(what.value for what in config.model.recompute) or "nothing"
    return (
        f"pp {parallel.pp} ({parallel.schedule}), dp {parallel.dp}, ep {parallel.ep} ({parallel.dispatch}, {parallel.wire}), "
        f"ZeRO {parallel.zero}, {micro_batches} micro-batches of {config.micro_batch_size}, computed again: {again}"
    )


def uneven_words(plan: RunPlan) -> str | None:
    """What to say where one rank of the pipeline works much longer than the others."""
    busy = plan.step.simulation.busy
    mean, most = sum(busy) / len(busy), max(busy)
    if len(busy) == 1 or most < 1.1 * mean:
        return None
    return f"pipeline rank {busy.index(most)} works {most / mean:.2f} times the mean of all; the others wait for it"
