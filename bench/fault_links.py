"""Runs ranks of this machine as separate hosts whose links can be slow, lossy or cut. Needs root and Linux.

Each rank is in a network namespace with a TUN device, and a process between them forwards packets, or drops them. netem
could do this in the kernel, but many kernels lack that module.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from cluster.spawn import die_with_parent

NETWORK, DEVICE = "10.88.0", "tun0"
LINKS = {"link_cut": (0.0, 1.0), "link_lossy": (0.0, 0.9), "link_slow": (2e-4, 0.0)}
"""For each fault: seconds that a byte takes, and the share of packets that are lost."""
_NEW_NETWORK, _SET_DEVICE, _TUN_WITHOUT_HEADER = 0x40000000, 0x400454CA, 0x1001


class LinkedHosts:
    """`count` hosts. `faults` has the fault of a host's link. The link breaks when the file struck_HOST appears in the
    folder."""

    def __init__(self, count: int, faults: dict[int, str], folder: Path):
        """Raises OSError if namespaces or devices are not allowed."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        mine, self._spaces, tunnels = os.open("/proc/self/ns/net", os.O_RDONLY), list[int](), list[int]()
        for host in range(count):
            self._call(self._libc.unshare, _NEW_NETWORK)
            self._spaces.append(os.open("/proc/self/ns/net", os.O_RDONLY))
            tunnel = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(tunnel, _SET_DEVICE, struct.pack("16sH", DEVICE.encode(), _TUN_WITHOUT_HEADER))
            tunnels.append(tunnel)
            for words in (f"addr add {NETWORK}.{host + 1}/24 dev {DEVICE}", f"link set {DEVICE} up", "link set lo up"):
                subprocess.run(["ip", *words.split()], check=True)
        self._call(self._libc.setns, mine, _NEW_NETWORK)
        if os.fork() == 0:
            die_with_parent()
            relay(tunnels, faults, folder)

    def enter(self, host: int) -> None:
        """From now on this process runs on that host."""
        self._call(self._libc.setns, self._spaces[host], _NEW_NETWORK)

    def _call(self, function: Callable[..., int], *given: int) -> None:
        if function(*given):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def relay(tunnels: list[int], faults: dict[int, str], folder: Path) -> None:
    """Forward packets until this process is killed."""
    waiting, free, chance, broken = [], dict[tuple[int | None, bool], float](), random.Random(0), set[int]()
    look = 0.0
    while True:
        now = time.monotonic()
        if now >= look:
            broken, look = {host for host in faults if (folder / f"struck_{host}").exists()}, now + 0.05
        while waiting and waiting[0][0] <= now:
            _, _, tunnel, packet = heapq.heappop(waiting)
            os.write(tunnel, packet)
        until = min(look, waiting[0][0] if waiting else look)
        for tunnel in select.select(tunnels, [], [], max(0.0, until - now))[0]:
            packet = os.read(tunnel, 65536)
            source, target = packet[15] - 1, packet[19] - 1
            if packet[0] >> 4 != 4 or not 0 <= target < len(tunnels):
                continue
            bad = next((host for host in (source, target) if host in broken), None)
            slow, lost = LINKS[faults[bad]] if bad is not None else (0.0, 0.0)
            if bad is None or chance.random() >= lost:
                way = bad, source == bad
                free[way] = max(now, free.get(way, 0.0)) + slow * len(packet)
                heapq.heappush(waiting, (free[way], time.monotonic_ns(), tunnels[target], packet))
