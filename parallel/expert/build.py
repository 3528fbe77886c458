"""Builds the dispatcher that parallel.dispatch names, for a run or for a rank that runs alone.

conf/dispatches.py lists the layouts that a dispatch requires.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from conf.dispatches import FLAT_DISPATCH, check_groups
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.expert.deep_ep import DeepEPDispatcher
from parallel.expert.dispatcher import ExchangeDispatcher
from parallel.expert.node_limited import NodeLimitedDispatcher
from parallel.expert.stand_in import DeepEPStandIn, FlatStandIn, Group, Load, NodeLimitedStandIn
from parallel.expert.wire import Fp8RowsWire, Fp8Wire, HighWire, Wire


@dataclass(frozen=True)
class ExpertPlaces:
    """Location of a layer's experts, and wire format; see `build_dispatcher`."""

    experts: int
    wire: Wire
    ep_group: dist.ProcessGroup | None
    inter_group: dist.ProcessGroup | None
    intra_group: dist.ProcessGroup | None
    ranks_per_node: int
    groups: int
    width: int


def _node_limited(at: ExpertPlaces) -> NodeLimitedDispatcher:
    check_groups(1 if at.ep_group is None else dist.get_world_size(at.ep_group), at.ranks_per_node, at.groups)
    return NodeLimitedDispatcher(at.inter_group, at.intra_group, at.experts, at.wire)


@dataclass(frozen=True)
class DispatcherKind:
    """The two functions that build one kind of dispatcher.

    build: builds the dispatcher of a run.
    stand_in: builds the dispatcher of a rank that runs alone, in a plan or a dry run.
    """

    build: Callable[[ExpertPlaces], ExchangeDispatcher]
    stand_in: Callable[[Group, Wire, Load], ExchangeDispatcher]


DISPATCHERS: dict[str, DispatcherKind] = {
    FLAT_DISPATCH: DispatcherKind(
        lambda at: AllToAllDispatcher(at.ep_group, at.experts, at.ranks_per_node, at.wire), FlatStandIn
    ),
    "node_limited": DispatcherKind(_node_limited, NodeLimitedStandIn),
    "deepep": DispatcherKind(lambda at: DeepEPDispatcher(at.ep_group, at.experts, at.width, at.wire), DeepEPStandIn),
}


def build_wire(name: str, quantized: bool = False) -> Wire:
    """Return the wire with this name: bf16 (sends the activation dtype, which may be fp32) or fp8.

    quantized: whether experts compute in FP8, so that received rows are not decoded.
    """
    return HighWire() if name == "bf16" else Fp8RowsWire() if quantized else Fp8Wire()


def build_dispatcher(
    name: str,
    *,
    experts: int,
    wire: str = "bf16",
    quantized: bool = False,
    ep_group: dist.ProcessGroup | None = None,
    inter_group: dist.ProcessGroup | None = None,
    intra_group: dist.ProcessGroup | None = None,
    ranks_per_node: int = 1,
    groups: int = 1,
    width: int = 0,
) -> ExchangeDispatcher:
    """Build a dispatcher. It has no state between uses, and all layers of a rank may share it.

        name: value of parallel.dispatch
        wire, quantized: see `build_wire`
        ep_group: the expert-parallel group; None if it is only this rank
        inter_group: ranks of ep_group that have the same position on their nodes as this rank
        intra_group: ranks of ep_group on this node; None if it is only this rank
        ranks_per_node: consecutive ranks of ep_group on one node
        groups: expert groups of the router

    Raises UserError if these numbers do not fit together.
    """
    coded = build_wire(wire, quantized)
    places = ExpertPlaces(experts, coded, ep_group, inter_group, intra_group, ranks_per_node, groups, width)
    return DISPATCHERS[name].build(places)


def build_stand_in(name: str, group: Group, wire: Wire, load: Load) -> ExchangeDispatcher:
    """Build the dispatcher `name` for a rank that runs alone, in a plan or a dry run."""
    return DISPATCHERS[name].stand_in(group, wire, load)
