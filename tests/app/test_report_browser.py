"""The report in a real browser: it draws, colours and explains, asks nothing of the network, and runs no token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_report import NASTY, fake_dataset, fake_manifest, fake_results

from probekit import plots
from probekit.analysis import temporary_registrations
from probekit.reporting import strip_html, write_run

NASTY_START = len(fake_dataset()["token"]) - len(NASTY)


class Watch:
    """A page with everything it complained about and every request that left it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        page.set_default_timeout(120_000)  # ms; a page that is drawn in software on a busy machine takes its time
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda m: self.complaints.append(m.text) if m.type != "log" else None)
        page.on("pageerror", lambda e: self.complaints.append(str(e)))
        page.on("dialog", lambda d: (self.complaints.append(d.message), d.dismiss()))
        page.route("**/*", self._only_files)

    def _only_files(self, route: Any) -> None:
        url = route.request.url
        if url.startswith("file:"):
            route.continue_()
        else:
            self.requests.append(url)
            route.abort()

    def show(self, name: str) -> Any:
        """Scroll to a drawing and return its place once it is drawn."""
        place = self.page.locator(f"[data-drawing='tides--{name}--data']")
        place.scroll_into_view_if_needed()
        self.page.locator(f"[data-drawing='tides--{name}--data'][data-drawn]").wait_for()
        return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with temporary_registrations():
        results = fake_results()
        write_run(results, folder, fake_manifest())
        strip = results["tides"].figures()["strip"]
    assert isinstance(strip, plots.TokenStrip)
    cell = strip_html(strip)
    page = f"<!doctype html><meta charset=utf-8><body>{cell}{strip_html(strip)}</body>"
    (folder / "notebook.html").write_text(page, encoding="utf-8")
    return folder


@pytest.fixture
def report(browser: Any, folder: Path) -> Iterator[Watch]:
    watch = Watch(browser.new_page(viewport={"width": 1200, "height": 900}))
    watch.page.goto((folder / "report.html").as_uri())
    yield watch
    watch.page.close()


def tokens(place: Any) -> Any:
    return place.locator(".pk-strip-token")


def colours(place: Any) -> list[str]:
    return tokens(place).evaluate_all("nodes => nodes.map(n => n.style.backgroundColor)")


def test_the_whole_page_draws_without_complaint_or_request(report: Watch) -> None:
    names = report.page.locator("[data-drawing]").evaluate_all("nodes => nodes.map(n => n.dataset.drawing)")
    assert len(names) == 10
    for name in names:
        place = report.show(name.removeprefix("tides--").removesuffix("--data"))
        assert place.locator("svg.main-svg, .pk-strip-body").count() > 0, name
    report.page.wait_for_timeout(200)
    assert report.complaints == []
    assert report.requests == []


def test_figures_wait_until_they_come_into_view(report: Watch) -> None:
    last = report.page.locator("[data-drawing]").last
    assert last.get_attribute("data-drawn") is None
    last.scroll_into_view_if_needed()
    report.page.locator("[data-drawing='tides--counts--data'][data-drawn]").wait_for()
    assert last.locator("svg.main-svg").count() > 0


def test_no_button_offers_to_send_the_chart_away(report: Watch) -> None:
    chart = report.show("depth")
    buttons = chart.locator(".modebar-btn").evaluate_all("nodes => nodes.map(n => n.dataset.title)")
    assert buttons and not [b for b in buttons if "hare" in b or "loud" in b]


def test_printing_draws_everything_and_unfolds_the_details(report: Watch) -> None:
    report.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert report.page.locator("[data-drawing]:not([data-drawn])").count() == 0
    assert report.page.locator("details:not([open])").count() == 0


def test_picking_another_quantity_recolours_the_strip_and_its_legend(report: Watch) -> None:
    strip = report.show("strip")
    before, legend = colours(strip), strip.locator(".pk-strip-legend").inner_text()
    assert len(set(before)) > 20 and "nats" in legend and "undefined" in legend
    strip.get_by_role("button", name="rank of the token").click()
    after = colours(strip)
    assert sum(a != b for a, b in zip(before, after, strict=True)) > 100
    assert "log scale" in strip.locator(".pk-strip-legend").inner_text()
    assert strip.locator("button[aria-pressed=true]").all_inner_texts() == ["rank of the token"]


def test_colours_stand_for_the_numbers(report: Watch) -> None:
    strip = report.show("strip")
    values = fake_dataset()["surprisal_nats"].values
    grey = [i for i, v in enumerate(values) if v != v]
    place = colours(strip)
    rgb = "rgb({}, {}, {})"
    undefined = rgb.format(*(int(plots.UNDEFINED[i : i + 2], 16) for i in (1, 3, 5)))
    assert len(grey) == 2 and {place[i] for i in grey} == {undefined}
    darkest = rgb.format(*(int(plots.SEQUENTIAL[-1][i : i + 2], 16) for i in (1, 3, 5)))
    assert [i for i, c in enumerate(place) if c == darkest] == [i for i, v in enumerate(values) if v >= 12]


def test_hover_and_keyboard_show_token_position_text_and_every_quantity(report: Watch) -> None:
    strip = report.show("strip")
    tip = strip.locator(".pk-strip-tip")
    assert tip.is_hidden()
    tokens(strip).nth(2).hover()
    shown = tip.inner_text()
    for part in ("␣tide", "position 2", "text 0", "surprisal", "nats", "rank of the token", "next:  tide 0.31"):
        assert part in shown, part
    value = fake_dataset()["surprisal_nats"].values[2]
    assert f"{value:.3g} nats" in shown
    tokens(strip).nth(2).click()
    report.page.keyboard.press("ArrowRight")
    assert "position 3" in tip.inner_text()
    report.page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_hostile_tokens_show_literally_in_the_strip_and_never_run(report: Watch) -> None:
    strip = report.show("strip")
    shown = tokens(strip).evaluate_all("nodes => nodes.map(n => n.textContent)")
    expected = [plots.visible(t, keep_whitespace=True) for t in NASTY]
    assert [s.replace(" ", "") for s in shown[NASTY_START:]] == [s.replace("\t", "").replace(" ", "") for s in expected]
    assert strip.locator("b, i, a, img, script").count() == 0
    assert strip.locator(".pk-strip-name").all_inner_texts() == ["text 0", "text 3"]
    for i in range(NASTY_START, NASTY_START + len(NASTY) - 1):
        tokens(strip).nth(i).hover()
        assert strip.locator(".pk-strip-tip").is_visible()
    assert report.page.evaluate("window.__pwned") is None
    assert report.complaints == []


def test_copied_text_is_the_text(report: Watch) -> None:
    strip = report.show("strip")
    first = tokens(strip).evaluate_all("nodes => nodes.slice(0, 9).map(n => n.textContent).join('')")
    assert first == "When the tide went out, the harbour looked"


def test_hostile_text_shows_literally_in_plotly_labels_hover_and_legends(browser: Any, tmp_path: Path) -> None:
    """Each token as title, tick label, curve label and hover, compared with the text that the browser shows."""
    import numpy as np
    import xarray as xr

    shown_tokens = [t for t in NASTY if t.strip()]
    words = {"caption": "c", "alt": "a"}
    watch = Watch(browser.new_page(viewport={"width": 1200, "height": 900}))
    (tmp_path / "empty.html").write_text("<!doctype html><meta charset=utf-8><div id=plot></div>", encoding="utf-8")
    watch.page.goto((tmp_path / "empty.html").as_uri())
    watch.page.add_script_tag(content=plots.plotly_js())
    values = xr.DataArray(np.ones((1, 2)), dims=("layer", "head"), coords={"layer": [0]}, name="x")
    draw = "f => Plotly.newPlot('plot', f.data, f.layout)"
    for token in shown_tokens:
        figure = plots.heatmap(
            values,
            title=token,
            unit=token,
            x_labels=[token, "b"],
            hover=np.asarray([[token, "b"]], dtype=object),
            **words,
        )
        watch.page.evaluate(draw, plots.figure_json(figure))
        box = watch.page.locator("#plot .nsewdrag").bounding_box()
        watch.page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.5)
        watch.page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5)
        watch.page.locator("#plot .hoverlayer .hovertext").first.wait_for()
        literal = plots.visible(token, keep_whitespace=True)
        for selector in (".gtitle", ".xtick text", ".cbtitle text", ".hoverlayer"):
            texts = watch.page.locator(f"#plot {selector}").all_text_contents()
            assert any(literal in t for t in texts), (selector, literal, texts)
        assert watch.page.locator("#plot text a, #plot tspan[style*='font'], #plot img, #plot script").count() == 0
    assert watch.page.evaluate("window.__pwned") is None
    assert watch.requests == [] and watch.complaints == []
    watch.page.close()


def test_strips_stand_alone_in_a_notebook_and_side_by_side(browser: Any, folder: Path) -> None:
    watch = Watch(browser.new_page())
    watch.page.goto((folder / "notebook.html").as_uri())
    roots = watch.page.locator("[data-strip]")
    assert roots.count() == 2
    one, two = roots.nth(0), roots.nth(1)
    before = colours(two)
    one.get_by_role("button", name="change of log-probability").click()
    assert colours(one) != before and colours(two) == before
    tokens(two).nth(3).hover()
    assert two.locator(".pk-strip-tip").is_visible() and one.locator(".pk-strip-tip").is_hidden()
    assert watch.page.evaluate("window.__pwned") is None
    assert watch.complaints == [] and watch.requests == []
    watch.page.close()


def test_the_page_fits_a_narrow_screen(report: Watch) -> None:
    report.page.set_viewport_size({"width": 390, "height": 800})
    report.show("strip")
    assert report.page.evaluate("document.documentElement.scrollWidth") <= 390
