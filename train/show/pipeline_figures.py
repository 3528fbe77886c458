"""Draws when each pipeline rank computes and waits in one step."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from train.metrics.names import BLUE, GREEN, PURPLE
from train.metrics.timeline_file import SampledStep
from train.show.plot import IDLE, Figure, figure, set_look

PICTURE_ROWS, BARS = 16, 12_000
"""Maximum numbers of pipeline ranks and of pipeline actions in the figure."""
ACTION_COLOURS = {
    "F": ("forward", BLUE, "#9CCBE8"),
    "B": ("backward", GREEN, "#93D9C3"),
    "I": ("backward of inputs", "#7A8B1C", "#D3DC9C"),
    "W": ("backward of weights", "#E69F00", "#F6D998"),
    "FB": ("forward and backward together", PURPLE, "#EBCADB"),
}
"""Maps each kind of pipeline action to its name, its colour on a rank's first stage, and its colour on later stages."""
NUMBERED = 800
"""Number of pipeline actions above which bars have no micro-batch numbers."""


def timeline_figure(sampled: SampledStep | None) -> Figure | None:
    """Returns a step's Gantt chart, a row per pipeline rank, or None."""
    if sampled is None or len(sampled.span_seconds) < 2:
        return None
    ranks = len(sampled.span_seconds)
    rows = {round(row): "" for row in np.linspace(0, ranks - 1, min(PICTURE_ROWS, ranks))}
    drawn = sorted((a for a in sampled.actions if a["pp_rank"] in rows), key=lambda action: action["start_seconds"])
    kept = drawn[:BARS]
    end = sampled.span if len(kept) == len(drawn) else kept[-1]["start_seconds"]
    stages = {row: sorted({action["stage"] for action in drawn if action["pp_rank"] == row}) for row in rows}
    rows = {row: _row_name(row, stages[row]) for row in rows}
    unit, scale = ("ms", 1e3) if sampled.span < 10 else ("s", 1.0)
    plot = go.Figure()
    idle = {"color": IDLE}
    x, y = [end * scale] * len(rows), list(rows.values())
    plot.add_bar(name="waiting", x=x, y=y, orientation="h", marker=idle, hoverinfo="skip")
    for kind in ACTION_COLOURS:
        of_kind = [action for action in kept if action["kind"] == kind]
        for later in (False, True):
            actions = [a for a in of_kind if (a["stage"] != stages[a["pp_rank"]][0]) == later]
            if actions:
                bars = _bars(actions, rows, later, scale, unit, numbered=len(kept) <= NUMBERED)
                plot.add_trace(bars.update(showlegend=not later or len(actions) == len(of_kind)))
    set_look(plot, height=150 + 44 * len(rows))
    plot.update_layout(barmode="overlay", bargap=0.18, hovermode="closest")
    if len(kept) <= NUMBERED:
        plot.update_layout(uniformtext={"minsize": 9, "mode": "hide"})  # hides numbers that do not fit into their bars
    plot.update_yaxes(autorange="reversed", type="category", automargin=True, showgrid=False)
    plot.update_xaxes(title=f"{unit} since the step began", range=[0, end * scale], showgrid=False)
    title = f"The pipeline in step {sampled.step:,}: who computes when ({sampled.schedule})"
    return figure("timeline", title, _timeline_caption(sampled, drawn, kept, len(rows)), plot, True)


def _row_name(pp_rank: int, stages: list[int]) -> str:
    return f"process {pp_rank} (stage{'s' if len(stages) > 1 else ''} {' and '.join(map(str, stages))})"


def _bars(
    actions: list[dict[str, Any]], rows: Mapping[int, str], later: bool, scale: float, unit: str, numbered: bool
) -> go.Bar:
    """Returns the bars for these pipeline actions of one kind.

    - later: whether the actions belong to a later stage than their rank's first stage.
    - scale, unit: factor from seconds to the shown unit, and the unit's name.
    - numbered: whether bars have micro-batch numbers.
    """
    name, strong, pale = ACTION_COLOURS[actions[0]["kind"]]
    numbers = {
        "text": [_label(action) for action in actions],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "insidetextfont": {"color": "#222" if later else "#fff", "size": 11},
    }
    return go.Bar(
        name=name,
        legendgroup=name,
        y=[rows[action["pp_rank"]] for action in actions],
        base=[action["start_seconds"] * scale for action in actions],
        x=[action["seconds"] * scale for action in actions],
        orientation="h",
        # With very many bars, white lines between the bars would hide their colours.
        marker={"color": pale if later else strong, "line": {"color": "#fff", "width": 1 if numbered else 0}},
        customdata=[_words(action) for action in actions],
        hovertemplate=f"%{{customdata}}<br>%{{x:.4g}} {unit} from %{{base:.4g}} {unit}<extra></extra>",
        **(numbers if numbered else {}),
    )


def _label(action: Mapping[str, Any]) -> str:
    backward = action.get("backward")
    return f"{action['micro_batch']}" + (f"|{backward[1]}" if backward else "")


def _words(action: Mapping[str, Any]) -> str:
    words = f"{ACTION_COLOURS[action['kind']][0]}: micro-batch {action['micro_batch']}, stage {action['stage']}"
    if backward := action.get("backward"):
        words += f", with backward of micro-batch {backward[1]}, stage {backward[0]}"
    return words


def _timeline_caption(sampled: SampledStep, drawn: list, kept: list, rows: int) -> str:
    caption = (
        f"The model is cut into stages; each row is a process and the stages it holds. Read from left to right: each bar is a "
        f"piece of work on one micro-batch (a part of the batch, its number in the bar), and grey is the bubble, time in which "
        f"the process waited for its neighbours: {100 * sampled.bubble:.0f} % of all processes' time in this step; less is better."
    )
    if len({action["stage"] for action in sampled.actions}) > len(sampled.span_seconds):
        caption += " Paler bars are work on a process's stages after its first."
    if len(kept) > NUMBERED:
        caption += " Zoom in, and point at a bar to see which it is."
    if any(action["kind"] == "FB" for action in kept):
        caption += " In a bar 5|2 the forward of micro-batch 5 and the backward of micro-batch 2 share the time."
    if rows < len(sampled.span_seconds):
        caption += f" Drawn are {rows} of the {len(sampled.span_seconds)} processes of the pipeline."
    if len(kept) < len(drawn):
        caption += f" The picture ends after the first {len(kept):,} of {len(drawn):,} bars."
    return caption
