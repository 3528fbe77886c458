"""Stand-ins for what a program gets from a GPU and the ghost cannot provide.

What a run tries on the GPU at its start, FP8 products and attention, is decided by values: FP8 counts as sound, and of
attention's kernels the memory-efficient one for whole sequences, since cuDNN asks the GPU, and FlashAttention for documents.
How many rows each expert has is a value, which the ghost does not know: they are shared out evenly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parallel.expert.stand_in import split_evenly
from train.kernels import choice, gpu_check
from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.fp8.groups import on_device
from train.kernels.gpu.fused_attention import EfficientAttention, FlashAttention
from train.loop.measure import CollectedMeasures
from train.loop.stop import StopKind


def install() -> None:
    """The answers of what a run tries at its start."""
    gpu_check.probe = lambda *_: ""
    choice.CORES = {"whole": _WholeSequences(), "documents": FlashAttention()}
    choice.problem_of = lambda *_: None
    torch.Tensor.__repr__ = _without_values
    read = CollectedMeasures.read  # whether a rank was asked to stop is a value, too
    CollectedMeasures.read = lambda self: replace(read(self), stop=StopKind.none)


class _WholeSequences(EfficientAttention):
    """In the place of cuDNN's."""

    takes_documents = False


def _without_values(tensor: Tensor, *, tensor_contents: object = None) -> str:
    """torch first counts the values that it will print, and takes memory for a count that means nothing here."""
    return f"tensor({tuple(tensor.shape)}, {tensor.dtype}, {tensor.device})"


@contextmanager
def even_experts() -> Iterator[None]:
    """Experts of FP8 layers get equal parts of the rows, for ranks whose dispatcher makes up nothing."""
    real = Fp8Precision.expert_ffn

    def evenly(
        self: Fp8Precision, rows_RD: Tensor, gates_R: Tensor, w13: Tensor, w2: Tensor, counts_E: Tensor, *rest: Any
    ) -> Tensor:
        assert counts_E.is_cuda, f"row counts on {counts_E.device}"
        even = split_evenly(len(rows_RD), len(counts_E))
        return real(self, rows_RD, gates_R, w13, w2, on_device(even, counts_E.device), *rest)

    Fp8Precision.expert_ffn = evenly
    try:
        yield
    finally:
        Fp8Precision.expert_ffn = real
