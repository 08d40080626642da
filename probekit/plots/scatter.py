"""Two quantities against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import frame, value_title
from .figure import Figure
from .text import escape, escape_lines
from .theme import MUTED, PALETTE

if TYPE_CHECKING:
    import plotly.graph_objects as go

_HEIGHT = 400


def scatter(
    groups: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str,
    unit: str,
    caption: str,
    alt: str,
    x_quantity: str,
    y_quantity: str,
    hover: Mapping[str, list[str]] | None = None,
    diagonal: str = "",
) -> Figure:
    """How one number of each place compares with another of the same unit.

    Args:
        groups: by label, horizontal and vertical values; pairs with NaN are left out.
        title: the finding.
        unit: unit of both axes.
        caption: model, corpus, n, and how to read it.
        alt: what a reader who cannot see it needs to know.
        x_quantity: what lies along the bottom, in words.
        y_quantity: what stands on the side, in words.
        hover: by label, more lines for the hover, one per pair.
        diagonal: what the line of equal values means; none is drawn if empty.
    """
    import plotly.graph_objects as go

    plot = go.Figure()
    ends: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for i, (label, (x, y)) in enumerate(groups.items()):
        x, y = np.asarray(x, dtype=float).ravel(), np.asarray(y, dtype=float).ravel()
        if x.shape != y.shape:
            raise ValueError(f"{label}: {len(x)} values along the bottom, {len(y)} on the side")
        here = np.isfinite(x) & np.isfinite(y)
        ends[0].append(x[here])
        ends[1].append(y[here])
        notes = None if hover is None else [escape_lines(t) for t, h in zip(hover[label], here, strict=True) if h]
        template = f"{escape(x_quantity)}: %{{x:.3~g}}<br>{escape(y_quantity)}: %{{y:.3~g}}"
        plot.add_trace(
            go.Scatter(
                x=x[here],
                y=y[here],
                mode="markers",
                name=escape(label),
                text=notes,
                marker={"size": 6, "opacity": 0.6, "color": PALETTE[i % len(PALETTE)], "line": {"width": 0}},
                hovertemplate=template + ("" if notes is None else "<br>%{text}"),
            )
        )
    if diagonal and any(x.size for x in ends[0]):
        _add_diagonal(plot, np.concatenate(ends[0]), np.concatenate(ends[1]), diagonal)
    axes: dict[str, Any] = {
        "xaxis": {"title": {"text": escape(value_title(x_quantity, unit))}},
        "yaxis": {"title": {"text": escape(value_title(y_quantity, unit))}},
    }
    legend: dict[str, Any] = {"showlegend": len(groups) > 1, "hovermode": "closest"}
    return frame(plot, title=title, caption=caption, alt=alt, height=_HEIGHT, **axes, **legend)


def _add_diagonal(plot: go.Figure, x: np.ndarray, y: np.ndarray, words: str) -> None:
    """The line of equal values where both axes have values, so that it does not stretch either."""
    low, high = max(x.min(), y.min()), min(x.max(), y.max())
    if low >= high:
        return
    line = {"color": MUTED, "dash": "dot", "width": 1}
    plot.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, layer="below", line=line)
    font = {"size": 11, "color": MUTED}
    plot.add_annotation(
        x=high, y=high, xanchor="left", yanchor="bottom", text=escape(words), font=font, showarrow=False
    )
