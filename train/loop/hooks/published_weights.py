"""checkpoint.weights_every: writes weights in Hugging Face's format during training, for example for RL samplers.

    runs/NAME/weights/step_00000100/   a complete folder, as mode=export writes it, with export.dtype and export.family
    runs/NAME/weights/newest           a link to the newest folder, replaced atomically

A folder gets its final name when it is complete. The hook keeps the newest KEPT_FOLDERS folders, so that a process that
has read the link has time to open the folder.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from cluster.run_files import STEP_FOLDERS, step_name
from conf.run_paths import RunPaths
from conf.schema import Config
from train.data.prepare_progress import silent
from train.export.run import check_family, family_of, write_export
from train.loop.live_run import LiveRun

WEIGHTS_FOLDER, NEWEST = "weights", "newest"
KEPT_FOLDERS = 2


class PublishedWeights:
    """Writes a Hugging Face folder every checkpoint.weights_every steps and after the last step, when the checkpoint of
    the step is complete.

    Rank 0 writes the folder. Other ranks wait for rank 0 in the next step.
    """

    def on_start(self, run: LiveRun) -> None:
        if run.config.checkpoint.weights_every:
            check_family(run.config, family_of(run.config, run.state.family), alone=run.config.adapter.on)
            if run.writer is not None:
                drop_later(run.folder / WEIGHTS_FOLDER, run.state.step)
                if run.state.step:
                    self.on_save(run, run.state.step)  # an earlier start may have ended between checkpoint and folder

    def on_save(self, run: LiveRun, step: int) -> None:
        every = run.config.checkpoint.weights_every
        if run.writer is None or not every or (step % every and step < run.config.steps):
            return
        run.saver.finish(run)
        if (
            RunPaths(run.config).checkpoints / step_name(step)
        ).exists():  # if it does not exist, the saver has reported the failure
            with run.beside("checkpoint"):
                publish_weights(run.config, step)


def drop_later(folder: Path, step: int) -> None:
    """Remove the partial folders of killed processes, and the folders of steps after `step`.

    The run repeats the steps after `step`, perhaps with other settings.
    """
    found = sorted(folder.glob(STEP_FOLDERS))
    kept = [one for one in found if one.name <= step_name(step)]
    if kept and kept != found:
        point_to(kept[-1])
    elif kept != found:
        (folder / NEWEST).unlink(missing_ok=True)
    for old in [*found[len(kept) :], *folder.glob(f".{STEP_FOLDERS}.tmp")]:
        shutil.rmtree(old, ignore_errors=True)


def point_to(target: Path) -> None:
    """Replace the link `newest` by a link to `target`."""
    temporary = target.with_name(f".{NEWEST}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.rename(target.with_name(NEWEST))


def publish_weights(config: Config, step: int) -> Path:
    """Write this step's checkpoint as a Hugging Face folder, and point the link `newest` to it. Returns the folder.

    Raises UserError.
    """
    folder = RunPaths(config).path / WEIGHTS_FOLDER
    target = folder / step_name(step)
    if not target.exists():  # an interrupted attempt may have written the folder already
        checkpoint = str(RunPaths(config).checkpoints / step_name(step))
        section = replace(config.export, to=str(target), checkpoint=checkpoint, ema=False, merge=False)
        write_export(replace(config, export=section), silent)
    point_to(target)
    for old in sorted(folder.glob(STEP_FOLDERS))[:-KEPT_FOLDERS]:
        shutil.rmtree(old, ignore_errors=True)
    return target
