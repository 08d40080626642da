"""What a session holds: the selection (in the URL, too), opened models, results, and work under way.

Models and results are shared by all sessions, in bounded caches; a model serves one pass at a time (it has a lock of its
own), so that sessions never mix. Results are never changed once they are stored.
"""

from __future__ import annotations

import gc
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import streamlit as st

import probekit as pk

from .look import plain
from .selection import Selection, from_query
from .work import Work, Works

CORE = ("token-uncertainty", "logit-lens", "attention-sinks", "massive-activations")
MOST_BYTES = 512 * 2**20  # of results that are kept
MOST_MODELS = 2


def _release(model: Any) -> None:
    del model
    gc.collect()


@st.cache_resource(max_entries=MOST_MODELS, show_spinner=False, on_release=_release)
def opened(spec: str, dtype: str | None = None) -> Any:
    """A model by its name; its weights are loaded by the first run.

    Args:
        spec: what `pk.open_model` takes.
        dtype: of the weights; as stored if None, which is then left out of the call: arguments are the key of the cache.

    Raises:
        ProbekitError: it cannot be opened.
    """
    return pk.open_model(spec, dtype=dtype, lazy=True)


class Kept:
    """Results of all sessions; those not asked for the longest time are let go.

    Args:
        most: bytes of arrays that are kept.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most, self._found, self._lock = most, OrderedDict[str, tuple[Any, int]](), threading.Lock()

    def get(self, key: str) -> Any:
        """What was stored under a key, or None."""
        with self._lock:
            if key not in self._found:
                return None
            self._found.move_to_end(key)
            return self._found[key][0]

    def put(self, key: str, value: Any) -> None:
        """Store something, and let go what no longer fits beside it."""
        with self._lock:
            self._found[key] = value, _bytes(value)
            self._found.move_to_end(key)
            while len(self._found) > 1 and sum(n for _, n in self._found.values()) > self._most:
                self._found.popitem(last=False)

    def __len__(self) -> int:
        return len(self._found)


def _bytes(value: Any) -> int:
    if isinstance(value, pk.Result):
        return int(value.dataset.nbytes)
    if isinstance(value, pk.Results):
        return sum(_bytes(r) for r in value.values())
    if isinstance(value, pk.ActivationCache):
        return sum(int(a.nbytes) for a in value.values())
    if isinstance(value, str):
        return 4 * len(value)
    return int(getattr(value, "nbytes", 0))


@st.cache_resource(show_spinner=False)
def kept() -> Kept:
    """Results of all sessions."""
    return Kept()


@st.cache_resource(scope="session", show_spinner=False, on_release=Works.cancel_all)
def works() -> Works:
    """What this session has under way."""
    return Works()


def key_of(*parts: Any) -> str:
    """A key for whatever a result depends on."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def selection() -> Selection:
    """What this session looks at; read off the URL at first."""
    if "selection" not in st.session_state:
        default = next(m["name"] for m in pk.list_models() if m["default"])
        found, wrong = from_query(st.query_params.to_dict(), default, lambda held: kept().get(f"text {held}"))
        st.session_state["selection"] = found
        if wrong:
            st.session_state["notice"] = wrong
    return st.session_state["selection"]


def select(**changes: Any) -> None:
    """Change what this session looks at; a lens stays behind with its model."""
    now = selection()
    own = {"lens": ""} if changes.get("model", now.model) != now.model else {}
    st.session_state["selection"] = replace(now, **(own | changes))


def write_url() -> None:
    """Bring the URL in line with the selection."""
    wanted = selection().to_query()
    if "long" in wanted and kept().get(f"text {wanted['long']}") is None:
        kept().put(f"text {wanted['long']}", selection().text)
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)


def computed(place: str, label: str, key: str, do: Callable[[Any], Any], *, wait: bool = False) -> Any:
    """What a long computation gives, or None while it runs, was cancelled, or failed; says so on the page.

    The result is kept for all sessions under `key`. Starts the computation if nobody has done it; use `started` beside a
    button where it should wait for the reader.

    Args:
        place: names the part of the page; a new computation in the same place cancels the old one.
        label: what it is, for the progress bar.
        key: everything that the result depends on, as `key_of` makes it.
        do: gets a function to report steps to, and returns the result.
        wait: whether the page has nothing to show without it, and its script waits; whatever the reader does meanwhile
            interrupts the waiting, not the work.
    """
    found = kept().get(key)
    if found is not None:
        works().drop(place)
        return found
    work = works().get(place)
    if work is None or work.key != key:
        work = start(place, label, key, do)
        work.wait(0.15)
    if wait:
        _wait(place, work)
    return _watched(place, work)


def start(place: str, label: str, key: str, do: Callable[[Any], Any]) -> Work:
    """Begin a long computation, whose result is kept under `key`."""
    store = kept()

    def run(tell: Any) -> Any:
        found = do(tell)
        store.put(key, found)
        return found

    return works().start(place, lambda: Work(label, run, key))


def awaited(place: str, key: str) -> Any:
    """What a computation that a button has started gives, or None; shows how far it is."""
    found = kept().get(key)
    if found is not None:
        works().drop(place)
        return found
    work = works().get(place)
    return None if work is None or work.key != key else _watched(place, work)


def _wait(place: str, work: Work) -> None:
    """Hold the script until the work has ended, with a bar and a button that cancels it."""
    room = st.empty()
    if work.running:
        with room.container():
            left, right = st.columns([6, 1], vertical_alignment="center")
            bar = left.empty()
            if right.button("Cancel", key=f"{place}-cancel", width="stretch"):
                work.cancel()
            while work.running:
                bar.progress(work.share or 0.0, text=plain(work.line))
                work.wait(0.5)  # each step redraws the page, on the cores that the model runs on
    room.empty()


def _watched(place: str, work: Work) -> Any:
    if not work.running:
        if work.error:
            st.error(plain(work.error), icon=":material/error:")
        elif work.cancelled:
            st.info("Cancelled.", icon=":material/cancel:")
        else:
            return work.outcome
        if st.button("Try again", key=f"{place}-again"):
            works().drop(place)
            st.rerun()
        return None
    _bar(place)
    return None


@st.fragment(run_every=0.4)
def _bar(place: str) -> None:
    work = works().get(place)
    if work is None or not work.running:
        st.rerun()
        return
    left, right = st.columns([6, 1], vertical_alignment="center")
    share = work.share
    left.progress(0.0 if share is None else share, text=plain(work.line))
    if right.button("Cancel", key=f"{place}-cancel", width="stretch"):
        work.cancel()
