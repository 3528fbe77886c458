"""Changes a recipe's layout, and checks the rules for it."""

import math
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.check import check, check_spread
from conf.errors import UserError
from conf.micro_batches import choose_micro_batch_size
from conf.schema import ROOT, SELECTIVE, Config, Offload, PipelineSchedule, Recompute
from train.loop.layout_check import check_layout
from train.plan.job import can_offload, with_nodes
from train.plan.time.stages import require_rule

LIGHTEST: list[str] = [str(what) for what in SELECTIVE]
"""All items that `recompute` accepts besides whole layers."""


def with_changes(config: Config, **values: Any) -> Config:
    """Returns the recipe with changed values.

    values: fields of the section `parallel`, and micro_batch_size, recompute, offload, loss_chunk or moments

    A list in `split` becomes `cost` if the number of stages changes.
    virtual_stages becomes 2 if the schedule requires 2.
    """
    parallel = {name: value for name, value in values.items() if hasattr(config.parallel, name)}
    model = {name: value for name, value in values.items() if name in ("recompute", "offload", "loss_chunk")}
    precision = {name: value for name, value in values.items() if name == "moments"}
    spread = replace(config.parallel, **parallel)
    if spread.schedule_facts.stages is not None:
        spread = replace(spread, virtual_stages=2)
    stages = spread.pp * spread.schedule_facts.rank_stages(spread.virtual_stages)
    if isinstance(spread.split, list) and len(spread.split) != stages:
        spread = replace(spread, split="cost")
    return replace(
        config,
        micro_batch_size=values.get("micro_batch_size", config.micro_batch_size),
        parallel=spread,
        model=replace(config.model, **model) if model else config.model,
        precision=replace(config.precision, **precision) if precision else config.precision,
    )


def fitted_ramp(config: Config, share: int, least: int) -> Config:
    """Returns the recipe with a batch ramp in multiples of `share` sequences.

    The ramp starts with at least `least` * `share` sequences. If the recipe has no ramp, or if no such ramp is
    possible, the recipe is unchanged.
    """
    optim = config.optim
    if optim.batch_ramp_start is None:
        return config
    step = math.lcm(optim.batch_ramp_increment, share)
    start = -(-max(optim.batch_ramp_start, least * share) // step) * step
    if config.batch_size % step or start > config.batch_size:
        return config
    return replace(config, optim=replace(optim, batch_ramp_increment=step, batch_ramp_start=start))


def broken_rule(config: Config) -> UserError | None:
    """Returns the first rule that the recipe breaks, if any."""
    try:
        check(config)
        require_rule(config)
    except UserError as error:
        return error
    return broken_layout(config)


def broken_layout(config: Config) -> UserError | None:
    """Returns the rule that the layout breaks, if any."""
    try:
        check_spread(config)
        check_layout(with_nodes(config))
    except UserError as error:
        return error
    return None


def words(value: Any) -> str:
    """Returns a value of the section parallel, in command-line syntax."""
    return str(value).replace(" ", "").lower() if isinstance(value, bool | list) else str(value)


def overrides(config: Config, base: Config) -> list[str]:
    """Returns the command-line arguments that turn the base recipe into this one."""
    found = []
    for name, value in vars(config.parallel).items():
        if value != getattr(base.parallel, name):
            found.append(f"parallel.{name}={words(value)}")
    for name in ("batch_ramp_start", "batch_ramp_increment"):
        if getattr(config.optim, name) != getattr(base.optim, name):
            found.append(f"optim.{name}={getattr(config.optim, name)}")
    size = config.micro_batch_size
    if size != base.micro_batch_size or (
        found and size != choose_micro_batch_size(config)
    ):  # the argument is not needed for a default value
        found.append(f"micro_batch_size={size}")
    if config.model.recompute != base.model.recompute:
        found.append(f"model.recompute=[{','.join(config.model.recompute)}]")
    if config.model.offload != base.model.offload:
        found.append(f"model.offload=[{','.join(config.model.offload)}]")
    if config.model.loss_chunk != base.model.loss_chunk:
        found.append(f"model.loss_chunk={config.model.loss_chunk}")
    if config.precision.moments != base.precision.moments:
        found.append(f"precision.moments={config.precision.moments}")
    return found


def lighter(config: Config) -> Iterator[Config]:
    """Yields recipes with one change that may save memory. Some cannot run."""
    parallel, model = config.parallel, config.model
    for again in (LIGHTEST, [*LIGHTEST, f"{Recompute.layer}:1"], [Recompute.layer]):
        if set(model.recompute) != set(again):
            yield with_changes(config, recompute=again)
    if can_offload(config) and parallel.zero < 3 and not parallel.offload_optimizer:
        yield with_changes(config, offload_optimizer=True)
    if can_offload(config) and not model.offload and Recompute.layer not in model.recompute:
        yield with_changes(config, offload=[Offload.layer])
    size = config.micro_batch_size
    if size > 1:
        yield with_changes(config, micro_batch_size=size // 2)
        yield with_changes(config, micro_batch_size=1)
    for stage in (2, 3):
        if parallel.pp == 1 and parallel.zero < stage and parallel.dp > 1:
            yield with_changes(config, zero=stage)
    for schedule in PipelineSchedule:
        if parallel.pp > 1 and schedule != parallel.schedule:
            yield with_changes(config, schedule=schedule)
    for factor in (2, 4):
        if parallel.dp % (parallel.ep * factor) == 0:
            yield with_changes(config, ep=parallel.ep * factor)
        if parallel.dp % factor == 0 and parallel.dp > 1:
            dp = parallel.dp // factor
            yield with_changes(config, pp=parallel.pp * factor, dp=dp, ep=min(parallel.ep, dp), zero=1)
    if parallel.dp % 2 == 0 and config.seq_len % (4 * parallel.cp) == 0:
        yield with_changes(config, dp=parallel.dp // 2, cp=parallel.cp * 2)
    if parallel.pp > 1 and parallel.pp % 2 == 0:
        yield with_changes(config, pp=parallel.pp // 2, dp=parallel.dp * 2)
    yield from unsearched(config)
    yield with_changes(config, dp=parallel.dp * 2)


def unsearched(config: Config) -> Iterator[Config]:
    """Yields recipes with one change in settings that no search varies."""
    if config.precision.moments == "fp32":
        yield with_changes(config, moments="bf16")
    if config.model.loss_chunk > 512:
        yield with_changes(config, loss_chunk=512)


def write_parallel(config: Config, name: str, base: Config, folder: Path | None = None) -> Path:
    """Write the section `parallel` to conf/parallel/<name>.yaml, and changes of other sections as a comment.

    Returns the path. Raises UserError if the file exists and no search wrote it.
    """
    path = (folder or ROOT / "conf" / "parallel") / f"{name}.yaml"
    rest = [part for part in overrides(config, base) if not part.startswith("parallel.")]
    head = f"# Found by plan.search for conf={base.name}, hardware={config.hardware.name}; use with: parallel={name}"
    lines = [f"{head} {shlex.join(rest)}".rstrip()]
    for field, value in vars(config.parallel).items():
        lines.append(f"{field}: {words(value)}")
    if path.exists() and not path.read_text().startswith("# Found by plan.search"):
        raise UserError("plan.write", name, f"{path} exists and was not written by a search", "choose another name")
    path.write_text("\n".join(lines) + "\n")
    return path
