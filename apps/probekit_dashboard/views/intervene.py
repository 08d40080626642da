"""Intervene: change activations on the way, and see what the model says then."""

from __future__ import annotations

from typing import Any

import streamlit as st

from probekit import plots
from probekit_dashboard.export import export
from probekit_dashboard.frame import Seen
from probekit_dashboard.interventions import (
    ACTIONS,
    SITES,
    Action,
    Intervention,
    Outcome,
    change_drawn,
    code_for,
    losses_drawn,
    next_tokens,
    run,
)
from probekit_dashboard.look import plain
from probekit_dashboard.session import awaited, key_of, opened, start
from probekit_dashboard.views.phenomenon import draw
from probekit_dashboard.window import around

TITLE, ICON, PATH = "Intervene", ":material/build:", "intervene"
N_WRITTEN = 30


def body(seen: Seen) -> None:
    """A form for one change, the list of changes, and what they do together."""
    st.subheader("Add a change", anchor=False)
    _form(seen)
    st.subheader("Changes", anchor=False)
    some = _list(seen)
    if some:
        _run(seen, some)


def _held() -> list[Intervention]:
    return st.session_state.setdefault("intervene-held", [])


def _form(seen: Seen) -> None:
    now, info = seen.selection, seen.info
    actions = [*ACTIONS]
    action: Action = st.radio("What", actions, format_func=ACTIONS.__getitem__, key="intervene-action", horizontal=True)
    one, two, three = st.columns(3)
    site = "pattern"
    if action != "cut":
        sites = [*SITES]
        site = one.selectbox("Where", sites, index=2, format_func=SITES.__getitem__, key="intervene-site")
    layer = two.number_input(
        f"Block (0 to {info.n_layers - 1})", 0, info.n_layers - 1, now.layer, key=f"intervene-layer-{now.layer}"
    )
    head = None
    if site in ("z", "pattern"):
        head = int(
            three.number_input(
                f"Head (0 to {info.n_heads - 1})", 0, info.n_heads - 1, now.head, key=f"intervene-head-{now.head}"
            )
        )
    made = (
        _looking(seen, int(layer), int(head or 0))
        if action == "cut"
        else _changing(seen, action, str(site), int(layer), head)
    )
    st.text(made.words(seen.tokens))
    if st.button("Add", type="primary", key="intervene-add", icon=":material/add:"):
        problem = made.problem(info, len(seen.tokens))
        if problem:
            st.error(plain(problem), icon=":material/error:")
        elif made in _held():
            st.info("This change is in the list already.", icon=":material/info:")
        else:
            _held().append(made)


def _changing(seen: Seen, action: Action, site: str, layer: int, head: int | None) -> Intervention:
    """A change of activations, as the form says."""
    token = seen.selection.token
    places = {"the selected token": (token,), "the first token": (0,), "all tokens": None}
    at = st.segmented_control("At", [*places], default="the selected token", key="intervene-at") or "the selected token"
    positions, more = places[at], {}
    if action == "scale":
        more["factor"] = st.number_input("Factor (1 changes nothing)", -100.0, 100.0, 2.0, 0.5, key="intervene-factor")
    elif action == "add":
        left, middle, right = st.columns([3, 3, 1])
        more["toward"] = _lines(
            left.text_area(
                "Towards these texts, one a line", "I love this\nWhat a wonderful day", key="intervene-toward"
            )
        )
        more["away"] = _lines(
            middle.text_area("Away from these", "I hate this\nWhat a terrible day", key="intervene-away")
        )
        more["factor"] = right.number_input("Strength", -1000.0, 1000.0, 2.0, 0.5, key="intervene-strength")
        st.caption(
            "The direction is the mean activation of the last token over the first texts, minus that over the second, at this point."
        )
    elif action == "replace":
        left, right = st.columns([3, 1])
        more["other"] = left.text_input("The other text", "The capital of Italy is", key="intervene-other")
        which = right.selectbox(
            "Its token", ["its last token", "the same position"], key="intervene-which", disabled=positions is None
        )
        if which == "the same position" and positions:
            more["other_position"] = positions[0]
    return Intervention(action, site, layer, head if site == "z" else None, positions, **more)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.split("\n") if line.strip())


def _looking(seen: Seen, layer: int, head: int) -> Intervention:
    """Attention that is cut, as the form says."""
    token, n = seen.selection.token, len(seen.tokens)
    which = st.segmented_control(
        "Which token is not looked at", ["the selected token", "the first token"], default="the selected token", key="intervene-key"
    )  # fmt: skip
    key = 0 if which == "the first token" else token
    who = st.segmented_control(
        "By whom", ["all later tokens", "the last token"], default="all later tokens", key="intervene-query",
        help="The token itself still sees itself. Tokens that the model writes after the text look as usual.",
    )  # fmt: skip
    queries = tuple(range(key + 1, n)) if who != "the last token" else tuple(q for q in (n - 1,) if q > key)
    return Intervention("cut", "pattern", layer, head, queries, keys=(key,))


def _list(seen: Seen) -> list[Intervention]:
    """The changes that are made, each with a button that removes it."""
    held = _held()
    if not held:
        st.info(
            "Nothing is changed yet. Choose above what to change and where, and press Add; several changes act together. "
            "A first try: set the MLP's output at the first token of an early block to zero.",
            icon=":material/touch_app:",
        )
        return []
    some = []
    for i, one in enumerate(held):
        left, right = st.columns([8, 1], vertical_alignment="center")
        problem = one.problem(seen.info, len(seen.tokens))
        left.text(f"{i + 1}. {one.words(seen.tokens)}")
        if problem:
            left.warning(f"Left out in this text and model. {plain(problem)}", icon=":material/warning:")
        else:
            some.append(one)
        right.button("Remove", key=f"intervene-remove-{i}", on_click=_remove, args=(one,), width="stretch")
    return some


def _remove(one: Intervention) -> None:
    if one in _held():
        _held().remove(one)


def _run(seen: Seen, some: list[Intervention]) -> None:
    now, n = seen.selection, len(seen.tokens)
    left, right = st.columns([4, 1.3], vertical_alignment="bottom")
    read = left.segmented_control(
        "Compare the distribution after", ["the last token", "the selected token"], default="the last token", key="intervene-read",
        help="A change acts on its own token and on later ones; earlier ones cannot see it.",
    )  # fmt: skip
    position = now.token if read == "the selected token" else n - 1
    key = key_of("intervene", now.model, now.text, some, position)

    def do(tell: Any) -> Outcome:
        return run(opened(now.model), now.text, some, position=position, n_tokens=N_WRITTEN, tell=tell)

    if right.button("Run", type="primary", key="intervene-run", width="stretch"):
        start("intervene", "Intervening", key, do)
    found = awaited("intervene", key)
    if found is None:
        st.caption(f"Two passes over the text, and {N_WRITTEN} tokens written on twice. Press Run.")
        return
    code = code_for(now.model, now.text, some, position=position, n_tokens=N_WRITTEN)
    _shown(seen, found, code)


def _shown(seen: Seen, found: Outcome, code: str) -> None:
    effect = found.effect
    before, after = effect.loss_nats
    one, two, three = st.columns(3)
    one.metric(
        "KL (before ‖ after), nats",
        f"{effect.kl_nats:.4g}",
        help="Of the next-token distribution, over the whole vocabulary.",
    )
    two.metric("Loss of the text before, nats per token", f"{before:.3f}")
    three.metric("Loss after", f"{after:.3f}", f"{after - before:+.3f}",
                 delta_color="inverse" if abs(after - before) >= 5e-4 else "off")  # fmt: skip
    st.text(f"What follows token {effect.position} ({plots.visible(seen.tokens[effect.position])}):")
    table = next_tokens(effect)
    bar = st.column_config.ProgressColumn
    left, right = st.columns([4, 1.3])
    left.dataframe(
        table, hide_index=True, width="stretch",
        column_config={
            "before": bar(format="percent", min_value=0, max_value=1), "after": bar(format="percent", min_value=0, max_value=1),
            "change": st.column_config.NumberColumn(format="%.4f"),
        },
    )  # fmt: skip
    with right:
        export("intervene-next", code=code, table=table)
    st.text("What the model writes on (greedy):")
    left, right = st.columns(2)
    for column, name, text in ((left, "As it is", found.before), (right, "With the changes", found.after)):
        with column.container(border=True):
            st.caption(name)
            st.text(plots.visible(text, keep_whitespace=True) or "(nothing: the model ends here)")
    columns = around(seen.selection.token, len(seen.tokens))
    draw(change_drawn(effect, seen.about), "intervene-change", code)
    places = slice(int(columns.edges[0]), int(columns.edges[-1]))
    draw(losses_drawn(effect, places, seen.about), "intervene-losses", code)
