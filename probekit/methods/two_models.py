"""What two models say of the same tokens."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from probekit.core import Capture, Forward, Request
from probekit.reduce import Keep

LOGITS = Capture("logits", Keep())


def logits_of(ids: tuple[int, ...], role: str, why: str) -> Generator[Request, Any, np.ndarray]:
    """One model's logits along one text; to be used with `yield from`.

    A comparison needs whole distributions side by side, so texts come one at a time: 4 bytes per token and entry of
    the vocabulary and model.

    Args:
        ids: the text.
        role: of the model that reads it.
        why: what for, in a few words.

    Returns:
        Logits in float32; axes token, vocab. Row t predicts token t + 1.
    """
    trace = yield Forward((LOGITS,), inputs=(ids,), model=role, why=why)
    return trace[LOGITS]["value"].values


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities along the last axis, in nats; sums are taken in float64.

    Args:
        logits: any shape; -inf marks what cannot be.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
