"""What a logical matrix is, by the name of a weight: Muon orthogonalises each by itself.

A weight holds several of them where it stacks products that have nothing to do with each other: the heads of attention, keys and
values of a head, the latent and the rope key, w1 and w3, experts. As one matrix, the larger of them would decide the singular
values of the others; MLA lagged behind under Muon until heads were split (GLM-5's report). Which weights Muon updates at all stands
in conf/optimizers.py.

Every logical matrix is a rectangle of its weight, seen as rows and columns: (E, R, C) has E * R rows.
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from conf.schema import Model


class LogicalMatrix(NamedTuple):
    """A rectangle of a weight's rows and columns."""

    rows: range
    columns: range

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)


class MatrixStack(NamedTuple):
    """How a weight stacks its matrices. whole: what it is where heads are not split."""

    sizes: Callable[[Model, int], Sequence[int]]
    """Sizes of the matrices, one after another, from the model and the length of that side."""
    axis: int = -2
    by_head: bool = False


STACKS: dict[str, MatrixStack] = {
    r"attention\.(q|q_up)\.": MatrixStack(lambda m, _: [m.nope_head_dim + m.rope_head_dim] * m.heads, by_head=True),
    r"attention\.kv_up\.": MatrixStack(lambda m, _: [m.nope_head_dim, m.v_head_dim] * m.heads, by_head=True),
    r"attention\.out\.": MatrixStack(lambda m, _: [m.v_head_dim] * m.heads, axis=-1, by_head=True),
    r"attention\.kv_down\.": MatrixStack(lambda m, _: [m.kv_rank, m.rope_head_dim]),
    r"\.w13(\.|$)": MatrixStack(lambda _, rows: [rows // 2] * 2),
}
"""By a part of the name; a weight that none of them names is one matrix."""


def logical_matrices(name: str, shape: Sequence[int], model: Model, by_head: bool) -> list[LogicalMatrix]:
    """The logical matrices of a weight that Muon updates. shape: (rows, columns), or of any number of experts (E, rows, columns).

    by_head: whether attention's products are split by heads.
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
