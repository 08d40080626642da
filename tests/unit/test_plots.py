"""Figures: titles, axes, units, colours, valid JSON, and tokens that stay text."""

from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import xarray as xr
from fake_report import NASTY, draw, fake_results

from probekit import plots
from probekit.analysis import temporary_registrations
from probekit.plots import Figure, TokenStrip

WORDS = {"title": "The finding", "caption": "Model, corpus, n.", "alt": "What it shows."}


@pytest.fixture(scope="module")
def drawings() -> dict[str, plots.Drawing]:
    with temporary_registrations():
        return draw(fake_results()["tides"])


def by_layer(values: Any, name: str = "entropy_nats") -> xr.DataArray:
    values = np.asarray(values, dtype=float)
    return xr.DataArray(values, dims=("layer",), coords={"layer": np.arange(len(values))}, name=name)


def grid(values: Any, dims: tuple[str, str] = ("layer", "head"), name: str = "share") -> xr.DataArray:
    values = np.asarray(values, dtype=float)
    coords = {d: np.arange(n) for d, n in zip(dims, values.shape, strict=True)}
    return xr.DataArray(values, dims=dims, coords=coords, name=name)


def unpack(packed: Any) -> np.ndarray:
    """An array as the page gets it."""
    if isinstance(packed, list):
        return np.asarray(packed, dtype=float)
    flat = np.frombuffer(base64.b64decode(packed["bdata"]), dtype=np.dtype(packed["dtype"]))
    return flat.reshape([int(n) for n in str(packed["shape"]).split(",")]) if "shape" in packed else flat


def test_importing_plots_loads_neither_plotly_nor_torch() -> None:
    code = "import sys, probekit.plots; print([m for m in ('plotly', 'torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_figure_has_title_axes_caption_alt_and_strict_json(drawings: dict[str, plots.Drawing]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for name, drawing in drawings.items():
        assert drawing.title and drawing.caption and drawing.alt, name
        if isinstance(drawing, TokenStrip):
            continue
        layout = drawing.plot.layout
        assert layout.title.text, name
        assert layout.yaxis.title.text or layout.xaxis.title.text, name
        json.loads(drawing.plot.to_json(engine="json"), parse_constant=refuse)
        json.dumps(plots.figure_json(drawing), allow_nan=False)


@pytest.mark.parametrize("empty", ["title", "caption", "alt"])
def test_a_figure_without_words_is_refused(empty: str) -> None:
    with pytest.raises(ValueError, match="needs a title"):
        plots.lines({"a": by_layer([1, 2])}, unit="nats", **(WORDS | {empty: " "}))


def test_axis_titles_come_from_dims_names_and_units() -> None:
    layout = plots.lines({"entropy": by_layer([1, 2])}, unit="nats", **WORDS).plot.layout
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("layer", "entropy (nats)")
    figure = plots.heatmap(grid(np.eye(3)), unit="1", **WORDS)
    assert (figure.plot.layout.xaxis.title.text, figure.plot.layout.yaxis.title.text) == ("head", "layer")
    assert figure.plot.data[0].colorbar.title.text == "share"
    assert plots.bars(by_layer([1]), unit="nats", **WORDS).plot.layout.yaxis.title.text == "entropy (nats)"
    dots = plots.dots(by_layer([1], "norm"), unit="× median", **WORDS)
    assert dots.plot.layout.yaxis.title.text == "norm (× median)"


def test_heatmap_draws_layers_upward_whatever_the_order_of_axes() -> None:
    values = np.arange(6.0).reshape(2, 3)
    text = np.asarray([["a", "b", "c"], ["d", "e", "f"]])
    one = plots.heatmap(grid(values), unit="1", hover=text, **WORDS).plot
    two = plots.heatmap(grid(values.T, ("head", "layer")), unit="1", hover=text.T, **WORDS).plot
    for plot in (one, two):
        assert np.array_equal(plot.data[0].z, values)
        assert plot.layout.yaxis.title.text == "layer"
        assert plot.layout.yaxis.autorange != "reversed"
        assert [list(row) for row in plot.data[0].text] == text.tolist()


def test_diverging_scale_has_its_middle_exactly_at_zero() -> None:
    trace = plots.heatmap(grid([[-1, 3.0], [0, 2]]), unit="nats", scale="diverging", **WORDS).plot.data[0]
    assert (trace.zmin, trace.zmax) == (-3, 3)
    trace = plots.heatmap(grid([[-1, 3.0]]), unit="nats", scale="diverging", low=-5, high=1, **WORDS).plot.data[0]
    assert (trace.zmin, trace.zmax) == (-5, 5)
    assert trace.colorscale[len(trace.colorscale) // 2][0] == 0.5


def test_colour_limits_are_the_callers_or_the_datas() -> None:
    trace = plots.heatmap(grid([[0.2, np.nan], [0.4, 0.7]]), unit="share", **WORDS).plot.data[0]
    assert (trace.zmin, trace.zmax) == pytest.approx((0.2, 0.7))
    trace = plots.heatmap(grid([[0.2, 0.4]]), unit="share", low=0, high=1, **WORDS).plot.data[0]
    assert (trace.zmin, trace.zmax) == (0, 1)
    trace = plots.heatmap(grid([[np.nan, np.nan]]), unit="share", **WORDS).plot.data[0]
    assert math.isfinite(trace.zmin) and math.isfinite(trace.zmax)


def test_log_scale_draws_decades_keeps_zero_visible_and_hovers_the_number_itself() -> None:
    figure = plots.heatmap(grid([[0, 1], [100, np.nan]], name="rank"), unit="1", scale="log", **WORDS)
    trace = plots.figure_json(figure)["data"][0]
    assert np.array_equal(unpack(trace["z"]), [[0, 0], [2, np.nan]], equal_nan=True)
    assert np.array_equal(unpack(trace["customdata"]), [[0, 1], [100, np.nan]], equal_nan=True)
    assert "%{customdata" in trace["hovertemplate"]
    assert trace["colorbar"]["ticktext"] == ["1", "10", "100"]


def test_a_long_token_axis_stays_light() -> None:
    tokens = xr.DataArray(
        np.random.default_rng(0).random((30, 4000)), dims=("layer", "token"), coords={"layer": np.arange(30)}
    )
    tokens = tokens.assign_coords(token_str=("token", [" the"] * 4000), pos=("token", np.arange(4000)))
    figure = plots.heatmap(tokens, unit="nats", **WORDS)
    assert len(json.dumps(plots.figure_json(figure))) < 1_000_000
    assert len(set(figure.plot.data[0].x)) == 4000
    assert figure.plot.layout.xaxis.tickvals is None  # Plotly thins them to what fits


def test_token_labels_are_unique_and_show_whitespace() -> None:
    assert plots.token_label(" the", 3) == "(3)␣the"
    assert plots.token_label("\n\t", 0) == "(0)↵⇥"
    assert len(plots.token_label("=" * 400, 3)) < 24
    coords = xr.Dataset(
        coords={
            "token_str": ("token", [" a", " a", " a", " a"]),
            "pos": ("token", [0, 1, 0, 1]),
            "text": ("token", [0, 0, 7, 7]),
        }
    )
    assert plots.token_labels(coords) == ["0:(0)␣a", "0:(1)␣a", "7:(0)␣a", "7:(1)␣a"]


def test_equal_labels_do_not_fall_into_one_place() -> None:
    figure = plots.heatmap(grid(np.eye(3)), unit="1", x_labels=["a", "a", "b"], **WORDS)
    assert len(set(figure.plot.data[0].x)) == 3
    with pytest.raises(ValueError, match="2 labels"):
        plots.heatmap(grid(np.eye(3)), unit="1", x_labels=["a", "b"], **WORDS)


def test_hidden_characters_become_visible() -> None:
    assert plots.visible("a\u202eb\x00\udc80\u2028") == r"a\u202eb\x00\udc80\u2028"
    assert plots.visible(" x\n", keep_whitespace=True) == " x\n"
    assert plots.visible("日本 é") == "日本␣é"


@pytest.mark.parametrize("token", NASTY)
def test_escaped_text_holds_nothing_that_plotly_interprets(token: str) -> None:
    escaped = plots.escape(token)
    assert not set(escaped) & set("<>$")
    assert "%{" not in escaped
    assert "&" not in escaped.replace("&#", "")
    assert plots.unescape(escaped) == plots.visible(token, keep_whitespace=True)


def test_untrusted_text_is_escaped_in_every_part_of_every_shape() -> None:
    evil = "<b>x</b>&lt;$y$%{z}"
    words = {"title": evil, "caption": "c", "alt": "a"}
    curve = by_layer([1, 2])
    text = np.asarray([[evil, evil]])
    figures = [
        plots.heatmap(grid([[1, 2.0]], name=evil), unit=evil, x_labels=[evil, "b"], hover=text, **words),
        plots.lines({evil: curve, "b": curve}, unit=evil, reference=(1.5, evil), quantity=evil, **words),
        plots.lines({f"{evil}{i}": curve for i in range(12)}, unit=evil, **words),
        plots.bars({evil: 1.0}, unit=evil, reference=(1, evil), quantity=evil, **words),
        plots.bars(by_layer([1], evil), unit=evil, **words),
        plots.dots(by_layer([1, 2], evil), unit=evil, hover=text[0], reference=(1, evil), **words),
        plots.histogram(np.array([1]), np.array([0, 1]), unit=evil, quantity=evil, counted=evil, **words),
    ]
    for figure in figures:
        text_of_plot = json.dumps(plots.figure_json(figure), ensure_ascii=False)
        assert "&#60;b&#62;" in text_of_plot
        assert "<b>" not in text_of_plot and "&lt;" not in text_of_plot and "$y" not in text_of_plot
        assert "&#36;&#37;{z}" in text_of_plot and "&#36;%{z}" not in text_of_plot
        assert figure.title == evil


def test_hover_lines_break_where_the_caller_breaks_them() -> None:
    figure = plots.heatmap(grid([[1.0]]), unit="1", hover=np.asarray([["top <br>\n2nd"]]), **WORDS)
    assert figure.plot.data[0].text[0][0] == "top &#60;br&#62;<br>2nd"


def test_lines_draw_bands_reference_and_a_label_at_each_end() -> None:
    a, b = by_layer([1, 2, 3]), by_layer([1, 2, 3.05])
    figure = plots.lines(
        {"a": a, "b": b}, unit="nats", bands={"a": (a - 0.5, a + 0.5)}, reference=(4.0, "chance"), **WORDS
    )
    band, *curves = figure.plot.data
    assert band.fill == "toself" and list(band.y) == [1.5, 2.5, 3.5, 2.5, 1.5, 0.5]
    assert [c.name for c in curves] == ["a", "b"]
    labels = {n.text: n for n in figure.plot.layout.annotations}
    assert set(labels) == {"chance", "a", "b"}
    low, high = figure.plot.layout.yaxis.range
    assert low < 0.5 and high > 4
    assert labels["b"].y - labels["a"].y > 0.03 * (high - low)  # the labels do not overlap although the ends do
    assert figure.plot.layout.shapes[0].y0 == 4.0


@pytest.mark.parametrize("ends", [[9, 0], [0, 9]])
def test_labels_of_curves_that_end_together_stay_inside(ends: list[float]) -> None:
    figure = plots.lines({name: by_layer(ends) for name in "abcd"}, unit="nats", **WORDS)
    places = sorted(n.y for n in figure.plot.layout.annotations)
    low, high = figure.plot.layout.yaxis.range
    assert low <= places[0] and places[-1] <= high + 1e-9
    assert min(np.diff(places)) > 0.04 * (high - low)


def test_log_lines_place_labels_and_reference_in_powers_of_ten() -> None:
    figure = plots.lines(
        {"a": by_layer([1, 100]), "b": by_layer([0, 10])}, unit="1", log_y=True, reference=(10, "ten"), **WORDS
    )
    low, high = figure.plot.layout.yaxis.range
    assert -1 < low < 0 and 2 < high < 3
    assert {n.text: n.y for n in figure.plot.layout.annotations}["ten"] == pytest.approx(1)


def test_lines_refuse_curves_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="one and the same axis"):
        plots.lines({"a": by_layer([1]), "b": by_layer([1]).rename(layer="head")}, unit="1", **WORDS)
    with pytest.raises(ValueError, match="bands without a curve"):
        plots.lines({"a": by_layer([1])}, unit="1", bands={"b": (by_layer([1]), by_layer([1]))}, **WORDS)


def test_bars_and_dots_draw_what_they_are_given() -> None:
    bars = plots.bars({"a": 2.0, "b": 3.0}, unit="1", intervals={"b": (2.5, 4), "a": (1, 2.5)}, **WORDS).plot.data[0]
    assert (list(bars.x), list(bars.y), bars.orientation) == ([2, 3], ["a", "b"], "h")
    assert (list(bars.error_x.arrayminus), list(bars.error_x.array)) == ([1, 0.5], [0.5, 1])
    with pytest.raises(ValueError, match=r"no interval for \['a'\]"):
        plots.bars({"a": 2.0}, unit="1", intervals={}, **WORDS)
    ranked = grid([[9, 1.0], [8, 2.0]], ("layer", "rank"), "norm")
    rest, largest = plots.dots(ranked, unit="1", hover=np.asarray([["a", "b"], ["c", "d"]]), **WORDS).plot.data
    assert (list(largest.x), list(largest.y), list(largest.text)) == ([0, 1], [9, 8], ["a", "c"])
    assert (list(rest.y), list(rest.text)) == ([1, 2], ["b", "d"])


def test_histogram_needs_one_more_edge_than_counts() -> None:
    with pytest.raises(ValueError, match="3 edges"):
        plots.histogram(np.array([1, 2]), np.array([0, 1]), unit="nats", quantity="q", **WORDS)


def test_long_titles_are_broken_and_read_back_whole() -> None:
    title = "A finding that takes more than one line because it says exactly what was found, " * 2
    figure = plots.lines({"a": by_layer([1, 2])}, unit="1", title=title.strip(), caption="c", alt="a")
    assert "<br>" in figure.plot.layout.title.text
    assert figure.title == title.strip()


def test_a_page_can_show_the_title_itself() -> None:
    figure = plots.lines({"a": by_layer([1, 2])}, unit="1", **WORDS)
    bare = plots.figure_json(figure, title=False)["layout"]
    assert "title" not in bare and bare["height"] < figure.plot.layout.height
    assert plots.figure_json(figure)["layout"]["title"]["text"] == "The finding"


def _lightness(color: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    return 116 * (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]) ** (1 / 3) - 16


def test_colour_scales_change_lightness_evenly() -> None:
    half = len(plots.DIVERGING) // 2
    for ramp in (plots.SEQUENTIAL, plots.DIVERGING[half:], plots.DIVERGING[: half + 1][::-1]):
        steps = -np.diff([_lightness(c) for c in ramp])
        assert steps.min() > 0.6 * steps.mean() and steps.max() < 1.5 * steps.mean()


def test_figures_render_in_a_notebook(drawings: dict[str, plots.Drawing], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBEKIT_STATIC_IMAGES", "0")
    figure = drawings["map"]
    assert isinstance(figure, Figure)
    import plotly.io

    renderer, plotly.io.renderers.default = plotly.io.renderers.default, "plotly_mimetype"
    try:
        bundle = figure._repr_mimebundle_()["application/vnd.plotly.v1+json"]
        assert bundle["config"]["showSendToCloud"] is False
    finally:
        plotly.io.renderers.default = renderer
