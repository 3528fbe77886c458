"""The batch of one training step. B = sequences, S = seq_len + 1 tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from conf.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Packed sequences on the CPU."""

    tokens_BS: Tensor
    """int64 (B, seq_len + 1): token ids. Inputs: [:, :-1]. Targets: [:, 1:]."""
    documents_BS: Tensor | None = None
    """int32 (B, seq_len + 1): document or sample index in the sequence, from 0; -1 for padding.

    None: attention may cross documents.
    """
    supervised_BS: Tensor | None = None
    """bool (B, seq_len + 1): whether a token is supervised (the loss includes its prediction). None: all tokens.

    If this field is set, no module, loss or count combines tokens of two samples.
    """
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32 tensors (B, seq_len + 1) for a token loss, by name. The value at a token's index is for the prediction of
    this token. `weights`: loss factors. `temperatures`: logit divisors."""
    experts_BTLK: Tensor | None = None
    """int64 (B, seq_len, MoE layers of the main model, experts per token): replayed experts. None: the routers
    choose."""
    keys_BTLK: Tensor | None = None
    """int32 (B, seq_len, layers of the main model with an indexer, top_k): replayed attention keys, as positions.

    Unused entries are -1. None: the indexers select.
    """

    def take(self, rows: slice) -> "Batch":
        """Returns a batch with the sequences in the slice `rows`."""
        cut = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **cut, tensors={name: tensor[rows] for name, tensor in self.tensors.items()})

    @property
    def targets(self) -> int:
        """Number of targets that the main model's loss includes."""
        learnt_BT = self.learnt_BT
        return self.tokens_BS[:, 1:].numel() if learnt_BT is None else int(learnt_BT.sum())

    @property
    def learnt_BT(self) -> Tensor | None:
        """bool (B, seq_len): whether the main model's loss includes each target; None: all targets.

        It includes supervised tokens, except the first token of a sample.
        """
        if self.supervised_BS is None or self.documents_BS is None:
            return None
        return self.supervised_BS[:, 1:] & (self.documents_BS[:, 1:] == self.documents_BS[:, :-1])

    @property
    def sequences(self) -> int:
        """Number of samples. Without marked samples, each sequence counts as one."""
        if self.supervised_BS is None or self.documents_BS is None:
            return len(self.tokens_BS)
        return int((self.documents_BS.amax(1) + 1).sum())


BATCH_KINDS = {
    "tokens_BS": (torch.int64, torch.int32),
    "documents_BS": (torch.int32, torch.int64),
    "supervised_BS": (torch.bool,),
}
"""Dtypes that a caller may use for each field."""
RESERVED_NAMES = ("x", "mean", "micro_batches", "experts_BTLK", "keys_BTLK", *BATCH_KINDS)
"""Names that `tensors` must not contain: chunks already have arguments with these names."""


def check_given_batch(batch: Batch, vocabulary: int) -> None:
    """Raise UserError if fields contradict each other or tokens are invalid."""
    tokens_BS = batch.tokens_BS
    for name, kinds in BATCH_KINDS.items():
        tensor = getattr(batch, name)
        if tensor is None and name != "tokens_BS":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in kinds or tensor.dim() != 2:
            given = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            rule = f"must be a tensor (sequences, tokens) of {kinds[0]}"
            raise UserError(f"batch.{name}", given, rule, "convert it")
    for name in ("experts_BTLK", "keys_BTLK"):
        tensor = getattr(batch, name)
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.is_floating_point()):
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"batch.{name}", given, "must be a tensor of whole numbers", "convert it")
    if wrong := tokens_BS[(tokens_BS < 0) | (tokens_BS >= vocabulary)].tolist():
        rule = f"must be token ids, 0 to {vocabulary - 1}"
        raise UserError("batch.tokens_BS", wrong[0], rule, "use this model's tokenizer")
    for name, tensor in {
        "documents_BS": batch.documents_BS,
        "supervised_BS": batch.supervised_BS,
        **batch.tensors,
    }.items():
        if name in RESERVED_NAMES and name in batch.tensors:
            raise UserError("batch.tensors", name, "is a reserved name of a batch", "give it another name")
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.shape != tokens_BS.shape):
            given = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            rule = f"must have one value per token: {tuple(tokens_BS.shape)}"
            raise UserError(f"batch.{name}", given, rule, "pad it like the tokens")
    _check_documents(batch)
    if (temperatures_BS := batch.tensors.get("temperatures")) is not None:
        learnt_BT = torch.ones_like(tokens_BS[:, 1:], dtype=torch.bool) if batch.learnt_BT is None else batch.learnt_BT
        taken = temperatures_BS[:, 1:][learnt_BT]
        if wrong := taken[~(taken.isfinite() & (taken > 0))].tolist():
            raise UserError(
                "batch.temperatures",
                wrong[0],
                "must be above 0 at every learnt token",
                "leave out tokens of greedy sampling",
            )


def require_mask(batch: Batch) -> None:
    """Raise UserError for a batch with padding that does not say which tokens are learnt: padding would be learnt."""
    if batch.supervised_BS is None and batch.documents_BS is not None and (batch.documents_BS < 0).any():
        cure = "for example supervised_BS = documents_BS >= 0"
        raise UserError("batch.supervised_BS", None, "must be given if a batch has padding (document -1)", cure)


def _check_documents(batch: Batch) -> None:
    """Raise UserError unless the samples of every sequence are contiguous and have the indices 0, 1, 2, ..."""
    documents_BS = batch.documents_BS
    if documents_BS is None or batch.supervised_BS is None:
        return
    starts_BS = documents_BS.diff(dim=1, prepend=torch.full_like(documents_BS[:, :1], -1)) != 0
    numbers_BS = (starts_BS & (documents_BS >= 0)).cumsum(1) - 1
    wrong_BS = (documents_BS != numbers_BS) & (documents_BS != -1)
    if wrong_BS.any():
        row, token = wrong_BS.nonzero()[0].tolist()
        given = f"{int(documents_BS[row, token])} (sequence {row}, token {token})"
        rule = "must number the samples of a sequence 0, 1, 2, ..., each in one piece, with -1 for padding"
        raise UserError("batch.documents_BS", given, rule, "number them from 0")


@dataclass(frozen=True)
class GivenSample:
    """One sample for `batch_of_samples`."""

    tokens: list[int]
    first: int
    """Index of the first learnt token, at least 1. All later tokens are learnt."""
    values: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    """Values for `Batch.tensors`: one number for all learnt tokens, or a list with one number for each learnt token."""
    experts_TLK: Tensor | None = None
    """Experts that routers chose earlier, for all tokens except the last."""
    keys_TLK: Tensor | None = None
    """Replayed attention keys (positions), for all tokens except the last."""


def batch_of_samples(samples: Sequence[GivenSample], length: int, filling: int = 0) -> Batch:
    """Build a batch with one sample in each sequence. filling: padding token. Raises UserError."""
    if not samples:
        raise UserError("samples", 0, "must be one or more", "leave the step out")
    shape = len(samples), length
    tokens_BS = torch.full(shape, filling)
    documents_BS, supervised_BS = torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
    tensors = {name: torch.full(shape, float(name == "temperatures")) for name in samples[0].values}
    for row, sample in enumerate(samples):
        end, place = len(sample.tokens), f"sample {row}"
        if not 1 <= sample.first < end <= length:
            rule = f"must have 1 <= first < tokens <= {length}, and has first={sample.first} and {end} tokens"
            raise UserError("samples", place, rule, "shorten the sample, or use longer sequences")
        tokens_BS[row, :end], documents_BS[row, :end] = torch.tensor(sample.tokens), 0
        supervised_BS[row, sample.first : end] = True
        if sample.values.keys() != tensors.keys():
            raise UserError("samples", place, f"must have {', '.join(tensors)}, like the first sample", "add or remove")
        for name, values in sample.values.items():
            given = torch.tensor(values, dtype=torch.float32)
            if given.dim() and len(given) != end - sample.first:
                rule = f"must have {name} for each of its {end - sample.first} learnt tokens, and has {len(given)}"
                raise UserError("samples", place, rule, "give one value per token, or one number for all")
            tensors[name][row, sample.first : end] = given
    tokens = [len(sample.tokens) for sample in samples]
    experts_BTLK = _padded("experts", "MoE layers, experts", [one.experts_TLK for one in samples], tokens, length, 0)
    keys_BTLK = _padded("keys", "layers that choose, keys", [one.keys_TLK for one in samples], tokens, length, -1)
    return Batch(tokens_BS, documents_BS, supervised_BS, tensors, experts_BTLK, keys_BTLK)


def _padded(
    name: str, axes: str, choices: Sequence[Tensor | None], tokens: Sequence[int], length: int, filling: int
) -> Tensor | None:
    """Returns the replayed choices of all samples in one tensor (B, length - 1, L, K), or None. Raises UserError.

    choices: a tensor (tokens - 1, L, K) for each sample. filling: value after a sample's end.
    """
    first = choices[0]
    padded = None if first is None else first.new_full((len(choices), length - 1, *first.shape[1:]), filling)
    for row, (given, count) in enumerate(zip(choices, tokens, strict=True)):
        if (given is None) != (padded is None):
            rule = f"must give {name} as the first one does, or none"
            raise UserError("samples", f"sample {row}", rule, "add or remove")
        if given is None or padded is None:
            continue
        wanted = (count - 1, *padded.shape[2:])
        if given.shape != wanted:
            rule = f"must give {name} {wanted}: tokens but the last, {axes}"
            raise UserError("samples", f"sample {row}", rule, f"correct it: they are {tuple(given.shape)}")
        padded[row, : count - 1] = given
    return padded
