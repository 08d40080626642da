"""Labelled arrays on disk: Zarr groups whose text survives whatever bytes it holds, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import StoreError

if TYPE_CHECKING:
    import xarray as xr

FORMAT_VERSION = 1
_MARK = "probekit_format"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` when the block ends without an error.

    Raises:
        StoreError: `path` holds something that probekit did not write, or cannot be written.
    """
    if path.exists() and not groups(path):
        raise StoreError(f"{path} exists and is no probekit store; choose another path or remove it.")
    part = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"Cannot write to {path}: {error.strerror or error}. Choose another path.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_group(dataset: xr.Dataset, store: Path, group: str, attrs: dict[str, str]) -> None:
    """Add a dataset, with text attributes of one's own, to a Zarr store."""
    own: dict[str, Any] = {_MARK: FORMAT_VERSION, "dataset_attrs": json.dumps(dataset.attrs), **attrs}
    # Tokens may be pieces of characters, which Zarr's string type refuses; JSON escapes keep every code point.
    text = {str(n): v for n, v in dataset.variables.items() if v.dtype.kind in "OUT"}
    own["text_variables"] = json.dumps(
        {n: {"dims": v.dims, "values": v.values.tolist(), "coord": n in dataset.coords} for n, v in text.items()}
    )
    plain = dataset.drop_vars(list(text)).assign_attrs(own)
    plain.attrs = own
    plain.to_zarr(store, group=group, mode="a", consolidated=False, zarr_format=3)


def read_group(store: Path, group: str) -> tuple[xr.Dataset, dict[str, str]]:
    """A dataset and its text attributes, as `write_group` took them.

    Raises:
        StoreError: it was written by a newer probekit.
    """
    import xarray as xr

    with xr.open_zarr(store, group=group, consolidated=False, chunks=None) as opened:
        dataset = opened.load()
    attrs = dict(dataset.attrs)
    if attrs.pop(_MARK) > FORMAT_VERSION:
        raise StoreError(f"{store} was written by a newer probekit; upgrade to read it.")
    dataset.attrs = json.loads(attrs.pop("dataset_attrs"))
    for name, stored in json.loads(attrs.pop("text_variables")).items():
        values = (stored["dims"], np.asarray(stored["values"], dtype=object))
        dataset = dataset.assign_coords({name: values}) if stored["coord"] else dataset.assign({name: values})
    return dataset, attrs


def groups(store: Path) -> list[str]:
    """The groups of a store that probekit wrote; empty if there is no such store."""
    found = []
    for meta in sorted(store.glob("*/zarr.json")):
        try:
            attrs = json.loads(meta.read_text(encoding="utf-8")).get("attributes", {})
        except (OSError, ValueError):
            continue
        if _MARK in attrs:
            found.append(meta.parent.name)
    return found
