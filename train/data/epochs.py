"""Steps of a run that is told how often it is to read its data."""

import math
from dataclasses import replace

from conf.check import check
from conf.errors import UserError
from conf.schema import Config
from train.data.corpus import build_corpus
from train.data.dataset import TrainingData
from train.data.prepare_progress import show_progress
from train.optim.schedules import Schedules


def with_steps(config: Config) -> Config:
    """The recipe with as many steps as read `epochs` times the sequences of all sources; the last step may read some once more.
    Makes the tokens where they are missing. Raises UserError.
    """
    assert config.epochs is not None
    with show_progress() as progress:
        corpus = build_corpus(config, progress)
    wanted = TrainingData(corpus, config).sequences * config.epochs
    steps = math.ceil(wanted / config.batch_size)
    while Schedules(replace(config, steps=steps)).samples[-1] < wanted:  # a ramp begins with smaller batches
        steps += 1
    if config.optim.warmup_steps >= steps:
        rule = f"is not less than the {steps} steps of epochs = {config.epochs:g}: the learning rate would only rise"
        raise UserError("optim.warmup_steps", config.optim.warmup_steps, rule, f"take {steps // 10} or so")
    with_steps = replace(config, steps=steps)
    check(with_steps)
    return with_steps
