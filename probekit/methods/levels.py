"""Tokens by entropy on a fixed ladder of levels: what the highest share holds, and means in tenths, as sums that add up.

Order statistics of all tokens need all tokens; counts on a ladder from 0 to ln V do not. Within a level tokens count as
spread evenly, in every unit alike, so that a share is cut exactly and results change smoothly.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from probekit.stats import Estimate, both_units, estimate, moments

N_LEVELS = 1024
_AT_ONCE = 512  # units whose ladders are held together


def ladder(entropy: np.ndarray, surprisal: np.ndarray, texts: np.ndarray, pos: np.ndarray, limit: float) -> xr.Dataset:
    """Sums over tokens by level of entropy, and what lies above each level, by texts and by blocks.

    Args:
        entropy: in nats, axis token.
        surprisal: NaN where unknown, axis token.
        texts: text index of each token.
        pos: position of each token within its text.
        limit: the largest entropy, ln V.
    """
    level = np.clip((entropy * (N_LEVELS / limit)).astype(int), 0, N_LEVELS - 1)
    known = np.isfinite(surprisal)

    def at(weights: np.ndarray, which: np.ndarray) -> np.ndarray:
        return np.bincount(level[which], weights[which].astype(float), N_LEVELS)

    every, ones = np.ones_like(known), np.ones(len(entropy))
    above = [_above(level, entropy.astype(float), unit) for unit in both_units(texts, pos)]
    return xr.Dataset(
        {
            "level_tokens": ("bin", at(ones, every)),
            "level_known": ("bin", at(ones, known)),
            "level_entropy": ("bin", at(entropy, known)),
            "level_surprisal": ("bin", at(surprisal, known)),
            **{name: (("unit", "bin"), np.stack([a[name] for a in above])) for name in above[0] if name != "all"},
            "entropy_all": (("unit", "moment"), np.stack([a["all"] for a in above])),
        }
    )


def _above(level: np.ndarray, entropy: np.ndarray, unit: np.ndarray) -> dict[str, np.ndarray]:
    """Sums over units of the entropy A that each holds from a level on, of A², A times all W of it, A times the next A."""
    n = int(unit.max(initial=-1)) + 1
    whole = np.bincount(unit, entropy, n)
    sums = {name: np.zeros(N_LEVELS) for name in ("above", "above_by_all", "above_squared", "above_by_next")}
    order = np.argsort(unit, kind="stable")
    edges = np.searchsorted(unit[order], np.arange(0, n + _AT_ONCE, _AT_ONCE))
    for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        some, first = order[a:b], i * _AT_ONCE
        rows = min(_AT_ONCE, n - first)
        flat = np.bincount((unit[some] - first) * N_LEVELS + level[some], entropy[some], rows * N_LEVELS)
        held = np.cumsum(flat.reshape(rows, N_LEVELS)[:, ::-1], axis=1)[:, ::-1]
        sums["above"] += held.sum(0)
        sums["above_by_all"] += whole[first : first + rows] @ held
        sums["above_squared"] += (held**2).sum(0)
        sums["above_by_next"][:-1] += (held[:, :-1] * held[:, 1:]).sum(0)
    return sums | {"all": moments(whole, whole)}


def top_share(found: xr.Dataset, share: float) -> tuple[Estimate, float, float]:
    """The part of all entropy that the tokens of highest entropy hold, their exact share, and their least entropy's level.

    Args:
        found: from `ladder`.
        share: of the tokens; at least one token counts.
    """
    tokens = found["level_tokens"].values
    n = float(tokens.sum())
    n_high = max(1.0, round(share * n))
    from_here = np.cumsum(tokens[::-1])[::-1]
    j = int(np.flatnonzero(from_here >= n_high)[-1])  # the level in which the last of them lies
    more = from_here[j + 1] if j + 1 < N_LEVELS else 0.0
    f = (n_high - more) / tokens[j]

    def mixed(of: np.ndarray) -> np.ndarray:
        return np.asarray(f * of[:, j] + (1 - f) * (of[:, j + 1] if j + 1 < N_LEVELS else 0.0))

    squared, by_next = found["above_squared"].values, found["above_by_next"].values[:, j]
    after = squared[:, j + 1] if j + 1 < N_LEVELS else 0.0
    spread = f**2 * squared[:, j] + (1 - f) ** 2 * after + 2 * f * (1 - f) * by_next
    every = found["entropy_all"].values
    held, by_all = mixed(found["above"].values), mixed(found["above_by_all"].values)
    made = np.stack([every[:, 0], every[:, 1], held, every[:, 3], by_all, spread], axis=-1)
    return estimate(made), n_high / n, j / N_LEVELS


def tenths(found: xr.Dataset, n_bins: int) -> dict[str, xr.DataArray]:
    """Mean entropy and surprisal in parts of equally many tokens, from sure to unsure, over tokens with a known next one."""
    count = np.concatenate([[0], np.cumsum(found["level_known"].values)])
    n = int(count[-1])
    n_bins = min(n_bins, n)
    edges = np.concatenate([[0], np.cumsum([n // n_bins + (i < n % n_bins) for i in range(n_bins)])])
    bins = (np.arange(n_bins) + 0.5) / n_bins
    means = {}
    for name in ("entropy", "surprisal"):
        total = np.interp(edges, count, np.concatenate([[0], np.cumsum(found[f"level_{name}"].values)]))
        means[f"binned_{name}_nats"] = xr.DataArray(np.diff(total) / np.diff(edges), {"bin": bins}, ["bin"])
    return means
