"""The network interfaces of this machine, by which gloo and NCCL reach other machines."""

import os
import socket

import psutil

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that name the interface. A value that the user set is never changed."""
ANYWHERE = "192.0.2.1"
"""An address for documentation (RFC 5737), to which nothing is sent: its route is the default route."""


def interface_of(address: str) -> str:
    """Name of the network interface that has this IP address; OSError if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    raise OSError(f"no network interface of {socket.gethostname()} has the address {address}")


def interface_to(host: str) -> str:
    """Name of the interface of the route to this host. OSError for a host without address or route.

    On the host itself its name often means 127.0.1.1, which other machines cannot reach: the default route counts there.
    """
    address = _source_address(host)
    return interface_of(_source_address(ANYWHERE) if address.startswith("127.") else address)


def name_interface(host: str) -> None:
    """Have gloo and NCCL of this process use the interface of the route to this host, where the user named none."""
    if missing := [name for name in NAMES if name not in os.environ]:
        os.environ |= dict.fromkeys(missing, interface_to(host))


def _source_address(host: str) -> str:
    """The IP address of this machine from which packets to this host start."""
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # chooses the route and sends nothing
        return probe.getsockname()[0]
