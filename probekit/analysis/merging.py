"""Statistics of some texts and of others become the statistics of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .contract import Analysis, Combine

if TYPE_CHECKING:
    import xarray as xr

SHRINKS = "query"  # a sweep over lengths of text goes as far as the shortest text


def check_summary(analysis: Analysis, summary: xr.Dataset) -> xr.Dataset:
    """`summary`, after checking it against the analysis' `statistics`.

    Raises:
        ValueError: a statistic is missing, undeclared, or has other axes than declared.
    """
    found = {str(name): array.dims for name, array in summary.data_vars.items()}
    declared = {name: s.dims for name, s in analysis.statistics.items()}
    if found != declared:
        wrong = {n: (found.get(n), declared.get(n)) for n in {*found, *declared} if found.get(n) != declared.get(n)}
        raise ValueError(
            f"{analysis.name} summarised texts as other statistics than declared (found, declared): {wrong}"
        )
    return summary


def merge_summaries(analysis: Analysis, one: xr.Dataset, other: xr.Dataset) -> xr.Dataset:
    """The statistics of all texts, from those of some and of the texts that follow them.

    Sums of whole numbers are exact below 2^53; other sums depend on how the texts were cut by the rounding of float64.

    Raises:
        ValueError: they have different axes, such as those of models of different depth.
    """
    import xarray as xr

    one, other = xr.align(one, other, join="inner", exclude=(set(one.dims) | set(other.dims)) - {SHRINKS})
    one, other = xr.align(one, other, join="exact")
    merged = {}
    for name, statistic in analysis.statistics.items():
        values = _combined(statistic.combine, one[name].values, other[name].values)
        merged[name] = (statistic.dims, values)
    return xr.Dataset(merged, coords=one.coords, attrs=one.attrs)


def _combined(how: Combine, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    if how == "sum":
        return np.asarray(one + other)
    if how == "max":
        return np.maximum(one, other)
    a, b = one.item(), other.item()
    if how == "best":
        return np.array(b if b["value"] > a["value"] else a, dtype=object)
    return np.array({k: a.get(k, 0) + b.get(k, 0) for k in (*a, *(k for k in b if k not in a))}, dtype=object)
