"""Checks of `mode=prove` over layouts and models, and over injected bugs: are the certificates right?

    python -m bench.prove                 all rows of bench/prove_rows.csv; exits 1 if one fails
    python -m bench.prove --rows 3,17     only these rows
    python -m bench.prove --share 10      a tenth of the rows, another tenth at every commit
    python -m bench.prove --tiles         also the check `tiles`, in which layouts differ only by their dispatch
    python -m bench.prove --mutations     bugs of tests/prove/mutations: which are found, and where a certificate points
    python -m bench.prove --mutations fp8,wire     the bugs of some areas, or single bugs by name
    python -m bench.prove --generated 40  this many lines of the product changed by a rule: which survive, and why
    python -m bench.prove --make-rows     write the rows again

Rows are so small that they need no miniature. Rows with equal numbers of ranks run one after another in the same
processes, because starting the processes takes as long as a proof. Needs the packages of the extra dev, and one machine
with 2 cores.

Takes about a few seconds for each row.
"""

import argparse
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from bench.prove_rows import ProveRow, read_rows, rotated, to_config, world_of, write_rows
from cluster.place import Place
from conf.schema import Config
from train.prove.findings import ProofVerdict, first_of

TOGETHER = 8
"""Maximum number of rows in the same processes. torch and DeepSpeed do not free all memory of a row, so more rows would
need too much."""
AT_A_TIME = 2
"""Number of such groups of rows that run at the same time."""
TIMEOUT = 120.0
"""Time limit of a row's check, in seconds."""


class RowResult:
    """The result of a row."""

    def __init__(self, number: int, row: ProveRow):
        self.number, self.row, self.seconds = number, row, 0.0
        self.verdicts: list[ProofVerdict] = []
        self.first = ""
        """The first difference, or the error of a rank; empty if all checks passed."""


def prove_rows(rows: dict[int, ProveRow], folder: Path, tiles: bool = False) -> Iterator[RowResult]:
    """Yields the results as they are ready. Rows with equal numbers of ranks run one after another. folder: for
    evidence and checkpoints; it is emptied. tiles: whether the check `tiles` runs too.

    Two groups of rows run at a time, because the ranks of a group do not use all cores all the time, and a judge uses
    one core.
    """
    from tests.ranks import CONTEXT

    by_world, together = sorted(rows, key=lambda number: (world_of(rows[number]), number)), []
    for _, numbers in groupby(by_world, key=lambda number: world_of(rows[number])):
        chosen = list(numbers)
        together += [chosen[first : first + TOGETHER] for first in range(0, len(chosen), TOGETHER)]
    judges, groups = ProcessPoolExecutor(AT_A_TIME, CONTEXT, torch.set_num_threads, (1,)), ThreadPoolExecutor(AT_A_TIME)
    configs = {number: _placed(row, folder / str(number)) for number, row in rows.items()}
    with judges, groups:
        for results in groups.map(
            lambda some: _prove_together({n: rows[n] for n in some}, configs, judges, tiles), together
        ):
            yield from results


def _prove_together(
    rows: dict[int, ProveRow], configs: dict[int, Config], judges: Executor, tiles: bool
) -> list[RowResult]:
    started = time.perf_counter()
    error = _gather([configs[number] for number in rows], tiles)
    if error and len(rows) > 1:  # each row then runs alone, which shows the row with the error
        return [result for number in rows for result in _prove_together({number: rows[number]}, configs, judges, tiles)]
    share, results = (time.perf_counter() - started) / len(rows), []
    for number, row in rows.items():
        result, started = RowResult(number, row), time.perf_counter()
        if error:
            result.first = error
        else:
            result.verdicts, result.first = judges.submit(_judge, configs[number], tiles).result()
        result.seconds = share + time.perf_counter() - started
        results.append(result)
        shutil.rmtree(configs[number].runs, ignore_errors=True)
    return results


def _placed(row: ProveRow, folder: Path) -> Config:
    return replace(to_config(row), runs=str(folder), name="proof")


def _gather(configs: list[Config], tiles: bool) -> str:
    """Runs the ranks of these rows. Returns the first error of a rank, or an empty text."""
    from tests.ranks import run_processes

    world = configs[0].parallel.world
    with tempfile.TemporaryDirectory() as scratch:
        try:
            timeout = TIMEOUT * len(configs)
            run_processes(_prove_as_rank, configs, tiles, world, f"{scratch}/store", world_size=world, timeout=timeout)
        except AssertionError as error:
            return str(error)
    return ""


def _prove_as_rank(rank: int, configs: list[Config], tiles: bool, world: int, store: str) -> None:
    import os

    from train.prove.proof_rank import run_pass
    from train.rank import choose_device, start_process_group

    os.environ |= {"SLUICE_STORE": store, "GLOO_SOCKET_IFNAME": "lo"}
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # as train.rank does
    place = Place(rank, world, rank, world)
    for config in configs:
        device = choose_device(config, place)
        if config is configs[0]:
            start_process_group(config, place, device)
        for proof in _passes(tiles):
            run_pass(proof, config, place, device)


def _passes(tiles: bool) -> list[str]:
    from train.prove.layouts import PROOFS

    return [proof for proof in PROOFS if tiles or proof != "tiles"]


def _judge(config: Config, tiles: bool) -> tuple[list, str]:
    """Returns the verdicts, and the first difference or the error of the judge itself."""
    from train.prove.judge import judge_all

    try:
        findings = judge_all(config, _passes(tiles))
    except Exception:
        return [], traceback.format_exc()
    first = first_of(findings.differences)
    return list(findings.verdicts.values()), first.text() if first else ""


def show_worst(results: Iterable[RowResult]) -> None:
    """Prints a line for every quantity of every check: its worst difference as a share of the bound, the place of this
    difference, how many numbers were compared, and how many are inconclusive. In low precision a share near 1 is no
    alarm: if a difference exceeds the bound that follows from the formats alone, a wider bound applies to it.
    """
    found: dict[tuple[str, str], list[tuple[int, ProofVerdict]]] = {}
    for result in results:
        for verdict in result.verdicts:
            found.setdefault((verdict.proof, verdict.quantity), []).append((result.number, verdict))
    print(
        f"{'pass':7} {'quantity':28} {'compared':>12} {'inconclusive':>12} {'worst':>9} {'allowed':>9} {'share':>7}  row"
    )
    for (proof, quantity), ones in found.items():
        number, worst = max(ones, key=lambda one: one[1].share)
        compared, untold = (sum(getattr(verdict, kind) for _, verdict in ones) for kind in ("compared", "untold"))
        figures = f"{compared:12,} {untold:12,} {worst.worst:9.2g} {worst.bound:9.2g} {worst.share:7.1%}"
        print(f"{proof:7} {quantity:28} {figures}  {number}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prove", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="numbers of rows, with commas")
    parser.add_argument("--share", type=int, help="one in so many rows, other ones at every commit")
    parser.add_argument(
        "--mutations", nargs="?", const="", metavar="AREAS", help="areas or names, with commas; all without"
    )
    parser.add_argument(
        "--generated", type=int, metavar="N", help="N lines of the product changed by a rule: what survives"
    )
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--make-rows", action="store_true")
    given = parser.parse_args()
    if given.make_rows:
        write_rows()
        return 0
    if given.generated:
        from bench.prove_mutations import show_generated

        return show_generated(given.generated)
    if given.mutations is not None:
        from bench.prove_mutations import (  # an installed program lacks the packages that tests need
            chosen,
            show_mutations,
        )

        names = chosen(given.mutations)
        if not names:
            parser.error(f"--mutations: no area and no bug is called {given.mutations}")
        return show_mutations(names)
    rows = dict(enumerate(read_rows()))
    if given.share:
        rows = rotated(rows, given.share)
    if given.rows:
        numbers = given.rows.split(",")
        if unknown := set(numbers) - {str(number) for number in rows}:
            parser.error(f"--rows: no row {', '.join(unknown)}; rows are numbered from 0 to {max(rows)}")
        rows = {int(number): rows[int(number)] for number in numbers}
    started, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for result in prove_rows(rows, Path(folder), given.tiles):
            results.append(result)
            print(f"row {result.number:3} {result.seconds:5.1f} s  {result.first or 'holds'}", flush=True)
    show_worst(results)
    failed = [result.number for result in results if result.first]
    print(f"{len(results) - len(failed)} of {len(results)} rows hold; {time.perf_counter() - started:.0f} s")
    if failed:
        print(f"failed: {','.join(map(str, failed))}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
