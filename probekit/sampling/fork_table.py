"""Continuations of every plausible token, and what an answer is like inside, as one labelled table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probekit.core import Base, Batch, Capture, Fork, InputError, Trace, token_coords
from probekit.reduce import Tempered

from .change_points import find_changes
from .forks import OTHER, Alternative, ForkMap, Position, distance
from .inside import NEXT, answers_only, inside_measures
from .rounds import Draws

MOST_ODDS = 1e12
Tried = dict[tuple[int, int], tuple[int, ...]]


def drawn_at(temperature: float) -> Capture:
    """What tells the probabilities of tokens at the temperature at which they are drawn.

    Raises:
        InputError: at temperature 0 nothing is drawn.
    """
    if temperature == 0:
        raise InputError("At temperature 0 only one token can follow, so nothing forks; give a temperature above 0.")
    return NEXT if temperature == 1 else Capture("logits", Tempered(temperature, 20))


def plausible_tokens(bases: list[Base], inside: Trace, at: Capture, *, p_min: float, spacing: int = 1) -> Tried:
    """Tokens that are tried at each position of each answer, its own first; positions that are not looked at have one.

    Args:
        bases: prompts with their answers.
        inside: a pass over them with the capture `at`.
        at: see `drawn_at`.
        p_min: least probability of a token.
        spacing: look at every n-th token.
    """
    ids, logprob = inside[at]["top_id"].values, inside[at]["top_logprob"].values
    found: Tried = {}
    for i, base in enumerate(bases):
        for place in range(base.n_prompt, len(base.ids)):
            row, own = inside.batch.starts[i] + place - 1, base.ids[place]
            looked_at = (place - base.n_prompt) % spacing == 0
            found[i, place] = likely_tokens(own, ids[row], logprob[row], p_min) if looked_at else (own,)
    return found


def likely_tokens(own: int, ids: np.ndarray, logprob: np.ndarray, p_min: float) -> tuple[int, ...]:
    """What could have stood in one place: the token itself first, then the others above `p_min`."""
    return (own, *(int(t) for t in ids[logprob > np.log(p_min)] if t != own))


def token_probs(inside: Trace, at: Capture, row: int, tokens: tuple[int, ...]) -> list[float]:
    """Probabilities of tokens after a row; the first is the one that follows, which need not be among the likeliest."""
    shown = inside[at].isel(token=row)
    known = dict(zip(shown["top_id"].values.tolist(), np.exp(shown["top_logprob"].values.astype(float)), strict=True))
    own = float(np.exp(shown["logprob_nats"].values))
    return [own, *(float(known[t]) for t in tokens[1:])]


@dataclass(frozen=True)
class Explored:
    """Answers, and what came of the tokens that could have stood in them.

    Args:
        bases: prompts with their answers.
        said: what each answer says.
        inside: a pass over the bases with the captures `INSIDE` and `at`.
        at: see `drawn_at`.
        tried: tokens that were tried at each position of each answer, its own first.
        draws: continuations of each of them, where there is more than one.
    """

    bases: list[Base]
    said: list[str | None]
    inside: Trace
    at: Capture
    tried: Tried
    draws: Draws


def fork_table(explored: Explored, epsilon: float) -> xr.Dataset:
    """Everything that forking-paths measures, on a token axis that holds the answers only.

    Args:
        explored: answers and continuations.
        epsilon: distance from which an alternative forks.
    """
    bases, said, inside = explored.bases, explored.said, explored.inside
    maps = {i: _map(i, explored) for i in range(len(bases))}
    cases = list(dict.fromkeys(c for m in maps.values() if m is not None for c in m.categories))
    cases += [c for c in dict.fromkeys(s or OTHER for s in said) if c not in cases]
    cases = [c for c in cases if c != OTHER] + [OTHER] * (OTHER in cases)
    batch, rows = answers_only(bases, inside)
    along = {name: np.zeros(batch.n_tokens) for name in ("sampled", "drift", "hazard", "survival", "change")}
    shares, odds = np.zeros((batch.n_tokens, len(cases))), np.zeros(len(bases))
    for i, base in enumerate(bases):
        here = slice(batch.starts[i], batch.starts[i] + batch.lengths[i])
        odds[i] = _along(along, shares[here], here, maps[i], cases, (said[i] or OTHER, base.n_prompt, epsilon))
    branches = _branches(bases, maps, cases, batch, inside)
    return xr.Dataset(
        {
            "outcome_share": (("token", "case"), shares),
            **{name: ("token", values) for name, values in along.items()},
            "change_odds": ("text", np.minimum(odds, MOST_ODDS)),
            **inside_measures(inside, rows),
            **branches,
            "answer_case": ("text", [cases.index(s or OTHER) for s in said]),
        },
        coords=token_coords(batch) | {"case": np.array(cases, dtype=object), "layer": np.arange(inside.info.n_layers)},
    )


def _map(i: int, explored: Explored) -> ForkMap | None:
    inside, positions = explored.inside, []
    for (text, place), tokens in explored.tried.items():
        if text == i and len(tokens) > 1:
            probs = token_probs(inside, explored.at, inside.batch.starts[i] + place - 1, tokens)
            found = [tuple(c.outcome for c in explored.draws[Fork(i, place, t)]) for t in tokens]
            positions.append(
                Position(place, tuple(Alternative(t, p, o) for t, p, o in zip(tokens, probs, found, strict=True)))
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
    changes = find_changes(forks.course())
    posterior = np.zeros(n + 1)
    posterior[[measured[0], *(at + 1 for at in measured)]] = changes.posterior  # in between, the next one's holds
    sampled = np.zeros(n)
    sampled[measured] = 1.0
    drift = np.array([distance(shares[0], row, "l2") for row in shares])
    for name, values in zip(
        ("sampled", "drift", "hazard", "survival", "change"),
        (sampled, drift, hazard, np.cumprod(1 - hazard), posterior[:n]),
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
