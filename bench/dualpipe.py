"""DualPipe's order of actions, for which torch has no class: two pipelines over the same ranks, one from each end.

V3 report 3.2.1, figure 5 and table 2: `pp` stages, each on the two ranks with equal distance from either end.
Micro-batches with even numbers enter at rank 0, the others at the last rank. torch's DualPipeV folds one pipeline of
twice as many stages; its idle time is the same if all stages take equal time. There, a last stage with head and MTP
module is on one rank; here two ranks share it.
"""

from collections import Counter, deque

from parallel.pipeline.orders import Action


def dualpipe_actions(pp: int, micro_batches: int) -> list[list[Action]]:
    """What every rank computes, in order. Both even, and at least two micro-batches a rank."""
    return [_of_rank(rank, pp, micro_batches) for rank in range(pp)]


def _of_rank(rank: int, pp: int, micro_batches: int) -> list[Action]:
    near = min(rank, pp - 1 - rank)
    """Ranks between this one and the nearer end: its stage of the pipeline from there, which is way 0; the other is way 1."""
    stages, rest = (near, pp - 1 - near), pp // 2 - 1 - near
    pairs = ["F0B1", "F1B0"] * (micro_batches // 2 - pp + near + 1)
    if not rest:  # in the middle the first pair has nothing to wait beside
        pairs[:1] = ["F0", "B1"]
    last = [f"{'B' if at <= near else 'I'}{1 - at % 2}" for at in range(2 * near + 2)]
    words = [
        *["F0"] * (2 * rest), *["F0", "F1"] * (near + 1), *["I1", "W", "F1"] * rest, *pairs, *["B1", "F1B0"] * rest, *last, *["W", "I0"] * rest,
        *["W"] * (near + 1),
    ]  # fmt: skip
    passed: Counter[tuple[bool, int]] = Counter()
    waiting: deque[Action] = deque()
    line = []
    for word in words:
        halves = []
        for kind, way in zip(word[::2], word[1::2], strict=False):
            stage, direction = stages[int(way)], (kind == "F", int(way))
            halves.append(Action(kind, stage, 2 * passed[direction] + (stage != rank)))
            passed[direction] += 1
        if not halves:
            halves = [waiting.popleft()._replace(kind="W")]
        waiting.extend(half for half in halves if half.kind == "I")
        first = halves[0]
        line.append(first if len(halves) == 1 else Action("FB", first.stage, first.micro_batch, tuple(halves)))
    return line
