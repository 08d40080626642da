"""Token strips: the text itself, coloured by a quantity that the reader chooses."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np

from probekit.plots import DIVERGING, SEQUENTIAL, UNDEFINED, Quantity, TokenStrip, color_limits, visible

from .assets import asset, environment, script_json

_SIGNIFICANT = 6


def strip_html(strip: TokenStrip, *, image: str = "") -> str:
    """A strip as a piece of HTML that works by itself in a notebook's output, without any outside file.

    Tokens travel as JSON and are shown through `textContent`; they are never part of the markup.

    Args:
        strip: what to show.
        image: `data:` address of a picture that stands where no script runs.
    """
    return environment().get_template("strip.html.j2").render(
        id=f"pk-{uuid.uuid4().hex}",
        title=visible(strip.title, keep_whitespace=True),
        caption=visible(strip.caption, keep_whitespace=True),
        alt=visible(strip.alt, keep_whitespace=True),
        data=script_json(strip_data(strip)),
        css=asset("strip.css"),
        js=asset("strip.js"),
        image=image,
    )  # fmt: skip


def strip_data(strip: TokenStrip) -> dict[str, Any]:
    """What `strip.js` draws, as plain data for JSON."""
    texts = np.asarray(strip.texts).tolist()
    return {
        "alt": strip.alt,
        "tokens": [visible(t, keep_whitespace=True) for t in strip.tokens],
        "texts": texts,
        "positions": _positions(texts),
        "notes": [visible(n, keep_whitespace=True) for n in strip.notes],
        "quantities": [_quantity(q) for q in strip.quantities],
        "colors": {"sequential": SEQUENTIAL, "log": SEQUENTIAL, "diverging": DIVERGING, "undefined": UNDEFINED},
    }


def _positions(texts: list[Any]) -> list[int]:
    """Place of each token within its text, counted from 0."""
    seen: dict[Any, int] = {}
    positions = []
    for text in texts:
        positions.append(seen.get(text, 0))
        seen[text] = positions[-1] + 1
    return positions


def _quantity(q: Quantity) -> dict[str, Any]:
    values = np.asarray(q.values, dtype=float)
    low, high = color_limits(values, q)
    return {
        "label": q.label,
        "unit": "" if q.unit == "1" else q.unit,
        "scale": q.scale,
        "low": low,
        "high": high,
        "values": [float(f"{v:.{_SIGNIFICANT}g}") if np.isfinite(v) else None for v in values],
    }
