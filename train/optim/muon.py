"""Muon: orthogonalised momentum for the matrices inside a model (Keller Jordan 2024; Moonlight, arXiv 2502.16982, 2.2).

    M <- mu M + G             G: the mean gradient, clipped by the global norm
    O  = NS(G + mu M)         Nesterov; NS (Newton-Schulz) of each logical matrix (train/optim/matrices.py)
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) O

The factor 0.2 sqrt(max(rows, columns)) gives an update the magnitude of AdamW's updates. So AdamW's learning rate and
decay suit Muon. AdamW updates the other weights.

ZeRO passes flat shards, which may begin and end at any element. Each rank updates the momentum of its shard. The owner
of a matrix gathers its parts from other ranks, orthogonalises it, and sends the result back (parallel/owners.py).
"""

import math
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from conf.schema import Config
from conf.thresholds import THRESHOLDS
from parallel.owners import KEEPS, MatrixOwners, SharedMatrix
from parallel.shard import FlatShard, WeightPiece
from train.optim.adamw import AdamW, WeightShapes, moments_dtype
from train.optim.matrices import logical_matrices, newton_schulz_flops, orthogonalise

UPDATE_SIZE = 0.2
"""Root mean square of AdamW's update elements (Moonlight paper)."""


class _Placed(NamedTuple):
    """The logical matrices of a flat parameter, and the ranks that orthogonalise them (owners)."""

    matrices: list[SharedMatrix]
    owners: MatrixOwners


class Muon(AdamW):
    """Updates weights with Muon or AdamW, by the rules in conf/optimizers.py."""

    def __init__(self, groups: list[dict], config: Config, compiled: bool):
        super().__init__(groups, config.optim, moments_dtype(config.precision), compiled)
        self._model, self._muon = config.model, config.optim.muon
        self._placed: dict[Tensor, _Placed] = {}

    @classmethod
    def make(cls, groups: list[dict], config: Config, parts: Collection[str]) -> "Muon":
        return cls(groups, config, "adamw" in parts)

    @staticmethod
    def count_scratch_bytes(kind: str, config: Config, group: WeightShapes, elements: int, compiled: bool) -> int:
        """Returns an upper bound of the scratch memory, in bytes.

        A pack is a set of matrices that are updated together. Its matrices and their results are in fp32, and the
        results of the previous pack may still exist. Adjacent matrices of one shape form a batch of b elements, whose
        Gram matrices have g elements. On a CPU, the computation of a batch needs 12 b + 8 g more bytes, for copies,
        iterates and two Gram matrices. Ranks that share matrices also need buffers for elements of
        other ranks.
        """
        if not group.rule.is_whole:
            return AdamW.count_scratch_bytes(kind, config, group, elements, compiled)
        by_head = config.optim.muon.by_head
        counts: list[tuple[tuple[int, int], int]] = []
        for name, (*experts, rows, columns) in group.shapes:
            one = logical_matrices(name, (rows, columns), config.model, by_head)
            copies = math.prod(experts)
            counts += [(shape, copies * len(list(same))) for shape, same in groupby(matrix.shape for matrix in one)]
        total = sum(rows * columns * count for (rows, columns), count in counts)
        away = max(0.0, 1 - elements / total)
        own = math.ceil(KEEPS * elements) if away else total
        pack = max(min(THRESHOLDS.muon_elements, own), *(rows * columns for (rows, columns), _ in counts))
        several = own > pack
        batches = 0.0
        for (rows, columns), same in groupby(counts, key=lambda pair: pair[0]):
            batch = min(pack, rows * columns * sum(count for _, count in same))
            gram = min(rows, columns) / max(rows, columns)
            each = max(10, 8 + 4 * gram) if kind == "cuda" else 12 + 8 * gram
            batches = max(batches, each * batch)
        computed = pack * (8 + 4 * several + (8 + 8 * several) * away) + batches
        return math.ceil(max(computed, pack * (4 + 20 * away)))

    def allocate(self, param: Tensor) -> dict[str, Tensor]:
        """Allocate Muon's momentum or AdamW's moments, unless they exist."""
        shard = self.handover.shards.get(param)
        if shard is None or not shard.rule.is_whole:
            return super().allocate(param)
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param, dtype=self.moments)
        return state

    def update(self, param: Tensor, group: dict) -> None:
        """Update one flat parameter. Collective over the ranks with its shards."""
        shard = self.handover.shards.get(param)
        if shard is None or not shard.rule.is_whole:
            super().update(param, group)
            return
        gradients, factor = self.handover.of(param)
        gradients = [gradient.to(param.device) for gradient in gradients]
        self._add_momentum(param, gradients, factor.to(param.device) if isinstance(factor, Tensor) else factor)
        self._move(param, shard, gradients, group)

    def _add_momentum(self, param: Tensor, gradients: Sequence[Tensor], factor: Tensor | float | None) -> None:
        """Compute M <- mu M + G, and replace the gradients with G + mu M."""
        mu, first = self._muon.momentum, 0
        momentum = self.allocate(param)["momentum"].view(-1)
        for gradient in gradients:
            if factor is not None:
                gradient.mul_(factor)
            held = momentum[first : first + gradient.numel()]
            first += gradient.numel()
            for kept, new in zip(*(flat.split(THRESHOLDS.adamw_elements) for flat in (held, gradient)), strict=True):
                summed = kept.to(new.dtype).mul_(mu).add_(new)
                kept.copy_(summed)
                new.add_(summed, alpha=mu)

    def _move(self, param: Tensor, shard: FlatShard, gradients: Sequence[Tensor], group: dict) -> None:
        """Apply weight decay, and subtract the scaled orthogonal factors in `gradients`."""
        matrices, owners = self._place(param, shard)
        masters, decay = param.detach().view(-1), 1 - group["lr"] * group["weight_decay"]
        one_by_one = len(gradients) > 1  # each weight has its own gradient, and its matrices are not shared

        def read(weight: int, piece: WeightPiece) -> Tensor:
            flat, place = (gradients[weight], 0) if one_by_one else (gradients[0], None)
            return shard.weights[weight].view(flat, *piece, place)

        def write(number: int, weight: int, piece: WeightPiece, factor: Tensor) -> None:
            rows, columns = matrices[number].place
            step = group["lr"] * UPDATE_SIZE * max(len(rows), len(columns)) ** 0.5
            shard.weights[weight].view(masters, *piece).mul_(decay).sub_(factor, alpha=step)

        owners.each(read, lambda _, whole: self._factors(whole), write, masters[:0])

    def _factors(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Returns each matrix's orthogonal factor. Adjacent matrices of one shape form a batch, in bf16 on a GPU."""
        found: list[Tensor] = []
        for _, same in groupby(matrices, key=lambda matrix: matrix.shape):
            batch = torch.stack(list(same))
            low = batch.bfloat16() if batch.is_cuda else batch
            found += orthogonalise(low, self._muon.iteration).to(batch.dtype).unbind()
        return found

    def _place(self, param: Tensor, shard: FlatShard) -> _Placed:
        if param not in self._placed:
            matrices = [
                SharedMatrix(
                    number,
                    weight.shape[-1],
                    weight.held,
                    WeightPiece(*one),
                    newton_schulz_flops(*one.shape, self._muon.iteration),
                )
                for number, (name, weight) in enumerate(zip(shard.names, shard.weights, strict=True))
                for one in logical_matrices(name, weight.shape, self._model, self._muon.by_head)
            ]
            group = shard.group if shard.sharing.ranks > 1 else None
            owners = MatrixOwners(matrices, group, *shard.sharing, THRESHOLDS.muon_elements)
            self._placed[param] = _Placed(matrices, owners)
        return self._placed[param]
