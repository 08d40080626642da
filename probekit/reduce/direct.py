"""The reducer of direct logit attribution: how far an activation points along the difference of two logits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np

from probekit.core import Batch, InputError

from .base import Field, Reads, Reducer

if TYPE_CHECKING:
    import torch

Pair = Literal["top", "target", "random"]


@dataclass(frozen=True)
class DirectRows:
    """Activations of one layer with the direction that the rest of the model reads as a logit difference.

    Args:
        values: axes token, d_model.
        directions: by pair of tokens, axes token, d_model; NaN at tokens without such a pair.
    """

    values: torch.Tensor
    directions: Mapping[Pair, torch.Tensor]


@dataclass(frozen=True)
class LogitDirection(Reducer):
    """What an activation adds to the difference between two logits at its token, the final norm's scale frozen.

    The inner product, summed in float64, with the direction that the final norm (its gain and centring, divided by the
    scale that the model found at this token) and the unembedding read as the first token's logit minus the second's.
    At `logits` it is what the biases of both add. Whatever follows the unembedding (a factor, a soft-cap) is taken at
    the slope between the two logits, so that the parts still add up to what the model returns.

    Args:
        pair: the two tokens: "top", the model's likeliest and second likeliest; "target", the token that follows and
            the likeliest other one (NaN at the end of a text); "random", two of the vocabulary, the same ones
            whenever the same text runs.
    """

    pair: Pair = "top"
    reads: ClassVar[Reads] = "direct"

    def __post_init__(self) -> None:
        if self.pair not in get_args(Pair):
            raise InputError(f"A pair of tokens is one of {', '.join(get_args(Pair))}; found {self.pair!r}.")

    def fields(self) -> Mapping[str, Field]:
        """One array, `projection`."""
        return {"projection": Field(("token",), "logits", "what it adds to the logit difference of two tokens")}

    def measure(self, piece: DirectRows) -> Mapping[str, torch.Tensor]:
        """Inner products."""
        return {"projection": (piece.values.double() * piece.directions[self.pair]).sum(-1).float()}

    def memory_bytes(self, n_tokens: int, n_heads: int, d_model: int) -> int:
        """Four bytes per token."""
        return 4 * n_tokens


def pair_ids(pair: Pair, top_id: np.ndarray, batch: Batch, d_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """The two tokens whose logits are compared at each token of a batch.

    Args:
        pair: as in `LogitDirection`.
        top_id: ids of the likeliest next tokens; axes token, rank.
        batch: the texts.
        d_vocab: size of the vocabulary.

    Returns:
        Ids that count for and against, axis token; -1 where there is no such pair.
    """
    first, second = top_id[:, 0].astype(np.int64), top_id[:, 1].astype(np.int64)
    if pair == "top":
        return first, second
    if pair == "target":
        plus = batch.next_ids
        return plus, np.where(plus < 0, -1, np.where(plus == first, second, first))
    drawn = np.concatenate([_random_pairs(t.ids, d_vocab) for t in batch], axis=1)
    return drawn[0], drawn[1]


def _random_pairs(ids: tuple[int, ...], d_vocab: int) -> np.ndarray:
    digest = hashlib.sha256(repr(ids).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    plus = rng.integers(0, d_vocab, len(ids))
    return np.stack([plus, (plus + rng.integers(1, d_vocab, len(ids))) % d_vocab])
