"""Reads the recorded tensors of single model parts, compares them, and sums gradients over the calls of a part."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.data.batch import Batch
from train.prove import low_precision as low
from train.prove import reference
from train.prove.bounds import Bound
from train.prove.comparison import Comparisons, DifferenceMeasure, Measurement
from train.prove.evidence import Evidence, State, assemble
from train.prove.low_precision import FORMATS, FP32, NearNumbers, PlainFormat, Total
from train.prove.samples import initial_weights

INCONCLUSIVE, MOST_INCONCLUSIVE = 0.05, 0.01
"""INCONCLUSIVE: an element is inconclusive if rounding ties may change it by more than this fraction of the sum of its
terms' magnitudes.
MOST_INCONCLUSIVE: maximum fraction of inconclusive elements."""
FEW = 16
"""Number of inconclusive elements that even a small tensor may have."""
FLUSHED = 2.0**-110
"""Absolute error of sums in which fp32 flushes small factors to 0."""
SHORT = 2.0**-12
"""Relative error of tensor cores, which sum FP8 with 14 bits (paper 3.3.2)."""
ELEMENTS = 2.0**-19
"""Relative error of elementwise fp32 arithmetic with one exponential."""
IN_ELEMENTS = Bound(ELEMENTS, "an exponential and some multiplications in fp32, and one rounding of the result")
WHAT = {
    "x": "input", "y": "output", "dy": "gradient of the output", "dx": "gradient of the input", "h": "first matmul",
    "dh": "gradient of the first matmul", "gates": "gates", "dgates": "gradient of the gates", "q": "queries", "k": "keys",
    "v": "values", "dq": "gradient of the queries", "dk": "gradient of the keys", "dv": "gradient of the values",
}  # fmt: skip


@dataclass(frozen=True)
class PartCall:
    """One call of a model part on a rank."""

    rank: Evidence
    name: str
    number: int
    tensors: dict[str, Tensor]

    def has(self, *whats: str) -> bool:
        return all(what in self.tensors for what in whats)

    def get(self, what: str) -> Tensor:
        """Returns a recorded tensor of the call, in fp64."""
        return self.tensors[what].double()

    def rows(self, what: str) -> Tensor:
        """Returns a recorded tensor of the call, as fp64 (rows, width)."""
        return self.get(what).flatten(0, -2)


class StepParts:
    """The calls of model parts that all ranks recorded in one step."""

    def __init__(self, at: Comparisons, ranks: list[Evidence], before: State, batch: Batch):
        """before: state before the step. batch: the step's batch."""
        info, self.at, self.ranks, self.batch, self.config = ranks[0].info, at, ranks, batch, at.values
        self.rounding = low.read_rounding(self.config.precision)
        self.on_gpu, self.cp = info.device == "cuda", info.cp
        masters = {name.removeprefix("master."): w for name, w in before.items() if name.startswith("master.")}
        base = initial_weights(at.config) if at.config.adapter.on else {}  # no step changes the base weights
        given = {name: weight.double() for name, weight in base.items()} | masters
        self.weights = {name: low.nearest(weight, self.rounding.high) for name, weight in given.items()}
        self.trained = reference.trained_shapes(self.config)
        self.biases = {name.removeprefix("bias."): bias for name, bias in before.items() if name.startswith("bias.")}
        self.reduced, self.calls = assemble(ranks, "reduced"), calls_of(ranks)
        self.shared = info.dp * info.cp
        """Number of ranks over which the gradients of weights are averaged."""
        in_fp32 = self.rounding.high == FORMATS["fp32"] or all(one.info.sums_in_fp32 for one in ranks)
        self.rounds_gradients = not in_fp32
        """Whether a micro-batch's weight gradient may be rounded to bf16."""

    def through(self, name: str, rank: Evidence, back: bool = True) -> list[PartCall]:
        """Returns the calls of a model part on a rank, in order.

        back: True selects the calls with gradients, False selects the calls without.

        With context parallelism, backward repeats the calls of kv_up. Only the calls in backward have gradients.
        """
        those = [one for one in self.calls.get(name, []) if one.rank is rank and one.has("dy") == back]
        return sorted(those, key=lambda one: one.number)

    def order(self, terms: int) -> Bound:
        """Returns the bound on a sum's error, relative to its terms' magnitudes."""
        if self.on_gpu and self.rounding.is_fp8:
            return Bound(SHORT, "tensor cores sum FP8 multiplications in about 14 bits")
        value = 8 * FP32 * max(terms, 1) ** 0.5
        return Bound(value, f"8 x 2^-24 x sqrt({terms} terms), of their magnitudes, and one rounding of the result")

    def in_rows(self, terms: int) -> Bound:
        """Returns the bound on errors of products and an fp32 sum."""
        value = ELEMENTS + 8 * FP32 * max(terms, 1) ** 0.5
        return Bound(value, f"some multiplications and a sum of {terms} terms in fp32, and one rounding of the result")

    def compare(
        self,
        quantity: str,
        call: PartCall,
        what: str,
        want: Total,
        bound: Bound,
        form: PlainFormat | None = None,
        got: Tensor | None = None,
        name: str | None = None,
        most: float = MOST_INCONCLUSIVE,
    ) -> None:
        """Compare one result of a call with the expected result.

        - form: format of the result.
        - got: tensor to compare; None: the recorded result.
        - most: maximum fraction of inconclusive elements.
        """
        found = call.get(what) if got is None else got
        measure = beyond_rounding(want, form or self.rounding.high, most)
        named = name or f"{WHAT[what]} of {call.name}"
        self.at.compare(quantity, named, found, want.x, bound, rank=call.rank, measure=measure)

    def compare_gradient(
        self, name: str, made: "SumOverCalls", bound: Bound | None = None, most: float = MOST_INCONCLUSIVE
    ) -> None:
        """Compare a weight's reduced gradient with the sum over calls."""
        quantity = "gradients of single weights"
        if name not in self.trained:
            return  # base weight of an adapter
        if made.total is None:
            self.at.fail(quantity, name, "no rank recorded its inputs and outputs")
            return
        got, measure = self.reduced[name] * self.shared, beyond_rounding(made.total, FORMATS["fp32"], most)
        self.at.compare(quantity, name, got, made.total.x, bound or self.order(made.terms), measure=measure)


def beyond_rounding(want: Total, form: PlainFormat, most: float = MOST_INCONCLUSIVE) -> DifferenceMeasure:
    """Returns a function that measures differences beyond rounding, relative to the sum of the terms' magnitudes.

    most: maximum fraction of inconclusive elements.
    """

    def measure(got: Tensor, want_N: Tensor) -> Measurement:
        size, off = want.size.flatten(), low.slack(want).flatten()
        beyond = ((got - want_N).abs() - low.spacing(got, form) / 2 - off - FLUSHED).clamp_min_(0)
        errors = torch.where(beyond == 0, 0.0, beyond / size).nan_to_num_(math.inf, math.inf)
        inconclusive, limit = int((off > INCONCLUSIVE * size).sum()), max(most * len(got), FEW)
        return Measurement(errors, errors.max().item(), inconclusive=inconclusive, most_inconclusive=limit)

    return measure


class SumOverCalls:
    """The expected gradient of a weight, summed over calls."""

    def __init__(self) -> None:
        self.total: Total | None = None
        self.terms = 0

    def add(self, one: Total, is_rounded: bool, terms: int) -> None:
        """Add one call's contribution, which may be rounded to bf16 (`is_rounded`)."""
        off = low.slack(one)
        if is_rounded:
            off = off + (low.spacing(one.x, FORMATS["bf16"]) / 2).masked_fill_(
                one.size == 0, 0
            )  # a sum without non-zero terms is exact
        self.terms += terms
        if self.total is None:
            self.total = Total(one.x, one.size, off)
            return
        for mine, more in zip(self.total, (one.x, one.size, off), strict=True):
            assert mine is not None
            mine += more

    def add_rows(
        self, left: NearNumbers, right: NearNumbers, counts: Sequence[int], here: range, experts: int, rounded: bool
    ) -> None:
        """Add the experts' gradients. counts: number of rows of each expert."""
        if self.total is None:
            self.total = Total(*(left.x.new_zeros(experts, left.x.size(-1), right.x.size(-1)) for _ in range(3)))
        rows = zip(here, low.split_rows(left, counts), low.split_rows(right, counts), strict=True)
        for expert, left_e, right_e in rows:
            if len(left_e.x):
                part = SumOverCalls()
                part.total = Total(*(one[expert] for one in (self.total.x, self.total.size, low.slack(self.total))))
                part.add(low.matmul(low.transposed(left_e), low.transposed(right_e)), rounded, 0)
        self.terms += max(counts, default=0)


def calls_of(ranks: list[Evidence]) -> dict[str, list[PartCall]]:
    """Maps the name of each model part to all ranks' calls."""
    found: dict[tuple[int, str, int], PartCall] = {}
    by_name: dict[str, list[PartCall]] = {}
    for rank in ranks:
        for key, tensor in rank.tensors.items():
            if key.startswith("part."):
                what, rest = key.removeprefix("part.").split("/", 1)
                name, number = rest.rsplit("/", 1)
                key = rank.info.rank, name, int(number)
                if key not in found:
                    found[key] = PartCall(rank, name, int(number), {})
                    by_name.setdefault(name, []).append(found[key])
                found[key].tensors[what] = tensor
    return by_name
