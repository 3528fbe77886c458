"""Choose how the ranks of a run come to life.

One command serves all: with RANK and WORLD_SIZE set (torchrun, also under Slurm) this process is one rank; with cluster=ray it
drives ranks on the nodes of Ray; a world of one runs in this process; otherwise this process becomes the driver and
starts the ranks as children.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.local import run_local
from cluster.patience import patience_of
from cluster.place import Place, given_place
from conf.check import check_world
from conf.load import read_config
from conf.schema import Config


def given_run() -> tuple[Config, Place]:
    """Configuration, whose file is the first argument, and place of a rank that a driver started. Call first.

    Goes where the command was typed, since relative paths of a recipe mean that; Ray starts ranks in its copy of the
    program. A node without that folder can still take a recipe whose paths are absolute.
    """
    place = given_place()
    assert place is not None, "ranks are started by the driver, which sets RANK and WORLD_SIZE"
    config, folder = read_config(sys.argv[1]), os.environ.get("SLUICE_FOLDER")
    if folder is not None and os.path.isdir(folder):
        os.chdir(folder)
    return config, place


def launch(
    config: Config,
    folder: Path,
    command: list[str],
    run_rank: Callable[[Config, Place], int],
    alone: bool = True,
    planner: Sequence[str] = (),
    watched: bool = False,
) -> int:
    """Run all ranks (or this one); returns the exit code of the run.

    `command` starts one rank as a child process; `run_rank` runs one in this process, which only the sole run of a
    process may do, since torch's process groups and DeepSpeed leave traces. planner: what a driver may start, as in
    cluster/driver/driver.py. watched: ranks say at every step how far they are, so that one that hangs can be told.
    """
    parallel, place = config.parallel, given_place()
    if place is not None:
        check_world(parallel.pp, parallel.dp, parallel.cp, place.world, f"WORLD_SIZE = {place.world}")
        return run_rank(config, place)
    if config.cluster.backend == "ray":
        from cluster.driver.ray_backend import run_ray  # importing Ray takes half a second that other runs need not pay

        return run_ray(config, folder, command, planner)
    world = parallel.world
    if world == 1 and alone:
        return run_rank(config, Place())
    patience = patience_of(config.cluster)
    return run_local(command, world, folder / "logs", patience if watched else None)
