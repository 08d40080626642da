"""Colours of the page, in its light and its dark form."""

from __future__ import annotations

from typing import Any

import streamlit as st

from probekit import plots

LIGHT = {
    "--ink": "#20262e", "--muted": "#5c6672", "--rule": "#d9dee4", "--paper": "#ffffff",
    "--accent": "#2a4b7e", "--bars": "#3d77b3",
}  # fmt: skip
DARK = {
    "--ink": "#e6e9ee", "--muted": "#a3adb9", "--rule": "#3a424d", "--paper": "#0e1117",
    "--accent": "#3d77b3", "--bars": "#6ca5d3",
}  # fmt: skip


def is_dark() -> bool:
    """Whether the reader's page is dark."""
    try:
        return st.context.theme.type == "dark"
    except (AttributeError, RuntimeError):
        return False


def variables() -> dict[str, str]:
    """CSS variables of the components."""
    return DARK if is_dark() else LIGHT


def ramps() -> dict[str, Any]:
    """Colour scales of the components."""
    if is_dark():
        sequential, diverging, undefined = plots.DARK_SEQUENTIAL, plots.DARK_DIVERGING, "#30363f"
    else:
        sequential, diverging, undefined = plots.SEQUENTIAL, plots.DIVERGING, plots.UNDEFINED
    return {"sequential": sequential, "log": sequential, "diverging": diverging, "undefined": undefined}


def fitting(figure: plots.Figure) -> plots.Figure:
    """The figure in the colours of the page."""
    return plots.on_dark(figure) if is_dark() else figure


def plain(text: str) -> str:
    """Any text as Markdown that shows it as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-.!|<>~$:" else c for c in text)
