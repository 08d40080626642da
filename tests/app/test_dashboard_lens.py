"""The pages Lens and Attention & sinks: what they work out, and what they show of a made result, without a model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import run, scripted, texts_of
from probekit_dashboard import tables
from probekit_dashboard.selection import Selection
from probekit_dashboard.window import Columns, whole

from probekit.core import Batch, TokenText

N_LAYERS, N_HEADS, N_TOKENS = 4, 3, 12
HOSTILE = ("<img src=x onerror=alert(1)>", "\u202eevil", "\x00", "**bold**")


def lens_of(top: list[list[list[int]]], logprob: list[list[list[float]]] | None = None) -> xr.Dataset:
    """A lens of hand-written top tokens; axes layer, token, rank."""
    ids = np.array(top)
    shares = np.log(np.full(ids.shape, 0.1)) if logprob is None else np.array(logprob)
    vocab = np.unique(ids)
    n_layers, n_tokens, _ = ids.shape
    return xr.Dataset(
        {
            "top_id": (("layer", "token", "rank"), ids),
            "top_logprob": (("layer", "token", "rank"), shares),
            "vocab_str": ("vocab", np.array([f" w{i}" for i in vocab], dtype=object)),
            "logprob_nats": (("layer", "token"), np.full((n_layers, n_tokens), -2.0)),
            "target_rank": (("layer", "token"), np.ones((n_layers, n_tokens), dtype=int)),
            "settled_layer": ("token", np.full(n_tokens, n_layers - 1)),
        },
        {"vocab": vocab, "layer": np.arange(n_layers), "token_id": ("token", np.arange(n_tokens) + 3)},
    )


def test_a_window_holds_the_selected_token_and_stays_where_it_is() -> None:
    first = tables.window(100, 50, 20)
    assert (first.edges[0], first.edges[-1]) == (40, 60) and len(first) == 20
    assert tables.window(100, 59, 20, 40).edges.tolist() == first.edges.tolist()  # still inside: it does not move
    assert tables.window(100, 60, 20, 40).edges[0] == 50  # outside: around the selection again
    assert tables.window(100, 99, 20).edges[-1] == 100 and tables.window(100, 0, 20).edges[0] == 0
    assert tables.window(5, 3, 20).edges.tolist() == list(range(6))
    assert tables.window(30, 25, 20, 20).edges[-1] == 30  # begun in a longer text


@pytest.mark.parametrize(
    ("how", "values", "places"),
    [("max", [2.0, 5.0], [1, 3]), ("min", [1.0, -4.0], [0, 4]), ("mean", [1.5, 2 / 3], [0, 2])],
)
def test_downsampling_keeps_the_extreme_and_where_it_is(how: str, values: list[float], places: list[int]) -> None:
    row = np.array([[1.0, 2.0, np.nan, 5.0, -4.0, 1.0]])
    found, where = tables.extreme(Columns(np.array([0, 2, 6])), row, how)
    np.testing.assert_allclose(found, [values])
    assert where.tolist() == [places]


def test_a_column_without_a_value_is_undefined_and_keeps_its_first_token() -> None:
    found, where = tables.extreme(Columns(np.array([0, 1, 3])), np.array([[1.0, np.nan, np.nan]]))
    assert found[0, 0] == 1.0 and np.isnan(found[0, 1]) and where.tolist() == [[0, 1]]


def test_columns_of_one_token_are_the_values_themselves() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 40))
    found, where = tables.extreme(tables.window(40, 20, 10), values)
    np.testing.assert_array_equal(found, values[:, 15:25])
    assert where.tolist() == [list(range(15, 25))] * 3
    long = tables.extreme(whole(4000), rng.normal(size=(30, 4000)))[0]
    assert long.shape == (30, 160)


def test_rank_changes_are_words_with_arrows() -> None:
    lens = lens_of([[[5, 6, 7]], [[6, 5, 8]]], [[[-1.0, -2.0, -3.0]], [[np.log(0.5), -2.0, -3.0]]])
    table = tables.rank_changes(lens, 1, 0)
    assert table["token"].tolist() == ["␣w6", "␣w5", "␣w8"] and table["probability"].iloc[0] == pytest.approx(0.5)
    assert table["rank change"].tolist() == ["↑ up 1", "↓ down 1", "↑ new"]
    assert set(tables.rank_changes(lens, 0, 0)["rank change"]) == {"– first block"}
    assert tables.rank_changes(lens_of([[[5, 6]], [[5, 6]]]), 1, 0)["rank change"].tolist() == ["= same"] * 2


def test_a_path_without_writes_has_gaps_where_nothing_was_kept() -> None:
    lens = lens_of([[[5, 6]], [[6, 7]], [[6, 5]]])
    logprob, rank = tables.known_path(lens, 0, [5, 6])
    assert np.isfinite(logprob).tolist() == [[True, True], [False, True], [True, True]]
    assert rank[:, 1].tolist() == [1.0, 0.0, 0.0] and np.isnan(rank[1, 0])
    follows = lens_of([[[5, 6], [5, 6]]])  # token 1 has the id 4, which no layer names
    assert tables.known_path(follows, 0, [4])[0].tolist() == [[-2.0]]


def test_top_words_and_line_name_the_cells() -> None:
    lens = lens_of([[[5, 6], [6, 5]], [[7, 6], [8, 5]]])
    assert tables.top_words(lens, [0, 1], np.array([[0, 1], [1, 0]])) == ["␣w5", "␣w6", "␣w8", "␣w7"]
    line = tables.lens_line(lens, HOSTILE[:2], 0)
    assert "␣w7" in line and "only in the last block" in line and "\\u202eevil" in line and "\u202e" not in line


def test_quantities_of_the_lens_are_undefined_where_no_token_follows() -> None:
    data = run("logit-lens", scripted(d_vocab=64), texts_of((N_TOKENS,)))["logit-lens"].dataset
    for name in tables.LENS_QUANTITIES:
        values = tables.lens_values(data, name)
        assert values.shape == (N_LAYERS, N_TOKENS)
        assert np.isnan(values[:, -1]).all() == (name in ("logprob", "rank")), name
        assert np.isfinite(values[:, :-1]).all()
    assert tables.lens_values(data, "rank").min() != 0 and (tables.lens_values(data, "agreement")[-1] == 1).all()


def sinks_of(**changes: np.ndarray) -> xr.Dataset:
    shape = (2, 3, 4)
    names = ("received", "row_entropy_nats", "first_share", "row_max")
    arrays = {n: changes.get(n, np.zeros(shape)) for n in names}
    share = changes.get("sink_share", np.full((2, 4), 0.0))
    variables = {n: (("layer", "head", "token"), a) for n, a in arrays.items()} | {
        "sink_share": (("layer", "token"), share)
    }
    return xr.Dataset(variables)


def test_heads_are_ranked_and_ties_share_a_place() -> None:
    first = np.zeros((2, 3, 4))
    first[:, :, 0] = 1.0  # position 0 sees only itself: left out of the mean
    first[0, 1, 1:], first[1, 2, 1:], first[1, 0, 1:] = 0.3, 0.6, 0.3
    values = tables.head_values(sinks_of(first_share=first), "first", 0)
    np.testing.assert_allclose(values, [[0, 0.3, 0], [0.3, 0, 0.6]])
    assert tables.place_of(values, 1, 2) == (1, 6)
    assert tables.place_of(values, 0, 1) == tables.place_of(values, 1, 0) == (2, 6)
    table = tables.strongest_heads(sinks_of(first_share=first), "first", 0, 3)
    assert table["head"].tolist() == ["1.2", "0.1", "1.0"]
    assert list(zip(table["layer"], table["number"], strict=True)) == [(1, 2), (0, 1), (1, 0)]
    received = np.zeros((2, 3, 4))
    received[1, 1, 2] = 0.7
    assert tables.head_values(sinks_of(received=received), "received", 2)[1, 1] == 0.7
    assert not tables.head_values(sinks_of(received=received), "received", 1).any()


@pytest.mark.parametrize(
    ("n", "word"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (112, "112th"), (21, "21st")]
)
def test_places_are_words(n: int, word: str) -> None:
    assert tables.ordinal(n) == word


def test_the_sink_is_named_in_words() -> None:
    share = np.array([[1.0, 0.0, 0.5, np.nan], [0.5, 0.0, 0.0, np.nan]])
    received = np.zeros((2, 3, 4))
    received[:, :, 0] = 0.6
    line = tables.sink_line(sinks_of(sink_share=share, received=received), HOSTILE, 0.3)
    assert line.startswith("The sink of this text is token 0, ") and "75% of the heads give it more than 30%" in line
    assert "on average it receives 60%" in line and "Next comes token 2" in line and "\x00" not in line
    assert "No token of this text is a sink" in tables.sink_line(sinks_of(), HOSTILE, 0.3)


def test_maps_are_downsampled_by_their_largest_entry() -> None:
    rng = np.random.default_rng(0)
    pattern = np.tril(rng.random((2, 10, 10))).astype(np.float32)
    exact = tables.layer_maps(pattern, 10)
    np.testing.assert_array_equal(np.where(np.isnan(exact.values), 0, exact.values), pattern)
    assert np.isnan(exact.values[:, 0, 1:]).all()
    small = tables.layer_maps(pattern, 4)
    edges = small.columns.edges
    assert small.values.shape == (2, 4, 4) and small.nbytes == 3 * 4 * 2 * 16
    for head in range(2):
        for r in range(4):
            for c in range(r + 1):
                piece = pattern[head, edges[r] : edges[r + 1], edges[c] : edges[c + 1]]
                assert small.values[head, r, c] == piece.max()
                assert pattern[head, small.queries[head, r, c], small.keys[head, r, c]] == piece.max()


# --- the pages, run by streamlit without a browser ------------------------------------------------------------------


def seen_of(token: int = 5, strings: tuple[str, ...] | None = None) -> Any:
    """What pages get, of a scripted model that cannot run anything else."""
    text = texts_of((N_TOKENS,)).texts[0]
    batch = Batch((TokenText(text.ids, strings or text.strings),))
    model = scripted(d_vocab=64)
    results = run(["logit-lens", "attention-sinks"], model, batch, horizon=8, tail=2)
    now = Selection("scripted", " ".join(w.strip() for w in text.strings), token=token, layer=2, head=1)
    lens, sinks = (results[n].dataset for n in ("logit-lens", "attention-sinks"))
    return SimpleNamespace(
        selection=now,
        model=model,
        info=model.info,
        results=results,
        lens=lens,
        sinks=sinks,
        tokens=list(batch.strings),
        about="made",
    )


def page(name: str, seen: Any) -> Any:
    from streamlit.testing.v1 import AppTest

    def script() -> None:
        import importlib

        import streamlit as st

        if "selection" not in st.session_state:
            st.session_state["selection"] = st.session_state["seen"].selection
        importlib.import_module(f"probekit_dashboard.views.{st.session_state['page']}").body(st.session_state["seen"])

    test = AppTest.from_function(script, default_timeout=60)
    test.session_state["seen"], test.session_state["page"] = seen, name
    return test.run()


def said(test: Any) -> str:
    return "\n".join(str(e.value) for kind in ("text", "caption", "subheader", "markdown") for e in test.get(kind))


def test_the_lens_page_shows_cell_path_and_writes() -> None:
    test = page("lens", seen_of())
    for _ in range(20):  # the writes are read in the background
        if not test.get("progress") and len(test.dataframe) == 5:
            break
        test.run()
    assert not test.exception and len(test.dataframe) == 5
    text = said(test)
    assert "After token 5" in text and "Block 2, after token 5" in text and "Through the blocks" in text
    assert len(test.get("bidi_component")) == 1 and len(test.get("plotly_chart")) == 1
    table = test.dataframe[0].value
    assert list(table.columns) == ["rank", "token", "probability", "rank change"] and len(table) == 10
    assert list(test.dataframe[1].value.columns) == ["▲ promotes", "logits"]
    assert (np.diff(test.dataframe[1].value["logits"]) <= 0).all()
    assert (np.diff(test.dataframe[2].value["logits"]) >= 0).all()


def test_the_lens_page_at_the_ends_of_the_text_and_of_the_model() -> None:
    for token, layer in ((0, 0), (N_TOKENS - 1, N_LAYERS - 1)):
        seen = seen_of(token)
        seen.selection = replace(seen.selection, layer=layer)
        test = page("lens", seen)
        assert not test.exception
        assert ("goes on with" in said(test)) == (token == 0)
        assert ("outside the range of blocks" in said(test)) == (layer == 0)
        test.selectbox(key="lens-by").set_value("agreement").run()
        assert not test.exception


def test_hostile_tokens_are_shown_and_not_interpreted() -> None:
    strings = (
        *HOSTILE,
        *(f" w{i}" for i in range(8)),
    )
    for name in ("lens", "sinks"):
        test = page(name, seen_of(0, strings))
        assert not test.exception
        marked = "\n".join(str(e.value) for kind in ("caption", "subheader", "markdown") for e in test.get(kind))
        assert not any(w in marked for w in ("<img", "evil", "**bold**")), name
        assert not any(c in said(test) for c in "\u202e\x00")


def test_the_sinks_page_ranks_the_selected_head() -> None:
    seen = seen_of()
    test = page("sinks", seen)
    assert not test.exception
    values = tables.head_values(seen.sinks, "received", 5)
    place = tables.place_of(values, 2, 1)[0]
    assert f"Head 2.1 is {tables.ordinal(place)} of 12 by" in said(test)
    table = test.dataframe[0].value
    assert len(table) == 12 and table.iloc[0, 1] == pytest.approx(values.max())
    test.selectbox(key="sinks-by").set_value("entropy").run()
    assert "mean row entropy" in test.dataframe[0].value.columns[1] and not test.exception


def test_the_map_waits_for_a_button() -> None:
    test = page("sinks", seen_of())
    assert len(test.get("bidi_component")) == 2 and "Attention maps are not kept" in said(test)
    test.button(key="sinks-map-run").click().run()
    for _ in range(20):
        if len(test.get("bidi_component")) == 3:
            break
        test.run()
    assert not test.exception and len(test.get("bidi_component")) == 3
    assert "A click selects the key" in said(test)
