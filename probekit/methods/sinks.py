"""Attention sinks in numbers: which keys are sinks, how that depends on length, and texts made to probe it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from math import hypot

import numpy as np
import xarray as xr

from probekit.core import Batch, Capture, Forward, ModelInfo, Request, Trace
from probekit.reduce import AttentionStats, ReceivedWithin
from probekit.stats import Estimate

from .sink_levels import runs

KINDS = ("natural", "random", "repeated")
WITH_BOS = " with BOS"  # after a kind: the same texts behind a beginning-of-sequence token
UNIFORM = "uniform attention"
SHORTEST = 8  # tokens; the sweep over lengths begins here
STATS = Capture("pattern", AttentionStats())


def within(n_tokens: int) -> Capture:
    """What keys receive when each text is cut to its first tokens."""
    return Capture("pattern", ReceivedWithin(n_tokens))


def windows_of(trace: Trace, n_tokens: int) -> np.ndarray:
    """What `within` found, by text; axes text, layer, head, key."""
    received = trace[within(n_tokens)]["received"].values
    return np.stack([received[..., start : start + n_tokens] for start in trace.batch.starts])


def sinks_of(received: np.ndarray, epsilon: float, tail: int) -> dict[str, np.ndarray]:
    """Whether position 0, any key, and any key but position 0 receives more than `epsilon`, strictly.

    Args:
        received: mean attention received, last axis key, of whole texts of as many tokens.
        epsilon: the threshold.
        tail: last keys that do not count, position 0 excepted: every query sees it.

    Returns:
        "first", "any" and "other"; the axes of `received` without the last.
    """
    hit = received > epsilon
    first, other = hit[..., 0], np.asarray(hit[..., 1 : max(1, hit.shape[-1] - tail)].any(axis=-1))
    return {"first": first, "any": first | other, "other": other}


def uniform_received(n_tokens: int) -> np.ndarray:
    """What each key receives under A[q, k] = 1 / (q + 1): the mean of 1 / (q + 1) over q from k on; axis key.

    Position 0 receives H_T / T, later keys less.
    """
    share = 1 / np.arange(1, n_tokens + 1)
    return np.cumsum(share[::-1])[::-1] / np.arange(n_tokens, 0, -1)


def sweep_lengths(shortest: int) -> list[int]:
    """8, 16, 32, … up to the shortest text."""
    return [2**i for i in range(SHORTEST.bit_length() - 1, shortest.bit_length()) if 2**i <= shortest]


def first_received(first_share: np.ndarray, seen: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """What position 0 receives if a text is cut to its first tokens: causal attention leaves earlier rows alone.

    Args:
        first_share: each query's attention on position 0; axes layer, head, token of one text.
        seen: queries of the text that see position 0, its first ones; axis layer.
        lengths: T, how many tokens are left.

    Returns:
        Mean over the queries below T that see position 0; axes length, layer, head.
    """
    total = np.cumsum(first_share, axis=-1, dtype=np.float64)
    return np.stack([total[..., t - 1] / np.minimum(seen, t)[:, None] for t in lengths])


def by_length(trace: Trace, epsilon: float) -> xr.Dataset:
    """Sink_1 and alpha_0 of every text for T = 8, 16, 32, … up to the shortest text.

    Args:
        trace: holds `STATS`.
        epsilon: the threshold.

    Returns:
        `sink_rate_by_length`, `received_by_length` and `uniform_by_length`; the axis `query` has the last position
        of the cut text, T - 1.
    """
    first, seen = (trace[STATS][name].values for name in ("first_share", "seen"))
    lengths = sweep_lengths(min(trace.batch.lengths))
    found = [
        first_received(first[..., start : start + n], seen[:, start], lengths)
        for start, n in zip(trace.batch.starts, trace.batch.lengths, strict=True)
    ]
    return xr.Dataset(
        {
            "sink_rate_by_length": (("text", "query"), [100 * (alpha > epsilon).mean((1, 2)) for alpha in found]),
            "received_by_length": (("text", "query"), [alpha.mean((1, 2)) for alpha in found]),
            "uniform_by_length": ("query", [uniform_received(t)[0] for t in lengths]),
        },
        coords={"query": np.array(lengths) - 1},
    )


def made_texts(
    batch: Batch, info: ModelInfo, *, n: int, n_tokens: int, seed: int
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Token ids of natural, random and repeated texts of one length, each also behind a beginning-of-sequence token.

    A text and its twin behind the token (which takes the place of the last one) are at the same place of their
    cases. Random tokens are drawn independently and uniformly from all ids but that of the beginning-of-sequence
    token, rows with which a vocabulary is padded included; a repeated text is one such draw.

    Args:
        batch: the natural texts; up to `n`, evenly spread. A beginning-of-sequence token in front of them does not
            count as part of the text.
        info: the model, for the size of its vocabulary and the token.
        n: texts of each case.
        n_tokens: T; one less where a natural text without its beginning-of-sequence token is that short.
        seed: of the draws.

    Returns:
        By case: `KINDS`, and the same followed by `WITH_BOS` if the model has such a token.
    """
    bos, some = info.bos_id, min(n, len(batch))
    own = [batch.texts[i * len(batch) // some].ids for i in range(some)]
    natural = [ids[1:] if ids[0] == bos else ids for ids in own]
    n_tokens = min(n_tokens, *map(len, natural))
    rng = np.random.default_rng(seed)
    bodies: dict[str, Sequence[Sequence[int]] | np.ndarray] = {
        "natural": [ids[:n_tokens] for ids in natural],
        "random": _draw(rng, info, (n, n_tokens)),
        "repeated": np.repeat(_draw(rng, info, (n, 1)), n_tokens, axis=1),
    }
    texts = {kind: tuple(tuple(map(int, ids)) for ids in bodies[kind]) for kind in KINDS}
    if bos is None:
        return texts
    return texts | {kind + WITH_BOS: tuple((bos, *ids[:-1]) for ids in texts[kind]) for kind in KINDS}


def _draw(rng: np.random.Generator, info: ModelInfo, shape: tuple[int, int]) -> np.ndarray:
    """Ids, uniform over the vocabulary without the beginning-of-sequence token."""
    if info.bos_id is None:
        return rng.integers(info.d_vocab, size=shape)
    ids = rng.integers(info.d_vocab - 1, size=shape)
    return ids + (ids >= info.bos_id)


def read_made(texts: Mapping[str, tuple[tuple[int, ...], ...]]) -> Generator[Request, Trace, dict[str, np.ndarray]]:
    """What keys of made texts receive; by case, axes sample, layer, head, key."""
    inputs = tuple(ids for some in texts.values() for ids in some)
    n_tokens = len(inputs[0])
    why = "made texts: random and repeated tokens, with and without beginning-of-sequence token"
    trace = yield Forward((within(n_tokens),), inputs=inputs, why=why)
    ends = np.cumsum([len(some) for some in texts.values()])
    return dict(zip(texts, np.split(windows_of(trace, n_tokens), ends[:-1]), strict=True))


def made_rates(received: Mapping[str, np.ndarray], epsilon: float, tail: int) -> xr.Dataset:
    """Rates in percent of (layer, head) pairs for each case and text, and over depth for each case.

    Args:
        received: by case; axes sample, layer, head, key, the keys of a whole text.
        epsilon: the threshold.
        tail: last keys that do not count, position 0 excepted.
    """
    found = {case: sinks_of(alpha, epsilon, tail) for case, alpha in received.items()}
    most = max(len(alpha) for alpha in received.values())
    rates = {
        key: [
            np.pad(100 * hit[key].mean((1, 2)), (0, most - len(hit[key])), constant_values=np.nan)
            for hit in found.values()
        ]
        for key in ("first", "other")
    }
    return xr.Dataset(
        {
            "made_rate": (("case", "sample"), np.stack(rates["first"])),
            "made_rate_other": (("case", "sample"), np.stack(rates["other"])),
            "made_rate_by_layer": (
                ("case", "layer"),
                np.stack([100 * h["first"].mean((0, 2)) for h in found.values()]),
            ),
        },
        coords={"case": np.array(list(received), dtype=object)},
    )


def difference(a: Estimate, b: Estimate, n_unit: str) -> Estimate:
    """The difference of two independent means; half-widths add as squares, which is no narrower than Welch's interval.

    Without an interval where one of them has none. n is that of the smaller sample.
    """
    n = min(a.n, b.n)
    if a.ci95 is None or b.ci95 is None:
        return Estimate(a.value - b.value, None, n, n_unit)
    half = hypot(*((e.ci95[1] - e.ci95[0]) / 2 for e in (a, b) if e.ci95 is not None))
    return Estimate(a.value - b.value, (a.value - b.value - half, a.value - b.value + half), n, n_unit)


def sink_phases(rates: np.ndarray, least: float = 0.25) -> list[tuple[int, int]]:
    """Runs of at least two consecutive layers in which more than `least` of the heads have a sink.

    Args:
        rates: share of heads with a sink at position 0, axis layer.
        least: share from which a layer belongs to a phase.
    """
    return [(first, end - 1) for first, end in runs(rates > least)]


def entropy_without_first(entropy: xr.DataArray, first: xr.DataArray) -> xr.DataArray:
    """Entropy of attention rows after removing position 0 and renormalising, from entropy and share alone.

    Rows that leave less than a thousandth to all other keys are NaN: dividing by it would turn the rounding of
    float32 attention into hundredths of a nat.
    """
    rest = 1 - first
    safe = rest.where(rest > 1e-3)
    return (entropy + xr.where(first > 0, first * np.log(first.where(first > 0, 1)), 0)) / safe + np.log(safe)
