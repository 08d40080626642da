"""Which tokens of which texts become rows, and which rows belong to the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import numpy as np

from probekit.core import Batch, InputError

Positions = str | int | Sequence[Any] | Callable[[str], bool]


@dataclass(frozen=True)
class Places:
    """The rows of a collection, texts in their order.

    Args:
        text: text of each row.
        pos: position of each row within its text, from 0.
        position: the position as it was asked for (negative from the end), or `pos` where tokens were chosen one by one.
        single: the only position asked for, the same in every text; None otherwise.
        words: what was asked for, in words.
    """

    text: np.ndarray
    pos: np.ndarray
    position: np.ndarray
    single: int | None
    words: str

    def __len__(self) -> int:
        return len(self.text)


def places_of(positions: Positions, batch: Batch) -> Places:
    """The rows that `positions` names.

    Args:
        positions: "last", "all", a position or several (negative from the end), a function that says of a token's
            string whether it is wanted, or for each text its positions or a boolean for each of its tokens.
        batch: the texts.

    Raises:
        InputError: a text has no such position, a list fits no text, or no token is chosen at all.
    """
    single: int | None = None
    if isinstance(positions, str):
        if positions not in ("last", "all"):
            raise InputError(f"Found positions={positions!r}; expected 'last', 'all', whole numbers, or a function.")
        words = f"{positions} token{'s' * (positions == 'all')}"
        single = -1 if positions == "last" else None
        asked = [[-1] if positions == "last" else list(range(n)) for n in batch.lengths]
    elif callable(positions):
        words = "tokens for which a function is true"
        asked = [[i for i, s in enumerate(t.strings) if positions(s)] for t in batch.texts]
    elif _is_int(positions):
        single, words = int(cast(int, positions)), f"position {positions}"
        asked = [[single] for _ in batch.texts]
    elif isinstance(positions, Sequence | np.ndarray) and len(positions) and all(map(_is_int, positions)):
        chosen = [int(p) for p in positions]
        words = f"positions {', '.join(map(str, chosen))}"
        asked = [chosen for _ in batch.texts]
        single = chosen[0] if len(chosen) == 1 else None
    else:
        asked = _one_by_one(positions, batch)
        words = "tokens chosen one by one"
    return _rows(asked, batch, single, words)


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool | np.bool_)


def _one_by_one(positions: Any, batch: Batch) -> list[list[int]]:
    if not isinstance(positions, Sequence | np.ndarray) or len(positions) != len(batch):
        found = f"{len(positions)} entries" if hasattr(positions, "__len__") else type(positions).__name__
        raise InputError(
            f"Found positions with {found} for {len(batch)} texts; expected 'last', 'all', whole numbers, a function of "
            "a token's string, or for each text its positions or a boolean per token."
        )
    asked = []
    for i, (own, n) in enumerate(zip(positions, batch.lengths, strict=True)):
        values = list(own)
        if values and all(isinstance(v, bool | np.bool_) for v in values):
            if len(values) != n:
                raise InputError(f"positions of text {i}: {len(values)} booleans for {n} tokens.")
            asked.append([k for k, v in enumerate(values) if v])
        elif all(map(_is_int, values)):
            asked.append([int(v) for v in values])
        else:
            raise InputError(
                f"positions of text {i}: expected whole numbers or a boolean per token, found {values[:5]!r}."
            )
    return asked


def _rows(asked: list[list[int]], batch: Batch, single: int | None, words: str) -> Places:
    text, pos, position = [], [], []
    for i, (own, n) in enumerate(zip(asked, batch.lengths, strict=True)):
        outside = [p for p in own if not -n <= p < n]
        if outside:
            raise InputError(f"Position {outside[0]} is outside text {i} of {n} tokens, 0 to {n - 1}.")
        if len({p % n for p in own}) != len(own):
            raise InputError(f"positions of text {i}: {own[:8]} name a token of its {n} twice.")
        text += [i] * len(own)
        pos += [p % n for p in own]
        position += own
    if not text:
        raise InputError(f"No token was chosen ({words}) in {len(batch)} texts.")
    rows, at, asked_at = (np.asarray(v, dtype=np.int64) for v in (text, pos, position))
    return Places(rows, at, asked_at, single, words)


def groups_of(batch: Batch, groups: Sequence[Hashable] | None = None) -> np.ndarray:
    """The group of each text: texts that must not be told apart by a split, because one gives the other away.

    Two texts are in one group if the user says so, if their token ids are the same, or if they are the same words
    but for case and blanks; and so are texts that a chain of these connects.

    Args:
        batch: the texts.
        groups: the user's word, one for each text; texts of one document or one template share it.

    Returns:
        Group numbers from 0, in the order of their first text.

    Raises:
        InputError: there are not as many groups as texts, or one is missing.
    """
    if groups is not None and len(groups) != len(batch):
        raise InputError(f"Found {len(groups)} groups for {len(batch)} texts; expected one for each.")
    if groups is not None and any(g is None or g != g for g in groups):
        raise InputError("A group is missing (None or NaN). Give every text one, or leave groups out.")
    parent = list(range(len(batch)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[Hashable, int] = {}
    for i, text in enumerate(batch.texts):
        own: list[Hashable] = [("ids", text.ids), ("words", " ".join("".join(text.strings).split()).casefold())]
        own += [] if groups is None else [("group", groups[i])]
        for key in own:
            a, b = root(seen.setdefault(key, i)), root(i)
            parent[max(a, b)] = min(a, b)
    roots = np.array([root(i) for i in range(len(batch))])
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)
