"""Computes the scheduled settings of each step: learning rate, MTP weight, bias speed and batch size.

A schedule depends only on the number of consumed tokens. Its phases end at fractions of the run's total tokens
(`until`), so a shorter run has a schedule of the same shape.
"""

import math
from dataclasses import dataclass
from itertools import accumulate

from conf.schema import Config, Optim, Phase, Shape


@dataclass(frozen=True)
class StepPlan:
    """The settings of one optimizer step."""

    step: int
    """Index of the step. The first step has index 1."""
    first_sample: int
    """Number of samples consumed before this step, which is also the index of the step's first sample."""
    batch_size: int
    """Number of sequences in this step, over all ranks."""
    lr: float
    mtp_weight: float
    bias_speed: float


class Schedules:
    """Plans the steps of a run."""

    def __init__(self, config: Config):
        self.config = config
        self.batch_sizes = [_batch_size(config, step) for step in range(config.steps)]
        self.samples = [0, *accumulate(self.batch_sizes)]

    def plan(self, step: int, shift: int = 0) -> StepPlan:
        """Returns the settings of a step.

        step: index of the step, from 1.
        shift: is added to `first_sample`. It corrects the number of consumed samples if a resumed run has changed the
            batch size.
        """
        index, optim = step - 1, self.config.optim
        # The middle of the step, so that a run of one step gets the middle of its schedule.
        fraction = (self.samples[index] + self.batch_sizes[index] / 2) / self.samples[-1]
        warmup = min(1.0, step / optim.warmup_steps) if optim.warmup_steps else 1.0
        return StepPlan(
            step=step,
            first_sample=self.samples[index] + shift,
            batch_size=self.batch_sizes[index],
            lr=optim.lr * warmup * value_at(optim.lr_schedule, fraction),
            mtp_weight=value_at(optim.mtp_weight, fraction),
            bias_speed=value_at(optim.bias_speed, fraction),
        )


def value_at(phases: list[Phase], fraction: float) -> float:
    """Returns a schedule's value at a fraction (0..1) of the run's tokens."""
    start, before = 0.0, phases[0].value
    for phase in phases:
        if fraction <= phase.until:
            done = (fraction - start) / (phase.until - start)
            return _between(phase.shape, before, phase.value, done)
        start, before = phase.until, phase.value
    return phases[-1].value


def _between(shape: Shape, before: float, after: float, done: float) -> float:
    if shape == Shape.linear:
        return before + (after - before) * done
    if shape == Shape.cosine:
        return after + (before - after) * (1 + math.cos(math.pi * done)) / 2
    return after


def _batch_size(config: Config, index: int) -> int:
    """Returns the number of sequences in a step. It grows linearly, rounded down to a multiple of the increment.

    index: the index of the step, from 0.
    """
    optim: Optim = config.optim
    if optim.batch_ramp_start is None or index >= optim.batch_ramp_steps:
        return config.batch_size
    grown = optim.batch_ramp_start + (config.batch_size - optim.batch_ramp_start) * index / optim.batch_ramp_steps
    return int(grown // optim.batch_ramp_increment) * optim.batch_ramp_increment
