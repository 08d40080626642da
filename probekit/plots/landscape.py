"""Magnitudes over two axes as a landscape of bars, seen from above and aside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import dim_title, frame, value_title
from .figure import Figure
from .text import escape
from .theme import INK, MUTED, RULE, SEQUENTIAL, colorscale

if TYPE_CHECKING:
    import xarray as xr

_HEIGHT = 560
_MOST_BARS = 6000
_MOST_TICKS = 24  # labels along an axis; of more, every n-th
_HALF = 0.38  # of a bar's width
# Corners of a bar: four below, four above; and its faces as triangles, the bottom left out.
_CORNERS = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=float)
_FACES = np.array(
    [[0, 1, 5], [0, 5, 4], [1, 2, 6], [1, 6, 5], [2, 3, 7], [2, 7, 6], [3, 0, 4], [3, 4, 7], [4, 5, 6], [4, 6, 7]]
)


def landscape(
    heights: xr.DataArray,
    *,
    title: str,
    unit: str,
    caption: str,
    alt: str,
    labels: Sequence[str] | None = None,
    marked: int | None = None,
) -> Figure:
    """A bar on every cell of a grid: what towers over the rest, and where. The view can be turned.

    Args:
        heights: two axes, the first drawn from left to right, the second into the depth, with its coordinates as
            ticks; values of 0 or more.
        title: the finding.
        unit: unit of the heights.
        caption: model, text, layer, and how to read it.
        alt: what a reader who cannot see it needs to know.
        labels: what the entries of the first axis are called; their coordinates if None.
        marked: entry of the first axis whose label stands out.

    Raises:
        ValueError: there are not two axes, too many cells to tell apart, labels for another number of entries, or a
            height that is negative or undefined.
    """
    import plotly.graph_objects as go

    values = np.asarray(heights.values, dtype=float)
    if values.ndim != 2 or not 0 < values.size <= _MOST_BARS:
        raise ValueError(f"a landscape needs two axes and 1 to {_MOST_BARS:,} cells; found shape {values.shape}")
    if not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError("a landscape needs heights of 0 or more, all defined")
    across, along = map(str, heights.dims)
    names = [_ticks(heights, across, labels), _ticks(heights, along, None)]
    plot = go.Figure([_bars(values), _tops(values, names, (across, along), unit)])
    axis: dict[str, Any] = {"backgroundcolor": "#ffffff", "gridcolor": RULE, "linecolor": RULE, "zeroline": False}
    axis |= {"showspikes": False, "tickfont": {"size": 10, "color": MUTED}}
    scene = {
        "xaxis": axis | _axis(across, names[0], marked),
        "yaxis": axis | _axis(along, names[1], None),
        "zaxis": axis | {"title": _title(value_title(heights.name, unit)), "rangemode": "tozero"},
        "aspectmode": "manual",
        "aspectratio": {"x": 1.7, "y": 1.25, "z": 0.75},
        "camera": {
            "eye": {"x": -0.85, "y": -1.9, "z": 0.95},
            "center": {"x": 0, "y": 0, "z": -0.14},
            "projection": {"type": "orthographic"},
        },
        "dragmode": "turntable",
    }
    return frame(
        plot, title=title, caption=caption, alt=alt, height=_HEIGHT, scene=scene, showlegend=False,
        margin={"l": 0, "r": 0, "b": 0},
    )  # fmt: skip


def _title(text: str) -> dict[str, Any]:
    return {"text": escape(text), "font": {"size": 12, "color": INK}}


def _ticks(heights: xr.DataArray, dim: str, labels: Sequence[str] | None) -> list[str]:
    if labels is None:
        found = heights[dim].values if dim in heights.coords else np.arange(heights.sizes[dim])
        labels = [str(v) for v in found]
    if len(labels) != heights.sizes[dim]:
        raise ValueError(f"{len(labels)} labels for the {heights.sizes[dim]} entries of {dim!r}")
    return [escape(label) for label in labels]


def _axis(dim: str, names: list[str], marked: int | None) -> dict[str, Any]:
    every = max(1, -(-len(names) // _MOST_TICKS))
    at = sorted({*range(0, len(names), every), *([marked] if marked is not None else [])})
    if marked is not None:
        at = [i for i in at if i == marked or abs(i - marked) >= every]
    text = [f"<b>{names[i]}</b>" if i == marked else names[i] for i in at]
    shown = {"tickvals": at, "ticktext": text, "range": [-0.6, len(names) - 0.4]}
    return shown | {"title": _title(dim_title(dim)), "showgrid": False}


def _bars(values: np.ndarray) -> Any:
    """Every bar as a box; one mesh holds them all."""
    import plotly.graph_objects as go

    n, m = values.shape
    cells = np.stack(np.meshgrid(np.arange(n), np.arange(m), indexing="ij"), -1).reshape(-1, 1, 2)
    base = (cells + _HALF * _CORNERS).reshape(-1, 4, 2)  # cell, corner, axis
    plane = np.concatenate([base, base], axis=1).reshape(-1, 2)
    top = values.reshape(-1, 1)
    height = np.concatenate([np.zeros((len(top), 4)), np.repeat(top, 4, axis=1)], axis=1).ravel()
    faces = (_FACES[None] + 8 * np.arange(len(top))[:, None, None]).reshape(-1, 3)
    return go.Mesh3d(
        x=plane[:, 0].astype(np.float32), y=plane[:, 1].astype(np.float32), z=height.astype(np.float32),
        i=faces[:, 0].astype(np.int32), j=faces[:, 1].astype(np.int32), k=faces[:, 2].astype(np.int32),
        intensity=np.repeat(_shade(top[:, 0]), 8).astype(np.float32), cmin=0.0, cmax=1.0,
        colorscale=colorscale(SEQUENTIAL[2:]), showscale=False, flatshading=True, hoverinfo="skip",
        lighting={"ambient": 0.75, "diffuse": 0.5, "specular": 0.05, "roughness": 0.9},
    )  # fmt: skip


def _shade(heights: np.ndarray) -> np.ndarray:
    """Colour by magnitude on a logarithmic scale, so that the low bars can be told apart, too."""
    high = float(heights.max())
    low = max(float(np.median(heights)) / 2, high * 1e-5, 1e-30)
    if high <= low:
        return np.zeros(len(heights))
    return np.clip(np.log(np.maximum(heights, low) / low) / np.log(high / low), 0.0, 1.0)


def _tops(values: np.ndarray, names: list[list[str]], dims: tuple[str, str], unit: str) -> Any:
    """Points on the bars that answer the mouse."""
    import plotly.graph_objects as go

    n, m = values.shape
    x, y = (part.ravel().astype(np.int32) for part in np.meshgrid(np.arange(n), np.arange(m), indexing="ij"))
    about = f"{escape(dim_title(dims[0]))} %{{customdata[0]}}<br>{escape(dim_title(dims[1]))} %{{customdata[1]}}"
    said = [[names[0][i], names[1][j]] for i, j in zip(x.tolist(), y.tolist(), strict=True)]
    return go.Scatter3d(
        x=x, y=y, z=values.ravel().astype(np.float32), mode="markers", customdata=said,
        marker={"size": 3, "opacity": 0.01, "color": INK},
        hovertemplate=f"{about}<br>%{{z:.4~g}}{' ' + escape(unit) if unit not in ('', '1') else ''}<extra></extra>",
    )  # fmt: skip
