"""What an adapter's pairs add beside a product, forward and backward, on single ranks: y = W x + scale B (A x), A and B in the activations' format.

Every product of a pair is rounded once, and so are its multiple by the scale and every sum. Only A and B learn. What dropout leaves of an
input is taken from the rank: its share and its factor are judged, and not which inputs it drops.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train.prove import low_precision as low
from train.prove.bounds import Bound
from train.prove.low_precision import FORMATS, FP32, NearNumbers, Total
from train.prove.reference_adapter import pairs_of
from train.prove.step_parts import UNTOLD, PartCall, StepParts, SumOverCalls

RowProduct = Callable[[NearNumbers, NearNumbers], Total]
"""Rows (N, C) and a weight (..., O, C): rows times the weight, of experts each row with the matrix of its own."""
AddTo = Callable[[SumOverCalls, NearNumbers, NearNumbers], None]
"""Adds to the gradient of a weight that of its outputs (N, O) and inputs (N, I)."""
HEAD_PIECES = 2.0**-8
"""What rounding to bf16 changes of a sum of pieces and of each of them, at most."""
DEVIATIONS = 6.0
"""By which the share of what is dropped may differ from what it should be."""


class PairsCall(NamedTuple):
    """A call of a product with pairs beside it."""

    call: PartCall
    dropped: str
    """What of the call dropout left of the input."""
    x: NearNumbers
    """The input (N, I)."""
    times: RowProduct

    def taken(self) -> NearNumbers:
        """What the pairs took: the input, or what dropout left of it."""
        has = self.call.has(self.dropped) and self.call.rows(self.dropped).shape == self.x.x.shape  # not of no rows
        return NearNumbers(self.call.rows(self.dropped)) if has else self.x


class WeightPairs:
    """The pairs beside a weight, and the sums of their gradients over calls."""

    def __init__(self, step: StepParts, weight: str):
        self._step, self._high, self._share = step, step.rounding.high, step.config.adapter.dropout
        self._scale = step.config.adapter.alpha / step.config.adapter.rank
        self.names = pairs_of(step.config, weight)
        """What the names of the pairs begin with, one for each matrix in the weight; none where it is not adapted."""
        self._made = {f"{name}{end}": SumOverCalls() for name in self.names for end in "BA"}

    def add(self, base: Total, given: PairsCall) -> Total:
        """A product, and what the pairs make of its input beside it."""
        if not self.names:
            return base
        self._judge_dropout(given)
        inners = [self._inner(name, given.taken(), given.times) for name in self.names]
        parts = [self._round(given.times(one, self._b(name))) for one, name in zip(inners, self.names, strict=True)]
        added = Total(
            *(torch.cat(side, -1) for side in zip(*((one.x, one.size, low.slack(one)) for one in parts), strict=True))
        )
        return self._sum([self._round(base), added])

    def add_back(self, base: Total | None, dy: NearNumbers, given: PairsCall, add_to: AddTo) -> Total:
        """Gradient of an input, with what comes back through the pairs. Adds up the gradients of A and B."""
        terms, taken = [] if base is None else [self._round(base)], given.taken()
        for name, dy_p in zip(self.names, dy.x.chunk(len(self.names), -1), strict=True):
            inner, dy_p = self._inner(name, taken, given.times), NearNumbers(dy_p)
            dinner = self._scaled(self._round(given.times(dy_p, low.transposed(self._b(name)))))
            add_to(self._made[f"{name}A"], dinner, taken)
            add_to(self._made[f"{name}B"], dy_p, inner)
            terms.append(self._through(given, self._round(given.times(dinner, low.transposed(self._a(name))))))
        return self._sum(terms)

    def widen(self, given: PairsCall, weight: Tensor) -> tuple[NearNumbers, Tensor]:
        """Operands of one product that has the pair in it, as the head takes them: low-rank inputs beside x, and B beside the weight."""
        x = given.x
        for name in self.names:
            self._judge_dropout(given)
            x, weight = _beside([x, self._inner(name, given.taken())]), torch.cat([weight, self._b(name).x], -1)
        return x, weight

    def narrow(self, dx: Total, dweight: Total, given: PairsCall) -> Total:
        """Gradient of the input of a product that `widen` made, from those of its operands. Adds up the gradients of A and B."""
        if not self.names:
            return dx
        (name,), width, taken = self.names, given.x.x.size(-1), given.taken()
        own, beside = (
            Total(*sides)
            for sides in zip(*(one.tensor_split([width], -1) for one in (dx.x, dx.size, low.slack(dx))), strict=True)
        )
        dinner = self._scaled(beside)
        dA = low.product(low.transposed(dinner), low.transposed(taken))
        self._made[f"{name}A"].add(dA, self._step.rounds_gradients, len(taken.x))
        dB, size, off = (one[:, width:].clone() for one in (dweight.x, dweight.size, low.slack(dweight)))
        in_bf16 = (
            0.0 if self._high == FORMATS["fp32"] else HEAD_PIECES * size
        )  # a part of an operand that is no weight by itself
        self._made[f"{name}B"].add(Total(dB, size, off + in_bf16), False, len(taken.x))
        return self._sum([own, self._through(given, self._round(low.product(dinner, low.transposed(self._a(name)))))])

    def judge_gradients(self, most: float = UNTOLD) -> None:
        """Compare the gradients of A and B, over all calls. most: the share of numbers that may be not told."""
        for name, made in self._made.items():
            self._step.compare_gradient(name, made, most=most)

    def _judge_dropout(self, given: PairsCall) -> None:
        """Compare the share and the factor of dropout. Which inputs it drops follows from bits that no reference has."""
        at, name, share, given_x = self._step.at, given.call.name, self._share, given.x.x
        if share and not given.call.has(given.dropped):
            at.fail("dropout", name, "no pair left what it took", rank=given.call.rank)
        if not given.call.has(given.dropped):
            return
        got, count = given.taken().x, max(int((given_x != 0).sum()), 1)
        lost = float(((given_x != 0) & (got == 0)).sum()) / count
        bound = Bound(
            DEVIATIONS * (share * (1 - share) / count) ** 0.5, f"{DEVIATIONS:g} standard deviations of a share"
        )
        at.compare("dropout", name, lost, share, bound, rank=given.call.rank, scale=1.0)
        x, off = (one * (got != 0) / (1 - share) for one in (given_x, low.slack(given.x)))
        rounded = Bound(4 * FP32, "a product in fp32 and one rounding")
        self._step.compare("dropout", given.call, "x", Total(x, x.abs(), off), rounded, got=got, name=name)

    def _through(self, given: PairsCall, dx: Total) -> Total:
        """A gradient of the input that goes back through dropout. Whether it dropped an input of 0 is not seen."""
        if not given.call.has(given.dropped):
            return dx
        factor, unsure = 1 / (1 - self._share), given.x.x == 0
        kept = ((given.taken().x != 0) | unsure) * factor
        return Total(dx.x * kept, dx.size * factor, (low.slack(dx) + dx.x.abs() * unsure) * factor)

    def _a(self, name: str) -> NearNumbers:
        return NearNumbers(self._step.weights[f"{name}A"])

    def _b(self, name: str) -> NearNumbers:
        return NearNumbers(self._step.weights[f"{name}B"])

    def _inner(self, name: str, taken: NearNumbers, times: RowProduct = low.product) -> NearNumbers:
        """scale A x."""
        return self._scaled(self._round(times(taken, self._a(name))))

    def _scaled(self, given: Total) -> NearNumbers:
        x, off = given.x * self._scale, low.slack(given) * self._scale
        if math.frexp(self._scale)[0] == 0.5:
            return NearNumbers(x, off)  # a power of two rounds nothing
        return low.rounded(NearNumbers(x, off), self._high, FP32 * x.abs())

    def _round(self, total: Total) -> Total:
        noise = low.slack(total) + self._step.order(self._step.config.model.hidden).value * total.size
        made, more, less = (low.nearest(total.x + side * noise, self._high) for side in (0, 1, -1))
        return Total(made, total.size, torch.maximum(more - made, made - less))

    def _sum(self, terms: list[Total]) -> Total:
        """Added one after another and rounded after each, in any order."""
        sides = zip(*((one.x, one.size, low.slack(one)) for one in terms), strict=True)
        x, size, off = (torch.stack(side).sum(0) for side in sides)
        sizes = sum(one.x.abs() for one in terms)
        roundings = max(len(terms) - 2, 0) + 2 * (self._share > 0)  # of sums, and of what dropout multiplies
        return Total(x, size, off + roundings * low.spacing(torch.as_tensor(sizes), self._high) / 2)


def _beside(parts: list[NearNumbers]) -> NearNumbers:
    """Side by side."""
    return NearNumbers(torch.cat([one.x for one in parts], -1), torch.cat([low.slack(one) for one in parts], -1))
