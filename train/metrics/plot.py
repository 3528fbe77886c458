"""What all figures of report.html are drawn with: colours, curves over steps, the common look.

Shape suffixes as in series.py.

A long run is thinned so that the page stays small: a curve keeps the lowest and the highest point of every stretch,
hence every spike, as a pale band around its mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from train.metrics.series import POINTS, Series, stretch_means, thin

# Okabe and Ito's palette, told apart with any colour vision.
BLUE, ORANGE, GREEN, SKY, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#666666"


class Curve(NamedTuple):
    name: str
    metric: str
    colour: str
    scale: float = 1.0
    markers: bool = False


@dataclass(frozen=True)
class Figure:
    key: str
    title: str
    caption: str
    plot: go.Figure
    wide: bool = False


def curves(
    series: Series, wanted: Sequence[Curve], unit: str, *, log: bool = False, zero: bool = False
) -> go.Figure | None:
    """Line plot over steps of those curves that have values, None without any."""
    plot = go.Figure()
    for curve in wanted:
        if series.has(curve.metric):
            _add_curve(plot, curve, series.step_N, series.columns[curve.metric] * curve.scale)
    if not plot.data:
        return None
    plot.update_yaxes(title=unit, type="log" if log else "linear", rangemode="tozero" if zero else "normal")
    if log:
        plot.update_yaxes(dtick="D2", tickformat=".1~g")  # labels at 1, 2 and 5
    return style(plot, series.step_N)


def _add_curve(plot: go.Figure, curve: Curve, x_N: np.ndarray, y_N: np.ndarray) -> None:
    if curve.markers:  # measured now and then: no gaps between the measurements
        measured = np.isfinite(y_N)
        x_N, y_N = x_N[measured], y_N[measured]
    line, marker = {"color": curve.colour, "width": 1.6}, {"size": 6}
    if len(x_N) > POINTS:  # a pale band from lowest to highest, and the mean in it
        x, y = thin(x_N, y_N)
        plot.add_scatter(x=x, y=y, mode="lines", line=line, opacity=0.3, showlegend=False, hoverinfo="skip")
        x_N, y_N = stretch_means(x_N, y_N)
    mode = "lines+markers" if curve.markers or len(x_N) <= 60 else "lines"
    plot.add_scatter(x=x_N, y=y_N, name=curve.name, mode=mode, line=line, marker=marker)


def look(plot: go.Figure, height: int = 320) -> go.Figure:
    """The look that all figures share."""
    plot.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 70, "r": 20, "t": 30, "b": 50},
        font={"size": 13, "color": "#222"},
        hovermode="x unified",
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return plot


def style(plot: go.Figure, step_N: np.ndarray, height: int = 320) -> go.Figure:
    """The look of figures whose x axis shows the steps step_N."""
    look(plot, height).update_xaxes(title="step", nticks=10, tickformat=",d")
    if len(step_N) <= 10:  # else the axis would show halves of steps
        plot.update_xaxes(tickvals=step_N.tolist())
    return plot


def figure(key: str, title: str, caption: str, plot: go.Figure | None, wide: bool = False) -> Figure | None:
    return None if plot is None else Figure(key, title, caption, plot, wide)
