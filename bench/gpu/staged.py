"""Process groups for several ranks on one GPU, which NCCL rejects: gloo transfers tensors through the host.

Every exchange starts when it is called, on copies, and its results are written to the GPU when it is waited for. So all
GPU work of a step is real; only NCCL and the links between cards are missing.
"""

import torch
import torch.distributed as dist
from torch import Tensor

NAME = "staged"
OPERATIONS = (
    "allreduce", "broadcast", "allgather", "_allgather_base", "reduce_scatter", "_reduce_scatter_base", "alltoall_base",
    "alltoall", "reduce", "gather", "scatter", "recv",
)  # fmt: skip
"""Those that write to their first argument."""
NEWER = {
    "all_gather_single": "_allgather_base", "reduce_scatter_single": "_reduce_scatter_base", "all_to_all_single": "alltoall_base",
}  # fmt: skip
"""Names under which torch 2.13 calls some of them."""


class StagedWork(dist._Work):
    """An exchange in flight on the host."""

    def __init__(self, work: dist.Work, written: list[tuple[Tensor, Tensor]], held: object):
        super().__init__()
        self._work, self._written, self._held = work, written, held

    def wait(self, timeout=None) -> bool:
        self._work.wait()
        with torch.no_grad():
            for target, source in self._written:
                target.copy_(source)
        self._written, self._held = [], None
        return True

    def is_completed(self) -> bool:
        return self._work.is_completed()


class StagedGroup(dist.ProcessGroup):
    """One rank's end of a group."""

    def __init__(self, store, rank: int, size: int, timeout):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return NAME

    def send(self, tensors: list[Tensor], to: int, tag: int) -> StagedWork:
        copies = [tensor.cpu().clone() for tensor in tensors]
        return StagedWork(self._gloo.send(copies, to, tag), [], copies)

    def barrier(self, *options) -> StagedWork:
        return StagedWork(self._gloo.barrier(*options), [], None)


def _operation(name: str):
    def run(self: StagedGroup, *arguments) -> StagedWork:
        written: list[tuple[Tensor, Tensor]] = []
        first, rest = _host(arguments[0], written), [_host(argument, []) for argument in arguments[1:]]
        return StagedWork(getattr(self._gloo, name)(first, *rest), written, (first, rest))

    return run


def _host(argument, copied: list[tuple[Tensor, Tensor]]):
    """The argument with every tensor, in lists of lists too, as a copy on the host."""
    if isinstance(argument, list | tuple):
        return [_host(one, copied) for one in argument]
    if not isinstance(argument, Tensor):
        return argument
    copy = argument.detach().cpu().clone(memory_format=torch.contiguous_format)
    copied.append((argument, copy))
    return copy


for _name in OPERATIONS:
    setattr(StagedGroup, _name, _operation(_name))
for _name, _older in NEWER.items():
    setattr(StagedGroup, _name, _operation(_older))


def register() -> None:
    """Make the backend known to init_process_group, for tensors of both kinds."""
    dist.Backend.register_backend(NAME, StagedGroup, devices=["cpu", "cuda"])
