"""Tables on disk that grow: arrays of a Zarr group, appended along one axis and cut back to what was committed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

CHUNK_BYTES, LONGEST_CHUNK = 1 << 20, 1 << 16
Columns = Mapping[str, tuple[tuple[str, ...], np.ndarray]]


def append_rows(store: Path, group: str, columns: Columns, along: str, start: int) -> None:
    """Write rows from `start` on; what lay there before is overwritten, the arrays end with the new rows.

    A process that is killed meanwhile leaves every row before `start` as it was: a chunk is written beside its place
    and moved in.

    Args:
        store: a Zarr store.
        group: its table; made if it does not exist.
        columns: axes and values by name; all as long along `along`.
        along: the axis that grows.
        start: rows that are there.
    """
    import zarr

    table = zarr.open_group(store, path=group, mode="a", zarr_format=3)
    for name, (dims, values) in columns.items():
        axis = dims.index(along)
        shape = list(values.shape)
        if name not in table:
            row = max(1, values.dtype.itemsize * int(np.prod([n for i, n in enumerate(shape) if i != axis])))
            chunks = [max(1, n) for n in shape]
            chunks[axis] = int(np.clip(CHUNK_BYTES // row, 1, LONGEST_CHUNK))
            empty = [0 if i == axis else n for i, n in enumerate(shape)]
            table.create_array(name, shape=tuple(empty), chunks=tuple(chunks), dtype=values.dtype, dimension_names=dims)
        array: Any = table[name]
        array.resize(tuple(start + n if i == axis else n for i, n in enumerate(shape)))
        array[tuple(slice(start, None) if i == axis else slice(None) for i in range(len(shape)))] = values


def cut_rows(store: Path, group: str, along: str, n: int) -> None:
    """Cut every array of a table to its first `n` rows; an array that a killed process left half made goes."""
    import shutil

    import zarr

    folder = store / group
    for path in sorted(p for p in folder.glob("*") if p.is_dir()):
        if not (path / "zarr.json").exists():
            shutil.rmtree(path)
    if not (folder / "zarr.json").exists():
        return
    table = zarr.open_group(store, path=group, mode="a", zarr_format=3)
    for name, array in table.arrays():
        axis = (array.metadata.dimension_names or ()).index(along)
        if array.shape[axis] < n:
            raise ValueError(f"the table {group} has {array.shape[axis]} rows of {name} where {n} were committed")
        if array.shape[axis] > n:
            array.resize(tuple(n if i == axis else size for i, size in enumerate(array.shape)))
