"""The folder where prepared models live. A model is there completely or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout
from tqdm import tqdm

from probekit.core import ModelError

from .progress import say

MANIFEST = "probekit.json"
FORMAT_VERSION = 1
_PACKAGES = ("probekit", "torch", "transformers", "sentence-transformers", "safetensors", "gguf")
_CHUNK = 1 << 22
_SLOW_HASH = 1 << 30


def cache_dir() -> Path:
    """Where probekit keeps prepared models: `$PROBEKIT_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("PROBEKIT_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("probekit", appauthor=False)


def model_folder(key: str) -> Path:
    """Where the model with this key lies, or would lie."""
    return cache_dir() / "models" / key


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `materialise` wrote about a finished folder; None if the folder is missing or damaged.

    A file that is gone or changed its size since counts as damage.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = manifest["finished"] and all(
            (folder / name).stat().st_size == about["bytes"] for name, about in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole else None


def materialise(key: str, build: Callable[[Path], None], *, about: Mapping[str, Any]) -> Path:
    """The folder of this key, built now if it is not finished yet.

    The build happens in a hidden sibling that takes the final name in one step, so that an
    interrupted build is never mistaken for a model: the next call removes its remains and starts
    again. Concurrent calls, also from other processes, build once.

    Args:
        key: name of the folder in the cache.
        build: fills the empty folder it is given.
        about: where the content comes from; goes into the folder's `probekit.json`.

    Raises:
        ModelError: the cache cannot be written.
    """
    folder = model_folder(key)
    if read_manifest(folder) is not None:
        return folder
    with _writable(), _lock(folder):
        if read_manifest(folder) is None:
            _build(folder, build, about)
    return folder


def _build(folder: Path, build: Callable[[Path], None], about: Mapping[str, Any]) -> None:
    part = folder.with_name(f".{folder.name}.incomplete")
    if part.exists():
        say(f"An earlier attempt to prepare {folder.name} was interrupted; starting again.")
        shutil.rmtree(part)
    try:
        part.mkdir()
        build(part)
        _write_manifest(part, about)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {
        "format": FORMAT_VERSION,
        **about,
        "files": {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files},
        "versions": _versions(),
        "finished": True,
    }
    written = folder / MANIFEST
    written.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in files:
        path.chmod(written.stat().st_mode)  # safetensors writes files that only their owner can read


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@contextmanager
def _writable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"The model cache {cache_dir()} cannot be written: {error}. "
            "Make room or change its permissions, or set PROBEKIT_CACHE to another folder."
        ) from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Another process is preparing {folder.name}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, as hex; shows a bar for files above 1 GB."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"Hashing {path.name}", disable=size < _SLOW_HASH) as bar,
    ):
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
