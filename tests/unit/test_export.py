"""Figures and strips as files and as static images: what is in them, what is refused, and that nothing is left behind."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from fake_report import NASTY, fake_results

from probekit import plots
from probekit.analysis import temporary_registrations
from probekit.cli import cli
from probekit.core import InputError, StoreError, UnknownName
from probekit.plots import Figure, Quantity, TokenStrip, browser, export
from probekit.plots.strip_svg import strip_svg

SVG = "{http://www.w3.org/2000/svg}"
TITLE = "Heads <b>rest</b> & wait"
VALUES = (0.1, 0.4, 0.3, 0.8, 0.5, 0.7, 0.9)
needs_browser = pytest.mark.skipif(browser.missing() is not None, reason=f"no browser: {browser.missing()}")


@pytest.fixture(scope="module", autouse=True)
def stop_browser() -> Iterator[None]:
    yield
    browser.close()


@pytest.fixture
def curve() -> Figure:
    line = xr.DataArray(np.array(VALUES), dims="layer", coords={"layer": range(len(VALUES))}, name="attention share")
    return plots.lines({"heads": line}, title=TITLE, unit="share", caption="Model, corpus, n.", alt="It rises.")


def strip_of(tokens: tuple[str, ...], values: Any = None, texts: Any = None, **kwargs: Any) -> TokenStrip:
    values = np.arange(len(tokens), dtype=float) if values is None else np.asarray(values)
    texts = np.zeros(len(tokens), dtype=int) if texts is None else np.asarray(texts)
    quantities = (Quantity("surprisal", "nats", values), Quantity("shift", "1", values - 1, "diverging"))
    return TokenStrip(TITLE, tokens, texts, quantities, "How to read it.", "What it shows.", **kwargs)


def pixels(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def words_of(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@needs_browser
def test_a_curve_is_vectors_and_text(curve: Figure, tmp_path: Path) -> None:
    path = curve.save(tmp_path / "curve.svg", width=500)
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    texts = ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]
    assert TITLE in texts and "layer" in texts and any("share" in t for t in texts)
    assert root.find(f"{SVG}title").text == TITLE and root.find(f"{SVG}desc").text == "It rises."  # type: ignore[union-attr]
    points = [n for n in root.iter(f"{SVG}path") if n.get("class") == "point"]
    assert len(points) == len(VALUES) and root.get("width") == "500"
    assert not list(root.iter(f"{SVG}image")) and "http" not in re.sub(
        r"http://www.w3.org/[\w/]+", "", path.read_text()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["curve.svg"]


@needs_browser
def test_pdf_and_png_have_the_size_that_was_asked_for(curve: Figure, tmp_path: Path) -> None:
    page = curve.save(tmp_path / "a.pdf", width=400, height=300).read_bytes()
    assert page.startswith(b"%PDF") and page.count(b"/FontName") >= 1 and b"/Subtype /Image" not in page
    box = re.search(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", page)
    assert box and [float(v) for v in box.groups()] == pytest.approx([300, 225], abs=0.5)  # points, 72 an inch
    assert pixels(curve.save(tmp_path / "a.png", width=400, height=300).read_bytes()) == (800, 600)
    assert pixels(curve.save(tmp_path / "b.png", width=400, height=300, scale=1).read_bytes()) == (400, 300)


@needs_browser
def test_a_title_is_broken_to_the_width_or_left_out(curve: Figure, tmp_path: Path) -> None:
    long = Figure(curve.plot, curve.caption, curve.alt)
    long.plot.update_layout(title_text="A finding that takes many words to be said in full and would not fit")
    narrow = words_of(long.save(tmp_path / "a.svg", width=300).read_text())
    assert not any("full and would" in t and "A finding" in t for t in narrow if len(t) < 60)
    lines = ElementTree.parse(tmp_path / "a.svg").getroot().iter(f"{SVG}tspan")
    assert sum(bool(n.text) for n in lines) >= 2
    without = words_of(long.save(tmp_path / "b.svg", title=False).read_text())
    assert not any("finding" in t for t in without)


@needs_browser
def test_a_landscape_exports_without_a_graphics_card(tmp_path: Path) -> None:
    heights = xr.DataArray(np.array([[1.0, 2.0], [3.0, 4.0]]), dims=("token", "d_model"), name="magnitude")
    figure = plots.landscape(heights, title="Peaks", unit="activation", caption="c", alt="a")
    svg = ElementTree.fromstring(figure.save(tmp_path / "a.svg", width=240, height=240).read_text())
    images = [v for n in svg.iter(f"{SVG}image") for k, v in n.attrib.items() if k.endswith("href")]
    assert len(images) == 1 and len(base64.b64decode(images[0].split(",")[1])) > 2000  # painted, not empty


def test_a_strip_holds_every_token_and_every_colour(tmp_path: Path) -> None:
    strip = strip_of(("The", " cat", " sat", "\n", " on", ""))
    svg, (width, height) = strip_svg(strip)
    assert strip.save(tmp_path / "strip.svg").read_text(encoding="utf-8") == svg
    root = ElementTree.fromstring(svg)
    texts = words_of(svg)
    for shown in ("The", "·cat", "·sat", "↵", "·on", TITLE, "surprisal", "How to read it."):
        assert shown in texts, shown
    fills = [n.get("fill") for n in root.iter(f"{SVG}rect") if n.get("height") == "17"]
    assert len(fills) == 6 and fills[0] == plots.SEQUENTIAL[0] and fills[-1] == plots.SEQUENTIAL[-1]
    assert root.get("width") == "720" == f"{width:g}" and root.get("height") == f"{height:g}"
    assert "5 nats" in texts and "0" in texts
    other, _ = strip_svg(strip_of(("a", "b"), [0.0, np.nan]), quantity="shift", title=False)
    assert "shift" in words_of(other) and "undefined" in words_of(other) and TITLE not in words_of(other)


def test_a_picture_does_not_speak_of_the_mouse() -> None:
    said = "Model, 3 texts. Hover for the token's role, and more. The primary's own is 1. Hover a token."
    assert plots.without_hover(said) == "Model, 3 texts. The primary's own is 1."


def test_whatever_a_token_holds_the_strip_is_sound_xml() -> None:
    odd = (
        *NASTY,
        "é",
        "e\u0301",
        "\u0301",
        "👍🏽",
        "👩\u200d🔬",
        "שלום",
        "مرحبا",
        "你好",
        "\ufffe",
        "\ud800",
        "x" * 300,
    )
    svg, (_, height) = strip_svg(strip_of(odd), width=300)
    drawn = "".join(words_of(svg))
    for token in ("<script>window.__pwned=1</script>", "שלום", "你好", "\\ufffe", "\\ud800", "◌\u0301", "x" * 20):
        assert token in drawn, token
    for node in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        x, wide = float(node.get("x", 0)), node.get("width", "0")
        assert x + float(wide) <= 300.5 and float(node.get("y", 0)) < height
    assert "script" not in {n.tag.removeprefix(SVG) for n in ElementTree.fromstring(svg).iter()}


def test_texts_are_set_apart_and_a_long_strip_says_what_is_left_out() -> None:
    strip = strip_of(tuple(f" word{i}" for i in range(300)), texts=[0] * 100 + [1] * 200)
    whole, (_, tall) = strip_svg(strip)
    short, (_, less) = strip_svg(strip, most_lines=5)
    assert {"text 0", "text 1"} <= set(words_of(whole)) and "more tokens" not in whole
    assert less < tall / 2
    said = next(t for t in words_of(short) if "more tokens" in t)
    drawn = sum(t.startswith("·word") for t in words_of(short))
    assert said == f"… {300 - drawn} more tokens" and 20 < drawn < 80


@needs_browser
def test_a_strip_is_drawn_as_pdf_and_png(tmp_path: Path) -> None:
    strip = strip_of(("The", " cat", " שלום", " <b>"))
    assert strip.save(tmp_path / "s.pdf", width=300).read_bytes().startswith(b"%PDF")
    _, (_, height) = strip_svg(strip, width=300)
    assert pixels(strip.save(tmp_path / "s.png", width=300, scale=3).read_bytes()) == (900, round(3 * height))


def test_a_page_opens_offline(curve: Figure, tmp_path: Path) -> None:
    page = curve.save(tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page and "<title>Heads &lt;b&gt;rest&lt;/b&gt; &amp; wait</title>" in page
    assert not re.search(r'<script[^>]+src="', page) and "Model, corpus, n." in page
    strip = strip_of(("</script>", "b")).save(tmp_path / "s.html").read_text(encoding="utf-8")
    assert strip.count("</script>") == 1


@pytest.mark.parametrize(
    ("where", "options", "error", "message"),
    [
        ("a.jpg", {}, UnknownName, r"'.jpg'.*Known: .html, .pdf, .png, .svg|'.jpg'. Did you mean"),
        ("a", {}, UnknownName, "image file ''"),
        ("none/a.svg", {}, StoreError, "There is no folder"),
        ("taken.svg", {}, StoreError, "is a folder"),
        ("a.svg", {"width": -3}, InputError, "width=-3 is no size"),
        ("a.png", {"scale": float("nan")}, InputError, "scale=nan is no size"),
    ],
)
def test_refusals(curve: Figure, tmp_path: Path, where: str, options: Any, error: type, message: str) -> None:
    (tmp_path / "taken.svg").mkdir()
    with pytest.raises(error, match=message):
        curve.save(tmp_path / where, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["taken.svg"]


def test_a_quantity_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'surprisal'"):
        strip_of(("a",)).save(tmp_path / "a.svg", quantity="suprisal")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_said(curve: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for lacking, said in (
        (browser.NO_KALEIDO, r"pip install 'probekit\[notebook\]'"),
        (browser.NO_BROWSER, "chromium"),
    ):
        monkeypatch.setattr(browser, "missing", lambda lacking=lacking: lacking)
        with pytest.raises(plots.ExportError, match=said):
            curve.save(tmp_path / "a.pdf")
    assert strip_of(("a",)).save(tmp_path / "a.svg").exists()  # a strip as SVG needs neither


def test_missing_looks_for_kaleido_and_for_the_browser_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = browser.missing.__wrapped__
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chrome")
    assert plain() == browser.NO_BROWSER
    monkeypatch.setattr(browser.importlib.util, "find_spec", lambda name: None)
    assert plain() == browser.NO_KALEIDO


def test_nothing_is_left_behind_and_the_old_file_stays(
    curve: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "a.svg"
    old.write_text("old")

    def broken(*args: Any, **kwargs: Any) -> bytes:
        raise plots.ExportError("no luck")

    monkeypatch.setattr(export, "figure_image", broken)
    with pytest.raises(plots.ExportError, match="no luck"):
        curve.save(old)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match="No space left"):
        strip_of(("a",)).save(old)
    assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]


@needs_browser
def test_a_browser_that_died_is_started_again(curve: Figure, tmp_path: Path) -> None:
    curve.save(tmp_path / "a.svg")
    running = browser._browser(browser.os.getpid())._open.subprocess
    curve.save(tmp_path / "b.svg")
    assert browser._browser(browser.os.getpid())._open.subprocess is running  # the same one, so the second is quick
    running.kill()
    running.wait()
    assert curve.save(tmp_path / "c.svg").exists()
    assert browser._browser(browser.os.getpid())._open.subprocess is not running


@needs_browser
def test_what_cannot_be_drawn_says_so_and_leaves_the_browser_well(curve: Figure, tmp_path: Path) -> None:
    curve.save(tmp_path / "a.svg")
    running = browser._browser(browser.os.getpid())._open
    for wrong in ({"no": "figure"}, {"data": 5, "layout": {}}):
        with pytest.raises(plots.ExportError, match="could not draw"):
            browser._ask(lambda kaleido, wrong=wrong: kaleido.calc_fig(wrong))
    assert browser._browser(browser.os.getpid())._open is running


def test_the_switch_for_static_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROBEKIT_STATIC_IMAGES", raising=False)
    assert plots.static_images() is True
    assert plots.static_images("only") == "only" == plots.static_images()
    assert plots.static_images(False) is False and plots.static_images() is False
    assert plots.static_images(True) is True
    with pytest.raises(InputError, match="found 'never'"):
        plots.static_images("never")  # type: ignore[arg-type]


@needs_browser
def test_a_cell_holds_an_image_beside_the_live_figure_or_alone(curve: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    import plotly.io

    monkeypatch.setenv("PROBEKIT_STATIC_IMAGES", "1")
    renderer, plotly.io.renderers.default = plotly.io.renderers.default, "plotly_mimetype"
    try:
        data, about = curve._repr_mimebundle_()
        assert {"application/vnd.plotly.v1+json", "image/png", "text/plain"} == set(data)
        width, height = pixels(base64.b64decode(data["image/png"]))
        assert about["image/png"]["width"] * 1.5 == width and about["image/png"]["height"] * 1.5 == pytest.approx(
            height, abs=1
        )
        assert data["text/plain"].splitlines() == [TITLE, "It rises."]
        strip = strip_of(("a", " b"))
        data, _ = strip._repr_mimebundle_()
        assert "text/html" in data and f'src="data:image/png;base64,{data["image/png"]}"' in data["text/html"]
        monkeypatch.setenv("PROBEKIT_STATIC_IMAGES", "only")
        assert set(curve._repr_mimebundle_()[0]) == set(strip._repr_mimebundle_()[0]) == {"image/png", "text/plain"}
    finally:
        plotly.io.renderers.default = renderer


@pytest.mark.parametrize("mode", ["1", "only"])
def test_a_cell_without_a_browser_holds_the_live_figure(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBEKIT_STATIC_IMAGES", mode)
    monkeypatch.setattr(export, "missing", lambda: browser.NO_BROWSER)
    strip = strip_of(("a", " b"))
    assert set(strip._repr_mimebundle_()) == {"text/html"} and "Run this cell" in strip._repr_html_()


def test_a_cell_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBEKIT_STATIC_IMAGES", "1")
    monkeypatch.setattr(export, "missing", lambda: None)

    def broken(*args: Any, **kwargs: Any) -> bytes:
        raise plots.ExportError("it crashed")

    monkeypatch.setattr(export, "picture_of", broken)
    with pytest.warns(RuntimeWarning, match="No static image: it crashed"):
        assert set(strip_of(("a",))._repr_mimebundle_()) == {"text/html"}


@needs_browser
def test_a_browser_that_does_not_start_is_waited_for_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    browser.close()
    false = tmp_path / "chrome"
    false.write_text("#!/bin/sh\nexit 1\n")
    false.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(false))
    monkeypatch.setenv("PROBEKIT_STATIC_IMAGES", "1")
    with pytest.warns(RuntimeWarning, match="does not start.*BROWSER_PATH names another.*from here on"):
        assert set(strip_of(("a",))._repr_mimebundle_()) == {"text/html"}
    assert plots.static_images() is False and set(strip_of(("a",))._repr_mimebundle_()) == {"text/html"}
    with pytest.raises(plots.ExportError, match="does not start"):
        strip_of(("a",)).save(tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["chrome"]


def test_all_figures_of_a_stored_run_are_written(tmp_path: Path) -> None:
    with temporary_registrations():
        results = fake_results()
        results.save(tmp_path / "run")
        drawings = results["tides"].figures()
        assert isinstance(drawings, plots.Drawings) and repr(drawings).count("\n") == len(drawings) - 1
        paths = drawings.save(tmp_path / "here", "html")
        assert [p.stem for p in paths] == list(drawings) and all(p.stat().st_size > 1000 for p in paths)
        with pytest.raises(UnknownName, match="format of an image 'jpg'"):
            drawings.save(tmp_path / "there", "jpg")
        done = CliRunner().invoke(cli, ["figures", str(tmp_path / "run"), "tides", "--format", "html"])
        assert done.exit_code == 0, done.output
        assert {Path(p) for p in done.output.split()} == set((tmp_path / "run/figures/tides").iterdir())
        refused = CliRunner().invoke(cli, ["figures", str(tmp_path / "nowhere")])
        assert refused.exit_code == 2 and "No probekit results" in refused.output
