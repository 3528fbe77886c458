"""Converts a plan to plan.json, and to sentences for the terminal and plan.html.

train/docs/plan.md lists the fields. The name of a field contains its unit of measurement.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from conf.own_code import targets_of
from conf.schema import Config, Hardware
from parallel.pipeline.orders import Action
from train.kernels.cpu.processor import cpu_name
from train.metrics.quantities import amount, gib, length_of_run, seconds, share
from train.parallelize import stage_layers
from train.plan.budget import Budget, RunPlan, room_words
from train.plan.job import layout_of, micro_batches_of
from train.plan.memory.rank_memory import copies_lacking
from train.plan.reserve import copies_memory, host_memory
from train.plan.search.changes import words as as_typed
from train.plan.search.cures import Cure, FasterSplit
from train.plan.time.link_traffic import count_traffic
from train.plan.time.rates import OURS_UNTIMED, TUNED, load_rates
from train.plan.time.stages import Stages
from train.plan.time.step_time import StepTime
from train.plan.time.traffic import latent_bytes
from train.show.planned import recipe_of


def plan_record(
    plan: RunPlan,
    cures: list[Cure],
    split: FasterSplit | None,
    faster_stages: Cure | None = None,
    phases: Sequence[tuple[str, RunPlan]] = (),
) -> dict[str, Any]:
    """Returns the content of plan.json, without the results of a search."""
    config, step, budget = plan.config, plan.step, plan.budget
    layout, parallel = layout_of(config), config.parallel
    stages = Stages(config, layout, load_rates(config, alone=layout.world == 1))
    inside, across = stages.spread.step_bytes(stages.tokens * stages.micro_batches)
    return {
        "name": config.name,
        "hardware": config.hardware.name,
        "device": cpu_name() if config.hardware.device == "cpu" else config.hardware.device,
        "on_cpu": config.hardware.device == "cpu",
        "rates": step.rates,
        "threads": step.threads,
        "devices": layout.world,
        "devices_per_node": layout.ranks_per_node,
        "device_memory_bytes": plan.memory_bytes,
        "layout": {
            **vars(parallel),
            "micro_batch_size": config.micro_batch_size,
            "micro_batches": stages.micro_batches,
            "recompute": config.model.recompute,
            "offload": config.model.offload,
            "precision": config.precision.name,
        },
        "recipe": recipe_of(config),
        "fits": plan.fits,
        "verdict": plan.verdict,
        "imbalance": config.plan.imbalance,
        "reserve_bytes": plan.reserve,
        "room_bytes": plan.room_bytes,
        "host_bytes": plan.host_bytes,
        "host_room_bytes": host_memory(config) - plan.host_bytes if host_memory(config) else None,
        "disk_bytes": asdict(plan.disk) | {"whole": plan.disk.whole},
        "fullest_pp_rank": plan.fullest.pp_rank,
        "cures": [vars(cure) for cure in cures],
        "ranks": [
            {
                "pp_rank": rank.pp_rank,
                "peak_bytes": rank.peak_bytes,
                "peak_event": rank.peak_event,
                "phase_peak_bytes": {name: one.device for name, one in rank.phases.items()},
                "phase_host_bytes": {name: one.host for name, one in rank.phases.items()},
                "items_bytes": rank.items,
                "host_items_bytes": rank.host_items,
            }
            for rank in plan.ranks
        ],
        "stages": [_stage(stages, stage) for stage in range(len(stages.layers))],
        "split_imbalance": plan.step.simulation.imbalance,
        "faster_split": None if split is None else vars(split),
        "faster_stages": None if faster_stages is None else vars(faster_stages),
        "step_seconds": step.step_seconds,
        "step_interval_seconds": step.interval_seconds.get(OURS_UNTIMED),
        "tuned_interval_seconds": step.interval_seconds.get(TUNED),
        "host_binds": step.host_binds,
        "pipeline_seconds": step.pipeline_seconds,
        "bubble_seconds": step.bubble_seconds,
        "bubble_share": step.bubble_share,
        "action_seconds": step.action_seconds,
        "work_seconds": step.work_seconds,
        "host_seconds": step.host_seconds,
        "exchange_seconds": step.exchange_seconds,
        "exposed_communication_seconds": step.exposed_communication_seconds,
        "exchange_bytes_per_layer": {"inside": inside, "across": across},
        "latent_bytes_per_layer": 3 * latent_bytes(plan.config) * micro_batches_of(plan.config),
        "link_bytes": count_traffic(stages),
        "reduce_seconds": step.update.reduce,
        "optimizer_seconds": step.update.optimizer,
        "gather_seconds": step.update.gather,
        "tokens_per_second": step.tokens_per_second,
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
        "mfu_causal": step.mfu_causal,
        "mfu_full": step.mfu_full,
        **vars(budget),
        "failures": None if plan.failures is None else asdict(plan.failures) | {"budget": vars(plan.lasting)},
        "phases": [
            {"name": name, "verdict": phase.verdict, "step_seconds": phase.step.step_seconds, **vars(phase.budget)}
            for name, phase in phases
        ],
        "own_code": own_code_words(config),
    }


OWN_CODE_PLANNED = {
    "model.block": "memory is traced with it, time is that of a block of DeepSeek-V3",
    "model.router": "memory is traced with it, time is that of DeepSeek-V3's router",
    "optim.extra_loss": "neither memory nor time is known: measure one rank with mode=dry_run",
    "data.source": "not counted",
    "data.template_function": "not counted",
    "callbacks": "not counted",
}


def own_code_words(config: Config) -> dict[str, str]:
    """Returns text about how the plan counts the user's own code, by configuration key."""
    return {f"{key} ({target})": OWN_CODE_PLANNED[key.partition("[")[0]] for key, target in targets_of(config).items()}


def _stage(stages: Stages, stage: int) -> dict[str, Any]:
    layers = stages.layers[stage]
    rank = next(rank for rank, ids in enumerate(stages.placement) if stage in ids)
    return {
        "stage": stage,
        "pp_rank": rank,
        "first_layer": layers.start,
        "layers": len(layers),
        "forward_seconds": stages.elapsed(Action("F", stage, 0)).seconds,
        "backward_seconds": stages.elapsed(Action("B", stage, 0)).seconds,
    }


def verdict(plan: RunPlan) -> str:
    """Returns text about whether the run fits, and its free memory."""
    rank, memory = f"pipeline rank {plan.fullest.pp_rank}", gib(plan.memory_bytes)
    if plan.fits:
        return f"{plan.verdict}, with {room_words(plan.room_bytes, plan.memory_bytes)} of {memory} on {rank}"
    if plan.room_bytes >= 0:
        return f"{plan.verdict}, {_lacking_beside(plan)}"
    return f"{plan.verdict}, {gib(-plan.room_bytes)} over the {memory} of a device on {rank}"


def _lacking_beside(plan: RunPlan) -> str:
    """Returns text about a run that lacks host memory, room for in-memory copies, or disk space."""
    config = plan.config
    if over := copies_lacking(config, plan.ranks):
        folder, room = config.checkpoint.memory_folder, copies_memory(config) or 0
        cure = "checkpoint.memory_folder on a disk, checkpoint.every_memory=0, or hardware.shared_memory_bytes of a larger one"
        return f"{gib(over)} of copies in memory over the {gib(room)} that {folder} of a host holds ({cure})"
    host = host_memory(config)
    if host and plan.host_bytes > host:
        over = f"{gib(plan.host_bytes - host)} over the {gib(host)} that a host has for tensors"
        staged = max(rank.host_items.get("checkpoint", 0) for rank in plan.ranks)
        return f"{over} (checkpoint.staging_bytes less than {staged:.2g} takes less)" if staged else over
    disk = plan.disk
    cure = f"checkpoint.keep={disk.most_kept}" if disk.most_kept else "a larger disk"
    return f"{gib(disk.lacking)} over the {gib(disk.has)} of the disk (hardware.disk_bytes; {cure})"


def disk_words(plan: RunPlan) -> str:
    """Returns text about the run's disk usage."""
    disk, saves = plan.disk, plan.config.checkpoint
    rule = f"checkpoint.keep={saves.keep}"
    if saves.keep:
        rule += f", checkpoint.keep_every={saves.keep_every}" if saves.keep_every else ""
        rule += ", and the checkpoint that is being written"
    words = f"a checkpoint has {gib(disk.checkpoint)}; up to {disk.checkpoints} on the disk take {gib(disk.checkpoints * disk.checkpoint)} ({rule})"
    if disk.export:
        words += f"; an export has {gib(disk.export)}, with up to three on the disk"
    return f"{words}; {gib(disk.whole)} of {gib(disk.has)}" if disk.has else words


def reserve_words(reserve: dict[str, int]) -> str:
    """Returns text about the reserved device memory and its parts."""
    if len(reserve) < 2:
        return f"{gib(sum(reserve.values()))} reserved"
    parts = ", ".join(f"{name} {gib(size)}" for name, size in reserve.items() if size)
    return f"{gib(sum(reserve.values()))} reserved (estimate: {parts})"


def layout_words(plan: RunPlan) -> str:
    """Returns text about the layout, the micro-batches, recomputation and offloading."""
    config, parallel, count = plan.config, plan.config.parallel, micro_batches_of(plan.config)
    shared = f"cp {parallel.cp}, " if parallel.cp > 1 else ""
    again = ", ".join(config.model.recompute) or "nothing"
    away = f", on the host: {', '.join(config.model.offload)}" if config.model.offload else ""
    return (
        f"pp {parallel.pp} ({parallel.schedule_words}), dp {parallel.dp}, {shared}ep {parallel.ep} ({parallel.dispatch}, {parallel.wire}), "
        f"ZeRO {parallel.zero}, {count} micro-batch{'es' * (count > 1)} of {config.micro_batch_size}, recomputed: {again}{away}"
    )


def budget_words(budget: Budget, hardware: Hardware) -> str:
    """Returns text about time and cost of training on all tokens."""
    words = f"{amount(budget.tokens)} tokens in {length_of_run(budget.days)}: {amount(budget.gpu_hours)} device hours"
    if budget.cost is not None:
        words += (
            f", {amount(budget.cost)} {hardware.currency} at {hardware.price_per_hour:g} {hardware.currency} an hour"
        )
    if budget.energy_kwh is not None:
        words += f", {amount(budget.energy_kwh)} kWh"
    return f"{words} ({amount(budget.gpu_hours_per_trillion_tokens)} per trillion tokens)"


def failure_words(plan: RunPlan) -> str | None:
    """Returns text about failures, restart and checkpoint interval; None if not planned."""
    found, checkpoint, hardware = plan.failures, plan.config.checkpoint, plan.config.hardware
    if found is None:
        return None
    if checkpoint.every_memory:
        kept = f"copies in memory every {checkpoint.every_memory} steps"
    else:
        kept = f"a checkpoint every {checkpoint.every} steps" if checkpoint.every else "no checkpoint before the end"
    parts = ", ".join(f"{name.replace('_', '-')} {seconds(part)}" for name, part in found.restart_parts_seconds.items())
    words = f"one in {length_of_run(found.between_seconds / 86400)}, then {seconds(found.restart_seconds)} to the next step ({parts})"
    words += f"; with {kept}, {share(found.effective_share)} of the time trains"
    if plan.lasting is not plan.budget:
        words += f": {budget_words(plan.lasting, hardware)}"
    if found.best_steps is None or found.best_share is None:
        words += "; the time to write and load checkpoints is not counted, and no interval is advised: set hardware.storage_bandwidth"
    else:
        words += f"; the best interval is a checkpoint every {found.best_steps} steps: {share(found.best_share)}"
    spare = "1 spare node is" if found.spare_nodes == 1 else f"{found.spare_nodes} spare nodes are"
    return f"{words}; {spare} enough in 99 % of the time"


def interval_words(step: StepTime) -> str:
    """Returns text about expected ranges of the step time, if known."""
    words = []
    for kind, (least, most) in step.interval_seconds.items():
        one = step.intervals[kind]
        untimed = ", which no GPU has timed" if kind == OURS_UNTIMED else ""
        held = f"held for {100 * one.held:.0f} of 100 jobs{' of all kinds' if untimed else ''}"
        words.append(f"{seconds(least)} to {seconds(most)} with {kind}{untimed}: {held}")
    return f" ({'; '.join(words)})" if words else ""


def split_words(plan: RunPlan, split: FasterSplit | None) -> str | None:
    """Returns text about stage layers, imbalance and a faster split; None without a pipeline."""
    simulation, parallel = plan.step.simulation, plan.config.parallel
    if parallel.pp == 1:
        return None
    lengths = [len(one) for one in stage_layers(plan.config)]
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    counts = ", ".join(f"{number} x {length}" if number > 1 else str(length) for length, number in runs)
    rule = (
        "given" if isinstance(parallel.split, list) else f"by {parallel.split}" if parallel.split == "cost" else "even"
    )
    words = f"{counts} layers, {rule}"
    if simulation.imbalance >= 1.005:
        rank = simulation.busy.index(max(simulation.busy))
        words += f"; pipeline rank {rank} works {simulation.imbalance:.2f} times as long as the mean, and other ranks wait for it"
    if split is not None:
        faster = 100 * (1 - split.step_seconds / plan.step.step_seconds)
        room = room_words(split.room_bytes, plan.memory_bytes)
        words += f"; {faster:.1f} % faster, with {room}: parallel.split={as_typed(split.layers)}"
    return words
