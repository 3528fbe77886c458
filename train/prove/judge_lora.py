"""Reference for LoRA A and B on each rank: y = W x + scale B (A x), in the activation dtype.

Each matmul with A or B, each multiplication with the scale and each sum is rounded once. The reference uses the
recorded input after dropout. The judge checks the fraction of dropped elements, and the factor by which dropout
multiplied the other elements. It cannot check which elements were dropped.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train.prove import low_precision as low
from train.prove.bounds import Bound
from train.prove.low_precision import FORMATS, FP32, NearNumbers, Total
from train.prove.reference_adapter import lora_prefixes
from train.prove.step_parts import MOST_INCONCLUSIVE, PartCall, StepParts, SumOverCalls

RowMatmul = Callable[[NearNumbers, NearNumbers], Total]
"""Multiplies rows by a weight; for experts, by each expert's matrix."""
AddTo = Callable[[SumOverCalls, NearNumbers, NearNumbers], None]
"""Adds one call's contribution to a weight's gradient. Arguments: sum, output gradients, inputs."""
HEAD_PIECES = 2.0**-8
"""Relative error of a weight gradient of the head. The head adds the gradients of several blocks of tokens. Each of
these gradients, and their sum, may be rounded to bf16.
"""
DEVIATIONS = 6.0
"""Maximum deviation of the fraction of inputs that dropout dropped, in standard deviations."""


class LoraCall(NamedTuple):
    """One call of a linear layer with LoRA A and B."""

    call: PartCall
    dropped: str
    """Name under which the call recorded its input after dropout."""
    x: NearNumbers
    """The layer's input (N, I), before dropout."""
    times: RowMatmul

    def taken(self) -> NearNumbers:
        """Returns the input of LoRA A, after any dropout."""
        # The shapes differ if the call recorded no rows.
        has = self.call.has(self.dropped) and self.call.rows(self.dropped).shape == self.x.x.shape
        return NearNumbers(self.call.rows(self.dropped)) if has else self.x


class WeightLora:
    """LoRA A and B of one weight, and their summed gradients."""

    def __init__(self, step: StepParts, weight: str):
        self._step, self._high, self._share = step, step.rounding.high, step.config.adapter.dropout
        self._scale = step.config.adapter.alpha / step.config.adapter.rank
        self.names = lora_prefixes(step.config, weight)
        """Name prefixes of A and B, one per matrix in the weight."""
        self._made = {f"{name}{end}": SumOverCalls() for name in self.names for end in "BA"}

    def add(self, base: Total, given: LoraCall) -> Total:
        """Returns a linear layer's output: `base` (the output without LoRA) plus the LoRA term."""
        if not self.names:
            return base
        self._judge_dropout(given)
        inners = [self._inner(name, given.taken(), given.times) for name in self.names]
        parts = [self._round(given.times(one, self._b(name))) for one, name in zip(inners, self.names, strict=True)]
        added = Total(
            *(torch.cat(side, -1) for side in zip(*((one.x, one.size, low.slack(one)) for one in parts), strict=True))
        )
        return self._sum([self._round(base), added])

    def add_back(self, base: Total | None, dy: NearNumbers, given: LoraCall, add_to: AddTo) -> Total:
        """Returns a layer's input gradient, and adds to gradients of A and B."""
        terms, taken = [] if base is None else [self._round(base)], given.taken()
        for name, dy_p in zip(self.names, dy.x.chunk(len(self.names), -1), strict=True):
            inner, dy_p = self._inner(name, taken, given.times), NearNumbers(dy_p)
            dinner = self._scaled(self._round(given.times(dy_p, low.transposed(self._b(name)))))
            add_to(self._made[f"{name}A"], dinner, taken)
            add_to(self._made[f"{name}B"], dy_p, inner)
            terms.append(self._through(given, self._round(given.times(dinner, low.transposed(self._a(name))))))
        return self._sum(terms)

    def widen(self, given: LoraCall, weight: Tensor) -> tuple[NearNumbers, Tensor]:
        """Returns the operands of one matmul that includes the LoRA term, as in the output head:

        left     x, concatenated with scale A x
        right    the weight, concatenated with B
        """
        x = given.x
        for name in self.names:
            self._judge_dropout(given)
            x, weight = _beside([x, self._inner(name, given.taken())]), torch.cat([weight, self._b(name).x], -1)
        return x, weight

    def narrow(self, dx: Total, dweight: Total, given: LoraCall) -> Total:
        """Returns the gradient of x, and adds this call's contribution to the gradients of A and B.

        dx, dweight: gradients of the two operands that `widen` returned.
        """
        if not self.names:
            return dx
        (name,), width, taken = self.names, given.x.x.size(-1), given.taken()
        own, beside = (
            Total(*sides)
            for sides in zip(*(one.tensor_split([width], -1) for one in (dx.x, dx.size, low.slack(dx))), strict=True)
        )
        dinner = self._scaled(beside)
        dA = low.matmul(low.transposed(dinner), low.transposed(taken))
        self._made[f"{name}A"].add(dA, self._step.rounds_gradients, len(taken.x))
        dB, size, off = (one[:, width:].clone() for one in (dweight.x, dweight.size, low.slack(dweight)))
        in_bf16 = (
            0.0 if self._high == FORMATS["fp32"] else HEAD_PIECES * size
        )  # the head's GEMM computes dB as part of dweight
        self._made[f"{name}B"].add(Total(dB, size, off + in_bf16), False, len(taken.x))
        return self._sum([own, self._through(given, self._round(low.matmul(dinner, low.transposed(self._a(name)))))])

    def judge_gradients(self, most: float = MOST_INCONCLUSIVE) -> None:
        """Compare gradients of A and B. most: maximum inconclusive fraction."""
        for name, made in self._made.items():
            self._step.compare_gradient(name, made, most=most)

    def _judge_dropout(self, given: LoraCall) -> None:
        """Compare the fraction of inputs that dropout dropped, and its factor on the inputs that it kept."""
        at, name, share, given_x = self._step.at, given.call.name, self._share, given.x.x
        if share and not given.call.has(given.dropped):
            at.fail("dropout", name, "no rank recorded the input after dropout", rank=given.call.rank)
        if not given.call.has(given.dropped):
            return
        got, count = given.taken().x, max(int((given_x != 0).sum()), 1)
        lost = float(((given_x != 0) & (got == 0)).sum()) / count
        bound = Bound(
            DEVIATIONS * (share * (1 - share) / count) ** 0.5, f"{DEVIATIONS:g} standard deviations of a share"
        )
        at.compare("dropout", name, lost, share, bound, rank=given.call.rank, scale=1.0)
        at.acted("adapter.dropout, inputs", int(lost * count), count)
        x, off = (one * (got != 0) / (1 - share) for one in (given_x, low.slack(given.x)))
        rounded = Bound(4 * FP32, "a multiplication in fp32 and one rounding")
        self._step.compare("dropout", given.call, "x", Total(x, x.abs(), off), rounded, got=got, name=name)

    def _through(self, given: LoraCall, dx: Total) -> Total:
        """Applies dropout's backward. It is unknown whether an input of 0 was dropped."""
        if not given.call.has(given.dropped):
            return dx
        factor, unsure = 1 / (1 - self._share), given.x.x == 0
        kept = ((given.taken().x != 0) | unsure) * factor
        return Total(dx.x * kept, dx.size * factor, (low.slack(dx) + dx.x.abs() * unsure) * factor)

    def _a(self, name: str) -> NearNumbers:
        return NearNumbers(self._step.weights[f"{name}A"])

    def _b(self, name: str) -> NearNumbers:
        return NearNumbers(self._step.weights[f"{name}B"])

    def _inner(self, name: str, taken: NearNumbers, times: RowMatmul = low.matmul) -> NearNumbers:
        """Computes scale A x."""
        return self._scaled(self._round(times(taken, self._a(name))))

    def _scaled(self, given: Total) -> NearNumbers:
        x, off = given.x * self._scale, low.slack(given) * self._scale
        if math.frexp(self._scale)[0] == 0.5:
            return NearNumbers(x, off)  # multiplying by a power of two needs no rounding
        return low.rounded(NearNumbers(x, off), self._high, FP32 * x.abs())

    def _round(self, total: Total) -> Total:
        noise = low.slack(total) + self._step.order(self._step.config.model.hidden).value * total.size
        made, more, less = (low.nearest(total.x + side * noise, self._high) for side in (0, 1, -1))
        return Total(made, total.size, torch.maximum(more - made, made - less))

    def _sum(self, terms: list[Total]) -> Total:
        """Returns the sum of the terms, with a rounding per addition."""
        sides = zip(*((one.x, one.size, low.slack(one)) for one in terms), strict=True)
        x, size, off = (torch.stack(side).sum(0) for side in sides)
        sizes = sum(one.x.abs() for one in terms)
        # The additions round their results, and so do the multiplications by dropout's factor.
        roundings = max(len(terms) - 2, 0) + 2 * (self._share > 0)
        return Total(x, size, off + roundings * low.spacing(torch.as_tensor(sizes), self._high) / 2)


def _beside(parts: list[NearNumbers]) -> NearNumbers:
    """Concatenates the numbers, and their possible errors, along the last axis."""
    return NearNumbers(torch.cat([one.x for one in parts], -1), torch.cat([low.slack(one) for one in parts], -1))
