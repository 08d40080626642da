"""Every view: its data, its figure, and the Python that makes both again."""

from __future__ import annotations

import html
import io
import json
from typing import Any

import streamlit as st

import probekit as pk
from probekit import plots

from .look import plain


def python_for(names: Any, selection: Any, params: dict[str, Any] | None = None, *, then: str = "") -> str:
    """The lines that reproduce a result in a notebook.

    Args:
        names: one analysis or several.
        selection: model and text.
        params: parameters of the analysis.
        then: lines that follow.
    """
    given = "".join(f", {k}={v!r}" for k, v in (params or {}).items())
    shown = repr(names) if isinstance(names, str) else repr(list(names))
    lines = ["import probekit as pk", "", f"model = pk.open_model({selection.model!r})", f"text = {selection.text!r}"]
    return "\n".join([*lines, f"result = pk.run({shown}, model, text{given})", *([then] if then else [])])


def table_of(result: pk.Result, variable: str) -> bytes:
    """One variable of a result as CSV: a row per number, with every coordinate."""
    return result[variable].to_dataframe(name=variable).to_csv().encode("utf-8", "surrogatepass")


def figure_page(figure: plots.Figure) -> bytes:
    """A figure as a page of its own that opens offline."""
    page = figure.plot.to_html(include_plotlyjs=True, full_html=True, config=plots.PLOT_CONFIG)
    caption = f"<p style='font:13px sans-serif;max-width:60em'>{html.escape(figure.caption)}</p></body>"
    return page.replace("</body>", caption).encode()


def export(
    key: str,
    *,
    code: str,
    result: pk.Result | None = None,
    figure: plots.Figure | None = None,
    table: Any = None,
) -> None:
    """A small menu: data, figure, Python.

    Args:
        key: that is in no other place of the page.
        code: the Python that reproduces the view.
        result: whose variables are offered as CSV, and whole as JSON.
        figure: is offered as a page and as Plotly JSON.
        table: a data frame that is offered as CSV.
    """
    with st.popover("Data and code", icon=":material/download:"):
        if table is not None:
            st.download_button(
                "This table (CSV)",
                lambda: table.to_csv().encode("utf-8", "surrogatepass"),
                f"{key}.csv",
                key=f"{key}-t",
            )
        if result is not None:
            variable = st.selectbox("Variable", list(map(str, result.dataset.data_vars)), key=f"{key}-v")
            attrs = result[variable].attrs
            st.caption(plain(f"{attrs.get('long_name', '')} ({attrs.get('units', '')})"))
            st.download_button(
                "Data (CSV)", lambda: table_of(result, variable), f"{result.name}-{variable}.csv", key=f"{key}-d"
            )
            st.download_button("Findings (JSON)", lambda: _findings(result), f"{result.name}.json", key=f"{key}-j")
        if figure is not None:
            st.download_button(
                "Figure (HTML, opens offline)", lambda: figure_page(figure), f"{key}.html", key=f"{key}-f"
            )
            st.download_button(
                "Figure (Plotly JSON)",
                lambda: str(figure.plot.to_json()).encode(),
                f"{key}-plotly.json",
                key=f"{key}-p",
            )
        st.code(code, language="python")


def _findings(result: pk.Result) -> bytes:
    out = io.StringIO()
    json.dump([f.as_dict() for f in result.findings], out, indent=1, default=str)
    return out.getvalue().encode()
