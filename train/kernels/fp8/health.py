"""Monitors the precision that FP8 casts lose, and the errors of FP8 matmuls.

In one of `every` steps, each layer computes readings. A reading is one number, for one of three tensors (activation,
weight, gradient):

    flushed       fraction of the non-zero values that became zero
    saturated     fraction of the values that the cast clamps: beyond the format's maximum, or not finite
    scale_range   log2 of the tensor's largest scale divided by its smallest scale

or for one of two matmuls (fprop, dgrad):

    error         |y - y'| / |y'| for the first 128 rows; y' is the result with bf16 operands

Readings stay on the device until the end of the step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.formats import round_to
from train.kernels.fp8.quantize import blocked, fitted, scales
from train.model.recompute import is_repeated

SHADOW_ROWS = 128
"""Number of rows of a matmul that are recomputed in bf16."""
LIMITS = {"flushed": 0.05, "saturated": 0.0, "error": 0.1}
"""Limit of each reading. A larger value causes a warning."""


@dataclass(frozen=True)
class Reading:
    """One measured number of a layer's tensor or matmul."""

    layer: str
    subject: str
    """The measured tensor (activation, weight, gradient) or matmul (fprop, dgrad)."""
    name: str
    value: Tensor
    """A scalar, on the device."""


class LayerProbe:
    """Computes and stores the readings of one layer in one step."""

    def __init__(self, layer: str, readings: list[Reading]):
        self._layer, self._readings = layer, readings

    @torch.no_grad()
    def operand(self, subject: str, x: Tensor, rule: OperandRule) -> None:
        """Compute the readings of x (..., M, K) under `rule`. subject: see `Reading.subject`."""
        if x.numel() == 0:
            return
        cast = fitted(rule.cast(), x)
        blocks = blocked(x.float(), cast.block)
        amax = blocks.abs().amax((-3, -1), keepdim=True)
        scale, inverse = scales(amax, cast)
        scaled = blocks * inverse
        nonzero = blocks != 0
        clamped = ~(
            scaled.abs() <= rule.format.max * (1 + 2**-20)
        )  # values that exceed the maximum by one rounding are not clamped
        flushed = (round_to(scaled, rule.format) == 0) & nonzero
        used = amax > 0
        self._take(subject, "flushed", flushed.sum() / nonzero.sum().clamp_min(1))
        self._take(subject, "saturated", clamped.sum() / x.numel())
        largest, smallest = scale.where(used, 0.0).amax(), scale.where(used, torch.inf).amin()
        self._take(subject, "scale_range", torch.log2(largest / smallest).where(used.any(), 0.0))

    @torch.no_grad()
    def matmul(self, subject: str, out: Tensor, left: Tensor, right: Tensor) -> None:
        """Compute the relative error of out (M, N), the FP8 result of left (M, K) right (N, K)^T."""
        if out.numel() == 0:
            return
        exact = (left[:SHADOW_ROWS].bfloat16() @ right.bfloat16().mT).float()
        error = (out[:SHADOW_ROWS].float() - exact).norm() / exact.norm().clamp_min(1e-30)
        self._take(subject, "error", error)

    def _take(self, subject: str, name: str, value: Tensor) -> None:
        self._readings.append(Reading(self._layer, subject, name, value))


class HealthWatch:
    """Selects the steps that are monitored, and summarises their readings."""

    def __init__(self, every: int):
        """every: steps between monitored steps; 0: monitor none."""
        self._every = every
        self._names: dict[int, str] = {}
        self._readings: list[Reading] = []
        self._watching = False

    def name(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Store the weights' names, which readings use as layer names."""
        self._names.update((id(parameter), name.removesuffix(".weight")) for name, parameter in parameters)

    def start_step(self, step: int) -> None:
        """Clear the readings. Monitor a step whose index is a multiple of `every`."""
        self._readings.clear()
        self._watching = self._every > 0 and step % self._every == 0

    def probe(self, weight: Tensor) -> LayerProbe | None:
        """Returns the probe for the layer that has this weight; None if the step is not monitored.

        Also None without gradients, and in the second run of a recomputed layer.
        """
        if not self._watching or not torch.is_grad_enabled() or is_repeated():
            return None
        return LayerProbe(self._names.get(id(weight), f"weight of shape {tuple(weight.shape)}"), self._readings)

    def report(self) -> "Report":
        """Returns the worst reading of each name in a monitored step."""
        report = Report({}, {}, [])
        if not self._readings:
            return report
        values = torch.stack([reading.value.float() for reading in self._readings]).tolist()
        for reading, value in zip(self._readings, values, strict=True):
            key = f"fp8_{reading.subject}_{reading.name}"
            layers = report.layers.setdefault(f"layer_{key}", {})
            layers[reading.layer] = _worse(value, layers.get(reading.layer))
            report.metrics[key] = _worse(value, report.metrics.get(key))
        report.warnings.extend(self._warnings(report.layers))
        return report

    def _warnings(self, layers: dict[str, dict[str, float]]) -> Iterable[str]:
        for key, values in layers.items():
            _, _, subject, name = key.split("_", 3)
            limit = LIMITS.get(name)
            for layer, value in values.items():
                if limit is not None and not value <= limit:
                    yield (
                        f"FP8: {name} of the {subject} of {layer} is {value:.2%}, "
                        f"over the limit of {limit:.2%} (train/kernels/fp8/health.py)"
                    )


def _worse(value: float, other: float | None) -> float:
    """Returns the larger value. NaN counts as larger than any number."""
    return value if other is None or value != value or value > other else other


@dataclass(frozen=True)
class Report:
    """Results of one monitored step."""

    metrics: dict[str, float]
    """Maps fp8_SUBJECT_NAME to the worst value of all layers. SUBJECT and NAME are fields of `Reading`."""
    layers: dict[str, dict[str, float]]
    """Maps layer_fp8_SUBJECT_NAME to the values of the layers, by layer name."""
    warnings: list[str]
    """One warning for every limit that a layer exceeded."""


WARNINGS = 5
"""Largest number of warnings that a step shows; others are counted."""


def merge_reports(reports: Sequence[Report]) -> Report:
    """Merges all ranks' reports, and keeps the worst value for each name."""
    together = Report({}, {}, [])
    for report in reports:
        for key, value in report.metrics.items():
            together.metrics[key] = _worse(value, together.metrics.get(key))
        for key, values in report.layers.items():
            layers = together.layers.setdefault(key, {})
            for layer, value in values.items():
                layers[layer] = _worse(value, layers.get(layer))
    warnings = list(dict.fromkeys(warning for report in reports for warning in report.warnings))
    together.warnings.extend(warnings[:WARNINGS])
    if len(warnings) > WARNINGS:
        together.warnings.append(
            f"FP8: {len(warnings) - WARNINGS} more limits were exceeded; metrics.jsonl has all values"
        )
    return together
