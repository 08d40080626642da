"""Curves over layers, positions or a swept threshold."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import axis_of, frame, value_title
from .figure import Figure
from .text import escape, wrapped
from .theme import DASHES, MUTED, PALETTE

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

_HEIGHT = 330
_LABEL_WIDTH = 26
_MOST_DIRECT_LABELS = len(PALETTE)


@dataclass(frozen=True)
class _Scale:
    """The vertical axis: its range in axis units (log10 on a logarithmic axis)."""

    log: bool
    low: float
    high: float

    def place(self, value: float) -> float:
        return float(np.log10(value)) if self.log else float(value)


def lines(
    curves: Mapping[str, xr.DataArray],
    *,
    title: str,
    unit: str,
    caption: str,
    alt: str,
    log_y: bool = False,
    bands: Mapping[str, tuple[xr.DataArray, xr.DataArray]] | None = None,
    reference: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
    quantity: str | None = None,
) -> Figure:
    """How quantities of one unit change along one axis.

    Args:
        curves: by label, arrays with the same only axis.
        title: the finding.
        unit: unit of the values.
        caption: model, corpus, n, what the bands are, and how to read it.
        alt: what a reader who cannot see it needs to know.
        log_y: logarithmic vertical axis; values that are not positive are left out.
        bands: lower and upper end of each curve's uncertainty.
        reference: a value and what it is, drawn as a level line.
        y_range: ends of the vertical axis, in the unit.
        quantity: what the values are, in words; the label of an only curve if None.
    """
    import plotly.graph_objects as go

    bands = bands or {}
    dims = {a.dims for a in curves.values()}
    if len(dims) != 1 or len(next(iter(dims))) != 1:
        raise ValueError(f"curves need one and the same axis, found {sorted(map(str, dims))}")
    if set(bands) - set(curves):
        raise ValueError(f"bands without a curve: {sorted(set(bands) - set(curves))}")
    scale = _scale(curves, bands, reference, y_range, log_y)
    plot = go.Figure()
    x, axis = axis_of(next(iter(curves.values())), str(next(iter(dims))[0]))
    for i, (label, curve) in enumerate(curves.items()):
        x = axis_of(curve, str(curve.dims[0]))[0]
        if label in bands:
            _add_band(plot, x, bands[label], i)
        _add_curve(plot, x, curve, label, i)
    if reference is not None:
        _add_reference(plot, reference, scale)
    axis |= _snug(x) | {"unifiedhovertitle": {"text": f"{axis['title']['text']} %{{x}}"}}
    direct = 1 < len(curves) <= _MOST_DIRECT_LABELS
    margin = {"r": _add_end_labels(plot, curves, scale)} if direct else {}
    if quantity is None:
        quantity = next(iter(curves)) if len(curves) == 1 else ""
    y_axis: dict[str, Any] = {"title": {"text": escape(value_title(quantity, unit))}, "range": [scale.low, scale.high]}
    y_axis |= {"type": "log", "dtick": 1 if scale.high - scale.low > 1.5 else "D2"} if log_y else {}
    layout: dict[str, Any] = {
        "places": x,
        "xaxis": axis,
        "yaxis": y_axis,
        "margin": margin,
        "showlegend": len(curves) > _MOST_DIRECT_LABELS,
    }
    return frame(plot, title=title, caption=caption, alt=alt, height=_HEIGHT, hovermode="x unified", **layout)


def _snug(x: list[Any]) -> dict[str, Any]:
    """The range of a horizontal axis of numbers: little room beside the curves, so that labels stand at their ends."""
    if not x or isinstance(x[0], str):
        return {}
    pad = 0.015 * (max(x) - min(x)) or 0.5
    return {"range": [min(x) - pad, max(x) + pad]}


def _scale(
    curves: Mapping[str, xr.DataArray],
    bands: Mapping[str, tuple[xr.DataArray, xr.DataArray]],
    reference: tuple[float, str] | None,
    y_range: tuple[float, float] | None,
    log: bool,
) -> _Scale:
    if y_range is not None:
        ends = np.log10(y_range) if log else np.asarray(y_range, dtype=float)
        return _Scale(log, float(ends[0]), float(ends[1]))
    parts = [a.values.ravel() for a in (*curves.values(), *(e for pair in bands.values() for e in pair))]
    values = np.concatenate([*parts, [] if reference is None else [reference[0]]]).astype(float)
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    values = np.log10(values) if log else values
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    # An axis of quantities that cannot be negative does not dip below zero for the sake of padding.
    floor = 0.0 if not log and 0 <= low < pad else low - pad
    return _Scale(log, floor, high + pad)


def _add_band(plot: go.Figure, x: list[Any], band: tuple[xr.DataArray, xr.DataArray], i: int) -> None:
    low, high = (np.asarray(end.values, dtype=float) for end in band)
    if not len(low) == len(high) == len(x):
        raise ValueError(f"a band of {len(low)} and {len(high)} values for a curve of {len(x)}")
    keep = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
    places = [x[k] for k in keep]
    color = PALETTE[i % len(PALETTE)]
    plot.add_scatter(
        x=places + places[::-1],
        y=np.concatenate([high[keep], low[keep][::-1]]),
        fill="toself",
        fillcolor=color,
        opacity=0.16,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )


def _add_curve(plot: go.Figure, x: list[Any], curve: xr.DataArray, label: str, i: int) -> None:
    plot.add_scatter(
        x=x,
        y=np.asarray(curve.values, dtype=float),
        name=escape(label),
        mode="lines+markers" if len(x) <= 80 else "lines",
        line={"color": PALETTE[i % len(PALETTE)], "width": 2, "dash": DASHES[i % len(DASHES)]},
        marker={"size": 5},
        hovertemplate="%{y:.4~g}",
    )


def _add_reference(plot: go.Figure, reference: tuple[float, str], scale: _Scale) -> None:
    value, label = reference
    plot.add_shape(
        type="line", xref="paper", x0=0, x1=1, y0=value, y1=value, line={"color": MUTED, "width": 1.2, "dash": "dot"}
    )
    near_top = scale.place(value) > scale.high - 0.12 * (scale.high - scale.low)
    plot.add_annotation(
        text=escape(label),
        xref="paper",
        x=0.008,
        xanchor="left",
        y=scale.place(value),
        yanchor="top" if near_top else "bottom",
        showarrow=False,
        bgcolor="rgba(255,255,255,0.8)",
        font={"size": 11, "color": MUTED},
    )


def _add_end_labels(plot: go.Figure, curves: Mapping[str, xr.DataArray], scale: _Scale) -> int:
    """Write each curve's label at its right end, apart from the others; returns the right margin they need."""
    ends = []
    for curve in curves.values():
        values = np.asarray(curve.values, dtype=float)
        values = values[np.isfinite(values) & ((values > 0) | (not scale.log))]
        ends.append(float(np.clip(scale.place(values[-1]), scale.low, scale.high)) if values.size else scale.low)
    rows = [max(1, len(textwrap.wrap(label, _LABEL_WIDTH))) for label in curves]
    line = (scale.high - scale.low) * 17 / (_HEIGHT - 56)
    for i, (label, y) in enumerate(zip(curves, _spread(ends, [r * line for r in rows], scale), strict=True)):
        plot.add_annotation(
            text=wrapped(label, _LABEL_WIDTH),
            xref="paper",
            x=1,
            xshift=8,
            xanchor="left",
            align="left",
            y=y,
            yanchor="middle",
            showarrow=False,
            font={"size": 12, "color": PALETTE[i % len(PALETTE)]},
        )
    longest = max(len(part) for label in curves for part in textwrap.wrap(label, _LABEL_WIDTH) or [""])
    return 24 + 7 * longest


def _spread(targets: list[float], heights: list[float], scale: _Scale) -> list[float]:
    """Places near the targets where labels of these heights do not overlap."""
    order = np.argsort(targets, kind="stable")
    placed = list(targets)
    edge = -np.inf
    for k in order:
        placed[k] = max(placed[k], edge + heights[k] / 2)
        edge = placed[k] + heights[k] / 2
    edge = scale.high + heights[order[-1]] / 2
    for k in order[::-1]:
        placed[k] = min(placed[k], edge - heights[k] / 2)
        edge = placed[k] - heights[k] / 2
    return [float(p) for p in placed]
