"""What one step eats. B = sequences, S = seq_len + 1 tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Packed sequences on the CPU."""

    tokens_BS: Tensor
    """int64 (B, seq_len + 1): inputs are [:, :-1], targets [:, 1:]."""
    documents_BS: Tensor | None = None
    """int32, same shape: number of the packed document each token belongs to, counted from 0 in each sequence.
    None unless data.mask_documents."""
