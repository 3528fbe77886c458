"""mode=dashboard: builds a W&B workspace for a run, with the library wandb-workspaces.

It is written to dashboard.json in the run folder. With a W&B key, it is also saved at W&B, and its link is printed.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import EXIT_OK, UserError, first_line
from conf.files import atomic_write_text
from conf.schema import Config, Model
from conf.words import say, say_folded
from train.metrics.names import SCALARS, WANDB
from train.model.count import moe_layers
from train.show.wandb_sink import has_key, layer_key, place_at_wandb

DASHBOARD_FILE = "dashboard.json"


@dataclass(frozen=True)
class Panel:
    """A figure of curves, or a heat map of histograms."""

    title: str
    unit: str
    metrics: tuple[str, ...] = ()
    pattern: str = ""
    """Regular expression that matches whole metric names; used instead of `metrics`."""
    log: bool = False


SECTIONS = {
    "Loss": {
        "loss": "Loss of the next token: training, and held out",
        "mtp": "MTP, mean over depths",
        "mtp_depths": "MTP, depth by depth",
        "bits": "Held-out bits per byte",
        "grad_norm": "Gradient norm before clipping",
        "weight_norm": "Norm of the weights",
        "update_norm": "Norm of a step's weight changes",
        "lr": "Learning rate",
        "epochs": "Passes over the training text",
        "minimised": "Minimised loss: next token, weighted MTP and balance",
        "weights": "Weights of the other losses",
        "index_loss": "Loss of the indexers of sparse attention",
        "skipped": "Updates skipped",
        "scores": "Largest attention score, with optim.qk_clip",
        "clipped": "Heads with scores above optim.qk_clip",
    },
    "Balance of experts": {
        "load": "Experts by load, in fair shares (heat map)",
        "max_vio": "MaxVio: of each batch, and of the mean load of about 100 steps",
        "layer_max_vio": "MaxVio, layer by layer",
        "entropy": "Entropy of the load",
        "layer_entropy": "Entropy, layer by layer",
        "dead": "Dead experts",
        "bias": "Balance bias: smallest and largest",
        "bias_speed": "Speed of the bias",
    },
    "Speed": {
        "throughput": "Tokens per second",
        "mfu": "MFU: causal, and full attention",
        "peak": "Peak of a device, the base of MFU",
        "bubble": "Bubble of the pipeline",
        "passes": "Forward, backward, both together",
        "dispatch_wait": "All-to-all: time waited",
        "dispatch": "All-to-all: bytes inside and between nodes",
        "waits": "Waiting for data, and for checkpoints",
        "step": "Step, without validation and saving",
        "batch": "Batch",
        "compiled": "Kernels compiled after the second step",
    },
    "FP8": {
        "fp8_error": "Error of FP8 GEMMs against bf16",
        "fp8_flushed": "Values that became zero",
        "fp8_saturated": "Values that were clamped",
        "fp8_scale_range": "Range of scales in a tensor",
    },
    "Cluster": {
        "attempt": "Attempt",
        "nodes": "Nodes",
        "goodput": "Goodput: share of the time with training; effective: with steps that last, on all ranks; held: spares count too",
        "downtime": "Time without training",
        "lost": "What the lost time went into",
    },
    "Memory": {"memory": "Peak of the logging rank, and as planned"},
}
"""The panels of each section: panel key and title."""


def sections(model: Model) -> dict[str, tuple[Panel, ...]]:
    """Returns SECTIONS, and a load heat map for each MoE layer."""
    heat = (
        Panel(f"{layer}: experts by load", "experts", (f"layer_load/{layer_key(layer)}",))
        for layer in moe_layers(model)
    )
    known = {name: tuple(_panel(*panel) for panel in panels.items()) for name, panels in SECTIONS.items()}
    return known | {"Load, layer by layer": tuple(heat)}


def _panel(word: str, title: str) -> Panel:
    """Returns the panel with the key `word` and all its metrics."""
    shown = [metric for metric in (*SCALARS, *WANDB) if metric.panel == word]
    first, names = shown[0], tuple(metric.name for metric in shown)
    pattern = first.name.replace("_K", r"_\d+").replace("LAYER", ".+")
    if pattern != first.name:
        return Panel(title, first.unit, pattern=pattern)
    return Panel(title, first.unit, names, log=first.log)


def build_dashboard(config: Config) -> int:
    """Write dashboard.json, and save the workspace if there is a key."""
    folder = Path(config.runs) / config.name
    if not (folder / "config.yaml").is_file():
        raise UserError(
            "name", config.name, f"must be a run; there is none in {folder}", "train first, or give name=RUN"
        )
    import wandb  # imported here, because it takes a second

    wandb.setup(wandb.Settings(silent=True))
    online = has_key(wandb)
    place = place_at_wandb(folder)
    entity = place["entity"] or (_entity(wandb, config) if online else "")
    workspace = make_workspace(config, place["project"] or "", entity)
    atomic_write_text(folder / DASHBOARD_FILE, json.dumps(specification(workspace), indent=1) + "\n")
    say(f"the workspace's definition: {folder / DASHBOARD_FILE}")
    if not online:
        say_folded(
            "no W&B key on this machine, so nothing was sent. To get the workspace: `wandb login`, then the same command "
            f"again;\nan offline run is sent by `wandb sync {folder / 'wandb'}/offline-run-*`",
            2,
        )
        return EXIT_OK
    try:
        workspace.save()
    except Exception as error:  # the library can raise any exception of its HTTP client
        raise _no_answer(config, error) from error
    say(f"the workspace: {workspace.url}")
    return EXIT_OK


def make_workspace(config: Config, project: str, entity: str) -> Any:
    """Returns a workspace for this run. entity: W&B user or team."""
    from wandb_workspaces import workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Sluice: {config.name}",
        sections=[
            ws.Section(name=name, panels=list(_plots(panels)), is_open=name in SECTIONS)
            for name, panels in sections(config.model).items()
        ],
        runset_settings=ws.RunsetSettings(filters=ws.And(ws.Metric("Name") == config.name)),
    )


def _plots(panels: Iterable[Panel]) -> Iterable[Any]:
    from wandb_workspaces.reports.v2 import LinePlot

    for panel in panels:
        yield LinePlot(
            title=panel.title,
            y=list(panel.metrics),
            metric_regex=f"^{panel.pattern}$" if panel.pattern else None,
            title_y=panel.unit,
            log_y=panel.log or None,
        )


def specification(workspace: Any) -> dict[str, Any]:
    """Returns a workspace's definition in the form that W&B stores."""
    return workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)["spec"]


def _entity(wandb: Any, config: Config) -> str:
    try:
        return wandb.Api(timeout=10).default_entity
    except Exception as error:  # the library can raise any exception of its HTTP client
        raise _no_answer(config, error) from error


def _no_answer(config: Config, error: Exception) -> UserError:
    line = first_line(error)
    return UserError("name", config.name, f"the W&B server took no workspace: {line}", "try again later")
