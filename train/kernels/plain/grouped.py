"""Grouped matmuls: each row is multiplied by the weight of its expert.

Functions with `rows`, the number of rows of each expert, are for bf16 on a CPU. oneDNN compiles a kernel for every new
shape, in about 0.4 ms. So row counts are rounded up to a multiple of `expert_rows` (conf/thresholds.py). The matmul of
one expert then also processes some rows of the next expert, whose own matmul overwrites these results.

Functions with `ends_E`, the end of each expert's rows (int32), use torch's grouped matmul.

Shapes: R rows sorted by expert, E experts, I inputs and O outputs of a matmul.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.thresholds import THRESHOLDS


def matmul(x_RI: Tensor, weight_EIO: Tensor, rows: Sequence[int]) -> Tensor:
    """Multiplies each row by its expert's weight: (R, O)."""
    R = len(x_RI)
    out_RO = x_RI.new_empty(R, weight_EIO.size(2))
    for weight_IO, start, end in _parts(weight_EIO, rows):
        size = _rounded(end - start)
        if start + size <= R:
            torch.mm(x_RI[start : start + size], weight_IO, out=out_RO[start : start + size])
        else:  # too few rows follow, so also use rows before these
            first = max(0, R - size)
            out_RO[start:end] = (x_RI[first:] @ weight_IO)[start - first : end - first]
    return out_RO


def weight_gradient(grad_RO: Tensor, x_RI: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns grad^T x over each expert's rows: (E, O, I)."""
    dweight_EOI = x_RI.new_zeros(len(rows), grad_RO.size(1), x_RI.size(1))
    most = _rounded(max(rows))
    grad_PO, x_PI = grad_RO.new_empty(most, grad_RO.size(1)), x_RI.new_empty(most, x_RI.size(1))
    for dweight_OI, start, end in _parts(dweight_EOI, rows):
        size = _rounded(end - start)
        for padded, real in ((grad_PO, grad_RO), (x_PI, x_RI)):
            padded[: end - start] = real[start:end]
            padded[end - start : size] = 0
        torch.mm(grad_PO[:size].t(), x_PI[:size], out=dweight_OI)
    return dweight_EOI


def ends_of(counts_E: Tensor) -> Tensor:
    """Returns the end of each expert's rows, int32."""
    return counts_E.cumsum(0).to(torch.int32)


def matmul_to_ends(x_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Multiplies each row by its expert's weight: (R, O)."""
    if len(x_RI) == 0 or x_RI.is_meta:  # on CUDA, torch refuses empty input; on meta, it needs bf16
        return x_RI.new_empty(len(x_RI), weight_EIO.shape[2])
    return F.grouped_mm(x_RI, weight_EIO, offs=ends_E)


def weight_gradient_to_ends(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    """Returns grad^T x over each expert's rows: (E, O, I)."""
    if len(x_RI) == 0 or x_RI.is_meta:
        return x_RI.new_zeros(len(ends_E), grad_RO.shape[1], x_RI.shape[1])
    return F.grouped_mm(grad_RO.t(), x_RI, offs=ends_E)


def _parts(by_expert: Tensor, rows: Sequence[int]) -> Iterator[tuple[Tensor, int, int]]:
    """Yields, for each expert with rows, its matrix and its rows' start and end."""
    ends = list(itertools.accumulate(rows))
    for one, count, end in zip(by_expert, rows, ends, strict=True):
        if count:
            yield one, end - count, end


def _rounded(rows: int) -> int:
    return -(-rows // THRESHOLDS.expert_rows) * THRESHOLDS.expert_rows
