"""Offloads activations to host memory until backward. The transfer starts at the exit of `OffloadedBlock`.

Each storage is sent once, even if autograd saved several views of it. The following tensors stay on the device:

    the block's input   the code before the block, or a pipeline's stage, keeps it in memory anyway
    weights, buffers    they are on the device anyway
    small tensors       starting their copy takes longer than the copy

Tensors that an inner `RecomputedOutputs` or `ReplaceableTensors` saves are offloaded too.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from conf.thresholds import THRESHOLDS
from train.model.recompute import PackedTensor, SavedContext, Slot


class FetchedStorage(Protocol):
    """A tensor storage that is in host memory."""

    def fetched(self) -> Tensor:
        """Copy the storage to the device; return flat bytes."""


class Host(Protocol):
    """Keeps tensors' storages in host memory until backward."""

    def send(self, storages: Sequence[Tensor]) -> Sequence[FetchedStorage]:
        """Start to copy storages to host memory. storages: flat byte tensors from one `OffloadedBlock`."""


class OffloadedBlock(SavedContext):
    """A context manager that offloads the tensors that autograd saves. stays: tensors that stay on the device."""

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
        """Return the `_OnHost` of a saved tensor that must be copied to the host; else None.

        If an inner context manager saved the tensor, this method creates the `_OnHost`.
        """
        found = kept()
        if isinstance(found, Slot):
            return found.hand_over(_OnHost) if found.tensor is not None and self._goes(found.tensor) else None
        return found


class _OnHost:
    """One saved tensor, on the device or as a view of host memory."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor

    def leave(self, sent: FetchedStorage) -> None:
        """Release the tensor on the device. sent: the host copy of its storage."""
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
    """Return a flat tensor of all bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
