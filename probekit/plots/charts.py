"""Bars, counts and single points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import axis_of, dim_title, frame, value_title
from .figure import Figure
from .text import escape, escape_lines
from .theme import INK, MUTED, PALETTE, SEQUENTIAL

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

Interval = tuple[float, float]
_HEIGHT = 330


def bars(
    values: xr.DataArray | Mapping[str, float],
    *,
    title: str,
    unit: str,
    caption: str,
    alt: str,
    reference: tuple[float, str] | None = None,
    intervals: tuple[xr.DataArray, xr.DataArray] | Mapping[str, Interval] | None = None,
    quantity: str | None = None,
    by: str = "",
) -> Figure:
    """How large a quantity is in each of a few places. Labelled values lie, an axis of numbers stands.

    Args:
        values: one axis with its coordinates, or values by label.
        title: the finding.
        unit: unit of the values.
        caption: model, corpus, n, what the intervals are, and how to read it.
        alt: what a reader who cannot see it needs to know.
        reference: a value and what it is, drawn across the bars.
        intervals: lower and upper end of each value, in the form of `values`.
        quantity: what the values are, in words; the array's name if None.
        by: what the labels are, in words.
    """
    import plotly.graph_objects as go

    name = quantity if quantity is not None else getattr(values, "name", None)
    value_axis = {"title": {"text": escape(value_title(name, unit))}, "rangemode": "tozero"}
    heights, ends = _heights(values), _ends(values, intervals)
    place_axis: dict[str, Any]
    if isinstance(values, Mapping):
        places: list[Any] = [escape(label) for label in values]
        place_axis = {"type": "category", "autorange": "reversed", "ticks": "", "showgrid": False}
        place_axis |= {"title": {"text": escape(by)}} if by else {}
    else:
        places, place_axis = axis_of(values, str(values.dims[0]))
    lying = isinstance(values, Mapping)
    cross, along = ("y", "x") if lying else ("x", "y")
    trace: dict[str, Any] = {cross: places, along: heights, "orientation": "h" if lying else "v"}
    color = PALETTE[0] if ends is None else SEQUENTIAL[4]  # lighter under an interval, which has to stand out
    trace |= {"marker": {"color": color}, "hovertemplate": f"%{{{cross}}}: %{{{along}:.4~g}}<extra></extra>"}
    if ends is not None:
        trace[f"error_{along}"] = _error_bars(heights, ends)
    plot = go.Figure(go.Bar(trace))
    if reference is not None:
        _add_level(plot, reference, along)
    layout: dict[str, Any] = {
        "places": [] if lying else places,
        f"{cross}axis": place_axis | {"showgrid": False},
        f"{along}axis": value_axis,
        "bargap": 0.35,
    }
    height = 110 + 30 * len(places) if lying else _HEIGHT
    return frame(plot, title=title, caption=caption, alt=alt, height=height, **layout)


def _heights(values: xr.DataArray | Mapping[str, float]) -> np.ndarray:
    return np.array([float(v) for v in (values.values() if isinstance(values, Mapping) else values.values)])


def _ends(
    values: xr.DataArray | Mapping[str, float],
    intervals: tuple[xr.DataArray, xr.DataArray] | Mapping[str, Interval] | None,
) -> np.ndarray | None:
    """Lower and upper ends as two rows.

    Raises:
        ValueError: `intervals` is not in the form of `values`, or misses one.
    """
    if intervals is None:
        return None
    if isinstance(intervals, Mapping) and isinstance(values, Mapping):
        if missing := set(values) - set(intervals):
            raise ValueError(f"no interval for {sorted(missing)}")
        return np.array([[float(intervals[k][end]) for k in values] for end in (0, 1)])
    if isinstance(intervals, Mapping) or isinstance(values, Mapping):
        raise ValueError("intervals need the form of the values: both by label, or both as arrays")
    return np.array([end.values.astype(float) for end in intervals])


def _error_bars(values: np.ndarray, ends: np.ndarray) -> dict[str, Any]:
    if ends.shape != (2, len(values)):
        raise ValueError(f"{len(values)} bars need as many lower and upper ends, found shape {ends.shape}")
    return {
        "type": "data",
        "symmetric": False,
        "arrayminus": values - ends[0],
        "array": ends[1] - values,
        "color": INK,
        "thickness": 1.3,
        "width": 4,
    }


def _add_level(plot: go.Figure, reference: tuple[float, str], along: str, *, log: bool = False) -> None:
    value, label = reference
    across = "x" if along == "y" else "y"
    ends: dict[str, Any] = {f"{across}ref": "paper", f"{across}0": 0, f"{across}1": 1}
    ends |= {f"{along}0": value, f"{along}1": value}
    plot.add_shape(type="line", line={"color": MUTED, "width": 1.2, "dash": "dot"}, **ends)
    place = float(np.log10(value)) if log else value  # Plotly wants annotations, unlike shapes, in powers of ten
    at = {"xref": "paper", "x": 0.008, "xanchor": "left", "y": place, "yanchor": "bottom"}
    beside = {"yref": "paper", "y": 1, "yanchor": "bottom", "x": value}
    beside["xanchor"] = "left" if value == 0 else "center"  # bars begin at 0, at the edge of the figure
    plot.add_annotation(
        text=escape(label),
        showarrow=False,
        font={"size": 11, "color": MUTED},
        bgcolor="rgba(255,255,255,0.8)",
        **(at if along == "y" else beside),
    )


def histogram(
    counts: np.ndarray,
    edges: np.ndarray,
    *,
    title: str,
    unit: str,
    caption: str,
    alt: str,
    quantity: str,
    counted: str = "tokens",
) -> Figure:
    """How often a quantity takes which value. The counts are the caller's.

    Args:
        counts: how many fall between each pair of edges.
        edges: ends of the bins, one more than counts.
        title: the finding.
        unit: unit of the edges.
        caption: model, corpus, n, and how to read it.
        alt: what a reader who cannot see it needs to know.
        quantity: what is distributed, in words.
        counted: what is counted.
    """
    import plotly.graph_objects as go

    counts, edges = np.asarray(counts), np.asarray(edges, dtype=float)
    if len(edges) != len(counts) + 1:
        raise ValueError(f"{len(counts)} counts need {len(counts) + 1} edges, found {len(edges)}")
    bar = go.Bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=counts,
        width=np.diff(edges),
        customdata=np.stack([edges[:-1], edges[1:]], axis=-1),
        marker={"color": PALETTE[0], "line": {"color": "#ffffff", "width": 0.6}},
        hovertemplate="%{customdata[0]:.4~g} to %{customdata[1]:.4~g}: %{y:,}<extra></extra>",
    )
    axes: dict[str, Any] = {
        "xaxis": {"title": {"text": escape(value_title(quantity, unit))}, "showgrid": False},
        "yaxis": {"title": {"text": escape(counted)}},
    }
    return frame(go.Figure(bar), title=title, caption=caption, alt=alt, height=_HEIGHT, bargap=0, **axes)


def dots(
    values: xr.DataArray,
    *,
    title: str,
    unit: str,
    caption: str,
    alt: str,
    hover: np.ndarray | xr.DataArray | None = None,
    log_y: bool = False,
    reference: tuple[float, str] | None = None,
    quantity: str | None = None,
) -> Figure:
    """Single values over an axis, such as the largest magnitudes of each layer.

    Args:
        values: one or two axes; `layer`, or else the first, lies along the bottom. With an axis `rank`, rank 0
            stands out.
        title: the finding.
        unit: unit of the values.
        caption: model, corpus, n, and how to read it.
        alt: what a reader who cannot see it needs to know.
        hover: more lines for the hover, same axes as `values`.
        log_y: logarithmic vertical axis; values that are not positive are left out.
        reference: a value and what it is, drawn as a level line.
        quantity: what the values are, in words; the array's name if None.
    """
    import plotly.graph_objects as go

    if values.ndim not in (1, 2):
        raise ValueError(f"dots have one or two axes, found {values.dims}")
    x_dim = "layer" if "layer" in values.dims else str(values.dims[0])
    texts = _texts(hover, values)
    places, axis = axis_of(values, x_dim)
    name = value_title(values.name if quantity is None else quantity, unit)
    plot = go.Figure()
    groups = _groups(values)
    for label, chosen, color in reversed(groups):
        plot.add_trace(_dot_trace(values, texts, chosen, x_dim, name).update(name=label, marker_color=color))
    if reference is not None:
        _add_level(plot, reference, "y", log=log_y)
    y_axis: dict[str, Any] = {"title": {"text": escape(name)}} | (_log_axis(values) if log_y else {})
    legend = {"showlegend": len(groups) > 1, "legend": {"traceorder": "reversed"}}
    layout: dict[str, Any] = {"places": places, "xaxis": axis, "yaxis": y_axis, "hovermode": "closest"} | legend
    return frame(plot, title=title, caption=caption, alt=alt, height=_HEIGHT, **layout)


def _log_axis(values: xr.DataArray) -> dict[str, Any]:
    """A logarithmic axis, with only powers of ten where it spans many."""
    positive = np.asarray(values.values, dtype=float)
    positive = positive[np.isfinite(positive) & (positive > 0)]
    many = positive.size and positive.max() / positive.min() > 50
    return {"type": "log", "dtick": 1 if many else "D2"}


def _groups(values: xr.DataArray) -> list[tuple[str, np.ndarray, str]]:
    """Label, mask over `values` and colour of the points that look alike."""
    if "rank" not in values.dims or values.sizes["rank"] < 2:
        return [("", np.ones(values.shape, dtype=bool), PALETTE[0])]
    axis = values.dims.index("rank")
    first = np.moveaxis(np.zeros(values.shape, dtype=bool), axis, 0)
    first[0] = True
    first = np.moveaxis(first, 0, axis)
    return [("largest", first, PALETTE[1]), ("next in rank", ~first, PALETTE[0])]


def _texts(hover: Any, values: xr.DataArray) -> np.ndarray | None:
    if hover is None:
        return None
    texts = np.asarray(hover.transpose(*values.dims).values if hasattr(hover, "dims") else hover, dtype=object)
    if texts.shape != values.shape:
        raise ValueError(f"hover has shape {texts.shape}, the values {values.shape}")
    return texts


def _dot_trace(values: xr.DataArray, texts: np.ndarray | None, chosen: np.ndarray, x_dim: str, name: str) -> go.Scatter:
    import plotly.graph_objects as go

    places = np.asarray(axis_of(values, x_dim)[0], dtype=object)
    index = np.nonzero(chosen)[values.dims.index(x_dim)]
    template = f"{escape(dim_title(x_dim))} %{{x}}<br>{escape(name)}: %{{y:.5~g}}"
    trace = go.Scatter(
        x=places[index].tolist(),
        y=np.asarray(values.values, dtype=float)[chosen],
        mode="markers",
        marker={"size": 7, "opacity": 0.75, "line": {"width": 0.6, "color": "#ffffff"}},
        hovertemplate=template + ("" if texts is None else "<br>%{text}") + "<extra></extra>",
    )
    return trace if texts is None else trace.update(text=[escape_lines(str(t)) for t in texts[chosen]])
