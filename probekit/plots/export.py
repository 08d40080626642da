"""Figures as files for a paper, and as images in a notebook."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape

from probekit.core import InputError, StoreError, unknown

from .axes import title_pad
from .browser import ExportError, NoBrowserError, figure_image, missing, picture_of
from .figure import Drawing, Figure, TokenStrip
from .page import figure_json
from .strip_svg import strip_svg
from .text import visible, wrapped
from .theme import PLOT_CONFIG

FORMATS = ("svg", "pdf", "png", "html")
SWITCH = "PROBEKIT_STATIC_IMAGES"
_WIDTH = 720.0
_HEIGHT = 420.0
_TITLE = 7.4  # mean width of a title's characters, pixels
_MOST_LINES = 30  # of a strip, in a notebook
_NOTEBOOK_WIDTH = 820.0
StaticImages = bool | Literal["only"]


def save_drawing(
    drawing: Drawing,
    path: str | Path,
    *,
    quantity: str | None = None,
    width: float | None = None,
    height: float | None = None,
    scale: float | None = None,
    title: bool = True,
) -> Path:
    """Write a figure or a strip to a file; what `Figure.save` and `TokenStrip.save` say."""
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise unknown("ending of an image file", path.suffix, (f".{f}" for f in FORMATS), f"The file was {path}.")
    for name, value in (("width", width), ("height", height), ("scale", scale)):
        if value is not None and not 0 < value < 20_000:
            raise InputError(f"{name}={value} is no size; give a number of pixels (a factor for scale) above 0.")
    _writable(path)
    if kind == "html":
        _write(path, _page(drawing).encode())
    elif isinstance(drawing, Figure):
        _write(path, _figure_bytes(drawing, kind, (width, height, scale), title=title))
    else:
        svg, size = strip_svg(drawing, quantity=quantity, width=width or _WIDTH, title=title)
        _write(path, svg.encode() if kind == "svg" else picture_of(svg, kind, size, scale or 2.0))
    return path


def save_drawings(
    drawings: Mapping[str, Drawing],
    folder: str | Path,
    format: str = "svg",
    *,
    width: float | None = None,
    scale: float | None = None,
    title: bool = True,
) -> list[Path]:
    """Write figures and strips by name into a folder; what `Drawings.save` says."""
    if format not in FORMATS:
        raise unknown("format of an image", format, FORMATS)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be made: {error.strerror or error}.") from error
    names = {name: re.sub(r"[^\w.-]+", "-", name) for name in drawings}
    return [
        save_drawing(drawing, folder / f"{names[name]}.{format}", width=width, scale=scale, title=title)
        for name, drawing in drawings.items()
    ]


def static_images(show: StaticImages | None = None) -> StaticImages:
    """Whether figures in a notebook carry an image as well, for viewers that run no scripts.

    GitHub, PDF export and mail show the image; a notebook that runs shows the live figure. Needs kaleido and Chrome or
    Chromium, and does nothing without them. The environment variable PROBEKIT_STATIC_IMAGES (1, 0, only) says the same.

    Args:
        show: True (the default at the start) for both, False for live figures alone, "only" for the image alone, which
            keeps a notebook that is committed small; None asks.
    """
    if show is not None:
        if show not in (True, False, "only"):
            raise InputError(f"static_images takes True, False or 'only', found {show!r}.")
        os.environ[SWITCH] = str(int(show)) if isinstance(show, bool) else show
    said = os.environ.get(SWITCH, "1").strip().lower()
    return "only" if said == "only" else said not in ("0", "false", "no", "off")


def notebook_bundle(drawing: Drawing, live: Callable[[str], Mapping[str, Any]]) -> Any:
    """What a notebook's cell holds: the live figure, an image, or both, and words.

    Args:
        drawing: what is shown.
        live: makes the figure for a viewer that runs scripts, by media type, of the image that stands in for it where
            none run: a `data:` address, or nothing.
    """
    wanted = static_images()
    image = notebook_image(drawing) if wanted else None
    if image is None:
        return dict(live(""))
    png, (width, height) = image
    words = f"{visible(drawing.title, keep_whitespace=True)}\n{visible(drawing.alt, keep_whitespace=True)}"
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": words}
    about = {"image/png": {"width": round(width), "height": round(height), "alt": words}}
    if wanted == "only":
        return data, about
    return dict(live(f"data:image/png;base64,{data['image/png']}")) | data, about


def notebook_image(drawing: Drawing) -> tuple[bytes, tuple[float, float]] | None:
    """A PNG for a notebook with the size it is shown at; None, with a warning where it failed, if there can be none."""
    if missing() is not None:
        return None
    try:
        if isinstance(drawing, TokenStrip):
            svg, size = strip_svg(drawing, width=_NOTEBOOK_WIDTH, most_lines=_MOST_LINES)
            return picture_of(svg, "png", size, 1.5), size
        plot, size = _sized(drawing, _NOTEBOOK_WIDTH, None, title=True)
        return _painted(plot, size, 1.5, depth=1.0), size
    except NoBrowserError as error:
        static_images(False)  # waiting for it once is enough
        said = f"{error} Figures have no static images from here on; static_images(True) tries again."
    except ExportError as error:
        said = str(error)
    warnings.warn(f"No static image: {said}", RuntimeWarning, stacklevel=2)
    return None


def _figure_bytes(
    figure: Figure, kind: str, size: tuple[float | None, float | None, float | None], *, title: bool
) -> bytes:
    plot, pixels = _sized(figure, size[0] or _WIDTH, size[1], title=title)
    if kind == "png":
        return _painted(plot, pixels, size[2] or 2.0, depth=2.0)
    svg = _described(figure_image(plot, "svg", pixels, 1.0).decode(), figure)
    return svg.encode() if kind == "svg" else picture_of(svg, "pdf", pixels, 1.0)


def _painted(plot: dict[str, Any], size: tuple[float, float], scale: float, *, depth: float) -> bytes:
    """A PNG. A scene in three dimensions takes seconds without a graphics card: it is painted at `depth`, then put in."""
    if "scene" not in plot["layout"]:
        return figure_image(plot, "png", size, scale)
    return picture_of(figure_image(plot, "svg", size, 1.0, depth=depth).decode(), "png", size, scale)


def _sized(
    figure: Figure, width: float, height: float | None, *, title: bool
) -> tuple[dict[str, Any], tuple[float, float]]:
    """The figure on white at a size, its title broken to the width; and that size."""
    plot = figure_json(figure, title=title)
    layout = plot["layout"]
    if title:
        margin = layout.setdefault("margin", {})
        old = layout["title"]["text"]
        sides = sum(margin.get(side, room) for side, room in (("l", 64), ("r", 24)))
        new = wrapped(figure.title, max(16, int((width - sides) / _TITLE)))
        more = 19 * (new.count("<br>") - old.count("<br>"))
        if more > 0:
            layout["title"] |= {"text": new, "pad": {"t": title_pad(new)}}
            margin["t"] = margin.get("t", 56) + more
            layout["height"] = layout.get("height", _HEIGHT) + more
        margin["l"] = max(margin.get("l", 64), 12)
    layout |= {"paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff"}
    tall = height or layout.get("height", _HEIGHT)
    layout |= {"width": width, "height": tall}
    return plot, (float(width), float(tall))


def _described(svg: str, figure: Figure) -> str:
    """The SVG with title and description for readers who cannot see it."""
    words = [escape(visible(t, keep_whitespace=True)) for t in (figure.title, figure.alt)]
    at = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:at]}<title>{words[0]}</title><desc>{words[1]}</desc>{svg[at:]}"


def _page(drawing: Drawing) -> str:
    """A page that opens anywhere, offline."""
    title, caption = (html.escape(visible(t, keep_whitespace=True)) for t in (drawing.title, drawing.caption))
    if isinstance(drawing, Figure):
        from plotly.offline import get_plotlyjs

        data = json.dumps(figure_json(drawing), ensure_ascii=True).replace("<", "\\u003c")
        body = (
            f'<div id="figure"></div><p class="caption">{caption}</p><script>{get_plotlyjs()}</script>'
            f'<script>const f = {data};\nPlotly.newPlot("figure", f.data, f.layout, {json.dumps(PLOT_CONFIG)});</script>'
        )
    else:
        from probekit.reporting import strip_html

        body = strip_html(drawing)
    style = "body{max-width:1000px;margin:24px auto;font:13px/1.5 sans-serif;color:#20262e}.caption{color:#5c6672}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head><body>{body}</body></html>\n"
    )


def _writable(path: Path) -> None:
    if not path.parent.is_dir():
        raise StoreError(f"There is no folder {path.parent} for {path.name}. Make it first, or name another.")
    if path.is_dir():
        raise StoreError(f"{path} is a folder; name a file in it.")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise StoreError(f"{path} cannot be written: no permission. Name another place.")


def _write(path: Path, content: bytes) -> None:
    """Write in one step, so that nothing half-written is ever there."""
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)
