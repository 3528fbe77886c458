"""Judges gradients that are summed over micro-batches and over ranks.

Every recipe sums them in fp32 (paper 3.3.1). So each element must match within fp32 rounding.

A rank records only its sum over micro-batches. A test rejects a sum if bf16 can represent most of its values. The test
skips a sum over one micro-batch, which may be the bf16 result of a matmul.
"""

import re
from collections import Counter

import torch

from train.prove import reference
from train.prove.bounds import UNIT, Bound
from train.prove.comparison import Comparisons, in_each
from train.prove.evidence import Evidence, State, assemble, depth_of
from train.prove.reference_step import rate_of

MORE = 4
"""Number of roundings in a sum over ranks, in addition to one rounding per term."""
MOST_IN_BF16, ENOUGH = 0.9, 16
"""MOST_IN_BF16: maximum fraction of an fp32 sum's elements that bf16 can represent exactly. ENOUGH: minimum number of
elements for a conclusive test."""


def judge_totals(at: Comparisons, ranks: list[Evidence]) -> None:
    """Test that gradients were summed over micro-batches in fp32."""
    why = "fraction of numbers that are exact in bf16: few for sums in fp32, all for sums in bf16"
    for rank in ranks:
        came: Counter[str] = Counter()
        for part, _, gradient in rank.calls_of_kind("backward"):
            came[part] += bool(gradient.any())
        for name, total in () if _is_by_micro_batch(rank) else rank.of_kind("local"):
            held, everyone = total[total != 0].float(), name != "embedding.weight" and ".experts." not in name
            everyone &= not (at.config.data.chats and ".indexer." in name)  # only some micro-batches train indexers
            if everyone and len(held) >= ENOUGH and _terms_of(name, came) > 1:
                share = (held == held.bfloat16().float()).double().mean().item()
                bound = Bound(MOST_IN_BF16, why)
                at.compare("format of sums over micro-batches", name, share, 0.0, bound, rank=rank, scale=1.0)


def judge_reduction(at: Comparisons, ranks: list[Evidence]) -> None:
    """Judge the sums of gradients over the ranks of a stage."""
    shapes, info = reference.trained_shapes(at.values), ranks[0].info
    reduced, want = assemble(ranks, "reduced"), sum_over_ranks(ranks, shapes)
    sizes = sum_over_ranks(ranks, shapes, signs=False)
    for name in reduced.keys() - want.keys():
        if not rate_of(at.values.optim, name, 1.0):  # ZeRO stage 3 does not reduce the zero gradients of frozen weights
            want[name] = sizes[name] = torch.zeros_like(reduced[name])
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
    """Returns whether each micro-batch's gradients were reduced separately (ZeRO stage 3)."""
    return any(True for _ in rank.of_kind("sizes"))


def _terms_of(weight: str, came: Counter[str]) -> int:
    """Returns how many micro-batches contribute to the gradient of a weight.

    came: maps each recorded model part to the number of micro-batches that gave it a non-zero gradient.

    This function returns the count of the smallest part that contains the weight. For the head, it returns the count of
    the final norm plus the count of the last MTP module.
    """
    if weight.startswith("head."):
        depths = sorted((part for part in came if re.fullmatch(r"mtp\.\d+", part)), key=depth_of)
        return sum(came[part] for part in ["norm", *depths[-1:]])
    names = weight.split(".")
    around = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((came[part] for part in around if part in came), 1)


def sum_over_ranks(ranks: list[Evidence], shapes: dict[str, tuple[int, ...]], signs: bool = True) -> State:
    """Returns the mean of the local gradients over the ranks of a pipeline stage.

    signs: False: average absolute values, which are a rank's `sizes` if recorded, else its absolute gradients.
    """
    found: State = {}
    for rank in ranks:
        for name, tensor in rank.of_kind("local"):
            given = tensor.double() if signs else rank.tensors.get(f"sizes/{name}", tensor).double().abs()
            offset, _ = rank.places[f"local/{name}"]
            whole = found.setdefault(name, torch.zeros(shapes.get(name, tensor.shape), dtype=torch.float64))
            whole.view(-1)[offset : offset + given.numel()] += given.flatten() / (rank.info.dp * rank.info.cp)
    return found
