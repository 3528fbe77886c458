"""Samples the timeline of the pipeline's actions in a few steps of a run.

train/metrics/timeline_file.py describes the file.
"""

from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from conf.disk import explain_disk_error
from parallel.exchange import gather
from parallel.pipeline.timeline import StepRecord
from train.data.batch import Batch
from train.loop.live_run import LiveRun
from train.metrics.names import Record
from train.metrics.timeline_file import SampledStep, write_timeline

WARM_UP = 3
"""Index, within the attempt, of the early step that is sampled. Earlier steps have extra work."""


class TimelineSampler:
    """Samples the timeline of an early step and of the last step. Without a pipeline it samples nothing."""

    def __init__(self) -> None:
        self._steps = set[int]()
        """The steps to sample. They are the same on every rank."""

    def on_start(self, run: LiveRun) -> None:
        if run.mesh.layout.pp > 1:
            self._steps = {run.state.step + WARM_UP, run.config.steps}

    def on_batch(self, run: LiveRun, step: int, batch: Batch) -> None:
        """Let the pipeline's ranks start a sampled step at the same time. Collective over the pipeline."""
        if step in self._steps:
            dist.all_reduce(torch.zeros(1, device=run.device), group=run.mesh.stages_group)

    def on_step(self, run: LiveRun, step: int, record: Record) -> None:
        """Gather the first pipeline's records on rank 0, which writes them. Collective over this pipeline."""
        mesh = run.mesh
        if step not in self._steps or mesh.stage_rank:
            return
        newest = run.parts.pipeline.timeline.newest()
        mine = round(newest.span, 6), plain_actions(newest, mesh.rank, mesh.pp_rank)
        spans, actions = zip(*gather(mine, mesh.stages_group), strict=True)
        if mesh.rank == 0:
            schedule = str(run.config.parallel.schedule)
            sampled = SampledStep(step, schedule, list(spans), list(chain.from_iterable(actions)))
            try:
                write_timeline(run.folder, sampled)
            except OSError as error:
                run.note(f"the timeline of step {step} could not be written ({explain_disk_error(error)})")


def plain_actions(record: StepRecord, rank: int, pp_rank: int) -> list[dict[str, Any]]:
    """Returns one rank's entries of timeline.json."""
    return [
        {
            "rank": rank,
            "pp_rank": pp_rank,
            "stage": action.stage,
            "kind": action.kind,
            "micro_batch": action.micro_batch,
            "start_seconds": round(action.start, 6),
            "seconds": round(action.seconds, 6),
        }
        | ({} if action.backward is None else {"backward": list(action.backward)})
        for action in record.actions
    ]
