"""What rounding does to the reference itself: how far a step moves when every part of it is shaken by as much as a format rounds.

A bound from the number of products alone does not know how sensitive a step is. Where a softmax is sharp, a gradient is the
difference of large numbers, or a width of 16 averages few roundings, honest ranks differ by several times that bound. So the
reference runs the step again with every weight, every output of a part and every gradient of one off at random by the unit
roundoff of the format: no sum of roundings on that way is likely to be larger. Where rounding alone may move a tensor by its own
size, as FP8 does in some thin models, this pass says nothing of it, and the certificate counts it as not told; the passes exact
and fp32 do.
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
"""Runs of the shaken reference: in fp32 they are seldom asked for, and are more, since the largest of few falls short for a weight of few
elements (8 of a gain differed by 4.8 times the largest of three runs on one processor)."""
MARGIN = 4.0
"""By how much a difference may exceed the largest of these runs. They shake a part once, and inside it a rank rounds some ten times
(attention: projections, norms, RoPE, scores, softmax, sums), which adds up to sqrt(10) = 3.2 times as much; and the runs are few."""


@dataclass(frozen=True)
class ReferenceStep:
    """What the reference came to in a step."""

    seen: WatchedPass
    gradients: Weights


def run_shaken_step(plain: PlainModel, samples: Samples, plan: PlainPlan) -> ReferenceStep:
    """Forward and backward of the batch of a step. A weight that nothing reached has a gradient of zeros."""
    batch = samples.batch(plan.first_sample, plan.batch_size)
    seen = reference.gradients(plain, batch, plan.mtp_weight)
    return ReferenceStep(
        seen,
        {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in plain.weights.items() if w.requires_grad},
    )


class ShakenRuns:
    """The shaken runs of one step, which are made when the first of them is asked for."""

    def __init__(self, plain: PlainModel, samples: Samples, plan: PlainPlan, unit: float, near: float | None):
        """unit: roundoff of the format, of the value itself. near: scores that are no farther apart may change places in the balance
        loss, which they hardly ever do, so that runs at random do not show it; None where they do.
        """
        self._plain, self._samples, self._plan, self._unit, self._near = plain, samples, plan, unit, near
        self._runs: list[ReferenceStep] = []

    def bound(self, part: Callable[[ReferenceStep], Tensor], want: Tensor, scale: float, by_norm: bool) -> Bound:
        """How far `part` of a step may be from `want`, in units of `scale`: by the norm, or the largest of its values."""
        if not self._runs:
            self._runs = [self._run(seed) for seed in range(FP32_RUNS if self._unit == UNIT["fp32"] else RUNS)]
            if self._near is not None:
                self._runs.append(self._run_turned(self._near))
        moves = [(part(run).detach().flatten() - want.flatten()).abs() for run in self._runs]
        spread = max((move.square().mean().sqrt() if by_norm else move.max()).item() for move in moves)
        spread = spread / scale if scale else (math.inf if spread else 0.0)
        reason = (
            f"{MARGIN:g} x what the reference itself moves by where each part of the step is off by {self._unit:g} at random, "
            f"the largest of {len(self._runs)} runs"
        )
        return Bound(MARGIN * spread, reason)

    def _run(self, seed: int) -> ReferenceStep:
        generator = torch.Generator().manual_seed(seed)

        def shake(value: Tensor) -> Tensor:
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            return value * (1 + self._unit * noise)

        class ShakenParts(WatchedPass):
            def keep(self, name: str, value: Tensor) -> Tensor:
                value = shake(value)
                if value.requires_grad:
                    value.register_hook(shake)
                return super().keep(name, value)

        plain = self._plain
        weights = {
            name: shake(weight.detach()).requires_grad_(weight.requires_grad) for name, weight in plain.weights.items()
        }
        moved = PlainModel(plain.config, weights, plain.biases, plain.choices)
        moved.watched = ShakenParts
        return run_shaken_step(moved, self._samples, self._plan)

    def _run_turned(self, near: float) -> ReferenceStep:
        """Balance losses count the other one of two experts that nearly tie for the last place."""

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
        turned = PlainModel(self._plain.config, weights, self._plain.biases, self._plain.choices)
        turned.best_without_bias = best
        return run_shaken_step(turned, self._samples, self._plan)
