"""How a step's sequences become micro-batches: what a schedule asks for, the size that is chosen where none is given, and the rule.

Every data-parallel rank has its share of the batch, batch_size / dp, and cuts it into micro-batches of one size.
"""

import math

from conf.errors import UserError
from conf.schema import Config


def broken_schedule(schedule: str, pp: int, micro_batches: int) -> str | None:
    """Why a pipeline of pp ranks cannot run so many micro-batches per step and data-parallel rank; None if it can."""
    rounds = max(1, micro_batches // pp)
    least = {"1f1b": pp, "dualpipev": 2 * pp}.get(schedule, 1)
    if micro_batches < least:
        return f"{schedule} needs at least {least} micro-batches to fill {pp} pipeline ranks"
    if schedule == "interleaved" and micro_batches % rounds:
        return f"interleaved needs micro-batches that {rounds} rounds of about {pp} divide (a multiple of pp is safe)"
    return None


def batch_sizes(config: Config) -> list[int]:
    """Sequences per step that a run may have: those of its ramp, and the full batch."""
    start, step = config.optim.batch_ramp_start or config.batch_size, config.optim.batch_ramp_increment
    return [*range(start, config.batch_size, step), config.batch_size]


def choose_micro_batch_size(config: Config) -> int:
    """The largest size that divides a rank's share of every batch, keeps to config.micro_batch_tokens, and leaves the schedule as
    many micro-batches as it needs; 1 where no size does.
    """
    batches, parallel = batch_sizes(config), config.parallel
    whole = math.gcd(*batches)
    for size in sorted(divisors(whole // parallel.dp), reverse=True) if whole % parallel.dp == 0 else []:
        counts = {batch // (size * parallel.dp) for batch in batches}
        fits = size == 1 or size * config.seq_len <= config.micro_batch_tokens
        if fits and not any(broken_schedule(parallel.schedule, parallel.pp, count) for count in counts):
            return size
    return 1


def check_batch(config: Config) -> None:
    """Raise UserError unless every data-parallel rank has the same whole number of micro-batches.

    The cure is the change nearest to what was asked for.
    """
    batch, size, dp = config.batch_size, config.micro_batch_size, config.parallel.dp
    if batch % (size * dp) == 0:
        return
    if batch % dp == 0:
        fitting = max(each for each in divisors(batch // dp) if each <= size)
        rule = f"must divide each rank's share of the batch: batch_size / parallel.dp = {batch} / {dp} = {batch // dp}"
        raise UserError("micro_batch_size", size, rule, f"take micro_batch_size={fitting}, or leave it out")
    unit = size * dp if size * dp <= batch else dp
    lower = batch // unit * unit
    near = sorted((each for each in (lower, lower + unit) if each), key=lambda each: abs(each - batch))
    with_size = "" if unit == size * dp else " with micro_batch_size left out"
    ranks = [each for each in divisors(batch) if each % config.parallel.ep == 0]
    around = [*[each for each in ranks if each < dp][-1:], *[each for each in ranks if each > dp][:1]]
    cure = f"take batch_size={' or '.join(map(str, near))}{with_size}"
    if around:
        cure += f", or parallel.dp={' or '.join(map(str, around))}, which {batch} sequences divide among"
    raise UserError("batch_size", batch, f"must be a multiple of micro_batch_size x parallel.dp = {size} x {dp}", cure)


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})
