"""Activations of many texts at chosen tokens, with the prompt that each row belongs to; in memory or in a folder."""

from __future__ import annotations

import html
import json
import os
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from zipfile import BadZipFile

import numpy as np

from probekit.core import SITES, InputError, Point, StoreError, UnknownName
from probekit.engine import human

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

FORMAT, VERSION = "probekit collected", 1
MANIFEST, ROWS = "manifest.json", "rows.npz"
NUMBERS = ("text", "pos", "position", "token_id", "group")


@dataclass(frozen=True)
class Rows:
    """What is known of every row, and the texts they come from.

    Args:
        numbers: by name, one number per row: text, pos, position (as it was asked for), token_id, group.
        token_str: what each row's token shows as.
        text_ids: the token ids of all texts, end to end.
        lengths: tokens of each text.
        labels: one for each text; None if nobody said.
    """

    numbers: Mapping[str, np.ndarray]
    token_str: np.ndarray
    text_ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_str)


@dataclass(frozen=True, repr=False, eq=False)
class Collected:
    """Activations at chosen tokens. Build it with `pk.collect`, reopen it with `Collected.open`.

    `collected["resid_post"]` is a named array with axes layer, token, d_model, `collected["resid_post.3"]` one layer of
    it. The `token` axis has a row for each chosen token, with the coordinates text, group, pos, token_id and token_str.
    Rows of one group belong to one prompt; every split that probekit makes keeps groups whole.

    Args:
        arrays: by site, axes layer (where the site has layers), token, then the site's own; possibly memory-mapped.
        layers: by site, its layers; empty for a site that exists once.
        about: what is known of the rows.
        manifest: model, texts, positions, what is stored where.
        folder: where the arrays lie; None for memory.
    """

    arrays: Mapping[str, np.ndarray]
    layers: Mapping[str, tuple[int, ...]]
    about: Rows
    manifest: Mapping[str, Any]
    folder: Path | None = None
    _temporary: list[Any] = field(default_factory=list)

    @property
    def points(self) -> tuple[str, ...]:
        """Every point held, a layer each, such as `resid_post.3`."""
        return tuple(str(p) for site in self.arrays for p in self._points_of(site))

    def _points_of(self, site: str) -> list[Point]:
        return [Point(site, layer) for layer in self.layers[site]] or [Point(site)]

    @property
    def groups(self) -> np.ndarray:
        """The group (prompt) of every row, for scikit-learn's `groups=`; axis token."""
        return self.about.numbers["group"]

    @property
    def labels(self) -> np.ndarray | None:
        """The label of every row's text; None if the texts came without; axis token."""
        return None if self.about.labels is None else self.about.labels[self.about.numbers["text"]]

    @property
    def rows(self) -> pd.DataFrame:
        """A table with a line for each row, to make labels of: text, pos, position, token_id, token_str, group, label."""
        import pandas as pd

        columns: dict[str, Any] = dict(self.about.numbers) | {"token_str": self.about.token_str}
        return pd.DataFrame(columns if self.labels is None else columns | {"label": self.labels})

    def __len__(self) -> int:
        return len(self.about)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, in memory or on disk."""
        return sum(a.nbytes for a in self.arrays.values())

    def __getitem__(self, point: str | tuple[str, int] | Point) -> xr.DataArray:
        import xarray as xr

        where = Point.of(point)
        values, layers = self._values(where)
        dims = SITES[where.site].dims
        coords: dict[str, Any] = {name: ("token", v) for name, v in self.about.numbers.items()}
        coords |= {"token_str": ("token", self.about.token_str)}
        if layers is not None:
            dims, coords = ("layer", *dims), coords | {"layer": list(layers)}
        attrs = {"units": "activation", "long_name": SITES[where.site].help}
        return xr.DataArray(values, dims=dims, coords=coords, name=str(where), attrs=attrs)

    def _values(self, where: Point) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """The array of a point, and its layers if it has them."""
        if where.site not in self.arrays:
            raise UnknownName(f"This collection holds no {where.site}. It holds {', '.join(self.arrays)}.")
        values, layers = self.arrays[where.site], self.layers[where.site]
        if where.layer is None:
            return values, layers or None
        depth = int(self.manifest["model"]["n_layers"])
        layer = where.layer % depth if -depth <= where.layer < depth else where.layer
        if layer not in layers:
            raise UnknownName(f"This collection holds no {where}; of {where.site} it holds {list(layers)}.")
        return values[layers.index(layer)], None

    def matrix(self, point: str | tuple[str, int] | Point) -> np.ndarray:
        """The rows of one point as scikit-learn wants them: float32, axes row, feature; heads laid side by side.

        Raises:
            InputError: the point has several layers.
            UnknownName: the collection does not hold it.
        """
        values, layers = self._values(Point.of(point))
        if layers is not None and len(layers) > 1:
            raise InputError(f"{point} has the layers {list(layers)}; name one, such as {point}.{layers[0]}.")
        values = values[0] if layers is not None else values
        return np.asarray(values, dtype=np.float32).reshape(len(self), -1)

    @classmethod
    def open(cls, folder: str | Path) -> Collected:
        """A collection that `pk.collect(..., folder=…)` wrote; arrays stay on disk until they are read.

        Raises:
            StoreError: there is none, it was not finished, it is damaged or of a newer version.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        if manifest is None:
            raise StoreError(f"{path} holds no collection of probekit's (a folder with {MANIFEST}).")
        if manifest["version"] > VERSION:
            raise StoreError(f"{path} was written by a newer probekit; upgrade to read it.")
        if not manifest["complete"]:
            raise StoreError(f"{path} was not finished: collecting broke off. Collect again into this folder.")
        try:
            about = _read_rows(path, manifest)
            arrays = {s: np.load(path / f"{s}.npy", mmap_mode="r", allow_pickle=False) for s in manifest["sites"]}
            layers = {site: tuple(entry["layers"]) for site, entry in manifest["sites"].items()}
            shapes = {site: tuple(entry["shape"]) for site, entry in manifest["sites"].items()}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise StoreError(f"{path} is damaged ({type(error).__name__}: {error}). Collect again.") from error
        if {s: a.shape for s, a in arrays.items()} != shapes:
            raise StoreError(
                f"{path} is damaged: its arrays are not of the shapes that {MANIFEST} says. Collect again."
            )
        return cls(arrays, layers, about, manifest, path)

    def close(self) -> None:
        """Remove the temporary folder, if there is one; the arrays cannot be used afterwards."""
        for cleanup in self._temporary:
            cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _title(self) -> str:
        where = (
            "in memory" if self.folder is None else f"in {'a temporary folder' * bool(self._temporary) or self.folder}"
        )
        n_groups, name = len(np.unique(self.groups)), self.manifest["model"].get("name", "model")
        labelled = "" if self.about.labels is None else ", labelled"
        return (
            f"Collected from {name}: {len(self):,} rows of {n_groups:,} prompts{labelled}, {human(self.nbytes)} {where}"
        )

    def _lines(self) -> list[tuple[str, str, str]]:
        found = []
        for site, array in self.arrays.items():
            layers = self.layers[site]
            words = (
                f"{len(layers)} layers, {layers[0]} to {layers[-1]}" if len(layers) > 1 else "".join(map(str, layers))
            )
            dims = (("layer",) if layers else ()) + SITES[site].dims
            found.append((site, words, " × ".join(f"{d} {n:,}" for d, n in zip(dims, array.shape, strict=True))))
        return found

    def __repr__(self) -> str:
        return "\n".join([self._title(), *(f"  {s:<11}{w:<22}{a}" for s, w, a in self._lines())])

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(c)}</td>" for c in (s, w or "–", a)) + "</tr>"
            for s, w, a in self._lines()
        )
        head = "<tr>" + "".join(f"<th style='text-align:left'>{h}</th>" for h in ("point", "layers", "axes")) + "</tr>"
        return f"<p>{html.escape(self._title())}</p><table>{head}{rows}</table>"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a collection's folder; None if there is none of probekit's."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest in one step."""
    part = folder / f"{MANIFEST}.partial"
    part.write_text(json.dumps(manifest, indent=2, default=str) + "\n", encoding="utf-8")
    part.replace(folder / MANIFEST)


def begin_folder(folder: Path, manifest: Mapping[str, Any], needed: int) -> None:
    """Make a folder that says of itself that it is not finished.

    Raises:
        StoreError: it holds a finished collection or something else, cannot be written, or the disk is too small.
    """
    known = read_manifest(folder)
    if known is not None and known["complete"]:
        raise StoreError(
            f"{folder} holds a collection already. Open it (Collected.open), remove it, or choose another."
        )
    if folder.exists() and known is None and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} exists and holds no collection of probekit's; choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise StoreError(
                f"{folder} needs {human(needed)} and its disk has {human(free)} left. Choose another disk."
            )
        for old in [*folder.glob("*.npy"), *folder.glob(ROWS)]:
            old.unlink()
        write_manifest(folder, {**manifest, "complete": False})
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"Cannot write to {folder}: {error.strerror or error}. Choose another folder.") from error


def write_rows(folder: Path, about: Rows) -> None:
    """Write what is known of the rows; text as JSON inside, which holds every code point."""
    strings, codes = np.unique(about.token_str.astype(str), return_inverse=True)
    labels = None if about.labels is None else about.labels.tolist()
    words = np.frombuffer(json.dumps({"strings": strings.tolist(), "labels": labels}).encode(), dtype=np.uint8)
    stored: dict[str, Any] = dict(about.numbers) | {"codes": codes.astype(np.int32), "words": words}
    np.savez(folder / ROWS, text_ids=about.text_ids, lengths=about.lengths, **stored)


def _read_rows(folder: Path, manifest: Mapping[str, Any]) -> Rows:
    with (folder / ROWS).open("rb") as file, np.load(file, allow_pickle=False) as stored:
        words = json.loads(stored["words"].tobytes().decode())
        numbers = {name: stored[name] for name in NUMBERS}
        strings = np.asarray(words["strings"], dtype=object)[stored["codes"]]
        labels = None if words["labels"] is None else np.asarray(words["labels"])
        return Rows(numbers, strings, stored["text_ids"], stored["lengths"], labels)


def remove_with(owner: object, folder: Path) -> Any:
    """Remove a temporary folder together with what reads it; returns the call that does it at once."""
    return weakref.finalize(owner, shutil.rmtree, os.fspath(folder), ignore_errors=True)
