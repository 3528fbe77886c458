"""Reads a run's metrics as arrays for report.html, and reduces the number of points without losing spikes.

Shape suffixes: N recorded steps, S steps of the heat maps, L MoE layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.metrics.jsonl import read_heads_with_loads, read_steps
from train.metrics.names import Record, is_event

POINTS = 1000
"""Approximate maximum number of points in a curve."""
HEAT_STEPS, HEAT_CELLS = 240, 600_000
"""HEAT_STEPS: maximum number of columns of a heat map. HEAT_CELLS: maximum number of cells in all heat maps."""


@dataclass(frozen=True)
class Series:
    """Data of the figures: scalars by step, and layer metrics."""

    step_N: np.ndarray
    columns: Mapping[str, np.ndarray]
    """Maps a metric to its N values, with NaN for gaps."""
    layers: Sequence[str]
    layer_step_S: np.ndarray
    layer_vio_SL: np.ndarray
    load_SLE: np.ndarray
    """Tokens per expert, by step, MoE layer and expert."""
    norms: Sequence[Record] = ()
    """Records with the norms of weights and updates by layer."""
    resumes: Sequence[Record] = ()
    """Events of the kind `resumed`, oldest first."""

    def finite(self, metric: str) -> np.ndarray:
        """Returns a metric's finite values, in step order."""
        values_N = self.columns.get(metric, np.zeros(0))
        return values_N[np.isfinite(values_N)]

    def has(self, metric: str) -> bool:
        return len(self.finite(metric)) > 0


def thin(x_N: np.ndarray, y_N: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Reduces a curve to the lowest and highest points of intervals."""
    if len(x_N) <= points:
        return x_N, y_N
    kept = {0, len(x_N) - 1}
    for part in np.array_split(np.arange(len(x_N)), points // 2):
        values = y_N[part]
        if np.isfinite(values).any():
            finite = np.where(np.isfinite(values), values, np.nan)
            kept |= {int(part[np.nanargmin(finite)]), int(part[np.nanargmax(finite)])}
        else:
            kept.add(int(part[0]))
    index = np.array(sorted(kept))
    return x_N[index], y_N[index]


def stretch_means(x_N: np.ndarray, y_N: np.ndarray, stretches: int = POINTS // 4) -> tuple[np.ndarray, np.ndarray]:
    """Divides a curve into intervals; returns their middle x and mean y."""
    parts = np.array_split(np.arange(len(x_N)), stretches)
    means = [float(np.mean(good)) if len(good := y_N[part][np.isfinite(y_N[part])]) else np.nan for part in parts]
    return np.array([x_N[part[len(part) // 2]] for part in parts]), np.array(means)


def smoothed(y_N: np.ndarray) -> np.ndarray:
    """Returns the moving average over windows of a fortieth of the curve. It is NaN where the value is not finite."""
    half = max(1, len(y_N) // 80)
    finite = np.isfinite(y_N)
    window = np.ones(2 * half + 1)
    sums = np.convolve(np.where(finite, y_N, 0.0), window, "full")[half : half + len(y_N)]
    counts = np.convolve(finite.astype(np.float64), window, "full")[half : half + len(y_N)]
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def read_series(path: Path) -> Series:
    """Reads a run's series from metrics.jsonl. If the file is missing, the series have no steps."""
    heads, loaded = [], []
    for head, has_loads in read_heads_with_loads(path) if path.exists() else ():
        heads.append(head)
        if has_loads:
            loaded.append(head["step"])
    names = dict.fromkeys(name for head in heads for name in head if not is_event(name))
    columns = {name: np.array([_number(head.get(name)) for head in heads]) for name in names}
    step_N = np.array([head["step"] for head in heads], np.int64)
    resumes = [head["resumed"] for head in heads if isinstance(head.get("resumed"), dict)]
    normed = [head["step"] for head in heads if "weight_norm" in head]
    return Series(step_N, columns, *_layers(path, loaded), norms=_norms(path, normed), resumes=resumes)


def _norms(path: Path, steps: list[int]) -> list[Record]:
    """Returns the records with norms by layer at evenly spaced steps."""
    if not steps:
        return []
    wanted = {steps[i] for i in np.linspace(0, len(steps) - 1, min(HEAT_STEPS, len(steps))).round().astype(int)}
    return [line for line in read_steps(path, wanted) if "layer_weight_norm" in line]


def _layers(path: Path, loaded: list[int]) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Returns the names of the layers, and for evenly spaced steps: step numbers (S), MaxVio (S, L), and tokens per
    expert (S, L, E).

    loaded: all steps with recorded tokens per expert.
    """
    if not loaded:
        return [], np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0, 0))
    (first,) = read_steps(path, {loaded[0]})
    layers = list(first["load"])
    cells = sum(len(row) for row in first["load"].values())
    room = min(HEAT_STEPS, max(2, HEAT_CELLS // cells), len(loaded))
    wanted = {loaded[i] for i in np.linspace(0, len(loaded) - 1, room).round().astype(int)}
    lines = [line for line in read_steps(path, wanted) if list(line["load"]) == layers]
    vio_SL = np.array([[_number(line["layer_max_vio"].get(name)) for name in layers] for line in lines])
    load_SLE = np.array([[line["load"][name] for name in layers] for line in lines], np.float64)
    return layers, np.array([line["step"] for line in lines]), vio_SL, load_SLE


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def last(series: Series, name: str) -> float:
    """Returns the newest finite value of a metric; NaN without any."""
    values = series.finite(name)
    return float(values[-1]) if len(values) else math.nan


def median(series: Series, name: str) -> float:
    """Returns the median of a metric's finite values without their first tenth; NaN if there are none."""
    values = series.finite(name)
    return float(np.median(values[len(values) // 10 :])) if len(values) else math.nan


def tail_mean(values: np.ndarray) -> float:
    """Returns the mean of the last tenth of the values, at most 20 values; NaN if there are none."""
    return float(values[-max(1, min(20, len(values) // 10)) :].mean()) if len(values) else math.nan
