"""Bugs injected into the product (tests/prove/mutations): which ones a certificate finds, and where it points."""

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.prove.mutants import Outcome, changes_nothing, outcomes
from tests.prove.mutations import AREAS, MUTATIONS
from tests.prove.mutations.generated import draw


def show_mutations(names: Iterable[str]) -> int:
    """Prints a line for every bug as soon as it is judged, and a line for every area. Returns the exit code: 0 only if
    all bugs were found."""
    started, found = time.perf_counter(), []
    print(f"{'area':10} {'bug':46} {'phase':6} {'part':6} {'seconds':>7} pointed to")
    with tempfile.TemporaryDirectory() as folder:
        for outcome in outcomes(names, Path(folder)):
            found.append(outcome)
            print(_line(outcome), flush=True)
        for outcome in found:
            if outcome.first is None and not outcome.problem and changes_nothing(outcome.mutation.name, Path(folder)):
                outcome.problem = "the ranks leave the same, bit for bit, without it"
    for area in AREAS:
        _show_area(area, [outcome for outcome in found if outcome.mutation.area == area])
    _show_area("all", found)
    for outcome in found:
        if outcome.first is None:
            print(f"NOT FOUND: {outcome.mutation.name} ({outcome.mutation.had}) {outcome.problem}")
    print(f"{time.perf_counter() - started:.0f} s")
    return int(any(outcome.first is None or outcome.problem for outcome in found))


def show_generated(count: int) -> int:
    """Changes `count` lines of the product by a rule. Prints how many changes are found, and for every other change why
    it is not found. Returns 0."""
    started, found, failed, idle, alive = time.perf_counter(), 0, 0, [], []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in outcomes(draw(count), Path(folder), timeout=60.0):
            mutation, first = outcome.mutation, outcome.first
            if outcome.problem:
                failed += 1
                said = "a rank failed"
            elif first is not None:
                found += 1
                said = f"pass {first.proof}, step {first.step}, {first.phase}: {first.quantity} of {first.name}"
            else:
                idle_here = changes_nothing(mutation.name, Path(folder))
                (idle if idle_here else alive).append(mutation)
                said = "SURVIVES" if not idle_here else "changes nothing that ranks leave"
            print(f"{mutation.had.removeprefix('of our own: '):120} {said}", flush=True)
    print(
        f"{found} found by a difference, {failed} by ranks that failed, {len(idle)} change nothing that this recipe's ranks leave, "
        f"{len(alive)} change something and survive; {time.perf_counter() - started:.0f} s"
    )
    return 0


def chosen(areas: str | None) -> list[str]:
    """Names of the bugs in `areas`, a comma-separated list of areas or bugs. None: all bugs."""
    given = areas.split(",") if areas else AREAS
    return [name for name, one in MUTATIONS.items() if one.area in given or name in given]


def _line(outcome: Outcome) -> str:
    mutation, first = outcome.mutation, outcome.first
    start = f"{mutation.area:10} {mutation.name:46}"
    if outcome.problem:
        return f"{start} NOTHING TOLD {outcome.problem.strip().splitlines()[-1]}"
    if first is None:
        return f"{start} NOT FOUND"
    right = ["right" if ok else "-" for ok in (mutation.phase_is_right(first), mutation.part_is_right(first))]
    place = f"pass {first.proof}, step {first.step}, {first.phase}: {first.quantity} of {first.name}"
    return f"{start} {right[0]:6} {right[1]:6} {outcome.seconds:7.1f} {place}"


def _show_area(area: str, found: list[Outcome]) -> None:
    if not found:
        return
    told = [(outcome.mutation, outcome.first) for outcome in found if outcome.first is not None]
    phase, part = (
        sum(getattr(one, name)(first) for one, first in told) for name in ("phase_is_right", "part_is_right")
    )
    print(
        f"{area:10} {len(told):3} of {len(found):3} found, the phase right in {phase}, the part in {part}, "
        f"{sum(outcome.seconds for outcome in found):.0f} s of a core"
    )
