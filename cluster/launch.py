"""Chooses how the ranks of a run start; one command serves all cases:

- RANK and WORLD_SIZE are set (torchrun, also under Slurm): this process is one rank.
- cluster=ray: this process is the driver and starts ranks on the nodes of a Ray cluster.
- The run has one rank: it runs in this process.
- Otherwise this process is the driver and starts the ranks as child processes.
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
    """Return the configuration and the place of a rank that a driver started. The first argument names the
    configuration file.

    Call it first: it changes to the user's folder, if this node has it, so that relative paths work.
    """
    place = given_place()
    assert place is not None, "the driver starts the ranks, with RANK and WORLD_SIZE"
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
    """Run all ranks, or only this rank if another program started it. Returns the exit code of the run.

    command: command of one rank as a child process
    run_rank: function that runs one rank in this process
    alone: whether this is the only run of this process. If not, ranks are child processes, because torch's process
        groups and DeepSpeed leave state behind
    planner: command that plans smaller layouts; see cluster/driver/driver.py
    watched: whether ranks report progress at every step, to find a hung rank
    """
    parallel, place = config.parallel, given_place()
    if place is not None:
        check_world(parallel.pp, parallel.dp, parallel.cp, place.world, f"WORLD_SIZE = {place.world}")
        return run_rank(config, place)
    if config.cluster.backend == "ray":
        # The import of Ray takes half a second.
        from cluster.driver.ray_backend import run_ray

        return run_ray(config, folder, command, planner)
    world = parallel.world
    if world == 1 and alone:
        return run_rank(config, Place())
    patience = patience_of(config.cluster)
    return run_local(command, world, folder / "logs", patience if watched else None)
