"""A registered analysis has a page with its parameters as widgets, without a line in the dashboard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import probekit as pk
from probekit.analysis import temporary_registrations
from probekit.reduce import Norm

testing = pytest.importorskip(
    "streamlit.testing.v1", reason="the dashboard needs streamlit: pip install 'probekit[app]'"
)
pytestmark = pytest.mark.real
STREAM = pk.Capture("resid_post", Norm())
PATIENCE = 240  # seconds; a busy machine with two cores


@dataclass(frozen=True)
class LengthParams(pk.Params):
    """Three kinds of parameters."""

    layer: int = pk.param(-1, low=-40, high=40, help="Block whose stream is measured")
    loud: bool = pk.param(False, help="Whether to say it loudly")
    how: str = pk.param("mean", choices=("mean", "median"), help="How tokens are put together")


@pytest.fixture
def registered() -> Iterator[None]:
    with temporary_registrations():

        @pk.register
        class StreamLength(pk.Analysis):
            """How long is the stream?"""

            name, title, Params = "stream-length", "Stream length", LengthParams
            measures = {"norm": pk.Measure(("layer", "token"), "activation", "norm of the residual stream")}

            def observe(self, params: Any, info: Any) -> Any:
                return pk.Forward((STREAM,))

            def compute(self, trace: Any, params: Any) -> Any:
                return trace[STREAM]

            def findings(self, result: Any) -> Any:
                value = float(result["norm"].isel(layer=result.params.layer).mean())
                said = f"The stream is {value:.0f} long{'!' * result.params.loud}"
                return [pk.Finding(said, value, "activation", 0.0, "no stream", None, 1, "text")]

            def draw(self, result: Any) -> Any:
                about = {"title": "Length", "unit": "activation", "caption": result.about, "alt": "Heat map."}
                return {"map": pk.plots.heatmap(result["norm"], **about)}

        yield


def page() -> None:
    """What streamlit runs."""
    from probekit_dashboard.views import phenomenon

    phenomenon.body("stream-length", None)


def test_a_new_analysis_has_widgets_runs_and_shows_its_figure(registered: None) -> None:
    app = testing.AppTest.from_function(page, default_timeout=PATIENCE).run()
    assert not app.exception
    assert [h.value for h in app.header] == ["Stream length"]
    assert app.number_input[0].label == "layer" and (app.number_input[0].min, app.number_input[0].max) == (-40, 40)
    assert app.selectbox[0].options == ["mean", "median"]
    app.checkbox[0].check()
    app.button[0].click().run()
    for _ in range(2 * PATIENCE):
        if any("long!" in t.value for t in app.text):
            break
        time.sleep(0.5)
        app.run()
    assert any("long!" in t.value for t in app.text), [*app.text, *app.caption, *app.error, *app.exception]
    assert len(app.get("plotly_chart")) == 1
    assert not app.exception and not app.error


def listed() -> None:
    """What streamlit runs: the paths of the navigation, as text."""
    import streamlit as st
    from probekit_dashboard import views

    for one in views.navigation()["Every analysis"]:
        st.text(one.url_path)


def test_the_navigation_lists_every_registered_analysis(registered: None) -> None:
    app = testing.AppTest.from_function(listed, default_timeout=PATIENCE).run()
    paths = [t.value for t in app.text]
    assert paths == [f"analysis-{name}" for name in pk.list_analyses()]
    assert "analysis-stream-length" in paths
