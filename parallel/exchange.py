"""Exchanges plain values between ranks, as JSON text in tensors.

A pickle can run any code in its reader, so `refuse_pickles` makes torch's object collectives raise.
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
"""Matches gloo's messages about a time-out, which have no error class."""
TIMEOUT = re.compile("timed out|timeout", re.IGNORECASE)
"""Matches the time-out messages of NCCL and torch's store."""


def is_timeout(error: BaseException | None) -> bool:
    """Whether the error, or its cause, is a time-out of gloo, NCCL or the store."""
    return any(
        (isinstance(one, dist.DistError) and TIMEOUT.search(str(one)))
        or (isinstance(one, RuntimeError) and GLOO_TIMEOUT.search(str(one)))
        for one in causes(error, contexts=True)
    )


def gather(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Return every rank's value, in the rank order of the group (None: all ranks). Collective over the group.

    value: a small JSON value, even with non-finite numbers; a tuple is returned as a list. Raises TypeError for other
    values.
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
    """Run `make` on rank 0 and return its JSON result, of any size, on every rank. Collective over all ranks."""
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
    """Create a group of all ranks with this timeout for the block. Collective over all ranks."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, ProcessGroup)
    yield group
    dist.destroy_process_group(group)


class RankNotes:
    """Short texts that ranks write to the common store. Threads use them, because threads must not use collectives."""

    def __init__(self, store: dist.Store | None = None):
        """store: None for the store of all ranks."""
        self._store = store or distributed_c10d._get_default_store()

    def leave(self, name: str, text: str) -> None:
        """Write a text under this name. The text is lost if the store's rank has ended."""
        with suppress(dist.DistError):
            self._store.set(name, text)

    def read(self, name: str) -> str | None:
        """Return the text under this name; None if there is none."""
        with suppress(dist.DistError):
            return self._store.get(name).decode() if self._store.check([name]) else None
        return None


def refuse_pickles() -> None:
    """Make torch's object collectives raise an error in this process, even if torch or DeepSpeed calls them."""
    for name in ("_object_to_tensor", "_tensor_to_object", "_pickler", "_unpickler"):
        assert hasattr(distributed_c10d, name), f"torch.distributed.distributed_c10d has no {name}"
        setattr(distributed_c10d, name, _refuse)


def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("ranks must not exchange pickles, which can run any code: use parallel.exchange")


def _encode(value: Any) -> Tensor:
    """Return a value's JSON text as uint8 on the CPU, which every group can send."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())
