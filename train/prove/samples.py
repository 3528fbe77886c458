"""Draws the training samples and the initial state for mode=prove. Samples depend only on the seed and their index.
Weights and biases depend only on the seed and their name.

As in text, some tokens are frequent and some never occur. Norm weights differ from 1 and biases from 0, so that a
missing norm weight or bias changes the results.

In widths with several tiles of 128, every second tile is multiplied by STEP or its inverse. A scale from a wrong
tile then causes a large error. In models with such widths, all tokens choose the first expert, and no token chooses the
last.

Shapes: B sequences, S = seq_len + 1.
"""

import hashlib
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from conf.schema import Config
from train.data.batch import Batch
from train.prove.bounds import is_tiled
from train.prove.recipe_values import read_values
from train.prove.reference import PlainModel, layers_with_experts, trained_shapes, weight_shapes
from train.prove.reference_adapter import in_blocks, is_stored_in_blocks

BIAS = 0.05
"""Standard deviation of the routers' initial biases."""
CROWDED = 1.0
"""Bias for the first expert, so that all tokens choose it."""
TILE, STEP = 128, 2.0**-6
"""TILE: number of channels in a tile. STEP: factor on every second tile."""
LOUD = 64.0
"""Factor on some queries and logits, to overflow a naive softmax."""
BELOW_FLOOR = 2.0**-26
"""Factor on some experts' inputs, so that their tiles get the smallest FP8 scale."""


class Samples:
    """Training samples by index. Negative indices are validation samples."""

    def __init__(self, config: Config):
        self._config = config

    def batch(self, first_sample: int, count: int) -> Batch:
        rows = [self._sample(number) for number in range(first_sample, first_sample + count)]
        tokens_BS, documents_BS, supervised_BS = (torch.stack(part) for part in zip(*rows, strict=True))
        if self._config.data.chats:
            return Batch(tokens_BS, documents_BS, supervised_BS)
        return Batch(tokens_BS, documents_BS) if self._config.data.mask_documents else Batch(tokens_BS)

    def epochs(self, samples: int) -> dict[str, float]:
        """Returns 0 epochs, because random samples have none."""
        return {"drawn": 0.0}

    def read_once(self, before: int, after: int) -> list[str]:
        return []

    def _sample(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the tokens, the document of each token, and which tokens are supervised.

        For chats, some rows are padded, and every third row has no learnt token.
        """
        draw, length = drawing(f"{self._config.seed}/sample/{number}"), self._config.seq_len + 1
        share_S = torch.rand(length, generator=draw, dtype=torch.float64)
        is_wide = self._config.model.expert_width > TILE
        tokens_S = (
            share_S**2 * (self._config.model.vocab_size - is_wide)
        ).long()  # in wide models, the last token never occurs
        ends_S = torch.rand(length, generator=draw) < 3 / length
        documents_S = ends_S.cumsum(0).int()
        if not self._config.data.chats:
            return tokens_S, documents_S, torch.ones(length, dtype=torch.bool)
        documents_S -= documents_S[0].item()
        filled_S = (
            torch.arange(length) >= length * (1 - 0.3 * torch.rand((), generator=draw))
            if number % 2
            else ends_S & False
        )
        supervised_S = (torch.rand(length, generator=draw) < 0.5) & ~filled_S & (number % 3 != 2)
        return tokens_S, documents_S.masked_fill(filled_S, -1), supervised_S


@dataclass
class HeldOut:
    """Validation sequences, with the interface of train/data/dataset.py."""

    samples: Samples
    count: int

    def __len__(self) -> int:
        return self.count

    def batch(self, first: int, count: int) -> Batch:
        return self.samples.batch(first - self.count, min(count, self.count - first))

    def text_bytes(self, batch: Batch) -> int:
        return batch.tokens_BS.numel()


@dataclass
class ProofData:
    """The random data of a proof, with the interface of train.data.prepare.PreparedData."""

    train: Samples
    validation: HeldOut
    tokenizer: Any = field(default_factory=lambda: SimpleNamespace(fingerprint="proof"))
    fingerprint: str = "proof"
    held_out: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, config: Config) -> "ProofData":
        samples = Samples(config)
        return cls(samples, HeldOut(samples, config.log.validation_sequences))


def initial_weights(config: Config) -> dict[str, Tensor]:
    """Returns all weights by name in fp32, including an adapter's."""
    weights, values = {}, read_values(config)
    for name, shape in (weight_shapes(values.model) | trained_shapes(values)).items():
        drawn = torch.randn(shape, generator=drawing(f"{config.seed}/{name}"))
        if len(shape) == 1:
            weights[name] = (not name.endswith(".bias")) + 0.2 * drawn
        elif name == "embedding.weight":
            weights[name] = drawn * _by_tile(shape[-1])
        else:
            outputs = (
                1.0 if name.endswith(("router.weight", "head.weight")) else _by_tile(shape[-2], "w13" in name)[:, None]
            )
            inputs = _by_tile(shape[-1], name.endswith("projection.weight"))
            weights[name] = drawn / shape[-1] ** 0.5 * outputs / inputs
    if config.model.expert_width > TILE:
        _stretch(config, weights)
    if config.adapter.base == "fp8":
        weights |= {name: in_blocks(weights[name]) for name in weights if is_stored_in_blocks(name)}
    return weights


def _stretch(config: Config, weights: dict[str, Tensor]) -> None:
    """Multiply some weights, to overflow a naive softmax and to use small scales."""
    queries = config.model.nope_head_dim + config.model.rope_head_dim
    for name in weights:
        if re.search(r"attention\.q(_up)?\.weight$", name):
            weights[name][:queries] *= LOUD
    weights["head.weight"][-1] *= (
        LOUD  # the last token never occurs; as a target, it would have a gradient of rounding errors only
    )
    for last in layers_with_experts(read_values(config).model)[-1:] if is_tiled(config) else ():
        prefix = f"{last}.block" if last.startswith("mtp.") else last
        weights[f"{prefix}.ffn_norm.weight"][TILE:] *= BELOW_FLOOR
        for name in {f"{prefix}.moe.experts.w13", f"{prefix}.moe.shared.w13.weight"} & weights.keys():
            weights[name][..., TILE:] /= BELOW_FLOOR


def _by_tile(width: int, halves: bool = False) -> Tensor:
    """Returns a factor per channel: STEP in every second tile, otherwise 1."""
    if halves:
        return _by_tile(width // 2).repeat(2)
    return torch.where(torch.arange(width) // TILE % 2 == 0, 1.0, STEP)


def initial_biases(config: Config) -> dict[str, Tensor]:
    """Returns the biases of every router, in fp32 (E,)."""
    biases = {}
    for name in layers_with_experts(read_values(config).model):
        biases[name] = BIAS * torch.randn(config.model.experts, generator=drawing(f"{config.seed}/bias/{name}"))
        if config.model.expert_width > TILE:
            biases[name][0] += CROWDED
            biases[name][-1] -= CROWDED
    return biases


def drawing(key: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    return torch.Generator().manual_seed(seed)


def middle_score(config: Config) -> float:
    """Returns the median of the heads' largest scores in the initial model."""
    torch.set_num_threads(1)
    values, batch = read_values(config), Samples(config).batch(0, 1)
    weights = {name: weight.double() for name, weight in initial_weights(config).items()}
    biases = {name: bias.double() for name, bias in initial_biases(config).items()}
    scores = torch.cat([*PlainModel(values, weights, biases).losses(batch).scores.values()]).sort().values
    return float(scores[(len(scores) - 1) // 2 : len(scores) // 2 + 1].mean())
