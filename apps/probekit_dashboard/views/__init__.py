"""The pages, in the order of the navigation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

import probekit as pk
from probekit_dashboard.frame import Seen

from . import compare, critical, forks, intervene, lens, massive, overview, phenomenon, runs, sinks, strange

OWN = (overview, lens, sinks, massive, forks, critical, strange, compare, intervene, runs)


def navigation() -> dict[str, list[Any]]:
    """Pages by section: those made for one question, and one for every registered analysis."""
    own = [st.Page(_needing(m), title=m.TITLE, icon=m.ICON, url_path=m.PATH, default=m is overview) for m in OWN]
    every = [
        st.Page(_analysis(name), title=pk.get_analysis(name).title, url_path=f"analysis-{name}")
        for name in pk.list_analyses()
    ]
    return {"Explore": own, "Every analysis": every}


def place_of(path: str) -> int:
    """Place of a page among those made for one question, by its path; the first stands at the root."""
    return [m.PATH for m in OWN].index(path)


def _needing(page: Any) -> Callable[[], None]:
    def body() -> None:
        seen: Seen | None = st.session_state.get("seen")
        if seen is None and getattr(page, "NEEDS_TEXT", True):
            return
        page.body(seen)

    body.__name__ = page.PATH.replace("-", "_")
    return body


def _analysis(name: str) -> Callable[[], None]:
    def body() -> None:
        phenomenon.body(name, st.session_state.get("seen"))

    body.__name__ = f"analysis_{name.replace('-', '_')}"
    return body
