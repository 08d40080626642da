"""What all tests share: no network where none is needed, tiny random models, helpers that can be imported."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from helpers import Tiny

# Test files import `helpers`, `reference` and `fake_report` from this folder, whatever the import mode.
sys.path.insert(0, str(Path(__file__).parent))
OFFLINE = {"unit", "contract", "truth"}
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _PROCESSES > 1:  # also for servers and kernels that tests start: threads beyond the processors only wait, busily
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _PROCESSES)))


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


@pytest.fixture(scope="module")
def smol() -> Any:
    """SmolLM2-135M-Instruct, loaded anew for each file."""
    from probekit.models import open_model

    return open_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """All processors that other test processes leave, for products that are large enough."""
    yield from _threads(max(1, min((os.cpu_count() or 1) // _PROCESSES, 8)))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, for short texts: several would wait for each other."""
    yield from _threads(1)


def _threads(n: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing that the test runs prints or warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
