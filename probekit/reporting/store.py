"""The folder of a run: report, findings, numbers and manifest, written all or not at all."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from probekit.analysis import Finding, Results, save_results
from probekit.core import StoreError
from probekit.core.storage import groups

from .page import GENERATOR, report_html

MANIFEST_FORMAT = "probekit run"
MANIFEST_VERSION = 1
_PREFIX, _SUFFIX = ".probekit-", ".partial"


def write_run(results: Results, folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Write a run's folder and return the path of its report.

    `report.html`, `findings.json`, `results.zarr` and `manifest.json` are written in full beside their place and
    then moved in together: after a failure the folder is as it was before. An older run of probekit's is replaced;
    other files are left alone.

    Args:
        results: what was found.
        folder: where to write; made if it does not exist.
        manifest: provenance, plain data for JSON.

    Raises:
        StoreError: the folder cannot be written, or holds a file of one of these names that probekit did not write.
    """
    folder = Path(folder).expanduser().resolve()
    check_writable(folder)
    with _store_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _stage(folder) as stage:
            new = stage / "new"
            new.mkdir()
            _write(results, new, manifest)
            if folder.exists():
                _swap(new, folder, stage / "old")
            else:
                new.rename(folder)
    return folder / "report.html"


def check_writable(folder: Path) -> None:
    """Find out before a run whether `write_run` could write here; leaves nothing behind.

    Raises:
        StoreError: it could not.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; results need a folder. Choose another path.")
    for name, ours in _FILES.items():
        if (folder / name).exists() and not ours(folder / name):
            raise StoreError(
                f"{folder / name} exists and was not written by probekit, so it is not overwritten. "
                "Choose another folder, or move that file away."
            )
    home = next(p for p in (folder, *folder.parents) if p.exists())
    with _store_errors(folder):
        Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=home)).rmdir()


@contextmanager
def _store_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "Choose a folder that you may write to, on a disk with free space."
        raise StoreError(f"Cannot write results to {folder}: {reason}. {advice}") from error


@contextmanager
def _stage(folder: Path) -> Iterator[Path]:
    """A hidden folder on the same disk as `folder`, gone afterwards."""
    # Inside an existing folder rather than beside it: a mounted folder's parent may be another disk, or read-only.
    home = folder if folder.exists() else folder.parent
    stage = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=home))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _write(results: Results, new: Path, manifest: Mapping[str, Any]) -> None:
    save_results(results, new / "results.zarr")
    _write_json([f.as_dict() for f in results.findings], new / "findings.json")
    _write_json({"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **manifest}, new / "manifest.json")
    page = report_html(results, manifest)
    (new / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")


def _write_json(data: Any, path: Path) -> None:
    text = json.dumps(_finite(data), indent=2, ensure_ascii=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(data: Any) -> Any:
    """`data` with null for numbers that JSON cannot hold, and lists for tuples and sets."""
    if isinstance(data, Mapping):
        return {str(k): _finite(v) for k, v in data.items()}
    if isinstance(data, set | frozenset):
        return [_finite(v) for v in sorted(data, key=str)]
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    if isinstance(data, Path):
        return str(data)
    if hasattr(data, "item") and getattr(data, "ndim", 1) == 0:
        data = data.item()
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Put the new files into `folder`, or, if one cannot be moved, leave all as it was."""
    old.mkdir()
    moved: list[str] = []
    try:
        for name in _FILES:
            moved.append(name)
            if (folder / name).exists():
                (folder / name).rename(old / name)
            (new / name).rename(folder / name)
    except BaseException:
        for name in reversed(moved):
            if not (new / name).exists():
                (folder / name).rename(new / name)
            if (old / name).exists():
                (old / name).rename(folder / name)
        raise


def _is_store(path: Path) -> bool:
    return path.is_dir() and (bool(groups(path)) or not any(path.iterdir()))


def _is_report(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'content="{GENERATOR}"' in file.read(2000)


def _is_manifest(path: Path) -> bool:
    data = _read_json(path)
    return isinstance(data, dict) and data.get("format") == MANIFEST_FORMAT


def _is_findings(path: Path) -> bool:
    data, names = _read_json(path), {f.name for f in fields(Finding)}
    needed = names - {"quantity"}  # which reports of version 0.1.0 lack
    return isinstance(data, list) and all(isinstance(e, dict) and needed <= set(e) <= names for e in data)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# What a run's folder holds, and how to tell that probekit wrote it.
_FILES: dict[str, Callable[[Path], bool]] = {
    "results.zarr": _is_store,
    "findings.json": _is_findings,
    "report.html": _is_report,
    "manifest.json": _is_manifest,
}
