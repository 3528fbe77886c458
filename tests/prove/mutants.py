"""Proofs of mutated ranks. Several mutants of a recipe run one after another in the same processes, and two such groups
run at a time."""

import json
import os
import re
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cluster.place import Place
from conf.load import compose, read_config, write_config
from conf.schema import Config
from tests.prove.mutations import MUTATIONS, Mutation
from tests.prove.mutations.generated import GENERATED, drawn_by_name
from tests.prove.mutations.recipes import RECIPES
from tests.prove.mutations.registry import FORWARD, UPDATE
from tests.prove.mutations.seams import Seams
from tests.ranks import CONTEXT, run_processes
from train.prove.evidence import Evidence, read_evidence
from train.prove.findings import Difference, ProofFindings, first_of, is_blurred, is_of_a_part
from train.prove.judge import Judge
from train.prove.judge_state import judge_schedules
from train.prove.layouts import PROOFS
from train.prove.proof_rank import EVIDENCE, run_pass

TOGETHER, AT_A_TIME = 8, 2
"""Bugs in the same processes, and groups of such at a time: the ranks of one leave a core free now and then, and a judge takes one."""
TIMEOUT = 180.0
"""Longest proof of one, seconds."""
STEPS = 40
"""Of the run whose schedules are judged."""
RAN = "ran.rank_{}.json"
"""What of a bug ran on a rank, and how long."""


def _untouched(recipe: str, proof: str) -> Mutation:
    phase = FORWARD if proof == "exact" else UPDATE
    return Mutation(f"nothing in {recipe}, {proof}", "", recipe, (phase,), "", lambda seams: None, "", proof)


SHOWN = {(mutation.recipe, mutation.proof) for mutation in MUTATIONS.values()}
UNTOUCHED = {one.name: one for one in (_untouched(*pair) for pair in sorted(SHOWN))}
"""Proofs of the product as it is, which have to hold."""


def find(name: str) -> Mutation:
    """Of MUTATIONS, UNTOUCHED or those that are generated, whose recipes and passes may have no other bug."""
    if name.startswith("nothing in "):
        return _untouched(*name.removeprefix("nothing in ").rsplit(", ", 1))
    return drawn_by_name(name) if name.startswith(GENERATED) else MUTATIONS[name]


@dataclass
class Outcome:
    """What came of one bug."""

    mutation: Mutation
    first: Difference | None = None
    """What the certificate names; None where it holds."""
    problem: str = ""
    """Why this tells nothing of certificates: a rank failed, or the bug is in no code that ran, or changes nothing."""
    seconds: float = 0.0
    """Of a core, of its ranks and its judge, without the start of their processes."""


def outcomes(names: Iterable[str], folder: Path, timeout: float = TIMEOUT) -> Iterator[Outcome]:
    """As they come; for `find`. folder: for evidence and checkpoints. timeout: for the proof of one, seconds."""
    by_recipe: dict[str, list[str]] = {}
    for name in names:
        by_recipe.setdefault(find(name).recipe, []).append(name)
    configs = {recipe: _placed(recipe, folder) for recipe in by_recipe}
    groups = [
        (configs[recipe], ones[first : first + TOGETHER])
        for recipe, ones in by_recipe.items()
        for first in range(0, len(ones), TOGETHER)
    ]
    groups.sort(
        key=lambda group: -group[0].parallel.world
    )  # those that leave no core free come while there is work beside them
    judges = ProcessPoolExecutor(AT_A_TIME, CONTEXT, torch.set_num_threads, (1,))
    with judges, ThreadPoolExecutor(AT_A_TIME) as threads:
        for done in as_completed([threads.submit(_prove_group, *group, judges, timeout) for group in groups]):
            yield from done.result()


def _placed(recipe: str, folder: Path) -> Config:
    config = compose(*RECIPES[recipe], f"runs={folder / recipe.replace(' ', '_')}", "name=proof")
    Path(config.runs).mkdir(parents=True, exist_ok=True)
    write_config(config, f"{config.runs}/config.yaml")
    return config


def _prove_group(config: Config, names: list[str], judges: Executor, timeout: float) -> list[Outcome]:
    world, problem = config.parallel.world, ""
    with tempfile.TemporaryDirectory() as scratch:
        given = f"{config.runs}/config.yaml", names, world, f"{scratch}/store"
        try:
            run_processes(_prove_mutants, *given, world_size=world, timeout=timeout * len(names))
        except AssertionError as error:
            problem = str(error)
    if problem and len(names) > 1:  # which of them it was shows where each runs alone
        return [one for name in names for one in _prove_group(config, [name], judges, timeout)]
    if problem:
        return [Outcome(find(name), problem=problem) for name in names]
    found = []
    for name, judged in [(name, judges.submit(_judge, name, of(config, name))) for name in names]:
        found.append(Outcome(find(name), *judged.result()))
        shutil.rmtree(Path(config.runs) / of(config, name).name, ignore_errors=True)
    return found


def of(config: Config, name: str) -> Config:
    return replace(config, name=re.sub(r"\W+", "_", name))


def _judge(name: str, config: Config) -> tuple[Difference | None, str, float]:
    """First difference, problem, and seconds."""
    started, proof, first = time.process_time(), find(name).proof, None
    findings = ProofFindings(differences=_UntilTheFirst())
    folder = Path(config.runs) / config.name
    try:
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # as a bug in the source has it, of which judges share what the ranks run
            find(name).apply(Seams(patch))
            if proof == "fp32":
                judge_schedules(replace(PROOFS[proof](config), steps=STEPS), findings)
            Judge(proof, PROOFS[proof](config), folder / EVIDENCE, findings).judge()
        first = first_of(findings.differences)
    except _Found:
        first = first_of(findings.differences)
    except Exception:
        return None, traceback.format_exc(), 0.0
    unused, seconds = _ran(name, folder, config.parallel.world)
    return first, unused, seconds + time.process_time() - started


class _Found(Exception):
    pass


class _UntilTheFirst(list):
    """Ends a judge's work as soon as `first_of` is known: the rest follows from it."""

    def append(self, difference: Difference) -> None:
        super().append(difference)
        if not is_blurred(self[0]) or is_of_a_part(difference):
            raise _Found


def _ran(name: str, folder: Path, world: int) -> tuple[str, float]:
    """What of a bug no rank ran, as a sentence, and the seconds of all ranks."""
    told = [json.loads((folder / RAN.format(rank)).read_text()) for rank in range(world)]
    ran = {place for one in told for place in one["ran"]}
    unused = [place for place in told[0]["places"] if place not in ran]
    said = f"{', '.join(unused)}: nothing calls it in the recipe {find(name).recipe}" if unused else ""
    return said, sum(one["seconds"] for one in told)


def changes_nothing(name: str, folder: Path) -> bool:
    """Whether the ranks leave the same evidence, bit for bit, with the bug and without it."""
    mutation = find(name)
    config, twin = _placed(mutation.recipe, folder), f"nothing in {mutation.recipe}, {mutation.proof}"
    with tempfile.TemporaryDirectory() as scratch:
        world = config.parallel.world
        given = f"{config.runs}/config.yaml", [name, twin], world, f"{scratch}/store"
        run_processes(_prove_mutants, *given, world_size=world, timeout=2 * TIMEOUT)
    folders = [Path(config.runs) / of(config, one).name / EVIDENCE for one in (name, twin)]
    sides = [[one for *_, ranks in read_evidence(each, mutation.proof) for one in ranks] for each in folders]
    shutil.rmtree(config.runs)
    return len(sides[0]) == len(sides[1]) and all(map(_is_same, *sides))


def _is_same(one: Evidence, other: Evidence) -> bool:
    """Bit for bit, where what is no number equals itself."""
    return (
        repr(one.info) == repr(other.info)
        and one.tensors.keys() == other.tensors.keys()
        and all(
            torch.equal(tensor.nan_to_num(), other.tensors[key].nan_to_num()) for key, tensor in one.tensors.items()
        )
    )


def _prove_mutants(rank: int, path: str, names: list[str], world: int, store: str) -> None:
    from train.rank import choose_device, start_process_group

    os.environ |= {"SLUICE_STORE": store, "GLOO_SOCKET_IFNAME": "lo"}
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # as train.rank does
    config, place = read_config(path), Place(rank, world, rank, world)
    device = choose_device(config, place)
    start_process_group(config, place, device)
    for name in names:
        here, started = of(config, name), time.process_time()
        with pytest.MonkeyPatch.context() as patch:
            seams = Seams(patch)
            find(name).apply(seams)
            run_pass(find(name).proof, here, place, device)
        told = {"places": seams.places, "ran": sorted(seams.ran), "seconds": time.process_time() - started}
        Path(here.runs, here.name, RAN.format(rank)).write_text(json.dumps(told))
