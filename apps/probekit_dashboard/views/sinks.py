"""Where heads put their attention: every head at a glance, who receives it in one, and its map on demand."""

from __future__ import annotations

from typing import Any

import numpy as np
import streamlit as st

import probekit as pk
from probekit import plots
from probekit_dashboard import tables
from probekit_dashboard.components import Grid, grid, spine
from probekit_dashboard.export import export, python_for
from probekit_dashboard.frame import Seen
from probekit_dashboard.session import awaited, key_of, select, start

TITLE, ICON, PATH = "Attention & sinks", ":material/center_focus_strong:", "sinks"
_N_HEADS = 20  # of the table


def body(seen: Seen) -> None:
    """The sink in words, the heads, one head, its map."""
    epsilon = float(seen.results["attention-sinks"].params.as_dict()["epsilon"])
    st.text(tables.sink_line(seen.sinks, seen.tokens, epsilon))
    name = st.selectbox(
        "Quantity", list(tables.HEAD_QUANTITIES), key="sinks-by", width=420,
        format_func=lambda k: tables.HEAD_QUANTITIES[k][0][:1].upper() + tables.HEAD_QUANTITIES[k][0][1:],
    )  # fmt: skip
    left, right = st.columns([7, 5], gap="medium")
    with left:
        _heads(seen, name)
    with right:
        _strongest(seen, name)
    now = seen.selection
    st.subheader(f"Who receives attention in head {now.layer}.{now.head}", anchor="head")
    _head(seen, name)
    st.subheader(f"The map of head {now.layer}.{now.head}", anchor="map")
    _map(seen)


def _heads(seen: Seen, name: str) -> None:
    now, values = seen.selection, tables.head_values(seen.sinks, name, seen.selection.token)
    label, unit, how = tables.HEAD_QUANTITIES[name]
    n_layers, n_heads = values.shape
    share = unit == "share"
    drawn = Grid(
        values, [str(i) for i in range(n_layers)], [str(i) for i in range(n_heads)], "block", "head", label, unit,
        f"Heat map of the {label} over blocks and heads; arrow keys move, Enter selects.", low=0.0,
        high=1.0 if share and name != "received" else None,
    )  # fmt: skip
    grid(drawn, key="sinks-heads", selected=(now.layer, now.head), on_cell=lambda row, c: select(layer=row, head=c))
    place, n = tables.place_of(values, now.layer, now.head)
    one, two = st.columns([2.4, 1.4])
    one.text(
        f"Head {now.layer}.{now.head} is {tables.ordinal(place)} of {n:,} by {label} "
        f"({values[now.layer, now.head]:.3g} {unit})."
    )
    one.caption(f"{how[:1].upper()}{how[1:]}. Columns are heads, rows blocks; a click selects a head.")
    with two:
        export("sinks-heads", code=python_for("attention-sinks", now), result=seen.results["attention-sinks"])


def _strongest(seen: Seen, name: str) -> None:
    now, label = seen.selection, tables.HEAD_QUANTITIES[name][0]
    table = tables.strongest_heads(seen.sinks, name, now.token, _N_HEADS)
    # A key of its own for each selection: a ticked row would stay ticked when another head is selected elsewhere.
    key = f"sinks-strongest-{name}-{now.token}-{now.layer}.{now.head}"

    def chosen() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows:
            select(layer=int(table["layer"].iloc[rows[0]]), head=int(table["number"].iloc[rows[0]]))

    st.markdown(f"**The {len(table)} heads with the largest values**")
    shown = table.drop(columns=["layer", "number"])
    here = (table["layer"] == now.layer) & (table["number"] == now.head)
    shown["head"] = shown["head"].where(~here, "▶ " + shown["head"])
    st.dataframe(
        shown, hide_index=True, key=key, on_select=chosen, selection_mode="single-row", height=430,
        column_config={
            c: st.column_config.NumberColumn(_SHORT.get(c, c), format="%.2f" if i else "%.3f", help=c, width=58)
            for i, c in enumerate(shown.columns[1:])
        },
    )  # fmt: skip
    one, two = st.columns([3, 3])
    one.caption(f"By {label}. Tick a row to select its head; ▶ is the selected one.")
    with two:
        export("sinks-strongest", code=python_for("attention-sinks", now), table=shown)


_SHORT = {
    "attention that the selected token receives": "received", "attention on position 0": "on 0",
    "mean row entropy": "entropy", "largest entry of a row": "largest",
}  # fmt: skip


def _head(seen: Seen, name: str) -> None:
    now, data = seen.selection, seen.sinks.isel(layer=seen.selection.layer, head=seen.selection.head)
    received = np.asarray(data["received"].values, dtype=float)
    quantities = (
        plots.Quantity("received", "share", received, low=0.0),
        plots.Quantity("received, log", "share", np.where(received > 0, received, np.nan), "log"),
        plots.Quantity("entropy of its row", "nats", np.asarray(data["row_entropy_nats"].values, dtype=float), low=0.0),
        plots.Quantity(
            "its attention on position 0", "share", np.asarray(data["first_share"].values, dtype=float), low=0.0
        ),
    )
    labels = [q.label for q in quantities]
    held = st.session_state.get("sinks-strip-by", labels[0])
    strip = plots.TokenStrip(
        title="Who receives attention", tokens=tuple(seen.tokens), texts=np.zeros(len(seen.tokens), dtype=int),
        quantities=quantities, caption="", alt="The text by the attention that each token receives in this head.",
    )  # fmt: skip

    def keep(by: str) -> None:
        st.session_state["sinks-strip-by"] = by

    spine(
        strip, key="sinks-strip", selected=now.token, picked=labels.index(held) if held in labels else 0,
        lines=(quantities[0], quantities[2]), on_token=lambda i: select(token=int(i)), on_by=keep, height=130,
    )  # fmt: skip
    order = np.argsort(-received, kind="stable")[:3]
    most = ", ".join(f"{plots.visible(seen.tokens[i])!r} at {i} ({received[i]:.0%})" for i in order.tolist())
    left, right = st.columns([4, 1.3])
    left.text(f"Most is received by {most}.")
    left.caption(
        "Received: the mean of a token's attention over the queries that see it, itself included. Late tokens are seen by "
        "few queries, so that their values are noisy."
    )
    code = python_for(
        "attention-sinks", now, then=f'result["received"].sel(layer={now.layer}, head={now.head})  # token'
    )
    with right:
        export(
            "sinks-head",
            code=code,
            table=data[["received", "row_entropy_nats", "first_share", "row_max"]].to_dataframe(),
        )


def _map(seen: Seen) -> None:
    now, n = seen.selection, len(seen.tokens)
    key = key_of("map", now.model, now.text, now.layer)
    maps: tables.LayerMaps | None = awaited("map", key)
    if maps is None:
        heads, size = seen.info.n_heads, 4 * seen.info.n_heads * n * n / 2**20
        st.text(
            f"Attention maps are not kept: query × key of the {heads} heads of block {now.layer} takes {_size(size)} for "
            f"the {n:,} tokens, and one more pass."
        )
        if st.button(f"Show the maps of block {now.layer}", key="sinks-map-run", icon=":material/play_arrow:"):
            start("map", f"Reading the attention maps of block {now.layer}", key, _reads(seen, now.layer))
            st.rerun()
        return
    _show_map(seen, maps)


def _size(mebibytes: float) -> str:
    return f"{mebibytes:,.0f} MiB" if mebibytes >= 1 else "less than 1 MiB"


def _reads(seen: Seen, layer: int) -> Any:
    model, text = seen.model, seen.selection.text

    def do(tell: Any) -> tables.LayerMaps:
        tell(pk.Step("reading", 0, 0, ""))
        cache = pk.cache(model, text, f"pattern.{layer}")
        tell(pk.Step("summing up", 0, 0, ""))
        return tables.layer_maps(cache["pattern", layer].values)

    return do


def _show_map(seen: Seen, maps: tables.LayerMaps) -> None:
    now, columns = seen.selection, maps.columns
    values, size = maps.values[now.head], len(columns)
    by = st.segmented_control(
        "Colour scale", ["linear", "log"], default="linear", key="sinks-map-scale", required=True,
        help="The sink takes most of the attention; on a logarithmic scale, what is left of it shows.",
    )  # fmt: skip
    labels, hovers = columns.labels(seen.tokens), columns.hovers(seen.tokens)
    at = columns.column_of(now.token)
    drawn = Grid(
        values[::-1], [str(a) for a in columns.edges[:-1][::-1].tolist()], labels, "query", "key", "attention", "share",
        "Heat map of attention, queries downwards, keys to the right; arrow keys move, Enter selects the key.",
        "log" if by == "log" else "sequential", 1e-4 if by == "log" else 0.0, 1.0, hover=hovers,
        row_hover=hovers[::-1], cell=min(18, max(2, 560 // size)), least=2,
    )  # fmt: skip
    grid(
        drawn, key="sinks-map", selected=(size - 1 - at, at),
        on_cell=lambda row, c: select(token=int(maps.keys[now.head, size - 1 - row, c])),
    )  # fmt: skip
    left, right = st.columns([4, 1.3])
    several = (
        f" Several tokens share a row and a column (at most {tables.MOST_PLACES}); a cell shows the largest attention of its pairs."
        if columns.whole
        else ""
    )
    left.caption(
        f"Row: the token that attends (query), the first on top. Column: the token attended to (key). A click selects the "
        f"key.{several}"
    )
    code = "\n".join([
        "import probekit as pk", "", f"model = pk.open_model({now.model!r})", f"text = {now.text!r}",
        f'maps = pk.cache(model, text, "pattern.{now.layer}")', f'maps["pattern", {now.layer}].sel(head={now.head})  # query, key',
    ])  # fmt: skip
    with right:
        export("sinks-map", code=code, table=_pairs(values, maps, now.head))


def _pairs(values: np.ndarray, maps: tables.LayerMaps, head: int) -> Any:
    import pandas as pd

    rows, cols = np.nonzero(np.isfinite(values))
    return pd.DataFrame({
        "query": maps.queries[head, rows, cols], "key": maps.keys[head, rows, cols], "attention": values[rows, cols]
    })  # fmt: skip
