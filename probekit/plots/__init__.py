"""Figure shapes and their theme. They take named arrays; they never compute statistics, read, write or show."""

from .browser import ExportError
from .charts import bars, dots, histogram
from .curves import lines
from .dark import DARK_DIVERGING, DARK_SEQUENTIAL, on_dark
from .export import static_images
from .figure import Drawing, Drawings, Figure, Quantity, Scale, TokenStrip
from .heatmaps import heatmap
from .landscape import landscape
from .page import figure_json, plotly_js
from .scatter import scatter
from .stream import stream
from .strip_svg import color_limits
from .text import escape, token_label, token_labels, unescape, visible, without_hover
from .theme import DIVERGING, PALETTE, PLOT_CONFIG, SEQUENTIAL, UNDEFINED
from .words import next_words, words_by_id

__all__ = [
    "DARK_DIVERGING",
    "DARK_SEQUENTIAL",
    "DIVERGING",
    "PALETTE",
    "PLOT_CONFIG",
    "SEQUENTIAL",
    "UNDEFINED",
    "Drawing",
    "Drawings",
    "ExportError",
    "Figure",
    "Quantity",
    "Scale",
    "TokenStrip",
    "bars",
    "color_limits",
    "dots",
    "escape",
    "figure_json",
    "heatmap",
    "histogram",
    "landscape",
    "lines",
    "next_words",
    "on_dark",
    "plotly_js",
    "scatter",
    "static_images",
    "stream",
    "token_label",
    "token_labels",
    "unescape",
    "visible",
    "without_hover",
    "words_by_id",
]
