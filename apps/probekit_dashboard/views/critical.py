"""Critical tokens: after which token of a wrong answer no continuation is right any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

import probekit as pk
from probekit import plots
from probekit_dashboard.export import export
from probekit_dashboard.frame import Seen
from probekit_dashboard.look import plain
from probekit_dashboard.quick import form
from probekit_dashboard.session import awaited, key_of, opened, select, selection, start
from probekit_dashboard.views.phenomenon import show

TITLE, ICON, PATH, NEEDS_TEXT = "Critical tokens", ":material/dangerous:", "critical", False
QUICK = {"tries": 16, "n": 16, "max_tokens": 64, "controls": 1}
OWN = "a question of your own"
QUESTIONS = {
    "Pages": ("Lea reads 10 pages a day. How many pages does she read in 3 days?", "30"),
    "Eggs": ("A box holds 6 eggs. How many eggs are in 2 boxes?", "12"),
    "Six times seven": ("What is 6 times 7?", "42"),
}  # fmt: skip


def body(seen: Seen | None) -> None:
    """A question with its right answer, and where a wrong answer to it was lost."""
    st.text(
        "A wrong answer is often still open for a while: written on from its first tokens, the model sometimes comes to "
        "the right result. The critical token is the first one after which it never does (Lin et al. 2024, arXiv "
        "2411.19943). Ask a question that the model answers rightly now and then; a wrong answer is sampled, written on "
        "from each of its tokens, and the critical token is replaced to see whether that helps."
    )
    now = selection()
    which = st.segmented_control("Question", [*QUESTIONS, OWN], default=next(iter(QUESTIONS)), key="critical-which")
    asked, right = QUESTIONS.get(which or "", ("", ""))
    question = st.text_area("Question", asked, key=f"critical-question-{which}", height=90)
    left, middle = st.columns([1, 2], vertical_alignment="bottom")
    answer = left.text_input("What a right answer says", right, key=f"critical-answer-{which}", placeholder="18")
    chat = middle.checkbox("Ask it as a turn of a chat, in the model's own template", True, key="critical-chat")
    params, go = form("critical-tokens", QUICK, "critical-form", "Find the critical token")
    st.caption(
        "The parameters are small at first, so that it takes a minute or two. For firm conclusions take n = 64 and many "
        "questions (probekit run critical-tokens)."
    )
    record = {"text": question, "answer": answer}
    key = key_of("critical", now.model, record, chat, sorted(params.items()))
    if go:
        problem = _problem(question, answer)
        if problem:
            st.error(plain(problem), icon=":material/error:")
            return

        def do(tell: Any) -> Any:
            return pk.run("critical-tokens", opened(now.model), [record], chat=chat, progress=tell, **params)

        start("critical", "Critical tokens", key, do)
        st.session_state["critical-ran"] = key, record, chat, params
    ran = st.session_state.get("critical-ran")
    if ran is None:
        st.info(
            "Press “Find the critical token”, with the prepared question or one of your own.",
            icon=":material/touch_app:",
        )
        return
    key, record, chat, params = ran
    result = awaited("critical", key)
    if result is not None:
        _shown(result, record, chat, params)


def _problem(question: str, answer: str) -> str:
    if not question.strip():
        return "There is no question. Type one, or choose a prepared one."
    if not answer.strip():
        return "Say what a right answer is, such as 14: without it, right and wrong cannot be told apart."
    return ""


def _shown(result: pk.Result, record: dict[str, str], chat: bool, params: dict[str, Any]) -> None:
    given = "".join(f", {k}={v!r}" for k, v in params.items())
    code = "\n".join(
        [
            "import probekit as pk", "", f"model = pk.open_model({selection().model!r})",
            f"result = pk.run('critical-tokens', model, [{record!r}], chat={chat}{given})", "result.findings",
        ]
    )  # fmt: skip
    table = answer_table(result)
    if len(table):
        st.subheader("The wrong answer, token by token", anchor=False)
        st.caption(
            "Prefixes are measured from the end backward, until one from which the model still comes to the right result."
        )
        left, right = st.columns([4, 1.3])
        left.dataframe(
            table, hide_index=True, width="stretch", height=300,
            column_config={"right continuations": st.column_config.ProgressColumn(format="percent", min_value=0, max_value=1)},
        )  # fmt: skip
        with right:
            export("critical-answer", code=code, table=table)
            st.button(
                "Branch there", icon=":material/call_split:", key="critical-forks", on_click=_to_forks, args=(result, record["text"]),
                help="Opens question and answer as plain text on the page Forks, with the critical token selected. Without the "
                "chat template, so that probabilities differ somewhat.", width="stretch",
            )  # fmt: skip
    show(result, "critical", code)


def answer_table(result: pk.Result) -> pd.DataFrame:
    """The tokens of the wrong answer whose prefixes were measured, with the share of right continuations from there."""
    place = np.arange(result.dataset.sizes["token"])
    data = result.dataset.isel(token=result["how"].values > 0)
    place, how = place[result["how"].values > 0], data["how"].values
    return pd.DataFrame(
        {
            "place": place,
            "token": [plots.visible(str(s)) for s in data["token_str"].values],
            "right continuations": data["success_share"].values.astype(float),
            "of": data["drawn"].values.astype(int),
            "measured": [_HOW[int(h)] for h in how],
            "": ["critical" if c else "" for c in data["critical"].values],
        }
    )


_HOW = ("no", "continued", "as a later one", "the answer is finished")


def _to_forks(result: pk.Result, question: str) -> None:
    """Make question and answer the text, and select the critical token."""
    text, offset = as_text(result, question)
    strings = opened(selection().model).tokenize([text]).texts[0].strings
    select(text=text, prepared="", token=token_at(strings, offset))
    st.session_state["go"] = "forks"


def as_text(result: pk.Result, question: str) -> tuple[str, int]:
    """Question and wrong answer as one plain text, and where in it the critical token begins.

    Args:
        result: of critical-tokens on one question.
        question: as it was asked.
    """
    strings = [str(s) for s in result["token_str"].values]
    while strings and strings[-1].startswith("<|"):  # the model's end token is no text
        strings.pop()
    places = np.flatnonzero(result["critical"].values)
    before = "".join(strings[: int(places[0])] if len(places) else strings)
    return f"{question}\n{''.join(strings)}", len(question) + 1 + len(before)


def token_at(strings: Sequence[str], offset: int) -> int:
    """The token that a character belongs to; the last one if the text is shorter.

    Args:
        strings: what the tokens show as.
        offset: of the character; the blank before a word belongs to its token.
    """
    ends = np.cumsum([len(s) for s in strings])
    return int(min(np.searchsorted(ends, offset, side="right"), len(strings) - 1))
