"""Proofs of mutated ranks. Those of a layout follow one another in the same processes, which start once."""

import re
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.launch import Place
from conf.load import compose, write_config
from conf.schema import Config
from tests.prove.mutations import FORWARD, LAYOUTS, MUTATIONS, UPDATE, Mutation
from tests.ranks import run_processes
from train.prove.findings import Difference, ProofFindings
from train.prove.judge import Judge
from train.prove.layouts import PROOFS
from train.prove.rank import EVIDENCE, run_pass

UNTOUCHED = {
    f"nothing in {layout}, {proof}": Mutation("", "", layout, (phase,), "", lambda patch: None)
    for layout in LAYOUTS
    for proof, phase in (("exact", FORWARD), ("fp32", UPDATE))
}
"""Proofs of the product as it is, which have to hold."""
ALL = MUTATIONS | UNTOUCHED


def first_differences(names: Iterable[str], folder: Path, timeout: float = 300.0) -> dict[str, Difference | None]:
    """What each proof finds first, of MUTATIONS and UNTOUCHED; None for nothing. folder: for evidence and checkpoints."""
    found: dict[str, Difference | None] = {}
    for layout in LAYOUTS:
        if chosen := [name for name in names if ALL[name].layout == layout]:
            found |= _in_layout(layout, chosen, folder / layout, timeout)
    return found


def _in_layout(layout: str, names: list[str], folder: Path, timeout: float) -> dict[str, Difference | None]:
    config = compose(*LAYOUTS[layout], f"runs={folder}", "name=proof")
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, str(folder / "config.yaml"))
    world = config.parallel.world
    with tempfile.TemporaryDirectory() as scratch:
        store = f"{scratch}/store"
        run_processes(
            _prove_mutants, str(folder / "config.yaml"), names, world, store, world_size=world, timeout=timeout
        )
    return {name: judge(ALL[name], of(config, name)) for name in names}


def of(config: Config, name: str) -> Config:
    return replace(config, name=re.sub(r"\W+", "_", name))


def judge(mutation: Mutation, config: Config) -> Difference | None:
    findings = ProofFindings()
    Judge(mutation.proof, PROOFS[mutation.proof](config), Path(config.runs) / config.name / EVIDENCE, findings).judge()
    return findings.differences[0] if findings.differences else None


def _prove_mutants(rank: int, path: str, names: list[str], world: int, store: str) -> None:
    import os

    from conf.load import read_config
    from train.rank import choose_device, start_process_group

    os.environ |= {"SLUICE_STORE": store, "GLOO_SOCKET_IFNAME": "lo"}
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # as train.rank does
    config, place = read_config(path), Place(rank, world, rank, world)
    device = choose_device(config, place)
    start_process_group(config, place, device)
    for name in names:
        with pytest.MonkeyPatch.context() as patch:
            ALL[name].apply(patch)
            run_pass(ALL[name].proof, of(config, name), place, device)
