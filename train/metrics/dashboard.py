"""A W&B workspace that shows a run, built by the library wandb-workspaces: `mode=dashboard`.

What to show is plain data, SECTIONS below; the names are those of names.py. With a key the workspace is saved and its link
printed; in any case its definition lies in dashboard.json of the run's folder, so that one can see it without an account.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import EXIT_OK, UserError
from conf.files import atomic_write_text
from conf.schema import Config, Model
from conf.words import say
from train.metrics.wandb_sink import has_key, layer_key
from train.model.count import moe_layers

DASHBOARD_FILE = "dashboard.json"


@dataclass(frozen=True)
class Panel:
    """Curves over the steps; a metric that is a histogram becomes a heat map."""

    title: str
    unit: str
    metrics: tuple[str, ...] = ()
    pattern: str = ""
    """Instead of metrics: a regular expression that whole names match."""
    log: bool = False


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Loss": (
        Panel("Loss of the next token: training, and held out", "nats per token", ("main_loss", "validation_loss")),
        Panel("MTP, mean over depths", "nats per token", ("mtp_loss",)),
        Panel("MTP, depth by depth", "nats per token", pattern=r"mtp_loss_\d+"),
        Panel("Held-out bits per byte", "bits per byte", ("validation_bits_per_byte",)),
        Panel("Gradient norm before clipping", "1", ("grad_norm",), log=True),
        Panel("Learning rate", "1", ("lr",)),
        Panel("How often the training text has been read", "1", ("epochs",)),
        Panel("What is minimised: next token, weighted MTP and balance", "nats per token", ("loss",)),
        Panel("Weights of the other losses", "1", ("mtp_weight", "balance_loss")),
        Panel("Updates skipped", "steps", ("skipped_steps",)),
        Panel("Largest attention score, where optim.qk_clip watches them", "1", ("attention_score_max",)),
        Panel("Heads whose scores were above optim.qk_clip", "heads", ("heads_clipped",)),
    ),
    "Balance of experts": (
        Panel("Experts by load, in fair shares (heat map)", "experts", ("load",)),
        Panel("MaxVio: of each batch, and of the mean load of about 100 steps", "1", ("max_vio", "max_vio_running")),
        Panel("MaxVio, layer by layer", "1", pattern=r"layer_max_vio/.+"),
        Panel("Entropy of the load", "1", ("load_entropy",)),
        Panel("Entropy, layer by layer", "1", pattern=r"layer_entropy/.+"),
        Panel("Dead experts", "experts", ("dead_experts",)),
        Panel("Balance bias: smallest and largest", "1", ("bias_min", "bias_max")),
        Panel("Speed of the bias", "1 per step", ("bias_speed",)),
    ),
    "Speed": (
        Panel("Tokens per second", "tokens/s", ("tokens_per_second",)),
        Panel("MFU: causal, and full attention", "share", ("mfu", "mfu_full")),
        Panel("Peak of a device that MFU is counted against", "FLOP/s", ("peak_flops",)),
        Panel("Bubble of the pipeline", "share", ("bubble_share",)),
        Panel("Forward, backward, both together", "s", ("forward_seconds", "backward_seconds", "overlapped_seconds")),
        Panel("All-to-all: time waited", "s", ("dispatch_wait_seconds",)),
        Panel("All-to-all: bytes inside nodes and across", "bytes", ("dispatch_bytes_inside", "dispatch_bytes_across")),
        Panel("Waiting for data, and for checkpoints", "s", ("data_wait_seconds", "checkpoint_stall_seconds")),
        Panel("Step, without validation and saving", "s", ("step_seconds", "step_predicted_seconds")),
        Panel("Batch", "sequences", ("batch_size",)),
    ),
    "FP8": (
        Panel("Error of products against bf16", "share", ("fp8_fprop_error", "fp8_dgrad_error")),
        Panel(
            "Values that became zero",
            "share",
            ("fp8_activation_flushed", "fp8_weight_flushed", "fp8_gradient_flushed"),
        ),
        Panel(
            "Values that were clamped",
            "share",
            ("fp8_activation_saturated", "fp8_weight_saturated", "fp8_gradient_saturated"),
        ),
        Panel(
            "Range of scales in a tensor",
            "log2",
            ("fp8_activation_scale_range", "fp8_weight_scale_range", "fp8_gradient_scale_range"),
        ),
    ),
    "Cluster": (
        Panel("Attempt", "attempts", ("cluster/attempt",)),
        Panel("Nodes", "nodes", ("cluster/nodes",)),
        Panel("Goodput: share of the time with training", "share", ("cluster/goodput",)),
        Panel("Time without training", "s", ("cluster/downtime_seconds",)),
    ),
    "Memory": (Panel("Peak of the logging rank, and as planned", "bytes", ("memory_bytes", "memory_predicted_bytes")),),
}


def sections(model: Model) -> dict[str, tuple[Panel, ...]]:
    """All sections for a model: SECTIONS, and a heat map of the load of each MoE layer."""
    heat = (
        Panel(f"{layer}: experts by load", "experts", (f"layer_load/{layer_key(layer)}",))
        for layer in moe_layers(model)
    )
    return SECTIONS | {"Load, layer by layer": tuple(heat)}


def build_dashboard(config: Config) -> int:
    """Write dashboard.json, and with a key save the workspace; says where either is. Returns the exit code."""
    folder = Path(config.runs) / config.name
    if not (folder / "config.yaml").is_file():
        raise UserError(
            "name", config.name, f"must be a run; there is none in {folder}", "train first, or give name=RUN"
        )
    import wandb  # takes a second

    wandb.setup(wandb.Settings(silent=True))
    online = has_key(wandb)
    entity = config.log.wandb_entity or (_entity(wandb, config) if online else "")
    workspace = make_workspace(config, entity)
    atomic_write_text(folder / DASHBOARD_FILE, json.dumps(specification(workspace), indent=1) + "\n")
    say(f"the workspace's definition: {folder / DASHBOARD_FILE}")
    if not online:
        say(
            "no W&B key on this machine, so nothing was sent. To get the workspace: `wandb login`, then the same command "
            f"again;\nan offline run is sent by `wandb sync {folder / 'wandb'}/offline-run-*`"
        )
        return EXIT_OK
    try:
        workspace.save()
    except Exception as error:  # the library passes on whatever its transport raises
        raise _no_answer(config, error) from error
    say(f"the workspace: {workspace.url}")
    return EXIT_OK


def make_workspace(config: Config, entity: str) -> Any:
    """The workspace of the run's project that shows this run alone. entity: the W&B user or team."""
    from wandb_workspaces import workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=config.log.wandb_project,
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
    """What W&B stores of a workspace."""
    return workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)["spec"]


def _entity(wandb: Any, config: Config) -> str:
    try:
        return wandb.Api(timeout=10).default_entity
    except Exception as error:  # as above
        raise _no_answer(config, error) from error


def _no_answer(config: Config, error: Exception) -> UserError:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        "log.wandb_project", config.log.wandb_project, f"the W&B server took no workspace: {line}", "try again later"
    )
