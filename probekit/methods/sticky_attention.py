"""What the tokens of a sentence pay to a token that is appended to it, by layer: sticky tokens beside benign ones."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probekit.core import AttentionColumns, Columns, Request, Tokenize, VocabularyTable

from .sentences import built_in

SPLITS = 39  # pairs of groups of random tokens; the 38th distance in order is their 95 % quantile
_BINS, _EPSILON = 30, 1e-10
_PART = 1024  # texts of one request


@dataclass(frozen=True)
class Received:
    """Attention that appended tokens receive.

    Args:
        values: by token, the columns of all its texts; axes layer and entry (one per head and query, texts end to end).
        n_texts: texts that were looked at.
        n_left_out: texts left out, since the token is none of its own there.
        missing: why the model shows no attention, if it shows none.
    """

    values: dict[int, np.ndarray]
    n_texts: int
    n_left_out: int
    missing: str = ""

    def pooled(self, tokens: Sequence[int], layer: int) -> np.ndarray:
        """All entries of some tokens at one layer."""
        return np.concatenate([self.values[t][layer] for t in tokens])


def place_of(token: int, ids: Sequence[int], without: Sequence[int], behind: int) -> int | None:
    """The position of a token that was appended to a text; None where tokenising made something else of it.

    Args:
        token: its id.
        ids: of the text with it, special tokens included.
        without: of the text without it.
        behind: special tokens that follow the text.
    """
    at = len(ids) - 1 - behind
    as_it_was = at >= 0 and (*ids[:at], *ids[at + 1 :]) == tuple(without)
    return at if as_it_was and ids[at] == token else None


def specials_behind(special: Sequence[int], plain: Sequence[int]) -> int:
    """How many special tokens follow a text.

    Args:
        special: ids with special tokens.
        plain: ids without.
    """
    n = len(special) - len(plain)
    first = next((i for i in range(n + 1) if tuple(special[i : i + len(plain)]) == tuple(plain)), n)
    return n - first


def received(tokens: Sequence[int], table: VocabularyTable) -> Generator[Request, Any, Received]:
    """The attention that each token receives when it is appended, once and without a space, to the built-in sentences.

    Args:
        tokens: ids, each once.
        table: what their text is.
    """
    sentences = built_in()[0]
    special = yield Tokenize(sentences, special=True)
    plain = yield Tokenize(sentences)
    behind = [specials_behind(a, b) for a, b in zip(special, plain, strict=True)]
    texts = [s + table.decoded[t] for t in tokens for s in sentences]
    found = yield Tokenize(tuple(texts), special=True)
    each = len(sentences)
    at = [place_of(tokens[i // each], ids, special[i % each], behind[i % each]) for i, ids in enumerate(found)]
    kept = [i for i, place in enumerate(at) if place is not None]
    parts: dict[int, list[np.ndarray]] = {}
    for start in range(0, len(kept), _PART):
        rows = kept[start : start + _PART]
        some = tuple(texts[i] for i in rows), tuple(at[i] or 0 for i in rows)
        columns: AttentionColumns = yield Columns(*some, optional=True, total=len(kept), why="attention")
        if columns.missing:
            return Received({}, 0, 0, columns.missing)
        for n, i in enumerate(rows):
            column = columns.of(n)
            parts.setdefault(tokens[i // each], []).append(column.reshape(len(column), -1))
    values = {t: np.concatenate(columns, axis=1) for t, columns in parts.items()}
    return Received(values, len(kept), len(texts) - len(kept))


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein-1 distance of two samples, in their unit."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(a, b))


def histogram_kl_nats(a: np.ndarray, b: np.ndarray) -> float:
    """KL(a ‖ b) in nats of two samples' densities in 30 equal bins from the least to the largest of both.

    1e-10 is added to each density before they are scaled to sum to one (as in the released notebook), so that a bin
    that only `a` reaches counts by about the logarithm of 1e10.
    """
    ends = min(a.min(), b.min()), max(a.max(), b.max())
    if ends[0] == ends[1]:
        return 0.0
    shares = [np.histogram(x, _BINS, ends, density=True)[0] + _EPSILON for x in (a, b)]
    p, q = (s / s.sum() for s in shares)
    return max(0.0, float((p * np.log(p / q)).sum()))


def compared(
    found: Received, groups: tuple[np.ndarray, np.ndarray, np.ndarray], *, n_layers: int, n_vocab: int, seed: int = 0
) -> xr.Dataset:
    """Sticky beside benign tokens at every layer, and as many random tokens beside others.

    The null is the same distance between two disjoint groups of random tokens of the same sizes, for 39 splits of those
    there are; splits share tokens, so that they are not independent. The standard error is that of a jackknife over the
    tokens of both groups. `attention_p` holds the layers together: the share of splits (the comparison itself counted
    as one) whose largest distance over layers, each as a multiple of the median of its layer, is as large.

    Args:
        found: what the tokens receive.
        groups: random, benign and sticky tokens.
        n_layers: of the model.
        n_vocab: ids of the vocabulary.
        seed: of the splits.

    Returns:
        Everything on the axis layer is NaN where there are fewer than two tokens on a side, or no attention; the null
        also where there are too few random tokens.
    """
    random, benign, sticky = ([int(t) for t in group if int(t) in found.values] for group in groups)
    two = sticky, benign
    w1, error, kl = (np.full(n_layers, np.nan) for _ in range(3))
    if min(len(benign), len(sticky)) > 1:
        w1, kl = _between(found, two, n_layers)
        error = np.sqrt(sum(_jackknife(found, two, side, n_layers) for side in (0, 1)))
    sizes, rng = (len(sticky), len(benign)), np.random.default_rng([seed, 4])
    splits, means = np.full((SPLITS, 2, n_layers), np.nan), np.full((SPLITS, n_layers), np.nan)
    if np.isfinite(w1).all() and len(random) >= sum(sizes):
        for i in range(SPLITS):
            order = rng.permutation(random)
            halves = list(order[: sizes[0]]), list(order[sizes[0] : sum(sizes)])
            splits[i] = _between(found, halves, n_layers)
            means[i] = _mean(found, halves[0], n_layers)
    mean = np.array([_mean(found, group, n_layers) for group in (random, benign, sticky)])
    null = np.median(splits[:, 0], axis=0)
    top = np.sort(splits, axis=0)[int(np.ceil(0.95 * (SPLITS + 1))) - 1]
    own = np.full(n_vocab, np.nan)
    if np.isfinite(null).all():
        layer = farthest(w1, null)
        own[list(found.values)] = [columns[layer].mean() for columns in found.values.values()]
    by_layer = {
        "attention_w1": w1, "attention_w1_error": error, "attention_w1_null": null, "attention_w1_null_95": top[0],
        "attention_kl_nats": kl, "attention_kl_null_95_nats": top[1],
        "received_low": np.quantile(means, 0.025, axis=0), "received_high": np.quantile(means, 0.975, axis=0),
    }  # fmt: skip
    return xr.Dataset(
        {
            "received": (("case", "layer"), mean),
            "received_there": ("vocab", own),
            **{name: ("layer", values) for name, values in by_layer.items()},
            "attention_p": ((), _largest_over_layers(w1, splits[:, 0])),
            "attention_tokens": ((), len(benign) + len(sticky)),
            "attention_texts": ((), found.n_texts),
            "attention_left_out": ((), found.n_left_out),
            "attention_missing": ((), np.array(found.missing, dtype=object)),
        },
        coords={"layer": np.arange(n_layers)},
    )


def multiples(w1: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Distances as multiples of the median of the splits at their layer; 0 where both are 0.

    Args:
        w1: last axis layer.
        splits: axes split, layer.
    """
    null = np.median(splits, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(w1 == 0, 0.0, w1 / null))


def farthest(w1: np.ndarray, null: np.ndarray) -> int:
    """The layer whose distance is the largest multiple of the median of its splits."""
    return int(multiples(w1, null[None]).argmax())


def _largest_over_layers(w1: np.ndarray, splits: np.ndarray) -> float:
    if not (np.isfinite(w1).all() and np.isfinite(splits).all()):
        return float("nan")
    reach = multiples(splits, splits).max(axis=-1)
    return float((1 + (reach >= multiples(w1, splits).max()).sum()) / (1 + len(reach)))


def _between(found: Received, groups: Sequence[Sequence[int]], n_layers: int) -> np.ndarray:
    """Wasserstein-1 and KL of two groups; axes measure, layer."""
    pairs = [(found.pooled(groups[0], layer), found.pooled(groups[1], layer)) for layer in range(n_layers)]
    return np.array([[wasserstein(a, b) for a, b in pairs], [histogram_kl_nats(a, b) for a, b in pairs]])


def _jackknife(found: Received, groups: Sequence[Sequence[int]], side: int, n_layers: int) -> np.ndarray:
    """Variance of the Wasserstein distance that the tokens of one side bring about; axis layer."""
    own, n = groups[side], len(groups[side])
    left = [[t for t in own if t != out] for out in own]
    both = [(some, groups[1]) if side == 0 else (groups[0], some) for some in left]
    values = np.array(
        [
            [wasserstein(found.pooled(a, layer), found.pooled(b, layer)) for layer in range(n_layers)]
            for a, b in both
        ]
    )  # fmt: skip
    return np.asarray((n - 1) * values.var(axis=0))


def _mean(found: Received, tokens: Sequence[int], n_layers: int) -> np.ndarray:
    if not len(tokens):
        return np.full(n_layers, np.nan)
    return np.array([found.pooled(tokens, layer).mean() for layer in range(n_layers)])
