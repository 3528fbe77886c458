"""What single parts of a step are judged with: what each part took and gave on every rank, how a result is compared, and sums over calls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.data.batch import Batch
from train.prove import low_precision as low
from train.prove import reference
from train.prove.bounds import SMALLEST, Bound
from train.prove.comparison import Comparisons, DifferenceMeasure, Measurement
from train.prove.evidence import Evidence, State, assemble
from train.prove.low_precision import FORMATS, FP32, NearNumbers, PlainFormat, Total
from train.prove.samples import initial_weights

TOLD, UNTOLD = 0.05, 0.01
"""What ties may change of the sum of a value's magnitudes; the share of a tensor of which they may change more."""
FEW = 16
"""Numbers that may be so in any tensor: one tie in a tile changes some, which of a small tensor are a large share."""
SHORT = 2.0**-12
"""A GPU's tensor cores sum products of FP8 in some 14 bits, 128 at a time (3.3.2)."""
ELEMENTS = 2.0**-19
"""What is made element by element in fp32: an exponential and some products."""
IN_ELEMENTS = Bound(ELEMENTS, "an exponential and some products in fp32, and one rounding of the result")
WHAT = {
    "x": "input", "y": "output", "dy": "gradient of the output", "dx": "gradient of the input", "h": "first product",
    "dh": "gradient of the first product", "gates": "gates", "dgates": "gradient of the gates", "q": "queries", "k": "keys",
    "v": "values", "dq": "gradient of the queries", "dk": "gradient of the keys", "dv": "gradient of the values",
}  # fmt: skip


@dataclass(frozen=True)
class PartCall:
    """A call of a part on a rank, with what it took and gave."""

    rank: Evidence
    name: str
    number: int
    tensors: dict[str, Tensor]

    def has(self, *whats: str) -> bool:
        return all(what in self.tensors for what in whats)

    def get(self, what: str) -> Tensor:
        """fp64."""
        return self.tensors[what].double()

    def rows(self, what: str) -> Tensor:
        """(rows, width)"""
        return self.get(what).flatten(0, -2)


class StepParts:
    """The single parts of one step of all ranks."""

    def __init__(self, at: Comparisons, ranks: list[Evidence], before: State, batch: Batch):
        """before: the state before the step, of which the weights are. batch: of the step."""
        info, self.at, self.ranks, self.batch, self.config = ranks[0].info, at, ranks, batch, at.values
        self.rounding = low.read_rounding(self.config.precision)
        self.on_gpu, self.cp = info.device == "cuda", info.cp
        masters = {name.removeprefix("master."): w for name, w in before.items() if name.startswith("master.")}
        base = initial_weights(at.config) if at.config.adapter.on else {}  # which no step moves
        given = {name: weight.double() for name, weight in base.items()} | masters
        self.weights = {name: low.nearest(weight, self.rounding.high) for name, weight in given.items()}
        self.trained = reference.trained_shapes(self.config)
        self.biases = {name.removeprefix("bias."): bias for name, bias in before.items() if name.startswith("bias.")}
        self.reduced, self.calls = assemble(ranks, "reduced"), calls_of(ranks)
        self.shared = info.dp * info.cp
        """Ranks over which gradients are averaged."""
        in_fp32 = self.rounding.high == FORMATS["fp32"] or all(one.info.sums_in_fp32 for one in ranks)
        self.rounds_gradients = not in_fp32
        """Whether the gradient of a micro-batch may be rounded to bf16 before it is added up, as torch's products on a CPU do."""

    def through(self, name: str, rank: Evidence, back: bool = True) -> list[PartCall]:
        """Calls of a part on a rank through which gradients went, or did not, in order: those of the micro-batches, and not those that
        are made again for a backward.
        """
        those = [one for one in self.calls.get(name, []) if one.rank is rank and one.has("dy") == back]
        return sorted(those, key=lambda one: one.number)

    def order(self, terms: int) -> Bound:
        """What the order of a sum may change, of the magnitudes that it adds up."""
        if self.on_gpu and self.rounding.is_fp8:
            return Bound(SHORT, "tensor cores sum products of FP8 in some 14 bits")
        value = 8 * FP32 * max(terms, 1) ** 0.5
        return Bound(value, f"8 x 2^-24 x sqrt({terms} terms), of their magnitudes, and one rounding of the result")

    def in_rows(self, terms: int) -> Bound:
        """What the order of a sum in fp32 and some products of single elements may change."""
        value = ELEMENTS + 8 * FP32 * max(terms, 1) ** 0.5
        return Bound(value, f"some products and a sum of {terms} terms in fp32, and one rounding of the result")

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
        most: float = UNTOLD,
    ) -> None:
        """Hold what a call gave to what it should have given. form: of the result. got: where it is a part of what the call has. most: the
        share of numbers that may be not told.
        """
        found = call.get(what) if got is None else got
        measure = beyond_rounding(want, form or self.rounding.high, most)
        named = name or f"{WHAT[what]} of {call.name}"
        self.at.compare(quantity, named, found, want.x, bound, rank=call.rank, measure=measure)

    def compare_gradient(
        self, name: str, made: "SumOverCalls", bound: Bound | None = None, most: float = UNTOLD
    ) -> None:
        """The mean over ranks of what all micro-batches make, beside what the update took."""
        quantity = "gradients of single weights"
        if name not in self.trained:
            return  # beside an adapter
        if made.total is None:
            self.at.fail(quantity, name, "no rank left what it took and gave")
            return
        got, measure = self.reduced[name] * self.shared, beyond_rounding(made.total, FORMATS["fp32"], most)
        self.at.compare(quantity, name, got, made.total.x, bound or self.order(made.terms), measure=measure)


def beyond_rounding(want: Total, form: PlainFormat, most: float = UNTOLD) -> DifferenceMeasure:
    """Measures what is left of a difference beyond one rounding of the result and ties, in the magnitudes that make a value."""

    def measure(got: Tensor, want_N: Tensor) -> Measurement:
        size, off = want.size.flatten(), low.slack(want).flatten()
        beyond = ((got - want_N).abs() - low.spacing(got, form) / 2 - off - SMALLEST).clamp_min_(0)
        errors = torch.where(beyond == 0, 0.0, beyond / size).nan_to_num_(math.inf, math.inf)
        untold, limit = int((off > TOLD * size).sum()), max(most * len(got), FEW)
        return Measurement(errors, errors.max().item(), untold=untold, most_untold=limit)

    return measure


class SumOverCalls:
    """A gradient of a weight."""

    def __init__(self) -> None:
        self.total: Total | None = None
        self.terms = 0

    def add(self, one: Total, is_rounded: bool, terms: int) -> None:
        """is_rounded: to bf16, maybe."""
        off = low.slack(one)
        if is_rounded:
            off = off + (low.spacing(one.x, FORMATS["bf16"]) / 2).masked_fill_(one.size == 0, 0)  # a 0 is not rounded
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
        """Add the gradients of experts, each from its own rows. experts: all that the weight has."""
        if self.total is None:
            self.total = Total(*(left.x.new_zeros(experts, left.x.size(-1), right.x.size(-1)) for _ in range(3)))
        rows = zip(here, low.split_rows(left, counts), low.split_rows(right, counts), strict=True)
        for expert, left_e, right_e in rows:
            if len(left_e.x):
                part = SumOverCalls()
                part.total = Total(*(one[expert] for one in (self.total.x, self.total.size, low.slack(self.total))))
                part.add(low.product(low.transposed(left_e), low.transposed(right_e)), rounded, 0)
        self.terms += max(counts, default=0)


def calls_of(ranks: list[Evidence]) -> dict[str, list[PartCall]]:
    """Calls of every part on all ranks."""
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
