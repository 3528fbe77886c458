"""How long a schedule takes when its actions have given lengths: torch's own action lists, without ranks.

The lists come from the very classes that drive a run, built around stand-ins for the stages, so that a plan simulates
the schedule that will run.  Each rank executes its list in order; an action starts when the rank is free and what
it needs has arrived:

    F(stage, m) needs F(stage - 1, m);    B or I(stage, m) needs B or I(stage + 1, m) and F(stage, m);
    W(stage, m) needs I(stage, m);        FB(F, B), an overlapped pair, needs what both halves need.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

from torch import nn
from torch.distributed.pipelining import ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from parallel.pipeline.split import stage_placement


class _ComputeOnly:
    """Leaves out the lists with communication, which no one asks for here and which take torch most of the time."""

    def _prepare_schedule_with_comms(self, *_: object, **__: object) -> None:
        pass


class _Interleaved(_ComputeOnly, ScheduleInterleaved1F1B):
    pass


class _Zbv(_ComputeOnly, ScheduleZBVZeroBubble):
    pass


class _DualPipeV(_ComputeOnly, ScheduleDualPipeV):
    pass


_TORCH = {"interleaved": _Interleaved, "zbv": _Zbv, "dualpipev": _DualPipeV}


class Action(NamedTuple):
    """One thing a rank computes: F, B, I or W of one stage and micro-batch, or FB with its two halves."""

    kind: str
    stage: int
    micro_batch: int
    halves: tuple["Action", ...] = ()
    """For FB: the forward and the backward that run together; stage and micro_batch are those of the forward."""


@dataclass(frozen=True)
class Simulation:
    """The outcome for all ranks."""

    makespan: float
    """Seconds from the first action of any rank to the last."""
    busy: list[float]
    """Seconds of computing, per rank."""
    starts: list[list[float]]
    """When every action starts, per rank, in the order of the rank's list."""

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan)

    @property
    def imbalance(self) -> float:
        """The busiest rank's time over the mean."""
        return max(self.busy) * len(self.busy) / sum(self.busy)


def idle_time(name: str, pp: int, forward: float, inputs: float, weights: float, pair: float) -> float:
    """Idle seconds of a rank in one step, in closed form; stages equal, transfers free, micro-batches enough.

    forward, inputs, weights: seconds of F, I and W of one stage (B = I + W); pair: of FB. With p = pp ranks:

    1f1b, interleaved   (p - 1)(F + B): with v stages a rank one of interleaved is 1 / v of 1f1b's, and so is its idle time;
    zbv                 (p - 1) I for F <= I <= 2 W. Never 0: the title's zero bubble lets ranks start a step
                        before others have ended the last one, and here the optimizer lies between;
    dualpipev           (p - 1)(FB + F - 2 W) for I <= F p / (p - 1), of the ranks before the last, which leaves one
                        pair unoverlapped. Equal to the paper's (PP/2 - 1)(FB + B - 3 W), Table 2, where F = I.

    Counted on torch's lists with `simulate`, which has no such limits; the tests hold the two together.
    """
    per_hop = {
        "1f1b": forward + inputs + weights,
        "interleaved": forward + inputs + weights,
        "zbv": inputs,
        "dualpipev": pair + forward - 2 * weights,
    }
    return (pp - 1) * per_hop[name]


def what_runs(action: Action, one_piece: bool) -> str:
    """F, B, I, W or FB as it really runs, or nothing. one_piece: whether the stage's backward cannot be split, and is done in its I.
    Of any other first stage torch does all of it in its W.
    """
    if action.kind not in ("I", "W") or not (one_piece or action.stage == 0):
        return action.kind
    return "B" if action.kind == ("I" if one_piece else "W") else ""


@lru_cache(maxsize=64)
def schedule_actions(
    name: str, pp: int, micro_batches: int, virtual: int = 2, overlap: bool = True
) -> list[list[Action]]:
    """What every rank computes, in order, under torch's schedule of this name; not to be changed. Needs no process group. virtual:
    as in split.rank_stages; overlap: whether pairs of dualpipev overlap, else torch runs the forward and then the backward.
    """
    if name == "1f1b":
        return [_one_f_one_b(rank, pp, micro_batches) for rank in range(pp)]
    placement = stage_placement(name, pp, virtual)
    num_stages = sum(map(len, placement))
    stages = [
        SimpleNamespace(stage_index=stage, num_stages=num_stages, group_size=pp, group_rank=0, submod=nn.Identity())
        for stage in placement[0]
    ]
    order = _TORCH[name](stages, micro_batches).pipeline_order
    actions = [[_action(torch_action) for torch_action in order[rank] if torch_action] for rank in range(pp)]
    return actions if overlap else [[part for action in line for part in _parts(action)] for line in actions]


def simulate(actions: list[list[Action]], duration: Callable[[Action], float], transfer: float = 0.0) -> Simulation:
    """Run the lists of all ranks against each other; see Program."""
    return Program(actions).run(duration, transfer)


class Program:
    """The lists of all ranks in an order in which nothing comes before what it needs. It does not depend on how long actions
    take, so that many lengths are tried on one.
    """

    def __init__(self, actions: list[list[Action]]):
        """AssertionError when the lists wait for each other in a circle."""
        self.actions = actions
        self._steps: list[tuple[int, Action, list[int]]] = []
        """Rank, action, and the steps on other ranks that it needs."""
        rank_of = {part.stage: rank for rank, line in enumerate(actions) for action in line for part in _parts(action)}
        last, position = max(rank_of), [0] * len(actions)
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
                    self._steps.append((rank, action, [made[need] for need in needs if rank_of[need[1]] != rank]))
                    position[rank], progress = position[rank] + 1, True
        stuck = {
            rank: line[at] for rank, (line, at) in enumerate(zip(actions, position, strict=True)) if at < len(line)
        }
        assert not stuck, f"every rank waits for another: {stuck}"

    def run(self, duration: Callable[[Action], float], transfer: float = 0.0) -> Simulation:
        """duration: seconds of an action (an FB is asked for as a whole); transfer: seconds between the end of an action and its
        result being there for a stage on another rank.
        """
        ranks = len(self.actions)
        free, busy, ends = [0.0] * ranks, [0.0] * ranks, []
        starts: list[list[float]] = [[] for _ in range(ranks)]
        for rank, action, needs in self._steps:
            start = free[rank]  # what the rank itself has made is there by then
            for step in needs:
                start = max(start, ends[step] + transfer)
            seconds = duration(action)
            free[rank] = start + seconds
            ends.append(start + seconds)
            starts[rank].append(start)
            busy[rank] += seconds
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
    """Under which name others wait for it: an input gradient is one, whether from B or from I."""
    return ("B" if part.kind == "I" else part.kind), part.stage, part.micro_batch


def _parts(action: Action) -> tuple[Action, ...]:
    return action.halves or (action,)


def _action(torch_action) -> Action:
    """torch's action tuple as ours."""
    if torch_action.sub_actions:
        halves = tuple(_action(half) for half in torch_action.sub_actions)
        return Action("FB", halves[0].stage, halves[0].micro_batch, halves)
    return Action(torch_action.computation_type.value, torch_action.stage_index, torch_action.microbatch_index)


def _one_f_one_b(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """The order that Schedule1F1B executes. (The list it reports, pipeline_order, is wrong in torch 2.13: its last
    stage starts at micro-batch 1; the class never runs that list.)"""
    warm_up = min(micro_batches, pp - rank)
    forwards = [Action("F", rank, m) for m in range(micro_batches)]
    backwards = [Action("B", rank, m) for m in range(micro_batches)]
    steady = [action for m in range(micro_batches - warm_up) for action in (backwards[m], forwards[warm_up + m])]
    return forwards[:warm_up] + steady + backwards[micro_batches - warm_up :]
