"""A form for the parameters of an analysis whose defaults are quick to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import streamlit as st

import probekit as pk
from probekit_dashboard.views.phenomenon import widget


def form(name: str, quick: Mapping[str, Any], key: str, label: str) -> tuple[dict[str, Any], bool]:
    """Widgets for every parameter, and a button.

    Args:
        name: the analysis.
        quick: defaults in the place of its own, by parameter.
        key: of the form.
        label: of the button.

    Returns:
        The values that differ from the analysis' own defaults, and whether the button was pressed.
    """
    specs = pk.get_analysis(name).Params.specs()
    with st.form(key, border=False):
        with st.expander("Parameters", icon=":material/tune:"):
            columns, values = st.columns(3), {}
        for i, spec in enumerate(specs.values()):
            with columns[i % 3]:
                shown = replace(spec, default=quick[spec.name]) if spec.name in quick else spec
                values[spec.name] = widget(shown, f"{key}-{spec.name}")
        go = st.form_submit_button(label, type="primary")
    return {k: v for k, v in values.items() if v != specs[k].default}, go
