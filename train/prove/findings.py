"""Findings of mode=prove: verdicts per check and quantity, and failed comparisons."""

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
    """Name of the tensor or of its model part."""
    rank: int | None
    """The rank that computed the tensor; None: all ranks together."""
    got: float
    want: float
    error: float
    bound: float
    reason: str

    def text(self) -> str:
        """Describes the difference in one sentence."""
        who = "" if self.rank is None else f", rank {self.rank}"
        return (
            f"check {self.proof}, step {self.step}{who}, {self.phase}: {self.quantity} of {self.name} is {self.got:.9g} and "
            f"should be {self.want:.9g}, an error of {self.error:.2g} where {self.bound:.2g} is allowed"
        )


WHOLE = ("outputs", "losses", "gradients of weights", "gradients of outputs", "chosen experts", "loads")
"""Quantities that a fault anywhere in the model may change."""


def first_of(differences: Sequence[Difference]) -> Difference | None:
    """Returns the failed comparison that is closest to a fault's origin.

    differences: failed comparisons, in the order of the computation. In low precision, a failed comparison of a single
    model part takes precedence.
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
    """The verdict of one check on one quantity."""

    proof: str
    quantity: str
    compared: int = 0
    worst: float = 0.0
    bound: float = 0.0
    where: str = ""
    reason: str = ""
    failed: int = 0
    untold: int = 0
    """Number of elements that rounding alone may change completely."""
    sharpest: float = math.inf
    loosest: float = 0.0
    """The smallest and the largest bound, relative to the compared tensor."""

    def take(self, error: float, bound: Bound, numbers: int, inconclusive: int, unit: float, where: str) -> None:
        """Add one comparison.

        - numbers: number of compared elements.
        - unit: the bound's unit, relative to the compared tensor's magnitude.
        """
        share = bound.value * unit
        self.compared, self.untold = self.compared + numbers - inconclusive, self.untold + inconclusive
        self.sharpest, self.loosest = min(self.sharpest, share), max(self.loosest, share)
        if share_of_bound(error, bound.value) >= self.share:
            self.worst, self.bound, self.reason, self.where = error, bound.value, bound.reason, where

    @property
    def share(self) -> float:
        """The worst error, as a fraction of its bound."""
        return share_of_bound(self.worst, self.bound)


@dataclass
class ProofFindings:
    """The findings of all checks."""

    verdicts: dict[tuple[str, str], ProofVerdict] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    """Failed comparisons, in the order of the computation."""
    acted: dict[str, tuple[int, int]] = field(default_factory=dict)
    """How often each mechanism, such as clipping, acted, and how often it could have acted."""
    device: str = "cpu"
    """Device type of the ranks: cpu or cuda."""
    second_layout: str = ""
    """Layout that resumed from the checkpoint, and its number of ranks."""


def together(passes: Sequence[ProofFindings]) -> ProofFindings:
    """Joins the findings of several checks, in order."""
    findings = ProofFindings()
    for one in passes:
        findings.verdicts |= one.verdicts
        findings.differences += one.differences
        findings.acted |= one.acted
        findings.device, findings.second_layout = one.device, one.second_layout or findings.second_layout
    return findings


def share_of_bound(error: float, bound: float) -> float:
    """Returns error / bound; if the bound is 0, infinity for an error above 0."""
    return error / bound if bound else (math.inf if error else 0.0)
