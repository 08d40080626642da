"""Choosing the lens on the Lens page: it is part of the view, of its link and of what a first pass depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import run, scripted, texts_of
from lens_files import random_lens
from probekit_dashboard.export import python_for
from probekit_dashboard.frame import core_key, core_params
from probekit_dashboard.selection import Selection, from_query
from probekit_dashboard.views import lens

import probekit as pk

testing = pytest.importorskip(
    "streamlit.testing.v1", reason="the dashboard needs streamlit: pip install 'probekit[app]'"
)


def test_the_lens_is_part_of_the_link() -> None:
    plain = Selection("gpt2", "One two.", token=1)
    assert "lens" not in plain.to_query() and from_query(plain.to_query(), "x")[0] == plain
    other = replace(plain, lens="lenses/mine")
    assert from_query(other.to_query(), "x") == (other, "")


def test_a_first_pass_depends_on_the_lens() -> None:
    """Another lens, another key; the logit lens is the default and has the key that it always had."""
    now = Selection("gpt2", "One two three.")
    keys = {core_key(replace(now, lens=lens)) for lens in ("", "a", "b")}
    assert len(keys) == 3 and core_key(now) == core_key(replace(now, token=2))
    model = scripted()
    assert "logit_lens" not in core_params(model, "One two three.")
    assert core_params(model, "One two three.", "a")["logit_lens"] == {"lens": "a"}


def test_a_lens_that_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    random_lens(tmp_path / "wide", 4, 8)
    random_lens(tmp_path / "fits", 4, 16)
    model = scripted(n_layers=4, d_model=16)
    assert lens.fit_problem("", model) == lens.fit_problem(str(tmp_path / "fits"), model) == ""
    assert "width 8" in lens.fit_problem(str(tmp_path / "wide"), model)
    assert "There is no lens" in lens.fit_problem("no such lens", model)


def test_the_code_beside_a_view_names_the_lens(tmp_path: Path) -> None:
    random_lens(tmp_path / "mine", 4, 16)
    model, now = scripted(n_layers=4, d_model=16), Selection("gpt2", "w3", lens=str(tmp_path / "mine"))
    results = run("logit-lens", model, texts_of((9,)), lens=now.lens, lens_transfer=True)
    seen: Any = SimpleNamespace(selection=now, model=model, results=results)
    assert f"lens={now.lens!r}" in lens._code(seen)
    assert lens._reader(seen) == "the tuned lens mine"
    plain: Any = SimpleNamespace(selection=replace(now, lens=""), results=run("logit-lens", model, texts_of((9,))))
    assert "lens=" not in lens._code(plain) and lens._reader(plain) == "the model's final norm and unembedding"
    assert python_for("logit-lens", now) in lens._code(plain)


def page(folder: str) -> None:
    """What streamlit runs: the choice alone, over a scripted model."""
    from types import SimpleNamespace

    import streamlit as st
    from helpers import run, scripted, texts_of
    from probekit_dashboard.session import select, selection
    from probekit_dashboard.views import lens

    if "begun" not in st.session_state:
        st.session_state["begun"] = True
        select(model="scripted", text="w3 w4", lens="")
    now, model = selection(), scripted(n_layers=4, d_model=16)
    params = {"lens": now.lens, "lens_transfer": True} if now.lens else {}
    results = run("logit-lens", model, texts_of((9,)), **params)
    lens._which(SimpleNamespace(selection=now, model=model, results=results))
    st.text(f"reads: {results['logit-lens'].dataset.attrs.get('lens', 'logit lens')}")


def test_the_page_offers_a_choice_of_lens(tmp_path: Path) -> None:
    """The logit lens at first; a folder that is typed reads from then on; one that does not fit changes nothing."""
    random_lens(tmp_path / "mine", 4, 16)
    random_lens(tmp_path / "wide", 4, 8)
    app = testing.AppTest.from_function(page, args=(str(tmp_path),), default_timeout=60).run()
    assert not app.exception and app.selectbox[0].options == ["Logit lens"]
    assert app.text[-1].value == "reads: logit lens"
    choose(app, str(tmp_path / "mine"))
    assert not app.exception and app.text[-1].value == "reads: tuned lens mine"
    assert "made for owner/Tiny" in app.caption[0].value
    choose(app, str(tmp_path / "wide"))
    assert "width 8" in app.error[0].value and app.text[-1].value == "reads: tuned lens mine"
    choose(app, "")
    assert app.text[-1].value == "reads: logit lens"
    assert str(tmp_path / "mine") in app.selectbox[0].options


def choose(app: Any, lens: str) -> None:
    """As a reader does: of those offered, or typed."""
    box = app.selectbox[0]
    if lens and lens not in box.options:
        box.options.append(lens)
    box.set_value(lens if lens else "Logit lens")
    app.run()


def test_public_names() -> None:
    assert pk.open_lens is pk.reduce.open_lens and "train_lens" in pk.__all__
