"""`probekit app` starts the dashboard with the settings it was given."""

from __future__ import annotations

import os
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("streamlit", reason="the dashboard needs streamlit: pip install 'probekit[app]'")

from probekit.app_command import app_command


@pytest.mark.skipif(os.name != "posix", reason="only there a process can take another's place")
def test_it_becomes_the_server_so_that_ending_it_ends_the_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: became.append(given))
    monkeypatch.setattr("subprocess.call", lambda *_, **__: 0)
    CliRunner().invoke(app_command, ["--no-browser", "--port", "8765", "--address", "0.0.0.0"], catch_exceptions=False)
    program, command, environment = became[0]
    assert command[0] == program and command[1:4] == ["-m", "streamlit", "run"] and command[4].endswith("app.py")
    assert {"--server.port=8765", "--server.address=0.0.0.0", "--server.headless=true"} <= set(command)
    assert environment["TOKENIZERS_PARALLELISM"] == "false"


@pytest.mark.parametrize("port", ["0", "70000", "http"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    found = CliRunner().invoke(app_command, ["--port", port])
    assert found.exit_code == 2 and "--port" in found.output
