"""mode=prove: shrink the recipe, let its ranks train, judge what they saw, and say what is proven."""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cluster.launch import Place, given_place, launch
from conf.errors import EXIT_CRASH, EXIT_OK, UserError
from conf.load import write_config
from conf.schema import Config
from train.loop.layout_check import check_layout
from train.metrics.proof_rows import CARD, FILE
from train.prove.layouts import PROOFS, in_layout, layout_name, second_layout

FOLDER = "prove"
"""In the run's folder: configuration, logs, and while a proof runs its checkpoints and evidence."""


def prove(config: Config, alone: bool) -> int:
    """Returns the exit code: 0 only if all of it held. alone: the only job of this process, which may then be its rank."""
    from train.prove.low_precision import read_recipe
    from train.prove.miniature import shrink

    started = time.monotonic()
    if config.cluster.backend != "local":
        rule = "mode=prove starts its ranks on this machine, or is started by torchrun"
        raise UserError("cluster.backend", config.cluster.backend, rule, "leave cluster=ray out")
    check_layout(config)
    read_recipe(config.precision)  # of a format without a reference nothing could be proven
    run_folder = Path(config.runs).absolute() / config.name
    mini = shrink(config)
    small = replace(mini.cfg, runs=str(run_folder), name=FOLDER)
    folder, place = run_folder / FOLDER, given_place()
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
    """Let the ranks run. What one rank saves, two read, where this process may start them; else as many as saved it."""
    command = [sys.executable, "-m", "train.prove.proof_rank", str(folder / "config.yaml")]
    other = in_layout(small, second_layout(small, 2))
    if small.parallel.world > 1 or given_place() is not None or other.parallel == small.parallel:
        return launch(small, folder, command, partial(_run_rank, parts=(0, 1)), alone)
    code = launch(small, folder, [*command, "0"], partial(_run_rank, parts=(0,)), alone)
    return code or launch(other, folder, [*command, "1"], partial(_run_rank, parts=(1,)), alone)


def _run_rank(config: Config, place: Place, parts: Sequence[int]) -> int:
    from train.prove.proof_rank import run_rank  # imports torch, which the driver of other ranks can do without

    return run_rank(config, place, parts=parts)


def _judge(config: Config, small: Config, cuts: list[str], started: float) -> int:
    from train.prove.card import write_card
    from train.prove.certificate import Certificate
    from train.prove.judge import judge_all

    findings = judge_all(small)
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
    )
    run_folder = Path(small.runs)
    write_card(certificate, run_folder)
    certificate.show(certificate.write(run_folder))
    return EXIT_OK if certificate.holds else EXIT_CRASH


def _clear(run_folder: Path) -> None:
    """An old certificate must not be taken for that of a proof that fails to end."""
    for name in (FILE, CARD):
        (run_folder / name).unlink(missing_ok=True)
    shutil.rmtree(run_folder / FOLDER, ignore_errors=True)


def _clear_evidence(folder: Path) -> None:
    for name in ("evidence", *PROOFS):
        shutil.rmtree(folder / name, ignore_errors=True)
