"""Defines the table of metrics: names in metrics.jsonl, units, meanings, conditions, W&B panels, report curves.

A line of metrics.jsonl is one JSON object. Scalars are first, in the order of the table, then events, then layer
values. A reader that needs no layer values may stop at LAYERS_MARK. A missing metric was not measured in this step;
null means a non-finite number.

MoE layers have the names of their parameters: `layers.3` in the main model, `mtp.0` for the first MTP module. W&B gets
the scalars, and the layer values that WANDB lists, with names such as `layers_3`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

Record = dict[str, Any]
"""Metrics of one step by name: number, event or {layer name: values}."""


# The palette of Okabe and Ito, for people with any colour vision.
BLUE, ORANGE, GREEN, SKY, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#666666"


class Curve(NamedTuple):
    """A curve in report.html. figure: key of the figure. scale: factor for the values."""

    figure: str
    label: str
    colour: str
    scale: float = 1.0
    markers: bool = False
    dash: str = "solid"
    smooth: bool = False
    """Whether the curve is drawn pale, with a moving average."""


@dataclass(frozen=True)
class Metric:
    name: str
    type: type
    unit: str
    meaning: str
    when: str = ""
    """Condition under which a step has the metric; empty: every step."""
    panel: str = ""
    """Key of the metric's W&B panel (SECTIONS in train/show/dashboard.py)."""
    curve: Curve | None = None
    """Appearance in report.html; None: no curve."""
    log: bool = False
    """Whether the y axis of the metric's W&B panel is logarithmic."""


FP8_READINGS = (
    ("flushed", "share", "values that the cast rounded to zero"),
    ("saturated", "share", "values that the cast clamped"),
    ("scale_range", "log2", "ratio of the largest to the smallest scale of a tensor"),
)
CLUSTER_WHEN = "cluster=ray"
NORMS_WHEN = "every log.norms_every steps"
QK_WHEN = "optim.qk_clip"
PLAN_WHEN = "after mode=plan of the same name and recipe"
PLAN_HERE = "after mode=plan of the same name and recipe, for this device"
FP8_WHEN = "precision=fp8, fp8_ue8m0 or mxfp8, every precision.fp8.health.every steps"
SCALARS = (
    Metric("step", int, "steps", "completed optimizer steps, including this one"),
    Metric("tokens", int, "tokens", "tokens consumed since the start of the run"),
    Metric("samples", int, "sequences", "sequences consumed since the start of the run"),
    Metric(
        "epochs",
        float,
        "1",
        "passes over the training text so far; for a mix, of the source with the most passes",
        panel="epochs",
    ),
    Metric(
        "loss",
        float,
        "nats per token",
        "the minimised sum: main_loss + mtp_weight x mtp_loss + extra_loss + balance_loss + index_loss; no measure of quality, because the weights of the terms change",
        panel="minimised",
    ),
    Metric(
        "main_loss",
        float,
        "nats per token",
        "cross-entropy of the next token: the displayed loss, comparable with validation_loss",
        panel="loss",
        curve=Curve("loss", "training: next token", BLUE, smooth=True),
    ),
    Metric(
        "mtp_loss",
        float,
        "nats per token",
        "cross-entropy of the MTP modules, mean over depths, unweighted",
        "model.mtp_depth > 0",
        panel="mtp",
        curve=Curve("loss", "training: token after next (MTP)", PURPLE, dash="dot", smooth=True),
    ),
    Metric(
        "mtp_loss_K", float, "nats per token", "mtp_loss of depth K, from 1", "model.mtp_depth > 1", panel="mtp_depths"
    ),
    Metric(
        "extra_loss",
        float,
        "1",
        "the custom loss term, as added to the loss",
        "optim.extra_loss",
        panel="weights",
    ),
    Metric(
        "index_loss",
        float,
        "nats",
        "KL divergence of the indexers' choice from the attention, a mean over queries, weighted, summed over layers",
        "model.sparse.heads > 0",
        panel="index_loss",
    ),
    Metric("balance_loss", float, "1", "sequence-wise balance loss, weighted, summed over MoE layers", panel="weights"),
    Metric(
        "grad_norm",
        float,
        "1",
        "global gradient norm before clipping",
        panel="grad_norm",
        curve=Curve("grad_norm", "before clipping", BLUE, smooth=True),
        log=True,
    ),
    Metric(
        "weight_norm",
        float,
        "1",
        "root of the sum of squares of all master weights, after the step",
        NORMS_WHEN,
        panel="weight_norm",
    ),
    Metric(
        "update_norm",
        float,
        "1",
        "root of the sum of squares of the step's changes of all master weights",
        NORMS_WHEN,
        panel="update_norm",
        log=True,
    ),
    Metric("lr", float, "1", "learning rate", panel="lr", curve=Curve("lr", "learning rate", BLUE)),
    Metric("mtp_weight", float, "1", "weight lambda of the MTP loss", panel="weights"),
    Metric("bias_speed", float, "1 per step", "speed gamma of the balance bias", panel="bias_speed"),
    Metric("batch_size", int, "sequences", "sequences in this step, over all ranks", panel="batch"),
    Metric(
        "tokens_per_second",
        float,
        "tokens/s",
        "tokens of this step over step_seconds, all ranks together",
        panel="throughput",
        curve=Curve("throughput", "tokens per second", GREEN, smooth=True),
    ),
    Metric(
        "mfu",
        float,
        "share",
        "model FLOP/s over peak; causal attention, MTP not counted, as the paper counts",
        panel="mfu",
        curve=Curve("mfu", "causal attention counted", GREEN, 100.0, smooth=True),
    ),
    Metric(
        "mfu_full",
        float,
        "share",
        "mfu, with attention counted as not causal",
        panel="mfu",
        curve=Curve("mfu", "full attention counted", GREY, 100.0, dash="dot", smooth=True),
    ),
    Metric(
        "peak_flops", float, "FLOP/s", "peak of one rank's device, on which the two MFU figures are based", panel="peak"
    ),
    Metric(
        "step_seconds",
        float,
        "s",
        "wall time of the step, without validation and saving",
        panel="step",
        curve=Curve("times", "whole step", BLUE, smooth=True),
    ),
    Metric(
        "step_predicted_seconds",
        float,
        "s",
        "step_seconds as predicted by mode=plan, for a step with the full batch",
        PLAN_HERE,
        panel="step",
    ),
    Metric(
        "bubble_share",
        float,
        "share",
        "1 - busy / span of a rank's own forward and backward, mean over ranks",
        "parallel.pp > 1",
        panel="bubble",
        curve=Curve("bubble", "waiting for other ranks", ORANGE, 100.0, smooth=True),
    ),
    Metric(
        "forward_seconds",
        float,
        "s",
        "forward passes alone, mean over ranks",
        panel="passes",
        curve=Curve("times", "forward passes", SKY, smooth=True),
    ),
    Metric(
        "backward_seconds",
        float,
        "s",
        "backward passes alone, of inputs and of weights, mean over ranks",
        panel="passes",
        curve=Curve("times", "backward passes", GREEN, smooth=True),
    ),
    Metric(
        "overlapped_seconds",
        float,
        "s",
        "overlapped forward and backward passes (dualpipev), mean over ranks",
        "parallel.schedule=dualpipev",
        panel="passes",
        curve=Curve("times", "both passes at once", GREY, smooth=True),
    ),
    Metric(
        "dispatch_bytes_inside",
        int,
        "bytes",
        "bytes sent to experts and back inside nodes, over all ranks",
        "parallel.ep > 1",
        panel="dispatch",
        curve=Curve("dispatch", "inside nodes", SKY, 1 / 2**20),
    ),
    Metric(
        "dispatch_bytes_across",
        int,
        "bytes",
        "bytes sent to experts and back between nodes, over all ranks",
        "parallel.ep > 1",
        panel="dispatch",
        curve=Curve("dispatch", "between nodes", ORANGE, 1 / 2**20),
    ),
    Metric(
        "dispatch_wait_seconds",
        float,
        "s",
        "host time spent waiting for those transfers, mean over ranks",
        "parallel.ep > 1",
        panel="dispatch_wait",
    ),
    Metric(
        "data_wait_seconds",
        float,
        "s",
        "part of step_seconds spent waiting for data",
        panel="waits",
        curve=Curve("times", "waiting for data", ORANGE, smooth=True),
    ),
    Metric(
        "checkpoint_stall_seconds",
        float,
        "s",
        "time after the step spent waiting for a checkpoint",
        panel="waits",
        curve=Curve("times", "waiting for a checkpoint", PURPLE),
    ),
    Metric(
        "memory_bytes",
        int,
        "bytes",
        "peak CUDA memory of the logging rank; on a CPU its peak resident memory",
        panel="memory",
        curve=Curve("memory", "peak memory", SKY, 1 / 2**30),
    ),
    Metric(
        "kernels_compiled",
        int,
        "kernels",
        "Triton kernels that the logging rank compiled since the second step of this start; each compilation delays its step",
        "on GPUs",
        panel="compiled",
    ),
    Metric(
        "memory_predicted_bytes",
        int,
        "bytes",
        "peak device memory of that rank as predicted by mode=plan",
        PLAN_WHEN,
        panel="memory",
        curve=Curve("memory", "predicted by mode=plan", GREY, 1 / 2**30),
    ),
    Metric(
        "skipped_steps",
        int,
        "steps",
        "updates skipped so far because the loss or a gradient was not finite",
        panel="skipped",
        curve=Curve("skipped", "skipped so far", ORANGE),
    ),
    Metric(
        "max_vio",
        float,
        "1",
        "MaxVio of this batch: (busiest expert - mean) / mean, mean over MoE layers",
        panel="max_vio",
        curve=Curve("imbalance", "of each batch", SKY),
    ),
    Metric(
        "max_vio_running",
        float,
        "1",
        "MaxVio of the mean load of about the last 100 steps; lower than the mean of max_vio, because random differences average out",
        panel="max_vio",
        curve=Curve("imbalance", "of the mean load of about 100 steps", BLUE),
    ),
    Metric(
        "load_entropy",
        float,
        "1",
        "entropy of the load over log(experts), mean over MoE layers; 1 is even",
        panel="entropy",
    ),
    Metric(
        "dead_experts",
        int,
        "experts",
        "experts without a token in the last 20 steps, over all MoE layers",
        panel="dead",
        curve=Curve("dead", "dead experts", PURPLE),
    ),
    Metric(
        "bias_min",
        float,
        "1",
        "smallest balance bias that the step used",
        panel="bias",
        curve=Curve("bias", "smallest", BLUE),
    ),
    Metric(
        "bias_max",
        float,
        "1",
        "largest balance bias that the step used",
        panel="bias",
        curve=Curve("bias", "largest", ORANGE),
    ),
    Metric(
        "attention_score_max",
        float,
        "1",
        "largest attention score of the step; for a kernel without this value and below the limit, the log-sum-exp, an upper bound",
        QK_WHEN,
        panel="scores",
    ),
    Metric(
        "heads_clipped", int, "heads", "heads of all layers with a score above optim.qk_clip", QK_WHEN, panel="clipped"
    ),
    Metric(
        "validation_loss",
        float,
        "nats per token",
        "main loss on held-out data",
        "at the end, and every log.validate_every steps",
        panel="loss",
        curve=Curve("loss", "held-out: next token", ORANGE, markers=True),
    ),
    Metric(
        "validation_bits_per_byte",
        float,
        "bits per byte",
        "held-out loss per byte of text, whatever the tokenizer",
        "with validation_loss",
        panel="bits",
    ),
    *(
        Metric(
            f"fp8_{subject}_{name}",
            float,
            unit,
            f"{meaning}, worst layer",
            FP8_WHEN,
            panel=f"fp8_{name}",
            curve=Curve("fp8-flushed", f"{subject}s", colour, 100, True) if name == "flushed" else None,
        )
        for subject, colour in (("activation", BLUE), ("weight", GREEN), ("gradient", ORANGE))
        for name, unit, meaning in FP8_READINGS
    ),
    *(
        Metric(
            f"fp8_{matmul}_error",
            float,
            "share",
            f"error of {matmul} against bf16 operands, worst layer",
            FP8_WHEN,
            panel="fp8_error",
            curve=Curve("fp8-error", label, colour, 100, True),
        )
        for matmul, label, colour in (("fprop", "forward", BLUE), ("dgrad", "input gradient", ORANGE))
    ),
    Metric(
        "cluster/attempt",
        int,
        "attempts",
        "starts of the ranks so far, including this one",
        CLUSTER_WHEN,
        panel="attempt",
    ),
    Metric("cluster/nodes", int, "nodes", "number of nodes with ranks", CLUSTER_WHEN, panel="nodes"),
    Metric(
        "cluster/goodput",
        float,
        "share",
        "fraction of the time since the start spent in training",
        CLUSTER_WHEN,
        panel="goodput",
    ),
    Metric(
        "cluster/effective",
        float,
        "share",
        "fraction of that time spent in steps that were not repeated, scaled by the fraction of the wanted ranks",
        CLUSTER_WHEN,
        panel="goodput",
    ),
    Metric(
        "cluster/effective_held",
        float,
        "share",
        "effective_time, relative to the time of all nodes of the run, with spares",
        CLUSTER_WHEN,
        panel="goodput",
    ),
    Metric(
        "cluster/downtime_seconds",
        float,
        "s",
        "time so far without training, including starts",
        CLUSTER_WHEN,
        panel="downtime",
    ),
    *(
        Metric(f"cluster/{part}_seconds", float, "s", f"time so far: {meaning}", CLUSTER_WHEN, panel="lost")
        for part, meaning in (
            ("again", "repeated steps"),
            ("start", "starts, until the first step"),
            ("detection", "from the last progress to the named cause of a failure"),
            ("restart", "from the named cause to the next step"),
            ("waiting", "waiting for nodes"),
        )
    ),
    Metric("time", float, "s", "Unix time at the end of the step"),
)

EVENTS = (
    Metric(
        "resumed",
        dict,
        "event",
        "step and checkpoint from which this attempt resumed; changed settings, old and new; whether "
        "all changes are known; facts; again, until: steps that are repeated, and the Unix time of the last of them",
        "the first step after a resume, or after a start that repeats steps",
    ),
)
"""The events: metrics whose value is an object."""

LAYERS = (
    Metric("layer_max_vio", float, "1", "max_vio of each MoE layer"),
    Metric("layer_entropy", float, "1", "load_entropy of each MoE layer"),
    Metric("layer_dead_experts", int, "experts", "dead_experts of each MoE layer"),
    Metric("layer_bias", list, "1", "smallest and largest balance bias of each MoE layer"),
    Metric("load", list, "tokens", "tokens routed to each expert of each MoE layer in this batch"),
    Metric(
        "layer_weight_norm",
        float,
        "1",
        "weight_norm of each layer, the embedding, the head and the last norm",
        NORMS_WHEN,
    ),
    Metric(
        "layer_update_norm",
        float,
        "1",
        "update_norm of each layer, the embedding, the head and the last norm",
        NORMS_WHEN,
    ),
    *(
        Metric(f"layer_{metric.name}", dict, metric.unit, f"{metric.name} of each layer with FP8 GEMMs", FP8_WHEN)
        for metric in SCALARS
        if metric.name.startswith("fp8_")
    ),
)

WANDB = (
    Metric("layer_max_vio/LAYER", float, "1", "max_vio of a MoE layer", panel="layer_max_vio"),
    Metric("layer_entropy/LAYER", float, "1", "load_entropy of a MoE layer", panel="layer_entropy"),
    Metric("load", list, "experts", "histogram of all experts by load, in units of the mean load", panel="load"),
    Metric("layer_load/LAYER", list, "experts", "layer_load of one MoE layer", "every LAYER_LOAD_EVERY steps"),
)
"""The layer metrics that are sent to W&B."""
LAYER_LOAD_EVERY = 10
"""Interval, in steps, of the histograms of single layers."""

LAYERS_MARK = b',"layer_max_vio":'
"""Marks the end of the scalars and events in a line."""

_ORDER = [metric.name for metric in SCALARS + EVENTS + LAYERS]


def table_name(name: str) -> str:
    """Returns a metric's name in the table of metrics: mtp_loss_K for `mtp_loss_2`, layer_max_vio/LAYER for W&B's
    `layer_max_vio/mtp_0`."""
    base, _, depth = name.rpartition("_")
    if base == "mtp_loss" and depth.isdecimal():
        return "mtp_loss_K"
    kind, slash, _ = name.partition("/")
    return f"{kind}/LAYER" if slash and kind != "cluster" else name


def order(name: str) -> tuple[int, int]:
    """Returns a sort key: the metric's position in a line."""
    row = table_name(name)
    assert row in _ORDER, f"metric {name!r} is missing from train/metrics/names.py"
    return _ORDER.index(row), int(name.rpartition("_")[2]) if row == "mtp_loss_K" else 0


def is_event(name: str) -> bool:
    """Whether the metric is an event, with an object as value."""
    return any(metric.name == name for metric in EVENTS)


def is_layer_metric(name: str) -> bool:
    """Whether the metric has a value for each layer."""
    return any(metric.name == name for metric in LAYERS)
