"""The browser that draws figures as images: Chrome or Chromium, driven by kaleido, one for the whole process.

It starts with the first image, which takes seconds, and stays for the next ones, which take a fraction of one. It
closes when nothing was asked of it for some minutes, and at the end of the process. It asks nothing of the network.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import importlib.util
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

from probekit.core import ProbekitError

_START = 60.0  # seconds until a browser must have opened
_PATIENCE = 90.0  # seconds until an image must be there
_IDLE = 300.0  # seconds without work after which the browser closes
_QUIET = ("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND")
Job = Callable[[Any], Awaitable[bytes]]


class ExportError(ProbekitError, RuntimeError):
    """A figure cannot be drawn as an image here."""


class NoBrowserError(ExportError):
    """There is no browser, or it does not start."""


NO_KALEIDO = (
    "Images are drawn with kaleido, which is not installed: pip install 'probekit[notebook]'. A .html needs none."
)
NO_BROWSER = (
    "Images are drawn by Chrome or Chromium, and none was found. Install one (`apt install chromium`, "
    "`brew install --cask chromium`), or let kaleido fetch one (`kaleido_get_chrome`), or name one in the environment "
    "variable BROWSER_PATH. A .html needs none."
)


_ANOTHER = "BROWSER_PATH names another one; a .html needs none."


@cache
def missing() -> str | None:
    """What this machine lacks for drawing images, and what to do; None if nothing. Looked up once per process."""
    if importlib.util.find_spec("kaleido") is None:
        return NO_KALEIDO
    from choreographer.browsers import Chromium

    named = os.environ.get("BROWSER_PATH")
    found = named or Chromium.find_browser(skip_local=False)
    return None if found and os.path.isfile(found) else NO_BROWSER  # noqa: PTH113


def figure_image(
    plot: dict[str, Any], kind: str, size: tuple[float, float], scale: float, *, depth: float = 2.0
) -> bytes:
    """A Plotly figure as SVG or PNG.

    Args:
        plot: `data` and `layout`.
        kind: "svg" or "png".
        size: width and height in pixels.
        scale: pixels of a PNG per pixel of the layout.
        depth: pixels per pixel of the layout in which a scene in three dimensions is painted.

    Raises:
        ExportError: kaleido or a browser is missing, or it cannot draw this.
    """
    options = {"format": kind, "width": size[0], "height": size[1], "scale": scale}
    asked = plot | {"config": {"plotGlPixelRatio": depth}}
    return _ask(lambda kaleido: kaleido.calc_fig(asked, opts=options))


def picture_of(svg: str, kind: str, size: tuple[float, float], scale: float) -> bytes:
    """An SVG document as PDF (vectors, with its fonts) or as PNG.

    Args:
        svg: the document.
        kind: "pdf" or "png".
        size: width and height in pixels, of which 96 are an inch of the PDF.
        scale: pixels of a PNG per pixel of the document.

    Raises:
        ExportError: kaleido or a browser is missing, or it cannot draw this.
    """
    return _ask(lambda kaleido: _printed(kaleido, svg, kind, size, scale))


def close() -> None:
    """Close the browser of this process, if one runs; the next image opens another."""
    _browser(os.getpid()).close()


def _ask(job: Job) -> bytes:
    if lacking := missing():
        raise NoBrowserError(lacking)
    return _browser(os.getpid()).ask(job)


@cache
def _browser(pid: int) -> _Browser:  # a process that was forked off needs its own
    return _Browser()


class _Browser:
    """A browser without a window, and the thread that talks to it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._turn = asyncio.Lock()
        self._open: Any = None
        self._idle: asyncio.TimerHandle | None = None
        self._started = threading.Lock()
        self._running = False

    def ask(self, job: Job) -> bytes:
        with self._started:
            if not self._running:
                threading.Thread(target=self._loop.run_forever, name="probekit-export", daemon=True).start()
                atexit.register(self.close)
                self._running = True
        answer = asyncio.run_coroutine_threadsafe(self._answer(job), self._loop)
        try:
            return answer.result(2 * (_START + _PATIENCE))
        except ProbekitError:
            raise
        except Exception as error:
            said = str(error).strip() or type(error).__name__
            raise ExportError(f"The browser could not draw the figure: {said[:400]}") from error
        finally:
            answer.cancel()

    def close(self) -> None:
        if self._running:
            asyncio.run_coroutine_threadsafe(self._rest(), self._loop).result(_START)

    async def _answer(self, job: Job) -> bytes:
        async with self._turn:
            if self._idle is not None:
                self._idle.cancel()
            used = self._open is not None
            try:
                made = await self._attempt(job)
            except Exception:
                if not used or self._open is not None:
                    raise
                made = await self._attempt(job)  # it had worked before, and may have been closed from outside
            self._idle = self._loop.call_later(_IDLE, lambda: self._loop.create_task(self._rest()))
            return made

    async def _attempt(self, job: Job) -> bytes:
        try:
            if self._open is not None and self._open.subprocess.poll() is not None:
                await self._shut()
            if self._open is None:
                self._open = await _opened()
            return await asyncio.wait_for(job(self._open), _PATIENCE)
        except (*_figure_errors(), ExportError):
            raise  # the figure's fault; the browser is well
        except BaseException:
            await self._shut()
            raise

    async def _rest(self) -> None:
        async with self._turn:
            await self._shut()

    async def _shut(self) -> None:
        kaleido, self._open = self._open, None
        if kaleido is not None:
            await _closed(kaleido)


def _figure_errors() -> Any:
    from kaleido.errors import JavascriptError, KaleidoError

    return KaleidoError, JavascriptError, TypeError


async def _opened() -> Any:
    from choreographer.browsers import Chromium
    from kaleido import Kaleido

    class Quiet(Chromium):
        def get_cli(self) -> Any:
            return [*super().get_cli(), *_QUIET]

    for name in ("kaleido", "choreographer", "browser_proc"):
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.ERROR))
    kaleido = Kaleido(timeout=_PATIENCE, mathjax=False, browser_cls=Quiet)
    try:
        await asyncio.wait_for(kaleido.open(), _START)
    except BaseException as error:
        await _closed(kaleido)
        if not isinstance(error, Exception):
            raise
        said = " ".join(map(str, error.args))[:300] or type(error).__name__
        raise NoBrowserError(f"The browser that draws images does not start: {said} {_ANOTHER}") from error
    return kaleido


async def _closed(kaleido: Any) -> None:
    try:
        await asyncio.wait_for(kaleido.close(), 10)
    except Exception:
        if getattr(kaleido, "subprocess", None) is not None:
            kaleido.subprocess.kill()


async def _printed(kaleido: Any, svg: str, kind: str, size: tuple[float, float], scale: float) -> bytes:
    width, height = size
    tab = await kaleido.create_tab("about:blank")
    try:
        frame = (await _sent(tab, "Page.getFrameTree"))["frameTree"]["frame"]["id"]
        style = f"@page{{size:{width}px {height}px;margin:0}}html,body{{margin:0}}svg{{display:block}}"
        page = f'<!doctype html><meta charset="utf-8"><style>{style}</style>{svg}'
        await _sent(tab, "Page.setDocumentContent", frameId=frame, html=page)
        if kind == "pdf":
            options = {"printBackground": True, "preferCSSPageSize": True, "pageRanges": "1"}
            return base64.b64decode((await _sent(tab, "Page.printToPDF", **options))["data"])
        screen = {"width": round(width), "height": round(height), "deviceScaleFactor": scale, "mobile": False}
        await _sent(tab, "Emulation.setDeviceMetricsOverride", **screen)
        area = {"x": 0, "y": 0, "width": round(width), "height": round(height), "scale": 1}
        shot = await _sent(tab, "Page.captureScreenshot", format="png", clip=area, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])
    finally:
        await tab.close()


async def _sent(tab: Any, command: str, **params: Any) -> dict[str, Any]:
    answer = await tab.send_command(command, params=params)
    if "error" in answer:
        raise ExportError(f"The browser refused {command}: {answer['error'].get('message', answer['error'])}")
    result: dict[str, Any] = answer["result"]
    return result
