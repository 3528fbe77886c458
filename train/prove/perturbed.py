"""Measures how sensitive a step is to rounding: the reference repeats the step with random perturbations.

The reference perturbs every weight, output and output gradient by the unit roundoff of the format. This shows steps in
which correct ranks exceed the usual bounds, such as steps with a sharp softmax.

In some narrow models, FP8 rounding alone may change a tensor by its full magnitude. Its elements are then inconclusive.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.prove import reference
from train.prove.bounds import UNIT, Bound
from train.prove.reference import PlainModel, WatchedPass, Weights
from train.prove.reference_step import PlainPlan
from train.prove.samples import Samples

RUNS, FP32_RUNS = 3, 8
"""Number of perturbed runs: RUNS in low precision, FP32_RUNS in fp32."""
MARGIN = 4.0
"""A rank may differ from the reference by at most MARGIN times the largest change in the perturbed runs.

MARGIN is above 1, because a rank rounds about ten times in a model part, but a perturbed run changes each value once.
"""


@dataclass(frozen=True)
class ReferenceStep:
    """The results of the reference in one step."""

    seen: WatchedPass
    gradients: Weights


def run_reference_step(plain: PlainModel, samples: Samples, plan: PlainPlan) -> ReferenceStep:
    """Runs the reference's forward and backward on one step's batch."""
    batch = samples.batch(plan.first_sample, plan.batch_size)
    seen = reference.gradients(plain, batch, plan.mtp_weight)
    return ReferenceStep(
        seen,
        {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in plain.weights.items() if w.requires_grad},
    )


class PerturbedRuns:
    """The perturbed runs of one step. The first call of `bound` computes them."""

    def __init__(self, plain: PlainModel, samples: Samples, plan: PlainPlan, unit: float, near: float | None):
        """- unit: unit roundoff of the format.
        - near: largest difference of two router scores that counts as a tie. An additional run decides these ties the
          other way in the balance loss. None: no such run.
        """
        self._plain, self._samples, self._plan, self._unit, self._near = plain, samples, plan, unit, near
        self._runs: list[ReferenceStep] = []

    def bound(self, part: Callable[[ReferenceStep], Tensor], want: Tensor, scale: float, by_norm: bool) -> Bound:
        """Returns the bound on the difference between a rank's tensor and the reference's tensor `want`.

        The bound is a fraction of `scale`.

        - part: function that selects the compared tensor of a perturbed run.
        - by_norm: whether to measure the difference by its root mean square; False: by its largest element.
        """
        if not self._runs:
            self._runs = [self._run(seed) for seed in range(FP32_RUNS if self._unit == UNIT["fp32"] else RUNS)]
            if self._near is not None:
                self._runs.append(self._run_swapped(self._near))
        moves = [(part(run).detach().flatten() - want.flatten()).abs() for run in self._runs]
        spread = max((move.square().mean().sqrt() if by_norm else move.max()).item() for move in moves)
        spread = spread / scale if scale else (math.inf if spread else 0.0)
        reason = f"{MARGIN:g} x the largest change of the reference in {len(self._runs)} runs whose parts are perturbed at random by {self._unit:g}"
        return Bound(MARGIN * spread, reason)

    def _run(self, seed: int) -> ReferenceStep:
        generator = torch.Generator().manual_seed(seed)

        def perturb(value: Tensor) -> Tensor:
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            return value * (1 + self._unit * noise)

        class PerturbedParts(WatchedPass):
            def keep(self, name: str, value: Tensor) -> Tensor:
                value = perturb(value)
                if value.requires_grad:
                    value.register_hook(perturb)
                return super().keep(name, value)

        plain = self._plain
        weights = {
            name: perturb(weight.detach()).requires_grad_(weight.requires_grad)
            for name, weight in plain.weights.items()
        }
        moved = PlainModel(plain.config, weights, plain.biases, plain.choices)
        moved.watched = PerturbedParts
        return run_reference_step(moved, self._samples, self._plan)

    def _run_swapped(self, near: float) -> ReferenceStep:
        """Runs the step again. If the last chosen expert and the next one have nearly equal scores, the balance loss
        counts the next one.
        """

        def best(scores: Tensor, count: int) -> Tensor:
            ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
            if count < scores.size(-1):
                tie = ordered[..., count - 1] - ordered[..., count] <= near
                ids[..., count - 1] = ids[..., count].where(tie, ids[..., count - 1])
            return ids[..., :count]

        weights = {
            name: weight.detach().clone().requires_grad_(weight.requires_grad)
            for name, weight in self._plain.weights.items()
        }
        swapped = PlainModel(self._plain.config, weights, self._plain.biases, self._plain.choices)
        swapped.best_without_bias = best
        return run_reference_step(swapped, self._samples, self._plan)
