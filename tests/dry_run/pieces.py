"""A recipe that takes a second, and the screen of a dry run without a run."""

from pathlib import Path

import torch
from rich.console import Console

from conf.load import compose
from train.dry_run.assumed_rows import load_of
from train.dry_run.dry_run_result import dry_run_screen, find
from train.dry_run.expected import expect
from train.dry_run.lone import MeasuredRank
from train.dry_run.piece import DryRunPiece, choose_piece, choose_rank
from train.loop.layout_check import check_layout
from train.plan.job import with_nodes
from train.plan.memory.ledger import PhaseBytes

TINY = [
    "mode=dry_run",
    "cluster.device=cpu",
    "cluster.threads=1",
    "dry_run.steps=1",
    "seq_len=64",
    "batch_size=8",
    "micro_batch_size=1",
]
CPU = torch.device("cpu")
STEP = ("schedule", "reduction", "update")


def piece_of(*overrides: str) -> DryRunPiece:
    """What mode=dry_run would run."""
    config = with_nodes(compose(*TINY, *overrides))
    check_layout(config)
    rank = choose_rank(config)
    return choose_piece(config, rank, load_of(config, rank), CPU)


def invented(piece: DryRunPiece, seconds: float = 1.0) -> MeasuredRank:
    """Measurements as they might be."""
    measured = MeasuredRank(
        dict.fromkeys(("start", *STEP), PhaseBytes(2**20, 0)),
        items=dict.fromkeys(("weights", "master", "moments", "gradients"), 2**16),
    )
    measured.actions["F"], measured.actions["B"] = [seconds], [2 * seconds]
    measured.counts.update(F=2, B=2)
    for name in (*STEP, "step"):
        measured.seconds[name] = [seconds]
    return measured


def screen_of(piece: DryRunPiece, measured: MeasuredRank | None = None) -> str:
    console = Console(record=True, width=500)
    dry_run_screen(find(piece, measured or invented(piece), expect(piece, CPU), CPU), Path("runs/a"), console)
    return console.export_text()
