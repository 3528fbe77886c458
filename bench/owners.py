"""Work and traffic of the owners of matrices, counted with the code that chooses them, beside the plan's prediction.

    python -m bench.owners [--recipes deepseek_v3,moonlight_16b,kimi_k2] [--ranks 8,32,128]

Counts, for a pipeline rank with expert layers under Muon, the matrices that all ranks of its stage share, sharded as by
ZeRO 1. Prints, by number of sharing ranks:

    busiest     operations of the busiest rank, over the larger of the mean and the most expensive matrix (target: at
                most 1.2)
    planned     the plan's value of it, which is a bound
    traffic     bytes that all ranks send for AdamW under ZeRO 1 (gradients in fp32 reduced to their shards, weights in
                bf16 gathered), and bytes for the matrices to owners and back, over the former (target: at most 1.25
                from 8 ranks on)
    planned     the plan's value of it

Experts never leave the ranks that hold them; experts that several ranks hold are distributed like other matrices.

Takes about a minute.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from conf.load import compose
from conf.schema import Config
from parallel.owners import SharedMatrix, choose_owners
from parallel.shard import WeightPiece
from train.optim.matrices import logical_matrices, newton_schulz_flops
from train.plan.memory.part import FrozenSection
from train.plan.memory.rank_weights import Weight, part_weights
from train.plan.time.update import Orthogonal, count_weights

GRADIENT_BYTES, WEIGHT_BYTES, MOMENTUM_BYTES = 4, 2, 4


class OwnersCount(NamedTuple):
    """Work and traffic of the owners of matrices, over some ranks: operations, and elements of all ranks together."""

    ranks: int
    busiest: float
    mean: float
    largest: float
    elements: int
    moved: int
    """Number of elements that are sent to an owner."""

    @property
    def work(self) -> float:
        return self.busiest / max(self.mean, self.largest)

    @property
    def traffic(self) -> float:
        return self.over_adamw(2 * MOMENTUM_BYTES * self.moved)

    def over_adamw(self, sent: float) -> float:
        """Ratio of traffic: (bytes of AdamW under ZeRO 1 + `sent`) / (bytes of AdamW under ZeRO 1). In a ring, each of
        reduction and gather sends all shards except one."""
        adamw = (GRADIENT_BYTES + WEIGHT_BYTES) * self.elements * (self.ranks - 1)
        return (adamw + sent) / adamw


def count_owners(config: Config, weights: Sequence[Weight], ranks: int) -> OwnersCount:
    """Counts the owners' work for weights that `ranks` ranks share. The weights follow one another in flat shards of
    equal length."""
    size, first, matrices = -(-sum(weight.elements for weight in weights) // ranks), 0, []
    for number, weight in enumerate(weights):
        ends = [min(max(rank * size - first, 0), weight.elements) for rank in range(ranks + 1)]
        held = [range(*pair) for pair in pairwise(ends)]
        first += weight.elements
        for one in logical_matrices(weight.name, weight.shape, config.model, config.optim.muon.by_head):
            cost = newton_schulz_flops(*one.shape, config.optim.muon.iteration)
            matrices.append(SharedMatrix(number, weight.shape[-1], held, WeightPiece(*one), cost))
    loads, moved = [0.0] * ranks, 0
    for matrix, owner in zip(matrices, choose_owners(matrices, ranks), strict=True):
        loads[owner] += matrix.cost
        moved += matrix.place.size - matrix.elements(owner)
    largest = max(matrix.cost for matrix in matrices)
    elements = sum(weight.elements for weight in weights)
    return OwnersCount(ranks, max(loads), sum(loads) / ranks, largest, elements, moved)


def whole_weights(config: Config, layers: int) -> tuple[list[Weight], Orthogonal]:
    """Returns the weights of `layers` layers with experts that Muon updates and that all ranks of a stage share. Also
    returns the plan's figures for these weights."""
    model, share = FrozenSection(config.model), config.model.experts // config.parallel.ep
    choose = config.optim.facts.choose_rule
    one = [
        weight
        for weight in part_weights(model, "moe", share)
        if not weight.is_expert and choose(weight.name, len(weight.shape)).is_whole
    ]
    first = config.model.dense_layers
    planned = count_weights(config, [range(first), range(first, first + layers), range(0)], [1], 2).orthogonal[0]
    return one * layers, planned


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--recipes", default="deepseek_v3,moonlight_16b,kimi_k2")
    arguments.add_argument("--ranks", default="8,32,128")
    arguments.add_argument(
        "--layers", type=int, default=4, help="with experts, of a rank; Moonlight's has all of its 26"
    )
    options = arguments.parse_args()
    print("recipe            layers  ranks  matrices M  busiest  planned  traffic  planned")
    for name in options.recipes.split(","):
        config = compose(f"conf={name}", "data.path=none", "optim=muon")
        layers = options.layers if config.parallel.pp > 1 else config.model.layers - config.model.dense_layers
        weights, planned = whole_weights(config, layers)
        for ranks in map(int, options.ranks.split(",")):
            counted = count_owners(config, weights, ranks)
            work = planned.busiest(ranks) / max(counted.mean, counted.largest)
            traffic = counted.over_adamw(ranks * planned.moved(ranks))
            print(
                f"{name:16s}  {layers:6d}  {ranks:5d}  {counted.elements / 1e6:10.1f}  {counted.work:7.3f}  {work:7.3f}  "
                f"{counted.traffic:7.3f}  {traffic:7.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
