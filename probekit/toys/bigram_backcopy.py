"""The Bigram-Backcopy task: text that follows character bigrams, except after triggers, where it copies backwards.

A sequence begins with `<s>`; its first character comes from the character frequencies without the triggers. After a
character that is no trigger, the next is drawn from the bigram table; after a trigger it is the character before the
trigger. So a model needs attention after triggers, and needs it nowhere else: what a head then does with the attention
that it cannot switch off is the question of arXiv 2410.13835, section 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np

from probekit.core import Batch, InputError, TokenText

BOS = "<s>"
BOS_ID = 0


@dataclass(frozen=True)
class BigramBackcopy:
    """The task, as a source of sequences that knows the best prediction at each of their positions.

    Ids: 0 is `<s>`, 1 to 65 are the characters of tiny-shakespeare, the most frequent first. The triggers are the
    first `n_triggers` of them: space, "e" and "t" for 3.

    Args:
        n_triggers: how many of the most frequent characters are triggers.
    """

    n_triggers: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.n_triggers <= 32:
            raise InputError(f"n_triggers must be between 0 and 32, found {self.n_triggers}.")

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token, `<s>` first."""
        return (BOS, *_table()["characters"])

    @property
    def triggers(self) -> tuple[int, ...]:
        """Ids of the triggers."""
        return tuple(range(1, self.n_triggers + 1))

    @cached_property
    def next_probs(self) -> np.ndarray:
        """Probability of each token after a token that is no trigger, and after `<s>`; axes token, next token; float64.

        The rows of triggers are their bigrams, which the task does not use.
        """
        table = _table()
        unigrams, bigrams = np.array(table["unigrams"], float), np.array(table["bigrams"], float)
        first = np.where(np.arange(1, len(unigrams) + 1) > self.n_triggers, unigrams, 0.0)
        counts = np.vstack([first, bigrams])
        probs = np.zeros((len(self.vocabulary), len(self.vocabulary)))
        probs[:, 1:] = counts / counts.sum(axis=1, keepdims=True)
        return probs

    def sample(self, n: int, length: int, seed: int | np.random.Generator) -> np.ndarray:
        """Fresh sequences; int64, axes sequence, position.

        Args:
            n: how many.
            length: tokens of each, `<s>` included.
            seed: of the draws, or a generator that goes on.
        """
        if n < 1 or length < 2:
            raise InputError(f"Expected at least 1 sequence of at least 2 tokens, found {n} of {length}.")
        draws = np.random.default_rng(seed).random((length - 1, n))
        ids = np.full((n, length), BOS_ID, dtype=np.int64)
        for t, u in enumerate(draws):
            now = ids[:, t]
            drawn = (u[:, None] >= self._cumulative[now]).sum(axis=1)
            ids[:, t + 1] = np.where(self.is_trigger(now), ids[:, t - 1], drawn)  # position 0 holds no trigger
        return ids

    @cached_property
    def _cumulative(self) -> np.ndarray:
        """Cumulative `next_probs`, whose last entries are exactly 1, so that no draw lies beyond."""
        cumulative = self.next_probs.cumsum(axis=1)
        return cumulative / cumulative[:, -1:]

    def is_trigger(self, ids: np.ndarray) -> np.ndarray:
        """Which tokens are triggers; the shape of `ids`."""
        return (ids > BOS_ID) & (ids <= self.n_triggers)

    def oracle(self, ids: np.ndarray) -> np.ndarray:
        """The distribution of the next token given everything before it; axes of `ids` and the next token.

        Args:
            ids: axes sequence, position; each sequence from its `<s>` on.
        """
        probs = self.next_probs[ids]
        at = np.nonzero(self.is_trigger(ids))
        probs[at] = np.eye(len(self.vocabulary))[ids[at[0], at[1] - 1]]
        return probs

    def oracle_nats(self, ids: np.ndarray) -> np.ndarray:
        """Entropy of the next token, the least loss there is: 0 at triggers, that of the bigram row elsewhere."""
        p = self.next_probs
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)
        return np.where(self.is_trigger(ids), 0.0, entropy[ids])

    def batch(self, ids: np.ndarray) -> Batch:
        """Sequences as texts that a model runs; `<s>` is theirs already."""
        words = self.vocabulary
        texts = tuple(TokenText(tuple(map(int, row)), tuple(words[i] for i in row)) for row in ids)
        return Batch(texts, "always", begins=f"{BOS!r} (id {BOS_ID}) in front of every text")


@dataclass(frozen=True)
class Losses:
    """What a model loses on the task, in nats per token; NaN where the sequences have no such position.

    Args:
        icl: cross-entropy at triggers, whose next token is certain: the oracle's is 0.
        markov: KL(bigram row ‖ model) at characters that are no trigger: the excess over the oracle there.
        excess: KL(oracle ‖ model) over all positions, `<s>` included: the excess risk.
    """

    icl: float
    markov: float
    excess: float


def losses(task: BigramBackcopy, ids: np.ndarray, logits: np.ndarray) -> Losses:
    """Losses of a model on some sequences; expectations over the next token are exact, not sampled.

    Args:
        task: the task.
        ids: what the model read; axes sequence, position.
        logits: what it answered; axes sequence, position, next token.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    log_q = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    excess = -(task.oracle(ids) * log_q).sum(axis=-1) - task.oracle_nats(ids)
    trigger = task.is_trigger(ids)
    rest = ~trigger & (ids != BOS_ID)
    return Losses(_mean(excess[trigger]), _mean(excess[rest]), _mean(excess))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _table() -> dict[str, Any]:
    """Counts of characters and of neighbouring characters."""
    return json.loads((files("probekit.toys") / "bigrams.json").read_text(encoding="utf-8"))
