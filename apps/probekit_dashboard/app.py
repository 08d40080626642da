"""The dashboard's entry: pages, sidebar, spine. Start it with `probekit app`."""

from __future__ import annotations

import streamlit as st

from probekit_dashboard import frame, views
from probekit_dashboard.look import plain
from probekit_dashboard.session import selection, write_url


def main() -> None:
    """One run of the script: the frame, then the page."""
    st.set_page_config(page_title="probekit", page_icon="🔬", layout="wide")
    st.markdown(
        "<style>.block-container{padding-top:3.4rem;padding-bottom:2rem}[data-testid=stStatusWidget]{display:none}</style>",
        unsafe_allow_html=True,
    )  # a constant: no text of a user or model
    selection()
    sections = views.navigation()
    page = st.navigation(sections, expanded=len(views.OWN))
    wanted = st.session_state.pop("go", None)
    if wanted is not None:
        st.switch_page(sections["Explore"][views.place_of(wanted)])
    with st.sidebar:
        frame.model_picker()
        frame.text_picker()
    write_url()
    notice = st.session_state.pop("notice", "")
    if notice:
        st.warning(plain(notice), icon=":material/link_off:")
    seen = frame.look()
    if seen is not None:
        frame.show_spine(seen)
    st.session_state["seen"] = seen
    page.run()


main()
