"""Times the phases of a rank's training step on this device."""

import time
from collections.abc import Callable

import torch

from conf.micro_batches import share_of
from conf.schema import Config
from train.data.batch import Batch
from train.loop.training_engine import Engine, StepOutcome
from train.optim.schedules import StepPlan
from train.rank_parts import ParallelModel, RankSetup


def wall_clock(device: torch.device) -> float:
    """Waits for the device's pending work, and returns the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def undisturbed_clock(device: torch.device) -> float:
    """Returns `wall_clock`, or the process's processor time on a CPU with one thread."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return wall_clock(device)


class TimedStep:
    """Runs training steps of one rank over random tokens."""

    def __init__(
        self, config: Config, parts: ParallelModel, rank: RankSetup, clock: Callable[[torch.device], float] = wall_clock
    ):
        self._config, self._device, self._clock = config, rank.device, clock
        self._engine = Engine(config, parts, rank)
        draw = torch.Generator().manual_seed(config.seed)
        shape = share_of(config, config.batch_size, 0)[1], config.seq_len + 1
        self.tokens_BS = torch.randint(config.model.vocab_size, shape, generator=draw).to(rank.device)

    def run(
        self, number: int, on_phase: Callable[[str], None] = lambda _: None
    ) -> tuple[StepOutcome, dict[str, float]]:
        """Run a step. Returns its outcome, and the seconds of `schedule` (passes), `reduction` and `update`.

        on_phase: called with a phase's name at its end
        The learning rate is 0, because other ranks' shards are missing.
        """
        plan = StepPlan(number, 0, self._config.batch_size, 0.0, self._config.optim.mtp_weight[0].value, 0.0)
        marks, seconds = [self._clock(self._device)], {}

        def end(phase: str) -> None:
            marks.append(self._clock(self._device))
            seconds[phase] = marks[-1] - marks[-2]
            on_phase(phase)

        return self._engine.run(plan, Batch(self.tokens_BS), on_phase=end), seconds
