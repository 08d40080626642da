"""Two texts in one model, or two models on one text, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

import probekit as pk
from probekit import plots
from probekit_dashboard import compared
from probekit_dashboard.components import spine
from probekit_dashboard.export import export
from probekit_dashboard.frame import LONGEST, Seen, core_params, quantities
from probekit_dashboard.look import plain
from probekit_dashboard.prepared import PREPARED
from probekit_dashboard.session import CORE, computed, key_of, opened, select

TITLE, ICON, PATH = "Compare", ":material/compare:", "compare"
_OWN, _STORED = "Your own text", "as stored"
_DTYPES = (_STORED, "bfloat16", "float16", "float32")
_PROBABILITY = {"probability": st.column_config.ProgressColumn(format="percent", min_value=0.0, max_value=1.0)}


def body(seen: Seen) -> None:
    """One of two comparisons."""
    what = st.segmented_control(
        "Compare", ["Two texts", "Two models"], default="Two texts", key="compare-what", required=True,
        label_visibility="collapsed",
    )  # fmt: skip
    if what == "Two texts":
        _texts(seen)
    else:
        _models(seen)


# Two texts in one model


def _texts(seen: Seen) -> None:
    text = _second_text(seen)
    if text is None:
        return
    other = _seen(seen, text, seen.selection.model, seen.model, "compare-text")
    if other is None:
        return
    one, two = compared.same_scale(quantities(seen), quantities(other))
    _strips(seen, other, (one, two), ("First: the text above", "Second"))
    st.subheader("How they differ", anchor="differences")
    contrasts = compared.contrasts(seen, other)
    for contrast in contrasts:
        st.text(contrast.words)
    sinks = _sinks(seen, other)
    if sinks is not None:
        st.text(compared.sink_words(*sinks))
    left, right = st.columns([4, 1.3])
    left.caption(
        "Means over tokens. Intervals come from the spread between stretches of 32 tokens, which are not quite "
        "independent; where both texts begin alike, the interval of the difference is too wide."
    )
    table = pd.DataFrame([c.row() for c in contrasts])
    with right:
        export("compare-differences", code=_texts_code(seen, text), table=table, result=other.results[CORE[0]])
    _two_tokens(seen, other, (one, two))


def _sinks(one: Seen, other: Seen) -> tuple[pk.Result, pk.Result] | None:
    """Sinks of both texts over as many tokens; the longer one is read once more where they differ in this."""
    horizon, found = min(map(compared.horizon_of, (one, other))), []
    for seen, params in (
        (one, core_params(one.model, other.selection.text)),
        (other, core_params(one.model, one.selection.text)),
    ):
        if compared.horizon_of(seen) == horizon:
            found.append(seen.results["attention-sinks"])
            continue
        text = seen.selection.text
        key = key_of("sinks", seen.selection.model, text, sorted(params["attention_sinks"].items()))
        again = computed("compare-sinks", "Reading the longer text for its sinks", key,
                         lambda tell, t=text, p=params: pk.run(["attention-sinks"], one.model, t, progress=tell, **p))  # fmt: skip
        if again is None:
            return None
        found.append(again["attention-sinks"])
    return found[0], found[1]


def _second_text(seen: Seen) -> str | None:
    now = seen.selection
    names = [n for n in PREPARED if PREPARED[n].text != now.text]
    chosen = st.selectbox(
        "Second text", [*names, _OWN], key="compare-second",
        format_func=lambda n: PREPARED[n].title if n in PREPARED else n,
    )  # fmt: skip
    if chosen != _OWN:
        return PREPARED[chosen].text
    with st.form("compare-own", border=False):
        text = st.text_area("Your own text", now.text, height=120, label_visibility="collapsed", key="compare-own-text",
                            help="Change a word of the first text to see what hangs on it.")  # fmt: skip
        if st.form_submit_button("Compare", type="primary"):
            st.session_state["compare-own-chosen"] = text
    text = st.session_state.get("compare-own-chosen", "")
    if not text.strip():
        st.info("Type the second text, such as the first one with one word changed, and press Compare.")
        return None
    if len(text) > LONGEST:
        st.warning(f"The text has {len(text):,} characters; the dashboard takes {LONGEST:,}.")
        return None
    return str(text)


def _seen(seen: Seen, text: str, spec: str, model: Any, place: str, dtype: str | None = None) -> Seen | None:
    """The core analyses of another text, or in another model; shared with whoever looks at the same."""

    def do(tell: Any) -> pk.Results:
        results = pk.run(list(CORE), model, text, progress=tell, **core_params(model, text))
        assert isinstance(results, pk.Results)
        return results

    parts = ("core", spec, text) if dtype is None else ("core", spec, text, dtype)
    results = computed(place, "Reading the second text" if spec == seen.selection.model else f"Reading with {spec}",
                       key_of(*parts), do)  # fmt: skip
    if results is None:
        return None
    sizes = results["attention-sinks"].dataset.sizes
    chosen = int(st.session_state.get(place, seen.selection.token))
    now = replace(seen.selection, text=text, prepared="", token=chosen)
    return Seen(now.within(sizes["token"], sizes["layer"], sizes["head"]), model, results)


def _strips(
    one: Seen, other: Seen, both: tuple[tuple[plots.Quantity, ...], tuple[plots.Quantity, ...]], titles: tuple[str, str],
    *, place: str = "compare-text",
) -> None:  # fmt: skip
    """Both texts, coloured by one quantity on one scale."""
    first, second = both
    names = [q.label for q in first]
    now = str(st.session_state.get("compare-by", names[0]))
    picked = names.index(now) if now in names else 0

    def keep(by: str) -> None:
        st.session_state["compare-by"] = by

    def clicked(i: int) -> None:
        st.session_state[place] = int(i)

    sides: tuple[tuple[Seen, tuple[plots.Quantity, ...], str, str, Callable[[int], None]], ...] = (
        (one, first, titles[0], "compare-one", lambda i: select(token=int(i))),
        (other, second, titles[1], "compare-two", clicked),
    )
    for column, (seen, some, title, key, on_token) in zip(st.columns(2, gap="medium"), sides, strict=True):
        with column:
            st.text(title)
            spine(_strip(seen.tokens, some, title), key=f"{key}-{place}", selected=seen.selection.token, picked=picked,
                  on_token=on_token, on_by=keep, height=200)  # fmt: skip
    shown = first[picked]
    unit = "" if shown.unit == "1" else f" {shown.unit}"
    span = "" if shown.low is None else f", from {shown.low:.3g} to {shown.high:.3g}{unit}"
    st.caption(f"Both strips: {shown.label}, the same colours for the same values{span}. Click a token of either.")


def _strip(tokens: list[str], some: tuple[plots.Quantity, ...], title: str) -> plots.TokenStrip:
    return plots.TokenStrip(
        title=title, tokens=tuple(tokens), texts=np.zeros(len(tokens), dtype=int), quantities=some, caption="",
        alt=f"{title}, as tokens; arrow keys move, Enter selects.",
    )  # fmt: skip


def _two_tokens(one: Seen, other: Seen, both: tuple[tuple[plots.Quantity, ...], tuple[plots.Quantity, ...]]) -> None:
    places = one.selection.token, other.selection.token
    names = [plots.visible(s.tokens[p]) for s, p in zip((one, other), places, strict=True)]
    st.subheader("The selected token of each", anchor="tokens")
    st.text(f"First: token {places[0]}, {names[0]!r}. Second: token {places[1]}, {names[1]!r}.")
    table = compared.token_table(*both, places)
    left, middle, right = st.columns([6, 4, 4], gap="small")
    left.dataframe(table, hide_index=True, key="compare-token", column_config={
        "first": st.column_config.NumberColumn(format="%.4g", width=60),
        "second": st.column_config.NumberColumn(format="%.4g", width=60),
    })  # fmt: skip
    for column, seen, place, word in zip((middle, right), (one, other), places, ("First", "Second"), strict=True):
        column.dataframe(
            compared.next_tops(seen, place).rename(columns={"token": f"{word}, next"}), hide_index=True,
            key=f"compare-next-{word}", column_config=_PROBABILITY,
        )  # fmt: skip
    export("compare-tokens", code=_texts_code(one, other.selection.text), table=table)


def _texts_code(seen: Seen, text: str) -> str:
    now = seen.selection
    return "\n".join([
        "import probekit as pk", "", f"model = pk.open_model({now.model!r})", f"first = {now.text!r}", f"second = {text!r}",
        f"results = [pk.run({list(CORE)!r}, model, text) for text in (first, second)]",
        'one, other = (pk.stats.token_mean(r["token-uncertainty"]["surprisal_nats"].values, r["token-uncertainty"]["text"].values,',
        '                                  r["token-uncertainty"]["pos"].values) for r in results)',
        "pk.stats.difference(one, other)",
    ])  # fmt: skip


# Two models on one text


@dataclass(frozen=True)
class _Other:
    """The model that is set beside the selected one."""

    name: str
    dtype: str | None

    def open(self) -> Any:
        return opened(self.name) if self.dtype is None else opened(self.name, self.dtype)

    @property
    def shown(self) -> str:
        return self.name if self.dtype is None else f"{self.name} in {self.dtype}"

    @property
    def code(self) -> str:
        return f"pk.open_model({self.name!r}{'' if self.dtype is None else f', dtype={self.dtype!r}'})"


def _models(seen: Seen) -> None:
    now = seen.selection
    names = [m["name"] for m in pk.list_models() if "embed" not in str(m["capabilities"])]
    names = list(dict.fromkeys([now.model, *names]))
    left, middle, right = st.columns([5, 3, 2], vertical_alignment="bottom")
    name = left.selectbox(
        "The other model", names, accept_new_options=True, key="compare-model",
        help="An embedded model, a Hugging Face id, a folder or a .gguf file. Type to enter your own.",
    )  # fmt: skip
    dtype = middle.selectbox(
        "Its number format", _DTYPES, index=1 if name == now.model else 0, key=f"compare-dtype-{name}",
        help="What its weights are stored and computed in. Another format of the same model shows what rounding does.",
    )  # fmt: skip
    other = _Other(str(name), None if dtype == _STORED else dtype)
    go = right.button("Compare", type="primary", key="compare-go", width="stretch")
    key = key_of("shift", now.model, other.name, other.dtype, now.text)
    if go:
        st.session_state["compare-ran"] = key
    st.caption(_cost(seen, other))
    if st.session_state.get("compare-ran") != key:
        st.info(
            "Compare how a fine-tuned model and its base, or two number formats of one model, read this text: how far their "
            "next-token distributions are apart, token by token. Choose the other model, and press Compare.",
            icon=":material/compare:",
        )
        return
    try:
        model = other.open()
        same = model.info.kind == "decoder" and pk.share_tokenizer(seen.model, model)
    except pk.ProbekitError as error:
        st.error(plain(str(error)), icon=":material/error:")
        return
    if model.info.kind != "decoder":
        st.warning(
            "The other model embeds texts and predicts no tokens. Choose a language model.", icon=":material/info:"
        )
    elif same:
        _shift(seen, other, model, key)
    else:
        _apart(seen, other, model)


def _cost(seen: Seen, other: _Other) -> str:
    n, info = len(seen.tokens), seen.info
    size = pk.Shift.size(n, info.d_vocab) / 2**20
    return f"One pass of each model over {n:,} tokens; {size:,.0f} MiB while they are compared, and the other model's weights."


def _shift(seen: Seen, other: _Other, model: Any, key: str) -> None:
    text, one = seen.selection.text, seen.model
    shift = computed(
        "compare-shift", "Comparing the models", key, lambda tell: pk.shift(one, model, text, progress=tell)
    )
    if shift is None:
        return
    for line in compared.shift_words(shift):
        st.text(line)
    _shift_strip(seen, other, shift)
    _shift_table(seen, other, shift)
    _shift_token(seen, other, shift)


def _shift_code(seen: Seen, other: _Other, then: str = "shift.data") -> str:
    now = seen.selection
    return "\n".join([
        "import probekit as pk", "", f"model, other = pk.open_model({now.model!r}), {other.code}", f"text = {now.text!r}",
        "shift = pk.shift(model, other, text)", then,
    ])  # fmt: skip


def _shift_strip(seen: Seen, other: _Other, shift: pk.Shift) -> None:
    some = compared.shift_quantities(shift)
    names = [q.label for q in some]
    now = str(st.session_state.get("compare-shift-by", names[0]))

    def keep(by: str) -> None:
        st.session_state["compare-shift-by"] = by

    spine(
        _strip(seen.tokens, some, "The text, by how the models differ"), key="compare-shift-strip",
        selected=seen.selection.token, picked=names.index(now) if now in names else 0, lines=some[:1],
        on_token=lambda i: select(token=int(i)), on_by=keep,
    )  # fmt: skip
    left, right = st.columns([4, 1.3])
    left.text(
        f"At each token: the distributions that it was drawn from. Changes are {other.shown} minus {seen.selection.model}; "
        "nothing predicts the first token."
    )
    with right:
        one = ["js_nats", "kl_nats", "delta_logprob_nats", "argmax_changed"]
        export(
            "compare-shift", code=_shift_code(seen, other), figure=_figure(shift), table=shift.data[one].to_dataframe()
        )


def _figure(shift: pk.Shift) -> plots.Figure:
    js = shift.data["js_nats"]
    curve = js.drop_vars(list(js.coords)).assign_coords(token=np.arange(js.sizes["token"]))
    return plots.lines(
        {"JS divergence": curve}, title=f"Where {shift.other} differs from {shift.model}", unit="nats",
        quantity="JS divergence after the token",
        caption="Jensen-Shannon divergence of the two next-token distributions after each token, 0 to ln 2.",
        alt="A curve along the text of the divergence of two models.",
    )  # fmt: skip


def _shift_table(seen: Seen, other: _Other, shift: pk.Shift) -> None:
    st.subheader("The largest shifts", anchor="largest")
    table = compared.shift_table(shift)
    places = table["token"].tolist()

    def chosen() -> None:
        rows = st.session_state["compare-largest"]["selection"]["rows"]
        if rows and rows[0] < len(places):
            select(token=min(int(places[rows[0]]), len(seen.tokens) - 1))

    st.dataframe(
        table.rename(columns={"model": "the model says", "other": "the other says"}), hide_index=True, key="compare-largest",
        on_select=chosen, selection_mode="single-row", height=318,
        column_config={
            "JS (nats)": st.column_config.NumberColumn(format="%.4f"),
            "Δ log p (nats)": st.column_config.NumberColumn(format="%+.3f", help="Change of the token's log-probability."),
            "after": st.column_config.TextColumn(width=110),
        },
    )  # fmt: skip
    left, right = st.columns([4, 1.3])
    left.text(
        "A row selects its token. Place by place, with the likeliest tokens of both models and their probabilities."
    )
    with right:
        export("compare-largest-data", code=_shift_code(seen, other), table=table)


def _shift_token(seen: Seen, other: _Other, shift: pk.Shift) -> None:
    place = seen.selection.token
    word = plots.visible(seen.tokens[place])
    for title, after in (
        (f"In place of token {place}, {word!r}", place - 1),
        (f"After it, at token {place + 1}", place),
    ):
        if after < 0:
            continue
        st.text(f"{title}: JS {float(shift.data['js_nats'].values[after]):.2g} nats.")
        names = seen.selection.model, other.shown
        for column, table, name in zip(st.columns(2), compared.both_tops(shift, after), names, strict=True):
            column.dataframe(table.rename(columns={"token": plots.visible(name, keep_whitespace=True)}), hide_index=True,
                             key=f"compare-top-{after - place}-{name}", column_config=_PROBABILITY)  # fmt: skip
    export("compare-top", code=_shift_code(seen, other, f"shift.data.isel(token={place})"),
           table=pd.concat(dict(zip(("model", "other"), compared.both_tops(shift, place), strict=True))))  # fmt: skip


def _apart(seen: Seen, other: _Other, model: Any) -> None:
    st.warning(
        "These models have different tokenizers: they cut the text into different tokens, so that there are no two "
        "distributions over the same tokens to compare. Each reads the text for itself below.",
        icon=":material/call_split:",
    )
    text = seen.selection.text
    beside = _seen(seen, text, other.name, model, "compare-beside", other.dtype)
    if beside is None:
        return
    both = compared.same_scale(compared.across_models(quantities(seen)), compared.across_models(quantities(beside)))
    _strips(seen, beside, both, (seen.selection.model, other.shown), place="compare-beside")
    st.text(
        "Surprisal is per token, and tokens differ in length: compare where it is high, not how high it is on average."
    )
    code = "\n".join([
        "import probekit as pk", "", f"models = pk.open_model({seen.selection.model!r}), {other.code}", f"text = {text!r}",
        f"results = [pk.run({list(CORE)!r}, model, text) for model in models]",
    ])  # fmt: skip
    export("compare-beside-data", code=code, result=beside.results[CORE[0]])
