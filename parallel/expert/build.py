"""Choosing a dispatcher, and the rules it needs. Pure but for the construction at the end."""

import torch.distributed as dist

from conf.errors import UserError
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.expert.deep_ep import DeepEPDispatcher
from parallel.expert.node_limited import NodeLimitedDispatcher
from parallel.expert.wire import Fp8RowsWire, Fp8Wire, HighWire, Wire

RemoteDispatcher = AllToAllDispatcher | NodeLimitedDispatcher | DeepEPDispatcher


def check_groups(ep: int, ranks_per_node: int, groups: int) -> None:
    """Raise UserError unless the router's expert groups and the nodes fit each other (paper 2.1.2, 3.2.2).

    Nodes are runs of ranks_per_node ranks of an expert-parallel group. A group of experts may not straddle two
    nodes, or a token limited to M groups could reach more than M nodes. One group means no limit and always fits.
    """
    if ep % ranks_per_node:
        raise UserError(
            "cluster.ranks_per_node",
            ranks_per_node,
            f"must divide parallel.ep = {ep}, so that nodes are equal",
            f"set cluster.ranks_per_node to a divisor of {ep}, or parallel.dispatch=flat",
        )
    nodes = ep // ranks_per_node
    if groups > 1 and groups % nodes:
        raise UserError(
            "model.groups",
            groups,
            f"must be a multiple of the {nodes} nodes that hold a layer's experts, or 1: else a group straddles nodes",
            f"set model.groups={nodes}, or parallel.dispatch=flat, or change parallel.ep",
        )


def build_wire(name: str, quantized: bool = False) -> Wire:
    """bf16 (the activation format, whichever that is) or fp8. quantized: experts take FP8 rows as they arrive."""
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
) -> RemoteDispatcher:
    """A dispatcher for one layer or, as it keeps no state between uses, for all layers of a rank.

    name: flat, node_limited or deepep. experts: routed experts of a layer. wire, quantized: see `build_wire`.
    ep_group: the expert-parallel group (None: this rank alone). inter_group, intra_group, for node_limited: the
    ranks with this rank's index on each node, and the ranks of this node (None: just this rank).
    ranks_per_node: consecutive ranks of the group on one node. groups: the router's expert groups.
    width: hidden width, for deepep. Raises UserError where the sizes do not fit.
    """
    if name == "flat":
        return AllToAllDispatcher(ep_group, experts, ranks_per_node, build_wire(wire, quantized))
    if name == "node_limited":
        check_groups(1 if ep_group is None else dist.get_world_size(ep_group), ranks_per_node, groups)
        return NodeLimitedDispatcher(inter_group, intra_group, experts, build_wire(wire, quantized))
    return DeepEPDispatcher(ep_group, experts, width, build_wire(wire, quantized))
