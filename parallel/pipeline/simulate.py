"""Computes how long a schedule takes if its actions (orders.py) have given durations. It needs no ranks.

F is a forward, B a backward, I a backward of inputs, W a backward of weights, m a micro-batch. An action starts when
its rank is free and the action's inputs have arrived:

    F(stage, m) needs F(stage - 1, m);    B or I(stage, m) needs B or I(stage + 1, m) and F(stage, m);
    W(stage, m) needs I(stage, m);        FB(F, B), an overlapped pair, needs the inputs of both halves.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from parallel.pipeline.orders import Action


@dataclass(frozen=True)
class Simulation:
    """The result of a simulation, for all ranks."""

    makespan: float
    """Seconds from the first start to the last end."""
    busy: list[float]
    """For each rank: seconds in which it computes."""
    starts: list[list[float]]
    """For each rank: the start of every action in seconds."""

    @property
    def bubble(self) -> float:
        """Idle time of all ranks, as a fraction of their time."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan)

    @property
    def imbalance(self) -> float:
        """The busiest rank's compute time, divided by the mean compute time of all ranks."""
        return max(self.busy) * len(self.busy) / sum(self.busy)


def what_runs(action: Action, one_piece: bool) -> str:
    """Return what torch runs for an action: F, B, I, W, FB, or "" for nothing.

    one_piece: whether the stage's backward cannot be split into I and W. If so, torch runs B at I and nothing at W.
    If the first stage's backward can be split, torch runs nothing at I, and B at W.
    """
    if action.kind not in ("I", "W") or not (one_piece or action.stage == 0):
        return action.kind
    return "B" if action.kind == ("I" if one_piece else "W") else ""


def stages_ahead(actions: Sequence[Action], one_piece: Collection[int] = ()) -> dict[int, int]:
    """Return the stages of a rank whose gradients are complete before the rank's last backward, in order of completion.

    Each stage is mapped to the index in `actions` of its last backward. one_piece: stages whose backward cannot be
    split.
    """
    ends = {
        part.stage: place
        for place, action in enumerate(actions)
        for part in _parts(action)
        if what_runs(part, part.stage in one_piece) in ("B", "W")
    }
    return dict(sorted(ends.items(), key=lambda end: end[1])[:-1])


def simulate(actions: list[list[Action]], duration: Callable[[Action], float], transfer: float = 0.0) -> Simulation:
    """Simulate the lists of actions of all ranks; see `Program`."""
    return Program(actions).run(duration, transfer)


class Program:
    """All actions of all ranks, each after the actions that it needs. `run` can simulate them with many durations."""

    def __init__(self, actions: list[list[Action]]):
        """Order the actions, one list per rank. Raises AssertionError if ranks would wait for each other."""
        self.actions = actions
        self._kinds: dict[tuple, tuple[int, Action]] = {}
        """Maps each kind of action (its letter and stages, without the micro-batch) to the index of the kind and the
        first action of this kind."""
        self._steps: list[tuple[int, int, list[int]]] = []
        """For each action: rank, index of its kind, and indexes of the actions needed from other ranks."""
        last = max(part.stage for line in actions for action in line for part in _parts(action))
        position = [0] * len(actions)
        made: dict[tuple[str, int, int], int] = {}
        progress = True
        while progress:
            progress = False
            for rank, line in enumerate(actions):
                while position[rank] < len(line):
                    action = line[position[rank]]
                    needs = [need for part in _parts(action) for need in _needs(part, last)]
                    if not all(need in made for need in needs):
                        break
                    made.update((_result(part), len(self._steps)) for part in _parts(action))
                    kind = action.kind, *(part.stage for part in _parts(action))
                    number, _ = self._kinds.setdefault(kind, (len(self._kinds), action))
                    needed = [made[need] for need in needs]
                    self._steps.append((rank, number, [step for step in needed if self._steps[step][0] != rank]))
                    position[rank], progress = position[rank] + 1, True
        stuck = {
            rank: line[at] for rank, (line, at) in enumerate(zip(actions, position, strict=True)) if at < len(line)
        }
        assert not stuck, f"every rank waits for another: {stuck}"

    def run(self, duration: Callable[[Action], float], transfer: float = 0.0) -> Simulation:
        """Return a simulation with these durations.

        duration: function that returns an action's seconds, which do not depend on its micro-batch; an FB is one
        action. transfer: seconds until a result reaches another rank.
        """
        lengths = [duration(action) for _, action in self._kinds.values()]
        ranks = len(self.actions)
        free, busy, ends = [0.0] * ranks, [0.0] * ranks, []
        starts: list[list[float]] = [[] for _ in range(ranks)]
        for rank, kind, needs in self._steps:
            start = free[rank]  # results of the same rank are complete by this time
            for step in needs:
                start = max(start, ends[step] + transfer)
            free[rank] = start + lengths[kind]
            ends.append(free[rank])
            starts[rank].append(start)
            busy[rank] += lengths[kind]
        return Simulation(max(free), busy, starts)


def _needs(part: Action, last: int) -> Iterator[tuple[str, int, int]]:
    kind, stage, micro_batch, _ = part
    if kind == "W":
        yield "B", stage, micro_batch
    elif kind == "F" and stage > 0:
        yield "F", stage - 1, micro_batch
    elif kind in "BI":
        yield "F", stage, micro_batch
        if stage < last:
            yield "B", stage + 1, micro_batch


def _result(part: Action) -> tuple[str, int, int]:
    """Return the key of an action's result. B and I have the same key."""
    return ("B" if part.kind == "I" else part.kind), part.stage, part.micro_batch


def _parts(action: Action) -> tuple[Action, ...]:
    return action.halves or (action,)
