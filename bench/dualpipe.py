"""DualPipe's order of actions, for which torch has no class: two pipelines over the same ranks, one from each end.

V3 report 3.2.1, figure 5 and table 2: there are `pp` stages. Each stage is on two ranks: one at the same distance from
the first rank as the other from the last rank. Micro-batches with even numbers enter at rank 0, the others at the last
rank. torch's DualPipeV folds one pipeline of twice as many stages; its idle time is the same if all stages take equal
time. In DualPipeV one rank has the last stage, with head and MTP module; in DualPipe two ranks share it.
"""

from collections import Counter, deque

from parallel.pipeline.orders import Action


def dualpipe_actions(pp: int, micro_batches: int) -> list[list[Action]]:
    """Returns the actions of every rank, in order. `pp` and `micro_batches` must be even, with at least two
    micro-batches per rank."""
    return [_of_rank(rank, pp, micro_batches) for rank in range(pp)]


def _of_rank(rank: int, pp: int, micro_batches: int) -> list[Action]:
    near = min(rank, pp - 1 - rank)
    """Number of ranks between this rank and the nearer end. It is the rank's stage in the pipeline from this end (way
    0); the pipeline from the other end is way 1."""
    stages, rest = (near, pp - 1 - near), pp // 2 - 1 - near
    pairs = ["F0B1", "F1B0"] * (micro_batches // 2 - pp + near + 1)
    if not rest:  # the middle ranks have no work that could overlap the wait of the first pair
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
