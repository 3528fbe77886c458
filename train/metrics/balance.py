"""Measures how evenly tokens are distributed to experts, in numpy arrays or torch tensors.

Shape suffixes: L MoE layers (MTP modules last), E routed experts.

MaxVio = (tokens of the busiest expert - mean) / mean, as in the paper on loss-free balancing. It is 0 for an even
distribution. MaxVio of one batch shows the load of the all-to-all. MaxVio of the running load shows whether the bias
balances the experts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from train.metrics.names import Record

HORIZON = 100
"""Time constant of the running load, in steps."""
DEAD_STEPS = 20
"""An expert counts as dead after this number of steps without a token.

In 20 steps, a bias speed of 0.001 changes the bias by 0.02. A working router would then select the expert again.
"""


class RunningLoad(NamedTuple):
    """Token counts of past steps. Checkpoints store them."""

    load_LE: np.ndarray
    """Sum of token counts, with exponentially smaller weights for older steps."""
    idle_LE: np.ndarray
    """Number of steps since the expert's last token."""
    steps: int
    """Number of steps whose token counts are in `load_LE`."""


def max_vio(counts_LE: Any) -> np.ndarray:
    """Returns MaxVio of each layer, (L,); 0 without tokens."""
    counts_LE = to_numpy(counts_LE)
    mean_L = counts_LE.mean(axis=1)
    return np.where(mean_L > 0, counts_LE.max(axis=1) / np.where(mean_L > 0, mean_L, 1) - 1, 0.0)


def load_entropy(counts_LE: Any) -> np.ndarray:
    """Returns each layer's entropy of the tokens per expert, divided by its maximum log E: (L,).

    It is 1 for an even distribution. It is 0 if one expert gets all tokens, if there are no tokens, or if E = 1.
    """
    counts_LE = to_numpy(counts_LE)
    total_L1 = counts_LE.sum(axis=1, keepdims=True)
    share_LE = counts_LE / np.where(total_L1 > 0, total_L1, 1)
    entropy_L = -(share_LE * np.log(np.where(share_LE > 0, share_LE, 1))).sum(axis=1)
    return entropy_L / max(np.log(counts_LE.shape[1]), np.finfo(float).tiny)


def update_running(running: RunningLoad | None, counts_LE: Any) -> RunningLoad:
    """Returns the running load after one more step."""
    counts_LE = to_numpy(counts_LE)
    if running is None:
        running = RunningLoad(np.zeros_like(counts_LE), np.zeros(counts_LE.shape, np.int64), 0)
    load_LE = running.load_LE * (1 - 1 / HORIZON) + counts_LE
    return RunningLoad(load_LE, np.where(counts_LE > 0, 0, running.idle_LE + 1), running.steps + 1)


def dead_experts(running: RunningLoad) -> np.ndarray:
    """Returns each layer's number of dead experts, (L,)."""
    return (running.idle_LE >= min(DEAD_STEPS, max(1, running.steps))).sum(axis=1)


def balance_record(layers: Sequence[str], counts_LE: Any, bias_LE: Any, running: RunningLoad) -> Record:
    """Returns all balance metrics of a step, by the names of names.py; empty without MoE layers.

    - counts_LE: tokens per expert in the batch of all ranks.
    - bias_LE: balance biases that the step used.
    - running: running load that includes this step.
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
    """Converts an array, nested list or tensor to a float64 array."""
    if hasattr(values, "detach"):
        values = values.detach().to("cpu").double().numpy()
    return np.asarray(values, np.float64)
