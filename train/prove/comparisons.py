"""How two values of the same thing are compared, and what is kept of it."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from conf.schema import Config
from train.prove.bounds import Bound, is_low, is_rounded
from train.prove.findings import Difference, ProofFindings, ProofVerdict, share_of_bound
from train.prove.shaken import ReferenceStep, ShakenRuns

MISSING = 1.0
"""The error of a tensor that is missing: a bound from there on tells nothing."""
LOOSE = ("outputs", "losses", "gradients of weights", "gradients of outputs")
"""Quantities that pass recipe measures by their norm."""


class Comparisons:
    """The comparisons of one pass: each goes into the findings with the part, step and phase that is judged."""

    def __init__(self, proof: str, config: Config, findings: ProofFindings):
        """config: as the ranks ran it."""
        self.proof, self.config, self.findings = proof, config, findings
        self.is_low, self.is_rounded = is_low(proof, config), is_rounded(proof, config)
        self.phase = "start"
        self.part = self.step = 0
        self.want: ReferenceStep
        """The reference's step that is judged."""
        self.shaken: ShakenRuns | None = None
        """The reference's step, shaken by rounding; None in fp64."""

    def _same_names(self, quantity: str, got: Iterable[str], want: Iterable[str]) -> None:
        for name in want:
            if name not in got:
                self._fail(quantity, name, None, math.nan, math.nan, "no rank has it")
        for name in got:
            if name not in want:
                self._fail(quantity, name, None, math.nan, math.nan, "the reference has no such tensor")

    def _number(
        self,
        quantity: str,
        name: str,
        rank: int | None,
        got: float,
        want: float,
        bound: Bound,
        scale: float | None = None,
    ) -> None:
        self._compare(quantity, name, rank, torch.tensor([got]).double(), torch.tensor([want]).double(), bound, scale)

    def _compare_part(
        self,
        quantity: str,
        name: str,
        rank: int | None,
        got: Tensor,
        part: Callable[[ReferenceStep], Tensor],
        bound: Bound,
        scale: float | None = None,
    ) -> None:
        """Compare with what `part` takes out of the reference's step. A step that is more sensitive than `bound` knows is given
        what rounding does to it.
        """
        want = part(self.want).detach()
        self._compare(quantity, name, rank, got, want, bound, scale, partial(self._widen, part, want))

    def _widen(
        self,
        part: Callable[[ReferenceStep], Tensor],
        want: Tensor,
        bound: Bound,
        scale: float,
        by_norm: bool | None = None,
    ) -> Bound:
        if self.shaken is None:
            return bound
        by_norm = self.is_rounded if by_norm is None else by_norm
        return max(bound, self.shaken.bound(part, want, scale, by_norm), key=lambda one: one.value)

    def _compare(
        self,
        quantity: str,
        name: str,
        rank: int | None,
        got: Tensor,
        want: Tensor,
        bound: Bound,
        scale: float | None = None,
        widen: Callable[[Bound, float], Bound] | None = None,
        allowed: Tensor | None = None,
    ) -> None:
        """scale: what the difference is measured in; None for the size of `want`: its largest value, in low precision its norm.
        allowed: what each element may be off by, in the place of a scale.
        """
        low = self.is_rounded and quantity in LOOSE
        got, want = got.double().flatten(), want.detach().double().flatten()
        if got.numel() != want.numel():
            self._fail(quantity, name, rank, got.numel(), want.numel(), "another number of elements")
            return
        if not got.numel():
            return
        scale = size_of(want, low) if scale is None else scale
        difference = (got - want).abs()
        if allowed is not None:
            scale, difference = 1.0, torch.where(difference == 0, 0.0, difference / allowed.flatten())
        size = (difference.square().mean().sqrt() if low else difference.max()).item()
        error = size / scale if scale else (0.0 if size == 0 else math.inf)
        error = math.inf if math.isnan(error) else error
        if error > bound.value and widen:
            bound = widen(bound, scale)
        verdict = self.findings.verdicts.setdefault((self.proof, quantity), ProofVerdict(self.proof, quantity))
        if allowed is None and bound.value >= MISSING and math.isfinite(error):
            verdict.untold += got.numel()
            return
        verdict.compared += got.numel()
        verdict.tell_bound(
            bound.value
            if allowed is None
            else bound.value * share_of_bound(size_of(allowed, True), size_of(want, True))
        )
        if share_of_bound(error, bound.value) >= verdict.share:
            verdict.worst, verdict.bound, verdict.reason = error, bound.value, bound.reason
            verdict.where = f"step {self.step}, {name}"
        if error > bound.value:
            verdict.failed += 1
            place = int(difference.nan_to_num(math.inf).argmax())
            self._differ(quantity, name, rank, got[place].item(), want[place].item(), error, bound)

    def _compare_moved(
        self,
        quantity: str,
        name: str,
        rank: int | None,
        got: Tensor,
        want: Tensor,
        before: Tensor,
        allowed: Tensor,
        why: str,
    ) -> None:
        """Compare what a step made of `before`, element by element. Where rounding may hide the whole move, it is not told."""
        self._compare(quantity, name, rank, got, want, Bound(1.0, why), allowed=allowed)
        verdict, move = self.findings.verdicts.get((self.proof, quantity)), (want - before).abs()
        if verdict is not None:
            hidden = int(((move > 0) & (move <= allowed)).sum())
            verdict.compared, verdict.untold = verdict.compared - hidden, verdict.untold + hidden

    def _fail(self, quantity: str, name: str, rank: int | None, got: float, want: float, reason: str) -> None:
        verdict = self.findings.verdicts.setdefault((self.proof, quantity), ProofVerdict(self.proof, quantity))
        verdict.failed, verdict.worst, verdict.where = verdict.failed + 1, math.inf, f"step {self.step}, {name}"
        self._differ(quantity, name, rank, got, want, math.inf, Bound(0.0, reason))

    def _differ(self, quantity, name, rank, got: float, want: float, error: float, bound: Bound) -> None:
        self.findings.differences.append(
            Difference(
                self.proof,
                self.part,
                self.step,
                self.phase,
                quantity,
                name,
                rank,
                got,
                want,
                error,
                bound.value,
                bound.reason,
            )
        )


def size_of(tensor: Tensor, low: bool) -> float:
    tensor = tensor.detach().double()
    return (tensor.square().mean().sqrt() if low else tensor.abs().max()).item()
