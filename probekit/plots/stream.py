"""Shares that add up to one, along a text: which outcomes lie ahead at each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import frame
from .figure import Figure
from .text import escape, visible
from .theme import INK, MUTED, PALETTE

if TYPE_CHECKING:
    import xarray as xr

_HEIGHT = 380
_MOST_LABELS = 60  # tokens written under the streams; of more, every n-th


def stream(
    shares: xr.DataArray,
    tokens: Sequence[str],
    *,
    title: str,
    caption: str,
    alt: str,
    marks: Sequence[tuple[int, str]] = (),
    quantity: str = "share of continuations",
) -> Figure:
    """How shares that add up to one change along a text, the text written under them.

    Args:
        shares: axes token, case; the cases are the layers of the stream, the first at the bottom.
        tokens: what each token shows as.
        title: the finding.
        caption: model, prompt, n, and how to read it.
        alt: what a reader who cannot see it needs to know.
        marks: places on the token axis that stand out, with what they are.
        quantity: what the shares are of.
    """
    import plotly.graph_objects as go

    if shares.dims != ("token", "case") or len(tokens) != shares.sizes["token"]:
        raise ValueError(f"a stream needs axes token, case and as many tokens; found {shares.dims} and {len(tokens)}")
    x, plot = list(range(len(tokens))), go.Figure()
    for i, case in enumerate(map(str, shares["case"].values)):
        plot.add_scatter(
            x=x,
            y=np.asarray(shares.values[:, i], dtype=float),
            name=escape(case),
            stackgroup="one",
            mode="lines",
            line={"width": 0.6, "color": "#ffffff"},
            fillcolor=PALETTE[i % len(PALETTE)] if case != "other" else "#c9cdd3",
            hovertemplate="%{y:.0%}",
        )
    for place, label in marks:
        plot.add_vline(x=place, line={"color": INK, "width": 1.4, "dash": "dot"})
        plot.add_annotation(
            x=place, y=1.0, yref="paper", yanchor="bottom", text=escape(label), showarrow=False,
            font={"size": 11, "color": MUTED},
        )  # fmt: skip
    every = max(1, -(-len(tokens) // _MOST_LABELS))
    at = list(range(0, len(tokens), every))
    axis: dict[str, Any] = {
        "title": {"text": escape("token of the answer")},
        "tickmode": "array",
        "tickvals": at,
        "ticktext": [escape(visible(tokens[i])[:14]) for i in at],
        "tickangle": -60,
        "tickfont": {"size": 10},
        "showgrid": False,
        "range": [-0.5, max(len(tokens) - 0.5, 0.5)],
    }
    y_axis = {"title": {"text": escape(quantity)}, "range": [0, 1], "tickformat": ".0%"}
    return frame(
        plot, title=title, caption=caption, alt=alt, height=_HEIGHT, hovermode="x unified", xaxis=axis, yaxis=y_axis,
        showlegend=True, places=x,
    )  # fmt: skip
