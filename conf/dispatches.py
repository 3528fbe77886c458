"""The kinds of dispatch, which send tokens to experts on other ranks: their needs and their costs. Imports no torch.

Other code reads the properties in DISPATCHES, and never compares names of dispatches. A new dispatch needs an entry
here, and a class in parallel/expert/build.py.
"""

from dataclasses import dataclass, replace

from conf.errors import UserError


@dataclass(frozen=True)
class Reach:
    """Average number of destinations of one token. Experts are assigned in order to the ranks of an expert group."""

    nodes: float
    """Number of nodes with an expert of the token."""
    ranks: float
    experts: int
    ep: int
    """Number of ranks in the expert group."""
    per_node: int
    """Number of ranks of the expert group on one node."""


@dataclass(frozen=True)
class Messages:
    """Average number of messages per token and MoE layer on the busiest rank."""

    copies: tuple[float, ...]
    """Number of rows per token that Sluice's kernels copy in each hop, including rows for the same rank. There are two
    hops, to nodes and then to ranks, or one hop, directly to ranks."""
    arrivals: float
    """Number of rows per token that expert ranks receive."""
    inside: float
    """Number of messages per token inside the node."""
    across: float
    """Number of messages per token to other nodes."""


@dataclass(frozen=True)
class DispatchFacts:
    """Properties of a kind of dispatch."""

    name: str
    per_expert: bool = False
    """True: a token is sent once for each of its experts. False: a token is sent once to each node that holds one of
    its experts, and inside the node once to each rank that holds one."""
    by_nodes: bool = False
    """Whether rows are first sent to nodes, and then to the nodes' ranks; see `check_groups`."""
    needs_gpu: bool = False
    package: str | None = None
    """Python package that the dispatch needs; None if it needs none."""
    in_bf16: bool = False
    """Whether the dispatch sends and adds rows only in bf16."""
    repeats: bool = True
    """Whether rows arrive in the same order in every run."""
    width: int = 1
    """Number by which model.hidden must be divisible; 1 for no limit."""
    sizes: tuple[int, ...] | None = None
    """Supported sizes of an expert group; None for any size."""

    def is_able(self, ep: int, hidden: int, on_gpu: bool) -> bool:
        """Whether the dispatch supports `ep` ranks and rows of width `hidden`."""
        fits = hidden % self.width == 0 and (self.sizes is None or ep in self.sizes)
        return fits and (on_gpu or not self.needs_gpu)

    def count_messages(self, reach: Reach) -> Messages:
        """Return the number of messages per token; see `Messages`."""
        other_node, same_node = 1 - reach.per_node / reach.ep, (reach.per_node - 1) / reach.ep
        if self.per_expert:
            experts = reach.experts
            return Messages((experts,), experts, experts * same_node, experts * other_node)
        over_both = reach.ep > reach.per_node and reach.per_node > 1
        copies = (reach.nodes, reach.ranks) if over_both else (reach.ranks,)
        return Messages(copies, reach.ranks, reach.ranks * (1 - 1 / reach.per_node), reach.nodes * other_node)

    def side_bytes(self, top_k: int) -> int:
        """Return the bytes sent with a row: gates and expert indices."""
        return 4 if self.per_expert else 4 * top_k + -(-2 * top_k // 4) * 4

    def gate_bytes(self, top_k: int) -> int:
        """Return the bytes of gate gradients sent back with a row's gradient."""
        return 4 if self.per_expert else 4 * top_k

    def find_links(self, ep: int, per_node: int) -> tuple[range, ...]:
        """Return, for each hop, the ranks that exchange rows through NCCL with the first rank of an expert group."""
        return (range(0, ep, per_node), range(per_node)) if self.by_nodes else (range(ep),)

    def count_buffer_bytes(self, ep: int, hidden: int) -> int | None:
        """Return the buffer bytes per device; None for NCCL's buffers."""
        return None

    def find_sums(self, experts: int, ep: int, per_node: int) -> list[int]:
        """Return the number of experts in each sum of a token's rows. The first sum is over a rank's experts. Some
        dispatches compute a second sum over a node's experts. Empty if the dispatch adds no rows."""
        if self.per_expert or ep == 1:
            return []
        of_rank = experts // ep
        of_node = of_rank * per_node
        return [of_rank, of_node] if self.by_nodes and of_rank < of_node < experts else [of_rank]


@dataclass(frozen=True)
class DeepEPFacts(DispatchFacts):
    """Properties of DeepEP (github.com/deepseek-ai/DeepEP), which copies and adds rows during the transfer.
    deep_ep/buffer.py lists the group sizes."""

    def count_messages(self, reach: Reach) -> Messages:
        return replace(super().count_messages(reach), copies=())

    def count_buffer_bytes(self, ep: int, hidden: int) -> int:
        """Return the buffer size in bytes for bf16 rows, as in DeepEP's csrc/config.hpp.

        Each of ten channels has `slots` rows per rank of a node and, with several nodes, 2 x 128 rows per node.
        """
        inside, nodes = min(ep, 8), -(-ep // 8)
        slots = 256 if ep <= 8 else 288 if ep <= 64 else 560 if ep <= 128 else 720
        row = 2 * hidden + 8 + 128 * (8 + 4 + 4)
        return 10 * row * (inside * slots + (2 * nodes * 128 if nodes > 1 else 0))


FLAT_DISPATCH = "flat"
"""The default dispatch of a recipe. It supports every layout."""

DISPATCHES: dict[str, DispatchFacts] = {
    each.name: each
    for each in (
        DispatchFacts(FLAT_DISPATCH, per_expert=True),
        DispatchFacts("node_limited", by_nodes=True),
        DeepEPFacts(
            "deepep",
            needs_gpu=True,
            package="deep_ep",
            in_bf16=True,
            repeats=False,
            width=128,
            sizes=(2, 4, 8, 16, 24, 32, 64, 128, 144, 160),
        ),
    )
}


def check_groups(ep: int, ranks_per_node: int, groups: int) -> None:
    """Raise UserError unless the router's expert groups match the nodes (paper 2.1.2, 3.2.2).

    If a group straddled nodes, a token with experts of M groups could need more than M nodes.
    """
    if ep % ranks_per_node:
        raise UserError(
            "cluster.ranks_per_node",
            ranks_per_node,
            f"must divide parallel.ep = {ep}, so that nodes are equal",
            f"set cluster.ranks_per_node to a divisor of {ep}, or parallel.dispatch={FLAT_DISPATCH}",
        )
    nodes = ep // ranks_per_node
    if groups > 1 and groups % nodes:
        raise UserError(
            "model.groups",
            groups,
            f"must be a multiple of the {nodes} nodes that hold a layer's experts, or 1: else a group straddles nodes",
            f"set model.groups={nodes}, or parallel.dispatch={FLAT_DISPATCH}, or change parallel.ep",
        )
