"""Stored runs: where they may lie, what their manifests say, and what can be read of them. No streamlit here.

The server may be open to other machines. Folders are read below a few roots only, links that lead out of a folder are
refused, nothing is written, and a manifest may hold anything.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import probekit as pk
from probekit import plots

STORE, MANIFEST = "results.zarr", "manifest.json"
ROOTS = "PROBEKIT_RUNS"  # environment: folders that may be read, besides the one that the server was started in
MOST_RUNS, DEEPEST, MOST_FOLDERS = 500, 5, 5000
MOST_FILES = 50_000  # of one store
MOST_MANIFEST = 8 * 2**20  # bytes
MOST_NUMBERS = 2 * 2**30  # bytes that the arrays of a store may unpack to
_LONGEST = 400  # characters of a value in a table
_ROWS = 400  # of a table


class Refused(pk.ProbekitError):
    """A folder that cannot be read here; the message says why and what to do."""


def roots(start: Path | None = None) -> tuple[Path, ...]:
    """Folders below which runs may be read: where the server was started, and those of the environment.

    Args:
        start: where the server was started; the working directory if None.
    """
    named = [Path(p).expanduser() for p in os.environ.get(ROOTS, "").split(os.pathsep) if p]
    return tuple(p.resolve() for p in (start or Path.cwd(), *named))


def folder_of(given: str, allowed: Sequence[Path]) -> Path:
    """The folder that a reader names, with every link followed.

    Args:
        given: absolute, or relative to the first of `allowed`.
        allowed: what `roots` gives.

    Raises:
        Refused: it is outside of what may be read, or there is no such folder.
    """
    if "\0" in given or not given.strip():
        raise Refused("Name a folder, such as reports.")
    try:
        found = (allowed[0] / Path(given.strip()).expanduser()).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise Refused(f"This is no path: {str(error)[:100]}.") from error
    if not any(found.is_relative_to(root) for root in allowed):
        raise Refused(
            "This folder is outside of what the dashboard may read: the folder it was started in"
            f"{' and those named in ' + ROOTS if len(allowed) > 1 else ''}. Start it in a folder above your runs, or name "
            f"theirs in the environment variable {ROOTS}."
        )
    if not found.is_dir():
        raise Refused(f"There is no folder {given.strip()[:200]!r}. Write runs with `probekit run … --out FOLDER`.")
    return found


@dataclass(frozen=True)
class Run:
    """A folder with results.

    Args:
        name: path below the folder that was searched; "." for that folder itself.
        folder: where it is.
        manifest: what fixes its numbers; empty where it cannot be read.
        when: time at which the manifest was written, or the store where there is none.
        n_bytes: size of all files; -1 where there are too many to count.
        problem: why it cannot be opened; "" if nothing speaks against it.
    """

    name: str
    folder: Path
    manifest: Mapping[str, Any]
    when: datetime
    n_bytes: int
    problem: str = ""

    @property
    def model(self) -> str:
        """The name of its model."""
        return _short(_at(self.manifest, "model", "name"))

    @property
    def analyses(self) -> list[str]:
        """The names of its analyses."""
        found = self.manifest.get("analyses")
        return [_short(a) for a in found[:50]] if isinstance(found, list) else []

    @property
    def n_texts(self) -> int | None:
        """How many texts it read; None where the manifest does not say."""
        found = _at(self.manifest, "texts", "n_texts")
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @property
    def key(self) -> str:
        """Changes whenever the run is written anew."""
        return f"{self.folder} {self.when.timestamp()} {self.n_bytes}"


def runs_below(root: Path) -> tuple[list[Run], str]:
    """The runs in a folder and below it, newest first; links are not followed.

    Returns:
        The runs, and what was left out, in words; "" if nothing was.
    """
    found, seen = [], 0
    for place, folders, files in os.walk(root, followlinks=False):
        here, seen = Path(place), seen + 1
        depth = len(here.relative_to(root).parts)
        is_run = STORE in folders
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not f.endswith(".zarr"))
        if depth >= DEEPEST:
            folders.clear()
        if is_run:
            found.append(_run(root, here, files))
        if seen >= MOST_FOLDERS or len(found) >= MOST_RUNS:
            left = f"The search ended after {seen:,} folders and {len(found):,} runs. Name a folder further down."
            break
    else:
        left = ""
    return sorted(found, key=lambda r: r.when, reverse=True), left


def _run(root: Path, folder: Path, files: Sequence[str]) -> Run:
    name = folder.relative_to(root).as_posix()
    manifest, problem, size = {}, "", 0
    when = _time(folder / (MANIFEST if MANIFEST in files else STORE))
    if not (folder / STORE).resolve().is_relative_to(folder):
        return Run(name, folder, {}, when, -1, f"{STORE} is a link that leads out of the folder.")
    try:
        size = sum(p.stat().st_size for p in _files(folder / STORE))
        size += sum((folder / f).lstat().st_size for f in files)
    except Refused as error:
        size, problem = -1, str(error)
    except OSError as error:
        size, problem = -1, f"It cannot be read: {error.strerror}."
    if MANIFEST in files and not problem:
        manifest, problem = _manifest(folder / MANIFEST)
    return Run(name, folder, manifest, when, size, problem)


def _time(path: Path) -> datetime:
    try:
        return datetime.fromtimestamp(int(path.lstat().st_mtime))
    except (OSError, OverflowError, ValueError):
        return datetime.fromtimestamp(0)


def _files(store: Path) -> Iterator[Path]:
    """Every file of a store, none of them behind a link that leads out of it.

    Raises:
        Refused: there is such a link, or there are too many files.
    """
    n = 0
    for place, folders, files in os.walk(store, followlinks=False):
        for name in (*folders, *files):
            path = Path(place) / name
            n += 1
            if n > MOST_FILES:
                raise Refused(f"The store has more than {MOST_FILES:,} files. Open it in a notebook: pk.load_results.")
            if path.is_symlink() and not path.resolve().is_relative_to(store):
                raise Refused("The store holds a link that leads out of it, which is not followed.")
            if not path.is_symlink() and name in files:
                yield path


def _manifest(path: Path) -> tuple[dict[str, Any], str]:
    if not path.resolve().is_relative_to(path.parent):
        return {}, f"{MANIFEST} is a link that leads out of the folder."
    try:
        if path.stat().st_size > MOST_MANIFEST:
            return {}, f"{MANIFEST} is larger than {MOST_MANIFEST // 2**20} MiB."
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}, f"{MANIFEST} cannot be read as JSON."
    if not isinstance(found, dict) or found.get("format") != "probekit run":
        return {}, f"{MANIFEST} is not probekit's."
    return found, ""


def results_of(folder: Path) -> tuple[pk.Results, dict[str, str]]:
    """The results of a run, and by analysis why others cannot be read.

    Raises:
        Refused: a link leads out of the store, it is too large, or nothing of it can be read.
    """
    store = folder / STORE if (folder / STORE).is_dir() else folder
    if not store.resolve().is_relative_to(folder.resolve()):
        raise Refused(f"{STORE} is a link that leads out of the folder, which is not followed.")
    unpacked = sum(_claimed(path) for path in _files(store) if path.name == "zarr.json")
    if unpacked > MOST_NUMBERS:
        size = f"{unpacked / 2**30:,.1f} GiB" if math.isfinite(unpacked) else "more than any memory holds"
        raise Refused(f"Its numbers take {size}; the dashboard opens {MOST_NUMBERS / 2**30:g}. Use pk.load_results.")
    found: dict[str, pk.Result] = {}
    problems: dict[str, str] = {}
    for name in sorted(p.parent.name for p in store.glob("*/zarr.json")):
        try:
            found[name] = pk.load_result(store, name)
        except pk.ProbekitError as error:
            problems[name] = str(error)
    if not found:
        raise Refused(" ".join(problems.values())[:2000] or f"{folder.name} holds no results of probekit's.")
    return pk.Results(found), problems


def _claimed(path: Path) -> float:
    """Bytes that an array unpacks to, by its description; infinite where that makes no sense."""
    try:
        if path.stat().st_size > 64 * MOST_MANIFEST:
            return math.inf
        said = json.loads(path.read_text(encoding="utf-8"))
        shape = said.get("shape", [0])
        return 8.0 * math.prod(int(n) for n in shape) if shape else 8.0
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return 0.0  # pk.load_results says what is wrong


def run_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One line for each run; every text is made visible."""
    return pd.DataFrame({
        "folder": [plots.visible(r.name, keep_whitespace=True)[:_LONGEST] for r in runs],
        "model": [r.model for r in runs],
        "analyses": [", ".join(r.analyses) for r in runs],
        "texts": pd.array([r.n_texts for r in runs], dtype="Int64"),
        "written": [r.when for r in runs],
        "MiB": [r.n_bytes / 2**20 if r.n_bytes >= 0 else np.nan for r in runs],
        "problem": [r.problem for r in runs],
    })  # fmt: skip


def flat(data: Any, name: str = "") -> dict[str, str]:
    """Nested plain data as names with dots and visible values; a list of simple values is one value.

    Args:
        data: what JSON can hold.
        name: what comes before the names.
    """
    found: dict[str, str] = {}
    pending = [(name, data)]
    while pending and len(found) < _ROWS:
        at, value = pending.pop()
        if isinstance(value, Mapping) and value:
            pending += [(f"{at}.{_short(k)}" if at else _short(k), v) for k, v in reversed(list(value.items())[:_ROWS])]
        elif isinstance(value, list) and any(isinstance(v, Mapping | list) for v in value):
            pending += [(f"{at}.{i}", v) for i, v in reversed(list(enumerate(value[:_ROWS])))]
        else:
            found[at] = _short(", ".join(map(str, value[:_LONGEST])) if isinstance(value, list) else value)
    return found


def table_of(data: Any) -> pd.DataFrame:
    """Nested plain data as a table of names and values."""
    found = flat(data)
    return pd.DataFrame({"name": list(found), "value": list(found.values())})


def differences(one: Run, other: Run) -> pd.DataFrame:
    """Where two manifests differ: names, and what each says. How passes were planned is left out."""
    a, b = (flat({k: v for k, v in r.manifest.items() if k != "plan"}) for r in (one, other))
    names = [n for n in dict.fromkeys([*a, *b]) if a.get(n) != b.get(n)]
    return pd.DataFrame({
        "what": names, "first": [a.get(n, "–") for n in names], "second": [b.get(n, "–") for n in names],
    })  # fmt: skip


@dataclass(frozen=True)
class StoredText:
    """The tokens of the first text of a run.

    Args:
        model: name of the model that read it.
        ids: of its tokens.
        strings: what these show as.
    """

    model: str
    ids: tuple[int, ...]
    strings: tuple[str, ...]

    def candidates(self) -> list[str]:
        """Texts that it may have been: all tokens joined, or all but one that the tokenizer put in front."""
        return ["".join(self.strings), "".join(self.strings[1:])]


def first_text(results: pk.Results) -> StoredText | None:
    """The first text of a run, where its tokens are stored; None if they are not, or if the model wrote them."""
    for result in results.values():
        data = result.dataset
        if result.analysis.writes or not all(n in data.coords for n in ("text", "token_id", "token_str")):
            continue
        texts = data["text"].values
        if not len(texts) or data["text"].dims != ("token",):
            continue
        rows = np.flatnonzero(texts == texts.min())
        name = _at(result.provenance, "model", "name")
        if not isinstance(name, str):
            continue
        return StoredText(
            name,
            tuple(int(i) for i in data["token_id"].values[rows]),
            tuple(str(s) for s in data["token_str"].values[rows]),
        )
    return None


def text_again(stored: StoredText, model: Any) -> str | None:
    """A text that the model reads as exactly the stored tokens, or None.

    Args:
        stored: the tokens.
        model: an opened model.
    """
    for text in stored.candidates():
        try:
            if tuple(model.tokenize([text]).texts[0].ids) == stored.ids:
                return text
        except pk.ProbekitError:
            continue
    return None


def _at(data: Any, *names: str) -> Any:
    for name in names:
        data = data.get(name) if isinstance(data, Mapping) else None
    return data


def _short(value: Any) -> str:
    if value is None:
        return ""
    shown = plots.visible(str(value), keep_whitespace=True)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"
