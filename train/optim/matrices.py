"""Splits a weight into logical matrices by its name. Muon orthogonalises each logical matrix separately.

Some weights stack independent matrices: attention heads, the keys and values of a head, the latent and the rope key, w1
and w3, or experts. If Muon treated them as one matrix, the largest block would dominate the singular values of the
others.

Every logical matrix is a rectangle in the rows and columns of its weight. A weight (E, R, C) has E * R rows.
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from conf.schema import Model


class LogicalMatrix(NamedTuple):
    """A rectangle in the rows and columns of a weight."""

    rows: range
    columns: range

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)


class MatrixStack(NamedTuple):
    """How a weight stacks its logical matrices.

    by_head: whether this split applies only if attention is split by heads.
    """

    sizes: Callable[[Model, int], Sequence[int]]
    """Returns the length of each logical matrix along the stacked axis. Arguments: model, length of the axis."""
    axis: int = -2
    by_head: bool = False


STACKS: dict[str, MatrixStack] = {
    r"attention\.(q|q_up)\.": MatrixStack(lambda m, _: [m.nope_head_dim + m.rope_head_dim] * m.heads, by_head=True),
    r"attention\.kv_up\.": MatrixStack(lambda m, _: [m.nope_head_dim, m.v_head_dim] * m.heads, by_head=True),
    r"attention\.out\.": MatrixStack(lambda m, _: [m.v_head_dim] * m.heads, axis=-1, by_head=True),
    r"attention\.kv_down\.": MatrixStack(lambda m, _: [m.kv_rank, m.rope_head_dim]),
    r"\.w13(\.|$)": MatrixStack(lambda _, rows: [rows // 2] * 2),
}
"""Patterns of weight names, each with its `MatrixStack`. Other weights are one matrix."""


def logical_matrices(name: str, shape: Sequence[int], model: Model, by_head: bool) -> list[LogicalMatrix]:
    """Returns the logical matrices of a weight that Muon updates.

    shape: (rows, columns), or (E, rows, columns). by_head: whether to split attention weights by heads.
    """
    *experts, rows, columns = shape
    stack = next((stack for part, stack in STACKS.items() if re.search(part, name)), None)
    heights, widths = [rows], [columns]
    if stack is not None and (by_head or not stack.by_head):
        if stack.axis == -1:
            widths = list(stack.sizes(model, columns))
        else:
            heights = list(stack.sizes(model, rows))
    assert (sum(heights), sum(widths)) == (rows, columns), name
    return [
        LogicalMatrix(row, column)
        for row in _ranges(heights * (experts[0] if experts else 1))
        for column in _ranges(widths)
    ]


def _ranges(sizes: Sequence[int]) -> list[range]:
    ends = list(accumulate(sizes))
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


# Newton-Schulz iteration, which computes the orthogonal factor of a matrix.
#
# With G = U S V^T, each step applies the same odd polynomial to all singular values and keeps U and V:
#
# X <- a X + (b A + c A A) X,   A = X X^T,   from X = G / |G|   (Frobenius norm)
#
# The singular values approach 1, and X approaches U V^T. A matrix with more rows than columns is transposed, so that A
# is small. A zero matrix gives zeros. There are three sets of coefficients:
#
# - `quintic`: Jordan's coefficients, which give singular values between about 0.68 and 1.2
#   (kellerjordan.github.io/posts/muon)
# - `polar_express`: each step is optimal for the result of the previous step (arXiv 2505.16932, algorithm 1)
# - `deepseek_v4`: eight steps of `quintic`, then two that converge to 1 (DeepSeek-V4's report)
#
# Shapes: B matrices, M rows, N columns.

Coefficients = tuple[float, float, float]
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
PUBLISHED_POLAR: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SAFETY = 1.01
"""Divisor of the Polar Express coefficients. It keeps singular values below 1 despite rounding."""


ITERATIONS: dict[str, tuple[Coefficients, ...]] = {
    "quintic": (QUINTIC,) * 5,
    "polar_express": tuple((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in PUBLISHED_POLAR),
    "deepseek_v4": (QUINTIC,) * 8 + ((2.0, -1.5, 0.5),) * 2,
}


def orthogonalise(g_BMN: Tensor, iteration: str) -> Tensor:
    """Returns the orthogonal factor of each matrix. The matmuls and the result have the dtype of g.

    Each matrix is divided by its largest element, then by its norm, which cannot overflow or underflow.
    """
    x_BMN = g_BMN / _or_one(g_BMN.abs().amax((-2, -1), keepdim=True))
    x_BMN = x_BMN / _or_one(torch.linalg.matrix_norm(x_BMN, keepdim=True))
    is_tall = g_BMN.size(-2) > g_BMN.size(-1)
    x = (x_BMN.mT if is_tall else x_BMN).contiguous()
    for a, b, c in ITERATIONS[iteration]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _or_one(sizes: Tensor) -> Tensor:
    return sizes.where(sizes > 0, 1.0)


def newton_schulz_flops(rows: int, columns: int, iteration: str) -> float:
    """Returns the FLOPs of the Newton-Schulz iteration for one matrix. Each step has three matmuls."""
    short, long = sorted((rows, columns))
    return len(ITERATIONS[iteration]) * (4.0 * short * short * long + 2.0 * short**3)
