"""Which network interface ranks use: the user's, else that of the route to the other machines."""

import os
import shutil
import subprocess
import sys

import pytest

from cluster.interfaces import interface_of, interface_to, name_interface


def test_an_address_names_its_interface():
    assert interface_of("127.0.0.1") == "lo" == interface_to("::1")
    with pytest.raises(OSError, match=r"has the address 192\.0\.2\.7"):
        interface_of("192.0.2.7")


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", environment := {"NCCL_SOCKET_IFNAME": "ib0"})
    monkeypatch.setattr("cluster.interfaces.interface_to", lambda host: "eth7")
    name_interface("head")
    assert environment == {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth7"}
    name_interface("another")
    assert environment["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.hosts
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2")
def test_ranks_of_several_nodes_use_the_route_to_the_master():
    """In a network of its own with two interfaces: the first has the route to the master, the second the default route."""
    links = [
        "ip link set lo up",
        *(f"ip link add {name} type veth peer name {name}p; ip link set {name}p up; ip addr add {address}/24 dev {name}; ip link set {name} up"
          for name, address in (("fast0", "10.77.1.2"), ("slow0", "10.77.2.2"))),
        "ip route add default dev slow0",
    ]  # fmt: skip
    program = "from cluster.interfaces import interface_to as to; print(to('10.77.1.9'), to('127.0.1.1'))"
    script = "; ".join(links) + f'; exec {sys.executable} -c "{program}"'
    done = subprocess.run(["unshare", "--net", "sh", "-ec", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["fast0", "slow0"], (
        done.stderr
    )  # a host name that means 127.0.1.1 is the master's own
