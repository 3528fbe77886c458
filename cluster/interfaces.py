"""The network interfaces of this machine for gloo and NCCL."""

import contextlib
import errno
import os
import random
import socket
from pathlib import Path

import psutil

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables that name the interface; the user's value is kept."""
ANYWHERE = "192.0.2.1"
"""A documentation address (RFC 5737) with the default route; nothing is sent there."""


def interface_of(address: str) -> str:
    """Return the network interface with this IP address. Raises OSError."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    raise OSError(f"no network interface of {socket.gethostname()} has the address {address}")


def interface_to(host: str) -> str:
    """Return the interface of the route to a host; for this machine, of the default route. Raises OSError without
    address or route.
    """
    return interface_of(address_to(host))


def address_to(host: str) -> str:
    """Return this machine's IP address on the route to a host. Raises OSError."""
    address = _source_address(host)
    return _source_address(ANYWHERE) if address.startswith("127.") else address


def name_interface(host: str) -> None:
    """Make gloo and NCCL use the interface to this host, unless the user named one."""
    if missing := [name for name in NAMES if name not in os.environ]:
        os.environ |= dict.fromkeys(missing, interface_to(host))


def _source_address(host: str) -> str:
    """Return this machine's source IP address for packets to this host."""
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # connect chooses the route and sends nothing
        return probe.getsockname()[0]


# Finds free ports. Another process opens them later.

LOWEST = 20000
"""Ray's own processes use ports below this number."""
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(address: str = "") -> int:
    """Return a port that is free now on this address, by default on all addresses. Raises OSError.

    If possible, the port is outside the range from which the operating system assigns ports. Otherwise another process
    could get this port before a rank opens it.
    """
    lowest_given = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32768
    ports = range(LOWEST, lowest_given) if lowest_given > LOWEST else range(1024, 1 << 16)
    for port in random.sample(ports, min(len(ports), 1000)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((address, port))
            return port
    raise OSError(errno.EADDRINUSE, f"none of 1000 ports between {ports.start} and {ports.stop - 1} is free")
