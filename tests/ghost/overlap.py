"""Whether exchanges of experts' rows and reductions of gradients overlap with computation, from the order of launches
and waits on the ghost's streams.

A layer of DeepSeek-V3 on one of 64 ranks, its hops over NCCL's process groups, alone and as a pair of a forward and a backward. DeepEP, whose
package needs a GPU, is a buffer that exchanges rows over such a group in the stream in which it is called.
"""

from typing import Any

import torch
import torch.distributed as dist

from bench.gpu.layer import EP, RANKS_PER_NODE, Layer, layer_config
from parallel.expert.link import Link, Traffic
from parallel.expert.stand_in import DeepEPStandIn, NodeLimitedStandIn
from parallel.mesh import Mesh
from parallel.pipeline.overlap import Lanes
from parallel.zero.engine import Zero
from tests.ghost import ranks
from tests.ghost.log import Event, recorded_events
from train.loop.training_engine import Engine

EXCHANGES = {"node_limited": 8, "deepep": 4}
"""Of a forward and a backward, out and back, by dispatch. In a pair all have computing beside them. Alone half of them have, the shared experts:
while tokens go to their experts, and while their gradients come back."""
COMPUTING = 3
"""Launches that count as such: the shared experts' forward has so many."""


class _SendingBuffer:
    """A stand-in for `deep_ep.Buffer` that also exchanges rows, and waits for them as DeepEP does."""

    def __init__(self, buffer: Any, link: Link, device: torch.device):
        self._buffer, self._link, self._rows_PX = buffer, link, torch.empty(EP, 1, device=device)
        self.get_dispatch_layout = buffer.get_dispatch_layout

    def dispatch(self, *given: Any, **named: Any) -> Any:
        self._exchange()
        return self._buffer.dispatch(*given, **named)

    def combine(self, *given: Any, **named: Any) -> Any:
        self._exchange()
        return self._buffer.combine(*given, **named)

    def _exchange(self) -> None:
        self._link.start_counts(self._rows_PX, Traffic()).wait()


def count_beside(precision: str, dispatch: str) -> dict[str, list[int]]:
    """What is launched on the computing's stream from the start of every exchange to the wait for it, in the order of their starts; alone
    and as a pair."""
    device = torch.device("cuda", 0)
    dist.init_process_group("fake", rank=0, world_size=EP)
    lanes = Lanes(device)
    try:
        layer = Layer(layer_config(precision, dispatch, 1, device), dense=False, device=device)
        dispatcher = next(one.dispatcher for one in layer.chunk.modules() if hasattr(one, "dispatcher"))
        if isinstance(dispatcher, DeepEPStandIn):
            dispatcher.buffer = _SendingBuffer(dispatcher.buffer, _nccl_link(range(EP), EP), device)
        else:
            assert isinstance(dispatcher, NodeLimitedStandIn)
            dispatcher.links = [
                _nccl_link(range(0, EP, RANKS_PER_NODE), EP // RANKS_PER_NODE),
                _nccl_link(range(RANKS_PER_NODE), RANKS_PER_NODE),
            ]
        layer.backward(layer.forward())
        with recorded_events() as alone:
            layer.backward(layer.forward())
        y_BTD = layer.forward()
        with recorded_events() as pair:
            lanes.run(layer.forward, lambda: layer.backward(y_BTD))
        return {"alone": _beside(alone), "pair": _beside(pair)}
    finally:
        lanes.close()
        dist.destroy_process_group()


def problems(dispatch: str, found: dict[str, list[int]]) -> list[str]:
    """What is missing in what `count_beside` gives."""
    said, exchanges = [], EXCHANGES[dispatch]
    for how, beside in found.items():
        hidden, least = (
            sum(launches >= COMPUTING for launches in beside),
            exchanges if how == "pair" else exchanges // 2,
        )
        if len(beside) != exchanges or hidden < least:
            said.append(
                f"{how}: {hidden} of {len(beside)} exchanges fly beside computing, where {least} of {exchanges} can"
            )
    return said


def count_beside_reduction(precision: str) -> list[int]:
    """The same for what ranks of a stage exchange in a step of DualPipeV, first ZeRO's reduction of the chunk that ends first."""
    found, make, run = [], Zero.__init__, Engine.run

    def over_nccl(zero: Zero, chunks: Any, make_optimizer: Any, mesh: Mesh, *rest: Any, **options: Any) -> None:
        _over_nccl(mesh.stage_group, mesh.layout.stage_ranks)
        make(zero, chunks, make_optimizer, mesh, *rest, **options)

    def watched(*args: Any, **options: Any) -> Any:
        with recorded_events() as events:
            result = run(*args, **options)
        found.append(events)
        return result

    Zero.__init__, Engine.run = over_nccl, watched
    try:
        ranks.run_lone("pp 2, ep 2, dualpipev", precision)
    finally:
        Zero.__init__, Engine.run = make, run
    return _beside(found[-1])


def reduction_problems(found: list[int]) -> list[str]:
    """What is missing in what `count_beside_reduction` gives."""
    few = not found or found[0] < COMPUTING
    return ["gradients of the chunk that ends first are reduced beside no computing"] * few


def _nccl_link(ranks: range, size: int) -> Link:
    group = dist.new_group(ranks, backend="fake")
    _over_nccl(group, size)
    return Link(group, range(size) if ranks.step > 1 else [0] * size)


def _over_nccl(group: dist.ProcessGroup, size: int) -> None:
    """Make a fake group NCCL's, which finds no other rank: the ghost asks for none."""
    backend = dist.ProcessGroupNCCL(dist.HashStore(), 0, size, dist.ProcessGroupNCCL.Options())
    group._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, backend)


def _beside(events: list[Event]) -> list[int]:
    """By what each stream has waited for: an exchange is over for a stream that waits for an event behind it."""
    launched, starts, ends = 0, [], {}
    known: dict[int, set[int]] = {0: set()}
    recorded: dict[int, set[int]] = {}
    sending: set[int] = set()
    """Streams on which an exchange was the last."""
    for event in events:
        there = known.setdefault(event.stream, set())
        if event.kind == "collective":
            if event.stream not in sending:
                there.add(len(starts))
                starts.append(launched)
                sending.add(event.stream)
            continue
        if event.kind == "order":
            sending.discard(event.stream)
            if event.name.startswith("cudaEventRecord"):
                recorded[event.bytes] = set(there)
            else:
                there |= recorded.get(event.bytes, set())
        elif event.kind in ("kernel", "product") and event.stream == 0:
            launched += 1
        for one in known[0] - ends.keys():
            ends[one] = launched
    return [ends.get(one, launched) - start for one, start in enumerate(starts)]
