"""Texts as token ids, laid end to end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

BosPolicy = Literal["model", "always", "never"]
Chat = bool | str  # whether texts are user turns of a chat; a string is the system message


@dataclass(frozen=True)
class TokenText:
    """One tokenised text.

    Args:
        ids: the exact token ids that run, a special first token included if there is one.
        strings: what each id shows as; the same length as `ids`.
        domain: the kind of text it is, such as "code", for analyses that compare kinds; "" if nobody said.
        answer: what a right answer to this prompt says, for analyses that tell right from wrong; "" if nobody said.
        text: the string it was made of; "" if nobody kept it.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    domain: str = ""
    answer: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.strings):
            raise ValueError(f"{len(self.ids)} ids but {len(self.strings)} strings")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Texts that run together. No padding lives here: texts lie end to end on one `token` axis.

    Args:
        texts: the tokenised texts.
        bos: whether a beginning-of-sequence token was added: as the tokenizer does it by default
            ("model"), "always" or "never".
        index: the place of each text in the corpus this batch was cut from.
        begins: whether texts begin with a beginning-of-sequence token, in words; "" if nobody looked.
        template: the chat template that was applied, in words; "" if none was.
    """

    texts: tuple[TokenText, ...]
    bos: BosPolicy = "model"
    index: tuple[int, ...] = field(default=())
    begins: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        if not self.index:
            object.__setattr__(self, "index", tuple(range(len(self.texts))))

    def __iter__(self) -> Iterator[TokenText]:
        return iter(self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per text."""
        return tuple(len(t) for t in self.texts)

    @property
    def n_tokens(self) -> int:
        """Tokens in all texts together."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each text begins on the token axis."""
        return tuple(int(s) for s in np.cumsum((0, *self.lengths))[:-1])

    @cached_property
    def ids(self) -> np.ndarray:
        """Token ids, int64, axis `token`."""
        return np.concatenate([np.zeros(0, np.int64), *(np.asarray(t.ids, dtype=np.int64) for t in self.texts)])

    @cached_property
    def pos(self) -> np.ndarray:
        """Position of each token within its text, int64, axis `token`."""
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(n, dtype=np.int64) for n in self.lengths)])

    @cached_property
    def text_of_token(self) -> np.ndarray:
        """Corpus index of the text each token belongs to, int64, axis `token`."""
        return np.repeat(np.asarray(self.index, dtype=np.int64), self.lengths)

    @cached_property
    def next_ids(self) -> np.ndarray:
        """Id of the token that follows, int64, axis `token`; -1 at the end of each text."""
        return np.concatenate([np.append(np.asarray(t.ids[1:], dtype=np.int64), -1) for t in self.texts])

    @cached_property
    def strings(self) -> tuple[str, ...]:
        """What each token shows as, axis `token`."""
        return tuple(s for t in self.texts for s in t.strings)

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """The kind of each text."""
        return tuple(t.domain for t in self.texts)

    def select(self, which: Sequence[int]) -> Batch:
        """The batch of some of these texts, which keep their corpus index."""
        texts, index = tuple(self.texts[i] for i in which), tuple(self.index[i] for i in which)
        return replace(self, texts=texts, index=index)

    def windows(self, size: int) -> Batch:
        """Each text cut into consecutive windows of exactly `size` tokens; shorter rests are dropped."""
        cut = [
            TokenText(t.ids[a : a + size], t.strings[a : a + size], t.domain, t.answer)
            for t in self.texts
            for a in range(0, len(t) - size + 1, size)
        ]
        return Batch(tuple(cut), self.bos, begins=self.begins, template=self.template)

    def openings(self, size: int) -> Batch:
        """The first `size` tokens of each text; shorter texts are left out."""
        cut = [replace(t, ids=t.ids[:size], strings=t.strings[:size], text="") for t in self.texts if len(t) >= size]
        return Batch(tuple(cut), self.bos, begins=self.begins, template=self.template)

    @cached_property
    def digest(self) -> str:
        """sha256 over the token ids and text boundaries; over the string of a text that was not tokenised."""
        return hashlib.sha256(repr([t.ids or t.text for t in self.texts]).encode()).hexdigest()
