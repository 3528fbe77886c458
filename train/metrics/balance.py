"""How evenly the experts are used, from token counts alone. Pure functions on numpy arrays or torch tensors.

Shape suffixes: L MoE layers (MTP modules last), E routed experts.

MaxVio (LF paper, Tables 2-4) = (busiest expert - mean) / mean: 0 is even, 1 means twice the fair share. Of one
batch it shows what an all-to-all has to carry; of the running load it shows whether the bias balances at all,
since noise of single batches averages out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from train.metrics.names import Record

HORIZON = 100
"""Steps over which the running load remembers: a past step weighs exp(-age / HORIZON), about."""
DEAD_STEPS = 20
"""An expert is dead when it got no token in this many steps. A fair expert of the smallest recipe gets hundreds in
each step, so that 20 empty ones are no accident; a bias speed of 0.001 has then moved by 0.02 and should have revived it."""


class RunningLoad(NamedTuple):
    """What is remembered of past steps. Goes into a checkpoint as two arrays, if the numbers shall go on smoothly."""

    load_LE: np.ndarray
    """Sum of counts with exponential forgetting. MaxVio ignores scale, so a sum serves as well as a mean."""
    idle_LE: np.ndarray
    """Steps since the expert last got a token, or since the start."""
    steps: int
    """Steps seen."""


def max_vio(counts_LE: Any) -> np.ndarray:
    """MaxVio of each layer, (L,); 0 for a layer without any token."""
    counts_LE = to_numpy(counts_LE)
    mean_L = counts_LE.mean(axis=1)
    return np.where(mean_L > 0, counts_LE.max(axis=1) / np.where(mean_L > 0, mean_L, 1) - 1, 0.0)


def load_entropy(counts_LE: Any) -> np.ndarray:
    """Entropy of the load over its maximum log E, (L,): 1 even, 0 all on one expert (or no token, or E = 1)."""
    counts_LE = to_numpy(counts_LE)
    total_L1 = counts_LE.sum(axis=1, keepdims=True)
    share_LE = counts_LE / np.where(total_L1 > 0, total_L1, 1)
    entropy_L = -(share_LE * np.log(np.where(share_LE > 0, share_LE, 1))).sum(axis=1)
    return entropy_L / max(np.log(counts_LE.shape[1]), np.finfo(float).tiny)


def update_running(running: RunningLoad | None, counts_LE: Any) -> RunningLoad:
    """The running load after one more step; None before the first."""
    counts_LE = to_numpy(counts_LE)
    if running is None:
        running = RunningLoad(np.zeros_like(counts_LE), np.zeros(counts_LE.shape, np.int64), 0)
    load_LE = running.load_LE * (1 - 1 / HORIZON) + counts_LE
    return RunningLoad(load_LE, np.where(counts_LE > 0, 0, running.idle_LE + 1), running.steps + 1)


def dead_experts(running: RunningLoad) -> np.ndarray:
    """Experts of each layer without a token in the last DEAD_STEPS steps (in all steps so far, while fewer), (L,)."""
    return (running.idle_LE >= min(DEAD_STEPS, max(1, running.steps))).sum(axis=1)


def balance_record(layers: Sequence[str], counts_LE: Any, bias_LE: Any, running: RunningLoad) -> Record:
    """All balance metrics of a step, with names as in names.py.

    layers: names of the L layers. counts_LE: tokens per expert over the whole batch and all ranks. bias_LE: balance bias
    that the step used. running: includes this step. Without MoE layers the record is empty.
    """
    if not layers:
        return {}
    counts_LE, bias_LE = to_numpy(counts_LE), to_numpy(bias_LE)
    assert len(layers) == len(counts_LE) == len(bias_LE), "one name, one row of counts and one row of biases per layer"
    vio_L, entropy_L, dead_L = max_vio(counts_LE), load_entropy(counts_LE), dead_experts(running)
    return {
        "max_vio": float(vio_L.mean()),
        "max_vio_running": float(max_vio(running.load_LE).mean()),
        "load_entropy": float(entropy_L.mean()),
        "dead_experts": int(dead_L.sum()),
        "bias_min": float(bias_LE.min()),
        "bias_max": float(bias_LE.max()),
        "layer_max_vio": dict(zip(layers, vio_L.tolist(), strict=True)),
        "layer_entropy": dict(zip(layers, entropy_L.tolist(), strict=True)),
        "layer_dead_experts": dict(zip(layers, dead_L.tolist(), strict=True)),
        "layer_bias": {name: [float(row.min()), float(row.max())] for name, row in zip(layers, bias_LE, strict=True)},
        "load": {name: row.astype(int).tolist() for name, row in zip(layers, counts_LE, strict=True)},
    }


def to_numpy(values: Any) -> np.ndarray:
    """float64 array of a numpy array, nested list, or torch tensor on any device."""
    if hasattr(values, "detach"):
        values = values.detach().to("cpu").double().numpy()
    return np.asarray(values, np.float64)
