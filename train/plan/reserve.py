"""Estimates the device memory that tensors cannot use, by name, for plans and dry runs.

    context          the CUDA context, loaded kernels, workspaces of libraries
    communicators    NCCL's buffers for the collectives of every group, and for sends between pipeline stages
    exchange         buffers of the exchange of experts' rows: NCCL's to every rank, or DeepEP's
    fragmentation    gaps between tensors, in torch's allocator

NCCL (2.30, github.com/NVIDIA/nccl) allocates a communicator's buffers at the first collective that needs them. Inside a
node, a connection receives into 10 MiB and sends from 2 MiB (src/transport/p2p.cc). Over a network, it sends from 10
MiB. On every channel, a ring has one connection of each kind, and a tree up to three. For more than two nodes, the
buffers of a group do not grow with the number of ranks (issue 864), only with the channels:

    several ranks per node   16 channels between nodes (issue 1538), with ring and tree: some 0.6 GB. Measured: 0.69 GB
                             on A100 with NVLink, and 0.54 GB for two ranks (issue 964).
    one rank per node        4 channels (issue 1189 reports 8 for two ranks per node).
    sends and exchanges      In a node, every pair of ranks has a connection on up to 32 channels, two per NVLink
                             (src/graph/paths.cc: ncclTopoGetNchannels). Measured: 3.28 GB on eight H100 (issue 1685).
                             Over a network, all peers share two buffers of 2 MiB per channel (src/transport/net.cc:
                             NCCL_SHARED_STEPS).

A group over several nodes divides the channels among its peers, eight at a time (ncclTopoComputeP2pChannels). DeepEP
has its own buffers (conf/dispatches.py).
"""

from functools import lru_cache

from conf.schema import Config
from parallel.layout import Layout
from train.plan.job import device_kind, device_memory, host_ranks, layout_of

MIB = 2**20
CONTEXT = 1_060_000_000
"""Bytes that a process uses on an H100 besides tensors, with torch and NCCL loaded, before the first exchange (nccl
issue 1685). The CUDA context alone uses some 0.4 GB with lazily loaded kernels (pytorch issue 109888)."""
COMMUNICATOR, PAIR_COMMUNICATOR = 688_000_000, 544_000_000
"""Bytes of a communicator for collectives: for a group with several ranks per node, and for a group of two ranks (nccl
issue 964)."""
INSIDE, ACROSS = 12 * MIB, 20 * MIB
"""Bytes of the buffers of a connection in both directions: for a connection inside a node, and for a connection between
nodes."""
CHANNELS_ACROSS = 4
"""Number of channels of a group with one rank per node and one network adapter per rank."""
MOST_CHANNELS = 32
LINK_RATE = 16.7e9
"""Bytes per second of an all-to-all over one of an H100's 18 NVLinks in one direction."""
SHARED = 4 * MIB
"""All sends and receives over a network share this many bytes on every channel."""
PEERS_AT_ONCE = 8
"""Number of peers that NCCL sends to at a time."""
FRAGMENTATION = 0.02
"""Estimated fraction of a device's memory that is lost in gaps between tensors, without a measurement.

torch's expandable segments leave two kinds of gaps: unused parts of pages of 2 MiB, and freed blocks that are too small
for the next tensor.
"""


def reserve_of(config: Config) -> dict[str, int]:
    """Returns the reserved bytes of each device, by name. On a CPU, nothing is reserved. If plan.reserve is set, it
    replaces the estimate."""
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
"""Estimated fraction of a host's memory for the operating system, agents, and the page cache of checkpoints."""
HOST_PROCESS = 3_000_000_000
"""Bytes of host memory that a rank's process needs besides tensors: 0.5 GB for Python and the imported program
(cluster.prefork), and an estimate for CUDA and NCCL."""


def host_memory(config: Config) -> int:
    """Returns the bytes of a host's memory that tensors can use; 0 if the host's memory is unknown."""
    has = int(config.hardware.host_memory_bytes)
    return max(1, int(has * (1 - HOST_SYSTEM)) - host_ranks(config) * HOST_PROCESS) if has else 0


def copies_memory(config: Config) -> int | None:
    """Returns the capacity in bytes of a host's folder of in-memory copies; None if it is on disk or the host's memory
    is unknown."""
    hardware, folder = config.hardware, config.checkpoint.memory_folder
    if not hardware.host_memory_bytes or not f"{folder}/".startswith("/dev/shm/"):
        return None
    return int(hardware.shared_memory_bytes or hardware.host_memory_bytes / 2)


def tensor_memory(config: Config) -> int:
    """Returns the bytes of one device that tensors can use."""
    return device_memory(config) - sum(reserve_of(config).values())


def fragmentation(memory: int) -> int:
    """Returns the estimated bytes of gaps between tensors, for a device with this much memory."""
    return int(FRAGMENTATION * memory)


@lru_cache(maxsize=4096)
def _collectives(layout: Layout) -> int:
    """Returns the bytes of the communicators that a rank needs for collectives.

    A rank has five groups: all ranks, its pipeline, its stage, the ranks that share its sequences, and the ranks with
    its experts. Equal groups share a communicator; groups of one rank have none (parallel/mesh.py).
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
    """Returns the bytes for sends between stages, with at most two other ranks."""
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
    """Returns the bytes of a rank's send and receive buffers, for at most `most` ranks on its node and for all ranks on
    other nodes, which share buffers."""
    others = [layout.node(rank) == layout.node(ranks[0]) for rank in ranks[1:]]
    near, far = min(most, sum(others)), not all(others)
    link = config.hardware.rates.get("inside")
    links = MOST_CHANNELS if link is None else round(link.bandwidth / LINK_RATE)
    channels = min(MOST_CHANNELS, 1 << (2 * links - 1).bit_length() if links else 1)
    if far:
        channels = max(1, min(channels, MOST_CHANNELS // -(-len(ranks) // PEERS_AT_ONCE)))
    return near * channels * INSIDE + far * MOST_CHANNELS * SHARED
