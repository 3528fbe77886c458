"""The batch of one training step. B = sequences, S = seq_len + 1 tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Packed sequences on the CPU."""

    tokens_BS: Tensor
    """int64 (B, seq_len + 1): inputs are [:, :-1], targets [:, 1:]."""
    documents_BS: Tensor | None = None
    """int32, same shape: the document or sample that each token belongs to, numbered from 0 in each sequence.
    Padding has -1. None unless data.mask_documents is set or samples are packed."""
    supervised_BS: Tensor | None = None
    """bool, same shape: tokens that are supervised, which means that they have a loss as targets. If set, the
    samples in `documents_BS` are independent: no loss, count or module crosses their borders. None: every token is
    supervised, and documents follow one another as one text."""

    @property
    def targets(self) -> int:
        """Number of targets in the main model's loss."""
        learnt_BT = self.learnt_BT
        return self.tokens_BS[:, 1:].numel() if learnt_BT is None else int(learnt_BT.sum())

    @property
    def learnt_BT(self) -> Tensor | None:
        """Whether the main model has a loss on each target, bool (B, seq_len); None: on all targets.

        A target counts if it is supervised and is not the first token of a sample, because no token predicts the first
        one.
        """
        if self.supervised_BS is None or self.documents_BS is None:
            return None
        return self.supervised_BS[:, 1:] & (self.documents_BS[:, 1:] == self.documents_BS[:, :-1])

    @property
    def sequences(self) -> int:
        """Number of samples; number of sequences where samples are not separated."""
        if self.supervised_BS is None or self.documents_BS is None:
            return len(self.tokens_BS)
        return int((self.documents_BS.amax(1) + 1).sum())
