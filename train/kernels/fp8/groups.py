"""Describes the rows of several experts, and their tiles of 128 rows.

FP8 kernels work on complete tiles. In Fprop and Dgrad, one program computes 128 rows of one expert. In Wgrad, 128 rows
of one expert share a scale. Zeros fill the last tile of an expert, and change no scale or sum.

Some GEMMs, and casts whose scales cover several rows, need padding: zero rows up to a multiple of 128. Sluice's own
GEMMs need it only in Wgrad. If the host does not know the row counts, it launches GEMMs for the maximum number of
tiles.

Shape suffixes: R rows from the dispatcher, P rows in the layout that the GEMMs read, E experts.
"""

from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from train.kernels.fp8.formats import TILE


class PaddedGroups:
    """The positions of each expert's rows, with or without padding."""

    def __init__(self, counts_E: Tensor, rows: int | None = None, padded: bool = True):
        """counts_E: number of rows of each expert.
        rows: the sum of counts_E; None: the host waits for the device to read counts_E.
        padded: whether the GEMMs read rows with padding between the experts.
        """
        self._counts_E, self._rows, self._is_padded = counts_E, rows, padded

    @cached_property
    def counts(self) -> list[int]:
        """Number of rows of each expert. Reading it makes the host wait."""
        return self._counts_E.tolist()

    @cached_property
    def padded(self) -> list[int]:
        """`counts` rounded up to multiples of 128. Reading it makes the host wait."""
        return [-(-count // TILE) * TILE for count in self.counts]

    @cached_property
    def starts(self) -> list[int]:
        """First row of each expert in the GEMMs' layout. Reading it makes the host wait."""
        return list(accumulate(self.padded if self._is_padded else self.counts, initial=0))[:-1]

    @cached_property
    def rows(self) -> int:
        """Number of rows P that the GEMMs read. If the host does not know the counts, P is the largest possible number,
        and unused rows are zero.
        """
        if self._rows is None:
            return sum(self.padded)
        return most_tiles(self._rows, len(self._counts_E)) * TILE if self._is_padded else self._rows

    @cached_property
    def ends_E(self) -> Tensor:
        """End of each expert's rows in the GEMMs' layout: int32, on the device."""
        return (self._padded_E if self._is_padded else self._counts_E).cumsum(0, dtype=torch.int32)

    @cached_property
    def whole(self) -> "PaddedGroups":
        """A `PaddedGroups` of these rows, with padding between the experts."""
        return PaddedGroups(self._counts_E, self._rows)

    @cached_property
    def sum_ends_E(self) -> Tensor:
        """End of each expert's rows for a sum over rows (Wgrad), int32.

        The rows are padded, to at least one tile per expert. Unused rows belong to the last expert.
        """
        ends_E = ((self._counts_E.clamp_min(1) + (TILE - 1)) // TILE * TILE).cumsum(0, dtype=torch.int32)
        ends_E[-1:].fill_(most_tiles(self.rows + len(ends_E), len(ends_E)) * TILE)
        return ends_E

    @property
    def unpadded_ends_E(self) -> Tensor | None:
        """`ends_E` for rows without padding; None for padded rows."""
        return None if self._is_padded else self.ends_E

    @cached_property
    def slots_R(self) -> Tensor | None:
        """Position of every row in the padded layout; None without padding."""
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
        """Convert rows to the GEMMs' layout: (R, ...) -> (P, ...), padded with zeros."""
        if self.slots_R is None:
            return rows_RX.contiguous()
        return rows_RX.new_zeros(self.rows, *rows_RX.shape[1:]).index_copy_(0, self.slots_R, rows_RX)

    def unpad(self, rows_PX: Tensor) -> Tensor:
        """Convert rows back to the dispatcher's layout: (P, ...) -> (R, ...)."""
        return rows_PX if self.slots_R is None else rows_PX.index_select(0, self.slots_R)

    def real(self, step: int = 1) -> list[slice]:
        """Returns each expert's slice of the P rows. Its length is a multiple of `step`, which must divide 128."""
        ends = [start + -(-count // step) * step for start, count in zip(self.starts, self.counts, strict=True)]
        return [slice(start, end) for start, end in zip(self.starts, ends, strict=True)]


def most_tiles(rows: int, experts: int) -> int:
    """Returns the largest possible number of tiles of 128 rows, each of one expert. rows: number of all rows."""
    return (rows + min(rows, experts) * (TILE - 1)) // TILE


def on_device(numbers: list, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Returns the numbers as a tensor on the device.

    A GPU copies them from page-locked memory, so that the host need not wait.
    """
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
