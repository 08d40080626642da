"""Two axes at once: layers upward, tokens, heads or positions to the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import axis_of, dim_title, frame, value_title
from .figure import Figure, Scale
from .text import escape, escape_lines
from .theme import DIVERGING, SEQUENTIAL, UNDEFINED, colorscale

if TYPE_CHECKING:
    import xarray as xr


def heatmap(
    values: xr.DataArray,
    *,
    title: str,
    unit: str,
    caption: str,
    alt: str,
    scale: Scale = "sequential",
    low: float | None = None,
    high: float | None = None,
    x_labels: Sequence[str] | None = None,
    hover: np.ndarray | xr.DataArray | None = None,
    quantity: str | None = None,
) -> Figure:
    """Where, over two axes, a quantity is large. `layer` is drawn upward, or else the first axis; NaN is grey.

    Args:
        values: two axes, with their coordinates.
        title: the finding.
        unit: unit of the values.
        caption: model, corpus, n, and how to read it.
        alt: what a reader who cannot see it needs to know.
        scale: "diverging" is symmetric around 0; on "log", values that are not positive take the lightest colour.
        low: value of the lightest colour (with "diverging", of the bluest); the smallest value if None.
        high: value of the darkest colour; the largest value if None.
        x_labels: plain-text labels of the horizontal axis; from its coordinates if None.
        hover: more lines for the hover, same axes as `values` (an unlabelled array: in the given order).
        quantity: what the values are, in words; the array's name if None.
    """
    if values.ndim != 2:
        raise ValueError(f"a heat map has two axes, found {values.dims}")
    y_dim = "layer" if "layer" in values.dims else str(values.dims[0])
    x_dim = next(str(d) for d in values.dims if d != y_dim)
    flip = values.dims[0] != y_dim
    array = values.transpose(y_dim, x_dim)
    x, x_axis = axis_of(array, x_dim, x_labels)
    y, y_axis = axis_of(array, y_dim)
    y_axis |= {"showgrid": False, "title": {"text": f"{escape(dim_title(y_dim))}"}}
    name = value_title(values.name if quantity is None else quantity, unit)
    trace = {"x": x, "y": y, "hoverongaps": False, "xgap": 0, "ygap": 0}
    trace |= _colors(array.values.astype(float), scale, low, high, name)
    extra = None if hover is None else _hover(hover, values.dims, flip, array.shape)
    return _draw(trace, x_axis, y_axis, extra, (x_dim, y_dim, name, scale), title=title, caption=caption, alt=alt)


def _draw(
    trace: dict[str, Any],
    x_axis: dict[str, Any],
    y_axis: dict[str, Any],
    extra: list[list[str]] | None,
    names: tuple[str, str, str, Scale],
    **words: str,
) -> Figure:
    import plotly.graph_objects as go

    x_dim, y_dim, name, scale = names
    number = "%{customdata:.4~g}" if scale == "log" else "%{z:.4~g}"
    template = f"{escape(dim_title(y_dim))} %{{y}} · {escape(dim_title(x_dim))} %{{x}}<br>{escape(name)}: {number}"
    trace["hovertemplate"] = template + ("" if extra is None else "<br>%{text}") + "<extra></extra>"
    if extra is not None:
        trace["text"] = extra
    height = int(np.clip(15 * len(trace["y"]), 150, 510)) + 60
    axes: dict[str, Any] = {"xaxis": x_axis | {"showgrid": False}, "yaxis": y_axis, "plot_bgcolor": UNDEFINED}
    return frame(go.Figure(go.Heatmap(trace)), height=height, places=trace["x"], **words, **axes)


def _colors(z: np.ndarray, scale: Scale, low: float | None, high: float | None, name: str) -> dict[str, Any]:
    """Colours, their range and the colour bar. Arrays are packed as 32-bit floats to keep pages light."""
    bar: dict[str, Any] = {"title": {"text": escape(name)}}
    finite = z[np.isfinite(z)]
    if scale == "log":
        positive = finite[finite > 0]
        bottom = low if low is not None and low > 0 else float(positive.min(initial=np.inf))
        top = high if high is not None else float(positive.max(initial=0))
        bottom, top = (bottom, top) if 0 < bottom <= top < np.inf else (1.0, 10.0)
        with np.errstate(invalid="ignore"):
            drawn = np.log10(np.maximum(z, bottom))
        ticks = _decades(bottom, top)
        bar |= {"tickvals": np.log10(ticks).tolist(), "ticktext": [_short(t) for t in ticks]}
        data = {"z": drawn.astype(np.float32), "customdata": z.astype(np.float32)}
        limits = (float(np.log10(bottom)), float(np.log10(top)))
    else:
        data = {"z": z.astype(np.float32)}
        limits = (
            float(finite.min(initial=np.inf)) if low is None else low,
            float(finite.max(initial=-np.inf)) if high is None else high,
        )
        if not np.isfinite(limits).all():
            limits = (0.0, 1.0)
    if scale == "diverging":
        bound = max(abs(limits[0]), abs(limits[1])) or 1.0
        limits = (-bound, bound)
    stops = DIVERGING if scale == "diverging" else SEQUENTIAL
    return data | {"zmin": limits[0], "zmax": limits[1], "colorscale": colorscale(stops), "colorbar": bar}


def _decades(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic colour bar, at least two."""
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [s * 10.0**e for e in range(first, last + 1) for s in steps]
        inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
        if len(inside) >= 3:
            return inside
    return [low, high] if high > low else [low]


def _short(tick: float) -> str:
    return f"{tick:,.0f}" if 1 <= tick < 1e7 else f"{tick:.3g}"


def _hover(hover: Any, dims: tuple[Any, ...], flip: bool, shape: tuple[int, ...]) -> list[list[str]]:
    if hasattr(hover, "dims"):
        hover = hover.transpose(*dims).values
    texts = np.asarray(hover, dtype=object)
    texts = texts.T if flip else texts
    if texts.shape != shape:
        raise ValueError(f"hover has shape {texts.shape[::-1] if flip else texts.shape}, the values {shape}")
    return [[escape_lines(str(t)) for t in row] for row in texts]
