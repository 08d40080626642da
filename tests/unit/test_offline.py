"""These tests cannot reach the network, and say so when they try."""

from __future__ import annotations

import socket

import pytest


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443), ("2001:db8::1", 80, 0, 0)])
def test_other_machines_are_out_of_reach(address: tuple[str, int]) -> None:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as plug:
        plug.settimeout(1)
        for connect in (plug.connect, plug.connect_ex):
            with pytest.raises(Exception, match="only this machine is allowed here"):
                connect(address)


def test_this_machine_is_within_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 1) as plug:
        assert plug.getpeername() == server.getsockname()
