"""The peak of a device's memory, measured: on CUDA by its allocator, on the CPU by a Ledger of all tensors.

What a CPU process has beside tensors (interpreter, libraries, freed memory that it keeps) is in neither of the two.
"""

import gc

import torch

from train.plan.ledger import Ledger


class Meter:
    """Inside its `with`, `mark` tells the peak since the last mark. On the CPU operations take a little longer there."""

    def __init__(self, device: torch.device):
        self._device = device
        self._ledger = None if device.type == "cuda" else Ledger(device)

    def __enter__(self) -> "Meter":
        if self._ledger is None:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            for one in gc.get_objects():
                if isinstance(one, torch.Tensor):
                    self._ledger.enter(one, "before")
            self._ledger.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._ledger is not None:
            self._ledger.__exit__(*error)

    def mark(self) -> int:
        """Bytes."""
        if self._ledger is not None:
            return self._ledger.mark().total
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak
