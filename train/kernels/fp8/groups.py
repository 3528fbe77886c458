"""Describes the rows of several experts, and their tiles of 128 rows.

FP8 kernels work on complete tiles. In Fprop and Dgrad a kernel block computes 128 rows of one expert. In Wgrad 128 rows
of one expert share a scale. Zeros fill the last tile of an expert. These zeros change neither scales nor sums. Some
GEMMs need padded rows. Casts whose scales cover several rows need them too. Sluice's own GEMMs find the rows of each
tile in unpadded memory. With these GEMMs, only the operands of Wgrad, which are quantised along the rows, have padded
columns.

The GPU knows the row counts of experts before the host. GEMMs that read the counts on the GPU do not wait for the host.
They are launched for the largest number of tiles that is possible with the total number of rows.

Shape suffixes: R rows from the dispatcher, P rows as the GEMMs take them, E experts.
"""

from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from train.kernels.fp8.formats import TILE


class PaddedGroups:
    """Positions of the rows of each expert."""

    def __init__(self, counts_E: Tensor, rows: int | None = None, padded: bool = True):
        """counts_E: rows of each expert. rows: the sum of counts_E, if the host must not wait for the device. padded:
        whether GEMMs take rows with padding between the experts."""
        self._counts_E, self._rows, self._is_padded = counts_E, rows, padded

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each expert. Waits for the device."""
        return self._counts_E.tolist()

    @cached_property
    def padded(self) -> list[int]:
        """Rows of each expert, rounded up to multiples of 128. Waits for the device."""
        return [-(-count // TILE) * TILE for count in self.counts]

    @cached_property
    def starts(self) -> list[int]:
        """First row of each expert, as the GEMMs take the rows. Waits for the device."""
        return list(accumulate(self.padded if self._is_padded else self.counts, initial=0))[:-1]

    @cached_property
    def rows(self) -> int:
        """Number of rows P, as the GEMMs take them. If padding is computed without waiting, P is the maximum, and the last
        rows are zero and belong to no expert."""
        if self._rows is None:
            return sum(self.padded)
        return most_tiles(self._rows, len(self._counts_E)) * TILE if self._is_padded else self._rows

    @cached_property
    def ends_E(self) -> Tensor:
        """End of each expert's rows, as the GEMMs take the rows: int32, on the device."""
        return (self._padded_E if self._is_padded else self._counts_E).cumsum(0, dtype=torch.int32)

    @cached_property
    def whole(self) -> "PaddedGroups":
        """Returns these groups with padding between the experts."""
        return PaddedGroups(self._counts_E, self._rows)

    @cached_property
    def sum_ends_E(self) -> Tensor:
        """End of each expert's rows in a sum over rows (Wgrad), int32.

        Rows are padded, each expert has at least one tile, and the last expert includes all remaining rows.
        """
        ends_E = ((self._counts_E.clamp_min(1) + (TILE - 1)) // TILE * TILE).cumsum(0, dtype=torch.int32)
        ends_E[-1:].fill_(most_tiles(self.rows + len(ends_E), len(ends_E)) * TILE)
        return ends_E

    @property
    def unpadded_ends_E(self) -> Tensor | None:
        """`ends_E` for rows without padding; None for padded rows, where all 128 rows of a tile belong to one
        expert."""
        return None if self._is_padded else self.ends_E

    @cached_property
    def slots_R(self) -> Tensor | None:
        """Padded position of every row, int64; None if nothing is padded, as far as the host knows."""
        if not self._is_padded or (self._rows is None and self.padded == self.counts):
            return None
        counts_E = self._counts_E
        rows = sum(self.counts) if self._rows is None else self._rows
        before_E = (self._padded_E - counts_E).cumsum(0) - (self._padded_E - counts_E)
        shift_R = before_E.repeat_interleave(counts_E, output_size=rows)
        return shift_R + torch.arange(rows, device=counts_E.device)

    @cached_property
    def _padded_E(self) -> Tensor:
        return (self._counts_E + (TILE - 1)) // TILE * TILE

    def pad(self, rows_RX: Tensor) -> Tensor:
        """Add padding: (R, ...) -> (P, ...), with zero rows between the experts."""
        if self.slots_R is None:
            return rows_RX.contiguous()
        return rows_RX.new_zeros(self.rows, *rows_RX.shape[1:]).index_copy_(0, self.slots_R, rows_RX)

    def unpad(self, rows_PX: Tensor) -> Tensor:
        """Remove padding: (P, ...) -> (R, ...)."""
        return rows_PX if self.slots_R is None else rows_PX.index_select(0, self.slots_R)

    def real(self, step: int = 1) -> list[slice]:
        """Slices of each expert's rows among the P rows, including padding up to a multiple of step, a divisor of
        128."""
        ends = [start + -(-count // step) * step for start, count in zip(self.starts, self.counts, strict=True)]
        return [slice(start, end) for start, end in zip(self.starts, ends, strict=True)]


def most_tiles(rows: int, experts: int) -> int:
    """Returns the maximum number of tiles of 128 rows, each with rows of one expert, for this number of rows."""
    return (rows + min(rows, experts) * (TILE - 1)) // TILE


def on_device(numbers: list, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers as a tensor on the device.

    For a GPU they are copied from page-locked memory. With other memory the host would wait for the copy, and so for
    all previously launched work of the GPU.
    """
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
