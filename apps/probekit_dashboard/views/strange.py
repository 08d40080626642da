"""Strange tokens: the card of any token, the vocabulary at a glance, sticky tokens of an embedding model."""

from __future__ import annotations

from typing import Any

import numpy as np
import streamlit as st

import probekit as pk
from probekit import plots
from probekit_dashboard import look, stored, strange
from probekit_dashboard.export import export
from probekit_dashboard.frame import Seen
from probekit_dashboard.look import plain
from probekit_dashboard.session import MOST_BYTES, awaited, computed, key_of, opened, selection, start
from probekit_dashboard.views.phenomenon import draw

TITLE, ICON, PATH, NEEDS_TEXT = "Strange tokens", ":material/extension_off:", "strange", False
_ENCODER = "all-minilm-l6-v2"
_PINNED = "strange-pinned"
_SHARE = st.column_config.NumberColumn(format="percent")


def body(seen: Seen | None) -> None:
    """Three parts, one below the other's choice."""
    st.text(
        "Tokenizers and models are trained on different texts. Some tokens a model has hardly ever seen (under-trained), some "
        "no text can bring about (unreachable), and some pull sentence embeddings together wherever they stand (sticky)."
    )
    part = st.segmented_control(
        "Part", ["A token", "The vocabulary", "Sticky tokens"], default="A token", key="strange-part", required=True,
        label_visibility="collapsed",
    )  # fmt: skip
    if part == "Sticky tokens":
        _sticky()
        return
    spec = selection().model
    try:
        model = opened(spec)
    except pk.ProbekitError as error:
        st.error(plain(str(error)), icon=":material/error:")
        return
    if part == "The vocabulary":
        _vocabulary(model, spec)
    token = _wanted(seen, model, spec, part == "A token")
    if token is not None:
        _card(model, spec, token)


# The card


def _here() -> tuple[Any, ...]:
    now = selection()
    return now.model, now.text, now.token


def _pin(token: int) -> None:
    """Show this token's card until another token of the text, or another model, is selected."""
    st.session_state[_PINNED] = (_here(), int(token))


def _wanted(seen: Seen | None, model: Any, spec: str, ask: bool) -> int | None:
    """The token whose card is shown: one that was asked for, or the selected one of the text."""
    if ask:
        _ask(model, spec)
    pinned = st.session_state.get(_PINNED)
    if pinned is not None and pinned[0] == _here():
        if seen is not None and ask:
            st.button("Back to the selected token", key="strange-back", icon=":material/undo:",
                      on_click=lambda: st.session_state.pop(_PINNED, None))  # fmt: skip
        return int(pinned[1])
    if not ask:
        st.info("Select a row of the table, or a point of the figure, to open the card of that token.",
                icon=":material/touch_app:")  # fmt: skip
        return None
    if seen is None:
        st.info("Type a token above to open its card.", icon=":material/touch_app:")
        return None
    return int(seen.uncertainty["token_id"].values[seen.selection.token])


def _ask(model: Any, spec: str) -> None:
    left, middle, right = st.columns([5, 3, 2], vertical_alignment="bottom")
    typed = left.text_input(
        "Another token", key="strange-typed", placeholder="a text, or an id",
        help="A token's exact text; begin with a blank if the token does. A text of several tokens shows the first of them.",
    )  # fmt: skip
    kind = middle.segmented_control("It is", ["a text", "an id"], default="a text", key="strange-kind", required=True)
    if not right.button("Open its card", key="strange-open", width="stretch"):
        return
    if not typed:
        st.warning("Type a token's text or its id first.")
        return
    try:
        ids = [int(typed)] if kind == "an id" else list(model.ids_of((typed,))[0])
    except ValueError:
        st.warning("An id is a whole number. For a text, choose “a text”.")
        return
    except AttributeError:
        ids = list(model.tokenize([typed], "never").texts[0].ids)
    if not ids or not 0 <= ids[0] < model.info.d_vocab:
        st.warning(f"There is no such token: ids go from 0 to {model.info.d_vocab - 1:,}.")
        return
    if len(ids) > 1:
        st.text(
            f"This text is cut into {len(ids)} tokens, with the ids {', '.join(map(str, ids[:20]))}. The first is shown."
        )
    _pin(ids[0])


def _card(model: Any, spec: str, token: int) -> None:
    info = model.info
    if 4 * info.d_vocab * info.d_model <= MOST_BYTES // 2:
        book = computed("strange-book", "Reading the vocabulary and its weights", key_of("book", spec),
                        lambda tell: pk.TokenBook(model))  # fmt: skip
        card = None if book is None else book.card(token)
    else:  # too large to be kept beside other results
        card = computed("strange-card", "Reading the vocabulary and its weights", key_of("card", spec, token),
                        lambda tell: pk.token_card(model, token))  # fmt: skip
    if card is None:
        return
    st.subheader("The card of a token", anchor="card")
    st.text(f"Token {card.token}, {plots.visible(card.shown)!r}, of {plots.visible(card.model, keep_whitespace=True)}")
    st.text(strange.verdict(card))
    spelling, numbers, near = strange.spelling(card), strange.numbers(card), strange.neighbours(card)
    one, two, three = st.columns([4, 5, 4], gap="small")
    one.dataframe(spelling, hide_index=True, key="strange-spelling",
                  column_config={"what": st.column_config.TextColumn(width=95)})  # fmt: skip
    if len(numbers):
        two.dataframe(numbers, hide_index=True, key="strange-numbers", column_config={
            "number": st.column_config.TextColumn(width=130),
            "value": st.column_config.NumberColumn(format="%.4g", width=60),
            "percentile": st.column_config.NumberColumn(format="%.1f", width=70, help="Per cent of the ordinary tokens with at most this value."),
        })  # fmt: skip
    if len(near):
        ids = near["id"].tolist()
        narrow = {"neighbour": st.column_config.TextColumn(width=85), "id": st.column_config.NumberColumn(width=50),
                  "cosine": st.column_config.NumberColumn(width=50, format="%.2f")}  # fmt: skip
        three.dataframe(near, hide_index=True, key=f"strange-near-{token}", selection_mode="single-row", column_config=narrow,
                        on_select=lambda: _from_rows(f"strange-near-{token}", ids))  # fmt: skip
    left, right = st.columns([4, 1.3])
    about = f"Numbers are distances from {card.reference}, and norms. " if card.reference else ""
    left.text(f"{about}Neighbours have the most similar unembedding rows; a row opens the card of its token.")
    code = f"import probekit as pk\n\npk.token_card({spec!r}, {token})  # verify=True asks the model to write it"
    with right:
        export(f"strange-card-{token}", code=code, table=near if len(near) else spelling)


def _from_rows(key: str, ids: list[int]) -> None:
    rows = st.session_state[key]["selection"]["rows"]
    if rows and rows[0] < len(ids):
        _pin(ids[rows[0]])


# The vocabulary


def _vocabulary(model: Any, spec: str) -> None:
    if model.info.kind != "decoder":
        st.info("Under-trained tokens are looked for in language models. This one embeds texts: see its sticky tokens.",
                icon=":material/info:")  # fmt: skip
        return
    asks = st.checkbox(
        "Also ask the model to repeat the strongest candidates", key="strange-verify",
        help="24 candidates and 12 other tokens, in three prompts each: shows whether weights foretell what it can write.",
    )  # fmt: skip
    params: dict[str, Any] = {} if asks else {"n_verify": 0, "n_controls": 0}
    key = key_of("strange", spec, sorted(params.items()))
    result = awaited("strange-scan", key)
    if result is None:
        st.text(_cost(model, asks, params))
        if st.button("Look through the vocabulary", type="primary", key="strange-scan"):
            start("strange-scan", "Looking through the vocabulary", key,
                  lambda tell: pk.run("undertrained-tokens", model, None, progress=tell, **params))  # fmt: skip
            st.rerun()
        return
    for finding in result.findings:
        with st.container(border=True):
            st.text(finding.claim)
            st.text(finding.evidence)
    given = "".join(f", {k}={v}" for k, v in params.items())
    code = f'import probekit as pk\n\nresult = pk.run("undertrained-tokens", {spec!r}{given})\nresult.findings'
    _scatter(result, code)
    _candidates(result, code)
    _strip(model, spec, result)


def _cost(model: Any, asks: bool, params: dict[str, Any]) -> str:
    info = model.info
    size = 4 * info.d_vocab * info.d_model / 2**20
    rows = f"the rows of {info.d_vocab:,} tokens ({size:,.0f} MiB), read off the weights"
    if not asks:
        return f"This needs {rows}, and no pass of the model: seconds for a small vocabulary."
    plans = pk.plan("undertrained-tokens", model, None, **params)
    passes = f"{plans[0].passes} passes" if plans else "a few passes over 108 short prompts"
    return f"This needs {rows}, and {passes}: about a minute for a small model."


def _scatter(result: pk.Result, code: str) -> None:
    axes = strange.second_axes(result)
    other = st.selectbox("Against", axes, key=f"strange-axis-{len(axes)}")
    groups = strange.points(result, str(other))
    figure = strange.scatter(result, str(other), groups)
    order = [ids.tolist() for ids in groups.values()]

    def chosen() -> None:
        for point in st.session_state["strange-scatter"]["selection"]["points"][:1]:
            curve, at = point.get("curve_number"), point.get("point_index", point.get("point_number"))
            if isinstance(curve, int) and isinstance(at, int) and curve < len(order) and at < len(order[curve]):
                _pin(order[curve][at])

    plot = look.fitting(figure).plot
    plot.update_layout(title=None, margin={"t": 30}, clickmode="event+select")
    st.plotly_chart(plot, theme=None, config=plots.PLOT_CONFIG, key="strange-scatter", on_select=chosen,
                    selection_mode="points", alt=figure.alt)  # fmt: skip
    left, right = st.columns([4, 1.3])
    left.text(
        f"{figure.caption} Indicators are distances from the mean row of never-trained tokens (“cosine” is 1 − cosine). Click a "
        "point to open its card."
    )
    with right:
        export("strange-vocabulary", code=code, result=result, figure=figure)


def _candidates(result: pk.Result, code: str) -> None:
    st.subheader("Candidates", anchor="candidates")
    containing = st.text_input("Containing", key="strange-containing", placeholder="part of a token")
    table = strange.candidates(result, containing)
    if table.empty:
        st.text("No candidate contains this.")
        return
    ids, key = table["id"].tolist(), f"strange-candidates-{key_of(containing)[:8]}"
    st.dataframe(
        table, hide_index=True, key=key, on_select=lambda: _from_rows(key, ids), selection_mode="single-row", height=320,
        column_config={"probability of repeating it": _SHARE},
    )  # fmt: skip
    left, right = st.columns([4, 1.3])
    left.text(f"{len(table):,} tokens, most suspicious first; a row opens the card of its token, below.")
    with right:
        export("strange-candidates-data", code=code, table=table)


def _strip(model: Any, spec: str, result: pk.Result) -> None:
    ids, why = strange.to_strip(result)
    left, right = st.columns([5, 2], vertical_alignment="center")
    left.text(f"{len(ids):,} strings to keep out of a model's input: {why}.")
    if not ids.size:
        return

    def listed() -> bytes:
        texts = (
            [model.vocabulary().decoded[i] for i in ids] if hasattr(model, "vocabulary") else model.decode(ids.tolist())
        )
        return strange.strip_list(spec, ids.tolist(), list(texts), why)

    right.download_button("Strip these strings (JSON)", listed, "strip.json", key="strange-strip", width="stretch")


# Sticky tokens


def _sticky() -> None:
    st.text(
        "Put into a sentence, a sticky token brings its embedding nearer to that of any other sentence, so that unrelated "
        "texts look alike to a search. They are found by trying: tokens go into pairs of sentences, and random tokens beside them."
    )
    source = st.segmented_control(
        "From", ["a new run", "a stored run"], default="a new run", key="strange-source", required=True
    )
    result = _sticky_run() if source == "a new run" else _sticky_stored()
    if result is None:
        return
    st.text(result.about)
    for finding in result.findings:
        with st.container(border=True):
            st.text(finding.claim)
            st.text(finding.evidence)
    params = {k: v for k, v in result.params.as_dict().items() if v != type(result.params).specs()[k].default}
    name = str(result.provenance.get("model", {}).get("name", _ENCODER))
    given = "".join(f", {k}={v!r}" for k, v in params.items())
    code = f'import probekit as pk\n\nresult = pk.run("sticky-tokens", {name!r}{given})\nresult.findings'
    table = strange.sticky(result)
    st.dataframe(table, hide_index=True, key="strange-sticky", height=320, column_config={
        "pairs brought nearer": _SHARE, "stays a token": _SHARE, "score": st.column_config.NumberColumn(format="%.2f"),
    })  # fmt: skip
    export("strange-sticky-data", code=code, table=table, result=result)
    drawings = result.figures()
    shown = st.selectbox("Figure", list(drawings), format_func=lambda k: drawings[k].title, key="strange-sticky-figure")
    draw(drawings[shown], f"strange-sticky-{shown}", code, result)


def _sticky_run() -> pk.Result | None:
    names = [m["name"] for m in pk.list_models() if "embed" in str(m["capabilities"])]
    spec = str(st.selectbox("Text-embedding model", names, accept_new_options=True, key="strange-encoder",
                            index=names.index(_ENCODER) if _ENCODER in names else 0))  # fmt: skip
    key = key_of("sticky", spec, "quick")
    found = awaited("strange-sticky", key)
    if found is not None:
        return found if isinstance(found, pk.Result) else None
    st.text(
        "The quick preset scores 240 tokens on 5 pairs and validates 60 on 60 pairs: some ten thousand short sentences are "
        "embedded, about five minutes of computing on one core with the embedded model. A stored run opens at once."
    )
    if st.button("Find sticky tokens", type="primary", key="strange-sticky-go"):
        start("strange-sticky", "Finding sticky tokens", key, lambda tell: _found(spec, tell))
        st.rerun()
    return None


def _found(spec: str, tell: Any) -> pk.Result:
    model = opened(spec)
    if model.info.kind == "decoder":
        raise stored.Refused(
            f"{spec} is a language model. Sticky tokens are of text-embedding models, such as {_ENCODER}."
        )
    result = pk.run("sticky-tokens", model, None, preset="quick", progress=tell)
    assert isinstance(result, pk.Result)
    return result


def _sticky_stored() -> pk.Result | None:
    given = st.text_input("Folder of a run", key="strange-folder", placeholder="reports/sticky",
                          help="A folder with results.zarr that holds sticky-tokens.")  # fmt: skip
    if not given:
        st.info("Name the folder of a run of sticky-tokens, such as one by `probekit run sticky-tokens --out FOLDER`.",
                icon=":material/folder_open:")  # fmt: skip
        return None
    try:
        folder = stored.folder_of(given, stored.roots())
    except pk.ProbekitError as error:
        st.warning(plain(str(error)), icon=":material/folder_off:")
        return None
    found = computed("strange-stored", "Reading the run", key_of("sticky-stored", str(folder), _stamp(folder)),
                     lambda tell: stored.results_of(folder)[0])  # fmt: skip
    if found is None:
        return None
    if "sticky-tokens" not in found:
        st.warning("This run holds no sticky-tokens; open it on the page Runs.", icon=":material/info:")
        return None
    result: pk.Result = found["sticky-tokens"]
    return result if np.isfinite(result["p"].values).any() else None


def _stamp(folder: Any) -> float:
    return float(folder.stat().st_mtime)
