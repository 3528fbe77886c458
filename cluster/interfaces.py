"""The network interfaces of this machine through which gloo and NCCL reach other machines."""

import contextlib
import errno
import os
import random
import socket
from pathlib import Path

import psutil

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables that name the interface. Sluice never changes the user's value."""
ANYWHERE = "192.0.2.1"
"""A documentation address (RFC 5737), to which nothing is sent. Its route is the default route."""


def interface_of(address: str) -> str:
    """Return the name of the network interface with this IP address. Raises OSError if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    raise OSError(f"no network interface of {socket.gethostname()} has the address {address}")


def interface_to(host: str) -> str:
    """Return the interface of this machine's route to a host. If the host is this machine, the interface of the default
    route is returned. Raises OSError for a host without address or route.
    """
    return interface_of(address_to(host))


def address_to(host: str) -> str:
    """Return this machine's IP address on the route to a host. Raises OSError for a host without address or route."""
    address = _source_address(host)
    return _source_address(ANYWHERE) if address.startswith("127.") else address


def name_interface(host: str) -> None:
    """Make gloo and NCCL in this process use the interface of the route to this host, unless the user named one."""
    if missing := [name for name in NAMES if name not in os.environ]:
        os.environ |= dict.fromkeys(missing, interface_to(host))


def _source_address(host: str) -> str:
    """Return this machine's source IP address for packets to this host."""
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # connect chooses the route and sends nothing
        return probe.getsockname()[0]


# Finds free ports. The port is not opened here; another process opens it later.

LOWEST = 20000
"""Ray's own processes use ports below this number."""
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(address: str = "") -> int:
    """Return a port that is free now on this address, or without an address, on all addresses of this machine.

    The port is outside the range of ports that the system assigns. A rank opens the port only after its imports. Until
    then, a busy machine may use hundreds of ports of that range. Raises OSError if no port is free.
    """
    lowest_given = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32768
    ports = range(LOWEST, lowest_given) if lowest_given > LOWEST else range(1024, 1 << 16)
    for port in random.sample(ports, min(len(ports), 1000)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((address, port))
            return port
    raise OSError(errno.EADDRINUSE, f"none of 1000 ports between {ports.start} and {ports.stop - 1} is free")
