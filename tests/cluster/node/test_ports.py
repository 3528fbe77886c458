"""Reserves ports for processes that open them later."""

import socket

import pytest

from cluster import interfaces

GIVEN_FROM = int(interfaces.RANGE.read_text().split()[0]) if interfaces.RANGE.exists() else 32768


def test_a_free_port_is_none_that_the_system_gives_to_connections():
    assert all(interfaces.LOWEST <= interfaces.free_port("127.0.0.1") < GIVEN_FROM for _ in range(20))


def test_ports_that_others_have_are_left_out(monkeypatch):
    found = interfaces.free_port("127.0.0.1")
    with socket.create_server(("127.0.0.1", found)):
        other = interfaces.free_port("127.0.0.1")
        monkeypatch.setattr(interfaces.random, "sample", lambda numbers, count: [found])
        with pytest.raises(OSError, match="none of 1000 ports"):
            interfaces.free_port("127.0.0.1")
        monkeypatch.setattr(interfaces.random, "sample", lambda numbers, count: [found, other])
        assert interfaces.free_port("127.0.0.1") == other != found
