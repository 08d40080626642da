"""A token strip as a drawing that needs no script: an SVG document, for papers and for viewers that show images."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from probekit.core import unknown

from .figure import Quantity, TokenStrip
from .text import visible, without_hover
from .theme import DIVERGING, FONT, INK, MUTED, RULE, SEQUENTIAL, UNDEFINED

MONOSPACE = "'DejaVu Sans Mono', 'Liberation Mono', Menlo, Consolas, monospace"
_SIZE = 12.0  # of the font, pixels
_CELL = 0.602 * _SIZE  # width of a character in those fonts
_LINE, _BOX, _PAD, _GAP = 20.0, 17.0, 1.5, 1.0
_SIDE = 14.0  # between the edge and what is drawn
_GLYPHS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
_RAMP = 140.0
_HEX = "#{:02x}{:02x}{:02x}"


def color_limits(values: np.ndarray, q: Quantity) -> tuple[float | None, float | None]:
    """Values of the lightest and the darkest colour of a quantity; None where there is nothing to colour."""
    known = values[np.isfinite(values) & ((values > 0) | (q.scale != "log"))]
    if not known.size and (q.low is None or q.high is None):
        return None, None
    low = float(known.min()) if q.low is None or (q.scale == "log" and q.low <= 0) else float(q.low)
    high = float(known.max()) if q.high is None else float(q.high)
    if q.scale == "diverging":
        bound = max(abs(low), abs(high))
        return -bound, bound
    return low, high


def quantity_of(strip: TokenStrip, label: str | None) -> Quantity:
    """The quantity of this label; the first one if None.

    Raises:
        UnknownName: the strip has no such quantity.
    """
    found = {q.label: q for q in strip.quantities}
    if label is None:
        return strip.quantities[0]
    if label not in found:
        raise unknown("quantity of this strip", label, found)
    return found[label]


def strip_svg(
    strip: TokenStrip, *, quantity: str | None = None, width: float = 720, title: bool = True, most_lines: int = 0
) -> tuple[str, tuple[float, float]]:
    """The strip, coloured by one quantity, as an SVG document; and its width and height in pixels.

    Args:
        strip: what to draw.
        quantity: label of the quantity; the first one if None.
        width: in pixels; the height follows from the text.
        title: with title and caption.
        most_lines: lines of tokens that are drawn at most; 0 for all.
    """
    chosen = quantity_of(strip, quantity)
    scale = _Scale.of(chosen)
    page = _Page(width)
    if title:
        page.words(visible(strip.title, keep_whitespace=True), size=15, weight=600, color=INK)
        page.down(6)
    page.legend(chosen, scale)
    page.parts.append(f'<g font-family={quoteattr(MONOSPACE)} font-size="{_SIZE:g}">')
    _tokens(page, strip, [scale.color(float(v)) for v in chosen.values], most_lines)
    page.parts.append("</g>")
    if title:
        page.down(6)
        page.words(visible(without_hover(strip.caption), keep_whitespace=True), size=12, weight=400, color=MUTED)
    height = math.ceil(page.y + 8)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height}" viewBox="0 0 {width:g} {height}" '
        f'role="img">'
        f"<title>{_xml(strip.title)}</title><desc>{_xml(strip.alt)}</desc>"
        f'<rect width="{width:g}" height="{height}" fill="#ffffff"/>'
    )
    return head + "".join(page.parts) + "</svg>", (float(width), float(height))


def _tokens(page: _Page, strip: TokenStrip, colors: list[str], most_lines: int) -> None:
    """Lays the tokens out in lines, one text below the other."""
    several = len(set(np.asarray(strip.texts).tolist())) > 1
    first = page.lines = 1
    last: object = None
    for i, token in enumerate(strip.tokens):
        text = np.asarray(strip.texts)[i]
        if i == 0 or text != last:
            page.text_begins(f"text {text}" if several else "", first=i == 0)
        last = text
        for piece in _pieces(visible(token, keep_whitespace=True), page.columns):
            if page.overflows(piece):
                page.new_line()
            if most_lines and page.lines > most_lines + first - 1:
                page.note(f"… {len(strip.tokens) - i:,} more tokens")
                return
            page.box(piece, colors[i])
        if "\n" in token:
            page.new_line()
    page.end_line()


def _pieces(text: str, most: int) -> Iterator[str]:
    """A token that is longer than a line in parts that are not; marks stay with what they stand on."""
    piece = ""
    for char in "".join(_GLYPHS.get(c, c) for c in text):
        if piece and _columns(char) and _columns(piece + char) > most:
            yield piece
            piece = ""
        if not piece and unicodedata.category(char)[0] == "M":
            piece = "◌"
        piece += char
    yield piece


def _columns(text: str) -> int:
    """Characters' widths of a text in a monospaced font."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return sum(unicodedata.category(c) not in ("Mn", "Me") for c in text) + wide


def _xml(text: str) -> str:
    return escape(visible(text, keep_whitespace=True))


@dataclass
class _Page:
    """What has been drawn so far, and where the next thing goes."""

    width: float
    y: float = 10.0
    x: float = _SIDE
    lines: int = 1
    parts: list[str] = field(default_factory=list)

    @property
    def columns(self) -> int:
        return max(4, int((self.width - 2 * _SIDE - 2 * _PAD) / _CELL))

    def down(self, by: float) -> None:
        self.y += by

    def words(self, text: str, *, size: float, weight: int, color: str) -> None:
        """A paragraph of running text."""
        mean = size * (0.56 if weight > 500 else 0.48)  # width of a character
        for line in textwrap.wrap(text, max(12, int((self.width - 2 * _SIDE) / mean))):
            self.y += round(size * 1.35)
            self.parts.append(_text(_SIDE, self.y, line, size=size, weight=weight, color=color))

    def legend(self, quantity: Quantity, scale: _Scale) -> None:
        """The name of the quantity, and what its colours stand for."""
        self.y += 17
        size = 12.0
        self.parts.append(_text(_SIDE, self.y, quantity.label, size=size, weight=600, color=INK))
        x = _SIDE + 0.58 * size * _columns(quantity.label) + 16
        if x + _RAMP + 150 > self.width:
            x, self.y = _SIDE, self.y + 18
        for part, length in scale.legend(quantity, x, self.y):
            self.parts.append(part)
            x += length
        self.y += 8

    def text_begins(self, name: str, *, first: bool) -> None:
        if not first:
            self.end_line()
            self.parts.append(_rule(self.width, self.y + 6))
            self.y += 12
        if name:
            self.y += 15
            self.parts.append(_text(_SIDE, self.y, name, size=11, weight=600, color=MUTED))
            self.y += 4

    def overflows(self, piece: str) -> bool:
        return self.x > _SIDE and self.x + _columns(piece) * _CELL + 2 * _PAD > self.width - _SIDE

    def new_line(self) -> None:
        self.x, self.y, self.lines = _SIDE, self.y + _LINE, self.lines + 1

    def end_line(self) -> None:
        if self.x > _SIDE:
            self.new_line()

    def note(self, text: str) -> None:
        self.y += 15 if self.x == _SIDE else _LINE + 15
        self.parts.append(_text(_SIDE, self.y, text, size=11, weight=400, color=MUTED))
        self.x, self.y = _SIDE, self.y + 4

    def box(self, piece: str, color: str) -> None:
        """One token, or a part of one, on its colour."""
        length = max(_columns(piece), 0.6) * _CELL
        top = self.y + (_LINE - _BOX) / 2
        self.parts.append(
            f'<rect x="{self.x:.2f}" y="{top:.2f}" width="{length + 2 * _PAD:.2f}" height="{_BOX:g}" rx="2" fill="{color}"/>'
        )
        if piece:
            ink = _ink(color)
            shown = "".join(
                f'<tspan fill-opacity="0.4">{c}</tspan>' if c in _GLYPHS.values() else escape(c) for c in piece
            )
            self.parts.append(
                f'<text x="{self.x + _PAD:.2f}" y="{top + 12.6:.2f}" textLength="{length:.2f}" '
                f'lengthAdjust="spacingAndGlyphs" fill="{ink}" unicode-bidi="isolate">{shown}</text>'
            )
        self.x += length + 2 * _PAD + _GAP


@dataclass(frozen=True)
class _Scale:
    """How the values of one quantity become colours."""

    low: float | None
    high: float | None
    kind: str
    values: np.ndarray

    @classmethod
    def of(cls, quantity: Quantity) -> _Scale:
        values = np.asarray(quantity.values, dtype=float)
        return cls(*color_limits(values, quantity), quantity.scale, values)

    @property
    def stops(self) -> tuple[str, ...]:
        return DIVERGING if self.kind == "diverging" else SEQUENTIAL

    def color(self, value: float) -> str:
        if self.low is None or self.high is None or not math.isfinite(value):
            return UNDEFINED
        ends = [self.low, self.high, max(value, self.low) if self.kind == "log" else value]
        low, high, at = (math.log(v) for v in ends) if self.kind == "log" else ends
        share = min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 0.5
        place = share * (len(self.stops) - 1)
        below = min(int(place), len(self.stops) - 2)
        pair = zip(_channels(self.stops[below]), _channels(self.stops[below + 1]), strict=True)
        return _HEX.format(*(round(a + (b - a) * (place - below)) for a, b in pair))

    def legend(self, quantity: Quantity, x: float, y: float) -> Iterator[tuple[str, float]]:
        """Parts of the colour bar from left to right, and the room each takes."""

        def label(text: str) -> tuple[str, float]:
            return _text(x, y, text, size=11, weight=400, color=MUTED), 6.1 * _columns(text) + 6

        known = self.values[np.isfinite(self.values)]
        if self.low is not None and self.high is not None:
            part = label(("≤ " if (known < self.low).any() else "") + number(self.low))
            yield part
            x += part[1]
            yield self._ramp(x, y), _RAMP + 8
            x += _RAMP + 8
            unit = "" if quantity.unit == "1" else f" {quantity.unit}"
            more = ", log scale" if self.kind == "log" else ""
            part = label(("≥ " if (known > self.high).any() else "") + number(self.high) + unit + more)
            yield part
            x += part[1] + 8
        if len(known) < len(self.values):
            yield f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="14" height="10" rx="2" fill="{UNDEFINED}"/>', 18
            x += 20
            yield label("undefined")

    def _ramp(self, x: float, y: float) -> str:
        name = f"pk-{'diverging' if self.kind == 'diverging' else 'sequential'}"
        last = len(self.stops) - 1
        stops = "".join(f'<stop offset="{i / last:.4g}" stop-color="{c}"/>' for i, c in enumerate(self.stops))
        return (
            f'<linearGradient id="{name}">{stops}</linearGradient><rect x="{x:.1f}" y="{y - 9:.1f}" width="{_RAMP:g}" '
            f'height="10" rx="2" fill="url(#{name})" stroke="{RULE}" stroke-width="0.6"/>'
        )


def number(value: float) -> str:
    """A number as a reader wants it: three digits, or whole thousands."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 1e9:
        return f"{value:.2e}"
    return f"{value:,.0f}" if size >= 1000 else f"{float(f'{value:.3g}'):g}"


def _channels(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def _ink(color: str) -> str:
    """Dark or white, whichever is read more easily on a colour."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _channels(color)]
    return INK if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.22 else "#ffffff"


def _text(x: float, y: float, text: str, *, size: float, weight: int, color: str) -> str:
    style = f'font-family={quoteattr(FONT)} font-size="{size:g}" font-weight="{weight}" fill="{color}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{_xml(text)}</text>'


def _rule(width: float, y: float) -> str:
    line = f'x1="{_SIDE}" x2="{width - _SIDE}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line {line} stroke="{RULE}" stroke-dasharray="4 3"/>'
