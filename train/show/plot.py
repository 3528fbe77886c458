"""Draws the common parts of the figures in report.html: colours, curves over steps, layout.

A pale line shows every step of a noisy curve, and a strong line a moving average. In a long run, a pale band shows the
range of each interval, and a strong line the mean. Shape suffixes as in series.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from train.metrics.names import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, Curve
from train.metrics.quantities import short
from train.show.series import POINTS, Series, smoothed, stretch_means, thin

LINE_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY)
IDLE = "#E3E5E8"
DARK = {
    BLUE: "#4AA8E0",
    ORANGE: "#F0803C",
    GREEN: "#2DBE95",
    SKY: "#8CCBF0",
    PURPLE: "#DE9CC2",
    GREY: "#A5ABB4",
    IDLE: "#3A3F48",
}
"""Maps each colour to a lighter one for a dark page."""
DOTTED_STEPS = 60
"""Maximum number of steps for dots and unsmoothed curves."""
TICKS = 6
"""Maximum number of labels on the tokens axis."""


@dataclass(frozen=True)
class Figure:
    key: str
    title: str
    caption: str
    plot: go.Figure
    wide: bool = False
    choices: Sequence[str] = ()
    """Names in the menu of a figure that shows one of several data sets at a time; empty: no menu."""


def curves(
    series: Series, wanted: Mapping[str, Curve], unit: str, *, log: bool = False, zero: bool = False, height: int = 320
) -> go.Figure | None:
    """Returns a line plot of the metrics in `wanted` that have values; None without any.

    - unit: title of the y axis.
    - log: whether the y axis is logarithmic.
    - zero: whether the y axis begins at 0.
    """
    plot = go.Figure()
    for metric, curve in wanted.items():
        if series.has(metric):
            add_curve(plot, curve, series.step_N, series.columns[metric] * curve.scale)
    if not plot.data:
        return None
    plot.update_yaxes(title=unit, rangemode="tozero" if zero else "normal")
    if log:
        log_axis(plot)
    return style(plot, series.step_N, height)


def log_axis(plot: go.Figure) -> None:
    """Make the y axis logarithmic, with labels at 1, 2, 5."""
    plot.update_yaxes(type="log", dtick="D2", tickformat=".1~g")


def add_curve(plot: go.Figure, curve: Curve, x_N: np.ndarray, y_N: np.ndarray) -> None:
    """Draw a curve, as the docstring of this file describes."""
    if curve.markers:  # a line joins consecutive measurements, even if the steps between them have no value
        measured = np.isfinite(y_N)
        x_N, y_N = x_N[measured], y_N[measured]
    line, marker = {"color": curve.colour, "width": 1.8, "dash": curve.dash}, {"size": 6}
    pale = {"mode": "lines", "line": {"color": curve.colour, "width": 1}, "opacity": 0.35, "legendgroup": curve.label}
    few = len(x_N) <= DOTTED_STEPS
    if len(x_N) > POINTS:  # a pale band from lowest to highest value, with the mean as a line
        x, y = thin(x_N, y_N)
        plot.add_scatter(x=x, y=y, **pale, showlegend=False, hoverinfo="skip")
        x_N, y_N = stretch_means(x_N, y_N)
    elif curve.smooth and not few:
        plot.add_scatter(x=x_N, y=y_N, **pale, showlegend=False, name=f"{curve.label}, this step")
        y_N = smoothed(y_N)
    mode = "lines+markers" if curve.markers or few else "lines"
    plot.add_scatter(x=x_N, y=y_N, name=curve.label, legendgroup=curve.label, mode=mode, line=line, marker=marker)


def add_tokens_axis(plot: go.Figure, series: Series) -> None:
    """Adds a second x axis with the number of trained tokens."""
    tokens_N = series.columns.get("tokens", np.zeros(0))
    known = np.isfinite(tokens_N)
    if known.sum() < 2:
        return
    steps, tokens = series.step_N[known], tokens_N[known]
    room = (tokens[-1] - tokens[0]) / TICKS
    size = 10 ** np.floor(np.log10(room)) if room > 0 else 1.0
    unit = size * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * size >= room)
    shown = np.arange(np.ceil(tokens[0] / unit), np.floor(tokens[-1] / unit) + 1) * unit
    plot.add_scatter(x=[steps[0], steps[-1]], y=[None, None], xaxis="x2", showlegend=False, hoverinfo="skip")
    axis = {"overlaying": "x", "matches": "x", "side": "top", "showgrid": False, "zeroline": False}
    ticks = {"tickvals": np.interp(shown, tokens, steps).tolist(), "ticktext": [short(one) for one in shown]}
    plot.update_layout(xaxis2=axis | ticks | {"title": {"text": "tokens", "standoff": 4}})
    plot.update_layout(legend={"y": 1.16}, margin={"t": 80})


def set_look(plot: go.Figure, height: int = 320) -> go.Figure:
    """Sets the layout that all figures share, without colours."""
    plot.update_layout(
        height=height,
        margin={"l": 70, "r": 20, "t": 30, "b": 50},
        font={"size": 13},
        hovermode="x unified",
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return plot


def style(plot: go.Figure, step_N: np.ndarray, height: int = 320) -> go.Figure:
    """Sets the layout of a figure over the steps step_N."""
    set_look(plot, height).update_xaxes(title="step", nticks=10, tickformat=",d")
    if len(step_N) <= 10:  # with so few steps, plotly would also label fractions of a step
        plot.update_xaxes(tickvals=step_N.tolist())
    return plot


def figure(
    key: str, title: str, caption: str, plot: go.Figure | None, wide: bool = False, choices: Sequence[str] = ()
) -> Figure | None:
    return None if plot is None else Figure(key, title, caption, plot, wide, choices)
