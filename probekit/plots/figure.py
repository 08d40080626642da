"""What a figure is: a Plotly figure or a token strip, with caption and alternative text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from probekit.core import unknown

from .text import unescape
from .theme import PLOT_CONFIG

if TYPE_CHECKING:
    import plotly.graph_objects as go

Scale = Literal["sequential", "diverging", "log"]


@dataclass(frozen=True)
class Figure:
    """A Plotly figure that explains itself.

    Args:
        plot: the Plotly figure; its title states the finding.
        caption: model, corpus, n and how to read it.
        alt: what a reader who cannot see it needs to know.
    """

    plot: go.Figure
    caption: str
    alt: str

    @property
    def title(self) -> str:
        """The title, which states the finding, as plain text."""
        return unescape(str(self.plot["layout"]["title"]["text"]))

    def save(
        self,
        path: str | Path,
        *,
        width: float | None = None,
        height: float | None = None,
        scale: float | None = None,
        title: bool = True,
    ) -> Path:
        """Write the figure for a paper: `.svg` or `.pdf` (vectors), `.png`, or `.html` (live, offline).

        Images need kaleido (`pip install 'probekit[notebook]'`) and Chrome or Chromium. Fonts keep their size (12
        pixels, 9 points) whatever the width, so give the width it will be printed at: 320 for a column, 720 for a page.

        Args:
            path: the file; its ending is the format.
            width: in pixels, of which 96 are an inch in a PDF; 720 if None.
            height: in pixels; what the figure asks for if None.
            scale: pixels of a PNG per pixel of the layout; 2 if None.
            title: with the title; a paper sets it below the figure.

        Raises:
            InputError: the ending is unknown, or a size is none.
            StoreError: the folder is missing, or the file cannot be written.
            ExportError: kaleido or a browser is missing, or it cannot draw this.
        """
        from .export import save_drawing

        return save_drawing(self, path, width=width, height=height, scale=scale, title=title)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **kwargs: Any) -> Any:
        from .export import notebook_bundle

        live = self.plot._repr_mimebundle_(include, exclude, config=PLOT_CONFIG, **kwargs)
        return notebook_bundle(self, lambda image: live)


@dataclass(frozen=True)
class Quantity:
    """One number per token, by which a strip can be coloured.

    Args:
        label: what it is, in words.
        unit: its unit.
        values: axis `token`; NaN where it is undefined (drawn grey).
        scale: how values become colours; "diverging" only around a meaningful zero.
        low: value of the lightest colour; the smallest value if None.
        high: value of the darkest colour; the largest value if None.
    """

    label: str
    unit: str
    values: np.ndarray
    scale: Scale = "sequential"
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TokenStrip:
    """The text itself, token by token, coloured by a quantity that the reader chooses.

    Tokens are untrusted text: a renderer must never interpret them as markup.

    Args:
        title: states what to look for.
        tokens: what each token shows as.
        texts: index of the text each token belongs to; one line break per text.
        quantities: what the strip can be coloured by; the first is shown first.
        caption: how to read it.
        alt: what a reader who cannot see it needs to know.
        notes: more lines for the hover, by token; empty or one per token.
    """

    title: str
    tokens: tuple[str, ...]
    texts: np.ndarray
    quantities: tuple[Quantity, ...]
    caption: str
    alt: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.tokens)
        sizes = {"texts": len(self.texts)} | {q.label: len(q.values) for q in self.quantities}
        if self.notes:
            sizes["notes"] = len(self.notes)
        wrong = {k: v for k, v in sizes.items() if v != n}
        if wrong or not self.quantities:
            raise ValueError(f"a strip of {n} tokens needs quantities of that length, found {wrong or 'none'}")

    def save(
        self,
        path: str | Path,
        *,
        quantity: str | None = None,
        width: float | None = None,
        scale: float | None = None,
        title: bool = True,
    ) -> Path:
        """Write the strip for a paper: `.svg` or `.pdf` (vectors), `.png`, or `.html` (live, offline).

        Args:
            path: the file; its ending is the format.
            quantity: label of the quantity that colours the tokens; the first one if None.
            width: in pixels, of which 96 are an inch in a PDF; 720 if None. The height follows from the text.
            scale: pixels of a PNG per pixel of the layout; 2 if None.
            title: with title and caption; a paper sets them below the figure.

        Raises:
            InputError: the ending or the quantity is unknown, or a size is none.
            StoreError: the folder is missing, or the file cannot be written.
            ExportError: for PDF and PNG: kaleido or a browser is missing.
        """
        from .export import save_drawing

        return save_drawing(self, path, quantity=quantity, width=width, scale=scale, title=title)

    def _repr_html_(self) -> str:
        from probekit.reporting import strip_html

        return strip_html(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        from .export import notebook_bundle

        return notebook_bundle(self, self._live)

    def _live(self, image: str) -> dict[str, str]:
        from probekit.reporting import strip_html

        return {"text/html": strip_html(self, image=image)}


Drawing = Figure | TokenStrip


class Drawings(dict[str, Drawing]):
    """The figures of a result, by name."""

    def save(
        self,
        folder: str | Path,
        format: str = "svg",
        *,
        width: float | None = None,
        scale: float | None = None,
        title: bool = True,
    ) -> list[Path]:
        """Write each of them into a folder, under its name.

        Args:
            folder: is made if it is not there.
            format: "svg", "pdf", "png" or "html".
            width: of each, in pixels, of which 96 are an inch in a PDF; 720 if None.
            scale: pixels of a PNG per pixel of the layout; 2 if None.
            title: with the title; a paper sets it below the figure.

        Raises:
            InputError: the format is none of these.
            StoreError: the folder cannot be written.
            ExportError: kaleido or a browser is missing, or it cannot draw one of them.
        """
        from .export import save_drawings

        return save_drawings(self, folder, format, width=width, scale=scale, title=title)

    def __missing__(self, name: str) -> Drawing:
        raise unknown("figure", name, self)

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {drawing.title}" for name, drawing in self.items()) or "no figures"
