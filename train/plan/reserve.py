"""Estimates the device memory that tensors cannot use, by name, for plans and dry runs.

    context          CUDA context, loaded kernels, workspaces of libraries
    communicators    NCCL's buffers for collectives, and for sends between pipeline stages
    exchange         NCCL's or DeepEP's buffers for the rows of experts
    fragmentation    gaps between tensors, in torch's allocator

NCCL (2.30, github.com/NVIDIA/nccl) allocates buffers per channel and connection:

    inside a node    10 MiB for receiving, 2 MiB for sending (src/transport/p2p.cc)
    between nodes    10 MiB for receiving, 10 MiB for sending

On a channel, a ring has one connection of each kind, and a tree has up to three. In a group over more than two
nodes, the buffers do not grow with the number of ranks, only with the number of channels (issue 864):

    several ranks per node   A group has 16 channels between nodes (issue 1538). Measured: 0.69 GB on A100 with NVLink,
                             0.54 GB for a group of two ranks (issue 964).
    one rank per node        A group has 4 channels (issue 1189 reports 8 for two ranks per node).
    sends and exchanges      In a node, a pair of ranks has up to 32 channels, two per NVLink (src/graph/paths.cc).
                             Measured: 3.28 GB on eight H100 (issue 1685). Between nodes, all peers share two buffers of
                             2 MiB per channel (src/transport/net.cc).

In a group over several nodes, each rank divides its channels among its peers, in units of eight peers
(ncclTopoComputeP2pChannels). The sizes of DeepEP's buffers are in conf/dispatches.py.
"""

from functools import lru_cache

from conf.schema import Config
from parallel.layout import Layout
from train.plan.job import device_kind, device_memory, host_ranks, layout_of

MIB = 2**20
CONTEXT = 1_060_000_000
"""Bytes of a process on an H100 without tensors, before the first exchange (nccl issue 1685)."""
COMMUNICATOR, PAIR_COMMUNICATOR = 688_000_000, 544_000_000
"""Bytes of a communicator in two cases: several ranks per node, and a group of only two ranks (nccl issue 964)."""
INSIDE, ACROSS = 12 * MIB, 20 * MIB
"""Bytes of the buffers of one connection, for sending and receiving: inside a node, and between nodes."""
CHANNELS_ACROSS = 4
"""Number of channels of a group with one rank per node."""
MOST_CHANNELS = 32
LINK_RATE = 16.7e9
"""Bytes per second of an all-to-all over one of an H100's 18 NVLinks in one direction."""
SHARED = 4 * MIB
"""Bytes per channel of the buffers that all peers on other nodes share."""
PEERS_AT_ONCE = 8
"""Number of peers that NCCL sends to at a time."""
FRAGMENTATION = 0.02
"""Estimated fraction of device memory in gaps between tensors."""


def reserve_of(config: Config) -> dict[str, int]:
    """Returns the reserved bytes of a device by purpose: an estimate, or the value of plan.reserve."""
    if device_kind(config) == "cpu":
        return {}
    if config.plan.reserve is not None:
        return {"given": int(config.plan.reserve)}
    layout = layout_of(config)
    return {
        "context": CONTEXT,
        "communicators": _collectives(layout) + _sends(config, layout),
        "exchange": _exchange(config, layout),
        "fragmentation": fragmentation(int(config.hardware.memory_bytes)),  # 0 if the memory is unknown
    }


HOST_SYSTEM = 0.05
"""Estimated fraction of a host's memory for system, agents and page cache."""
HOST_PROCESS = 3_000_000_000
"""Estimated bytes of host memory of a rank's process, without tensors."""


def host_memory(config: Config) -> int:
    """Returns a host's bytes of memory for tensors; 0 if unknown."""
    has = int(config.hardware.host_memory_bytes)
    return max(1, int(has * (1 - HOST_SYSTEM)) - host_ranks(config) * HOST_PROCESS) if has else 0


def copies_memory(config: Config) -> int | None:
    """Returns the bytes of a host's memory that in-memory copies may use.

    None: the folder of the copies is on disk, or the host's memory is unknown.
    """
    hardware, folder = config.hardware, config.checkpoint.memory_folder
    if not hardware.host_memory_bytes or not f"{folder}/".startswith("/dev/shm/"):
        return None
    return int(hardware.shared_memory_bytes or hardware.host_memory_bytes / 2)


def tensor_memory(config: Config) -> int:
    """Returns the bytes of one device that tensors can use."""
    return device_memory(config) - sum(reserve_of(config).values())


def fragmentation(memory: int) -> int:
    """Returns the estimated bytes of gaps between tensors."""
    return int(FRAGMENTATION * memory)


@lru_cache(maxsize=4096)
def _collectives(layout: Layout) -> int:
    """Returns the bytes of a rank's communicators for collectives.

    Equal groups share one communicator; groups of one rank have none (parallel/mesh.py).
    """
    stage = layout.stage_ranks
    pipeline = range(0, layout.world, stage)
    groups = {range(layout.world), pipeline, range(stage), range(layout.cp), range(0, stage, layout.ep)}
    return sum(_communicator(layout, ranks) for ranks in groups if len(ranks) > 1)


def _communicator(layout: Layout, ranks: range) -> int:
    nodes = len({layout.node(rank) for rank in ranks})
    if nodes == len(ranks):  # a ring, and a tree with up to three neighbours
        return CHANNELS_ACROSS * ACROSS * (1 + min(3, len(ranks) - 1))
    return COMMUNICATOR if len(ranks) > 2 else PAIR_COMMUNICATOR


def _sends(config: Config, layout: Layout) -> int:
    """Returns the bytes for sends to at most two other stages."""
    return _peers(config, layout, range(0, layout.world, layout.stage_ranks), 2)


def _exchange(config: Config, layout: Layout) -> int:
    if layout.ep == 1:
        return 0
    dispatch = config.parallel.dispatch_facts
    own = dispatch.count_buffer_bytes(layout.ep, config.model.hidden)
    if own is not None:
        return own
    links = dispatch.find_links(layout.ep, layout.ep_ranks_per_node)
    return sum(_peers(config, layout, ranks, layout.ep) for ranks in links)


def _peers(config: Config, layout: Layout, ranks: range, most: int) -> int:
    """Returns the bytes of a rank's send and receive buffers.

    most: maximum number of peers on the rank's node
    """
    others = [layout.node(rank) == layout.node(ranks[0]) for rank in ranks[1:]]
    near, far = min(most, sum(others)), not all(others)
    link = config.hardware.rates.get("inside")
    links = MOST_CHANNELS if link is None else round(link.bandwidth / LINK_RATE)
    channels = min(MOST_CHANNELS, 1 << (2 * links - 1).bit_length() if links else 1)
    if far:
        channels = max(1, min(channels, MOST_CHANNELS // -(-len(ranks) // PEERS_AT_ONCE)))
    return near * channels * INSIDE + far * MOST_CHANNELS * SHARED
