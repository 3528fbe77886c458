"""Times a recipe's kernels: each part of the model runs as in a memory plan, but on a real device.

Plans use the same recorder (train/plan/work_recorder.py), so every planned kernel is timed. On a GPU, backward has its
own thread, in which the recorder sees the model's kernels, but no single torch operations.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from conf.schema import Config, Recompute
from parallel.expert.wire import Fp8Wire
from train.kernels.choice import choose_kernels
from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.plain.high import HighPrecision
from train.kernels.precision import activation_dtype, build_precision
from train.model.init import initialise
from train.model.operations import Kernels
from train.optim.optimizer_classes import OPTIMIZER_CLASSES
from train.plan.memory.ledger import Ledger
from train.plan.memory.part import Run
from train.plan.memory.rank_memory import scene_of
from train.plan.time.timed_step import undisturbed_clock
from train.plan.work_recorder import TimedWork, Work, WorkRecorder

TIMED_PARTS = ("embedding", "dense", "moe", "end")
TIMED_PASSES = 6
"""Timed passes through a model part; the first is discarded."""
COUNT = 2**25
"""Number of weights in the timed updates, too many for a cache."""
PIECES = (2**14, 2**20)
"""Numbers of weights per tensor in the timed updates."""


class TimedRun(Run):
    """Times the kernels of a model part on a real device."""

    def __init__(self, config: Config, part: str, device: torch.device):
        """config: recipe for a single rank"""
        super().__init__(scene_of(config), part)
        self._config, self.device = config, device
        self._ledger = Ledger(device)
        clock: Callable[[], float] = lambda: undisturbed_clock(device)  # noqa: E731
        self._recorder = self._ledger.recorder = WorkRecorder(waits_for_each=True, clock=clock)

    def timed(self) -> list[TimedWork]:
        """Returns the kernels of forward and backward, with their shortest times."""
        passes = []
        for _ in range(TIMED_PASSES):
            self.forward()
            forward = self._recorder.timed
            self.backward(False)
            passes.append([*forward, *self._recorder.timed])
        return [min(same, key=lambda one: one.seconds) for same in zip(*passes[1:], strict=True)]

    def _kernels_of_device(self) -> Kernels:
        return choose_kernels(self._config, self.device)[0]

    def _precision_of_device(self, kernels: Kernels) -> HighPrecision | Fp8Precision:
        recompute = Recompute.swiglu in self._config.model.recompute
        return build_precision(self._config.precision, self.device, kernels, recompute)

    def _fill(self) -> None:
        initialise(self._module, 0, self.device)

    def _tokens(self, *shape: int) -> Tensor:
        return torch.randint(self._config.model.vocab_size, shape, device=self.device)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(activation_dtype(self._config.precision))


def timed_passes(config: Config, device: torch.device) -> Iterator[TimedWork]:
    """Times every kernel in the passes of a recipe without parallelism."""
    for part in TIMED_PARTS:
        if part == "moe" and config.model.layers == config.model.dense_layers:
            continue
        if part == "dense" and not config.model.dense_layers:
            continue
        with TimedRun(config, part, device) as run:
            yield from run.timed()


def timed_rows_and_weights(config: Config, device: torch.device) -> Iterator[TimedWork]:
    """Times FP8 casts of rows, gradient sums, copies, and the optimizer."""
    clock = WorkRecorder(False, lambda: undisturbed_clock(device))
    dtype, element = activation_dtype(config.precision), config.precision.weight_bytes
    rows = torch.randn(config.micro_batch_size * config.seq_len, config.model.hidden, device=device).to(dtype)
    wire = Fp8Wire()
    cases: list[tuple[Work, Callable[[], object]]] = [
        (Work("cast", bytes=rows.numel() * (element + 1)), lambda: wire.encode(rows))
    ]
    total, part = torch.zeros(COUNT, device=device), torch.randn(COUNT, device=device).to(dtype)
    other, parts = torch.ones_like(total), choose_kernels(config, device)[0].parts
    for piece in PIECES:
        calls = COUNT // piece
        sums, grads, others = total.split(piece), part.split(piece), other.split(piece)
        params = [torch.nn.Parameter(one.clone()) for one in others]
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        made = OPTIMIZER_CLASSES[config.optim.facts.name].make([{"params": params}], config, parts)
        updated = config.optim.facts.count_update_bytes(config.precision.moment_bytes, element)
        added = 12 + (0 if element == 4 else element + 4)
        cases += [
            (Work("accumulate", bytes=added * COUNT, calls=calls), lambda a=sums, b=grads: _accumulate(a, b)),
            (Work("memory", bytes=8 * COUNT, calls=calls), lambda a=others, b=sums: _copy(a, b)),
            (
                Work("optimizer", bytes=updated * COUNT, calls=calls),
                lambda a=made, b=params, c=grads: (a.step(), _copy(c, [one.detach() for one in b])),
            ),
        ]
    for work, run in cases:
        for _ in range(TIMED_PASSES):
            clock.clear()
            clock.run(run, lambda _, work=work: work)
            yield from clock.timed


def _accumulate(sums: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add gradients to their fp32 sums."""
    for total, part in zip(sums, parts, strict=True):
        total.add_(part.float())


def _copy(to: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for one, other in zip(to, tensors, strict=True):
        one.copy_(other)
