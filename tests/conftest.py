"""What all tests share: no network where none is needed, tiny random models, helpers that can be imported."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from helpers import Tiny

# Test files import `helpers`, `reference` and `fake_report` from this folder, whatever the import mode.
sys.path.insert(0, str(Path(__file__).parent))
OFFLINE = {"unit", "contract", "truth"}


class NetworkBlocked(Exception):
    """A test that must not need the network tried to reach it."""


def _loopback(address: Any) -> bool:
    if not isinstance(address, tuple):
        return True  # a socket of this machine, such as a Unix socket
    host = str(address[0])
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def _offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit, contract and truth tests reach nothing but this machine."""
    if not OFFLINE & set(request.node.path.parts):
        return
    for name in ("connect", "connect_ex"):
        own = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any, own: Any = own) -> Any:
            if not _loopback(address):
                raise NetworkBlocked(f"{request.node.nodeid} connects to {address}; only this machine is allowed here.")
            return own(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)


@pytest.fixture(scope="session", params=["llama", "llama-grouped", "llama-single", "mistral", "qwen2", "gpt2"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """A tiny random model of each family that the backend knows."""
    from helpers import tiny_model

    return tiny_model(request.param)


@pytest.fixture(scope="session")
def tiny_llama() -> Iterator[Tiny]:
    """A tiny random llama with grouped-query heads."""
    from helpers import tiny_model

    yield tiny_model("llama-grouped")
