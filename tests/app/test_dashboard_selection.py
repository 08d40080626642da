"""The selection in the link: what is written is read again, and what cannot be read is said."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs streamlit: pip install 'probekit[app]'")

from probekit_dashboard.prepared import PREPARED
from probekit_dashboard.selection import LONGEST_LINK, Selection, digest, from_query

HOSTILE = '<img src=x onerror=alert(1)> ‮ \x00 \ud800 "quoted" 🔬'


@pytest.mark.parametrize("text", ["A short text.", HOSTILE, "line\nline\t", "ß" * 3000])
def test_an_own_text_comes_back_from_its_link(text: str) -> None:
    made = Selection("smollm2-135m-instruct", text, token=2, layer=7, head=3, by="entropy before")
    found, wrong = from_query(made.to_query(), "other")
    assert (found, wrong) == (made, "") and made.link_holds_text


@pytest.mark.parametrize("name", PREPARED)
def test_a_prepared_text_is_named_in_the_link_and_opens_where_it_shows(name: str) -> None:
    found, wrong = from_query({"text": name}, "a model")
    assert (found.text, found.token, found.model, wrong) == (PREPARED[name].text, PREPARED[name].token, "a model", "")
    assert found.to_query()["text"] == name and "own" not in found.to_query()


def test_a_text_too_long_for_a_link_reopens_while_it_is_held_and_is_missed_in_words_after_that() -> None:
    draw = random.Random(0)
    text = "".join(chr(draw.randrange(33, 1000)) for _ in range(8000))
    query = Selection("m", text, token=5).to_query()
    assert sum(map(len, query.values())) < LONGEST_LINK and "own" not in query
    store = {digest(text): text}
    found, wrong = from_query(query, "m", store.get)
    assert (found.text, found.token, wrong) == (text, 5, "") and not found.link_holds_text
    found, wrong = from_query(query, "m")
    assert found.prepared == next(iter(PREPARED)) and "paste it again" in wrong
    assert digest(text) != digest(text + " ")


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"own": "AAAA"}, "its text is damaged"),
        ({"own": "ü"}, "its text is damaged"),
        ({"text": "none-such"}, "no prepared text 'none-such'"),
        ({"token": "five"}, "token='five' is no number"),
        ({"layer": "1e3"}, "layer='1e3' is no number"),
    ],
)
def test_what_a_link_says_wrongly_is_named_and_the_rest_opens(query: dict[str, str], said: str) -> None:
    found, wrong = from_query(query, "m")
    assert said in wrong and found.text == next(iter(PREPARED.values())).text


def test_a_selection_is_moved_into_what_there_is() -> None:
    far = Selection("m", "text", token=90, layer=-1, head=12)
    assert (far.within(4, 30, 9).token, far.within(4, 30, 9).layer, far.within(4, 30, 9).head) == (3, 29, 8)
    assert Selection("m", "text", token=-5, layer=-40).within(4, 30, 9).layer == 0
