"""A folder that appears when it is complete, and keeps what was sampled for it until then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from probekit.core import StoreError

JOURNAL, MANIFEST = "continuations.jsonl", "manifest.json"
MARK: dict[str, Any] = {"file": "probekit pair", "version": 1}


def partial_of(folder: Path) -> Path:
    """Where a folder is made before it appears; the journal of a call that broke off lies there."""
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when the block ends without an error.

    It holds the journal of an earlier call that broke off, or else that of the pair that it replaces. After an error,
    the journal alone stays.

    Raises:
        StoreError: `folder` holds something that is no pair, or cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and not is_pair(folder):
        if not folder.is_dir() or any(folder.iterdir()):
            raise StoreError(f"{folder} exists and is no pair that probekit made; choose another folder or remove it.")
        folder.rmdir()
    part, old = partial_of(folder), folder.with_name(f".{folder.name}.old")
    try:
        part.mkdir(parents=True, exist_ok=True)
        _clear(part)
        if (folder / JOURNAL).exists() and not (part / JOURNAL).exists():
            shutil.copy2(folder / JOURNAL, part / JOURNAL)
        yield part
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"Cannot write to {folder}: {error.strerror or error}. Choose another path.") from error
    finally:
        if part.exists():
            _clear(part)
            if not any(part.iterdir()):
                part.rmdir()


def is_pair(folder: Path) -> bool:
    """Whether a folder holds a pair that probekit made."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("file") == MARK["file"]


def _clear(part: Path) -> None:
    """Remove everything but the journal."""
    for path in part.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()
