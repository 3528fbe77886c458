"""Compares the predictions of mode=plan with the measurements of a run.

plan.json must be for the run's recipe. Step time is compared only if the plan is for the device that trains.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.files import read_plain_json
from conf.schema import Config
from train.kernels.cpu.processor import cpu_name
from train.metrics.names import Record
from train.metrics.origin import ran_on_gpu
from train.metrics.quantities import error, gib, seconds, share
from train.show.series import Series, last, median

PLAN_FILE = "plan.json"
ACTION_SUMS = {
    "forward passes": (("F",), "forward_seconds"),
    "backward passes": (("B", "I", "W"), "backward_seconds"),
    "overlapped pairs": (("FB",), "overlapped_seconds"),
}
"""Maps each compared sum of times to the kinds of pipeline actions in the sum, and to the metric that measures it."""


def recipe_of(config: Config) -> dict[str, Any]:
    """Returns the settings that must be equal in a plan and in a run, if the plan is compared with the run."""
    found = {
        "parallel": asdict(config.parallel),
        "model": asdict(config.model),
        "precision": config.precision.name,
        "moments": config.precision.moments,
        "seq_len": config.seq_len,
        "batch_size": config.batch_size,
        "micro_batch_size": config.micro_batch_size,
    }
    return json.loads(json.dumps(found))


def planned(config: Config, run_folder: Path) -> Record:
    """Returns the predictions for the logging rank; empty without a plan."""
    plan = _read(run_folder)
    if plan is None or plan.get("recipe") != recipe_of(config):
        return {}
    found: Record = {"memory_predicted_bytes": plan["peak"]}
    if _is_here(plan, config):
        found["step_predicted_seconds"] = plan["step_seconds"]
    return found


def _read(run_folder: Path) -> dict[str, Any] | None:
    path = run_folder / PLAN_FILE
    try:
        if not path.is_file():
            return None
        plan = read_plain_json(path)
        return plan | {"peak": next(rank["peak_bytes"] for rank in plan["ranks"] if rank["pp_rank"] == 0)}
    except (ValueError, TypeError, KeyError, StopIteration, RecursionError) as error:
        rule = f"is not a plan of mode=plan: {type(error).__name__}: {error}"
        raise UserError(PLAN_FILE, path, rule, "remove it, or write a new plan with mode=plan") from error


def _is_here(plan: dict[str, Any], config: Config) -> bool:
    """Whether the plan was made for the device of this process.

    CUDA's name of a GPU must contain the device name in the plan. A CPU must have the name and the number of threads in
    the plan.
    """
    import torch  # imported here, because a report needs no torch

    if config.cluster.device != "cpu" and torch.cuda.is_available():
        return plan["device"] in torch.cuda.get_device_name()
    return plan["device"] == cpu_name() and plan.get("threads") == torch.get_num_threads()


PlanRow = tuple[str, str, str, str]
"""A table row: quantity, planned value, measured value, error."""


def plan_rows(run_folder: Path, series: Series) -> list[PlanRow]:
    """Returns a row per planned quantity; empty without a plan."""
    plan, predicted = _read(run_folder), last(series, "memory_predicted_bytes")
    if plan is None or predicted != plan["peak"]:
        return []
    rows = [_memory(plan, series, ran_on_gpu(run_folder))]
    if not series.has("step_predicted_seconds"):
        return rows
    rows.append(_row("step", plan["step_seconds"], median(series, "step_seconds")))
    for name, (kinds, metric) in ACTION_SUMS.items():
        if series.has(metric):
            rows.append(
                _row(name, sum(plan["action_seconds"].get(kind, 0.0) for kind in kinds), median(series, metric))
            )
    if series.has("bubble_share"):
        bubble = median(series, "bubble_share")
        rows.append(("bubble", share(plan["bubble_share"]), share(bubble), _points(plan["bubble_share"] - bubble)))
    return rows


def _memory(plan: dict[str, Any], series: Series, gpu: bool) -> PlanRow:
    peak, measured = plan["peak"], max(series.finite("memory_bytes"), default=0.0)
    if (
        plan["on_cpu"] or not gpu
    ):  # a run on a CPU measures only the memory of the process; mode=dry_run measures tensors
        return "memory of tensors", gib(peak), f"{gib(measured)} of the whole process", ""
    return "peak memory", gib(peak), gib(measured), error(peak, measured)


def _row(name: str, planned: float, measured: float) -> PlanRow:
    return name, seconds(planned), seconds(measured), error(planned, measured)


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"


def plan_words(rows: list[PlanRow]) -> str:
    """Returns the rows as one sentence for the terminal."""
    return "; ".join(
        f"{what} {measured}, planned {planned}" + (f" ({off})" if off else "") for what, planned, measured, off in rows
    )
