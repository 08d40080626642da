"""`probekit app`: the dashboard in the browser."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import click

from probekit.core import CapabilityError

_SETTINGS = {
    "browser.gatherUsageStats": "false",  # nothing leaves the machine
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",  # readers get sentences; the terminal holds the rest
    "server.maxUploadSize": "20",  # MB
    "runner.postScriptGC": "false",  # a full collection after every click takes long with a model in memory
    "theme.light.primaryColor": "#2a4b7e",
    "theme.dark.primaryColor": "#6ca5d3",
    "theme.dark.backgroundColor": "#0e1117",  # that of dark figures
    "theme.dark.secondaryBackgroundColor": "#1a2029",
    "server.fileWatcherType": "none",  # classes that are loaded twice would not know one another
}


def script() -> Path:
    """The dashboard's entry.

    Raises:
        CapabilityError: streamlit or the dashboard is not installed.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise CapabilityError("The dashboard needs streamlit. Install it: pip install 'probekit[app]'")
    found = importlib.util.find_spec("probekit_dashboard")
    if found is None or not found.submodule_search_locations:
        raise CapabilityError("The dashboard is not part of this installation. Install it: pip install 'probekit[app]'")
    return Path(next(iter(found.submodule_search_locations))) / "app.py"


@click.command("app")
@click.option("--port", type=click.IntRange(1, 65535), default=8501, show_default=True, help="Port that it listens on.")
@click.option("--address", default="localhost", show_default=True, help="Address; 0.0.0.0 lets other machines in.")
@click.option("--browser/--no-browser", default=True, help="Open it in a browser.")
def app_command(port: int, address: str, browser: bool) -> None:
    """Explore a model in the browser; starts on the embedded one."""
    settings = _SETTINGS | {
        "server.port": str(port),
        "server.address": address,
        "server.headless": str(not browser).lower(),
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "streamlit", "run", str(script()), *flags]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if os.name == "posix":  # in the place of this process, so that whatever ends it ends the dashboard
        os.execve(sys.executable, command, environment)
    try:
        code = subprocess.call(command, env=environment)
    except KeyboardInterrupt:
        code = 0
    if code:
        raise click.exceptions.Exit(code)
