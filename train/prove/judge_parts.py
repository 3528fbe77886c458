"""Single parts of the ranks in the pass `recipe`, each held against what it should have made of what it really took.

A rank's own inputs and gradients of outputs (train/prove/parts.py) go through train/prove/low_precision.py, which rounds where the
recipe rounds. What is left is the order of a sum and one rounding, so that a bound is a few millionths of a sum's magnitudes in
the place of the three quarters that outputs of a whole model in FP8 need. A difference is measured beyond half a step of the format
of the result, in units of the sum of the magnitudes that make the value. A gradient of a weight is the sum over all
micro-batches and the mean over all ranks, as the update takes it.

Numbers of which ties may change more than TOLD of that sum are not told, and more than UNTOLD of a tensor fails: nothing would be proven.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import Config
from train.data.batch import Batch
from train.prove import low_precision as low
from train.prove import reference
from train.prove.bounds import Bound
from train.prove.comparisons import Comparisons
from train.prove.evidence import Evidence
from train.prove.findings import ProofFindings, ProofVerdict, share_of_bound
from train.prove.judge_update import State, assemble
from train.prove.low_precision import FORMATS, FP32, LinearRules, NearNumbers, PlainFormat, Total

PartJudges = list[tuple[str, tuple[Callable[[str], None], Callable[[str], None]]]]
"""Parts by name in the order of a forward pass, with what judges their forward and their backward."""
TOLD, UNTOLD = 0.05, 0.01
"""What ties may change of the sum of a value's magnitudes; the share of a tensor of which they may change more."""
FEW = 16
"""Numbers that may be so in any tensor: one tie in a tile changes some, which of a small tensor are a large share."""
SHORT = 2.0**-12
"""A GPU's tensor cores sum products of FP8 in some 14 bits, 128 at a time (3.3.2)."""
ELEMENTS = 2.0**-19
"""What is made element by element in fp32: an exponential and some products."""


@dataclass(frozen=True)
class PartCall:
    """A call of a part on a rank, with what it took and gave."""

    rank: Evidence
    name: str
    number: int
    tensors: dict[str, Tensor]

    def has(self, *whats: str) -> bool:
        return all(what in self.tensors for what in whats)

    def is_beside(self, other: "PartCall") -> bool:
        """Whether another part was called so for the same micro-batch."""
        return self.rank is other.rank and self.number == other.number

    def get(self, what: str) -> Tensor:
        """fp64."""
        return self.tensors[what].double()

    def rows(self, what: str) -> Tensor:
        """(rows, width)"""
        return self.get(what).flatten(0, -2)


class PartsJudge(Comparisons):
    """The judge of one step of all ranks."""

    def __init__(
        self,
        proof: str,
        config: Config,
        findings: ProofFindings,
        ranks: list[Evidence],
        before: State,
        batch: Batch,
    ):
        """before: the state before the step, of which the weights are. batch: of the step."""
        super().__init__(proof, config, findings)
        info, self.ranks, self.batch = ranks[0].info, ranks, batch
        self.part, self.step = info.part, info.step
        self.rounding = low.read_rounding(self.config.precision)
        self.on_gpu = info.device == "cuda"
        masters = {name.removeprefix("master."): w for name, w in before.items() if name.startswith("master.")}
        self.weights = {name: low.nearest(master, self.rounding.high) for name, master in masters.items()}
        self.reduced = assemble(ranks, "reduced")
        self.shared = info.dp * info.cp
        """Ranks over which gradients are averaged."""
        self.cp = info.cp
        self.rounds_gradients = self.rounding.high != FORMATS["fp32"] and not all(
            one.info.sums_in_fp32 for one in ranks
        )
        """Whether the gradient of a micro-batch may be rounded to bf16 before it is added up, as torch's products on a CPU do."""
        self.biases = {name.removeprefix("bias."): bias for name, bias in before.items() if name.startswith("bias.")}
        self.calls = calls_of(ranks)
        self._due = {rank.info.rank: micro_batches(rank) for rank in ranks}

    def judge_all(self) -> None:
        """Forward from the first part to the last, backward from the last to the first; nothing where something was not seen."""
        parts, failed = self._parts(), len(self.findings.differences)
        self.phase = "forward"
        for name, _ in parts:
            self._is_there(name)
        self.phase = "backward"
        for name, _ in reversed(parts):
            self._all_went_back(name)
        if len(self.findings.differences) > failed:
            return
        self.phase = "forward"
        for name, (forward, _) in parts:
            forward(name)
        self.phase = "backward"
        for name, (_, backward) in reversed(parts):
            backward(name)

    def _is_there(self, name: str) -> None:
        within = ("", ".w13", ".0", ".out", ".ffn_norm")  # of an FFN, the head, attention, and a block
        if not any(self.calls.get(f"{name}{part}") for part in within):
            self._fail("parts", name, None, math.nan, math.nan, "no rank left what it took and gave")

    def _parts(self) -> PartJudges:
        parts: PartJudges = []
        for weight in reference.weight_shapes(self.config.model):
            name = weight.removesuffix(".weight").removesuffix(".experts.w13")
            judges = (
                (self._experts, self._experts_back) if name != weight.removesuffix(".weight") else self._judges_of(name)
            )
            if judges is not None:
                parts.append((name, judges))
        return parts

    def _judges_of(self, name: str) -> tuple[Callable[[str], None], Callable[[str], None]] | None:
        """The judges of a part with one weight; None where nothing here judges it."""
        apart = name.endswith((".experts.w2", "norm", ".router")) or name in ("embedding", "head")
        return None if apart else (self._linear, self._linear_back)

    def _all_went_back(self, name: str) -> None:
        """Every micro-batch has to give the part a gradient."""
        for rank in self.ranks:
            those = [call for call in self.calls.get(name, []) if call.rank is rank]
            if not those or name == "embedding":
                continue  # another rank's; or of a table that MTP modules have too, which a micro-batch meets twice
            back, due = (
                sum(call.has("dx" if name.endswith(".router") else "dy") for call in those),
                self._due[rank.info.rank],
            )
            if back != due and not (rank.info.cp > 1 and name.endswith(".kv_up")):  # which makes keys block by block
                self._fail(
                    "parts", name, rank.info.rank, back, due, "not every micro-batch came back, or one came twice"
                )

    # Linear layers

    def _linear(self, name: str) -> None:
        rules = self._rules(name)
        weight = low.weight_for("fprop", self.weights[f"{name}.weight"], rules)
        for call in self.calls.get(name, []):
            total = low.fprop(call.rows("x"), weight, rules)
            self._total("products", call, "y", call.rows("y"), total, self._order(weight.x.size(-1)))

    def _linear_back(self, name: str) -> None:
        rules, whole = self._rules(name), self.weights[f"{name}.weight"]
        weight, made = low.weight_for("dgrad", whole, rules), SumOverCalls()
        for call in self.calls.get(name, []):
            if not call.has("dy"):
                continue
            dy_TN = NearNumbers(call.rows("dy"))
            if call.has("dx"):
                total = low.dgrad(dy_TN, weight, rules)
                self._total("products", call, "dx", call.rows("dx"), total, self._order(len(whole)))
            made.add(
                low.wgrad(dy_TN, low.kept(call.rows("x"), rules.kept), rules), self._rounds_gradients, len(dy_TN.x)
            )
        self._gradient(f"{name}.weight", made)

    def _rules(self, name: str) -> LinearRules:
        return self.rounding.output if name.endswith(".attention.out") else self.rounding.dense

    @property
    def _rounds_gradients(self) -> bool:
        """Whether that is so of products that a recipe may have in FP8."""
        return self.rounds_gradients and not self.rounding.is_fp8

    # Experts

    def _experts(self, name: str) -> None:
        up, down, high = self.rounding.up, self.rounding.down, self.rounding.high
        w13 = low.weight_for("fprop", self.weights[f"{name}.experts.w13"], up)
        w2 = low.weight_for("fprop", self.weights[f"{name}.experts.w2"], down)
        for call in self.calls.get(name, []):
            counts, here = self._here(call)
            x_RD = low.cast_rows(NearNumbers(call.get("x")), counts, up.fprop[0], -1)
            h_R2F = by_expert(x_RD, counts, w13, here)
            self._total("products of experts", call, "h", call.get("h"), h_R2F, self._order(w13.x.size(-1)))
            a_RF = low.swiglu(call.get("h"), call.get("gates"))
            if down.fprop[0] is None:
                a = low.rounded(NearNumbers(a_RF), high, low.CURVED * a_RF.abs())
            else:
                a = low.cast_rows(NearNumbers(a_RF), counts, down.fprop[0], -1, low.CURVED)
            y_RD = by_expert(a, counts, w2, here)
            self._total("products of experts", call, "y", call.get("y"), y_RD, self._order(w2.x.size(-1)))

    def _experts_back(self, name: str) -> None:
        up, down, high = self.rounding.up, self.rounding.down, self.rounding.high
        w13 = _turned(low.weight_for("dgrad", self.weights[f"{name}.experts.w13"], up))
        w2 = _turned(low.weight_for("dgrad", self.weights[f"{name}.experts.w2"], down))
        made13, made2 = SumOverCalls(), SumOverCalls()
        for call in self.calls.get(name, []):
            if not call.has("dy", "dh"):
                continue
            counts, here = self._here(call)
            dy_RD = low.cast_rows(NearNumbers(call.get("dy")), counts, down.dgrad[0], -1)
            da_RF = by_expert(dy_RD, counts, w2, here)
            da = low.rounded(da_RF, high, self._order(w2.x.size(-1)).value * da_RF.size)
            h = low.cast_rows(NearNumbers(call.get("h")), counts, self.rounding.swiglu, -1)
            back = low.swiglu_backward(h, call.get("gates"), da, high)
            self._total("SwiGLU of experts", call, "dh", call.get("dh"), back.dh, in_elements())
            if call.has("dgates"):
                gates, order = call.get("dgates"), self._order(da.x.size(-1))
                self._total("SwiGLU of experts", call, "dgates", gates, back.dgates, order, FORMATS["fp32"])
            dh = NearNumbers(call.get("dh"))
            if call.has("dx"):
                dx_RD = by_expert(low.cast_rows(dh, counts, up.dgrad[0], -1), counts, w13, here)
                self._total("products of experts", call, "dx", call.get("dx"), dx_RD, self._order(w13.x.size(-1)))
            x = low.cast_rows(NearNumbers(call.get("x")), counts, up.kept, -1)
            left, right = (low.cast_rows(one, counts, rule, -2) for one, rule in zip((dh, x), up.wgrad, strict=True))
            made13.add_rows(left, right, counts, here, self.weights[f"{name}.experts.w13"], self._rounds_gradients)
            pairs = zip((dy_RD, back.a), down.wgrad, strict=True)
            left, right = (low.cast_rows(one, counts, rule, -2) for one, rule in pairs)
            made2.add_rows(left, right, counts, here, self.weights[f"{name}.experts.w2"], self._rounds_gradients)
        self._gradient(f"{name}.experts.w2", made2)
        self._gradient(f"{name}.experts.w13", made13)

    def _here(self, call: PartCall) -> tuple[list[int], range]:
        """Rows of each expert that the rank has, and which ones of all these are."""
        counts, first = call.tensors["counts"].tolist(), int(call.tensors["first"])
        return counts, range(first, first + len(counts))

    # Comparisons

    def _order(self, terms: int) -> Bound:
        """What the order of a sum may change, of the magnitudes that it adds up."""
        if self.on_gpu and self.rounding.is_fp8:
            return Bound(SHORT, "tensor cores sum products of FP8 in some 14 bits")
        value = 8 * FP32 * max(terms, 1) ** 0.5
        return Bound(value, f"8 x 2^-24 x sqrt({terms} terms), of their magnitudes, and one rounding of the result")

    def _total(
        self,
        quantity: str,
        call: PartCall,
        what: str,
        got: Tensor,
        want: Total,
        bound: Bound,
        form: PlainFormat | None = None,
    ) -> None:
        self._near(
            quantity, f"{WHAT[what]} of {call.name}", call.rank.info.rank, got, want, bound, form or self.rounding.high
        )

    def _gradient(self, name: str, made: "SumOverCalls", bound: Bound | None = None) -> None:
        """The mean over ranks of what all micro-batches make, beside what the update took."""
        if made.total is None:
            self._fail(
                "gradients of single weights", name, None, math.nan, math.nan, "no rank left what it took and gave"
            )
            return
        bound = bound or self._order(made.terms)
        got = self.reduced[name] * self.shared
        self._near("gradients of single weights", name, None, got, made.total, bound, FORMATS["fp32"])

    def _near(
        self, quantity: str, name: str, rank: int | None, got: Tensor, want: Total, bound: Bound, form: PlainFormat
    ) -> None:
        if got.shape != want.x.shape:
            self._fail(quantity, name, rank, got.numel(), want.x.numel(), "another number of elements")
            return
        if not got.numel():
            return
        allowed = low.spacing(got, form) / 2
        if want.off is not None:
            allowed += want.off
        beyond = ((got - want.x).abs() - allowed).clamp_min_(0)
        errors = torch.where(beyond == 0, 0.0, beyond / want.size).nan_to_num_(math.inf, math.inf)
        error = errors.max().item()
        verdict = self.findings.verdicts.setdefault((self.proof, quantity), ProofVerdict(self.proof, quantity))
        untold = 0 if want.off is None else int((want.off > TOLD * want.size).sum())
        verdict.untold += untold
        verdict.compared += got.numel() - untold
        verdict.tell_bound(bound.value)
        if share_of_bound(error, bound.value) >= verdict.share:
            verdict.worst, verdict.bound, verdict.reason = error, bound.value, bound.reason
            verdict.where = f"step {self.step}, {name}"
        place = int(errors.argmax())
        if error > bound.value:
            verdict.failed += 1
            self._differ(
                quantity, name, rank, got.flatten()[place].item(), want.x.flatten()[place].item(), error, bound
            )
        elif untold > max(UNTOLD * got.numel(), FEW):
            reason = f"not told: ties may change more than {TOLD:g} of a sum in more than {UNTOLD:g} of the numbers"
            self._fail(quantity, name, rank, untold, got.numel(), reason)


WHAT = {
    "x": "input", "y": "output", "dy": "gradient of the output", "dx": "gradient of the input", "h": "first product",
    "dh": "gradient of the first product", "gates": "gates", "dgates": "gradient of the gates", "q": "queries", "k": "keys",
    "v": "values", "dq": "gradient of the queries", "dk": "gradient of the keys", "dv": "gradient of the values",
}  # fmt: skip


class SumOverCalls:
    """A gradient of a weight."""

    def __init__(self) -> None:
        self.total: Total | None = None
        self.terms = 0

    def add(self, one: Total, is_rounded: bool, terms: int) -> None:
        """is_rounded: to bf16, maybe."""
        off = one.off
        if is_rounded:
            half = (low.spacing(one.x, FORMATS["bf16"]) / 2).masked_fill_(one.size == 0, 0)  # a 0 is not rounded
            off = half if off is None else off + half
        self.terms += terms
        if self.total is None:
            self.total = Total(one.x, one.size, torch.zeros_like(one.x) if off is None else off)
            return
        for mine, more in zip(self.total, (one.x, one.size, off), strict=True):
            if mine is not None and more is not None:
                mine += more

    def add_rows(
        self,
        left: NearNumbers,
        right: NearNumbers,
        counts: Sequence[int],
        here: range,
        weight: Tensor,
        is_rounded: bool,
    ) -> None:
        """Add the gradients of experts, each from its own rows."""
        if self.total is None:
            self.total = Total(*(torch.zeros_like(weight) for _ in range(3)))
        x, size, off = self.total
        assert off is not None
        for expert, left_e, right_e in zip(
            here, low.split_rows(left, counts), low.split_rows(right, counts), strict=True
        ):
            if len(left_e.x):
                part = SumOverCalls()
                part.total = Total(x[expert], size[expert], off[expert])
                part.add(low.product(_turned(left_e), _turned(right_e)), is_rounded, 0)
        self.terms += max(counts, default=0)


def _turned(x: NearNumbers) -> NearNumbers:
    return NearNumbers(x.x.mT, None if x.off is None else x.off.mT)


def in_elements() -> Bound:
    """What arithmetic on single elements may differ by."""
    return Bound(ELEMENTS, "an exponential and some products in fp32, and one rounding of the result")


def by_expert(rows: NearNumbers, counts: Sequence[int], weight: NearNumbers, here: range) -> Total:
    """Rows of each expert times its own matrix. weight: (E, N, C), of all experts."""
    parts = []
    for expert, one in zip(here, low.split_rows(rows, counts), strict=True):
        if len(one.x):
            parts.append(
                low.product(one, NearNumbers(weight.x[expert], None if weight.off is None else weight.off[expert]))
            )
    if not parts:
        empty = rows.x.new_zeros(0, weight.x.size(1))
        return Total(empty, empty, None)
    offs = [torch.zeros_like(part.x) if part.off is None else part.off for part in parts]
    return Total(torch.cat([part.x for part in parts]), torch.cat([part.size for part in parts]), torch.cat(offs))


def calls_of(ranks: list[Evidence]) -> dict[str, list[PartCall]]:
    """Calls of every part on all ranks."""
    found: dict[tuple[int, str, int], PartCall] = {}
    for rank in ranks:
        for key, tensor in rank.tensors.items():
            if key.startswith("part."):
                what, rest = key.removeprefix("part.").split("/", 1)
                name, number = rest.rsplit("/", 1)
                call = PartCall(rank, name, int(number), {})
                found.setdefault((rank.info.rank, name, int(number)), call).tensors[what] = tensor
    by_name: dict[str, list[PartCall]] = {}
    for call in found.values():
        by_name.setdefault(call.name, []).append(call)
    return by_name


def micro_batches(rank: Evidence) -> int:
    """That went through a rank."""
    return 1 + max((int(key.rsplit("/", 1)[1]) for key, _ in rank.of_kind("forward")), default=-1)
