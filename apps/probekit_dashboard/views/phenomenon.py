"""The page of any analysis: its question, its parameters as widgets, its findings and figures. Made from the registry."""

from __future__ import annotations

from typing import Any

import streamlit as st

import probekit as pk
from probekit import plots
from probekit_dashboard import look
from probekit_dashboard.components import spine
from probekit_dashboard.export import export, python_for
from probekit_dashboard.frame import Seen
from probekit_dashboard.look import plain
from probekit_dashboard.session import awaited, key_of, opened, select, selection, start


def body(name: str, seen: Seen | None) -> None:
    """Everything about one analysis."""
    analysis = pk.get_analysis(name)
    st.header(analysis.title, anchor=False)
    st.text(analysis.summary())
    with st.expander("Method, null, known failure modes", icon=":material/menu_book:"):
        for heading in ("Question", "Method", "Null", "Known failure modes", "References"):
            if analysis.section(heading):
                st.markdown(f"**{heading}**")
                st.text(analysis.section(heading))
    if analysis.roles:
        st.info(
            f"This analysis compares models ({plain(', '.join(analysis.roles))}). Name the others below.",
            icon=":material/compare:",
        )
    with st.form(f"form-{name}", border=True):
        values, texts, others = _form(analysis)
        go = st.form_submit_button("Run", type="primary")
    now = selection()
    params = {k: v for k, v in values.items() if v != analysis.Params.specs()[k].default}
    given: Any = texts if analysis.reads_texts else None
    key = key_of(name, now.model, given, sorted(values.items()), others)
    if analysis.reads_texts and not (isinstance(given, list) and given):
        st.caption("Give at least one text.")
        return
    if go:
        start(f"page-{name}", analysis.title, key, _work(name, now.model, given, params, others))
        st.session_state[f"ran-{name}"] = key
    result = awaited(f"page-{name}", st.session_state.get(f"ran-{name}", ""))
    if result is None:
        if not go and st.session_state.get(f"ran-{name}") is None:
            st.caption(plain(_cost(name, now.model, given, params)) or "Press Run.")
        return
    code = python_for(name, now, params)
    show(result, f"page-{name}", code)


def _work(name: str, spec: str, texts: Any, params: dict[str, Any], others: dict[str, str]) -> Any:
    def do(tell: Any) -> pk.Result:
        result = pk.run(name, opened(spec), texts, progress=tell, models=others or None, **params)
        assert isinstance(result, pk.Result)
        return result

    return do


def _cost(name: str, spec: str, texts: Any, params: dict[str, Any]) -> str:
    try:
        plans = pk.plan(name, opened(spec), texts, **params)
    except pk.ProbekitError as error:
        return str(error)
    if not plans:
        return ""
    work = sum(p.gflop for p in plans) * max(p.passes for p in plans)
    memory = max(p.peak_bytes for p in plans) / 2**20
    passes = plans[0].passes
    return (
        f"About {passes:,} {'pass' if passes == 1 else 'passes'}, {work:,.0f} GFLOP, {memory:,.0f} MiB above the model."
    )


def _form(analysis: Any) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    name, now = analysis.name, selection()
    texts: list[str] = []
    if analysis.reads_texts:
        label = (
            "Texts, one after another; a line with --- parts them" if not analysis.writes else "Prompts, parted by ---"
        )
        joined = st.text_area(label, now.text, key=f"{name}-texts-{hash(now.text)}", height=120)
        texts = [t.strip("\n") for t in joined.split("\n---\n") if t.strip()]
    others = {role: st.text_input(f"Model for the role {role!r}", key=f"{name}-role-{role}") for role in analysis.roles}
    values: dict[str, Any] = {}
    columns = st.columns(3)
    for i, spec in enumerate(analysis.Params.specs().values()):
        with columns[i % 3]:
            values[spec.name] = widget(spec, f"{name}-{spec.name}")
    return values, texts, {role: m for role, m in others.items() if m}


def widget(spec: Any, key: str) -> Any:
    """The input that fits one parameter."""
    label = spec.name.replace("_", " ") + (f" ({spec.unit})" if spec.unit not in ("", "1") else "")
    help_ = f"{spec.help}. {spec.bounds}".strip(". ") + "."
    if spec.choices:
        return st.selectbox(label, spec.choices, index=spec.choices.index(spec.default), key=key, help=help_)
    if spec.type is bool:
        return st.checkbox(label, spec.default, key=key, help=help_)
    if spec.type in (int, float):
        kind = spec.type
        return st.number_input(
            label, value=kind(spec.default), min_value=None if spec.low is None else kind(spec.low),
            max_value=None if spec.high is None else kind(spec.high), step=kind(1) if kind is int else None, key=key,
            help=help_, format="%d" if kind is int else "%g",
        )  # fmt: skip
    return st.text_input(label, str(spec.default), key=key, help=help_)


def show(result: pk.Result, key: str, code: str) -> None:
    """Findings and drawings of a result."""
    for finding in result.findings:
        with st.container(border=True):
            st.text(finding.claim)
            st.text(finding.evidence)
    for name, drawing in result.figures().items():
        draw(drawing, f"{key}-{name}", code, result)


def draw(drawing: plots.Drawing, key: str, code: str, result: pk.Result | None = None) -> None:
    """One figure or token strip with its caption, and what can be taken from it."""
    st.markdown("---")
    st.text(drawing.title)
    if isinstance(drawing, plots.Figure):
        shown = look.fitting(drawing)
        plot = shown.plot
        plot.update_layout(title=None, margin={"t": 30})
        st.plotly_chart(plot, theme=None, config=plots.PLOT_CONFIG, key=key, alt=drawing.alt)
    else:
        spine(drawing, key=key, selected=0, on_token=lambda i: select(token=int(i)), height=420)
    left, right = st.columns([4, 1.3])
    left.text(drawing.caption)
    with right:
        export(key, code=code, result=result, figure=drawing if isinstance(drawing, plots.Figure) else None)
