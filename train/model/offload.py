"""Activations that leave the device until backward: what is saved inside a context goes to the host where the context ends.

What goes are storages, each once, whatever views of it were saved. What stays:

    the block's input   other parts hold it: the part before as its output, a pipeline's stage
    weights, buffers    they are there anyway
    small tensors       a copy takes longer to start than to run

What a `RecomputedOutputs` or a `ReplaceableTensors` further in keeps goes to the host as well; what it makes again does not exist.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from conf.thresholds import THRESHOLDS
from train.model.recompute import PackedTensor, SavedContext, Slot


class FetchedStorage(Protocol):
    """Stands for a storage that is on the host."""

    def fetched(self) -> Tensor:
        """The storage on the device, flat and in bytes."""


class Host(Protocol):
    """Keeps storages until backward."""

    def send(self, storages: Sequence[Tensor]) -> Sequence[FetchedStorage]:
        """Take storages, flat and in bytes, which were saved together."""


class OffloadedBlock(SavedContext):
    """See above. stays: the block's input, weights and buffers."""

    def __init__(self, host: Host, stays: Iterable[Tensor]):
        self._host = host
        self._stays = {tensor.untyped_storage()._cdata for tensor in stays}
        self._kept: list[weakref.ref[_OnHost | Slot]] = []

    def pack(self, saved: Tensor | PackedTensor) -> Tensor | PackedTensor:
        if isinstance(saved, Tensor):
            saved = _OnHost(saved) if self._goes(saved) else saved
        if isinstance(saved, _OnHost | Slot):
            self._kept.append(weakref.ref(saved))
        return saved

    def _goes(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        return storage.nbytes() > THRESHOLDS.stays_bytes and storage._cdata not in self._stays

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if error[0] is None:
            self._send()

    def _send(self) -> None:
        places: dict[int, list[_OnHost]] = {}
        storages: list[Tensor] = []
        for place in filter(None, map(self._place, self._kept)):
            assert place.tensor is not None
            key = place.tensor.untyped_storage()._cdata
            if key not in places:
                storages.append(_flat(place.tensor.untyped_storage(), place.tensor.device))
            places.setdefault(key, []).append(place)
        if storages:
            for sent, ones in zip(self._host.send(storages), places.values(), strict=True):
                for one in ones:
                    one.leave(sent)

    def _place(self, kept: "weakref.ref[_OnHost | Slot]") -> "_OnHost | None":
        """The place of a tensor that is still wanted; of one that a context further in has, made now."""
        found = kept()
        if isinstance(found, Slot):
            return found.hand_over(_OnHost) if found.tensor is not None and self._goes(found.tensor) else None
        return found


class _OnHost:
    """One tensor that was saved."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor

    def leave(self, sent: FetchedStorage) -> None:
        """Let go of the tensor, which is part of what was sent."""
        tensor, self.tensor = self.tensor, None
        assert tensor is not None
        self._sent = sent
        self._view = tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()

    def unpack(self) -> Tensor:
        if self.tensor is not None:
            return self.tensor
        dtype, *place = self._view
        flat = self._sent.fetched()
        return torch.empty(0, dtype=dtype, device=flat.device).set_(flat.untyped_storage(), *place)


def _flat(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    """All bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
