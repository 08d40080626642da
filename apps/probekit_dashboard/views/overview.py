"""What was found in this text, in words; each finding leads to its view."""

from __future__ import annotations

from typing import Any

import streamlit as st

import probekit as pk
from probekit_dashboard.export import export, python_for
from probekit_dashboard.frame import Seen
from probekit_dashboard.session import CORE, select

TITLE, ICON, PATH = "Overview", ":material/summarize:", "overview"
_PAGE = {
    "token-uncertainty": "forks", "logit-lens": "lens", "attention-sinks": "sinks", "massive-activations": "massive",
}  # fmt: skip


def body(seen: Seen) -> None:
    """Findings by analysis."""
    for name, result in seen.results.items():
        st.subheader(result.analysis.title, anchor=name, help=result.analysis.summary())
        for i, finding in enumerate(result.findings):
            _finding(seen, finding, f"{name}-{i}")
    first = next(iter(seen.results.values()))
    export("overview", code=python_for(CORE, seen.selection, then="result.findings"), result=first)


def _finding(seen: Seen, finding: pk.Finding, key: str) -> None:
    with st.container(border=True):
        left, right = st.columns([9, 1], vertical_alignment="center")
        left.text(finding.claim)
        left.caption(_safe(finding.evidence))
        place = _place(seen, finding.where)
        if right.button("Show", key=f"show-{key}", help="Select this place and open its page", width="stretch"):
            select(**place)
            st.session_state["go"] = _PAGE[finding.analysis]
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


def _safe(text: str) -> str:
    """Plain text as Markdown that shows it as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-.!|<>~$:" else c for c in text)
