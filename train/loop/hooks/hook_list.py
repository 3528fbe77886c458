"""Lists the hooks of a run in call order. train/loop/live_run.py defines a hook.

device_errors.py is not a hook, because it also explains errors before the run exists (train/worker.py).
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
    """Builds all hooks, including the recipe's callbacks. Hooks that the recipe does not enable do nothing.

    Raises UserError.
    """
    zero, mesh = parts.zero, rank.mesh
    progress = RankProgress(RunPaths(config).logs, mesh.rank, rank.device, ring)
    return [
        StepMetrics(flops),  # before slow hooks, so that the measured time of the step excludes them
        TimelineSampler(),  # waits for the pipeline's other ranks; before the profiler, which must not record this wait
        StepProfiler(
            config, mesh.rank, parts
        ),  # the last hook before the passes and the first after the update, so that the profile contains no hooks
        ReplicaCheck(
            config.log.replicas_every, zero, mesh
        ),  # compares right after the passes, before `progress` reports the next phase
        StateCheck(config.log.state_every, zero, mesh.rank),  # before anything reads the state
        progress,  # before slow hooks, so that the driver knows the rank's phase
        Fp8Readings(config),  # anywhere before `Recorder`
        LayerNorms(config, zero, rank.device),  # before `Recorder`, because it adds norms to the record
        *weight_averages(config, zero),  # anywhere: no other hook copies the weights after the update
        SkippedSteps(),  # after the checks above, because this hook may end the run
        Validation(),  # after all measurements of the step, because it is slow; it adds the held-out loss to the record
        BestKept(),  # after the validation, whose loss it reads
        Recorder(),  # after all hooks that add to the record
        *make_callbacks(config, progress),  # after the record is written, and before the state is saved
        copies,  # before checkpoints, which take longer
        SampleTexts(),  # after a checkpoint has begun: waits until it is complete
        PublishedWeights(),  # also after a checkpoint has begun; after the samples, because it takes longer
    ]
