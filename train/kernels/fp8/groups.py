"""Rows of several experts, and the tiles of 128 that they take.

FP8 kernels work on whole tiles: 128 rows of one expert share a kernel block in Fprop and Dgrad, and 128 rows share a
scale in Wgrad, where a tile must not mix experts.  What an expert lacks to whole tiles is zeros, which change neither scales nor
sums.  Rows are padded so for some products, and for casts whose scales cover several rows. Our products find each tile's rows where
they lie; then only what is quantised along the rows, the operands of Wgrad, has columns of padding.

How many rows an expert has, a GPU knows first.  Products that read it there need no host that knows it: given how many rows
there are in all, they get as many tiles as those could take.

Shape suffixes: R rows as the dispatcher gave them, P rows as products take them, E experts.
"""

from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from train.kernels.fp8.formats import TILE


class PaddedGroups:
    """Where the rows of each expert lie."""

    def __init__(self, counts_E: Tensor, rows: int | None = None, padded: bool = True):
        """counts_E: rows of each expert. rows: their sum, where the device shall not be waited for. padded: whether products take
        rows with padding between the experts.
        """
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
        """First of each expert's rows, as products take them. Waits for the device."""
        return list(accumulate(self.padded if self._is_padded else self.counts, initial=0))[:-1]

    @cached_property
    def rows(self) -> int:
        """P; where padding is made without waiting as many as there may be, the last ones nobody's and zero."""
        if self._rows is None:
            return sum(self.padded)
        return most_tiles(self._rows, len(self._counts_E)) * TILE if self._is_padded else self._rows

    @cached_property
    def ends_E(self) -> Tensor:
        """Where the rows of each expert end, as products take them, int32, on the device."""
        return (self._padded_E if self._is_padded else self._counts_E).cumsum(0, dtype=torch.int32)

    @cached_property
    def whole(self) -> "PaddedGroups":
        """These rows with padding."""
        return PaddedGroups(self._counts_E, self._rows)

    @cached_property
    def sum_ends_E(self) -> Tensor:
        """Where the rows of each expert end, int32, as a sum over them takes them: padded, one tile at the least, and in the last expert's
        all that are left.
        """
        ends_E = ((self._counts_E.clamp_min(1) + (TILE - 1)) // TILE * TILE).cumsum(0, dtype=torch.int32)
        ends_E[-1:].fill_(most_tiles(self.rows + len(ends_E), len(ends_E)) * TILE)
        return ends_E

    @property
    def unpadded_ends_E(self) -> Tensor | None:
        """`ends_E` where rows lie without padding; None where every 128 of them are one expert's."""
        return None if self._is_padded else self.ends_E

    @cached_property
    def slots_R(self) -> Tensor | None:
        """Padded position of every row, int64; None where nothing is padded, as far as the host knows."""
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
        """(R, ...) -> (P, ...), with zero rows where experts are padded."""
        if self.slots_R is None:
            return rows_RX.contiguous()
        return rows_RX.new_zeros(self.rows, *rows_RX.shape[1:]).index_copy_(0, self.slots_R, rows_RX)

    def unpad(self, rows_PX: Tensor) -> Tensor:
        """(P, ...) -> (R, ...)."""
        return rows_PX if self.slots_R is None else rows_PX.index_select(0, self.slots_R)

    def real(self, step: int = 1) -> list[slice]:
        """Positions of each expert's own rows among the P, and of padding up to a multiple of step, a divisor of 128."""
        ends = [start + -(-count // step) * step for start, count in zip(self.starts, self.counts, strict=True)]
        return [slice(start, end) for start, end in zip(self.starts, ends, strict=True)]


def most_tiles(rows: int, experts: int) -> int:
    """The most tiles of 128 rows of one expert each: as many as so many rows can take."""
    return (rows + min(rows, experts) * (TILE - 1)) // TILE


def on_device(numbers: list, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers as a tensor there. For a GPU they are copied from page-locked memory: from any other the host would wait
    until the copy is done, and so for all work that was asked of the GPU before.
    """
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
