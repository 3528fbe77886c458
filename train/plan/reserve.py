"""Device memory that tensors cannot use, by name; plans and dry runs share this estimate.

    context          the CUDA context, loaded kernels, workspaces of libraries
    communicators    NCCL's buffers for the collectives of every group, and for sends between pipeline stages
    exchange         buffers of the exchange of experts' rows: NCCL's to every rank, or DeepEP's
    fragmentation    gaps between tensors, in torch's allocator

NCCL (2.30; the files are in github.com/NVIDIA/nccl) allocates a communicator's buffers at the first collective that
needs them. Inside a node, a connection receives into 10 MiB and sends from 2 MiB (src/transport/p2p.cc: three protocols
of 0.5, 4.7 and 4 MiB, rounded up); over a network, it sends from 10 MiB. A ring has one connection of each kind on
every channel, a tree up to three. So a group's buffers depend on its channels, and beyond two nodes not on its ranks
(issue 864):

    several ranks a node     16 channels over nodes (issue 1538: two nodes of eight H100), ring and tree: some 0.6 GB;
                             measured on A100 with NVLink: 0.69 GB, and 0.54 GB for two ranks (issue 964)
    one rank a node          4 channels (issue 1189: 8 for two ranks a node)
    sends and exchanges      inside a node, every pair of ranks has a connection on each of up to 32 channels, two for
                             every NVLink (src/graph/paths.cc: ncclTopoGetNchannels); measured on eight H100: 3.28 GB
                             (issue 1685). Over a network, all peers share two buffers of 2 MiB per channel
                             (src/transport/net.cc: NCCL_SHARED_STEPS)

A group over several nodes divides the channels among its peers, eight at a time (ncclTopoComputeP2pChannels). DeepEP
has its own buffers (conf/dispatches.py).
"""

from functools import lru_cache

from conf.schema import Config
from parallel.layout import Layout
from train.plan.job import device_kind, device_memory, host_ranks, layout_of

MIB = 2**20
CONTEXT = 1_060_000_000
"""Bytes besides tensors on an H100 with torch and NCCL loaded, before its first exchange (nccl issue 1685).

The context alone uses some 0.4 GB if kernels are loaded lazily (pytorch issue 109888).
"""
COMMUNICATOR, PAIR_COMMUNICATOR = 688_000_000, 544_000_000
"""Bytes of a communicator for collectives: in a group with several ranks per node, and in a group of two (nccl issue
964)."""
INSIDE, ACROSS = 12 * MIB, 20 * MIB
"""Bytes of a connection in both directions."""
CHANNELS_ACROSS = 4
"""Channels of a group with one rank per node; each rank has one network adapter."""
MOST_CHANNELS = 32
LINK_RATE = 16.7e9
"""Bytes per second of an all-to-all over one NVLink in one direction: an H100's rate in conf/hardware, divided by
18."""
SHARED = 4 * MIB
"""Bytes that sends and receives share over a network, on every channel."""
PEERS_AT_ONCE = 8
"""Peers that NCCL sends to at a time."""
FRAGMENTATION = 0.02
"""Share of the device. Not measured yet.

With expandable segments, which runs enable, gaps are pages of 2 MiB and remainders of tensors of other sizes.
"""


def reserve_of(config: Config) -> dict[str, int]:
    """Bytes of each device by name; a CPU has none. plan.reserve replaces the estimate."""
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
"""Share of a host's memory for the operating system, agents, and the page cache for checkpoints. An estimate."""
HOST_PROCESS = 3_000_000_000
"""Bytes of a rank's process besides tensors: 0.5 GB for Python with the imported program (cluster.prefork).

The rest is an estimate of the memory that CUDA and NCCL map and lock.
"""


def host_memory(config: Config) -> int:
    """Bytes of a host that tensors of its ranks can use; 0 if the host's memory is unknown."""
    has = int(config.hardware.host_memory_bytes)
    return max(1, int(has * (1 - HOST_SYSTEM)) - host_ranks(config) * HOST_PROCESS) if has else 0


def copies_memory(config: Config) -> int | None:
    """Bytes of a host for copies in memory; None if they are on a disk, or the memory is unknown."""
    hardware, folder = config.hardware, config.checkpoint.memory_folder
    if not hardware.host_memory_bytes or not f"{folder}/".startswith("/dev/shm/"):
        return None
    return int(hardware.shared_memory_bytes or hardware.host_memory_bytes / 2)


def tensor_memory(config: Config) -> int:
    """Bytes of one device that tensors can use."""
    return device_memory(config) - sum(reserve_of(config).values())


def fragmentation(memory: int) -> int:
    """Estimated bytes of gaps between tensors, for a memory of this size."""
    return int(FRAGMENTATION * memory)


@lru_cache(maxsize=4096)
def _collectives(layout: Layout) -> int:
    """Bytes of communicators for the collectives of all groups of ranks.

    Groups: all ranks, a pipeline, a stage, a context, and the copies of experts. Groups with the same ranks share a
    communicator, and groups of one rank have none (parallel/mesh.py). Only the first group of each kind counts,
    because its others are equal.
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
    """Between stages: a rank has up to two neighbours."""
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
    """Bytes for sends and receives of a group's first rank with at most `most` other ranks; those of its node count
    first."""
    others = [layout.node(rank) == layout.node(ranks[0]) for rank in ranks[1:]]
    near, far = min(most, sum(others)), not all(others)
    link = config.hardware.rates.get("inside")
    links = MOST_CHANNELS if link is None else round(link.bandwidth / LINK_RATE)
    channels = min(MOST_CHANNELS, 1 << (2 * links - 1).bit_length() if links else 1)
    if far:
        channels = max(1, min(channels, MOST_CHANNELS // -(-len(ranks) // PEERS_AT_ONCE)))
    return near * channels * INSIDE + far * MOST_CHANNELS * SHARED
