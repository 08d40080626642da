"""A streamed run that is killed goes on, and ends as an unbroken one to the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from streamed import NAMES, assert_same_result, corpus, stream, texts_of

import probekit as pk
from probekit.streaming.store import StreamStore

CHILD = """
import sys, torch, probekit as pk
torch.set_num_threads(1)
pk.stream(["token-uncertainty", "logit-lens"], sys.argv[1], sys.argv[2], sys.argv[3], chunk=24, progress=False)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts_of(13))


@pytest.fixture(scope="module")
def whole(path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pk.Results, Path]:
    store = tmp_path_factory.mktemp("whole") / "s.zarr"
    return stream(path, store, chunk=5, keep="tokens"), store


class Killed(BaseException):
    """Stands for the end of the process."""


def _rows_written_half(store: StreamStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import probekit.streaming.store as module

    own = module.append_rows

    def half(folder: Path, group: str, columns: Any, along: str, start: int) -> None:
        own(folder, group, dict(list(columns.items())[: len(columns) // 2]), along, start)
        raise Killed

    monkeypatch.setattr(module, "append_rows", half)


def _summaries_written_half(store: StreamStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import probekit.streaming.store as module

    own = module.write_packed

    def half(summary: xr.Dataset, folder: Path, name: str) -> None:
        own(summary[list(summary.data_vars)[:3]], folder, name)
        raise Killed

    monkeypatch.setattr(module, "write_packed", half)


def _before_the_commit(store: StreamStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: StreamStore, state: Any) -> None:
        (self.path / "commit.json.partial").write_text('{"format": "pro')
        raise Killed

    monkeypatch.setattr(StreamStore, "_write_commit", never)


@pytest.mark.parametrize("ends", [_rows_written_half, _summaries_written_half, _before_the_commit])
@pytest.mark.parametrize("at", [0, 2])
def test_a_run_that_ends_anywhere_in_a_commit_goes_on(
    ends: Callable[[Any, pytest.MonkeyPatch], None], at: int, path: Path, whole: tuple[pk.Results, Path], tmp_path: Path
) -> None:
    """The first or last shard breaks off; the same call ends as the unbroken run to the last bit."""
    seen = {"commits": 0}
    with pytest.MonkeyPatch.context() as patched:
        own = StreamStore.commit

        def commit(self: StreamStore, *args: Any) -> None:
            if seen["commits"] == at:
                ends(self, patched)
            seen["commits"] += 1
            own(self, *args)

        patched.setattr(StreamStore, "commit", commit)
        with pytest.raises(Killed):
            stream(path, tmp_path / "s.zarr", chunk=5, keep="tokens")
    assert seen["commits"] == at + 1
    found = stream(path, tmp_path / "s.zarr", chunk=5, keep="tokens")
    for name in NAMES:
        assert_same_result(found[name], whole[0][name], rtol=0)
        xr.testing.assert_identical(found[name].dataset, whole[0][name].dataset)
    for table in ("texts", "tokens"):
        xr.testing.assert_identical(
            pk.load_rows(tmp_path / "s.zarr", table).load(), pk.load_rows(whole[1], table).load()
        )


def _shards(store: Path) -> int:
    commit = store / "commit.json"
    return int(json.loads(commit.read_text())["state"]["shards"]) if commit.exists() else 0


def test_six_hundred_texts_killed_twice(tiny_folder: Path, tmp_path: Path) -> None:
    """SIGKILL from outside, at whatever the process is doing then, after the third and the twelfth of 25 shards."""
    path, rng = corpus(tmp_path / "c.jsonl", texts_of(600)), random.Random(0)
    names, how = ["token-uncertainty", "logit-lens"], {"chunk": 24, "progress": False}
    whole = pk.stream(names, tiny_folder, path, tmp_path / "whole.zarr", **how)
    store = tmp_path / "broken.zarr"
    for at in (3, 12):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tiny_folder), str(path), str(store)])
        while child.poll() is None and _shards(store) < at:
            _wait(child, 0.005)
        _wait(child, rng.random() * 0.1)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert at <= _shards(store) < 25
    found = pk.stream(names, tiny_folder, path, store, **how)
    for name in names:
        assert_same_result(found[name], whole[name], rtol=0)
        xr.testing.assert_identical(found[name].dataset, whole[name].dataset)
    rows = [pk.load_rows(folder).load() for folder in (store, tmp_path / "whole.zarr")]
    xr.testing.assert_identical(*rows)
    assert rows[0]["line"].values.tolist() == list(range(1, 601))


def _wait(child: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return
