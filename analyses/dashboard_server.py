"""The dashboard in a process of its own, for whoever drives it through a browser."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def server(environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Start it on a free port, and end it with the block.

    Args:
        environment: of the process; this one's if None.

    Yields:
        Its address.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "probekit", "app", "--no-browser", "--address", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{url}/_stcore/health", timeout=2).close()
                    break
                except OSError:
                    assert process.poll() is None, "the dashboard ended at its start"
                    time.sleep(0.5)
            yield url
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 15)
