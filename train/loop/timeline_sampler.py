"""Samples the pipeline's timeline in a few steps of a run; see train/metrics/timeline_file.py for the file."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from conf.disk import explain_disk_error
from conf.run_paths import RunPaths
from conf.schema import Config
from parallel.exchange import gather
from parallel.mesh import Mesh
from parallel.pipeline.schedule import Pipeline
from parallel.pipeline.timeline import StepRecord
from train.metrics.timeline_file import SampledStep, write_timeline

WARM_UP = 3
"""The early sample is this step of an attempt: what the first ones only do once is over."""


class TimelineSampler:
    """Takes the timeline of an early step and of the last; of none without a pipeline."""

    def __init__(self, config: Config, mesh: Mesh, pipeline: Pipeline, done: int):
        """done: steps that were behind this attempt when it began."""
        self._mesh, self._pipeline, self._schedule = mesh, pipeline, config.parallel.schedule
        self._folder = RunPaths(config).path
        self._steps = {done + WARM_UP, config.steps} if mesh.layout.pp > 1 else set()

    def wants(self, step: int) -> bool:
        """Whether this step is sampled; the same on every rank."""
        return step in self._steps

    def align(self) -> None:
        """Let the ranks of the pipeline start together. Collective over the pipeline, right before its step."""
        dist.all_reduce(torch.zeros(1, device=self._pipeline.device), group=self._mesh.stages_group)

    def save(self, step: int, note: Callable[[str], None]) -> None:
        """Bring the first pipeline's records to rank 0, which writes them. Collective over that pipeline.

        note: called with a sentence when the disk refuses the file.
        """
        if self._mesh.stage_rank:
            return
        record = self._pipeline.timeline.newest()
        mine = round(record.span, 6), plain_actions(record, self._mesh.rank, self._mesh.pp_rank)
        spans, actions = zip(*gather(mine, self._mesh.stages_group), strict=True)
        if self._mesh.rank == 0:
            sampled = SampledStep(step, str(self._schedule), list(spans), list(chain.from_iterable(actions)))
            try:
                write_timeline(self._folder, sampled)
            except OSError as error:
                note(f"the timeline of step {step} could not be written ({explain_disk_error(error)})")


def plain_actions(record: StepRecord, rank: int, pp_rank: int) -> list[dict[str, Any]]:
    """One rank's part of timeline.json."""
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
