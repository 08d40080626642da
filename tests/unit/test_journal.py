"""A run that broke off goes on where it was: nothing is lost, nothing counts twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import scripted, texts_of

from probekit.analysis import Analysis, Measure, Params
from probekit.backends.scripted import ScriptedModel
from probekit.core import Base, Branch, CapabilityError, Continuation, Fork, Sampling, StoreError
from probekit.engine import Job, run_jobs
from probekit.engine.branches import run_branch
from probekit.engine.journal import Journal

BASE = Base((3, 4, 5, 6, 7), 2)
REQUEST = Branch((BASE,), (Fork(0, 2), Fork(0, 3, 9), Fork(0, 5)), n=4, sampling=Sampling(max_tokens=6))


def uniform(ids: Any) -> np.ndarray:
    return np.full(16, 1 / 16)


def writer(**how: Any) -> ScriptedModel:
    return scripted(d_vocab=16, writes=uniform, **how)


class Counting:
    """A model that counts what it writes, and may break off."""

    def __init__(self, most: int = 10**9) -> None:
        self.inner, self.written, self.most, self.calls = writer(), 0, most, 0
        self.info = self.inner.info

    def branch(self, request: Branch, done: Any, *, memory_limit: int, there: Any = None) -> None:
        def count(fork: Fork, one: Continuation) -> None:
            if self.written >= self.most:
                raise KeyboardInterrupt
            self.written += 1
            done(fork, one)

        self.calls += 1
        self.inner.branch(request, count, memory_limit=memory_limit, there=there)


def test_a_run_that_broke_off_goes_on(tmp_path: Path) -> None:
    """At every place: what was there is not written again, and the whole is what an unbroken run gives."""
    whole = run_branch(Counting(), REQUEST, Journal(None, "m"))  # type: ignore[arg-type]
    for n in range(12):
        path = tmp_path / f"{n}.jsonl"
        with pytest.raises(KeyboardInterrupt), Journal(path, "m") as journal:
            run_branch(Counting(n), REQUEST, journal)  # type: ignore[arg-type]
        rest = Counting()
        with Journal(path, "m") as journal:
            assert run_branch(rest, REQUEST, journal) == whole  # type: ignore[arg-type]
        assert rest.written == 12 - n
        lines = path.read_text().splitlines()[1:]
        assert len({(json.loads(line)["fork"], json.loads(line)["sample"]) for line in lines}) == len(lines) == 12


def test_what_is_missing_here_and_there_is_written_together(tmp_path: Path) -> None:
    """A broken run lacks other numbers at every fork; one batch writes them all, or a resumed run would crawl."""
    path = tmp_path / "j.jsonl"
    with Journal(path, "m") as journal:
        whole = run_branch(Counting(), REQUEST, journal)  # type: ignore[arg-type]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for i, line in enumerate(lines) if i not in (2, 4, 7, 12)))
    rest = Counting()
    with Journal(path, "m") as journal:
        assert run_branch(rest, REQUEST, journal) == whole  # type: ignore[arg-type]
        assert (rest.calls, rest.written) == (1, 4)
        assert run_branch(rest, REQUEST, journal) == whole and rest.calls == 1  # type: ignore[arg-type]


def test_more_samples_write_only_the_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, "m") as journal:
        run_branch(Counting(), REQUEST, journal)  # type: ignore[arg-type]
    more = Counting()
    with Journal(path, "m") as journal:
        found = run_branch(more, replace(REQUEST, n=10), journal)  # type: ignore[arg-type]
    assert more.written == 18
    assert found == run_branch(Counting(), replace(REQUEST, n=10), Journal(None, "m"))  # type: ignore[arg-type]


def test_another_model_or_another_way_of_drawing_shares_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, "m") as journal:
        run_branch(Counting(), REQUEST, journal)  # type: ignore[arg-type]
    for model, request in (
        ("other", REQUEST),
        ("m", replace(REQUEST, sampling=Sampling(max_tokens=7))),
        ("m", replace(REQUEST, sampling=Sampling(max_tokens=6, seed=1))),
        ("m", replace(REQUEST, bases=(Base((8, 4, 5, 6, 7), 2),))),
        ("m", replace(REQUEST, bases=(Base((3, 4, 5, 6, 7), 1),))),
    ):
        journal = Journal(path, model)
        assert not any(journal.known(request, fork) for fork in request.forks)


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, "m") as journal:
        whole = run_branch(Counting(), REQUEST, journal)  # type: ignore[arg-type]
    content = path.read_bytes()
    for cut in (1, 5, 40):
        path.write_bytes(content[:-cut])
        rest = Counting()
        with Journal(path, "m") as journal:
            assert run_branch(rest, REQUEST, journal) == whole  # type: ignore[arg-type]
        assert rest.written == 1 and path.read_bytes() == content


def test_files_of_others_and_damaged_ones_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    with pytest.raises(StoreError, match="no file of continuations"):
        Journal(path, "m")
    assert path.read_text() == "my notes\n"
    with Journal(tmp_path / "j.jsonl", "m") as journal:
        run_branch(Counting(), REQUEST, journal)  # type: ignore[arg-type]
    lines = (tmp_path / "j.jsonl").read_text().splitlines()
    (tmp_path / "j.jsonl").write_text("\n".join([*lines[:3], "{broken", *lines[4:]]) + "\n")
    with pytest.raises(StoreError, match="line 4, is damaged"):
        Journal(tmp_path / "j.jsonl", "m")


def test_a_model_that_cannot_write_on_is_named() -> None:
    with pytest.raises(CapabilityError, match="nothing unless it is told"):
        run_branch(scripted(), REQUEST, Journal(None, "m"))


class Writes(Analysis):
    """Writes on?"""

    name, title = "writes", "Writes"
    measures = {"n": Measure(("text",), "1", "tokens written")}

    def flow(self, params: Any, info: Any) -> Any:
        import xarray as xr

        first = yield replace(REQUEST, n=2)
        more = yield replace(REQUEST, n=2, first=2)
        n = [len(c.ids) for found in (first, more) for some in found.continuations for c in some]
        return xr.Dataset({"n": ("text", n)})


def test_analyses_may_ask_for_continuations(tmp_path: Path) -> None:
    """Through the engine, with a journal, twice: the second time nothing is written."""
    job, path = Job(Writes(), Params()), tmp_path / "j.jsonl"
    first = run_jobs([job], writer(), texts_of((4,), 16), journal=path)["writes"]
    assert first["n"].values.tolist() == [6] * 12
    silent = scripted(d_vocab=16)  # has the same weights, and nothing to write with
    assert run_jobs([job], silent, texts_of((4,), 16), journal=path)["writes"]["n"].values.tolist() == [6] * 12


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    """A process that writes slowly is killed outright; another one goes on, and the whole is that of an unbroken run."""
    path, ready = tmp_path / "j.jsonl", 5
    code = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]!r}
import test_journal as t
class Slow(t.Counting):
    def branch(self, request, done, *, memory_limit, there):
        def wait(fork, one):
            time.sleep(0.05)
            done(fork, one)
        self.inner.branch(request, wait, memory_limit=memory_limit, there=there)
with t.Journal({str(path)!r}, "m") as journal:
    t.run_branch(Slow(), t.replace(t.REQUEST, n=200), journal)
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        end = time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(b"\n") < ready:
            assert child.poll() is None and time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    n = path.read_bytes().count(b"\n") - 1
    rest = Counting()
    with Journal(path, "m") as journal:
        found = run_branch(rest, replace(REQUEST, n=200), journal)  # type: ignore[arg-type]
    assert rest.written == 600 - n and ready - 1 <= n < 600
    assert found == run_branch(Counting(), replace(REQUEST, n=200), Journal(None, "m"))  # type: ignore[arg-type]
