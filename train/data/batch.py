"""The batch of one training step. B = sequences, S = seq_len + 1 tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conf.errors import UserError


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
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32, same shape: inputs of a token loss (train/model/token_losses.py), with a value for every token as a target.
    `weights` multiply the loss, and `temperatures` divide the logits."""
    experts_BTLK: Tensor | None = None
    """int64: given experts for every token except the last, in every MoE layer of the main model. Another engine chose
    them (mode=score writes them). None: the routers choose."""

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


@dataclass(frozen=True)
class GivenSample:
    """One sample for `batch_of_samples`."""

    tokens: list[int]
    first: int
    """Position of the first learnt token, at least 1; all later tokens are learnt too."""
    values: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    """Per name of a tensor in `Batch`: one number for all learnt tokens, or a number for each."""
    experts_TLK: Tensor | None = None
    """Given experts of all tokens except the last."""


def batch_of_samples(samples: Sequence[GivenSample], length: int, filling: int = 0) -> Batch:
    """A batch with one sample per sequence of `length` tokens, padded with the token `filling`, which is not learnt.

    All samples must name the same tensors. Raises UserError for a sample that is too long, or whose values do not match
    its tokens.
    """
    shape = len(samples), length
    tokens_BS = torch.full(shape, filling)
    documents_BS, supervised_BS = torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
    tensors = {name: torch.zeros(shape) for name in samples[0].values}
    experts = samples[0].experts_TLK
    experts_BTLK = None if experts is None else experts.new_zeros(len(samples), length - 1, *experts.shape[1:])
    for row, sample in enumerate(samples):
        end, place = len(sample.tokens), f"sample {row}"
        if not 1 <= sample.first < end <= length:
            rule = f"must have 1 <= first < tokens <= {length}, and has first={sample.first} and {end} tokens"
            raise UserError("samples", place, rule, "shorten it, or give longer sequences")
        tokens_BS[row, :end], documents_BS[row, :end] = torch.tensor(sample.tokens), 0
        supervised_BS[row, sample.first : end] = True
        if sample.values.keys() != tensors.keys():
            raise UserError("samples", place, f"must give {', '.join(tensors)} as the first one does", "add or remove")
        for name, values in sample.values.items():
            given = torch.tensor(values, dtype=torch.float32)
            if given.dim() and len(given) != end - sample.first:
                rule = f"must give {name} for each of its {end - sample.first} learnt tokens, and has {len(given)}"
                raise UserError("samples", place, rule, "give one for each, or one number for all")
            tensors[name][row, sample.first : end] = given
        if experts_BTLK is not None:
            assert sample.experts_TLK is not None, "all samples have experts, or none"
            experts_BTLK[row, : end - 1] = sample.experts_TLK
    return Batch(tokens_BS, documents_BS, supervised_BS, tensors, experts_BTLK)
