"""What each block would predict if the model stopped there, and what attention and MLP of a block do to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
import xarray as xr

import probekit as pk
from probekit import plots
from probekit_dashboard import look, tables
from probekit_dashboard.components import Grid, grid
from probekit_dashboard.export import export, python_for
from probekit_dashboard.frame import Seen
from probekit_dashboard.look import plain
from probekit_dashboard.session import MOST_BYTES, awaited, computed, key_of, select, start
from probekit_dashboard.window import WIDEST, Columns, whole

TITLE, ICON, PATH = "Lens", ":material/layers:", "lens"
AT_ONCE = 512  # tokens up to which the writes of a text are worked out unasked
MOST_WRITES = MOST_BYTES // 4  # bytes; more would push other results out
_SAYS = "What attention and MLP write, below, is read without it."
_VIEWS = {"words": "Words", "wide": "Wide", "all": "Whole text"}


def body(seen: Seen) -> None:
    """Which lens, the grid, the selected cell, the way through the blocks, and what the block's parts write."""
    _which(seen)
    st.text(tables.lens_line(seen.lens, seen.tokens, seen.selection.token))
    _grid(seen)
    now = seen.selection
    left, right = st.columns([5, 7], gap="medium")
    with left:
        st.subheader(f"Block {now.layer}, after token {now.token}", anchor="cell")
        _cell(seen)
    writes = None
    below = st.container()
    with right:
        st.subheader("Through the blocks", anchor="path")
        path = st.container()
    with below:
        st.subheader(f"What attention and MLP of block {now.layer} write here", anchor="writes")
        writes = _writes(seen)
        if writes is not None:
            _written(seen, writes)
    with path:
        _path(seen, writes)


def _which(seen: Seen) -> None:
    """Choose the lens that reads; it belongs to the view that all pages share, and so to its link."""
    now = seen.selection
    names = list(dict.fromkeys(["", now.lens, *st.session_state.setdefault("lenses", [])]))
    left, right = st.columns([5, 8], gap="medium", vertical_alignment="bottom")
    chosen = left.selectbox(
        "Lens", names, index=names.index(now.lens), accept_new_options=True, key=f"lens-which-{now.lens}",
        format_func=lambda name: name or "Logit lens",
        help="The logit lens, or a tuned or Jacobian lens: its folder, its .pt file, or its id on the Hugging Face hub "
        "(owner/name:path). Type to enter one. `probekit train-lens` makes one of a text file.",
    )  # fmt: skip
    reader = seen.results["logit-lens"].dataset.attrs.get("lens")
    if reader:
        model = seen.results["logit-lens"].dataset.attrs.get("lens_model")
        right.caption(plain(f"Read by the {reader}{f', made for {model}' if model else ''}.") + f" {_SAYS}")
    chosen = (chosen or "").strip()
    if chosen != now.lens:
        problem = fit_problem(chosen, seen.model)
        if problem:
            st.error(plain(problem), icon=":material/error:")
            return
        if chosen:
            st.session_state["lenses"] = list(dict.fromkeys([*st.session_state["lenses"], chosen]))
        select(lens=chosen)
        st.rerun()


def fit_problem(lens: str, model: Any) -> str:
    """Why a lens cannot read a model, as far as its sizes tell; "" if it can."""
    try:
        if lens:
            pk.open_lens(lens).check_sizes(model.info)
    except pk.ProbekitError as error:
        return str(error)
    return ""


def _columns(seen: Seen, view: str) -> Columns:
    n, token = len(seen.tokens), seen.selection.token
    if view == "all":
        return whole(n)
    width = tables.LENS_WORDS if view == "words" else WIDEST
    place = f"lens-start-{view}"
    held = st.session_state.get(place)
    about = key_of(seen.selection.model, seen.selection.text)
    found = tables.window(n, token, width, held[1] if held and held[0] == about else None)
    st.session_state[place] = about, int(found.edges[0])
    return found


def _grid(seen: Seen) -> None:
    lens, now = seen.lens, seen.selection
    last = lens.sizes["layer"] - 1
    one, two, three = st.columns([4, 5, 4], gap="medium", vertical_alignment="bottom")
    name = one.selectbox(
        "Colour", list(tables.LENS_QUANTITIES), key="lens-by",
        format_func=lambda k: tables.LENS_QUANTITIES[k].label[:1].upper() + tables.LENS_QUANTITIES[k].label[1:],
    )  # fmt: skip
    view = two.segmented_control(
        "Columns", list(_VIEWS), default="words", format_func=_VIEWS.get, key="lens-view", required=True,
        help=f"Words: {tables.LENS_WORDS} tokens around the selected one, with room for words. Wide: up to {WIDEST}.",
    )  # fmt: skip
    low, high = three.slider("Blocks", 0, last, (last // 3, last), key=f"lens-blocks-{last}") if last else (0, 0)
    quantity, columns = tables.LENS_QUANTITIES[name], _columns(seen, view or "words")
    layers = list(range(low, high + 1))
    values, tokens = tables.extreme(columns, tables.lens_values(lens, name)[low : high + 1], quantity.how)
    column = columns.column_of(now.token)
    drawn = Grid(
        values, [str(i) for i in layers], columns.labels(seen.tokens), "block", "after token", quantity.label,
        quantity.unit, f"Heat map of the {quantity.label} over blocks and tokens; arrow keys move, Enter selects.",
        quantity.scale, quantity.low, quantity.high, words=tables.top_words(lens, layers, tokens),
        hover=columns.hovers(seen.tokens),
    )  # fmt: skip
    grid(
        drawn, key="lens-grid",
        selected=(now.layer - low, column) if low <= now.layer <= high else None,
        on_cell=lambda row, c: select(layer=layers[row], token=int(tokens[row, c])),
    )  # fmt: skip
    _about_grid(seen, quantity, columns, (low, high))


def _about_grid(seen: Seen, quantity: tables.LensQuantity, columns: Columns, shown: tuple[int, int]) -> None:
    n, left, right = len(seen.tokens), *st.columns([4, 1.3], vertical_alignment="top")
    said = [
        f"Row: the stream after a block, read as the next token. Column t: what is predicted after token t. "
        f"{quantity.reads} In the cell: the block's likeliest token."
    ]
    if columns.whole:
        what = {"max": "largest value", "min": "smallest value", "mean": "mean"}[quantity.how]
        said.append(f"Several tokens share a column, which shows their {what}; a click selects the token that has it.")
    elif len(columns) < n:
        said.append(f"Tokens {columns.edges[0]} to {columns.edges[-1] - 1} of {n:,}.")
    if not shown[0] <= seen.selection.layer <= shown[1]:
        said.append(f"The selected block {seen.selection.layer} is outside the range of blocks.")
    claim = next((f.claim for f in seen.results["logit-lens"].findings if "uniform guess" in f.claim), "")
    early = "" if seen.selection.lens else "Readouts of early blocks say little about what these blocks hold. "
    said.append(f"{early}{claim}")
    left.caption(" ".join(said))
    with right:
        export("lens-grid", code=_code(seen), result=seen.results["logit-lens"])


def _code(seen: Seen) -> str:
    now = seen.selection
    then = f'result["entropy_nats"]                     # layer, token\nresult["top_id"].sel(layer={now.layer}).isel(token={now.token})'
    return python_for("logit-lens", now, {"lens": now.lens} if now.lens else None, then=then)


def _cell(seen: Seen) -> None:
    now = seen.selection
    table = tables.rank_changes(seen.lens, now.layer, now.token)
    st.dataframe(
        table, hide_index=True, key="lens-cell", height=390,
        column_config={
            "rank": st.column_config.NumberColumn(width=40),
            "token": st.column_config.TextColumn(width=90),
            "probability": st.column_config.ProgressColumn(
                format="percent", min_value=0.0, max_value=1.0, width=110
            ),
            "rank change": st.column_config.TextColumn(help="Against the block below; new: it is not among the ten likeliest there", width=110),
        },
    )  # fmt: skip
    entropy, kl = (float(seen.lens[v].values[now.layer, now.token]) for v in ("entropy_nats", "kl_nats"))
    left, right = st.columns([3, 3])
    left.caption(f"Entropy {entropy:.2f} nats; KL(final ‖ block) {kl:.2f} nats.")
    with right:
        export("lens-cell", code=_code(seen), table=table)


def _pins(seen: Seen) -> dict[int, str]:
    """Tokens that are followed, by id: the final top token, the one that follows, and those that the reader pins."""
    lens, token = seen.lens, seen.selection.token
    words = tables.words_of(lens, lens["top_id"].values[:, token])
    ids = list(dict.fromkeys(lens["top_id"].values[::-1, token].ravel().tolist()))
    best = ids[0]
    found = {best: f"{words[best]} (final top)"}
    if token + 1 < len(seen.tokens):
        following = int(lens["token_id"].values[token + 1])
        own = plots.visible(seen.tokens[token + 1])
        found[following] = f"{own} (final top, follows)" if following == best else f"{own} (follows)"
    held: dict[str, int] = st.session_state.setdefault("lens-pins", {})
    by_label = {tables.pin_label(words[i], i): i for i in ids if i not in found} | held

    def keep() -> None:
        pinned = {}
        for chosen in st.session_state["lens-pinned"]:
            i = by_label.get(chosen, _id_of(seen, chosen))
            if i is not None:
                pinned[tables.pin_label(plots.visible(seen.model.decode([i])[0]), i)] = i
        st.session_state["lens-pins"] = pinned

    st.session_state["lens-pinned"] = list(held)
    st.multiselect(
        "Pin more tokens", list(by_label), key="lens-pinned", on_change=keep, accept_new_options=True, max_selections=4,
        placeholder="Choose one that the lens names here, or type a word", help="A typed word is taken with a blank "
        "before it; of several tokens, the first one is followed.",
    )  # fmt: skip
    return found | {i: w for w, i in held.items() if i not in found}


def _id_of(seen: Seen, typed: str) -> int | None:
    """The token of a typed word, as it stands inside a text; the first one if that is cut into several."""
    try:
        return int(seen.model.tokenize([f" {typed.strip()}"], "never").texts[0].ids[0])
    except (pk.ProbekitError, IndexError):
        return None


def _path(seen: Seen, writes: pk.Writes | None) -> None:
    now, pins = seen.selection, _pins(seen)
    by = st.segmented_control(
        "Shown as", ["probability", "rank"], default="probability", key="lens-path", required=True
    )
    ids, layers = list(pins), seen.lens["layer"].values
    if writes is not None and len(writes.layers) == len(layers) and not now.lens:
        path = writes.follow(now.token, ids)
        logprob, rank, missing = path["logprob_nats"].values, path["rank"].values.astype(float), ""
    else:
        logprob, rank = tables.known_path(seen.lens, now.token, ids)
        missing = " Where a block does not have a token among its likeliest ten, its curve has a gap."
    values = np.exp(logprob) if by == "probability" else rank + 1
    labels = _unique([pins[i] for i in ids])
    curves = {label: xr.DataArray(values[:, c], {"layer": layers}, ["layer"]) for c, label in enumerate(labels)}
    what = "probability" if by == "probability" else "rank (1: likeliest)"
    figure = plots.lines(
        curves, title=f"What the blocks expect after token {now.token}",
        unit="1", quantity=what if len(curves) > 1 else f"{what} of {labels[0]}",
        log_y=by == "rank", y_range=(0.0, 1.02) if by == "probability" else None,
        caption=f"Read after each block by {_reader(seen)}.{missing}",
        alt=f"Curves over blocks of the {by} of {len(ids)} tokens after token {now.token}.",
    )  # fmt: skip
    code = _code(seen) if now.lens else _writes_code(seen, f"writes.follow({now.token}, {ids})")
    table = pd.DataFrame(values, index=pd.Index(layers, name="layer"), columns=labels).reset_index()
    _draw(figure, "lens-path-figure", code, table)


def _reader(seen: Seen) -> str:
    reader = seen.results["logit-lens"].dataset.attrs.get("lens")
    return f"the {reader}" if reader else "the model's final norm and unembedding"


def _unique(labels: list[str]) -> list[str]:
    """Labels with their place in front where one stands twice."""
    return labels if len(set(labels)) == len(labels) else [f"{i + 1} {w}" for i, w in enumerate(labels)]


def _draw(figure: plots.Figure, key: str, code: str, table: pd.DataFrame) -> None:
    """A figure under a heading of the page's own."""
    plot = look.fitting(figure).plot
    plot.update_layout(title=None, margin={"t": 14}, height=330)
    st.plotly_chart(plot, theme=None, config=plots.PLOT_CONFIG, key=key, alt=figure.alt)
    left, right = st.columns([4, 2.4])
    left.caption(figure.caption)
    with right:
        export(key, code=code, figure=figure, table=table)


def _writes_code(seen: Seen, then: str) -> str:
    now = seen.selection
    return "\n".join([
        "import probekit as pk", "", f"model = pk.open_model({now.model!r})", f"text = {now.text!r}",
        "writes = pk.sublayer_writes(model, text)", then,
    ])  # fmt: skip


def _writes(seen: Seen) -> pk.Writes | None:
    """Of all blocks if they fit beside other results, of the selected one otherwise; long texts wait for the reader."""
    now, n = seen.selection, len(seen.tokens)
    whole = pk.Writes.size(seen.info, n) <= MOST_WRITES
    layers = None if whole else [now.layer]
    key = key_of("writes", now.model, now.text, layers)
    if pk.Writes.size(seen.info, n, 1) > MOST_WRITES:
        st.text("The text is too long to keep what this block writes at each token. Take a shorter one.")
        return None

    def do(tell: Any) -> pk.Writes:
        return pk.sublayer_writes(seen.model, now.text, layers=layers, progress=tell)

    label = "Reading what each block writes" if whole else f"Reading what block {now.layer} writes"
    if whole and n <= AT_ONCE:
        return computed("writes", label, key, do)
    found = awaited("writes", key)
    if found is None:
        what = "all blocks" if whole else f"block {now.layer} (all blocks would take too much memory)"
        st.text(f"This takes one more pass over the {n:,} tokens, for {what}.")
        if st.button("Read it", key="lens-writes", icon=":material/play_arrow:"):
            start("writes", label, key, do)
            st.rerun()
    return found


def _written(seen: Seen, writes: pk.Writes) -> None:
    now = seen.selection
    found = writes.at(now.layer, now.token)
    frames = {}
    for place, (case, words) in zip(
        st.columns(2, gap="medium"), {"attention": "Attention", "mlp": "MLP"}.items(), strict=True
    ):
        with place:
            st.markdown(f"**{words}** of block {now.layer}")
            for side, column in zip(("promoted", "suppressed"), st.columns(2), strict=True):
                frames[case, side] = tables.writes_table(found, case, side)
                sign = "▲ promotes" if side == "promoted" else "▼ suppresses"
                column.dataframe(
                    frames[case, side].rename(columns={"token": sign}), hide_index=True, key=f"lens-{case}-{side}",
                    column_config={"logits": st.column_config.NumberColumn(format="%+.2f", width=70)},
                )  # fmt: skip
            mean = float(found["mean_logits"].sel(case=case))
            st.caption(
                f"It moves all tokens by {mean:+.2f} logits on average, which changes no probability and is taken off "
                "above."
            )
    left, right = st.columns([4, 1.3])
    cap = " This model soft-caps its logits; these are changes before the cap." if found.attrs["softcap"] else ""
    left.caption(
        "Change of the next token's logits by what the sub-layer adds to the stream, read through the final norm at the "
        f"scale of the stream that leaves the block.{cap} Direct effects only: what later blocks make of it is theirs."
    )
    table = pd.concat({"/".join(k): v for k, v in frames.items()}, names=["part", "place"]).reset_index()
    with right:
        export("lens-writes", code=_writes_code(seen, f"writes.at({now.layer}, {now.token})"), table=table)
