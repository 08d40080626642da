"""The same figures on a dark page."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from .figure import Figure
from .theme import DIVERGING, GRID, INK, MUTED, PALETTE, RULE, SEQUENTIAL, UNDEFINED, template

PAPER = "#0e1117"
DARK_PALETTE = ("#5aa9e6", "#f08a3c", "#3cc9a0", "#e08bc0", "#cfa92e", "#9ad5f7", "#aab2bd", "#bd93ee")
# The ends stand out, the middle recedes, as on a light page.
DARK_SEQUENTIAL = tuple(reversed(SEQUENTIAL))
DARK_DIVERGING = (
    "#a8d4f7", "#78b4e6", "#4f92c9", "#38709f", "#2a4d6c", "#262b33",
    "#5f3a35", "#8f4f45", "#bf6a5c", "#e48d7f", "#fbb9ae",
)  # fmt: skip
_SWAPPED = {
    INK: "#e6e9ee",
    MUTED: "#a3adb9",
    RULE: "#3a424d",
    GRID: "#222831",
    UNDEFINED: "#30363f",
    "#ffffff": PAPER,
    "#fff": PAPER,
    "white": PAPER,
    **dict(zip(PALETTE, DARK_PALETTE, strict=True)),
    **dict(zip(SEQUENTIAL, DARK_SEQUENTIAL, strict=True)),
    **dict(zip(DIVERGING, DARK_DIVERGING, strict=True)),
}


def on_dark(figure: Figure) -> Figure:
    """The figure in colours for a dark page; the numbers in it are untouched."""
    import plotly.graph_objects as go
    import plotly.io as pio

    plain = json.loads(pio.to_json(figure.plot, engine="json"))
    plain["layout"]["template"] = json.loads(pio.to_json(go.Figure(layout={"template": template()}), engine="json"))[
        "layout"
    ]["template"]
    return replace(figure, plot=go.Figure(_swapped(plain)))


def _swapped(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _swapped(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_swapped(value) for value in part]
    return _SWAPPED.get(part.lower(), part) if isinstance(part, str) and len(part) <= 7 else part
