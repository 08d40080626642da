"""Massive activations: where single entries of the residual stream dwarf the rest, and whether the model needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

import probekit as pk
from probekit import plots, stats
from probekit_dashboard.components import Grid, grid
from probekit_dashboard.export import export, python_for
from probekit_dashboard.frame import Seen
from probekit_dashboard.look import plain
from probekit_dashboard.prepared import PREPARED
from probekit_dashboard.session import awaited, computed, key_of, opened, select, start
from probekit_dashboard.views.phenomenon import draw
from probekit_dashboard.window import Columns, around, whole

TITLE, ICON, PATH = "Massive activations", ":material/landscape:", "massive"
MOST_TOKENS = 48  # of the 3-D view
MOST_DIMS = 40
_CASES = {
    "as it is": "as it is",
    "zero": "massive entries set to zero",
    "mean": "massive entries set to their mean over the other texts",
    "other dimension": "control: random other dimensions of the same tokens set to zero",
    "other position": "control: the same dimensions of random other tokens set to zero",
}


def body(seen: Seen) -> None:
    """Findings, the grid, the 3-D view, and what setting the entries to zero or their mean does."""
    _said(seen.results["massive-activations"].findings)
    _grid(seen)
    _cell(seen)
    st.subheader("One block in three dimensions", anchor=False)
    _three_d(seen)
    st.subheader("Does the model need them?", anchor=False)
    _intervention(seen)


def _said(findings: list[pk.Finding]) -> None:
    with st.container(border=True, gap="small"):
        for finding in findings:
            st.text(finding.claim)
            st.caption(plain(finding.evidence))


def _grid(seen: Seen) -> None:
    now, data = seen.selection, seen.massive
    values, n = data["times_median"].values, len(seen.tokens)
    st.subheader("Largest entry of each token, after each block", anchor=False)
    columns = around(now.token, n)
    if len(columns) < n:
        shown = st.segmented_control(
            "Columns", ["around the selected token", "whole text"], default="around the selected token",
            key="massive-columns",
        )  # fmt: skip
        if shown == "whole text":
            columns = whole(n)
            st.caption(
                f"{n:,} tokens in {len(columns)} columns; each shows its largest value. A click selects its token."
            )
        else:
            st.caption(f"Tokens {columns.edges[0]} to {columns.edges[-1] - 1} of {n:,}.")
    drawn = Grid(
        columns.largest(values), [str(i) for i in range(len(values))], columns.labels(seen.tokens), "after block", "token",
        "largest magnitude", "× median of the block",
        "Heat map over block and token of the token's largest magnitude, in multiples of the block's median.",
        scale="log", low=1.0, hover=columns.hovers(seen.tokens), cell=14,
    )  # fmt: skip
    grid(
        drawn, key="massive-grid", selected=(now.layer, columns.column_of(now.token)),
        on_cell=lambda row, column: select(layer=row, token=columns.token_at(column, values[row])),
    )  # fmt: skip
    left, right = st.columns([4, 1.3])
    left.caption(
        "Magnitude of the token's largest entry of the residual stream, over the median magnitude of the block, on a "
        "logarithmic scale. Massive: above 100, and above 1,000 × the median (Sun et al. 2024). Click a cell to select "
        "block and token."
    )
    with right:
        result = seen.results["massive-activations"]
        code = python_for("massive-activations", seen.selection, then='result["times_median"]')
        export("massive-map", code=code, result=result, figure=_map(seen, columns))


def _map(seen: Seen, columns: Columns) -> plots.Figure:
    data = seen.massive["times_median"]
    if not columns.whole:
        data = data.isel(token=slice(int(columns.edges[0]), int(columns.edges[-1])))
    else:
        data = data.isel(token=columns.edges[:-1]).copy(data=columns.largest(data.values))
    return plots.heatmap(
        data, title=seen.results["massive-activations"].findings[0].claim, unit="× median", scale="log",
        quantity="largest magnitude", caption=seen.about,
        alt="Heat map over block and token of the token's largest magnitude over the block's median.",
    )  # fmt: skip


def _cell(seen: Seen) -> None:
    now, data = seen.selection, seen.massive
    here = data.isel(layer=now.layer, token=now.token)
    median = float(data["median"].isel(layer=now.layer, text=0))
    table = pd.DataFrame(
        {
            "dimension": here["dim"].values.astype(int),
            "value (activation)": here["value"].values.astype(float),
            "magnitude / median": np.abs(here["value"].values.astype(float)) / max(median, 1e-30),
        }
    )
    st.text(
        f"After block {now.layer}, token {now.token} {plots.visible(seen.tokens[now.token])} ({here['role'].item()}): its "
        f"largest entries. The block's median magnitude is {median:.4g}."
    )
    left, right = st.columns([4, 1.3])
    left.dataframe(table, hide_index=True, width="stretch", column_config={
        "value (activation)": st.column_config.NumberColumn(format="%.2f"),
        "magnitude / median": st.column_config.NumberColumn(format="%.1f"),
    })  # fmt: skip
    with right:
        then = f'result["value"].isel(layer={now.layer}, token={now.token}), result["dim"].isel(layer={now.layer}, token={now.token})'
        export("massive-cell", code=python_for("massive-activations", now, then=then), table=table)


def _three_d(seen: Seen) -> None:
    now = seen.selection
    if not st.toggle(f"Show every token's entries after block {now.layer} (one pass)", key="massive-3d"):
        st.caption("Magnitude over token × dimension, as in figure 1 of Sun et al. 2024. Turn it on to read the block.")
        return

    def do(tell: Any) -> pk.ActivationCache:
        tell(pk.Step("reading", 0, 0, ""))
        return pk.cache(opened(now.model), now.text, ("resid_post", now.layer))

    key = key_of("resid_post", now.model, now.text, now.layer)
    cache = computed("massive-3d", f"Block {now.layer}", key, do)
    if cache is None:
        return
    figure = landscape_of(cache["resid_post", now.layer], now.token, now.layer, seen.about)
    code = "\n".join(
        [
            "import probekit as pk", "", f"text = {now.text!r}",
            f"cache = pk.cache({now.model!r}, text, ('resid_post', {now.layer}))",
            f"abs(cache['resid_post', {now.layer}])  # token x d_model",
        ]
    )  # fmt: skip
    draw(figure, "massive-landscape", code)


def landscape_of(values: Any, token: int, layer: int, about: str) -> plots.Figure:
    """The bars of one block: tokens around the selected one and the first, dimensions with the largest entries.

    Args:
        values: the residual stream; axes token, d_model.
        token: the selected token.
        layer: the block.
        about: model and text.
    """
    magnitude = abs(values)
    n, width = magnitude.sizes["token"], magnitude.sizes["d_model"]
    columns = around(token, n, MOST_TOKENS)
    places = np.arange(columns.edges[0], columns.edges[-1])
    if places[0] > 0:  # the first token carries most of them; without it the scale would mislead
        places = np.concatenate([[0], places[1:]])
    dims = np.sort(np.argsort(-magnitude.max("token").values, kind="stable")[:MOST_DIMS])
    shown = magnitude.isel(token=places, d_model=dims).assign_coords(d_model=dims).rename("magnitude")
    peak = np.unravel_index(int(shown.values.argmax()), shown.shape)
    strings = [str(s) for s in shown["token_str"].values]
    left_out = (
        "" if len(places) == n else f" Tokens: the first and {len(places) - 1} around the selected one, of {n:,}."
    )
    return plots.landscape(
        shown, unit="activation", labels=[plots.token_label(s, int(p)) for s, p in zip(strings, places, strict=True)],
        marked=int(np.flatnonzero(places == token)[0]),
        title=f"After block {layer}, the largest magnitude is {_number(float(shown.values[peak]))}, in dimension "
        f"{int(dims[peak[1]])} of token {int(places[peak[0]])}; the median is {_number(float(np.median(magnitude.values)))}",
        caption=f"{about} The {len(dims)} of {width} dimensions with the largest entries.{left_out} Drag to turn, scroll to "
        "zoom. Colours are logarithmic, heights are not.",
        alt=f"Bars over token and dimension of the residual stream's magnitude after block {layer}.",
    )  # fmt: skip


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _intervention(seen: Seen) -> None:
    now = seen.selection
    others = [p.text for p in PREPARED.values() if p.text != now.text]
    st.caption(
        "Every massive entry after one block is set to zero, or to its mean over the other prepared texts, and the pass "
        "goes on; two controls do the same to as many ordinary entries. Five passes over this text and "
        f"{len(others)} prepared ones, which supply the means and the intervals."
    )
    left, right = st.columns([5, 2], vertical_alignment="bottom")
    where = left.radio(
        "Where", ["the first block after which half of the texts hold massive entries", f"after block {now.layer}, the selected one"],
        key="massive-where", horizontal=True,
    )  # fmt: skip
    block = -1 if where and where.startswith("the first") else now.layer
    texts = [now.text, *others]
    key = key_of("massive intervention", now.model, texts, block)
    params = {"intervene": True, "at_block": block}

    def do(tell: Any) -> Any:
        return pk.run("massive-activations", opened(now.model), texts, progress=tell, **params)

    if right.button("Set to zero, and to their mean", type="primary", key="massive-run", width="stretch"):
        start("massive-intervene", "Setting massive entries", key, do)
        st.session_state["massive-ran"] = key
    result = awaited("massive-intervene", key)
    if result is not None:
        _cost(seen, result, texts, params)


def _cost(seen: Seen, result: pk.Result, texts: list[str], params: dict[str, Any]) -> None:
    _said([f for f in result.findings if "case" in f.where or list(f.where) == ["block"]])
    code = "\n".join(
        [
            "import probekit as pk", "", f"model = pk.open_model({seen.selection.model!r})", f"texts = {texts!r}",
            f"result = pk.run('massive-activations', model, texts, intervene=True, at_block={params['at_block']})",
            "result['loss_nats'], result['perplexity']",
        ]
    )  # fmt: skip
    table = losses_by_case(result)
    st.text("In the text above (-ln p of each next token, mean over its tokens):")
    st.dataframe(table.style.format(precision=4), hide_index=True, width="stretch")
    export("massive-losses", code=code, result=result, table=table)
    figure = result.figures().get("removal")
    if figure is not None:
        draw(figure, "massive-removal", code, result)


def losses_by_case(result: pk.Result, text: int = 0) -> pd.DataFrame:
    """Mean loss of one text in every case, and how it differs from the text as it is.

    Args:
        result: of massive-activations with interventions.
        text: index of the text.
    """
    data = result.dataset.isel(token=result["text"].values == text)
    loss, pos = data["loss_nats"], data["pos"].values
    plain, rows = loss.sel(case="as it is").values, []
    for case in map(str, data["case"].values):
        mean = float(np.nanmean(loss.sel(case=case).values))
        change = stats.token_mean(loss.sel(case=case).values - plain, np.zeros(len(pos), dtype=int), pos)
        ends = "" if case == "as it is" or change.ci95 is None else "{:.3f} to {:.3f}".format(*change.ci95)
        rows.append((_CASES.get(case, case), mean, float(np.exp(mean)), change.value, ends))
    names = [
        "case",
        "loss (nats per token)",
        "perplexity",
        "change (nats per token)",
        "95 % interval, blocks of 32 tokens",
    ]
    return pd.DataFrame(rows, columns=names)
