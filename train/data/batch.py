"""What one step eats. B = sequences, S = seq_len + 1 tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Packed sequences on the CPU."""

    tokens_BS: Tensor
    """int64 (B, seq_len + 1): inputs are [:, :-1], targets [:, 1:]."""
    documents_BS: Tensor | None = None
    """int32, same shape: number of the packed document or sample each token belongs to, counted from 0 in each sequence; -1 of
    what only fills a sequence up. None unless data.mask_documents, or where samples are packed."""
    supervised_BS: Tensor | None = None
    """bool, same shape: tokens that are learnt where they are targets. Samples of `documents_BS` are then apart: no loss, count or
    module sees across their borders. None where every token is learnt and documents follow one another as one text."""

    @property
    def targets(self) -> int:
        """Tokens that the main model learns."""
        learnt_BT = self.learnt_BT
        return self.tokens_BS[:, 1:].numel() if learnt_BT is None else int(learnt_BT.sum())

    @property
    def learnt_BT(self) -> Tensor | None:
        """Whether the main model learns each target, bool (B, seq_len): it is supervised, and no first token of a sample, which
        nothing predicts. None for all.
        """
        if self.supervised_BS is None or self.documents_BS is None:
            return None
        return self.supervised_BS[:, 1:] & (self.documents_BS[:, 1:] == self.documents_BS[:, :-1])

    @property
    def sequences(self) -> int:
        """Samples, or sequences where those are not told apart."""
        if self.supervised_BS is None or self.documents_BS is None:
            return len(self.tokens_BS)
        return int((self.documents_BS.amax(1) + 1).sum())
