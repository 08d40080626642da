"""Texts in pairs, clean then corrupted, compared position by position."""

from __future__ import annotations

import numpy as np

from .errors import TextError
from .text import Batch


def first_differences(batch: Batch) -> list[int]:
    """First position at which the two texts of each pair differ; the shorter one's length where they do not."""
    pairs = zip(batch.texts[::2], batch.texts[1::2], strict=True)
    shared = [[a == b for a, b in zip(clean.ids, corrupted.ids, strict=False)] for clean, corrupted in pairs]
    return [same.index(False) if False in same else len(same) for same in shared]


def partners(batch: Batch) -> np.ndarray:
    """For each token, the place of the same position in the other text of its pair; int64, axis token."""
    shift = np.repeat(batch.lengths, batch.lengths)
    other = np.where(np.repeat(np.arange(len(batch)), batch.lengths) % 2, -1, 1)
    return np.arange(batch.n_tokens) + other * shift


def check_pairs(batch: Batch, who: str, *, with_answer: bool) -> None:
    """Refuse texts that are no pairs of equal length with different prompts.

    Args:
        batch: clean, corrupted, clean, corrupted, …
        who: the analysis that reads them.
        with_answer: whether the last token of each text is its answer, which then differs within a pair.

    Raises:
        TextError: an odd number of texts, or a pair that cannot be compared; shows where it differs.
    """
    if len(batch) % 2:
        raise TextError(
            f"{who} reads pairs of texts (clean, corrupted, clean, corrupted, …); found {len(batch)} "
            f"text{'s' * (len(batch) != 1)}. Give an even number."
        )
    for i, first in enumerate(first_differences(batch)):
        clean, corrupted = batch.texts[2 * i : 2 * i + 2]
        named = f"Texts {batch.index[2 * i]} (clean) and {batch.index[2 * i + 1]} (corrupted)"
        if len(clean) != len(corrupted):
            raise TextError(
                f"{named} have {len(clean)} and {len(corrupted)} tokens; positions are compared one to one, so the two "
                f"need equally many. From position {first} on they read {list(clean.strings[first : first + 6])} and "
                f"{list(corrupted.strings[first : first + 6])}. Choose words of equally many tokens."
            )
        if with_answer and clean.ids[-1] == corrupted.ids[-1]:
            raise TextError(
                f"{named} both end with the answer {clean.strings[-1]!r}. The clean text ends with the right answer "
                "and the corrupted one with the wrong answer; or leave answers out and set answers='predicted'."
            )
        if first >= len(clean) - with_answer:
            raise TextError(f"{named} have the same prompt: there is nothing to patch. Change some of its tokens.")
