"""The torch class that runs each schedule, and the order of its actions on every rank. Plans simulate this order."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from torch.distributed.pipelining.schedules import PipelineScheduleMulti

from conf.pipeline_schedules import PLAIN_SCHEDULE, SCHEDULES

TorchClass = type[Any]
"""A PipelineScheduleSingle or a PipelineScheduleMulti. Their constructors take different arguments."""


class Action(NamedTuple):
    """A unit of a rank's work: F (forward), B (backward), I (backward of inputs), W (backward of weights), FB
    (overlapped F, B).
    """

    kind: str
    stage: int
    micro_batch: int
    halves: tuple["Action", ...] = ()
    """Forward and backward of an FB. The FB itself has the stage and micro_batch of its forward."""


@dataclass(frozen=True)
class TorchOrder:
    """The torch class that runs a schedule (`drives`), and the order of the schedule's actions."""

    drives: TorchClass
    of_rank: Callable[[int, int, int], list[Action]] | None = None
    """Function of rank, pp and micro_batches that returns the rank's actions; None if the torch class reports them."""

    @property
    def is_multi(self) -> bool:
        """Whether the torch class takes a list of stages and waits for sends at a step's end."""
        return issubclass(self.drives, PipelineScheduleMulti)


def _one_f_one_b(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """Return Schedule1F1B's real order; in torch 2.13, its list `pipeline_order` is unused and wrong."""
    warm_up = min(micro_batches, pp - rank)
    forwards = [Action("F", rank, m) for m in range(micro_batches)]
    backwards = [Action("B", rank, m) for m in range(micro_batches)]
    steady = [action for m in range(micro_batches - warm_up) for action in (backwards[m], forwards[warm_up + m])]
    return forwards[:warm_up] + steady + backwards[micro_batches - warm_up :]


ORDERS: dict[str, TorchOrder] = {
    PLAIN_SCHEDULE: TorchOrder(Schedule1F1B, _one_f_one_b),
    "interleaved": TorchOrder(ScheduleInterleaved1F1B),
    "zbv": TorchOrder(ScheduleZBVZeroBubble),
    "dualpipev": TorchOrder(ScheduleDualPipeV),
}


@lru_cache(maxsize=64)
def schedule_actions(
    name: str, pp: int, micro_batches: int, virtual: int = 2, overlap: bool = True
) -> list[list[Action]]:
    """Return every rank's actions in torch's order. The result is cached: do not change it.

    overlap: whether the passes of a pair run together.
    """
    order = ORDERS[name]
    if order.of_rank is not None:
        return [order.of_rank(rank, pp, micro_batches) for rank in range(pp)]
    placement = SCHEDULES[name].place_stages(pp, virtual)
    num_stages = sum(map(len, placement))
    stages: Any = [
        SimpleNamespace(stage_index=stage, num_stages=num_stages, group_size=pp, group_rank=0, submod=nn.Identity())
        for stage in placement[0]
    ]
    assert issubclass(order.drives, PipelineScheduleMulti)
    lines = without_transfers(order.drives)(stages, micro_batches).pipeline_order
    assert lines is not None
    actions = [[_action(torch_action) for torch_action in lines[rank] if torch_action] for rank in range(pp)]
    return (
        actions if overlap else [[part for action in line for part in action.halves or (action,)] for line in actions]
    )


def without_transfers(drives: type[PipelineScheduleMulti]) -> type[PipelineScheduleMulti]:
    """Return a subclass without communication actions, which torch builds slowly."""

    class ComputeOnly(drives):  # pyrefly: ignore[invalid-inheritance]  the class is known at run time
        def _prepare_schedule_with_comms(self, *_: object, **__: object) -> None:
            pass

    return ComputeOnly


def _action(torch_action) -> Action:
    """Convert torch's action tuple to an `Action`."""
    if torch_action.sub_actions:
        halves = tuple(_action(half) for half in torch_action.sub_actions)
        return Action("FB", halves[0].stage, halves[0].micro_batch, halves)
    return Action(torch_action.computation_type.value, torch_action.stage_index, torch_action.microbatch_index)
