"""mode=prove: trains a miniature of the recipe, and compares it with the reference."""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from cluster.launch import launch
from cluster.local import run_children
from cluster.place import Place, given_place
from cluster.spawn import ForkedProcess
from conf.changed_settings import settings_of
from conf.errors import EXIT_CRASH, EXIT_OK, UserError
from conf.load import write_config
from conf.own_code import targets_of
from conf.run_paths import RunPaths
from conf.schema import Config
from train.kernels.cpu.processor import tune_cpu
from train.loop.layout_check import check_layout
from train.prove.layouts import PROOFS, in_layout, layout_name, second_layout
from train.show.proof_rows import PROOF_CARD_FILE, PROOF_FILE, describe_proven

PROOF_FOLDER = "prove"
"""Subfolder of the run folder for the files of mode=prove."""


def prove(config: Config, alone: bool) -> int:
    """Run mode=prove. Returns the exit code, 0 only if all comparisons hold."""
    tune_cpu()  # the ranks are forks of this process
    from train.prove.miniature import shrink

    started = time.monotonic()
    if config.cluster.backend != "local":
        rule = "mode=prove starts its ranks on this machine, or is started by torchrun"
        raise UserError("cluster.backend", config.cluster.backend, rule, "leave cluster=ray out")
    check_layout(config)
    run_folder = Path(config.runs).absolute() / config.name
    mini = shrink(config)
    small = replace(mini.cfg, runs=str(run_folder), name=PROOF_FOLDER)
    folder, place = run_folder / PROOF_FOLDER, given_place()
    if place is None or place.rank == 0:
        _clear(run_folder)
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        write_config(small, str(folder / "config.yaml"))
    code = _launch(small, folder, alone)
    if code != EXIT_OK or (place is not None and place.rank > 0):
        return code
    code = _judge(config, small, mini.cuts, started)
    _clear_evidence(folder)
    return code


def _launch(small: Config, folder: Path, alone: bool) -> int:
    """Run both parts of each check: before and after the resume.

    The second part has two ranks if the first has one and this process may start more.
    """
    other = in_layout(small, second_layout(small, 2))
    runs: list[tuple[Config, tuple[int, ...]]] = [(small, (0, 1))]
    if small.parallel.world == 1 and given_place() is None and other.parallel != small.parallel:
        runs = [(small, (0,)), (other, (1,))]
    for config, parts in runs:
        if forks(small):
            code = run_children(
                partial(_fork, small, config.parallel.world, parts), config.parallel.world, folder / "logs"
            )
        else:
            command = [sys.executable, "-m", "train.prove.proof_rank", str(folder / "config.yaml"), *map(str, parts)]
            code = launch(config, folder, command, partial(_run_rank, parts=parts), alone)
        if code != EXIT_OK:
            return code
    return EXIT_OK


def forks(config: Config) -> bool:
    """Returns whether ranks and judges are forks of this process, which then imports torch only once.

    False on GPUs, because their driver does not survive a fork. Also False if another program has started the ranks.
    """
    from train.kernels.device import sees_gpu

    return given_place() is None and (config.cluster.device == "cpu" or not sees_gpu(config.cluster.device))


def _fork(
    small: Config, world: int, parts: Sequence[int], environment: dict[str, str], output: IO | None
) -> ForkedProcess:
    """Start one of `world` ranks as a fork of this process."""
    import train.prove.judge  # noqa: F401  imported here once, so that no fork has to import it
    from parallel.zero.deepspeed_patches import import_deepspeed
    from train.prove.proof_rank import run_rank

    import_deepspeed(on_cuda=False)
    rank = int(environment["RANK"])
    work = partial(run_rank, small, Place(rank, world, rank, world), RunPaths(small).logs, parts=parts)
    return ForkedProcess(work, environment, output)


def _run_rank(config: Config, place: Place, parts: Sequence[int]) -> int:
    from train.prove.proof_rank import run_rank  # imports torch, which a driver does not need otherwise

    return run_rank(config, place, parts=parts)


def _judge(config: Config, small: Config, cuts: list[str], started: float) -> int:
    from train.prove.certificate import Certificate, write_card
    from train.prove.findings import ProofFindings, together
    from train.prove.judge import judge_all
    from train.prove.judge_state import judge_schedules

    findings, schedules = judge_all(small, at_a_time=2 if forks(small) else 1), ProofFindings()
    judge_schedules(config, schedules)
    findings = together([schedules, findings])
    certificate = Certificate(
        name=config.name,
        layout=layout_name(small),
        second_layout=findings.second_layout,
        ranks=small.parallel.world,
        device=findings.device,
        steps=small.steps,
        cuts=cuts,
        seconds=time.monotonic() - started,
        verdicts=list(findings.verdicts.values()),
        differences=findings.differences,
        acted=findings.acted,
        proven=describe_proven(settings_of(config)),
        own_code=targets_of(config),
    )
    run_folder = Path(small.runs)
    write_card(certificate, run_folder)
    certificate.show(certificate.write(run_folder))
    return EXIT_OK if certificate.holds else EXIT_CRASH


def _clear(run_folder: Path) -> None:
    """Remove the results of earlier proofs."""
    for name in (PROOF_FILE, PROOF_CARD_FILE):
        (run_folder / name).unlink(missing_ok=True)
    shutil.rmtree(run_folder / PROOF_FOLDER, ignore_errors=True)


def _clear_evidence(folder: Path) -> None:
    for name in ("evidence", *PROOFS):
        shutil.rmtree(folder / name, ignore_errors=True)
