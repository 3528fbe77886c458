"""The ways of tokens to experts on other ranks: what each asks of a layout, and what follows from it. No torch.

Whoever wants to know something of a dispatch asks it here and never compares its name. What sends the rows stands in the table of
parallel/expert/build.py; an entry there and one here add a dispatch.
"""

from dataclasses import dataclass, replace

from conf.errors import UserError


@dataclass(frozen=True)
class Reach:
    """How far a token goes, in the mean. Experts lie in order over the ranks of an expert group."""

    nodes: float
    """That hold one of its experts."""
    ranks: float
    experts: int
    ep: int
    """Ranks of the expert group."""
    per_node: int
    """How many of them share a node."""


@dataclass(frozen=True)
class Messages:
    """Messages of one token in one layer of experts, in the mean; of the rank that has most."""

    copies: tuple[float, ...]
    """That each hop makes by kernels of its own, beside the exchange; those kept included."""
    arrivals: float
    """That reach the expert's ranks, per token of a rank."""
    inside: float
    """To other ranks of the same node."""
    across: float
    """To other nodes."""


@dataclass(frozen=True)
class DispatchFacts:
    """What is known of a dispatch."""

    name: str
    per_expert: bool = False
    """A token is sent once for each of its experts; else once to each node that has one, and there once to each rank."""
    by_nodes: bool = False
    """One hop between nodes, and behind it one inside them: nodes have equally many ranks of an expert group, and whole groups of
    experts."""
    needs_gpu: bool = False
    package: str | None = None
    """What has to be installed for it."""
    in_bf16: bool = False
    """It takes bf16 rows alone, and adds those of a rank one after another in bf16."""
    repeats: bool = True
    """Rows arrive in the same order in every run."""
    width: int = 1
    """What model.hidden is a multiple of."""
    sizes: tuple[int, ...] | None = None
    """Sizes of an expert group that it has; None for any."""

    def is_able(self, ep: int, hidden: int, on_gpu: bool) -> bool:
        """Whether it runs over so many ranks, with rows of this width."""
        fits = hidden % self.width == 0 and (self.sizes is None or ep in self.sizes)
        return fits and (on_gpu or not self.needs_gpu)

    def count_messages(self, reach: Reach) -> Messages:
        """How often a token is sent."""
        other_node, same_node = 1 - reach.per_node / reach.ep, (reach.per_node - 1) / reach.ep
        if self.per_expert:
            experts = reach.experts
            return Messages((experts,), experts, experts * same_node, experts * other_node)
        over_both = reach.ep > reach.per_node and reach.per_node > 1
        copies = (reach.nodes, reach.ranks) if over_both else (reach.ranks,)
        return Messages(copies, reach.ranks, reach.ranks * (1 - 1 / reach.per_node), reach.nodes * other_node)

    def side_bytes(self, top_k: int) -> int:
        """What travels beside a row to the experts: one gate, or all gates and experts of the token."""
        return 4 if self.per_expert else 4 * top_k + -(-2 * top_k // 4) * 4

    def gate_bytes(self, top_k: int) -> int:
        """What travels beside a row's gradient on its way back: the gradients of those gates."""
        return 4 if self.per_expert else 4 * top_k

    def find_links(self, ep: int, per_node: int) -> tuple[range, ...]:
        """Ranks of the expert group that the first of them exchanges rows with through NCCL, in each hop."""
        return (range(0, ep, per_node), range(per_node)) if self.by_nodes else (range(ep),)

    def count_buffer_bytes(self, ep: int, hidden: int) -> int | None:
        """What its own buffers take of every device; None for rows that travel through NCCL's."""
        return None

    def find_sums(self, experts: int, ep: int, per_node: int) -> list[int]:
        """Runs of experts whose rows of a token are added before they reach its rank: those of a rank, those of a node."""
        if self.per_expert or ep == 1:
            return []
        of_rank = experts // ep
        of_node = of_rank * per_node
        return [of_rank, of_node] if self.by_nodes and of_rank < of_node < experts else [of_rank]


@dataclass(frozen=True)
class DeepEPFacts(DispatchFacts):
    """The package DeepEP (github.com/deepseek-ai/DeepEP), which copies and adds rows while it sends them; sizes as in its deep_ep/buffer.py."""

    def count_messages(self, reach: Reach) -> Messages:
        return replace(super().count_messages(reach), copies=())

    def count_buffer_bytes(self, ep: int, hidden: int) -> int:
        """By the formulas of csrc/config.hpp, for bf16 rows: ten channels, each with slots for every rank of a node and, twice, for
        every node."""
        inside, nodes = min(ep, 8), -(-ep // 8)
        slots = 256 if ep <= 8 else 288 if ep <= 64 else 560 if ep <= 128 else 720
        row = 2 * hidden + 8 + 128 * (8 + 4 + 4)
        return 10 * row * (inside * slots + (2 * nodes * 128 if nodes > 1 else 0))


FLAT_DISPATCH = "flat"
"""What a recipe has that asks for nothing else; it runs wherever any other does."""

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
    """Raise UserError unless the router's expert groups and the nodes fit each other (paper 2.1.2, 3.2.2).

    Nodes are runs of ranks_per_node ranks of an expert-parallel group. A group of experts may not straddle two
    nodes, or a token limited to M groups could reach more than M nodes. One group means no limit and always fits.
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
