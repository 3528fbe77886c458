"""Splits the sequences of a step into micro-batches: the automatic micro-batch size, and the rules.

Every data-parallel rank splits its batch_size / dp sequences into equal micro-batches. Ranks that share experts or a
sequence run micro-batches in lockstep. With parallel.uneven, some expert groups have one micro-batch more.
"""

import math

from conf.errors import UserError
from conf.schema import Config, Parallel

MICRO_BATCH_TOKENS = 4096
"""Maximum tokens in a forward pass with automatic micro-batch size."""


def batch_sizes(config: Config) -> list[int]:
    """Return all batch sizes of the run, in sequences."""
    start, step = config.optim.batch_ramp_start or config.batch_size, config.optim.batch_ramp_increment
    return [*range(start, config.batch_size, step), config.batch_size]


def in_lockstep(parallel: Parallel) -> int:
    """Return how many data-parallel ranks run their micro-batches in lockstep."""
    return parallel.ep // math.gcd(parallel.ep, parallel.cp)


def share_of(config: Config, batch: int, dp_rank: int) -> tuple[int, int]:
    """Return first index and number of a data-parallel rank's sequences in a step of `batch` sequences."""
    size, together = config.micro_batch_size, in_lockstep(config.parallel)
    group, index = divmod(dp_rank, together)
    each, more = divmod(batch // (size * together), config.parallel.dp // together)
    before = (group * each + min(group, more)) * size * together
    count = (each + (group < more)) * size
    return before + index * count, count


def most_micro_batches(config: Config) -> int:
    """Return rank 0's number of micro-batches in a full batch, the largest of all ranks."""
    return share_of(config, config.batch_size, 0)[1] // config.micro_batch_size


def micro_batch_counts(config: Config) -> set[int]:
    """Return every number of micro-batches that a rank has in a step, for all batch sizes of the run."""
    ranks = 0, config.parallel.dp - 1
    return {
        share_of(config, batch, rank)[1] // config.micro_batch_size for batch in batch_sizes(config) for rank in ranks
    }


def batch_unit(config: Config) -> int:
    """Return the number that must divide every batch size."""
    return config.micro_batch_size * (in_lockstep(config.parallel) if config.parallel.uneven else config.parallel.dp)


def choose_micro_batch_size(config: Config) -> int:
    """Return the largest valid micro-batch size; 1 if no size is valid.

    A valid size divides the number of a rank's sequences in every batch, keeps a forward pass within
    MICRO_BATCH_TOKENS, and gives the schedule enough micro-batches.
    """
    batches, parallel = batch_sizes(config), config.parallel
    whole = math.gcd(*batches)
    for size in sorted(divisors(whole // parallel.dp), reverse=True) if whole % parallel.dp == 0 else []:
        counts = {batch // (size * parallel.dp) for batch in batches}
        fits = size == 1 or size * config.seq_len // parallel.cp <= MICRO_BATCH_TOKENS
        if fits and not any(parallel.schedule_facts.find_broken_rule(parallel.pp, count) for count in counts):
            return size
    return 1


def check_batch(config: Config) -> None:
    """Raise UserError unless all data-parallel ranks have equally many micro-batches. With parallel.uneven, only the
    ranks of an expert group need equal numbers."""
    batch, size, dp = config.batch_size, config.micro_batch_size, config.parallel.dp
    if batch % (size * dp) == 0:
        return
    if config.parallel.uneven:
        _check_uneven(config)
        return
    if batch % dp == 0:
        fitting = max(each for each in divisors(batch // dp) if each <= size)
        rule = f"must divide each rank's share of the batch: batch_size / parallel.dp = {batch} / {dp} = {batch // dp}"
        raise UserError("micro_batch_size", size, rule, f"use micro_batch_size={fitting}, or leave it out")
    unit = size * dp if size * dp <= batch else dp
    lower = batch // unit * unit
    near = sorted((each for each in (lower, lower + unit) if each), key=lambda each: abs(each - batch))
    with_size = "" if unit == size * dp else " with micro_batch_size left out"
    ranks = [each for each in divisors(batch) if each % config.parallel.ep == 0]
    around = [*[each for each in ranks if each < dp][-1:], *[each for each in ranks if each > dp][:1]]
    cure = f"use batch_size={' or '.join(map(str, near))}{with_size}"
    if around:
        cure += f", or parallel.dp={' or '.join(map(str, around))}, for equal shares of {batch} sequences"
    raise UserError("batch_size", batch, f"must be a multiple of micro_batch_size x parallel.dp = {size} x {dp}", cure)


def _check_uneven(config: Config) -> None:
    batch, size, parallel = config.batch_size, config.micro_batch_size, config.parallel
    if parallel.zero == 3:
        rule = "needs equal shares with parallel.zero=3: all ranks gather weights for every micro-batch together"
        raise UserError("parallel.uneven", True, rule, "use parallel.zero=1 or 2, or a dp that divides the batch")
    if batch % batch_unit(config):
        together = in_lockstep(parallel)
        rule = (
            f"must be a multiple of {size} x {together}: micro_batch_size x the ranks of an expert group (parallel.ep)"
        )
        raise UserError(
            "batch_size", batch, rule, f"use batch_size={-(-batch // batch_unit(config)) * batch_unit(config)}"
        )
    if min(batch_sizes(config)) < size * parallel.dp:
        rule = f"must give every rank a micro-batch: at least micro_batch_size x parallel.dp = {size} x {parallel.dp} sequences"
        raise UserError("batch_size", min(batch_sizes(config)), rule, "lower parallel.dp or micro_batch_size")


def divisors(number: int) -> list[int]:
    """Return all divisors of a number in ascending order."""
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})
