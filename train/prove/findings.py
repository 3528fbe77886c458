"""The findings of a proof: a verdict on every quantity of every check, and every failed comparison."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from train.prove.bounds import Bound


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A failed comparison."""

    proof: str
    part: int
    step: int
    phase: str
    quantity: str
    name: str
    """Name of the tensor, or of the part of the model with this output."""
    rank: int | None
    """None for a tensor assembled from all ranks."""
    got: float
    want: float
    error: float
    bound: float
    reason: str

    def text(self) -> str:
        """The difference as one sentence."""
        who = "" if self.rank is None else f", rank {self.rank}"
        return (
            f"check {self.proof}, step {self.step}{who}, {self.phase}: {self.quantity} of {self.name} is {self.got:.9g} and "
            f"should be {self.want:.9g}, an error of {self.error:.2g} where {self.bound:.2g} is allowed"
        )


WHOLE = ("outputs", "losses", "gradients of weights", "gradients of outputs", "chosen experts", "loads")
"""Quantities of the whole model. In low precision, their first difference may be anywhere after a fault."""


def first_of(differences: Sequence[Difference]) -> Difference | None:
    """The difference closest to the origin of a fault.

    Differences are in the order of the computation. In the recipe's own precision, bounds on whole outputs are wide.
    There, a difference of a single part says more, even from a later step.
    """
    if not differences or not is_blurred(differences[0]):
        return differences[0] if differences else None
    proof = differences[0].proof
    return next((one for one in differences if one.proof == proof and is_of_a_part(one)), differences[0])


def is_blurred(difference: Difference) -> bool:
    return difference.proof == "recipe" and difference.quantity in WHOLE


def is_of_a_part(difference: Difference) -> bool:
    return difference.phase in ("forward", "backward") and difference.quantity not in WHOLE


@dataclass
class ProofVerdict:
    """The verdict of a check on one quantity."""

    proof: str
    quantity: str
    compared: int = 0
    worst: float = 0.0
    bound: float = 0.0
    where: str = ""
    reason: str = ""
    failed: int = 0
    untold: int = 0
    """Inconclusive numbers, which rounding alone may change by their own size. They must be finite and are not compared
    otherwise."""
    sharpest: float = math.inf
    loosest: float = 0.0
    """Smallest and largest applied bound, relative to the size of the compared tensor."""

    def take(self, error: float, bound: Bound, numbers: int, inconclusive: int, unit: float, where: str) -> None:
        """Add a comparison of `numbers` numbers. unit: the unit of the bound, relative to the size of the compared
        tensor."""
        share = bound.value * unit
        self.compared, self.untold = self.compared + numbers - inconclusive, self.untold + inconclusive
        self.sharpest, self.loosest = min(self.sharpest, share), max(self.loosest, share)
        if share_of_bound(error, bound.value) >= self.share:
            self.worst, self.bound, self.reason, self.where = error, bound.value, bound.reason, where

    @property
    def share(self) -> float:
        """The worst error as a fraction of its bound."""
        return share_of_bound(self.worst, self.bound)


@dataclass
class ProofFindings:
    """The findings of all checks."""

    verdicts: dict[tuple[str, str], ProofVerdict] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    """In the order of the computation."""
    acted: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Mechanisms that act only on some steps or heads: how often they acted, and the number of opportunities."""
    device: str = "cpu"
    """Kind of device of the ranks."""
    second_layout: str = ""
    """Layout and number of ranks that read the checkpoint."""


def together(passes: Sequence[ProofFindings]) -> ProofFindings:
    """The findings of several checks as one, in their order."""
    findings = ProofFindings()
    for one in passes:
        findings.verdicts |= one.verdicts
        findings.differences += one.differences
        findings.acted |= one.acted
        findings.device, findings.second_layout = one.device, one.second_layout or findings.second_layout
    return findings


def share_of_bound(error: float, bound: float) -> float:
    """The error as a fraction of the bound; infinite for an error with a bound of 0."""
    return error / bound if bound else (math.inf if error else 0.0)
