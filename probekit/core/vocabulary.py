"""What a tokenizer does with each of its ids, and the rows that a model keeps for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class VocabularyTable:
    """Every id of a tokenizer, decoded and encoded again.

    Args:
        pieces: how the vocabulary spells each id, markers of spaces and bytes included; "" for ids without a token.
        shown: what each id shows as to a reader.
        decoded: the text that each id alone decodes to, in the middle of a text.
        encoded: the ids that this text encodes to, in the middle of a text.
        special: whether the tokenizer treats the id as special.
    """

    pieces: tuple[str, ...]
    shown: tuple[str, ...]
    decoded: tuple[str, ...]
    encoded: tuple[tuple[int, ...], ...]
    special: np.ndarray

    def __len__(self) -> int:
        return len(self.pieces)


@dataclass(frozen=True)
class VocabularyWeights:
    """The rows that a model keeps for each id, in float32.

    Args:
        embedding: what each id is read as; axes vocab, d_model.
        unembedding: what each id's logit is read off with; axes vocab, d_model. The same array where they are tied.
        bias: added to each logit; axis vocab. None where there is none.
        tied: whether both are one matrix.
    """

    embedding: np.ndarray
    unembedding: np.ndarray
    bias: np.ndarray | None
    tied: bool
