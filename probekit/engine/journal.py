"""What was written or compared already, in a file that a killed process leaves whole.

One line per continuation, or per answered request for similarities, written when it is done. A line that was cut off by the end of its process is dropped when
the file is opened again, and what it held is drawn again: draws depend on nothing but their fork and number, so
nothing is lost and nothing counts twice. Of embeddings only the similarities are kept.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from probekit.core import Branch, Compared, Continuation, Fork, Similarities, StoreError

_HEAD = {"file": "probekit continuations", "version": 1}
_ARRAYS = {"cosine": "<f4", "count": "<i4", "tokens": "<i4"}


class Journal:
    """Continuations by model and fork, similarities by model and request.

    Args:
        path: the file; made at the first line. None keeps nothing.
        model: what fixes the model's numbers, such as a hash over its weights.

    Raises:
        StoreError: the file is no journal of probekit's, or cannot be read.
    """

    def __init__(self, path: str | Path | None, model: str) -> None:
        self.path, self.model = None if path is None else Path(path), model
        self._known: dict[str, dict[int, Continuation]] = {}
        self._compared: dict[str, Compared] = {}
        self._file: Any = None
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}.") from None
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if content and (not lines or _parsed(lines[0]) != _HEAD):
            raise StoreError(
                f"{path} is no file of continuations or similarities that probekit wrote; name another one."
            )
        for number, line in enumerate(lines[1:], start=2):
            record = _parsed(line)
            if not isinstance(record, dict) or not {"fork", "similarities"} & set(record):
                raise StoreError(f"{path}, line {number}, is damaged. Delete the line; what it held is done again.")
            if record["model"] != self.model:
                continue
            if "similarities" in record:
                self._compared[record["similarities"]] = _compared(record)
            else:
                self._known.setdefault(record["fork"], {})[record["sample"]] = _continuation(record)
        if len(whole) < len(content):  # the process that wrote it ended in the middle of a line
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def known(self, request: Branch, fork: Fork) -> dict[int, Continuation]:
        """The continuations of a fork that are wanted and there, by number."""
        found = self._known.get(request.fork_key(fork), {})
        return {i: found[i] for i in range(request.first, request.first + request.n) if i in found}

    def add(self, request: Branch, fork: Fork, one: Continuation) -> None:
        """Keep a continuation.

        Raises:
            StoreError: the file cannot be written.
        """
        key = request.fork_key(fork)
        self._known.setdefault(key, {})[one.sample] = one
        self._write({"model": self.model, "fork": key, **_record(one)})

    def compared(self, request: Similarities) -> Compared | None:
        """What a request for similarities brought back before; None if it was not answered yet."""
        return self._compared.get(request.key)

    def add_compared(self, request: Similarities, found: Compared) -> None:
        """Keep what a request for similarities brought back, in a journal that has a file.

        Raises:
            StoreError: the file cannot be written.
        """
        if self.path is None:
            return
        self._compared[request.key] = found
        packed = {k: _packed(getattr(found, k), kind) for k, kind in _ARRAYS.items()}
        self._write({"model": self.model, "similarities": request.key, "n_cut": found.n_cut, **packed})

    def _write(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                fresh = not self.path.exists() or not self.path.stat().st_size
                self._file = self.path.open("ab", buffering=0)
                if fresh:
                    self._file.write(json.dumps(_HEAD).encode() + b"\n")
            self._file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error.strerror}.") from None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _record(one: Continuation) -> dict[str, Any]:
    return dataclasses.asdict(one)


def _packed(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(values.astype(kind).tobytes()).decode()


def _compared(record: dict[str, Any]) -> Compared:
    arrays = {k: np.frombuffer(base64.b64decode(record[k]), dtype=kind) for k, kind in _ARRAYS.items()}
    return Compared(**arrays, n_cut=record["n_cut"])


def _continuation(record: dict[str, Any]) -> Continuation:
    logprobs = tuple(map(float, record["logprobs_nats"]))
    return Continuation(record["sample"], tuple(record["ids"]), logprobs, record["outcome"], record["stopped"])
