"""The facts about every bug: its area, the system that had it, what runs it, and where a certificate should point.

To add one, write a function with `@mutation(...)` in the file of its area; the test and `python -m bench.prove --mutations`
find it. Sources are threads on GitHub, as owner/repository#number; `OURS` are bugs that such code may have, which no thread
that we know tells of.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.prove.mutations.seams import Seams
from train.prove.findings import Difference

FORWARD, BACKWARD, REDUCTION, UPDATE, SETTINGS, RESUME, VALIDATION = (
    "forward",
    "backward",
    "reduction",
    "update",
    "settings",
    "resume",
    "validation",
)
OURS = "of our own"


@dataclass(frozen=True)
class Mutation:
    """One bug."""

    name: str
    had: str
    """Who had it, and what it was."""
    recipe: str
    """One of RECIPES: the smallest in which the bug shows."""
    phases: tuple[str, ...]
    """In which a certificate may see it first."""
    part: str
    """Regular expression for the quantity and the part or tensor that a certificate may name."""
    apply: Callable[[Seams], None]
    area: str
    """Name of its file."""
    proof: str
    """The first pass of a proof in which it shows."""

    def phase_is_right(self, first: Difference) -> bool:
        return bool(phases_of(first) & set(self.phases))

    def part_is_right(self, first: Difference) -> bool:
        return bool(self.part) and re.search(self.part, f"{first.quantity} {first.name}") is not None

    def places(self) -> list[str]:
        """What of the product it patches. Raises AttributeError where the product has no such name."""
        with pytest.MonkeyPatch.context() as patch:
            seams = Seams(patch)
            self.apply(seams)
        return seams.places


def phases_of(first: Difference) -> set[str]:
    """What the phase of a certificate is called here, where two more are told apart."""
    found = {first.phase}
    if first.phase == "backward" and first.proof != "exact":
        found.add(REDUCTION)  # what the ranks had each for itself, the pass before has proven
    if first.phase == "checkpoint" or first.part > 0:
        found.add(RESUME)
    return found


MUTATIONS: dict[str, Mutation] = {}


def mutation(
    had: str, recipe: str, phases: str | tuple[str, ...], part: str, proof: str | None = None
) -> Callable[[Callable[[Seams], None]], Callable[[Seams], None]]:
    """proof: the pass that shows it, where it is not exact for what is made forward and backward, and fp32 for all else."""

    def register(apply: Callable[[Seams], None]) -> Callable[[Seams], None]:
        name, area = apply.__name__, apply.__module__.rsplit(".", 1)[-1]
        assert name not in MUTATIONS, name
        found = (phases,) if isinstance(phases, str) else phases
        shown = proof or ("exact" if set(found) <= {FORWARD, BACKWARD} else "fp32")
        MUTATIONS[name] = Mutation(name, had, recipe, found, part, apply, area, shown)
        return apply

    return register
