"""Writes the result of mode=prove to prove.json, card.md and the screen."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from conf.files import atomic_write_text
from conf.screen import Terminal
from train.metrics.quantities import duration
from train.prove.findings import Difference, ProofVerdict, first_of
from train.show.proof_rows import PROOF_CARD_FILE, PROOF_FILE
from train.show.screens import GOOD, WARN, show_rows

PROOFS_SAY = {
    "exact": "in fp64, without an optimizer: model, pipeline and dispatchers compute the same function as the reference",
    "loop": "in fp64: steps of a custom loop, with policy losses, values per token and replayed experts, equal the steps of the reference",
    "fp32": "in fp32 through DeepSpeed: reduction, norm, update, balance, and a checkpoint read in another layout",
    "recipe": "in the recipe's precision, within the rounding errors of its formats",
    "tiles": "in the recipe's precision, with widths and positions beyond 128 and values at limits: single parts and dispatched rows",
}
BLIND = {
    "exact": "rounding; optimizer, reduction over ranks and checkpoint, which check fp32 covers",
    "loop": "rounding; generation, and custom losses",
    "fp32": "features of lower formats: FP8 GEMMs, their scales, the wire format",
    "recipe": "errors of whole outputs and gradients below the loosest bound; single parts of a recipe with rounding have much tighter bounds",
    "tiles": "whole outputs, updates and checkpoints, which other checks cover; pipelines, which change no scale",
}
"""Maps each check to the faults that the check cannot detect."""
WIDTH = 100
"""Width of wrapped text, in characters."""
VERIFIED = {
    "forward": (
        ("start", "settings", "forward", "validation"),
        "outputs of all parts, chosen experts and losses equal the reference's",
    ),
    "pretraining": (
        ("settings", "backward", "reduction", "update"),
        "gradients, their sums over micro-batches and ranks, updates and balance biases equal the reference's",
    ),
    "resume": (
        ("checkpoint",),
        "a checkpoint, read in another layout, is the saved state bit for bit, and training resumes from it",
    ),
}
"""Maps a field of card.md to (phases whose comparisons must hold, statement that is then verified)."""
NOT_HERE = {
    "conversion": "a proof does not convert weights; `mode=export` writes a Hugging Face folder, and `init_from` reads one",
    "speed": "a proof does not measure speed; `python -m bench` and the metrics of a run do",
}
"""Fields of card.md that mode=prove does not verify, with reasons."""
NEVER_PROVEN = [
    "kernels of GPUs, and NCCL, unless the ranks ran on GPUs",
    "sizes beyond the miniature: memory, overflow of counters, speed",
    "the data pipeline: a proof draws its own tokens",
    "the quality of the recipe: a proof only shows that the layout trains the recipe",
]


@dataclass(frozen=True)
class Certificate:
    """The result of a proof of one recipe in one layout."""

    name: str
    layout: str
    second_layout: str
    """Layout that resumed from the checkpoint, and its number of ranks."""
    ranks: int
    device: str
    steps: int
    cuts: Sequence[str]
    """Sentences about all differences between the miniature and the recipe."""
    seconds: float
    verdicts: Sequence[ProofVerdict]
    differences: Sequence[Difference]
    """Failed comparisons, in the order of the computation."""
    acted: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """How often each mechanism, such as clipping, acted, and how often it could have acted."""
    proven: Mapping[str, Any] = field(default_factory=dict)
    """The proven recipe, layout and code; see `train.show.proof_rows.describe_proven`."""
    own_code: Mapping[str, str] = field(default_factory=dict)
    """User's code that mode=prove does not run, by configuration key."""

    @property
    def holds(self) -> bool:
        return bool(self.verdicts) and not self.differences

    @property
    def not_proven(self) -> list[str]:
        own = ", ".join(f"{key} ({target})" for key, target in self.own_code.items())
        rule = f"custom code, which the ranks did not run, because a proof has no formulas for it: {own}"
        return [*NEVER_PROVEN, *([rule] if own else [])]

    @property
    def acted_text(self) -> str:
        return "; ".join(f"{name}: {times} of {of}" for name, (times, of) in self.acted.items())

    @property
    def first(self) -> Difference | None:
        """The failed comparison that is closest to a fault's origin."""
        return first_of(self.differences)

    def record(self) -> dict[str, Any]:
        """Returns the content of prove.json. Errors and bounds are relative."""
        return {
            "name": self.name,
            "proven": dict(self.proven),
            "holds": self.holds,
            "layout": self.layout,
            "second_layout": self.second_layout,
            "ranks": self.ranks,
            "device": self.device,
            "steps": self.steps,
            "cuts": list(self.cuts),
            "acted": {name: list(counts) for name, counts in self.acted.items()},
            "seconds": self.seconds,
            "passes": PROOFS_SAY,
            "precisions": [asdict(one) for one in sharpness_of(self.verdicts)],
            "quantities": [_finite(asdict(verdict)) for verdict in self.verdicts],
            "first_difference": _finite(asdict(self.first)) if self.first else None,
            "differences": len(self.differences),
            "not_proven": self.not_proven,
        }

    def write(self, folder: Path) -> Path:
        atomic_write_text(folder / PROOF_FILE, json.dumps(self.record(), indent=1))
        return folder / PROOF_FILE

    def show(self, path: Path, console: Console | None = None) -> None:
        """Prints the result on one screen."""
        said = "this layout trains this model" if self.holds else "this layout does NOT train this model"
        rows = [
            ("Layout", f"{self.layout}, {self.ranks} rank{'s' * (self.ranks > 1)} on {self.device}, {self.steps} steps")
        ]
        same = self.second_layout.startswith(f"{self.layout}, {self.ranks} ")
        read = "read in the same layout, because no other layout is allowed" if same else "read in another layout"
        rows.append(("Checkpoint", f"{read}: {self.second_layout}"))
        rows += [("Smaller", "\n".join(textwrap.wrap(" ".join(self.cuts), WIDTH)))] if self.cuts else []
        rows += [("Acted", self.acted_text)] if self.acted else []
        for proof, says in PROOFS_SAY.items():
            rows.append(
                (proof, "\n".join([says, *_lines(proof, [one for one in self.verdicts if one.proof == proof])]))
            )
        if self.first is not None:
            rows.append(("First", f"{self.first.text()}\n{len(self.differences)} comparisons failed in all"))
        rows.append(("Not proven", "\n".join(self.not_proven)))
        rows.append(("Files", f"{path}, {PROOF_CARD_FILE}"))
        title = f"{self.name}: {said}, in miniature, after {duration(self.seconds)}"
        show_rows(console or Terminal(), title, GOOD if self.holds else WARN, rows)


@dataclass(frozen=True)
class Sharpness:
    """How many values a check compared, and how tight its bounds are."""

    proof: str
    compared: int
    untold: int
    quantities: int
    bit_for_bit: int
    """Number of quantities that had to match bit for bit."""
    sharpest: float | None
    """The tightest relative bound on rounding errors; None without any."""
    sharpest_quantity: str
    loosest: float | None
    loosest_quantity: str
    does_not_see: str

    def text(self) -> str:
        """Describes the compared values, and the tightest and loosest bound."""
        left = (
            f"; {self.untold:,} inconclusive, as rounding alone may change them by their own size"
            if self.untold
            else ""
        )
        compared = (
            f"compared {self.compared:,} numbers, {self.bit_for_bit} of {self.quantities} quantities bit for bit{left}"
        )
        if self.sharpest is None:
            return compared
        bounds = f"sharpest bound {self.sharpest:.1e} ({self.sharpest_quantity}), loosest {self.loosest:.1e} ({self.loosest_quantity})"
        return f"{compared}; {bounds}"


def sharpness_of(verdicts: Sequence[ProofVerdict]) -> list[Sharpness]:
    """Returns, for every check that ran, how many values it compared and how tight its bounds are."""
    found = []
    for proof in PROOFS_SAY:
        of_pass = [one for one in verdicts if one.proof == proof]
        rounded = [one for one in of_pass if one.loosest]
        least = min(rounded, key=lambda one: one.sharpest or one.loosest, default=None)
        most = max(rounded, key=lambda one: one.loosest, default=None)
        if of_pass:
            found.append(
                Sharpness(
                    proof,
                    compared=sum(one.compared for one in of_pass),
                    untold=sum(one.untold for one in of_pass),
                    quantities=len(of_pass),
                    bit_for_bit=len(of_pass) - len(rounded),
                    sharpest=(least.sharpest or least.loosest) if least else None,
                    sharpest_quantity=least.quantity if least else "",
                    loosest=most.loosest if most else None,
                    loosest_quantity=most.quantity if most else "",
                    does_not_see=BLIND[proof],
                )
            )
    return found


def _lines(proof: str, verdicts: list[ProofVerdict]) -> list[str]:
    """Returns the failures of a check, or its bounds and largest error."""
    if not verdicts:
        return ["did not run"]
    if failed := [verdict for verdict in verdicts if verdict.failed]:
        return [
            f"FAILED: {one.quantity}, error {one.worst:.2g}, allowed {one.bound:.2g} ({one.where})" for one in failed
        ]
    nearest = max(verdicts, key=lambda one: one.share)
    (sharpness,) = sharpness_of(verdicts)
    return [
        "holds",
        *textwrap.wrap(sharpness.text(), WIDTH),
        f"nearest to its bound: {nearest.quantity}, {nearest.worst:.2g} of {nearest.bound:.2g} ({nearest.where})",
        *textwrap.wrap(f"not detected: {sharpness.does_not_see}", WIDTH),
    ]


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy with null for infinity and NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


# card.md states what a proof has verified and what it has not verified.


def write_card(certificate: Certificate, folder: Path) -> Path:
    """Write card.md next to prove.json."""
    atomic_write_text(folder / PROOF_CARD_FILE, "\n".join(_card_lines(certificate)) + "\n")
    return folder / PROOF_CARD_FILE


def _card_lines(certificate: Certificate) -> Sequence[str]:
    device = f"on {certificate.ranks} ranks on {certificate.device}"
    fields = {name: f"not verified here: {where}" for name, where in NOT_HERE.items()}
    fields |= {name: _field(certificate, name, device) for name in VERIFIED}
    order = ("conversion", "forward", "pretraining", "resume", "speed")
    return [
        f"# {certificate.name}",
        "",
        f"Layout: {certificate.layout}. In miniature, {certificate.steps} steps: {' '.join(certificate.cuts)}",
        "",
        f"How often the mechanisms acted that act only in some cases: {certificate.acted_text or 'the recipe has none'}.",
        "",
        f"What mode=prove has verified; every figure is in `{PROOF_FILE}`.",
        "",
        "| what | verified |",
        "|---|---|",
        *(f"| {name} | {fields[name]} |" for name in order),
        "",
        "| check | compared | not detected |",
        "|---|---|---|",
        *(
            f"| {one.proof}: {PROOFS_SAY[one.proof]} | {one.text().removeprefix('compared ')} | {one.does_not_see} |"
            for one in sharpness_of(certificate.verdicts)
        ),
    ]


def _field(certificate: Certificate, name: str, device: str) -> str:
    phases, held = VERIFIED[name]
    for difference in certificate.differences:
        if difference.phase in phases or (name == "resume" and difference.part > 0):
            return f"FAILED {device}: {difference.text()}"
    if name == "resume" and not certificate.second_layout:
        return "not verified here: no part of the proof went on from a checkpoint"
    if not certificate.verdicts:
        return "not verified here: nothing was compared"
    more = f" ({certificate.second_layout})" if name == "resume" else ""
    return f"yes, {device}: {held}{more}"
