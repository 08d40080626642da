"""One quiet look for every figure."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
INK = "#20262e"
MUTED = "#5c6672"
RULE = "#d9dee4"
GRID = "#edf0f3"
UNDEFINED = "#e3e5e8"

# Told apart with every common colour-vision deficiency (after Okabe and Ito, 2008), yellow left out for contrast.
PALETTE = ("#0b6bab", "#d0580b", "#0a8f6c", "#b5588f", "#8a6a00", "#3fa2d9", "#50565e", "#7a3fb0")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "solid", "dash", "dot")

# Equal steps of lightness in OKLab, from nearly white to dark blue.
SEQUENTIAL = (
    "#f3f9fc", "#cfe6f2", "#abd2e9", "#8abcdf", "#6ca5d3", "#518ec5",
    "#3d77b3", "#31609b", "#2a4b7e", "#24365c", "#1c2338",
)  # fmt: skip
# Equal steps of lightness on both sides; the middle stands for a meaningful zero.
DIVERGING = (
    "#004f8b", "#286fb0", "#5d90c5", "#8eb2d8", "#bfd3e9", "#f4f5f6",
    "#ebc7c1", "#da9c91", "#c67164", "#ae4537", "#930a02",
)  # fmt: skip

# How every page shows figures. plotly.js would otherwise offer to upload the chart to a web service.
PLOT_CONFIG: dict[str, Any] = {
    "responsive": True,
    "displaylogo": False,
    "typesetMath": False,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}


def colorscale(stops: tuple[str, ...]) -> list[list[Any]]:
    """`stops` as Plotly wants them: evenly spaced from 0 to 1."""
    return [[i / (len(stops) - 1), color] for i, color in enumerate(stops)]


@cache
def template() -> go.layout.Template:
    """The Plotly template of every figure."""
    import plotly.graph_objects as go

    axis = {
        "automargin": True,
        "gridcolor": GRID,
        "linecolor": RULE,
        "showline": True,
        "tickcolor": RULE,
        "ticks": "outside",
        "ticklen": 4,
        "tickfont": {"size": 11, "color": MUTED},
        "title": {"font": {"size": 12, "color": INK}, "standoff": 10},
        "zeroline": False,
    }
    colorbar = {
        "outlinewidth": 0,
        "thickness": 12,
        "ticklen": 3,
        "tickcolor": RULE,
        "tickfont": {"size": 11, "color": MUTED},
        "title": {"font": {"size": 12, "color": INK}, "side": "right"},
    }
    layout = go.Layout(
        font={"family": FONT, "size": 12, "color": INK},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        colorway=PALETTE,
        hoverlabel={
            "bgcolor": "#ffffff",
            "bordercolor": RULE,
            "font": {"family": FONT, "size": 12, "color": INK},
            "align": "left",
        },
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        margin={"l": 64, "r": 24, "t": 56, "b": 56},
        title={"font": {"size": 15, "color": INK}, "x": 0, "xref": "paper", "xanchor": "left", "yanchor": "top"},
        xaxis=axis,
        yaxis=axis,
    )
    # `data` holds dicts: Plotly would otherwise write the full defaults of a trace into every figure.
    return go.layout.Template(layout=layout, data={"heatmap": [{"type": "heatmap", "colorbar": colorbar}]})
