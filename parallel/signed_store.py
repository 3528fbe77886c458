"""A store where ranks of several nodes meet, in a network that strangers can reach.

torch's process groups find each other through a store of keys and values: addresses, and the number that NCCL's connections
ask for. TCPStore takes and hands out values without asking who is there. So its socket listens on the node's own address
alone, and what ranks read in it was written by a rank of the same attempt: every value is encrypted and signed with a
secret that only they have, under its own key. A stranger who finds the port learns no address and cannot place one; all he
can do is make the attempt fail. Counters and the mere presence of keys are not signed: nothing is read from them.
"""

import hashlib
import hmac
import os
import socket
from datetime import timedelta

import torch.distributed as dist

NONCE, SIGNATURE = 16, 32
"""Bytes before and behind every value."""

_clones: list["SealedStore"] = []
"""C++ reaches a Python store only as long as Python holds it too."""


class SealedStore(dist.Store):
    """Another store, whose values only those with the secret can write and read."""

    def __init__(self, store: dist.Store, secret: bytes):
        super().__init__()
        self._store, self._secret = store, secret
        _clones.append(self)

    def clone(self) -> "SealedStore":
        return SealedStore(self._store.clone(), self._secret)  # pyrefly: ignore[missing-attribute]  torch's stub lacks it

    def set(self, key: str, value: str | bytes) -> None:
        text = value.encode() if isinstance(value, str) else value
        nonce = os.urandom(NONCE)
        sealed = nonce + self._cipher(nonce, text) + self._sign(key, nonce, text)
        self._store.set(key, sealed)  # pyrefly: ignore[bad-argument-type]  it takes bytes, too

    def get(self, key: str) -> bytes:
        """Raises PermissionError for a value that nobody with the secret wrote under this key."""
        sealed = self._store.get(key)
        nonce, signature = sealed[:NONCE], sealed[-SIGNATURE:]
        text = self._cipher(nonce, sealed[NONCE:-SIGNATURE])
        if len(sealed) < NONCE + SIGNATURE or not hmac.compare_digest(signature, self._sign(key, nonce, text)):
            raise PermissionError(
                f"{key} in the store where the ranks meet was not written by a rank of this attempt: another program "
                "writes there"
            )
        return text

    def _sign(self, key: str, nonce: bytes, text: bytes) -> bytes:
        name = key.encode()
        return hmac.digest(self._secret, b"".join((len(name).to_bytes(8), name, nonce, text)), "sha256")

    def _cipher(self, nonce: bytes, text: bytes) -> bytes:
        """Both ways: a stream that secret and nonce determine, laid over the text. Python's own library has no cipher."""
        stream = hashlib.shake_256(b"stream" + self._secret + nonce).digest(len(text))
        return (int.from_bytes(text) ^ int.from_bytes(stream)).to_bytes(len(text))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._store.wait(keys, *([] if timeout is None else [timeout]))

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def add(self, key: str, value: int) -> int:
        return self._store.add(key, value)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(key)

    deleteKey = delete_key  # what C++ looks for


def open_sealed_store(rank: int, address: str, port: int, secret: bytes, timeout: timedelta) -> SealedStore:
    """The store of all ranks, served by rank 0 on this address, its own. OSError if it cannot listen there."""
    listener = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family, backlog=2048).detach()
    store = dist.TCPStore(
        address,
        port,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,  # strangers would count
        master_listen_fd=listener,
    )
    return SealedStore(store, secret)
