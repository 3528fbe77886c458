"""Ports for processes that open them later."""

import contextlib
import errno
import random
import socket
from pathlib import Path

LOWEST = 20000
"""Ray's own processes take ports up to here."""
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(address: str = "") -> int:
    """A port that is free now on this address, or on all of this machine.

    None of those that the system itself gives to connections and to servers that ask for any: between the answer and its use
    lie the imports of a rank, in which a busy machine opens hundreds. Raises OSError where none is free.
    """
    lowest_given = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32768
    ports = range(LOWEST, lowest_given) if lowest_given > LOWEST else range(1024, 1 << 16)
    for port in random.sample(ports, min(len(ports), 1000)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((address, port))
            return port
    raise OSError(errno.EADDRINUSE, f"none of 1000 ports between {ports.start} and {ports.stop - 1} is free")
