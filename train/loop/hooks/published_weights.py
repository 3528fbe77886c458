"""Weights in Hugging Face's form while the run trains (checkpoint.weights_every), for whoever samples with the newest, as a loop of
reinforcement learning does.

    runs/NAME/weights/step_00000100/   a whole folder, as mode=export writes it, with export.dtype and export.family
    runs/NAME/weights/newest           a link to the newest one, which changes in one move

A folder gets its name when it is whole. The KEPT_FOLDERS newest stay, so that who has just read the link has time to open what it names.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from cluster.run_files import STEP_FOLDERS, step_name
from conf.run_paths import RunPaths
from conf.schema import Config
from train.data.prepare_progress import silent
from train.export.run import write_export
from train.loop.live_run import LiveRun

WEIGHTS_FOLDER, NEWEST = "weights", "newest"
KEPT_FOLDERS = 2


class PublishedWeights:
    """Writes the folder of a checkpoint that is due, by rank 0 once the checkpoint is there. The other ranks meet it in the next step."""

    def on_save(self, run: LiveRun, step: int) -> None:
        every = run.config.checkpoint.weights_every
        if run.writer is None or not every or (step % every and step < run.config.steps):
            return
        run.saver.finish(run)
        if (RunPaths(run.config).checkpoints / step_name(step)).exists():  # else it is told why not
            with run.beside("checkpoint"):
                publish_weights(run.config, step)


def publish_weights(config: Config, step: int) -> Path:
    """Write the folder of this step's checkpoint and let the link name it; returns the folder. Raises UserError."""
    folder = RunPaths(config).path / WEIGHTS_FOLDER
    target = folder / step_name(step)
    if not target.exists():  # a run that was cut off here writes it once
        checkpoint = str(RunPaths(config).checkpoints / step_name(step))
        section = replace(config.export, to=str(target), checkpoint=checkpoint, ema=False, merge=False)
        write_export(replace(config, export=section), silent)
    temporary = folder / f".{NEWEST}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.rename(folder / NEWEST)
    for old in sorted(folder.glob(STEP_FOLDERS))[:-KEPT_FOLDERS]:
        shutil.rmtree(old, ignore_errors=True)
    return target
