"""Gradients summed over micro-batches and over ranks.

The sum is fp32 in every recipe (paper 3.3.1), also where weights and activations are bf16. So each element of a reduced gradient is
held to what fp32 rounds, not to what a format below does: a rank that is missing, or a sum in bf16, stands out.

Of a sum over micro-batches a rank has the total alone, which is judged with the products that make it (train/prove/judge_parts.py).
Here it is only looked at: a total of several terms has bits that bf16 has not, unless it was kept in bf16. A term is a micro-batch
whose gradient comes back to the part: of chats some have nothing to learn, and one term alone may be a product rounded to bf16.
"""

import re

import torch

from train.prove import reference
from train.prove.bounds import UNIT, Bound
from train.prove.comparisons import Comparisons
from train.prove.evidence import Evidence, depth_of
from train.prove.judge_update import State, assemble

MORE = 4
"""Roundings of a sum over ranks beside one for each term: divisions by the number of ranks, and the tied embedding's second sum."""


MOST_IN_BF16, ENOUGH = 0.9, 16
"""Share of a total's numbers that may happen to have no more bits than bf16, and how many of them tell."""


class ReductionJudge(Comparisons):
    """Judges reductions of one pass."""

    def _judge_totals(self, ranks: list[Evidence]) -> None:
        """Those over the micro-batches of a rank, of weights that every token meets."""
        self.phase = "backward"
        bound = Bound(
            MOST_IN_BF16, "share of numbers that bf16 holds: of sums of several terms in fp32 far fewer, in bf16 all"
        )
        for rank in ranks:
            info, by_rank = rank.info, not any(True for _ in rank.of_kind("sizes"))
            if not by_rank:
                continue
            came = _came_back(rank)
            for name, total in rank.of_kind("local"):
                held = total[total != 0].float()
                if _is_met_by_all(name) and len(held) >= ENOUGH and _terms_of(name, came) > 1:
                    share = (held == held.bfloat16().float()).double().mean().item()
                    self._number("format of sums over micro-batches", name, info.rank, share, 0.0, bound, scale=1.0)

    def _judge_reduction(self, ranks: list[Evidence]) -> None:
        self.phase = "reduction"
        shapes = reference.trained_shapes(self.config)
        reduced, want = assemble(ranks, "reduced"), sum_over_ranks(ranks, shapes)
        sizes = sum_over_ranks(ranks, shapes, signs=False)
        self._same_names("reduced gradients", reduced, want)
        terms = _terms(ranks[0])
        bound = Bound(
            (terms + MORE) * UNIT["fp32"], f"{terms} terms added in fp32, as a share of their sum without signs"
        )
        for name in reversed(shapes):
            if name in reduced and name in want:
                self._compare("reduced gradients", name, None, reduced[name], want[name], bound, allowed=sizes[name])


def _is_met_by_all(name: str) -> bool:
    """Whether every token meets the weight."""
    return name != "embedding.weight" and ".experts." not in name


def _came_back(rank: Evidence) -> dict[str, int]:
    """Micro-batches whose gradient came back to a part and is not zero, by the name of the part."""
    found: dict[str, int] = {}
    for part, _, gradient in rank.calls_of_kind("backward"):
        found[part] = found.get(part, 0) + bool(gradient.any())
    return found


def _terms_of(weight: str, came: dict[str, int]) -> int:
    """Micro-batches that the gradient of a weight is a sum of: those of the smallest part around it, of the head's those of its inputs."""
    if weight.startswith("head."):
        depths = sorted((part for part in came if re.fullmatch(r"mtp\.\d+", part)), key=depth_of)
        return sum(came[part] for part in ["norm", *depths[-1:]])
    names = weight.split(".")
    around = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next(came[part] for part in around if part in came)


def _terms(rank: Evidence) -> int:
    """Terms of a sum: ranks of a stage, and where gradients were reduced by micro-batch (ZeRO 3) the micro-batches too."""
    info = rank.info
    by_micro_batch = any(True for _ in rank.of_kind("sizes"))
    batches = -(-int(info.plan["batch_size"]) // (info.dp * info.micro_batch_size)) if by_micro_batch else 0
    return info.dp * info.cp + batches


def sum_over_ranks(ranks: list[Evidence], shapes: dict[str, tuple[int, ...]], signs: bool = True) -> State:
    """The mean over the ranks of a stage of the gradients that ranks made: here, and not by the product's own reduction.

    signs: False adds what each rank's gradient comes to without its sign.
    """
    found: State = {}
    for rank in ranks:
        for name, tensor in rank.of_kind("local"):
            if not signs:
                tensor = rank.tensors.get(f"sizes/{name}", tensor).abs()
            offset, _ = rank.places[f"local/{name}"]
            whole = found.setdefault(name, torch.zeros(shapes.get(name, tensor.shape), dtype=torch.float64))
            whole.view(-1)[offset : offset + tensor.numel()] += tensor.double().flatten() / (
                rank.info.dp * rank.info.cp
            )
    return found
