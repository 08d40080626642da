"""The reducer that looks at one position of each text, and what its logits say of two answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .base import Field, Reads, Reducer, Rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AtPosition(Reducer):
    """The activation at one position of each text, in float32; at `logits` no other position is projected.

    Args:
        position: counted from the start of each text, or negative from its end.
    """

    position: int = -1
    reads: ClassVar[Reads] = "rows"

    def fields(self) -> Mapping[str, Field]:
        """One array, `value`."""
        return {"value": Field(("text", "d_model"), "activation", "the activation at the position")}

    def measure(self, piece: Rows) -> Mapping[str, torch.Tensor]:
        """One row per text.

        Raises:
            InputError: a text has no such position.
        """
        return {"value": piece.at(self.position).float()}

    def memory_bytes(self, n_tokens: int, n_heads: int, d_model: int) -> int:
        """Four bytes per entry, for one text."""
        return 4 * d_model


def read_answers(
    logits: np.ndarray, right: np.ndarray, wrong: np.ndarray, reference: np.ndarray
) -> dict[str, np.ndarray]:
    """What next-token distributions say of a right and a wrong answer; float64, axis text.

    Args:
        logits: axes text, vocab.
        right: token id of the right answer of each text.
        wrong: token id of the wrong answer of each text.
        reference: log-probabilities of the distribution that each text is compared with; axes text, vocab.

    Returns:
        `logit_diff` (right minus wrong), `logprob_nats` and `prob` of the right answer, and `kl_nats`,
        KL(reference ‖ this distribution), arXiv 2309.16042, section 2.
    """
    rows = np.arange(len(logits))
    log_p = log_softmax(logits)
    known = np.exp(reference)
    return {
        "logit_diff": logits[rows, right].astype(np.float64) - logits[rows, wrong],
        "logprob_nats": log_p[rows, right],
        "prob": np.exp(log_p[rows, right]),
        "kl_nats": np.maximum((known * (reference - log_p)).sum(axis=-1), 0.0),
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
