"""Two clickable views: the text as tokens (spine), and a heat map (grid).

Tokens are untrusted. They travel as data and reach the page through `textContent` or canvas text, never as markup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from probekit import plots
from probekit.reporting import asset, strip_data
from probekit_dashboard import look

_HERE = Path(__file__).parent


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@cache
def _spine() -> Any:
    return st.components.v2.component(
        "probekit_spine",
        html='<div class="pk-spine"></div>',
        css=f"{asset('strip.css')}\n{_read('spine.css')}",
        js=f"{asset('strip.js')}\n{_read('spine.js')}",
    )


@cache
def _grid() -> Any:
    return st.components.v2.component(
        "probekit_grid", html='<div class="pk-grid"></div>', css=_read("grid.css"), js=_read("grid.js")
    )


def _plain(values: np.ndarray, digits: int = 4) -> list[float | None]:
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in np.asarray(values, dtype=float).ravel()]


def spine(
    strip: plots.TokenStrip,
    *,
    key: str,
    selected: int,
    picked: int = 0,
    lines: Sequence[plots.Quantity] = (),
    on_token: Callable[[int], None] | None = None,
    on_by: Callable[[str], None] | None = None,
    height: int = 168,
) -> None:
    """The text as tokens, coloured by a quantity that the reader chooses, over timelines.

    Args:
        strip: tokens and quantities.
        key: of the component; one that is in no other place of the page.
        selected: the token that is marked.
        picked: the quantity that is shown.
        lines: quantities that are drawn as timelines.
        on_token: is told which token was clicked.
        on_by: is told which quantity was chosen.
        height: of the text, in pixels; more of it scrolls.
    """
    data = strip_data(strip) | {"colors": look.ramps()}

    def told(name: str, whom: Callable[[Any], None] | None) -> Callable[[], None]:
        return lambda: whom(st.session_state[key][name]) if whom and st.session_state[key][name] is not None else None

    _spine()(
        key=key,
        data={
            "strip": data,
            "selected": selected,
            "picked": picked,
            "look": look.variables() | {"--height": f"{height}px"},
            "lines": [{"label": q.label, "unit": q.unit, "values": _plain(q.values)} for q in lines],
        },
        on_token_change=told("token", on_token),
        on_by_change=told("by", on_by),
    )


@dataclass(frozen=True)
class Grid:
    """A heat map, rows upward.

    Args:
        values: axes row, column; NaN where undefined.
        rows: labels, from below.
        columns: labels.
        row_name: what a row is.
        column_name: what a column is.
        quantity: what the values are.
        unit: their unit.
        alt: what a reader who cannot see it needs to know.
        scale: "sequential", "diverging" (around 0) or "log".
        low: value of the lightest colour; the smallest if None.
        high: value of the darkest colour; the largest if None.
        words: a word in each cell, row by row.
        hover: longer labels of the columns.
        row_hover: longer labels of the rows.
        cell: height of a row in pixels; less where there are many.
        least: smallest height of a row in pixels.
    """

    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    row_name: str
    column_name: str
    quantity: str
    unit: str
    alt: str
    scale: plots.Scale = "sequential"
    low: float | None = None
    high: float | None = None
    words: Sequence[str] | None = None
    hover: Sequence[str] | None = None
    row_hover: Sequence[str] | None = None
    cell: int = 17
    least: int = 14

    def data(self, selected: tuple[int, int] | None) -> dict[str, Any]:
        """What the component draws, as plain data."""
        known = self.values[np.isfinite(self.values) & ((self.values > 0) | (self.scale != "log"))]
        low = self.low if self.low is not None else float(known.min()) if known.size else 0.0
        high = self.high if self.high is not None else float(known.max()) if known.size else 1.0
        if self.scale == "diverging":
            high = max(abs(low), abs(high))
            low = -high
        colors = look.ramps()
        return {
            "values": _plain(self.values), "rows": list(self.rows), "columns": list(self.columns),
            "row_name": self.row_name, "column_name": self.column_name, "quantity": self.quantity,
            "unit": "" if self.unit == "1" else self.unit, "alt": self.alt, "scale": self.scale, "low": low, "high": high,
            "words": None if self.words is None else list(self.words),
            "hover": None if self.hover is None else list(self.hover),
            "row_hover": None if self.row_hover is None else list(self.row_hover),
            "cell": self.cell, "least": self.least, "tall": any(len(c) > 3 for c in self.columns), "cross": True,
            "selected": None if selected is None else list(selected),
            "colors": list(colors[self.scale]), "undefined": colors["undefined"], "look": look.variables(),
        }  # fmt: skip


def grid(
    drawn: Grid, *, key: str, selected: tuple[int, int] | None, on_cell: Callable[[int, int], None] | None = None
) -> None:
    """A heat map whose cells can be clicked, and reached by the arrow keys and Enter.

    Args:
        drawn: what it shows.
        key: of the component.
        selected: row and column that are marked.
        on_cell: is told row and column of a clicked cell.
    """

    def told() -> None:
        cell = st.session_state[key]["cell"]
        if cell is not None and on_cell is not None:
            on_cell(int(cell[0]), int(cell[1]))

    _grid()(key=key, data=drawn.data(selected), on_cell_change=told)
