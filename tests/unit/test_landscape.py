"""Bars over two axes: their corners, what the mouse is told, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from probekit import plots

WORDS = {"title": "The finding", "caption": "Model, corpus, n.", "alt": "What it shows.", "unit": "activation"}


def heights(values: Any) -> xr.DataArray:
    values = np.asarray(values, dtype=float)
    coords = {"d_model": 10 * np.arange(values.shape[1])}
    return xr.DataArray(values, dims=("token", "d_model"), coords=coords, name="magnitude")


def test_every_bar_stands_on_its_cell_and_reaches_its_height() -> None:
    figure = plots.landscape(heights([[1, 2, 3], [4, 5, 600]]), labels=["<b>a", "b"], marked=1, **WORDS)
    mesh, tops = figure.plot.data
    z = np.asarray(mesh.z).reshape(6, 8)
    assert (z[:, :4] == 0).all()
    np.testing.assert_allclose(z[:, 4:], np.array([1, 2, 3, 4, 5, 600])[:, None] * np.ones(4))
    x, y = np.asarray(mesh.x).reshape(6, 8), np.asarray(mesh.y).reshape(6, 8)
    np.testing.assert_allclose(x.mean(1), [0, 0, 0, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(y.mean(1), [0, 1, 2, 0, 1, 2], atol=1e-6)
    assert np.ptp(x[0]) < 1  # neighbours do not touch
    faces = np.stack([mesh.i, mesh.j, mesh.k], 1).reshape(6, 10, 3)
    assert (faces // 8 == np.arange(6)[:, None, None]).all()  # no face joins two bars
    np.testing.assert_allclose(tops.z, [1, 2, 3, 4, 5, 600])
    assert list(tops.customdata[5]) == ["b", "20"] and list(tops.customdata[0]) == ["&#60;b&#62;a", "0"]
    scene = figure.plot.layout.scene
    assert scene.xaxis.title.text == "token" and scene.yaxis.title.text == "residual stream dimension"
    assert scene.zaxis.title.text == "magnitude (activation)"
    assert list(scene.xaxis.ticktext) == ["&#60;b&#62;a", "<b>b</b>"]


def test_colours_tell_low_bars_apart() -> None:
    mesh = plots.landscape(heights([[1, 10, 10000]]), **WORDS).plot.data[0]
    shade = np.asarray(mesh.intensity)[::8]
    assert 0 <= shade[0] < shade[1] < shade[2] == 1.0
    assert shade[1] > 0.05  # on a linear scale it would be 0.001
    flat = np.asarray(plots.landscape(heights([[0.0, 0.0]]), **WORDS).plot.data[0].intensity)
    assert np.isfinite(flat).all()


def test_many_labels_are_thinned_around_the_marked_one() -> None:
    figure = plots.landscape(heights(np.ones((50, 2))), labels=[f"t{i}" for i in range(50)], marked=7, **WORDS)
    shown = list(figure.plot.layout.scene.xaxis.ticktext)
    assert "<b>t7</b>" in shown and len(shown) <= 24 and "t6" not in shown and "t8" not in shown


def test_it_turns_dark_with_the_page() -> None:
    figure = plots.on_dark(plots.landscape(heights([[1, 2]]), **WORDS))
    assert figure.plot.layout.scene.xaxis.backgroundcolor != "#ffffff"


@pytest.mark.parametrize(
    ("values", "more", "said"),
    [
        (np.ones((100, 100)), {}, "1 to 6,000 cells"),
        (np.ones((0, 3)), {}, "1 to 6,000 cells"),
        ([[1.0, -1.0]], {}, "0 or more"),
        ([[1.0, np.nan]], {}, "0 or more"),
        ([[1.0, 2.0]], {"labels": ["a", "b"]}, "2 labels for the 1 entries"),
        ([[1.0, 2.0]], {"alt": " "}, "needs a title"),
    ],
)
def test_what_cannot_be_drawn_is_refused(values: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plots.landscape(heights(values), **(WORDS | more))
