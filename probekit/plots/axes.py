"""Axes and frames that follow from the arrays: names, units, ticks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .figure import Figure
from .text import escape, token_labels, unescape, unique, wrapped
from .theme import template

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

_DIM_TITLES = {
    "layer": "layer",
    "token": "token",
    "head": "head",
    "query": "query position",
    "key": "key position",
    "text": "text",
    "d_model": "residual stream dimension",
    "rank": "rank",
    "threshold": "threshold",
}

_MOST_SLANTED = 30  # more labels than this stand upright


def dim_title(dim: str) -> str:
    """What an axis is called on a figure."""
    return _DIM_TITLES.get(dim, dim.replace("_", " "))


def value_title(name: object, unit: str) -> str:
    """The title of a value axis, such as "residual norm (× median)"; a pure number has unit "1"."""
    words = str(name or "").replace("_", " ").strip()
    if words.endswith(f" {unit}"):
        words = words[: -len(unit) - 1]
    if unit in ("", "1"):
        return words or "value"
    return f"{words} ({unit})" if words and words != unit else unit


def axis_of(array: xr.DataArray, dim: str, labels: Sequence[str] | None = None) -> tuple[list[Any], dict[str, Any]]:
    """Where the entries of `dim` lie, and the axis that shows it.

    Tokens and given labels become categories, which Plotly thins to what fits and shows in full on zooming in.
    Whole numbers keep whole-number ticks.
    """
    title: dict[str, Any] = {"title": {"text": escape(dim_title(dim))}}
    if labels is not None and len(labels) != array.sizes[dim]:
        raise ValueError(f"{len(labels)} labels for the {array.sizes[dim]} entries of {dim!r}")
    if labels is None and dim == "token":
        labels = token_labels(array)
    if labels is not None:
        places = [escape(label) for label in unique(list(map(str, labels)))]
        return places, title | {"type": "category", "showgrid": False} | _label_style(len(places))
    values = array[dim].values if dim in array.coords else np.arange(array.sizes[dim])
    if not np.issubdtype(values.dtype, np.number):
        return [escape(str(v)) for v in values], title | {"type": "category"}
    if np.issubdtype(values.dtype, np.integer) and len(values):
        span = int(values.max() - values.min())
        step = next((s for s in (1, 2, 4, 5, 10, 20, 50, 100, 200, 500, 1000) if span / s <= 16), None)
        title |= {"tick0": 0, "dtick": step} if step else {}
    return values.tolist(), title


def _label_style(n: int) -> dict[str, Any]:
    return {"tickfont": {"size": 10}, "automargin": False, "tickangle": 35 if n <= _MOST_SLANTED else 90}


def _label_room(places: Sequence[Any]) -> int:
    """Pixels that slanted or upright labels need; fixed, because Plotly's own search for room may not end."""
    longest = max((len(unescape(p)) for p in places if isinstance(p, str)), default=0)
    return min((6 if len(places) > _MOST_SLANTED else 4) * longest, 170)


def title_pad(text: str) -> int:
    """Pixels above a title; plotly.js sets a title of several lines higher than one of a single line."""
    return 24 if "<br>" in text else 14


def frame(
    plot: go.Figure, *, title: str, caption: str, alt: str, height: int, places: Sequence[Any] = (), **layout: Any
) -> Figure:
    """`plot` in the house style, with title and margins.

    Args:
        plot: traces and shapes.
        title: the finding.
        caption: how to read it.
        alt: what a reader who cannot see it needs to know.
        height: pixels below the title.
        places: entries of the horizontal axis; labels among them get room below it.
        layout: more of the layout.

    Raises:
        ValueError: title, caption or alt is empty.
    """
    if not (title.strip() and caption.strip() and alt.strip()):
        raise ValueError("a figure needs a title that states the finding, a caption and an alternative text")
    text = wrapped(title)
    top = 46 + 19 * text.count("<br>") + (24 if layout.get("showlegend") else 0)
    room = _label_room(places)
    margin = {"t": top} | ({"b": 56 + room} if room else {}) | layout.pop("margin", {})
    plot.update_layout(
        template=template(),
        title={"text": text, "y": 1, "yref": "container", "pad": {"t": title_pad(text)}},
        height=height + top + room,
        margin=margin,
        **layout,
    )
    return Figure(plot, caption, alt)
