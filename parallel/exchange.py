"""Plain values between ranks: JSON in tensors, and nothing else.

torch's collectives of objects (`all_gather_object`, `broadcast_object_list` and their like) pickle, and whoever can make a
rank read a pickle runs code in it. So no rank sends or reads one: values cross as the bytes of their JSON text, and
`refuse_pickles` makes torch's own functions raise, whoever calls them.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from conf.errors import causes

GLOO_TIMEOUT = re.compile(
    r"^\[\S*gloo\S*:\d+\] (Timed out waiting|Application timeout|(Connect|Read|Wait|Write) timeout)|\AWait timeout\Z",
    re.MULTILINE,
)
"""How gloo says so, which raises plain errors: behind the place in its own source, or, where ranks meet, in these two words."""
TIMEOUT = re.compile("timed out|timeout", re.IGNORECASE)
"""In the words of NCCL and of the store, whose errors have a type."""


def is_timeout(error: BaseException | None) -> bool:
    """Whether gloo, NCCL or the store where ranks meet gave up waiting for another rank, whatever was raised from that. Another's
    error with such words is none of these.
    """
    return any(
        (isinstance(one, dist.DistError) and TIMEOUT.search(str(one)))
        or (isinstance(one, RuntimeError) and GLOO_TIMEOUT.search(str(one)))
        for one in causes(error, contexts=True)
    )


def gather(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in the order of the ranks of the group (None: all). Collective over the group.

    value: what JSON can say; a tuple comes back as a list, a number as itself, also where it is not finite. Every rank
    holds the longest text once per rank, so values should be small. Raises TypeError for what is no JSON.
    """
    text = _encode(value)
    length = torch.tensor([text.numel()])
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, length, group=group)
    padded = text.new_zeros(max(int(each) for each in lengths))
    padded[: text.numel()] = text
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded, group=group)
    return [_decode(text[: int(length)]) for text, length in zip(texts, lengths, strict=True)]


def from_rank_0(make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, on every rank; JSON as in `gather`, of any size. Collective over all ranks."""
    first = dist.get_rank() == 0
    text = _encode(make()) if first else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([text.numel()])
    dist.broadcast(length, src=0)
    if not first:
        text = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(text, src=0)
    return _decode(text)


@contextmanager
def patient_group(timeout: timedelta) -> Iterator[ProcessGroup]:
    """A group of all ranks for a wait that may last longer than any collective of the training. Collective over all ranks."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, ProcessGroup)
    yield group
    dist.destroy_process_group(group)


class RankNotes:
    """Words that a rank leaves for others in the store where they met: for threads, which may use no collective, where no disk takes a word."""

    def __init__(self, store: dist.Store | None = None):
        """store: None for that of all ranks."""
        self._store = store or distributed_c10d._get_default_store()

    def leave(self, name: str, text: str) -> None:
        """Nobody hears of it where the rank that serves the store is gone."""
        with suppress(dist.DistError):
            self._store.set(name, text)

    def read(self, name: str) -> str | None:
        """None where nobody has left any."""
        with suppress(dist.DistError):
            return self._store.get(name).decode() if self._store.check([name]) else None
        return None


def refuse_pickles() -> None:
    """From now on torch's collectives of objects raise in this process, also where torch or DeepSpeed call them."""
    for name in ("_object_to_tensor", "_tensor_to_object", "_pickler", "_unpickler"):
        assert hasattr(distributed_c10d, name), f"torch.distributed.distributed_c10d has no {name} any more"
        setattr(distributed_c10d, name, _refuse)


def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("ranks exchange no pickles, which can run any code: use parallel.exchange")


def _encode(value: Any) -> Tensor:
    """The JSON text as bytes (uint8), on the CPU: every group of ours has a backend for it."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())
