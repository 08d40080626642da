"""A corpus that is read text by text: a .jsonl file of any size, or texts from Python."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from probekit.core import InputError, StoreError
from probekit.texts import text_of_line

_PIECE = 1 << 20


@dataclass(frozen=True)
class Item:
    """One entry of a corpus.

    Args:
        text: the text; "" where the entry is none.
        number: of the line or text, counted from 1.
        end: where the corpus goes on after it.
        raw: what the corpus' hash is made of.
        problem: what is wrong with it; None if nothing is.
    """

    text: str
    number: int
    end: int
    raw: bytes
    problem: InputError | None = None


class Corpus(Protocol):
    """What can be streamed."""

    name: str
    size: int | None  # in the unit of `Item.end`; None if nobody knows

    def read(self, position: int, number: int) -> Generator[Item]:
        """The entries after a position, of which the first has this number."""
        ...

    def prefix(self, position: int, number: int) -> Any:
        """The sha256, as it goes on, of everything before a position.

        Raises:
            StoreError: the corpus ends before it, or its entry there is another one now.
        """
        ...


class Lines:
    """The lines of a .jsonl file, an object with a string `text` on each; empty lines do not count.

    Args:
        path: the file.
        chats: whether a line may have `messages` in place of `text`.

    Raises:
        InputError: the file is of another kind, or cannot be read.
    """

    def __init__(self, path: str | Path, *, chats: bool = False) -> None:
        self.path, self.name, self._chats = Path(path), Path(path).name, chats
        if self.path.suffix != ".jsonl":
            raise InputError(
                f"{path} cannot be streamed; expected a .jsonl file, with an object with 'text' on each line."
            )
        try:
            with self.path.open("rb") as file:
                self.size: int | None = file.seek(0, 2)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None

    def read(self, position: int, number: int) -> Generator[Item]:
        """The lines after a position in bytes, of which the first has this number."""
        with self.path.open("rb") as file:
            file.seek(position)
            for raw in file:
                position += len(raw)
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                yield self._item(line, number, position, raw)
                number += 1

    def _item(self, line: bytes, number: int, end: int, raw: bytes) -> Item:
        if not line.strip():
            return Item("", number, end, raw)
        try:
            return Item(text_of_line(self.path, number, line.decode(), self._chats), number, end, raw)
        except UnicodeDecodeError as error:
            found = InputError(f"{self.path}, line {number}: not UTF-8 (byte {error.start} of the line).")
            return Item("", number, end, raw, found)
        except InputError as error:
            return Item("", number, end, raw, error)

    def prefix(self, position: int, number: int) -> Any:
        """The sha256 of the bytes before a position."""
        digest, left, last = hashlib.sha256(), position, b"\n"
        with self.path.open("rb") as file:
            while left and (piece := file.read(min(left, _PIECE))):
                digest.update(piece)
                left, last = left - len(piece), piece[-1:]
            after = file.read(1)
        if left:
            raise StoreError(
                f"{self.path} is shorter than what was read of it; give the file that this run began with."
            )
        if position and last != b"\n" and after not in (b"", b"\n", b"\r"):
            raise StoreError(f"{self.path}: its last line was read when it was shorter. Add new texts on new lines.")
        return digest


class Given:
    """Texts from Python: strings, or lists of messages, in an order that is the same every time.

    Args:
        texts: any iterable; what was done of it before is read again and passed over.
    """

    name = "texts from Python"
    size: int | None = None

    def __init__(self, texts: Iterable[Any]) -> None:
        self._texts = texts
        if isinstance(texts, Iterator):
            raise InputError(
                "texts is an iterator, which can be read once only; give something that starts anew when it is iterated, "
                "such as a list, a dataset, or an object whose __iter__ is a generator."
            )

    def read(self, position: int, number: int) -> Generator[Item]:
        """The texts after the first `position` ones."""
        for i, text in enumerate(self._texts):
            if i < position:
                continue
            shown = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
            raw = json.dumps(shown).encode()
            if not isinstance(text, (str, list)) or not shown.strip():
                problem = InputError(f"Text {i}: expected a string with a visible character, found {text!r}.")
                yield Item("", i + 1, i + 1, raw, problem)
            else:
                yield Item(shown, i + 1, i + 1, raw)

    def prefix(self, position: int, number: int) -> Any:
        """The sha256 of the first `position` texts."""
        digest, seen = hashlib.sha256(), 0
        for item in self.read(0, 1):
            if seen == position:
                break
            digest.update(item.raw)
            seen += 1
        if seen < position:
            raise StoreError(f"There are {seen:,} texts, and {position:,} were read before; give the same ones.")
        return digest


def corpus_of(texts: Any, *, chats: bool = False) -> Corpus:
    """A corpus from a path, or from texts in Python."""
    if isinstance(texts, (str, Path)):
        return Lines(texts, chats=chats)
    if not isinstance(texts, Iterable):
        raise InputError(f"A corpus is a .jsonl file or an iterable of texts; found {type(texts).__name__}.")
    return Given(texts)
