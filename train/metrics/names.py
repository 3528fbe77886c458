"""The one table of metric names: what a line of metrics.jsonl may hold, in which unit, meaning what, and when.

A line is one JSON object. Its scalars come first, in the order of the table, then events, then the values per MoE layer, so that a
reader of a long file can cut a line at LAYERS_MARK and parse the head alone. An absent key was not measured in
that step; null means that the number was not finite (NaN is no JSON).

MoE layers are named as their parameters are: `layers.3` in the main model, `mtp.0` for the first MTP module. W&B gets the
scalars by the same names, and of the values per layer what WANDB lists; there a layer is spelled `layers_3`.
"""

from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
"""One step: metric name -> number, or for layer metrics -> {layer name: number or list}, or for an event an object."""


@dataclass(frozen=True)
class Metric:
    name: str
    type: type
    unit: str
    meaning: str
    when: str = ""
    """What it takes to be measured; empty where every step has it."""


FP8_READINGS = (
    ("flushed", "share", "values that the cast made zero"),
    ("saturated", "share", "values that the cast clamped"),
    ("scale_range", "log2", "largest over smallest scale of a tensor"),
)
CLUSTER_WHEN = "cluster=ray"
QK_WHEN = "optim.qk_clip"
PLAN_WHEN = "after mode=plan of the same name and recipe"
PLAN_HERE = "after mode=plan of the same name and recipe, for this very device"
FP8_WHEN = "precision=fp8 or fp8_ue8m0, every precision.fp8.health.every steps"
SCALARS = (
    Metric("step", int, "steps", "optimizer steps done, this one included"),
    Metric("tokens", int, "tokens", "tokens consumed since the start of the run"),
    Metric("samples", int, "sequences", "sequences consumed since the start of the run"),
    Metric(
        "epochs", float, "1", "how often the training text has been read; of a mix, the source that was read most often"
    ),
    Metric(
        "loss",
        float,
        "nats per token",
        "what is minimised: main_loss + mtp_weight x mtp_loss + balance_loss; no measure of quality, as the weights change",
    ),
    Metric(
        "main_loss",
        float,
        "nats per token",
        "cross-entropy of the next token: the loss that is shown, to be set beside validation_loss",
    ),
    Metric(
        "mtp_loss",
        float,
        "nats per token",
        "cross-entropy of the MTP modules, mean over depths, unweighted",
        "model.mtp_depth > 0",
    ),
    Metric("mtp_loss_K", float, "nats per token", "the same of depth K, from 1", "model.mtp_depth > 1"),
    Metric("balance_loss", float, "1", "sequence-wise balance loss, weighted, summed over MoE layers"),
    Metric("grad_norm", float, "1", "global gradient norm before clipping"),
    Metric("lr", float, "1", "learning rate"),
    Metric("mtp_weight", float, "1", "weight lambda of the MTP loss"),
    Metric("bias_speed", float, "1 per step", "speed gamma of the balance bias"),
    Metric("batch_size", int, "sequences", "sequences in this step, over all ranks"),
    Metric("tokens_per_second", float, "tokens/s", "tokens of this step over step_seconds, all ranks together"),
    Metric("mfu", float, "share", "model FLOP/s over peak; causal attention, MTP not counted, as the paper counts"),
    Metric("mfu_full", float, "share", "the same with attention counted as if it were not causal"),
    Metric("peak_flops", float, "FLOP/s", "peak of one rank's device that the two are counted against"),
    Metric("step_seconds", float, "s", "wall time of the step; validation and saving come on top"),
    Metric(
        "step_predicted_seconds", float, "s", "the same as mode=plan said, of a step with the full batch", PLAN_HERE
    ),
    Metric(
        "bubble_share",
        float,
        "share",
        "1 - busy / span of a rank's own forward and backward, mean over ranks",
        "parallel.pp > 1",
    ),
    Metric("forward_seconds", float, "s", "forward passes alone, mean over ranks"),
    Metric("backward_seconds", float, "s", "backward passes alone, of inputs and of weights, mean over ranks"),
    Metric(
        "overlapped_seconds",
        float,
        "s",
        "forwards that ran together with a backward (dualpipev), mean over ranks",
        "parallel.schedule=dualpipev",
    ),
    Metric(
        "dispatch_bytes_inside",
        int,
        "bytes",
        "sent to experts and back between ranks of one node, over all ranks",
        "parallel.ep > 1",
    ),
    Metric(
        "dispatch_bytes_across",
        int,
        "bytes",
        "sent to experts and back between nodes, over all ranks",
        "parallel.ep > 1",
    ),
    Metric(
        "dispatch_wait_seconds",
        float,
        "s",
        "host time spent waiting for those transfers, mean over ranks",
        "parallel.ep > 1",
    ),
    Metric("data_wait_seconds", float, "s", "part of step_seconds that waited for data"),
    Metric("checkpoint_stall_seconds", float, "s", "time after the step in which training waited for a checkpoint"),
    Metric("memory_bytes", int, "bytes", "peak CUDA memory of the logging rank; on CPU its peak resident memory"),
    Metric("memory_predicted_bytes", int, "bytes", "peak device memory of that rank as mode=plan said", PLAN_WHEN),
    Metric("skipped_steps", int, "steps", "updates skipped so far because loss or gradient was not finite"),
    Metric("max_vio", float, "1", "MaxVio of this batch: (busiest expert - mean) / mean, mean over MoE layers"),
    Metric(
        "max_vio_running",
        float,
        "1",
        "MaxVio of the mean load of about the last 100 steps; at most the mean of max_vio over them, as chance evens out in the load",
    ),
    Metric("load_entropy", float, "1", "entropy of the load over log(experts), mean over MoE layers; 1 is even"),
    Metric("dead_experts", int, "experts", "experts without a token in the last 20 steps, over all MoE layers"),
    Metric("bias_min", float, "1", "smallest balance bias that the step used"),
    Metric("bias_max", float, "1", "largest balance bias that the step used"),
    Metric(
        "attention_score_max",
        float,
        "1",
        "largest attention score of the step; of a kernel that tells none, where it is below the limit, its log-sum-exp, which is never less",
        QK_WHEN,
    ),
    Metric("heads_clipped", int, "heads", "heads of all layers with a score above optim.qk_clip", QK_WHEN),
    Metric(
        "validation_loss",
        float,
        "nats per token",
        "main loss on held-out data",
        "at the end, and every log.validate_every steps",
    ),
    Metric(
        "validation_bits_per_byte",
        float,
        "bits per byte",
        "held-out loss per byte of text, whatever the tokenizer",
        "with validation_loss",
    ),
    *(
        Metric(
            f"fp8_{subject}_{name}",
            float,
            unit,
            f"{meaning}, worst layer",
            FP8_WHEN,
        )
        for subject in ("activation", "weight", "gradient")
        for name, unit, meaning in FP8_READINGS
    ),
    *(
        Metric(
            f"fp8_{product}_error", float, "share", f"error of {product} against bf16 operands, worst layer", FP8_WHEN
        )
        for product in ("fprop", "dgrad")
    ),
    Metric("cluster/attempt", int, "attempts", "starts of the ranks so far, this one included", CLUSTER_WHEN),
    Metric("cluster/nodes", int, "nodes", "nodes with ranks", CLUSTER_WHEN),
    Metric("cluster/goodput", float, "share", "of the time since the start, the part with training", CLUSTER_WHEN),
    Metric("cluster/downtime_seconds", float, "s", "time so far without training, starts included", CLUSTER_WHEN),
    Metric("time", float, "s", "Unix time at the end of the step"),
)

EVENTS = (
    Metric(
        "resumed",
        dict,
        "event",
        "step and checkpoint that this attempt goes on from; settings that differ from the run that wrote it, old and new; whether "
        "all are known; facts",
        "the first step after a resume",
    ),
)
"""What is no number in a line."""

LAYERS = (
    Metric("layer_max_vio", float, "1", "max_vio of each MoE layer"),
    Metric("layer_entropy", float, "1", "load_entropy of each MoE layer"),
    Metric("layer_dead_experts", int, "experts", "dead_experts of each MoE layer"),
    Metric("layer_bias", list, "1", "smallest and largest balance bias of each MoE layer"),
    Metric("load", list, "tokens", "tokens routed to each expert of each MoE layer in this batch"),
    *(
        Metric(f"layer_{metric.name}", dict, metric.unit, f"{metric.name} of each layer with FP8 products", FP8_WHEN)
        for metric in SCALARS
        if metric.name.startswith("fp8_")
    ),
)

WANDB = (
    Metric("layer_max_vio/LAYER", float, "1", "max_vio of a MoE layer"),
    Metric("layer_entropy/LAYER", float, "1", "load_entropy of a MoE layer"),
    Metric("load", list, "experts", "experts of all MoE layers by load in fair shares, a histogram"),
    Metric("layer_load/LAYER", list, "experts", "the same of one MoE layer", "every LAYER_LOAD_EVERY steps"),
)
"""What W&B gets of the values per layer."""
LAYER_LOAD_EVERY = 10
"""Steps between histograms of single layers, which take the most room of all."""

LAYERS_MARK = b',"layer_max_vio":'
"""Where the head of a line ends: the scalars stand before it."""

_ORDER = [metric.name for metric in SCALARS + EVENTS + LAYERS]


def table_name(name: str) -> str:
    """The name in the table: `mtp_loss_2` stands there as mtp_loss_K, W&B's `layer_max_vio/mtp_0` as layer_max_vio/LAYER."""
    base, _, depth = name.rpartition("_")
    if base == "mtp_loss" and depth.isdecimal():
        return "mtp_loss_K"
    kind, slash, _ = name.partition("/")
    return f"{kind}/LAYER" if slash and kind != "cluster" else name


def order(name: str) -> tuple[int, int]:
    """Place of a metric in a line. An unknown name is our bug."""
    row = table_name(name)
    assert row in _ORDER, f"metric {name!r} is missing from train/metrics/names.py"
    return _ORDER.index(row), int(name.rpartition("_")[2]) if row == "mtp_loss_K" else 0


def is_event(name: str) -> bool:
    """Whether the value is no number."""
    return any(metric.name == name for metric in EVENTS)


def is_layer_metric(name: str) -> bool:
    """Whether the values are per MoE layer."""
    return any(metric.name == name for metric in LAYERS)
