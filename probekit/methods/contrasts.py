"""What steering works with: contrast pairs, layers and doses, and the direction that each pair is steered along."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit.core import Add, Batch, InputError, ModelInfo, Patch, Point, TextError

MIN_PAIRS = 4  # each pair is judged by a direction of at least three others
KINDS = ("random", "orthogonal")  # of controls


@dataclass(frozen=True)
class Roles:
    """Which rows of a batch are what.

    Args:
        pairs: row of the positive and of the negative text of each pair.
        neutral: rows of the neutral texts.
        first: for each row, the first position that counts: where its pair parts, and 1 at least.
    """

    pairs: tuple[tuple[int, int], ...]
    neutral: tuple[int, ...]
    first: tuple[int, ...]

    @classmethod
    def of(cls, batch: Batch, n_neutral: int) -> Roles:
        """The roles of texts in the order positive, negative, …, neutral, ….

        Raises:
            TextError: too few pairs, a positive text without a negative one, or a pair that does not contrast.
        """
        n = len(batch) - n_neutral
        told = f"{len(batch)} texts, of which the last {n_neutral} are neutral (n_neutral)"
        if n % 2:
            raise TextError(
                f"Found {told}: {max(n, 0)} are left for contrast pairs, an odd number. Give texts as positive, "
                "negative, positive, negative, …, then the neutral ones, and say with n_neutral how many those are."
            )
        if n < 2 * MIN_PAIRS:
            raise TextError(
                f"Found {told}: {max(n, 0) // 2} contrast pairs; steering needs at least {MIN_PAIRS}, since each pair "
                "is judged by the direction of the others. Give more pairs, or fewer neutral texts."
            )
        pairs = tuple((i, i + 1) for i in range(0, n, 2))
        parts = [max(_parting(batch, *pair), 1) for pair in pairs]
        return cls(pairs, tuple(range(n, len(batch))), (*np.repeat(parts, 2).tolist(), *([1] * n_neutral)))

    def mean_logprobs(self, logprob: np.ndarray, batch: Batch) -> np.ndarray:
        """Mean over each text's tokens from its first position on; axis text.

        Args:
            logprob: log-probability of the token that follows each token, nats; axis token.
            batch: all texts.
        """
        ends = zip(batch.starts, batch.lengths, self.first, strict=True)
        return np.array([logprob[start + first - 1 : start + n - 1].astype(float).mean() for start, n, first in ends])

    def contrast(self, values: np.ndarray) -> np.ndarray:
        """Positive minus negative; axis text becomes pair."""
        rows = np.array(self.pairs)
        return np.asarray(values[rows[:, 0]] - values[rows[:, 1]])


def _parting(batch: Batch, a: int, b: int) -> int:
    """The first position at which two texts differ; refuses texts of which one begins with the other."""
    one, two = batch.texts[a].ids, batch.texts[b].ids
    differ = [t for t, (x, y) in enumerate(zip(one, two, strict=False)) if x != y]
    if not differ:
        what = "are the same" if one == two else "differ in length only, one begins with the other"
        raise TextError(
            f"Texts {a} and {b}, a contrast pair, {what}: {''.join(batch.texts[a].strings)[:60]!r}. "
            "A pair needs a positive and a negative continuation; give texts as positive, negative, …, then neutral."
        )
    return differ[0]


def chosen_layers(layers: str, info: ModelInfo) -> tuple[int, ...]:
    """Block numbers from a parameter such as "8,15,-1"; the quarters of the depth if it is empty.

    Raises:
        InputError: it holds something else, or a layer outside the model.
    """
    if not layers.strip():
        return tuple(sorted({info.n_layers * quarter // 4 for quarter in (1, 2, 3)}))
    try:
        found = [int(part) for part in layers.split(",")]
    except ValueError:
        raise InputError(f"steering: layers={layers!r}; expected block numbers with commas, such as 8,15.") from None
    return tuple(sorted({info.require(Point("resid_post", layer))[0] for layer in found}))


def chosen_doses(doses: str) -> tuple[float, ...]:
    """Doses of both signs and 0, ascending, from a parameter such as "0.5,1".

    Raises:
        InputError: it holds something else than positive numbers.
    """
    try:
        found = sorted({float(part) for part in doses.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < dose < np.inf for dose in found):
        raise InputError(f"steering: doses={doses!r}; expected positive numbers with commas, such as 0.5,1.")
    return (*(-dose for dose in reversed(found)), 0.0, *found)


class AtLayer:
    """The directions at one layer, of unit length: from the other pairs for each pair, and from all for neutral texts.

    Args:
        resid: residual stream; axes token, d_model.
        batch: all texts.
        roles: which texts are what.
        position: where the direction is read: "last" token, or "mean" over the continuation.
        n_controls: control directions of each kind.
        seed: seed of the control directions.
    """

    def __init__(
        self, resid: np.ndarray, batch: Batch, roles: Roles, position: str, n_controls: int, seed: int
    ) -> None:
        resid = resid.astype(float)
        self.median_norm = float(np.median(np.linalg.norm(resid, axis=-1)))
        ends = zip(batch.starts, batch.lengths, roles.first, strict=True)
        last = position == "last"
        rows = [resid[start + (n - 1 if last else first) : start + n].mean(axis=0) for start, n, first in ends]
        self._at = np.stack(rows)[: 2 * len(roles.pairs)].reshape(-1, 2, resid.shape[-1])  # pair sign d_model
        own = self._at[:, 0] - self._at[:, 1]
        self.direction = own.mean(axis=0)
        others = np.concatenate([_of_others(own), own.sum(axis=0)[None]])
        steer = self._unit(others)  # pair (and all pairs, at the end), d_model
        self.agreement = (_normed(own) * steer[:-1]).sum(axis=-1)
        digests = [batch.texts[i].ids for pair in roles.pairs for i in pair]
        draws = _rng(seed, 0, "random").normal(size=(n_controls, resid.shape[-1]))
        random = [np.broadcast_to(_normed(draw), steer.shape) for draw in draws]
        weights = [np.array([_rng(seed, k, ids).normal() for ids in digests]).reshape(-1, 2) for k in range(n_controls)]
        self.units = [steer, *random, *(self._unit(self._orthogonal(w, steer)) for w in weights)]

    def _orthogonal(self, weights: np.ndarray, steer: np.ndarray) -> np.ndarray:
        """Random combinations of the others' centred activations, without their part along the direction."""
        n = 2 * (len(self._at) - 1)
        summed, total = (weights[..., None] * self._at).sum(axis=1), self._at.sum(axis=1)
        others = _of_others(summed) - _of_others(weights.sum(axis=1))[:, None] * _of_others(total) / n
        everyone = summed.sum(axis=0) - weights.sum() * total.sum(axis=0) / (n + 2)
        found = np.concatenate([others, everyone[None]])
        return np.asarray(found - (found * steer).sum(axis=-1, keepdims=True) * steer)

    def _unit(self, vectors: np.ndarray) -> np.ndarray:
        if np.linalg.norm(vectors, axis=-1).min() < 1e-6 * self.median_norm:
            raise TextError(
                "The activations of the contrast pairs leave no direction: their differences cancel, or the texts "
                "differ along a single line. Check that positive texts come first in every pair, and give pairs "
                "with more varied wording."
            )
        return _normed(vectors)

    def patches(self, layer: int, which: int, dose: float, batch: Batch, roles: Roles) -> tuple[Patch, ...]:
        """What adds direction `which` at a dose: to each pair its own, to the neutral texts that of all pairs."""
        units = self.units[which].astype(np.float32)
        to = [*roles.pairs, *([roles.neutral] if roles.neutral else [])]
        return tuple(
            Patch(("resid_post", layer), Add(unit, dose * self.median_norm), texts=[batch.index[row] for row in rows])
            for unit, rows in zip(units, to, strict=False)
        )


def _of_others(values: np.ndarray) -> np.ndarray:
    """For each pair, the sum over all other pairs; first axis pair."""
    return np.asarray(values.sum(axis=0) - values)


def _normed(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30))


def _rng(seed: int, draw: int, what: Any) -> np.random.Generator:
    """Random numbers that belong to a text, whatever its place among the texts."""
    digest = hashlib.sha256(repr((seed, draw, what)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
