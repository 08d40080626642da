"""What is said about sticky tokens: claims with their numbers, each as the arguments of a finding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from probekit.stats import text_mean, wilson

from .sticky import outlier_cut
from .sticky_attention import SPLITS, farthest
from .sticky_choice import BENIGN_TRIED, CANDIDATE, RANDOM, STICKY_TRIED, strongest, tested
from .sticky_harm import difference

Said = dict[str, Any]
_LISTED, _PLACES = 12, 40


def said(data: xr.Dataset, word: Callable[[int], str], level: float) -> list[Said]:
    """All findings, the tokens to strip first.

    Args:
        data: what `sticky-tokens` found.
        word: how a token is written.
        level: of the test against random tokens.
    """
    return [
        strip(data, word, level), rule(data), *both_sides(data), *harm(data), *attention(data, word), survival(data),
        vocabulary(data),
    ]  # fmt: skip


def by_p(data: xr.Dataset, chosen: np.ndarray) -> list[int]:
    """Chosen tokens, the largest p first."""
    p = data["p"].values
    return [int(i) for i in sorted(np.flatnonzero(chosen), key=lambda i: (-p[i], i))]


def interval(data: xr.Dataset, token: int) -> tuple[float, float]:
    """Wilson's interval of a token's p, pairs as draws."""
    n = int(data["n_pairs"])
    return wilson(round(float(data["p"].values[token]) * n), n)


def strip(data: xr.Dataset, word: Callable[[int], str], level: float) -> Said:
    """The sticky tokens, and those that only the published rule calls so."""
    sticky, published, p = (data[name].values for name in ("sticky", "published", "p"))
    strong, weak = by_p(data, sticky == 1), by_p(data, (published == 1) & (sticky == 0))
    listed = ", ".join(f"{word(i)} p = {p[i]:.3f}" for i in strong[:_LISTED])
    more = f" and {len(strong) - _LISTED} more" if len(strong) > _LISTED else ""
    others = ", ".join(f"{word(i)} {p[i]:.3f}" for i in weak[:_LISTED])
    rest = f" Above the published cut, but no further than a random token may lie: {others}." if weak else ""
    claim = f"Sticky; strip these from user input: {listed}{more}."
    k, n = len(strong), int(tested(data["asked"].values).sum())
    ends = {i: interval(data, i) for i in (strong + weak)[:_PLACES]}
    return {
        "claim": (claim if strong else "No token is sticky beyond random tokens.") + rest,
        "value": k / n, "unit": "share of validated tokens", "null": level / n,
        "null_meaning": "random tokens called by the same test", "ci95": wilson(k, n), "n": n, "n_unit": "tokens",
        "quantity": "validated tokens that are sticky",
        "where": {str(i): f"p {p[i]:.3f}, 95 % {low:.3f} to {high:.3f}" for i, (low, high) in ends.items()},
    }  # fmt: skip


def rule(data: xr.Dataset) -> Said:
    """What the published rule returns, of candidates and of random tokens."""
    asked, p, cut = data["asked"].values, data["p"].values, float(data["cut"])
    candidates, random = p[asked == CANDIDATE], p[asked == RANDOM]
    k, n, own = int((candidates > cut).sum()), len(candidates), outlier_cut(random)
    above = int((random > cut).sum())
    return {
        "claim": f"The published rule returns {k} of {n} candidates (p above {cut:.3f}). {above} of {len(random)} random "
        f"tokens lie above that cut; the rule within them returns {int((random > own).sum())}.",
        "value": k / n, "unit": "share of candidates", "null": float((random > own).mean()),
        "null_meaning": "the rule within random tokens", "ci95": wilson(k, n), "n": n, "n_unit": "tokens",
        "quantity": "candidates that the published rule returns",
    }  # fmt: skip


def both_sides(data: xr.Dataset) -> list[Said]:
    """Whether the strongest candidates bring similarities near u from both sides; nothing if no pair lies above u."""
    asked, value, variance = (data[name].values for name in ("asked", "two_sided", "variance_ratio"))
    if not np.isfinite(value).any():
        return []
    best, random = strongest(data["p"].values, asked), asked == RANDOM
    found, null = text_mean(value[best], "tokens"), float(value[random].mean())
    nearer = "nearer to it than" if found.ci95 is not None and found.ci95[1] < null else "no nearer to it than"
    return [
        {
            "claim": f"On pairs from both sides of u = {float(data['similarity']):.4f}, the {len(best)} candidates of "
            f"largest p leave {found.value:.2f} of the distance to u (random tokens: {null:.2f}) and "
            f"{variance[best].mean():.2f} of the variance ({variance[random].mean():.2f}); they bring similarities "
            f"{nearer} random tokens do.",
            "value": found.value, "unit": "× without tokens", "null": null,
            "null_meaning": "random tokens, as many copies", "ci95": found.ci95, "n": found.n, "n_unit": found.n_unit,
            "quantity": "distance to u that the strongest candidates leave",
        }
    ]  # fmt: skip


def harm(data: xr.Dataset) -> list[Said]:
    """Retrieval and clustering with the strongest candidates, minus the same with benign tokens."""
    tried = data["tried"].values
    names = {
        "retrieval": ("in the queries, {0:.1%} of the four nearest sentences are of the query's topic; with benign "
                      "tokens {1:.1%}, without tokens {2:.1%}.", "share of neighbours"),
        "clustering": ("in all sentences, k-means finds their topics with a v-measure of {0:.3f}; with benign tokens "
                       "{1:.3f}, without tokens {2:.3f} (shuffled topics: {3:.3f}).", "v-measure"),
    }  # fmt: skip
    found = []
    for name, (text, unit) in names.items():
        benign, sticky = (data[name].values[tried == kind] for kind in (BENIGN_TRIED, STICKY_TRIED))
        value, ci95 = difference(sticky, benign)
        numbers = sticky.mean(), benign.mean(), float(data[f"{name}_without"]), float(data["clustering_chance"])
        found.append(
            {
                "claim": f"With one of the {len(sticky)} strongest candidates {text.format(*numbers)}",
                "value": value, "unit": unit, "null": 0.0, "null_meaning": "candidates harm as much as benign tokens",
                "ci95": ci95, "n": 1 if ci95 is None else len(sticky) + len(benign), "n_unit": "tokens",
                "where": {"measure": name, "interval": "Welch, over tokens"},
                "quantity": f"{name}, strongest candidates minus benign tokens",
            }
        )  # fmt: skip
    return found


def attention(data: xr.Dataset, word: Callable[[int], str]) -> list[Said]:
    """The layer at which candidates and benign tokens differ most, as a multiple of what two random groups do.

    Nothing where the model shows no attention, or too few tokens stay themselves.
    """
    from scipy.stats import t

    w1, null, top = (data[f"attention_w1{name}"].values for name in ("", "_null", "_null_95"))
    if not (np.isfinite(w1).all() and np.isfinite(null).all()):
        return []
    layer = farthest(w1, null)
    _, benign, sticky = data["received"].values[:, layer]
    n = int(data["attention_tokens"])
    half = float(t.ppf(0.975, n - 2)) * float(data["attention_w1_error"].values[layer])
    k = round(float(data["attention_p"]) * (SPLITS + 1)) - 1
    verdict = "lies beyond" if w1[layer] > top[layer] else "lies within"
    own = data["received_there"].values
    most = sorted(np.flatnonzero((data["tried"].values == STICKY_TRIED) & np.isfinite(own)), key=lambda i: -own[i])
    listed = ", ".join(f"{word(int(i))} {own[i]:.3f}" for i in most)
    few = " The interval over tokens includes the null: few of the tokens bring it about."
    return [
        {
            "claim": f"Attention paid to one appended copy: the strongest candidates differ most from benign tokens at "
            f"layer {layer}, where they receive {sticky:.3f} on average ({listed}), benign tokens {benign:.3f}. "
            f"The distance, {w1[layer]:.4f}, {verdict} the 95 % quantile between groups of random tokens there, "
            f"{top[layer]:.4f}; {k} of {SPLITS} pairs of random groups differ as much at some layer."
            + (few if verdict == "lies beyond" and w1[layer] - half <= null[layer] else ""),
            "value": float(w1[layer]), "unit": "Wasserstein-1 of attention", "null": float(null[layer]),
            "null_meaning": "two groups of random tokens, median",
            "ci95": (max(0.0, w1[layer] - half), w1[layer] + half), "n": n, "n_unit": "tokens",
            "where": {"layer": layer, "interval": "jackknife over tokens"},
            "quantity": "attention paid to candidates against benign tokens",
        }
    ]  # fmt: skip


def survival(data: xr.Dataset) -> Said:
    """How often an inserted copy stays itself."""
    chosen = tested(data["asked"].values)
    kept, added = text_mean(data["survival"].values[chosen], "tokens"), data["added"].values[chosen].mean()
    return {
        "claim": f"{kept.value:.0%} of the inserted copies are still the token after tokenising; a copy adds "
        f"{added:.2f} tokens.",
        "value": kept.value, "unit": "share of copies", "null": 1.0,
        "null_meaning": "no copy merges with its neighbours", "ci95": kept.ci95, "n": kept.n, "n_unit": kept.n_unit,
        "quantity": "inserted copies that stay the token",
    }  # fmt: skip


def vocabulary(data: xr.Dataset) -> Said:
    """Usable tokens, u, and why attention was not compared."""
    usable, n, u = int(data["usable"].values.sum()), data["usable"].size, float(data["similarity"])
    missing = str(data["attention_missing"].values)
    return {
        "claim": f"{usable:,} of {n:,} ids are usable tokens; the spellings of the vocabulary have a mean similarity "
        f"of u = {u:.5f}." + (f" Attention was not compared: {missing}" if missing else ""),
        "value": u, "unit": "cosine", "null": 0.0, "null_meaning": "directions drawn at random", "ci95": None, "n": 1,
        "n_unit": "vocabulary", "quantity": "mean similarity of the vocabulary's spellings",
    }  # fmt: skip
