"""Continuations of every plausible token, and what an answer is like inside, as one labelled table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probekit.core import Base, Batch, Capture, Fork, TokenText, Trace, token_coords
from probekit.reduce import AttentionStats, NextToken, Readout

from .change_points import find_changes
from .forks import OTHER, Alternative, ForkMap, Position, distance
from .rounds import Draws

NEXT = Capture("logits", NextToken(20))
LENS = Capture("resid_post", Readout(1))
SINKS = Capture("pattern", AttentionStats())
MOST_ODDS = 1e12
Tried = dict[tuple[int, int], tuple[int, ...]]


def plausible_tokens(bases: list[Base], inside: Trace, p_min: float, spacing: int) -> Tried:
    """Tokens that are tried at each position of each answer, its own first; positions that are not looked at have one."""
    ids, logprob = inside[NEXT]["top_id"].values, inside[NEXT]["top_logprob"].values
    found: Tried = {}
    for i, base in enumerate(bases):
        for at in range(base.n_prompt, len(base.ids)):
            row, own = inside.batch.starts[i] + at - 1, base.ids[at]
            likely = ids[row][logprob[row] > np.log(p_min)].tolist() if (at - base.n_prompt) % spacing == 0 else []
            found[i, at] = (own, *(int(t) for t in likely if t != own))
    return found


def _probs(inside: Trace, row: int, tokens: tuple[int, ...]) -> list[float]:
    """Probabilities of tokens after a row; the first is the one that follows, which need not be among the likeliest."""
    shown = inside[NEXT].isel(token=row)
    known = dict(zip(shown["top_id"].values.tolist(), np.exp(shown["top_logprob"].values.astype(float)), strict=True))
    own = float(np.exp(shown["logprob_nats"].values))
    return [own, *(float(known[t]) for t in tokens[1:])]


@dataclass(frozen=True)
class Explored:
    """Answers, and what came of the tokens that could have stood in them.

    Args:
        bases: prompts with their answers.
        said: what each answer says.
        inside: a pass over the bases with the captures `NEXT`, `LENS` and `SINKS`.
        tried: tokens that were tried at each position of each answer, its own first.
        draws: continuations of each of them, where there is more than one.
    """

    bases: list[Base]
    said: list[str | None]
    inside: Trace
    tried: Tried
    draws: Draws


def fork_table(explored: Explored, epsilon: float) -> xr.Dataset:
    """Everything that forking-paths measures, on a token axis that holds the answers only.

    Args:
        explored: answers and continuations.
        epsilon: distance from which an alternative forks.
    """
    bases, said, inside = explored.bases, explored.said, explored.inside
    tried, draws = explored.tried, explored.draws
    maps = {i: _map(i, inside, tried, draws) for i in range(len(bases))}
    cases = list(dict.fromkeys(c for m in maps.values() if m is not None for c in m.categories))
    cases += [c for c in dict.fromkeys(s or OTHER for s in said) if c not in cases]
    cases = [c for c in cases if c != OTHER] + [OTHER] * (OTHER in cases)
    rows = np.concatenate([inside.batch.starts[i] + np.arange(b.n_prompt, len(b.ids)) for i, b in enumerate(bases)])
    texts = tuple(
        TokenText(b.ids[b.n_prompt :], t.strings[b.n_prompt :]) for b, t in zip(bases, inside.batch, strict=True)
    )
    batch = Batch(texts)
    along = {name: np.zeros(batch.n_tokens) for name in ("sampled", "drift", "hazard", "survival", "change")}
    shares, odds = np.zeros((batch.n_tokens, len(cases))), np.zeros(len(bases))
    for i, base in enumerate(bases):
        here = slice(batch.starts[i], batch.starts[i] + batch.lengths[i])
        odds[i] = _along(along, shares[here], here, maps[i], cases, (said[i] or OTHER, base.n_prompt, epsilon))
    next_, lens = inside[NEXT], inside[LENS]
    branches = _branches(bases, maps, cases, batch, inside)
    return xr.Dataset(
        {
            "outcome_share": (("token", "case"), shares),
            **{name: ("token", values) for name, values in along.items()},
            "change_odds": ("text", np.minimum(odds, MOST_ODDS)),
            "probability": ("token", np.exp(next_["logprob_nats"].values[rows - 1].astype(float))),
            "entropy_nats": ("token", next_["entropy_nats"].values[rows - 1]),
            "lens_logprob_nats": (("layer", "token"), lens["logprob_nats"].values[:, rows - 1]),
            "sink_share": (("layer", "token"), inside[SINKS]["first_share"].values[:, :, rows - 1].mean(axis=1)),
            **branches,
            "vocab_str": inside.vocab_table(),
            "answer_case": ("text", [cases.index(s or OTHER) for s in said]),
        },
        coords=token_coords(batch) | {"case": np.array(cases, dtype=object), "layer": lens["layer"].values},
    )


def _map(i: int, inside: Trace, tried: Tried, draws: Draws) -> ForkMap | None:
    positions = []
    for (text, at), tokens in tried.items():
        if text == i and len(tokens) > 1:
            probs = _probs(inside, inside.batch.starts[i] + at - 1, tokens)
            found = [tuple(c.outcome for c in draws[Fork(i, at, t)]) for t in tokens]
            positions.append(
                Position(at, tuple(Alternative(t, p, o) for t, p, o in zip(tokens, probs, found, strict=True)))
            )
    return ForkMap(tuple(positions)) if positions else None


def _along(
    along: dict[str, np.ndarray],
    shares: np.ndarray,
    here: slice,
    forks: ForkMap | None,
    cases: list[str],
    answer: tuple[str, int, float],
) -> float:
    """Fill in one text's numbers along its tokens; the odds of a change."""
    said, n_prompt, epsilon = answer
    n = len(shares)
    shares[:, cases.index(said)] = 1.0  # after the last fork, the answer takes its course
    if forks is None:
        along["survival"][here] = 1.0
        return 0.0
    measured = [p.index - n_prompt for p in forks.positions]
    where = [cases.index(c) for c in forks.categories]
    before = 0
    for row, at in zip(forks.distributions, measured, strict=True):
        shares[before : at + 1] = 0.0
        shares[before : at + 1, where] = row
        before = at + 1
    hazard = np.zeros(n)
    hazard[measured] = forks.hazard(epsilon)
    changes = find_changes(forks.counts())
    posterior = np.zeros(n)
    posterior[measured] = changes.posterior
    sampled = np.zeros(n)
    sampled[measured] = 1.0
    drift = np.array([distance(shares[0], row, "l2") for row in shares])
    for name, values in zip(
        ("sampled", "drift", "hazard", "survival", "change"),
        (sampled, drift, hazard, np.cumprod(1 - hazard), posterior),
        strict=True,
    ):
        along[name][here] = values
    return changes.odds


def _branches(
    bases: list[Base], maps: dict[int, ForkMap | None], cases: list[str], batch: Batch, inside: Trace
) -> dict[str, tuple[Any, Any]]:
    rows: dict[str, list[Any]] = {n: [] for n in ("share", "place", "id", "prob", "n", "distance", "half")}
    for i, forks in maps.items():
        for position in forks.positions if forks is not None else ():
            assert forks is not None
            shares = np.zeros((len(position.alternatives), len(cases)))
            shares[:, [cases.index(c) for c in forks.categories]] = forks.branch(position)
            for one, share in zip(position.alternatives, shares, strict=True):
                rows["share"].append(share)
                rows["place"].append(batch.starts[i] + position.index - bases[i].n_prompt)
                rows["id"].append(one.token)
                rows["prob"].append(one.prob)
                rows["n"].append(len(one.outcomes))
                rows["distance"].append(distance(shares[0], share, "l2"))
                rows["half"].append(_halves(one, forks.categories))
    n = len(rows["id"])
    dims: dict[str, Any] = {"share": ("branch", "case")}
    names = {"half": "half_distance", "share": "branch_share", "place": "branch_place", "id": "branch_id"}
    names |= {"prob": "branch_prob", "n": "branch_n", "distance": "branch_distance"}
    kinds = {"place": np.int64, "id": np.int64, "n": np.int64}
    return {
        names[k]: (
            dims.get(k, "branch"),
            np.array(v, dtype=kinds.get(k, float)).reshape(n, *([len(cases)] * (k == "share"))),
        )
        for k, v in rows.items()
    }


def _halves(one: Alternative, categories: tuple[str, ...]) -> float:
    """Distance between the outcomes of even and odd continuations."""
    if len(one.outcomes) < 4:
        return float("nan")
    named = [c for c in categories if c != OTHER]
    parts = []
    for half in (one.outcomes[::2], one.outcomes[1::2]):
        share = [sum(o == c for o in half) / len(half) for c in named]
        parts.append(np.array([*share, 1 - sum(share)]))
    return distance(parts[0], parts[1], "l2")
