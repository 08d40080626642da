"""What a streamed corpus keeps on disk: tables that grow, cut back to what was committed, and datasets in one array.

A table is a Zarr group whose arrays are appended along one axis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

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


def write_packed(dataset: xr.Dataset, store: Path, name: str) -> None:
    """Write a dataset as one array of float64 whose attributes say what is where; many small arrays take longer.

    Whole numbers are exact up to 2^53. Variables that hold objects go into the attributes, as JSON.
    """
    import zarr

    layout, parts, objects = [], [np.zeros(0)], {}
    for key, variable in dataset.variables.items():
        values = variable.values
        about = {"name": str(key), "dims": variable.dims, "shape": values.shape, "coord": key in dataset.coords}
        if values.dtype.kind == "O":
            objects[str(key)] = values.tolist()
        else:
            parts.append(values.ravel().astype(np.float64))
        layout.append({**about, "dtype": values.dtype.str})
    packed = np.concatenate(parts)
    attributes = {"layout": json.dumps(layout), "objects": json.dumps(objects), "attrs": json.dumps(dataset.attrs)}
    zarr.create_array(
        store, name=name, data=packed, chunks=(max(1, min(len(packed), 1 << 20)),), zarr_format=3, attributes=attributes
    )


def read_packed(store: Path, name: str) -> xr.Dataset:
    """The dataset that `write_packed` wrote."""
    import xarray as xr
    import zarr

    array = zarr.open_array(store, path=name, mode="r", zarr_format=3)
    attributes: dict[str, Any] = {k: json.loads(str(v)) for k, v in array.attrs.asdict().items()}
    packed, begin = np.asarray(array[:]), 0
    found: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for about in attributes["layout"]:
        if about["dtype"] == "|O":
            values = np.array(attributes["objects"][about["name"]], dtype=object)
        else:
            size = int(np.prod(about["shape"]))
            values = packed[begin : begin + size].astype(about["dtype"]).reshape(about["shape"])
            begin += size
        found[about["coord"]][about["name"]] = (tuple(about["dims"]), values)
    return xr.Dataset(found[False], coords=found[True], attrs=attributes["attrs"])
