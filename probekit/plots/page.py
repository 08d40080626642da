"""What a web page needs to show figures: the library once, and each figure as JSON."""

from __future__ import annotations

import json
from typing import Any

from .figure import Figure

_HEIGHT = 420


def plotly_js() -> str:
    """The source of plotly.js, for one script element of a page that works offline."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def figure_json(figure: Figure, *, title: bool = True) -> dict[str, Any]:
    """The figure as plain data for `Plotly.newPlot`, which also takes `PLOT_CONFIG`.

    NaN is null, or lies inside packed arrays.

    Args:
        figure: what to show.
        title: keep the title in the plot; without it the page shows the title itself.
    """
    plain = json.loads(str(figure.plot.to_json(engine="json")))
    data, layout = plain["data"], plain["layout"]
    if not title:
        layout.pop("title", None)
        margin = layout.setdefault("margin", {})
        top = 36 if layout.get("showlegend") else 26
        layout["height"] = layout.get("height", _HEIGHT) + top - margin.get("t", top)
        margin["t"] = top
    return {"data": data, "layout": layout}
