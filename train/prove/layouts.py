"""In what form a recipe runs: in each pass of a proof, and in the layout that reads its checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import gcd

from conf.check import check
from conf.errors import UserError
from conf.schema import Config, Parallel, Precision
from train.layout import check_layout


def in_fp32(config: Config) -> Config:
    """The recipe with fp32 products, and without what only other formats have."""
    parallel = replace(config.parallel, wire="bf16")  # the activations' own format
    if parallel.dispatch == "deepep":
        parallel = replace(parallel, dispatch="flat")
    return replace(config, precision=Precision(name="fp32", moments="fp32"), parallel=parallel)


PROOFS: dict[str, Callable[[Config], Config]] = {"exact": in_fp32, "fp32": in_fp32, "recipe": lambda config: config}
"""The passes, and the recipe as it runs in each."""


def stop_step(config: Config) -> int:
    """The step after which the first part of a run stops, with a checkpoint."""
    return max(1, config.steps // 2)


def watched_steps(config: Config) -> set[int]:
    """Steps of which single parts are judged: the first after the checkpoint, and one of the same ranks after an update, as what is
    kept of weights must follow them.
    """
    last = stop_step(config)
    return {last, min(last + 1, config.steps), last if last > 1 else config.steps}


def second_layout(config: Config, ranks: int) -> Parallel:
    """Another layout, of so many ranks; the recipe's own where the rules allow no other."""
    for parallel in _others(config, ranks):
        try:
            other = in_layout(config, parallel)
            check(replace(other, name="proof"))
            check_layout(other)
        except UserError:
            continue
        return parallel
    return config.parallel


def in_layout(config: Config, parallel: Parallel) -> Config:
    """The recipe in another layout, one sequence at a time, so that more layouts divide the batch."""
    ranks_per_node = 0 if parallel.dispatch == "flat" else config.cluster.ranks_per_node
    cluster = replace(config.cluster, ranks_per_node=ranks_per_node)
    return replace(config, parallel=parallel, micro_batch_size=1, cluster=cluster)


def _others(config: Config, world: int) -> Iterator[Parallel]:
    """The farther from the recipe's, the earlier."""
    own = config.parallel
    plain = replace(own, pp=1, dp=world, cp=1, ep=1, zero=1, schedule="1f1b", virtual_stages=2, dispatch="flat")
    shared = gcd(world, config.model.experts)
    if own.pp > 1:
        for zero in (3, 2, 1):
            yield replace(plain, ep=1 if own.ep == shared else shared, zero=zero)
    elif own.stage_ranks == 1:
        yield replace(plain, ep=shared, zero=2)
    if own.pp == 1 and world % 2 == 0:
        half = world // 2
        for schedule in ("zbv", "1f1b"):
            yield replace(plain, pp=2, dp=half, ep=gcd(half, config.model.experts), schedule=schedule)
    yield from (replace(plain, ep=ep, zero=zero) for ep in {shared, 1} for zero in {1, 2, 3} - {own.zero})
    kept = replace(plain, pp=own.pp, dp=own.dp, cp=own.cp)  # where the batch divides among no other number of ranks
    shared, experts = own.stage_ranks, config.model.experts
    sizes = [ep for ep in range(shared, 0, -1) if shared % ep == 0 and experts % ep == 0 and ep != own.ep]
    yield from (replace(kept, ep=ep, zero=zero) for ep in sizes for zero in (2, 1))


def layout_name(config: Config) -> str:
    """For a person."""
    parallel = config.parallel
    parts = [f"{name} {value}" for name in ("pp", "dp", "cp", "ep") if (value := getattr(parallel, name)) > 1]
    parts += [parallel.schedule_words] if parallel.pp > 1 or parallel.schedule != "1f1b" else []
    parts += [parallel.dispatch] if parallel.ep > 1 else []
    parts += (
        ["shares that differ"]
        if parallel.uneven and config.batch_size % (config.micro_batch_size * parallel.dp)
        else []
    )
    return ", ".join([*parts, f"ZeRO {parallel.zero}"])
