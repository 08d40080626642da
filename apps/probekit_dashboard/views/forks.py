"""Forks: where the text could have gone on otherwise, and where the alternatives lead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

import probekit as pk
from probekit import plots, sampling
from probekit_dashboard.components import Grid, grid
from probekit_dashboard.export import export, python_for
from probekit_dashboard.frame import Seen, before
from probekit_dashboard.look import plain
from probekit_dashboard.quick import form
from probekit_dashboard.rollouts import (
    Found,
    Live,
    Option,
    Plan,
    chosen_at_first,
    line_start,
    options,
    outcomes_of,
    shares_drawn,
    tally,
    write,
)
from probekit_dashboard.session import awaited, kept, key_of, opened, select, start, works
from probekit_dashboard.views.phenomenon import draw, show
from probekit_dashboard.window import around

TITLE, ICON, PATH = "Forks", ":material/call_split:", "forks"
RANKS = 5  # alternatives of the map
WIDE = 20  # tokens of the map: so many leave room for words
QUICK = {"max_tokens": 32, "n": 8, "most": 16}  # parameters of forking paths
NEWEST = 12  # continuations that are listed
_READ = ("the last number", "the first line", "words", "a letter of choices", "a regular expression")


def body(seen: Seen) -> None:
    """Alternatives along the text, those of one place, and continuations from there."""
    _map(seen)
    place = _place(seen)
    if place == 0:
        st.info(
            "Nothing stands before the first token, so there is no distribution that it was drawn from. Select a later "
            "token, above or in the map.",
            icon=":material/touch_app:",
        )
        return
    some = options(seen.uncertainty, place)
    _alternatives(seen, place, some)
    st.subheader("Branch here", anchor=False)
    _branch(seen, place, some)
    st.subheader("Which outcomes lie ahead, token by token", anchor=False)
    _forking_paths(seen, place)


def _map(seen: Seen) -> None:
    """What could have stood at each token around the selected one; a click selects it."""
    st.subheader("What could have stood here", anchor=False)
    data, n = seen.uncertainty, len(seen.tokens)
    columns = around(seen.selection.token, n, WIDE)
    places = np.arange(columns.edges[0], columns.edges[-1])
    shown = plots.words_by_id(data["vocab_str"])
    ranks = min(RANKS, data.sizes["rank"])
    values, words = np.full((ranks, len(places)), np.nan), [""] * (ranks * len(places))
    for column, place in enumerate(places):
        if place == 0:
            continue
        row = data.isel(token=place - 1)
        for rank in range(ranks):
            values[ranks - 1 - rank, column] = float(np.exp(row["top_logprob"].values[rank]))
            words[(ranks - 1 - rank) * len(places) + column] = plots.visible(shown[int(row["top_id"].values[rank])])
    drawn = Grid(
        values, [str(r) for r in range(ranks, 0, -1)], columns.labels(seen.tokens), "alternative", "in place of", "probability",
        "1", "Heat map of the likeliest alternatives to each token, with their probabilities.", low=0.0, high=1.0,
        words=words, hover=columns.hovers(seen.tokens), cell=22,
    )  # fmt: skip
    chosen = _rank_of_own(seen, ranks)
    grid(
        drawn, key="forks-map", selected=(chosen, columns.column_of(seen.selection.token)),
        on_cell=lambda _, column: select(token=int(places[column])),
    )  # fmt: skip
    left, right = st.columns([4, 1.3])
    uncertain = np.argsort(-np.nan_to_num(before(data["entropy_nats"].values)), kind="stable")[:6]
    left.caption(
        "The likeliest tokens of the distribution that each token was drawn from, likeliest on top. Click one to select "
        f"its place. Most uncertain before the tokens {', '.join(str(int(i)) for i in np.sort(uncertain))}."
    )
    with right:
        code = python_for("token-uncertainty", seen.selection, then='result["top_id"], result["top_logprob"]')
        export("forks-map", code=code, result=seen.results["token-uncertainty"], figure=_timeline(seen, places))


def _rank_of_own(seen: Seen, ranks: int) -> int:
    """Row of the map in which the selected token stands; the lowest if it is not among the likeliest."""
    token = seen.selection.token
    rank = int(seen.uncertainty["target_rank"].values[token - 1]) if token else 0
    return max(0, ranks - 1 - rank)


def _timeline(seen: Seen, places: np.ndarray) -> plots.Figure:
    one = seen.uncertainty
    curves = {
        name: one[key].isel(token=places).copy(data=before(one[key].values)[places])
        for name, key in (("entropy before the token", "entropy_nats"), ("surprisal of the token", "surprisal_nats"))
    }
    return plots.lines(
        curves, title="Entropy before each token, and how surprising the token is", unit="nats", quantity="nats",
        caption=seen.about, alt="Two curves along the text: entropy before each token, and its surprisal.",
    )  # fmt: skip


def _place(seen: Seen) -> int:
    token, n = seen.selection.token, len(seen.tokens)
    where = st.segmented_control(
        "Branch", ["in place of the selected token", "after it"], default="in place of the selected token", key="forks-place",
        help="A continuation begins with a token at this place; everything before stays.",
    )  # fmt: skip
    return min(token + 1, n) if where == "after it" else token


def _alternatives(seen: Seen, place: int, some: list[Option]) -> None:
    entropy = float(seen.uncertainty["entropy_nats"].values[place - 1])
    text = "".join(seen.tokens[max(0, place - 12) : place])
    at = f"token {place}" if place < len(seen.tokens) else "the end of the text"
    st.text(f"At {at}, after …{plots.visible(text, keep_whitespace=True)!r}: entropy {entropy:.2f} nats.")
    table = pd.DataFrame(
        {
            "token": [plots.visible(o.shown) for o in some],
            "token id": [o.token for o in some],
            "probability": [o.probability for o in some],
            "": ["stands in the text" if o.own else "" for o in some],
        }
    )
    left, right = st.columns([4, 1.3])
    left.dataframe(
        table, hide_index=True, width="stretch", height=38 + 35 * min(len(some), 7),
        column_config={"probability": st.column_config.ProgressColumn(format="percent", min_value=0, max_value=1)},
    )  # fmt: skip
    with right:
        then = f'result["top_id"].isel(token={place - 1}), result["top_logprob"].isel(token={place - 1})'
        export("forks-place", code=python_for("token-uncertainty", seen.selection, then=then), table=table)


def _branch(seen: Seen, place: int, some: list[Option]) -> None:
    chosen = st.multiselect(
        "Alternatives", some, default=chosen_at_first(some), format_func=lambda o: o.label, key=f"forks-chosen-{key_of(seen.selection.model, seen.selection.text, place)}",
        help="What is put at this place. Chosen at first: what stands there, and what has a probability of 5 % or more.",
    )  # fmt: skip
    settings = _settings(seen, place)
    if settings is None:
        return
    per, how, outcome = settings
    if not chosen:
        st.info("Choose at least one alternative to write on from.", icon=":material/touch_app:")
        return
    ids = tuple(int(i) for i in seen.uncertainty["token_id"].values[:place])
    plan = Plan(ids, line_start(seen.tokens, place), tuple(o.token for o in chosen), per, how, outcome)
    key = key_of("rollouts", seen.selection.model, plan.key)
    live = _live(key)
    n_there = sum(min(per, len(live.found.of(o.token))) for o in chosen)
    work = works().get("forks")
    running = work is not None and work.running and work.key == key
    left, right = st.columns([4, 1.3], vertical_alignment="center")
    total = per * len(chosen)
    left.caption(
        f"{total} continuations of up to {how.max_tokens} tokens; {n_there} of them are there. They come a few at a time, "
        "and can be cancelled at any time; what was written stays."
    )
    if right.button("Write", type="primary", key="forks-run", width="stretch", disabled=running or n_there >= total):
        _begin(seen, plan, live, key)
        st.rerun()
    if running:
        _watch(seen, chosen, plan, key)
        return
    if work is not None and work.key == key and work.error:
        st.error(plain(work.error), icon=":material/error:")
    if st.session_state.pop("forks-cancelled", None) == key:
        st.info("Cancelled. What was written until then is below; Write goes on from there.", icon=":material/cancel:")
    if live.found.rows:
        _written(seen, chosen, plan, live.found)


def _settings(seen: Seen, place: int) -> tuple[int, pk.Sampling, Any] | None:
    """Number of samples, how to draw, and what to read; None where something is missing, which is then said."""
    line = "".join(seen.tokens[line_start(seen.tokens, place) : place])
    usual = 0 if any(c.isdigit() for c in line) else 1
    one, two, three, four, five = st.columns(5)
    per = one.number_input("Continuations of each", 1, 200, 8, key="forks-per")
    longest = two.number_input("Tokens at most", 1, 1000, 40, key="forks-tokens")
    temperature = three.number_input(
        "Temperature", 0.0, 5.0, 1.0, 0.1, key="forks-t", help="0: greedy; all samples are equal"
    )
    top_p = four.number_input(
        "Top-p", 0.01, 1.0, 1.0, 0.05, key="forks-p", help="Share of probability that draws come from"
    )
    seed = five.number_input("Seed", 0, 2**31 - 1, 0, key="forks-seed")
    left, right = st.columns([1, 2])
    read = left.selectbox(
        "An answer says", _READ, index=usual, key=f"forks-read-{usual}",
        help="What continuations are told apart by. Answers are read from the beginning of the line on.",
    )  # fmt: skip
    said = ""
    if read == "words":
        said = right.text_input("Words, separated by commas", "yes, no", key="forks-words")
    elif read == "a letter of choices":
        said = right.text_input("Letters", "ABCD", key="forks-letters")
    elif read == "a regular expression":
        said = right.text_input(
            "Regular expression; its first group is what the answer says", r"is (\w+)", key="forks-regex"
        )
    try:
        return int(per), pk.Sampling(int(longest), float(temperature), float(top_p), int(seed)), outcome_of(read, said)
    except pk.ProbekitError as error:
        st.error(plain(str(error)), icon=":material/error:")
        return None


def outcome_of(read: str, said: str) -> Any:
    """The rule by which answers are told apart.

    Args:
        read: one of the ways on the page.
        said: words, letters, or the expression.

    Raises:
        ProbekitError: the words, letters or expression do not do.
    """
    if read == "the last number":
        return sampling.LastNumber()
    if read == "the first line":
        return sampling.Pattern(r"(\S[^\n]*)")
    if read == "words":
        return sampling.Contains(tuple(w.strip() for w in said.split(",") if w.strip()))
    return sampling.Choice(said.strip()) if read == "a letter of choices" else sampling.Pattern(said)


def _live(key: str) -> Live:
    """What this session has of these continuations, or what any session has kept."""
    held: dict[str, Live] = st.session_state.setdefault("forks-live", {})
    if key not in held:
        held.clear()  # one at a time; the others are kept for all sessions
        held[key] = Live(kept().get(key))
    return held[key]


def _begin(seen: Seen, plan: Plan, live: Live, key: str) -> None:
    spec, store = seen.selection.model, kept()

    def do(tell: Any) -> Found:
        try:
            return write(opened(spec), plan, live, tell)
        finally:
            store.put(key, live.found)

    start("forks", "Continuations", key, do)


@st.fragment(run_every=0.7)
def _watch(seen: Seen, chosen: list[Option], plan: Plan, key: str) -> None:
    """Progress, Cancel, and what is there so far."""
    work = works().get("forks")
    if work is None or not work.running:
        st.rerun()
    left, right = st.columns([6, 1], vertical_alignment="center")
    left.progress(work.share or 0.0, text=plain(work.line))
    if right.button("Cancel", key="forks-cancel", width="stretch"):
        works().drop("forks")
        st.session_state["forks-cancelled"] = key
        st.rerun()
    found = _live(key).found
    if found.rows:
        _written(seen, chosen, plan, found, live=True)


def _written(seen: Seen, chosen: list[Option], plan: Plan, found: Found, *, live: bool = False) -> None:
    """Tallies, a figure, and the newest continuations."""
    table = tally(found, chosen)
    if not len(table):
        return
    outcomes = outcomes_of(found, [o.token for o in chosen])
    wide = table.pivot(
        index=["alternative", "token id", "probability", "of"], columns="outcome", values="share"
    ).fillna(0.0)
    names = [o for o in [*outcomes, "others"] if o in wide.columns]
    percent = st.column_config.ProgressColumn
    shown = wide[names].rename(columns={o: plots.visible(o, keep_whitespace=True)[:40] for o in names}).reset_index()
    st.dataframe(
        shown.sort_values("probability", ascending=False), hide_index=True, width="stretch",
        column_config={c: percent(format="percent", min_value=0, max_value=1) for c in shown.columns if c not in ("alternative", "token id", "of")},
    )  # fmt: skip
    code = code_for(seen.selection, plan)
    if not live:
        left, right = st.columns([4, 1.3], vertical_alignment="bottom")
        outcome = left.selectbox(
            "Outcome", outcomes, format_func=lambda o: plots.visible(o, keep_whitespace=True), key="forks-outcome"
        )
        with right:
            export("forks-tally", code=code, table=table)
        draw(shares_drawn(table, outcome or outcomes[0], seen.about), "forks-shares", code)
    tokens = {o.token: plots.visible(o.shown) for o in chosen}
    rows = [r for r in reversed(found.rows) if r.token in tokens]
    st.text(f"{'Newest' if live else 'All'} continuations ({len(rows)} written)")
    listed = pd.DataFrame(
        {
            "alternative": [tokens[r.token] for r in rows],
            "says": [plots.visible(r.outcome, keep_whitespace=True) for r in rows],
            "continuation": [plots.visible(r.text, keep_whitespace=True).replace("\n", "↵") for r in rows],
            "stopped": [_STOPPED[r.stopped] for r in rows],
            "log-probability (nats)": [round(r.logprob_nats, 2) for r in rows],
        }
    )
    st.dataframe(
        listed.head(NEWEST) if live else listed, hide_index=True, width="stretch",
        column_config={"continuation": st.column_config.TextColumn(width="large")},
    )  # fmt: skip
    if not live:
        export("forks-written", code=code, table=listed)


_STOPPED = {"end": "the model ended it", "answer": "the answer was there", "length": "token limit"}


def code_for(now: Any, plan: Plan) -> str:
    """The Python that writes the continuations of a plan."""
    how = plan.sampling
    return "\n".join(
        [
            "import probekit as pk", "", f"model = pk.open_model({now.model!r})",
            f"ids = model.tokenize([{now.text!r}]).texts[0].ids[:{len(plan.ids)}]",
            f"base = pk.Base(ids, n_prompt={plan.n_prompt})",
            f"forks = tuple(pk.Fork(0, len(ids), token) for token in {plan.tokens!r})",
            f"how = pk.Sampling(max_tokens={how.max_tokens}, temperature={how.temperature}, top_p={how.top_p}, seed={how.seed})",
            f"outcome = pk.sampling.{plan.outcome!r}",
            f"branches = pk.branch(model, pk.Branch((base,), forks, n={plan.per}, sampling=how, outcome=outcome))",
            "[(fork, branches.outcomes(fork)) for fork in forks]",
        ]
    )  # fmt: skip


def _forking_paths(seen: Seen, place: int) -> None:
    """The analysis forking-paths on the text before the place, as a prompt."""
    st.caption(
        "Forking paths takes the text before this place as a prompt, lets the model answer it greedily, and samples from "
        "every plausible token of the answer: a stream of outcomes over the text. It takes minutes rather than seconds."
    )
    params, go = form("forking-paths", QUICK, "forks-paths", f"Run forking paths from token {place} on")
    now = seen.selection
    key = key_of("forks paths", now.model, now.text, place, sorted(params.items()))

    def do(tell: Any) -> Any:
        model = opened(now.model)
        prompt = model.tokenize([now.text]).windows(place).select([0])
        return pk.run("forking-paths", model, prompt, progress=tell, **params)

    if go:
        start("forks-paths", "Forking paths", key, do)
        st.session_state["forks-paths-ran"] = key
    result = awaited("forks-paths", st.session_state.get("forks-paths-ran", ""))
    if result is not None:
        given = "".join(f", {k}={v!r}" for k, v in params.items())
        code = "\n".join(
            [
                "import probekit as pk", "", f"model = pk.open_model({now.model!r})",
                f"prompt = model.tokenize([{now.text!r}]).windows({place}).select([0])",
                f"result = pk.run('forking-paths', model, prompt{given})",
            ]
        )  # fmt: skip
        show(result, "forks-paths", code)
