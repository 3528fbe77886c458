"""What W&B gets beside the records of steps: axes and minima, checkpoints, tables, alerts.

Each is a function of the module wandb, the run and the newest step that was logged, for WandbSink.write. A table is logged one step later,
as W&B takes no second row of a step; a run that goes on has its own row of that step in another file.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from conf.words import harmless, one_line

Item = Callable[[ModuleType, Any, int], None]

OVER_TOKENS = ("main_loss", "mtp_loss", "mtp_loss_*", "balance_loss")
"""Curves that W&B draws over the tokens trained, so that runs with different batches can be compared."""
WITH_MINIMUM = ("validation_loss", "validation_bits_per_byte")
"""Curves over the tokens trained of which W&B's summary has the smallest value, as NAME.min, beside the newest one,
NAME.last."""
FILES = 1_000_000
"""Files of a checkpoint, at most: two and more for each rank."""
FIGURES = ("sequences", "tokens", "text_bytes", "loss", "perplexity", "bits_per_byte")


def define_metrics(run: Any) -> None:
    """Say which axis and which summary a metric has."""
    # Of a run W&B shows the last value of each name. What is minimised moves with the weights of its parts: it has curves alone.
    run.define_metric("loss", hidden=True, summary="none", step_metric="tokens")
    for name in OVER_TOKENS:
        run.define_metric(name, step_metric="tokens")
    for name in WITH_MINIMUM:
        run.define_metric(name, step_metric="tokens", summary="min,last")


def checkpoint(step: int, path: Path) -> Item:
    """A reference to the checkpoint's files: nothing is read or sent but their names and sizes."""

    def log(wandb: ModuleType, run: Any, _: int) -> None:
        about = {"step": step, "path": str(path), "host": socket.gethostname()}
        artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata=about)
        artifact.add_reference(path.absolute().as_uri(), checksum=False, max_objects=FILES)
        run.log_artifact(artifact, aliases=[path.name])

    return log


def sample_table(step: int, text: str) -> Item:
    """What the model wrote, as the table `samples`."""

    def log(wandb: ModuleType, run: Any, logged: int) -> None:
        run.log({"samples": wandb.Table(columns=["step", "text"], data=[[step, text]])}, step=logged + 1)

    return log


def evaluation_tables(found: dict[str, Any]) -> Item:
    """An evaluation, as evaluate.json has it: the tables `evaluations` and `evaluated_positions`, and of what else was asked for,
    `evaluated_needle` and `evaluated_tasks`.
    """

    def log(wandb: ModuleType, run: Any, logged: int) -> None:
        head = [found["step"], found["checkpoint"], found["weights"]]
        rows = [[*head, row["name"], row["documents"], *(row[name] for name in FIGURES)] for row in found["sources"]]
        if len(rows) > 1:
            rows.append([*head, "together", "", *(found["total"][name] for name in FIGURES)])
        columns = ["step", "checkpoint", "weights", "source", "documents", *FIGURES]
        tables = {"evaluations": wandb.Table(columns=columns, data=rows)}
        for table, objects in (("positions", found["total"]["positions"]), ("needle", found["needle"])):
            if objects:
                data = [[found["step"], *each.values()] for each in objects]
                tables[f"evaluated_{table}"] = wandb.Table(columns=["step", *objects[0]], data=data)
        tasks = [[found["step"], task, *pair] for task, metrics in found["tasks"].items() for pair in metrics.items()]
        if tasks:
            tables["evaluated_tasks"] = wandb.Table(columns=["step", "task", "metric", "value"], data=tasks)
        run.log(tables, step=logged + 1)

    return log


def alert(title: str, text: str) -> Item:
    """A message, which W&B sends on as the account says."""

    def send(wandb: ModuleType, run: Any, _: int) -> None:
        run.alert(title=one_line(title), text=harmless(text), level=wandb.AlertLevel.WARN)

    return send
