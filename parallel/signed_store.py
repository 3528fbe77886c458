"""A store through which ranks of several nodes find each other, safe in a network with untrusted hosts.

torch's ranks exchange addresses, and the id for NCCL's connections, through a TCPStore, which has no authentication.
Sluice makes TCPStore's socket listen only on the node's own address. It encrypts every value, and signs it together
with its key. Each attempt (a start of all ranks of the run) has its own secret, which other hosts do not know.

An attacker who finds the port cannot read or insert an address, but can make the attempt fail. Counters and the
existence of keys are not signed.
"""

import hashlib
import hmac
import os
import socket
from datetime import timedelta

import torch.distributed as dist

NONCE, SIGNATURE = 16, 32
"""Bytes of the nonce before a value, and the signature after it."""

_clones: list["SealedStore"] = []
"""Cloned stores, kept alive: C++ does not hold a reference to a Python store."""


class SealedStore(dist.Store):
    """Wraps a store: only ranks with the secret can write and read its values."""

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
        """Return a value. Raises PermissionError if its signature is wrong."""
        sealed = self._store.get(key)
        nonce, signature = sealed[:NONCE], sealed[-SIGNATURE:]
        text = self._cipher(nonce, sealed[NONCE:-SIGNATURE])
        if len(sealed) < NONCE + SIGNATURE or not hmac.compare_digest(signature, self._sign(key, nonce, text)):
            raise PermissionError(
                f"{key} in the rendezvous store was not written by a rank of this attempt: another program writes there"
            )
        return text

    def _sign(self, key: str, nonce: bytes, text: bytes) -> bytes:
        name = key.encode()
        return hmac.digest(self._secret, b"".join((len(name).to_bytes(8), name, nonce, text)), "sha256")

    def _cipher(self, nonce: bytes, text: bytes) -> bytes:
        """Encrypt or decrypt by XOR with a stream from the secret and the nonce."""
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

    deleteKey = delete_key  # the name that C++ looks for


def open_sealed_store(rank: int, address: str, port: int, secret: bytes, timeout: timedelta) -> SealedStore:
    """Open the store of all ranks. Rank 0 serves it on `address`, or raises OSError if it cannot listen there."""
    listener = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family, backlog=2048).detach()
    store = dist.TCPStore(
        address,
        port,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,  # connections of untrusted hosts would count as workers
        master_listen_fd=listener,
    )
    return SealedStore(store, secret)
