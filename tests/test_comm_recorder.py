"""What a process communicates is seen while that is asked for, and as it was before once it is over."""

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from cluster.comm_ring import CommRing, read_trace
from parallel.comm_recorder import GROUP_METHODS, CommRecorder


def test_what_ends_is_as_before(tmp_path):
    before = {name: vars(ProcessGroup).get(name) for name in GROUP_METHODS}
    ring = CommRing(tmp_path / "rank_0.ring", 0, 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with CommRecorder(ring).recording():
            dist.barrier()
            dist.all_reduce(torch.ones(3))
        dist.barrier()
        dist.all_reduce(torch.ones(5))
    finally:
        dist.destroy_process_group()
    assert {name: vars(ProcessGroup).get(name) for name in GROUP_METHODS} == before
    seen = [(one.kind, one.sent) for one in read_trace((tmp_path / "rank_0.ring").read_bytes()).records]
    assert seen == [("barrier", 0), ("all_reduce", 3)]
