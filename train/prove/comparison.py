"""Compares values of the ranks with expected values."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from conf.schema import Config
from train.prove.bounds import Bound, is_low, is_rounded
from train.prove.evidence import Evidence
from train.prove.findings import Difference, ProofFindings, ProofVerdict, share_of_bound
from train.prove.recipe_values import read_values

MISSING = 1.0
"""Relative error of a missing value. Bounds must be smaller."""
LOOSE = ("outputs", "losses", "gradients of weights", "gradients of outputs")
"""Quantities that checks with rounding compare by norm."""
BITS, WHOLE_NUMBERS = Bound(0.0, "bit for bit"), Bound(0.0, "whole numbers")


class Measurement(NamedTuple):
    """A measured difference, in the unit of its bound."""

    errors: Tensor
    """Error of each element."""
    error: float
    """The error that is compared with the bound."""
    scale: float | None = None
    """The unit of the errors of all elements; None if elements have different units."""
    share: float = 1.0
    """The unit of the errors, as a fraction of the compared tensor's magnitude."""
    inconclusive: int = 0
    """Number of elements in which rounding could hide a fault."""
    most_inconclusive: float = math.inf
    """Maximum number of inconclusive elements. With more, the comparison fails."""


DifferenceMeasure = Callable[[Tensor, Tensor], Measurement]
"""Measures the difference between the flat fp64 tensors `got` and `want`."""


def in_size(scale: float | None = None, by_norm: bool = False) -> DifferenceMeasure:
    """Returns a function that measures a difference as a fraction of `scale`.

    - scale: the unit; None: the expected tensor's magnitude.
    - by_norm: whether magnitudes are root mean squares; False: largest absolute values.
    """

    def measure(got: Tensor, want: Tensor) -> Measurement:
        unit, errors = size_of(want, by_norm) if scale is None else scale, (got - want).abs()
        return Measurement(errors, share_of_bound(size_of(errors, by_norm), unit), unit)

    return measure


def in_each(allowed: Tensor, before: Tensor | None = None) -> DifferenceMeasure:
    """Returns a function that measures each element's error as a fraction of its allowed error.

    before: values before an update. A change of at most the allowed error is inconclusive.
    """

    def measure(got: Tensor, want: Tensor) -> Measurement:
        each, difference = allowed.flatten(), (got - want).abs()
        errors = torch.where(difference == 0, 0.0, difference / each)
        move = torch.zeros_like(want) if before is None else (want - before.flatten()).abs()
        expected = size_of(want, True)
        share = share_of_bound(size_of(each, True), expected) if expected else 1.0
        return Measurement(
            errors, errors.max().item(), share=share, inconclusive=int(((move > 0) & (move <= each)).sum())
        )

    return measure


class Comparisons:
    """Compares the values of one check and collects the results."""

    def __init__(self, proof: str, config: Config, findings: ProofFindings):
        """config: the configuration with which the ranks ran."""
        self.proof, self.findings = proof, findings
        self.run_as(config)
        self.is_low, self.is_rounded = is_low(proof, config), is_rounded(proof, config)
        self.phase = "start"
        self.part = self.step = 0

    def run_as(self, config: Config) -> None:
        """Set the configuration of the ranks for the following comparisons."""
        self.config, self.values = config, read_values(config)

    def compare(
        self,
        quantity: str,
        name: str,
        got: Tensor | float,
        want: Tensor | float,
        bound: Bound,
        *,
        rank: Evidence | None = None,
        scale: float | None = None,
        measure: DifferenceMeasure | None = None,
        widen: Callable[[Bound, float], Bound] | None = None,
    ) -> None:
        """Compare the ranks' value `got` with the expected value `want`.

        - measure: measures the difference; default: the function that `in_size` returns.
        - widen: returns a wider bound if the error exceeds `bound`.
        """
        flat = (torch.as_tensor(one, dtype=torch.float64).detach().flatten() for one in (got, want))
        got_N, want_N = flat
        if len(got_N) != len(want_N):
            self.fail(quantity, name, "a different number of elements", len(got_N), len(want_N), rank)
            return
        if not len(got_N):
            return
        made = (measure or in_size(scale, self.is_rounded and quantity in LOOSE))(got_N, want_N)
        error = math.inf if math.isnan(made.error) else made.error
        if error > bound.value and widen is not None:
            bound = widen(bound, made.scale or 0.0)
        verdict = self._verdict(quantity)
        if made.scale is not None and bound.value >= MISSING and math.isfinite(error):
            verdict.untold += len(got_N)
            return
        verdict.take(error, bound, len(got_N), made.inconclusive, made.share, f"step {self.step}, {name}")
        if error > bound.value:
            place = int(made.errors.nan_to_num(math.inf).argmax())
            self._differ(quantity, name, rank, got_N[place].item(), want_N[place].item(), error, bound)
        elif made.inconclusive > made.most_inconclusive:
            reason = (
                f"inconclusive: rounding ties may hide a difference in more than {made.most_inconclusive:.0f} numbers"
            )
            self.fail(quantity, name, reason, made.inconclusive, len(got_N), rank)

    def acted(self, name: str, times: int, of: int = 1) -> None:
        """Record how often a mechanism, such as clipping, acted. of: number of cases in which it could act."""
        name = f"{name} (check {self.proof})"
        before = self.findings.acted.get(name, (0, 0))
        self.findings.acted[name] = before[0] + times, before[1] + of

    def same_names(self, quantity: str, got: Iterable[str], want: Iterable[str]) -> None:
        for name in want:
            if name not in got:
                self.fail(quantity, name, "no rank has it")
        for name in got:
            if name not in want:
                self.fail(quantity, name, "the reference has no such tensor")

    def fail(
        self,
        quantity: str,
        name: str,
        reason: str,
        got: float = math.nan,
        want: float = math.nan,
        rank: Evidence | None = None,
    ) -> None:
        """Record a failed comparison of missing or incomparable values."""
        verdict = self._verdict(quantity)
        verdict.worst, verdict.where = math.inf, f"step {self.step}, {name}"
        self._differ(quantity, name, rank, got, want, math.inf, Bound(0.0, reason))

    def _verdict(self, quantity: str) -> ProofVerdict:
        return self.findings.verdicts.setdefault((self.proof, quantity), ProofVerdict(self.proof, quantity))

    def _differ(
        self, quantity: str, name: str, rank: Evidence | None, got: float, want: float, error: float, bound: Bound
    ) -> None:
        self._verdict(quantity).failed += 1
        found = Difference(
            proof=self.proof,
            part=self.part,
            step=self.step,
            phase=self.phase,
            quantity=quantity,
            name=name,
            rank=None if rank is None else rank.info.rank,
            got=got,
            want=want,
            error=error,
            bound=bound.value,
            reason=bound.reason,
        )
        self.findings.differences.append(found)


def size_of(tensor: Tensor, by_norm: bool) -> float:
    """Returns a tensor's root mean square (by_norm) or largest magnitude."""
    tensor = tensor.detach().double()
    return (tensor.square().mean().sqrt() if by_norm else tensor.abs().max()).item()
