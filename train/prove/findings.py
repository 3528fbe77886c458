"""What the judges of a proof found: a verdict on every quantity of every pass, and every comparison that failed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from train.prove.bounds import Bound


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A comparison that failed."""

    proof: str
    part: int
    step: int
    phase: str
    quantity: str
    name: str
    """Name of the tensor, or of the part of the model whose output it is."""
    rank: int | None
    """None where all ranks were put together."""
    got: float
    want: float
    error: float
    bound: float
    reason: str

    def text(self) -> str:
        """One sentence."""
        who = "" if self.rank is None else f", rank {self.rank}"
        return (
            f"pass {self.proof}, step {self.step}{who}, {self.phase}: {self.quantity} of {self.name} is {self.got:.9g} and "
            f"should be {self.want:.9g}, an error of {self.error:.2g} where {self.bound:.2g} is allowed"
        )


WHOLE = ("outputs", "losses", "gradients of weights", "gradients of outputs", "chosen experts", "loads")
"""Quantities of the whole model, whose differences in low precision begin to show anywhere behind a fault."""


def first_of(differences: Sequence[Difference]) -> Difference | None:
    """Where a fault begins. They come in the order of the computation; but in the recipe's own precision whole outputs are compared so
    loosely that what a single part shows says more, also of a later step.
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
    """What a pass says of one quantity."""

    proof: str
    quantity: str
    compared: int = 0
    worst: float = 0.0
    bound: float = 0.0
    where: str = ""
    reason: str = ""
    failed: int = 0
    untold: int = 0
    """Numbers that were compared with nothing, as rounding alone may move them by their own size; finite they must be."""
    sharpest: float = math.inf
    loosest: float = 0.0
    """Bounds that were applied, as a share of the size of what was compared."""

    def take(self, error: float, bound: Bound, numbers: int, untold: int, unit: float, where: str) -> None:
        """Take in a comparison of so many numbers. unit: what the bound is a multiple of, as a share of the size of what was compared."""
        share = bound.value * unit
        self.compared, self.untold = self.compared + numbers - untold, self.untold + untold
        self.sharpest, self.loosest = min(self.sharpest, share), max(self.loosest, share)
        if share_of_bound(error, bound.value) >= self.share:
            self.worst, self.bound, self.reason, self.where = error, bound.value, bound.reason, where

    @property
    def share(self) -> float:
        """The worst error, of what is allowed."""
        return share_of_bound(self.worst, self.bound)


@dataclass
class ProofFindings:
    """What all passes found."""

    verdicts: dict[tuple[str, str], ProofVerdict] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    """In the order of the computation."""
    acted: dict[str, tuple[int, int]] = field(default_factory=dict)
    """How often what acts on some steps or heads alone did act, and of how many times."""
    device: str = "cpu"
    """Kind of device that the ranks had."""
    second_layout: str = ""
    """In which the checkpoint was read, and on how many ranks."""


def together(passes: Sequence[ProofFindings]) -> ProofFindings:
    """What the judges of several passes found, in their order."""
    findings = ProofFindings()
    for one in passes:
        findings.verdicts |= one.verdicts
        findings.differences += one.differences
        findings.acted |= one.acted
        findings.device, findings.second_layout = one.device, one.second_layout or findings.second_layout
    return findings


def share_of_bound(error: float, bound: float) -> float:
    """The share of what is allowed; where nothing is, an error is beyond all measure."""
    return error / bound if bound else (math.inf if error else 0.0)
