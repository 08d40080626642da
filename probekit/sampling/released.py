"""Outcomes that others drew and released, in the files of forking-fast (arXiv 2608.19611).

A file holds one question: a greedy answer, the tokens that were tried at its positions with their probabilities, and
what each of their continuations answers. `row*.json.gz` as released; unpacked `.json` files are read too.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probekit.core import InputError

from .forks import Alternative, ForkMap, Position

_MOST = 10**6


@dataclass(frozen=True)
class ReleasedForks:
    """One question of a release.

    Args:
        name: of its file.
        question: the question.
        right: what a right answer says; "" if nobody said.
        tokens: the greedy answer's tokens, as text.
        forks: what continuations of every token say, all categories kept.
        stated: the release's own o_t; axes position, category, in the order of `stated_categories`. None without.
        stated_categories: as the release names them.
    """

    name: str
    question: str
    right: str
    tokens: tuple[str, ...]
    forks: ForkMap
    stated: np.ndarray | None
    stated_categories: tuple[str, ...]

    def difference(self) -> float:
        """Largest difference between o_t computed here and the release's own; NaN where it states none."""
        if self.stated is None:
            return float("nan")
        own = np.zeros_like(self.stated)
        for column, name in zip(self.forks.distributions.T, self.forks.categories, strict=True):
            places = [c.lower() for c in self.stated_categories]
            if name.lower() not in places:
                return float(max(column.max(), np.abs(own - self.stated).max()))
            own[:, places.index(name.lower())] += column
        return float(np.abs(own - self.stated).max())


def read_released(path: str | Path) -> list[ReleasedForks]:
    """The questions of a folder of released files, or of one file.

    Args:
        path: a `.json.gz` or `.json` file, or a folder of them (other files are passed over).

    Raises:
        InputError: nothing is there, or a file is damaged or has another form, which is named.
    """
    path = Path(path)
    files = (
        [path] if path.is_file() else sorted(f for f in path.glob("*.json*") if f.name.endswith((".json", ".json.gz")))
    )
    if not files:
        raise InputError(f"{path} holds no .json.gz or .json file of released draws.")
    return [_question(file) for file in files]


def _question(file: Path) -> ReleasedForks:
    try:
        content = file.read_bytes()
        data = json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{file} cannot be read as (gzipped) JSON: {error}.") from None
    try:
        meta, base = data.get("meta", {}), data["base"]
        stated = data.get("o_t_full")
        return ReleasedForks(
            file.name.split(".")[0],
            str(meta.get("question", "")),
            str(meta.get("answer_letter", "")),
            tuple(map(str, base["token_texts"])),
            ForkMap(_positions(data["branches"], file), least=0.0, most=_MOST),
            None if stated is None else np.asarray(stated, dtype=float),
            tuple(map(str, data.get("categories", ()))),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is no file of released draws: expected `base.token_texts` and `branches` with t, tok_id, tok_p, "
            f"is_base and answers; {type(error).__name__}: {error}."
        ) from None


def _positions(branches: Sequence[dict[str, Any]], file: Path) -> tuple[Position, ...]:
    by_place: dict[int, list[dict[str, Any]]] = {}
    for branch in branches:
        by_place.setdefault(int(branch["t"]), []).append(branch)
    found = []
    for place in sorted(by_place):
        here = sorted(by_place[place], key=lambda b: not b["is_base"])
        if [bool(b["is_base"]) for b in here].count(True) != 1:
            raise InputError(
                f"{file}: position {place} has not exactly one branch of the answer's own token (is_base)."
            )
        found.append(
            Position(
                place,
                tuple(Alternative(int(b["tok_id"]), float(b["tok_p"]), tuple(map(_said, b["answers"]))) for b in here),
            )
        )
    return tuple(found)


def _said(answer: Any) -> str | None:
    return None if answer is None else str(answer)
