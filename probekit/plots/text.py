"""Untrusted text on figures: tokens shown literally, whatever they contain."""

from __future__ import annotations

import html
import re
import textwrap
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

_GLYPHS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
# Control, format (bidirectional overrides among them), surrogate, private, unassigned, line and paragraph separator.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_TITLE_WIDTH = 92
_LABEL_LENGTH = 16


def escape(text: str) -> str:
    """`text` so that Plotly shows it literally.

    Plotly reads pseudo-HTML (`<b>`, `<a href>`, `<br>`), entities, `%{x}` templates and `$…$` formulas in
    every label, title and hover text. Whatever reaches a figure from outside goes through here once.
    """
    text = visible(text, keep_whitespace=True)
    text = text.replace("&", "&#38;").replace("<", "&#60;").replace(">", "&#62;")
    return text.replace("$", "&#36;").replace("%{", "&#37;{")


def escape_lines(text: str) -> str:
    """Several lines of text, each escaped, with Plotly's line break between them."""
    return "<br>".join(escape(line) for line in text.split("\n"))


def wrapped(text: str, width: int = _TITLE_WIDTH) -> str:
    """`text` escaped and broken into lines of at most `width` characters."""
    return "<br>".join(escape(line) for line in textwrap.wrap(text, width)) or ""


def unescape(text: str) -> str:
    """The plain text that `escape`, `escape_lines` or `wrapped` made a Plotly text of; line breaks become spaces."""
    return html.unescape(text.replace("<br>", " "))


def without_hover(text: str) -> str:
    """A caption without its sentences about what the mouse shows, for pictures that do not answer it."""
    return re.sub(r"\s*\bHover [^.]*(\.|$)", "", text)


def visible(text: str, *, keep_whitespace: bool = False) -> str:
    """`text` with everything that would not show replaced by something that does.

    Args:
        text: any text, lone surrogates included.
        keep_whitespace: leave blank, newline and tab as they are; glyphs (␣ ↵ ⇥) replace them otherwise.
    """
    if text.isascii() and text.isprintable() and (keep_whitespace or " " not in text):
        return text
    return "".join(_shown(c, keep_whitespace) for c in text)


def _shown(char: str, keep_whitespace: bool) -> str:
    if char in _GLYPHS:
        return char if keep_whitespace else _GLYPHS[char]
    if unicodedata.category(char) in _HIDDEN:
        return char.encode("unicode_escape").decode("ascii")
    return char


def token_label(string: str, pos: int) -> str:
    """A label for one token that is unique within its text, such as `(3)␣the`; plain text, not yet escaped.

    A long token is cut, so that it does not take the room of the figure.
    """
    shown = visible(string)
    return f"({pos}){shown if len(shown) <= _LABEL_LENGTH else shown[: _LABEL_LENGTH - 1] + '…'}"


def token_labels(coords: xr.DataArray | xr.Dataset) -> list[str]:
    """Unique labels for the `token` axis of an array; several texts are told apart by `1:` in front."""
    size = coords.sizes["token"]
    pos = coords["pos"].values if "pos" in coords.coords else range(size)
    strings = coords["token_str"].values if "token_str" in coords.coords else [""] * size
    labels = [token_label(str(s), int(p)) for s, p in zip(strings, pos, strict=True)]
    if "text" in coords.coords and len(set(coords["text"].values.tolist())) > 1:
        labels = [f"{t}:{label}" for t, label in zip(coords["text"].values, labels, strict=True)]
    return unique(labels)


def unique(labels: list[str]) -> list[str]:
    """`labels` with the place in the list in front of those that occur more than once.

    Plotly draws equal category labels in one place.
    """
    counts = Counter(labels)
    if len(counts) == len(labels):
        return labels
    marked = [f"{i}·{label}" if counts[label] > 1 else label for i, label in enumerate(labels)]
    return marked if len(set(marked)) == len(marked) else [f"{i}·{label}" for i, label in enumerate(labels)]
