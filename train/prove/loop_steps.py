"""Defines the steps of check `loop`: calls of a custom loop and their batches. The ranks and the judge draw equal
batches.

Each row contains one or two samples. Some rows have padding, and some have no learnt token. Every token has its own
temperature and weight. Old and reference log-probabilities are near -log(vocabulary size), so that only some ratios
are clipped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conf.schema import Config, DataFormat
from train.data.batch import Batch
from train.prove.samples import Samples, drawing

LOGPROB_SPREAD = 0.3
"""Standard deviation of old and reference log-probabilities."""


@dataclass(frozen=True)
class LoopCall:
    """One call of forward_backward on `Engine`."""

    losses: Mapping[str, Mapping[str, float]]
    """Maps each loss to its settings. Several losses are added."""
    replayed: bool = False
    """Whether the batch prescribes the experts to use."""


@dataclass(frozen=True)
class LoopStep:
    """One update, and the calls of forward_backward before it."""

    calls: tuple[LoopCall, ...]
    terms: tuple[str, ...] | None = None
    """Selected loss terms; None for all terms that apply."""

    @property
    def name(self) -> str:
        return " and ".join(name for call in self.calls for name in call.losses)

    @property
    def replayed(self) -> bool:
        return any(call.replayed for call in self.calls)

    def has(self, term: str) -> bool:
        """Returns whether the step has this loss term."""
        return not (self.replayed and term == "biases") if self.terms is None else term in self.terms


LOOP_STEPS = (
    LoopStep(
        (
            LoopCall({"ppo": {"clip": 0.2, "clip_high": 0.3}}),
            LoopCall({"importance_sampling": {}, "gspo": {"clip": 0.1, "clip_high": 0.15}, "kl": {}}),
        )
    ),
    LoopStep((LoopCall({"cispo": {"clip": 0.3, "clip_high": 0.2}}, replayed=True),), ("mtp",)),
)
"""Two steps with every policy loss, the second with replayed experts."""


def loop_batches(config: Config) -> tuple[Batch, Batch]:
    """Returns the batches of a step's two calls, for all ranks."""
    return _batch(config, 0), _batch(config, config.batch_size)


def _batch(config: Config, first: int) -> Batch:
    chats = replace(config, data=replace(config.data, format=DataFormat.chat))
    batch = Samples(chats).batch(first, config.batch_size)
    assert batch.documents_BS is not None
    advantages_BN = _draw(config, "advantages", first, batch.tokens_BS.shape)
    tensors = {
        "advantages": advantages_BN.gather(1, batch.documents_BS.clamp_min(0).long()),  # one advantage for each sample
        "temperatures": 0.7 + 0.6 * _draw(config, "temperatures", first, batch.tokens_BS.shape).sigmoid(),
        "weights": 0.5 + _draw(config, "weights", first, batch.tokens_BS.shape).sigmoid(),
        **{
            name: LOGPROB_SPREAD * _draw(config, name, first, batch.tokens_BS.shape) - math.log(config.model.vocab_size)
            for name in ("old_logprobs", "ref_logprobs")
        },
    }
    return replace(batch, documents_BS=batch.documents_BS.clamp_max(1), tensors=tensors)


def loop_experts(config: Config, batch: Batch) -> Tensor:
    """Draws the experts to replay, (B, T, L, K), from at most top_groups groups per token; -1 at the end of a
    sample."""
    model, documents_BS = config.model, batch.documents_BS
    assert documents_BS is not None
    shape = *batch.tokens_BS[:, 1:].shape, model.layers - model.dense_layers
    size = model.experts // model.groups
    order = _draw(config, "groups", 0, (*shape, model.groups)).argsort(-1)[..., : model.top_groups]
    allowed = (order.unsqueeze(-1) * size + torch.arange(size)).flatten(-2)
    places = _draw(config, "experts", 0, allowed.shape).argsort(-1)[..., : model.top_k]
    return allowed.gather(-1, places).masked_fill(~counting(documents_BS)[..., None, None], -1)


def counting(documents_BS: Tensor) -> Tensor:
    """Returns whether the next position has the same sample, bool (B, T)."""
    return (documents_BS[:, :-1] >= 0) & (documents_BS[:, :-1] == documents_BS[:, 1:])


def _draw(config: Config, name: str, first: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Draws normal fp32 numbers from the seed, `name` and row index."""
    rows = [torch.randn(shape[1:], generator=drawing(f"{config.seed}/loop/{name}/{first + row}"), dtype=torch.float32)
            for row in range(shape[0])]  # fmt: skip
    return torch.stack(rows)
