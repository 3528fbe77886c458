"""Judges gradients summed over micro-batches and over ranks.

The sum is fp32 in every recipe (paper 3.3.1), also with bf16 weights and activations. So each element of a reduced
gradient must match within fp32 rounding. A missing rank, or a sum in bf16, exceeds this bound.

For a sum over micro-batches a rank records only the total; train/prove/judge_matmuls.py judges it with its matmuls.
Here only its format is tested: a total of several terms has bits that bf16 does not have, unless it was stored in bf16.
A term is a micro-batch whose gradient returns to the part. Some micro-batches of chats have nothing to learn, and a
single term may be a matmul result rounded to bf16.
"""

import re
from collections import Counter

import torch

from train.prove import reference
from train.prove.bounds import UNIT, Bound
from train.prove.comparison import Comparisons, in_each
from train.prove.evidence import Evidence, State, assemble, depth_of

MORE = 4
"""Roundings of a sum over ranks, in addition to one per term: divisions by the number of ranks, and the second sum of
the tied embedding."""
MOST_IN_BF16, ENOUGH = 0.9, 16
"""Largest fraction of a total's numbers that may fit bf16 by chance, and the minimum of numbers for a conclusive
test."""


def judge_totals(at: Comparisons, ranks: list[Evidence]) -> None:
    """Judge sums over the micro-batches of a rank, for weights that process every token."""
    why = "fraction of numbers that are exact in bf16: few for sums in fp32, all for sums in bf16"
    for rank in ranks:
        came: Counter[str] = Counter()
        for part, _, gradient in rank.calls_of_kind("backward"):
            came[part] += bool(gradient.any())
        for name, total in () if _is_by_micro_batch(rank) else rank.of_kind("local"):
            held, everyone = total[total != 0].float(), name != "embedding.weight" and ".experts." not in name
            everyone &= not (
                at.config.data.chats and ".indexer." in name
            )  # learns from micro-batches with learnt tokens
            if everyone and len(held) >= ENOUGH and _terms_of(name, came) > 1:
                share = (held == held.bfloat16().float()).double().mean().item()
                bound = Bound(MOST_IN_BF16, why)
                at.compare("format of sums over micro-batches", name, share, 0.0, bound, rank=rank, scale=1.0)


def judge_reduction(at: Comparisons, ranks: list[Evidence]) -> None:
    """Judge sums over the ranks of a stage."""
    shapes, info = reference.trained_shapes(at.values), ranks[0].info
    reduced, want = assemble(ranks, "reduced"), sum_over_ranks(ranks, shapes)
    sizes = sum_over_ranks(ranks, shapes, signs=False)
    at.same_names("reduced gradients", reduced, want)
    terms = info.dp * info.cp
    if _is_by_micro_batch(ranks[0]):
        terms += -(-int(info.plan["batch_size"]) // (info.dp * info.micro_batch_size))
    why = f"{terms} terms added in fp32, as a fraction of the sum of magnitudes"
    for name in reversed(shapes):
        if name in reduced and name in want:
            bound = Bound((terms + MORE) * UNIT["fp32"], why)
            at.compare("reduced gradients", name, reduced[name], want[name], bound, measure=in_each(sizes[name]))


def _is_by_micro_batch(rank: Evidence) -> bool:
    """Whether each micro-batch was reduced separately (ZeRO 3)."""
    return any(True for _ in rank.of_kind("sizes"))


def _terms_of(weight: str, came: Counter[str]) -> int:
    """Number of micro-batches in the gradient of a weight: of the smallest part around it; for the head, of its inputs; 1 in a
    warm-up of indexers, in which no gradient comes back to a part.

    came: number of micro-batches with a non-zero gradient, by part.
    """
    if weight.startswith("head."):
        depths = sorted((part for part in came if re.fullmatch(r"mtp\.\d+", part)), key=depth_of)
        return sum(came[part] for part in ["norm", *depths[-1:]])
    names = weight.split(".")
    around = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((came[part] for part in around if part in came), 1)


def sum_over_ranks(ranks: list[Evidence], shapes: dict[str, tuple[int, ...]], signs: bool = True) -> State:
    """The mean of the ranks' local gradients over a stage, computed here and not by Sluice's own reduction.

    signs: False adds the absolute values of each rank's gradient.
    """
    found: State = {}
    for rank in ranks:
        for name, tensor in rank.of_kind("local"):
            given = tensor.double() if signs else rank.tensors.get(f"sizes/{name}", tensor).double().abs()
            offset, _ = rank.places[f"local/{name}"]
            whole = found.setdefault(name, torch.zeros(shapes.get(name, tensor.shape), dtype=torch.float64))
            whole.view(-1)[offset : offset + given.numel()] += given.flatten() / (rank.info.dp * rank.info.cp)
    return found
