"""What was found in this text, in words; each finding leads to its view."""

from __future__ import annotations

from typing import Any

import streamlit as st

import probekit as pk
from probekit_dashboard.export import export, python_for
from probekit_dashboard.frame import Seen
from probekit_dashboard.look import plain
from probekit_dashboard.session import CORE, select

TITLE, ICON, PATH = "Overview", ":material/summarize:", "overview"
_PAGE = {
    "token-uncertainty": "forks", "logit-lens": "lens", "attention-sinks": "sinks", "massive-activations": "massive",
}  # fmt: skip


def body(seen: Seen) -> None:
    """Findings by analysis."""
    for name, result in seen.results.items():
        with st.container(border=True, gap="small"):
            _findings(seen, name, result)
    first = next(iter(seen.results.values()))
    export("overview", code=python_for(CORE, seen.selection, then="result.findings"), result=first)


def _findings(seen: Seen, name: str, result: pk.Result) -> None:
    left, right = st.columns([5, 1.3], vertical_alignment="center")
    left.subheader(result.analysis.title, anchor=name, help=result.analysis.summary())
    if right.button("Open", key=f"open-{name}", help="Open the page of these findings", width="stretch"):
        _go(name, {})
    for i, finding in enumerate(result.findings):
        left, right = st.columns([16, 1], vertical_alignment="center")
        with left.container(gap=None):
            st.text(finding.claim)
            st.caption(plain(finding.evidence))
        place = _place(seen, finding.where)
        help_ = f"Open its page{' at ' if place else ''}{_words(place)}"
        if right.button("Show", key=f"show-{name}-{i}", type="tertiary", help=help_, width="stretch"):
            _go(name, place)


def _words(place: dict[str, Any]) -> str:
    """A place that can be selected, in words."""
    return ", ".join(f"{'block' if k == 'layer' else k} {v}" for k, v in place.items())


def _go(name: str, place: dict[str, Any]) -> None:
    select(**place)
    st.session_state["go"] = _PAGE[name]
    st.rerun()


def _place(seen: Seen, where: dict[str, Any]) -> dict[str, Any]:
    """The part of a finding's place that can be selected."""
    found: dict[str, Any] = {}
    if isinstance(where.get("pos"), int) and where["pos"] < len(seen.tokens):
        found["token"] = where["pos"]
    for name in ("layer", "head"):
        if isinstance(where.get(name), int):
            found[name] = where[name]
    return found
