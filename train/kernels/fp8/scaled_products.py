"""Products of values in bf16 with fp32 scales, on a CPU with AVX2: `train/kernels/cpu/products.cpp`.

An operand (O, C) is `QuantizedTensor` with its values in bf16, or a tensor in bf16, whose scales are all one. A scale stands
for tiles of 128 along the contraction, or for all of it.

Shape suffixes: as in train/kernels/fp8/engines.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.kernels.cpu.compiled_products import NO_SCALES, Part, parts_by_rows, parts_by_sums, run_products
from train.kernels.cpu.cpp_build import load_library
from train.kernels.cpu.libraries import source
from train.kernels.fp8.formats import TILE
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.quantize import QuantizedTensor

ScaledOperand = Tensor | QuantizedTensor


def product(
    left_OC: ScaledOperand, right_NC: ScaledOperand, dtype: torch.dtype, into_ON: Tensor | None = None
) -> Tensor:
    """left right^T: (O, N). into: fp32, to which the product is added."""
    (rows, contraction), columns = left_OC.shape, right_NC.shape[0]
    out_ON = _values(left_OC).new_empty(rows, columns, dtype=dtype) if into_ON is None else into_ON
    _run("scaled_gemm", left_OC, right_NC, out_ON, [(0, rows, 0, 0, contraction, 0)], into_ON is not None)
    return out_ON


def grouped(left_PC: ScaledOperand, right_ENC: ScaledOperand, groups: PaddedGroups, dtype: torch.dtype) -> Tensor:
    """Each expert's rows times its own matrix: (P, N), zero in the padding."""
    _, columns, contraction = right_ENC.shape
    out_PN = _values(left_PC).new_zeros(groups.rows, columns, dtype=dtype)
    parts = parts_by_rows(groups.starts, groups.counts, columns, contraction)
    _run("grouped_scaled_gemm", left_PC, right_ENC, out_PN, parts)
    return out_PN


def grouped_wgrad(
    left_OP: ScaledOperand,
    right_NP: ScaledOperand,
    groups: PaddedGroups,
    dtype: torch.dtype,
    into_EON: Tensor | None = None,
) -> Tensor:
    """For each expert the sum over its rows: (E, O, N). into: as in `product`."""
    rows, columns = left_OP.shape[0], right_NP.shape[0]
    shape = len(groups.counts), rows, columns
    out_EON = _values(left_OP).new_empty(shape, dtype=dtype) if into_EON is None else into_EON
    parts = parts_by_sums(groups.starts, groups.counts, rows, columns)
    _run("grouped_scaled_gemm", left_OP, right_NP, out_EON, parts, into_EON is not None)
    return out_EON


def need_compiled() -> None:
    """Raises UserError where the code cannot be built, kept or loaded."""
    load_library(
        source("products", "precision.fp8.compiled", "precision.fp8.compiled=false: torch's operations, slower")
    )


def _run(
    name: str, left: ScaledOperand, right: ScaledOperand, out: Tensor, parts: Sequence[Part], into: bool = False
) -> None:
    run_products(name, _values(left), _values(right), out, parts, _scales(left), _scales(right), into)


def _values(x: ScaledOperand) -> Tensor:
    return x.q if isinstance(x, QuantizedTensor) else x


def _scales(x: ScaledOperand) -> tuple[Tensor | None, int]:
    """One for every block of outer and tile of C; log2 of the side of a block. See `compiled_products._operand`."""
    if isinstance(x, Tensor):
        return NO_SCALES
    (side, along), (*lead, outer, contraction) = x.cast.block, x.shape
    one_outer, one_tile = (size <= 1 for size in x.scale.shape[-2:])
    assert (one_tile or along == TILE) and (one_outer or side in (1, TILE))
    shift = TILE.bit_length() - 1 if side > 1 else 0
    return x.scale.expand(*lead, -(-outer >> shift), -(-contraction // TILE)), shift
