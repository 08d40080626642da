"""One Zarr store for a streamed corpus: rows that grow, statistics that are replaced, and what is committed.

A shard is written in this order: its rows behind the committed ones, the statistics of all texts so far into the slot
that is not in use, and then `commit.json`, in one move. A process that is killed at any moment leaves the last commit
whole; rows behind it are cut off when the store is opened again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from probekit.core import StoreError
from probekit.core.rows import Columns, append_rows, cut_rows, read_packed, write_packed

if TYPE_CHECKING:
    import xarray as xr

FORMAT = "probekit stream"
_COMMIT, _LOCK = "commit.json", "lock"
_SLOTS = ("summary-a", "summary-b")


@dataclass(frozen=True)
class State:
    """What is committed.

    Args:
        shards: how many.
        texts: texts that ran.
        tokens: tokens of these.
        position: where the corpus goes on.
        number: of the line or text that comes next, counted from 1.
        digest: sha256 of the corpus up to there.
        skipped: lines left out, by reason.
        rows: of each table.
        peak_bytes: most memory that a pass needed above the model.
        slot: the group that holds the statistics; "" before the first shard.
    """

    shards: int = 0
    texts: int = 0
    tokens: int = 0
    position: int = 0
    number: int = 1
    digest: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    slot: str = ""


class StreamStore:
    """The store of one streamed corpus, held by one process at a time.

    Args:
        path: the store; made if it does not exist.
        manifest: what fixes the numbers; that of a store that exists must be the same.

    Raises:
        StoreError: another process holds it, it belongs to another run, or it is something else.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.manifest = path, json.loads(json.dumps(manifest))
        self.state = State()
        self._lock: Any = None

    def __enter__(self) -> Self:
        try:
            if self.path.exists() and not is_stream(self.path):
                raise StoreError(f"{self.path} exists and is no streamed corpus of probekit; choose another folder.")
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / _LOCK)
            self._open()
        except OSError as error:
            self.close()
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"Cannot write to {self.path}: {error.strerror or error}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _open(self) -> None:
        if not (self.path / _COMMIT).exists():
            self._write_commit(self.state)
            return
        self.state, manifest = committed(self.path)
        different = list(_differences(manifest, self.manifest))
        if different:
            raise StoreError(
                f"{self.path} belongs to another run: {'; '.join(different[:4])}. Repeat that run's command, or choose "
                "another folder."
            )
        for table in ("texts", "tokens"):
            cut_rows(self.path, table, table.removesuffix("s"), self.state.rows.get(table, 0))
        for slot in _SLOTS:
            if slot != self.state.slot:
                shutil.rmtree(self.path / slot, ignore_errors=True)

    def summaries(self) -> dict[str, xr.Dataset]:
        """The statistics of all texts so far, by analysis."""
        return read_summaries(self.path, self.state)

    def commit(self, state: State, summaries: Mapping[str, xr.Dataset], tables: Mapping[str, Columns]) -> None:
        """Add a shard.

        Args:
            state: after it; rows and slot are filled in.
            summaries: the statistics of all texts so far, by analysis.
            tables: new rows of the tables "texts" and "tokens".
        """
        rows = dict(self.state.rows)
        slot = _SLOTS[self.state.slot == _SLOTS[0]]
        try:
            for table, columns in tables.items():
                along, start = table.removesuffix("s"), rows.get(table, 0)
                append_rows(self.path, table, columns, along, start)
                rows[table] = start + max(v.shape[d.index(along)] for d, v in columns.values())
            shutil.rmtree(self.path / slot, ignore_errors=True)
            for name, summary in summaries.items():
                write_packed(summary, self.path, f"{slot}/{name}")
            self._write_commit(replace(state, rows=rows, slot=slot if summaries else ""))
        except OSError as error:
            raise StoreError(
                f"Cannot write to {self.path}: {error.strerror or error}. What was committed is kept; the same command "
                "goes on once there is room."
            ) from error

    def _write_commit(self, state: State) -> None:
        part = self.path / f"{_COMMIT}.partial"
        with part.open("w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "version": 1, "manifest": self.manifest, "state": asdict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path / _COMMIT)
        self.state = state


def is_stream(path: Path) -> bool:
    """Whether a folder is the store of a streamed corpus, or one that a process was killed in the making of."""
    if not path.is_dir():
        return False
    if (path / _COMMIT).exists():
        try:
            return bool(json.loads((path / _COMMIT).read_text(encoding="utf-8")).get("format") == FORMAT)
        except (OSError, ValueError):
            return False
    return {p.name for p in path.iterdir()} <= {_LOCK, f"{_COMMIT}.partial"}


def committed(path: Path) -> tuple[State, dict[str, Any]]:
    """What is committed in a store, and its manifest.

    Raises:
        StoreError: there is no such store.
    """
    try:
        found = json.loads((path / _COMMIT).read_text(encoding="utf-8"))
        return State(**found["state"]), found["manifest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"There is no streamed corpus at {path}, or it is damaged.") from None


def read_summaries(path: Path, state: State) -> dict[str, xr.Dataset]:
    """The statistics that a state names, by analysis."""
    folder = path / state.slot
    names = sorted(p.parent.name for p in folder.glob("*/zarr.json")) if state.slot else []
    try:
        return {name: read_packed(path, f"{state.slot}/{name}") for name in names}
    except Exception as error:  # whatever a library makes of missing or changed bytes
        raise StoreError(
            f"{path} is damaged, or of another version of probekit: its statistics cannot be read "
            f"({type(error).__name__}: {str(error)[:200]}). Restore it, or stream the corpus into another folder."
        ) from error


def load_rows(path: str | Path, table: str = "texts") -> xr.Dataset:
    """The rows of a streamed corpus that are committed, read from disk when they are looked at.

    Args:
        path: what `stream` wrote, or the folder of `probekit run --stream`.
        table: "texts", or "tokens" where these were kept.

    Raises:
        StoreError: there is no such table.
    """
    import xarray as xr

    store = Path(path)
    store = store / "stream.zarr" if (store / "stream.zarr").is_dir() else store
    state, _ = committed(store)
    if table not in state.rows:
        kept = ", ".join(state.rows) or "none"
        raise StoreError(f"{store} has no rows of {table}; kept are: {kept} (see `keep`).")
    rows = xr.open_zarr(store, group=table, consolidated=False, chunks=None)
    return rows.isel({table.removesuffix("s"): slice(state.rows[table])})


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two manifests, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [d for k in keys for d in _differences(before.get(k), now.get(k), f"{where} {k}".strip())]
    return [] if before == now else [f"{where} was {_short(before)} and is {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _locked(path: Path) -> Any:
    """The lock file, open; the system lets go of it when the process ends, however it ends.

    Raises:
        StoreError: another process holds it.
    """
    file = path.open("a+b")
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StoreError(
            f"{path.parent} is in use: another process streams into it. Wait for it, or stop it."
        ) from None
    return file
