"""The hooks of a run, in the order in which they are called; train/loop/live_run.py says what a hook is.

device_errors.py is no hook: it explains an error of any part of a rank, also before there is a run (train/worker.py).
"""

from typing import Any

from cluster.comm_ring import CommRing
from conf.run_paths import RunPaths
from conf.schema import Config
from train.loop.hooks.averaged_weights import weight_averages
from train.loop.hooks.callbacks import make_callbacks
from train.loop.hooks.copies_in_memory import CopiesInMemory
from train.loop.hooks.held_out_metrics import BestKept, Validation
from train.loop.hooks.layer_norms import LayerNorms
from train.loop.hooks.profiler import StepProfiler
from train.loop.hooks.published_weights import PublishedWeights
from train.loop.hooks.rank_progress import RankProgress
from train.loop.hooks.replicas import ReplicaCheck, StateCheck
from train.loop.hooks.skipped_steps import SkippedSteps
from train.loop.hooks.step_metrics import Flops, Fp8Readings, Recorder, StepMetrics
from train.loop.hooks.timeline_sampler import TimelineSampler
from train.loop.hooks.written_text import SampleTexts
from train.rank_parts import ParallelModel, RankSetup


def build_hooks(
    config: Config, rank: RankSetup, parts: ParallelModel, flops: Flops, copies: CopiesInMemory, ring: CommRing | None
) -> list[Any]:
    """Every hook, the recipe's callbacks among them. Those that the recipe does not ask for do nothing. Raises UserError."""
    zero, mesh = parts.zero, rank.mesh
    progress = RankProgress(RunPaths(config).logs, mesh.rank, rank.device, ring)
    return [
        StepMetrics(flops),  # before all that takes time and is no training
        TimelineSampler(),  # aligns the ranks of the pipeline: after what waits for nobody, and before the profiler looks
        StepProfiler(
            config, mesh.rank, parts
        ),  # last before the passes and first after the update: what else is done is not in it
        ReplicaCheck(config.log.replicas_every, zero, mesh),  # before the phase changes: what it finds is of the passes
        StateCheck(config.log.state_every, zero, mesh.rank),  # before anything reads the state
        progress,  # before what may be slow, so that whoever watches knows what the rank is at
        Fp8Readings(config),  # any place before the recorder
        LayerNorms(config, zero, rank.device),  # keeps the weights before the update, and adds to the record
        *weight_averages(config, zero),  # any place: alone takes the weights after the update
        SkippedSteps(),  # after the checks: a run that it ends has been looked at
        Validation(),  # after all that measures the step, as it takes long; adds the held-out loss to the record
        BestKept(),  # after the validation, which it reads
        Recorder(),  # after all that adds to the record
        *make_callbacks(config, progress),  # after the record is written, and before the state is saved
        copies,  # before checkpoints, which take longer
        SampleTexts(),  # after a checkpoint has begun, which it waits for
        PublishedWeights(),  # the same; after the samples, as it takes longer
    ]
