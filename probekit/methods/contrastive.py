"""What the contrast of two models says of tokens, and where a text's answer begins."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from probekit.core import Base, Request, TextError, TokenText

from .two_models import log_softmax, logits_of

_ROWS = 64  # rows of logits that are widened to float64 together


def scored(base: Base, beta: float) -> Generator[Request, Any, np.ndarray]:
    """What the models in the roles "positive" and "negative" say of an answer; to be used with `yield from`.

    Args:
        base: a prompt with its answer.
        beta: weight of the contrast.

    Returns:
        As `contrasted`, for the tokens of the answer.
    """
    positive = yield from logits_of(base.ids, "positive", "what the positive model says")
    negative = yield from logits_of(base.ids, "negative", "what the negative model says")
    rows = slice(base.n_prompt - 1, len(base.ids) - 1)
    return contrasted(positive[rows], negative[rows], np.array(base.ids[base.n_prompt :]), beta)


def contrasted(positive: np.ndarray, negative: np.ndarray, targets: np.ndarray, beta: float) -> np.ndarray:
    """What two models say of tokens, and what their contrast says.

    The score of token y is softmax((1 + beta) z_positive - beta z_negative)[y] over the whole vocabulary.

    Args:
        positive: logits of one model; axes token, vocab. -inf marks what cannot be.
        negative: logits of the other.
        targets: the token that each row is about.
        beta: weight of the contrast.

    Returns:
        Logarithms of the score, p_positive, p_negative, and the score with the models exchanged, in nats and float64;
        axes these four, token.
    """
    found = np.empty((4, len(targets)))
    for start in range(0, len(targets), _ROWS):
        here = slice(start, start + _ROWS)
        pos, neg = positive[here].astype(np.float64), negative[here].astype(np.float64)
        for i, logits in enumerate((_contrast(pos, neg, beta), pos, neg, _contrast(neg, pos, beta))):
            found[i, here] = np.take_along_axis(log_softmax(logits), targets[here, None], axis=-1)[:, 0]
    return found


def _contrast(one: np.ndarray, other: np.ndarray, beta: float) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        mixed = (1 + beta) * one - beta * other
    return np.where(np.isneginf(one), -np.inf, mixed)


def answer_begins(text: TokenText, after: str, where: str) -> int:
    """The first token that lies wholly behind the first occurrence of some words.

    Args:
        text: a prompt with its answer.
        after: the words that end the prompt.
        where: what the text is called in messages.

    Raises:
        TextError: the words do not occur, or nothing follows them.
    """
    whole = "".join(text.strings)
    at = whole.find(after)
    if at < 0:
        raise TextError(f"{where} does not contain {after!r}, after which its answer should begin.")
    ends = np.cumsum([len(s) for s in text.strings])
    begins = int(np.searchsorted(np.concatenate([[0], ends[:-1]]), at + len(after)))
    if begins >= len(text):
        raise TextError(f"{where} ends with {after!r}; an answer of at least one token is expected behind it.")
    return begins
