"""Rows of several experts, every expert's rows padded to a multiple of 128.

FP8 kernels work on whole tiles: 128 rows of one expert share a kernel block in Fprop and Dgrad, and 128 rows share a
scale in Wgrad, where a tile must not mix experts.  The padding is zeros, which changes neither scales nor sums.

Shape suffixes: R rows as the dispatcher gave them, P padded rows, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.precision.formats import TILE


@dataclass(frozen=True)
class Groups:
    """Where the rows of each expert lie."""

    counts: list[int]
    """Rows of each expert."""
    starts: list[int]
    """First padded row of each expert."""
    padded: list[int]
    """Padded rows of each expert, multiples of 128."""
    slots_R: Tensor | None
    """Padded position of every row, int64; None where nothing is padded."""

    @classmethod
    def of(cls, counts_E: Tensor) -> "Groups":
        """The layout of these row counts. Waits for the device: FP8 kernels need the counts on the host."""
        counts = counts_E.tolist()
        padded = [-(-count // TILE) * TILE for count in counts]
        starts = [sum(padded[:expert]) for expert in range(len(padded))]
        if padded == counts:
            return cls(counts, starts, padded, None)
        before = on_device([start - sum(counts[:e]) for e, start in enumerate(starts)], counts_E.device)
        rows = sum(counts)
        shift_R = before.repeat_interleave(counts_E, output_size=rows)
        return cls(counts, starts, padded, shift_R + torch.arange(rows, device=counts_E.device))

    @property
    def rows(self) -> int:
        """Padded rows of all experts."""
        return sum(self.padded)

    def pad(self, rows_RX: Tensor) -> Tensor:
        """(R, ...) -> (P, ...) with zero rows between the experts."""
        if self.slots_R is None:
            return rows_RX.contiguous()
        return rows_RX.new_zeros(self.rows, *rows_RX.shape[1:]).index_copy_(0, self.slots_R, rows_RX)

    def unpad(self, rows_PX: Tensor) -> Tensor:
        """(P, ...) -> (R, ...)."""
        return rows_PX if self.slots_R is None else rows_PX.index_select(0, self.slots_R)

    def real(self, step: int = 1) -> list[slice]:
        """Padded positions of each expert's own rows, and of padding up to a multiple of step, a divisor of 128."""
        ends = [start + -(-count // step) * step for start, count in zip(self.starts, self.counts, strict=True)]
        return [slice(start, end) for start, end in zip(self.starts, ends, strict=True)]


def on_device(numbers: list, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers as a tensor there. For a GPU they are copied from page-locked memory: from any other the host would wait
    until the copy is done, and so for all work that was asked of the GPU before.
    """
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
