"""mode=dry_run: runs one rank of a job alone, as far as it fits, and compares it with the plan."""

import json
from pathlib import Path

import torch

from cluster.place import Place
from conf.errors import EXIT_OK
from conf.files import atomic_write_text
from conf.schema import Config
from train.dry_run.assumed_rows import load_of
from train.dry_run.dry_run_result import DRY_RUN_FILE, dry_run_screen, find, record
from train.dry_run.expected import expect
from train.dry_run.lone import run_alone
from train.dry_run.piece import choose_piece, choose_rank
from train.loop.layout_check import check_layout
from train.plan.job import with_nodes
from train.plan.time.rates import read_calibration
from train.rank import choose_device


def dry_run(config: Config) -> int:
    """Run this mode. Raises UserError if the layout cannot run or fit."""
    config = with_nodes(config)
    check_layout(config)
    device = _choose_device(config)
    rank = choose_rank(config)
    piece = choose_piece(config, rank, load_of(config, rank), device)
    times = expect(piece, device)
    folder = Path(config.runs) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    found = find(piece, run_alone(piece, device, folder), times, device)
    atomic_write_text(folder / DRY_RUN_FILE, json.dumps(record(found), indent=1))
    dry_run_screen(found, folder)
    return EXIT_OK


def _choose_device(config: Config) -> torch.device:
    """Returns the device of a run. On a CPU, sets the number of threads that the calibration used."""
    device = choose_device(config, Place())
    if device.type == "cpu" and config.plan.calibration is not None and not config.cluster.threads:
        torch.set_num_threads(read_calibration(config.plan.calibration)["threads"])
    return device
