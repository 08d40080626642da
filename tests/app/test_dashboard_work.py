"""Work in the background: progress, cancelling, errors in words, outcomes; and the bounded store of results."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from probekit_dashboard.session import Kept, key_of
from probekit_dashboard.work import Work, Works

import probekit as pk

LONG = 20.0  # seconds; nothing here takes so long unless it hangs


def steps(until: threading.Event, seen: threading.Event) -> Any:
    """Work that reports steps until it is told to end."""

    def do(tell: Any) -> str:
        n = 0
        while not until.is_set():
            n = min(n + 1, 9)
            tell(pk.Step("counting", n, 10, "things"))
            seen.set()
            until.wait(0.005)
        return "done"

    return do


def test_progress_is_told_and_the_outcome_kept() -> None:
    until, seen = threading.Event(), threading.Event()
    work = Work("Counting", steps(until, seen))
    assert seen.wait(LONG) and work.running
    assert work.share is not None and 0 < work.share <= 0.9
    assert work.line.startswith("Counting: counting,") and "of 10 things" in work.line
    until.set()
    assert work.wait(LONG)
    assert (work.outcome, work.error, work.cancelled, work.running) == ("done", "", False, False)
    spent = work.seconds
    assert work.seconds == spent  # the clock stands once it has ended


def test_cancelling_ends_it_at_the_next_step() -> None:
    seen = threading.Event()
    work = Work("Counting", steps(threading.Event(), seen))
    assert seen.wait(LONG)
    work.cancel()
    assert work.wait(LONG)
    assert work.cancelled and work.outcome is None and not work.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (pk.ProbekitError("The text is empty. Type some words."), "The text is empty. Type some words."),
        (MemoryError(), "ran out of memory"),
        (ZeroDivisionError("division by zero"), "probekit failed at this (ZeroDivisionError: division by zero)"),
    ],
)
def test_errors_are_said_in_words(error: Exception, said: str) -> None:
    def do(tell: Any) -> None:
        raise error

    work = Work("Failing", do)
    assert work.wait(LONG)
    assert said in work.error and "Traceback" not in work.error
    assert not work.cancelled and work.outcome is None


def test_time_left_counts_from_where_the_count_began() -> None:
    work = Work("x", lambda tell: None)
    assert work.wait(LONG)
    work._since -= 1000.0
    work._tell(pk.Step("reading", 1, 2, "passes"))
    before = work._since
    work._tell(pk.Step("reading", 2, 2, "passes"))
    assert work._since == before  # the same count goes on
    work._since -= 1000.0
    work._tell(pk.Step("writing", 1, 30, "tokens"))
    assert work._since > before - 500  # another count has begun


def test_a_new_work_in_a_place_cancels_the_old_one() -> None:
    works, seen = Works(), threading.Event()
    first = works.start("page", lambda: Work("first", steps(threading.Event(), seen)))
    assert seen.wait(LONG)
    second = works.start("page", lambda: Work("second", lambda tell: 2))
    assert first.wait(LONG) and first.cancelled
    assert second.wait(LONG) and works.get("page") is second and second.outcome == 2
    works.drop("page")
    assert works.get("page") is None


def test_a_session_that_ends_cancels_all_it_runs() -> None:
    works, seen = Works(), [threading.Event(), threading.Event()]
    some = [works.start(str(i), lambda e=e: Work("w", steps(threading.Event(), e))) for i, e in enumerate(seen)]
    assert all(e.wait(LONG) for e in seen)
    works.cancel_all()
    assert all(w.wait(LONG) and w.cancelled for w in some)


def test_the_store_lets_go_of_what_was_not_asked_for() -> None:
    kept = Kept(most=1000)
    kept.put("a", np.zeros(50))  # 400 bytes each
    kept.put("b", np.zeros(50))
    assert kept.get("a") is not None
    kept.put("c", np.zeros(50))
    assert kept.get("b") is None and kept.get("a") is not None and kept.get("c") is not None
    kept.put("huge", np.zeros(5000))  # larger than the store: it alone stays
    assert kept.get("huge") is not None and len(kept) == 1


def test_keys_tell_apart_what_results_depend_on() -> None:
    one = key_of("lens", "model", "text", 1)
    assert one == key_of("lens", "model", "text", 1)
    assert len({one, key_of("lens", "model", "text", 2), key_of("lens", "model", "text \ud800", 1)}) == 3
