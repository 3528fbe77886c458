"""Builds the figures of report.html, each with a title and a caption.

A heat map shows every n-th recorded step. Shape suffixes as in series.py.
"""

from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from train.metrics.names import GREEN, GREY, PURPLE, SCALARS, SKY, Curve
from train.metrics.timeline_file import SampledStep
from train.show.pipeline_figures import timeline_figure
from train.show.plot import (
    Figure,
    add_tokens_axis,
    curves,
    figure,
    style,
)
from train.show.series import Series

LOAD_COLOURS = [[0.0, "#0b3c5d"], [0.166, "#7fb2d6"], [0.333, "#f7f7f7"], [0.6, "#f4a582"], [1.0, "#8c1c13"]]
"""Colours of the load: blue is no token, white the fair share, red at least three times the fair share."""
LOAD_PERCENT_TOP = 300


class CurveFigure(NamedTuple):
    """A figure that shows only the curves of its metrics."""

    title: str
    unit: str
    caption: str
    zero: bool = True
    """Whether the y axis begins at 0."""
    quiet: bool = False
    """Whether to omit the figure if all its values are 0."""


CURVE_FIGURES = {
    "imbalance": CurveFigure(
        "Imbalance between experts",
        "MaxVio",
        "MaxVio = (busiest expert's tokens - mean) / mean, averaged over layers. 0 is even; 1 means that the busiest expert "
        "gets twice its share. The busiest experts differ from batch to batch, so the curve of single batches is noisy and does not reach 0; it shows the load of the token exchange. In the mean load these random differences average out; the rest is persistent, and should fall towards 0.",
    ),
    "bias": CurveFigure(
        "Balance bias: its range over all experts",
        "bias",
        "The bias that steers tokens away from busy experts (it only picks experts; it does not weigh them). A range that settles is healthy; a range that keeps growing means that the bias works against the router.",
        zero=False,
    ),
    "dead": CurveFigure(
        "Unused experts",
        "experts",
        "Number of experts in all layers without a token in the last 20 steps: wasted parameters. 0 is good.",
        quiet=True,
    ),
    "throughput": CurveFigure(
        "Speed",
        "tokens/s",
        "Trained tokens per second, summed over all processes; a constant rate is good. Without validation and saving.",
    ),
    "mfu": CurveFigure(
        "Use of the hardware (MFU)",
        "% of peak",
        "Model FLOP/s utilisation: the FLOP/s of the model as a fraction of the device's peak; higher is better. ",
    ),
    "times": CurveFigure(
        "Time per step",
        "seconds",
        "Wall time of each step, and its parts: computing (mean over all processes), and waiting, which should be near 0.",
    ),
    "bubble": CurveFigure(
        "Bubble: idle time of the pipeline",
        "% of time",
        "Fraction of forward and backward in which a pipeline process was idle, mean over all processes, each until its last action; lower is better. More micro-batches per step make it smaller. Waiting for experts does not count as idle.",
    ),
    "dispatch": CurveFigure(
        "Traffic to experts",
        "MiB per step",
        "Data per step that all processes sent to experts on other processes and back, in forward and backward. The network between nodes is the slowest, so its curve matters most; parallel.dispatch=node_limited keeps it low.",
    ),
    "memory": CurveFigure(
        "Memory",
        "GiB",
        "Peak memory of the logging process (GPU memory on a GPU, otherwise main memory). It should become constant early, on a GPU near the prediction of mode=plan.",
    ),
    "fp8-flushed": CurveFigure(
        "FP8: values lost to zero",
        "%",
        "Fraction of non-zero values that became zero in the cast to FP8, in the worst layer. A small, constant value is good.",
    ),
    "fp8-error": CurveFigure(
        "FP8: error of the GEMMs",
        "%",
        "Difference of a sampled GEMM from the same GEMM in bf16, in the worst layer. The rounding of E4M3 alone gives about 4 %.",
    ),
    "skipped": CurveFigure(
        "Skipped steps",
        "steps",
        "Skipped updates so far, because the loss or a gradient was not finite. A few are harmless; a steady increase is not.",
        quiet=True,
    ),
}
"""Texts and settings of the curve figures, by figure key."""


MFU_OF_GPUS = "DeepSeek-V3 reports 38.9 % (causal) and 43.7 % (full) on its H800s, also without MTP."
MFU_OF_PROCESSORS = (
    "For a CPU the peak is the fastest GEMM measured on such a CPU, so the value is not comparable with that of a GPU."
)


def curves_of(key: str) -> dict[str, Curve]:
    """Returns a figure's curves by metric, in the order of the metrics in train/metrics/names.py."""
    return {metric.name: metric.curve for metric in SCALARS if metric.curve is not None and metric.curve.figure == key}


def _of_table(key: str, more: str = "") -> Callable[[Series, Mapping[str, Any]], Figure | None]:
    title, unit, caption, zero, quiet = CURVE_FIGURES[key]

    def make(series: Series, settings: Mapping[str, Any]) -> Figure | None:
        wanted = curves_of(key)
        if quiet and not any(series.finite(metric).any() for metric in wanted):
            return None
        return figure(key, title, caption + more, curves(series, wanted, unit, zero=zero))

    return make


def build(
    series: Series, settings: Mapping[str, Any], sampled: SampledStep | None = None, gpu: bool = False
) -> list[Figure]:
    """Returns all figures for which the run has data, in the order of the page.

    - sampled: the step of the pipeline figure.
    - gpu: whether the run used GPUs.
    """
    makers = (
        _loss,
        _of_table("imbalance"),
        _layer_heat,
        _load_heat,
        _of_table("bias"),
        _of_table("dead"),
        _of_table("throughput"),
        _of_table("mfu", MFU_OF_GPUS if gpu else MFU_OF_PROCESSORS),
        _of_table("times"),
        lambda *_: timeline_figure(sampled),
        _of_table("bubble"),
        _of_table("dispatch"),
        _grad_norm,
        _layer_norms,
        _schedules,
        _of_table("memory"),
        _of_table("fp8-flushed"),
        _of_table("fp8-error"),
        _of_table("skipped"),
    )
    return [made for maker in makers if (made := maker(series, settings)) is not None]


def _loss(series: Series, settings: Mapping[str, Any]) -> Figure | None:
    depths = [name for name in sorted(series.columns) if name.startswith("mtp_loss_")]
    wanted = curves_of("loss")
    if len(depths) > 1:
        looks = [(PURPLE, "dot"), (GREEN, "dash"), (GREY, "dashdot"), (SKY, "longdash")]
        further = {
            name: Curve(
                "loss", f"training: {int(name.rsplit('_', 1)[1])} further (MTP)", colour, dash=dash, smooth=True
            )
            for name, (colour, dash) in zip(depths, cycle(looks), strict=False)
        }
        wanted = {"main_loss": wanted["main_loss"]} | further | {"validation_loss": wanted["validation_loss"]}
    caption = "The error of the model's predictions, in nats per token; it should fall, steeply at first. The model is not trained on held-out text: a held-out curve that rises while the training curve falls means memorising. MTP modules (multi-token prediction) predict later tokens, which is harder, so their curves are higher."
    plot = curves(series, wanted, "loss (nats per token)", height=440)
    if plot is not None:
        add_tokens_axis(plot, series)
    return figure("loss", "Loss: how well the model predicts", caption, plot, True)


def _layer_heat(series: Series, settings: Mapping[str, Any]) -> Figure | None:
    if not len(series.layer_step_S):
        return None
    vio_LS = series.layer_vio_SL.T.astype(np.float32)
    top = float(np.nanquantile(vio_LS, 0.98)) if np.isfinite(vio_LS).any() else 1.0
    heat = go.Heatmap(
        x=series.layer_step_S,
        y=list(series.layers),
        z=vio_LS,
        zmin=0,
        zmax=max(top, 1.0),
        colorscale="Cividis",
        colorbar={"title": {"text": "MaxVio", "side": "right"}},
        hovertemplate="step %{x}, %{y}: MaxVio %{z:.2f}<extra></extra>",
    )
    plot = style(go.Figure(heat), series.layer_step_S, height=int(min(620, 180 + 16 * len(series.layers))))
    plot.update_layout(showlegend=False, hovermode="closest")
    plot.update_yaxes(title="layer with experts", type="category", autorange="reversed", automargin=True)
    caption = "Each row is a layer with experts, each column a step: dark is even; yellow means that one expert of the layer got far more tokens than the mean in that batch. A row that stays yellow is a layer without balance. Rows named mtp are MTP modules."
    return figure("layers", "Imbalance layer by layer", caption, plot)


def _layer_norms(series: Series, settings: Mapping[str, Any]) -> Figure | None:
    """Returns a figure of three heat maps, with logarithmic colours."""
    if not series.norms:
        return None
    steps, layers = [one["step"] for one in series.norms], list(series.norms[0]["layer_weight_norm"])
    weight_LS, update_LS = (
        np.array([[one[name].get(layer) or np.nan for one in series.norms] for layer in layers])
        for name in ("layer_weight_norm", "layer_update_norm")
    )
    shown = {
        "update / weight": update_LS / weight_LS,
        "norm of the update": update_LS,
        "norm of the weights": weight_LS,
    }
    plot = go.Figure()
    for index, (name, values_LS) in enumerate(shown.items()):
        plot.add_heatmap(
            x=steps,
            y=layers,
            z=np.log10(values_LS).astype(np.float32),
            customdata=values_LS.astype(np.float32),
            name=name,
            visible=index == 0,
            colorscale="Cividis",
            colorbar={"title": {"text": "power of ten", "side": "right"}},
            hovertemplate="step %{x}, %{y}: %{customdata:.3g}<extra></extra>",
        )
    style(plot, np.array(steps), height=int(min(620, 180 + 16 * len(layers))))
    plot.update_layout(showlegend=False, hovermode="closest")
    plot.update_yaxes(title="layer", type="category", autorange="reversed", automargin=True)
    caption = "Norm of a step's change of a layer, relative to the layer's norm: 0.001 is usual, and less as the learning rate falls. Check a layer whose row differs from its neighbours, or rises at a constant learning rate. Select the two norms above the figure."
    return figure("norms", "Weights and updates, layer by layer", caption, plot, False, list(shown))


def _load_heat(series: Series, settings: Mapping[str, Any]) -> Figure | None:
    if not len(series.layer_step_S):
        return None
    mean_SL1 = series.load_SLE.mean(axis=2, keepdims=True)
    # Integer percents take two bytes per cell, and are exact enough for colours.
    share_SLE = np.round(np.minimum(series.load_SLE / np.maximum(mean_SL1, 1e-9) * 100, 60000)).astype(np.uint16)
    plot = go.Figure()
    for index, layer in enumerate(series.layers):
        plot.add_heatmap(
            x=series.layer_step_S,
            z=share_SLE[:, index].T.copy(),
            name=layer,
            visible=index == 0,
            zmin=0,
            zmax=LOAD_PERCENT_TOP,
            colorscale=LOAD_COLOURS,
            colorbar={
                "title": {"text": "% of fair share", "side": "right"},
                "tickvals": [0, 100, 200, 300],
                "ticktext": ["0", "100", "200", "300+"],
            },
            hovertemplate="step %{x}, expert %{y}: %{z} % of a fair share<extra></extra>",
        )
    style(plot, series.layer_step_S, height=460)
    plot.update_layout(showlegend=False, hovermode="closest")
    plot.update_yaxes(title="expert")
    caption = "Select a layer above the figure. Each row is an expert, each column a step: white is the mean number of tokens, red is more, blue is less. The balance bias should make the figure paler during the training."
    return figure("load", "Tokens per expert", caption, plot, True, series.layers)


def _grad_norm(series: Series, settings: Mapping[str, Any]) -> Figure | None:
    plot = curves(series, curves_of("grad_norm"), "gradient norm", log=True)
    clip = (settings.get("optim") or {}).get("clip")
    limit = ""
    if plot is not None and isinstance(clip, (int, float)) and clip > 0:
        ends = series.step_N[[0, -1]]
        plot.add_scatter(
            x=ends, y=[clip, clip], name="clipping limit", line={"color": GREY, "dash": "dash"}, mode="lines"
        )
        limit = f" Larger gradients are scaled down to {clip:g}."
    caption = f"Norm of the gradient, on a logarithmic axis; spikes are unstable steps.{limit}"
    return figure("grad_norm", "Gradient norm", caption, plot)


def _schedules(series: Series, settings: Mapping[str, Any]) -> Figure | None:
    plot = curves(series, curves_of("lr"), "learning rate", zero=True)
    if plot is not None:
        plot.update_yaxes(exponentformat="power")
    caption = "Learning rate: a warm-up from 0, then the schedule."
    return figure("lr", "Learning rate", caption, plot)
