"""What a figure is: a Plotly figure or a token strip, with caption and alternative text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

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

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **kwargs: Any) -> Any:
        return self.plot._repr_mimebundle_(include, exclude, config=PLOT_CONFIG, **kwargs)


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

    def _repr_html_(self) -> str:
        from probekit.reporting import strip_html

        return strip_html(self)


Drawing = Figure | TokenStrip
Drawings = Mapping[str, Drawing]
