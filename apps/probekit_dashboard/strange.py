"""What is known of strange tokens, as plain tables: cards, candidates, sticky tokens. No streamlit here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

import probekit as pk
from probekit import plots

SAMPLE = 1500  # ordinary tokens of the scatter
MOST = 1200  # of any other group
LISTED = 5000  # candidates of a table
CATEGORIES = (
    "ok", "ok, special", "unreachable, looks special", "undecodable", "unreachable, becomes another token",
    "unreachable, becomes several tokens", "no token",
)  # fmt: skip


def spelling(card: pk.TokenCard) -> pd.DataFrame:
    """How a token is written, and what becomes of its text."""
    ids = ", ".join(f"{i} {plots.visible(s)}" for i, s in zip(card.encodes_to, card.encodes_shown, strict=True))
    rows = {
        "id": str(card.token),
        "shows as": plots.visible(card.shown),
        "piece": plots.visible(card.piece) or "(no token)",
        "bytes": card.bytes_hex or "not known",
        "category": card.category + ("; special to the tokenizer" if card.special else ""),
        "encodes to": ids or "nothing",
    }
    return pd.DataFrame({"what": list(rows), "value": list(rows.values())})


def numbers(card: pk.TokenCard) -> pd.DataFrame:
    """Norms and indicators, with their place among the ordinary tokens."""
    return pd.DataFrame({
        "number": list(card.numbers),
        "value": [n.value for n in card.numbers.values()],
        "percentile": [n.percentile for n in card.numbers.values()],
    })  # fmt: skip


def neighbours(card: pk.TokenCard) -> pd.DataFrame:
    """Tokens whose unembedding rows point the same way."""
    return pd.DataFrame({
        "neighbour": [plots.visible(n.shown) for n in card.neighbours],
        "id": [n.token for n in card.neighbours],
        "cosine": [n.cosine for n in card.neighbours],
    })  # fmt: skip


def verdict(card: pk.TokenCard) -> str:
    """What stands out of a card, in a sentence; a percentile is a place, not a test."""
    low = [f"{name} (percentile {n.percentile:.1f})" for name, n in card.numbers.items() if n.percentile <= 2]
    if not card.numbers:
        return "This model does not show the rows of its weights as a language model does; only the spelling is known."
    if not low:
        return (
            "None of its numbers is among the smallest 2 % of the ordinary tokens: nothing in its weights is strange."
        )
    return f"Among the smallest 2 % of the ordinary tokens by {', '.join(low)}. Small distances from never-trained rows are suspicious."


def chosen_indicator(result: pk.Result) -> tuple[str, np.ndarray]:
    """The indicator that ranks, and its values; axis vocab."""
    data = result.dataset
    place = int(data["chosen"])
    return str(data["case"].values[place]), data["indicator"].values[place]


def written(result: pk.Result) -> np.ndarray:
    """Largest probability of each token where it should be repeated; NaN where it was not asked for; axis vocab."""
    values = result.dataset["written"].values
    known = np.isfinite(values).any(axis=0)
    return np.where(known, np.where(np.isfinite(values), values, -1).max(axis=0), np.nan)


def candidates(result: pk.Result, containing: str = "") -> pd.DataFrame:
    """Candidates, most suspicious first.

    Args:
        result: of undertrained-tokens.
        containing: what the token as shown must contain; letters of either case.
    """
    data = result.dataset
    name, values = chosen_indicator(result)
    ids = np.flatnonzero(data["candidate"].values > 0)
    ids = ids[np.argsort(values[ids], kind="stable")]
    shown = [plots.visible(str(s)) for s in data["shown"].values[ids]]
    table = pd.DataFrame({
        "token": shown, "id": ids, name: values[ids],
        "category": [CATEGORIES[int(k)] for k in data["category"].values[ids]],
        "probability of repeating it": written(result)[ids],
    })  # fmt: skip
    if not np.isfinite(table["probability of repeating it"]).any():
        table = table.drop(columns="probability of repeating it")
    if containing:
        table = table[table["token"].str.contains(containing, case=False, regex=False)]
    return table.head(LISTED).reset_index(drop=True)


def to_strip(result: pk.Result) -> tuple[np.ndarray, str]:
    """Ids of tokens to keep out of a model's input, and by what they were chosen.

    Where the model was asked: candidates that it writes with a probability below the threshold. Otherwise all candidates.
    """
    data, best = result.dataset, written(result)
    _, values = chosen_indicator(result)
    asked = data["asked"].values == 1
    if asked.any():
        threshold = float(result.params.as_dict()["threshold"])
        ids = np.flatnonzero(asked & (best < threshold))
        why = f"suspicious by their weights, and written with a probability below {threshold:g} where they should be repeated"
    else:
        ids = np.flatnonzero(data["candidate"].values > 0)
        why = "suspicious by their weights alone; the model was not asked to write them"
    return ids[np.argsort(values[ids], kind="stable")], why


def strip_list(model: str, ids: Sequence[int], texts: Sequence[str], why: str) -> bytes:
    """Strings to strip, as JSON; escapes keep every code point."""
    tokens = [{"id": int(i), "text": t} for i, t in zip(ids, texts, strict=True)]
    return json.dumps({"model": model, "chosen": why, "tokens": tokens}, indent=1).encode("ascii")


def points(result: pk.Result, other: str) -> dict[str, np.ndarray]:
    """Groups of the scatter by name, as ids: all candidates that fit, and an even sample of the ordinary tokens.

    Args:
        result: of undertrained-tokens.
        other: the quantity of the second axis: an indicator, or "probability of repeating it".
    """
    data = result.dataset
    _, values = chosen_indicator(result)
    known = np.isfinite(values) & np.isfinite(second(result, other))
    kinds, chosen = data["category"].values, data["candidate"].values > 0
    reference = data["reference"].values > 0
    ordinary = np.isin(kinds, (0, 1)) & ~chosen & ~reference
    groups = {
        "ordinary (a sample)": _some(np.flatnonzero(known & ordinary), SAMPLE),
        "candidates": _first(np.flatnonzero(known & chosen), values, MOST),
        "not ordinary (pieces of characters, unreachable)": _first(
            np.flatnonzero(known & ~np.isin(kinds, (0, 1)) & ~reference), values, MOST
        ),
        "reference (never trained)": _first(np.flatnonzero(known & reference), values, MOST),
    }
    return {name: ids for name, ids in groups.items() if ids.size}


def _some(ids: np.ndarray, most: int) -> np.ndarray:
    return ids if len(ids) <= most else ids[np.linspace(0, len(ids) - 1, most).round().astype(int)]


def _first(ids: np.ndarray, values: np.ndarray, most: int) -> np.ndarray:
    return ids[np.argsort(values[ids], kind="stable")][:most]


def second(result: pk.Result, other: str) -> np.ndarray:
    """Values of the scatter's second axis; axis vocab."""
    names = [str(c) for c in result.dataset["case"].values]
    return written(result) if other not in names else result.dataset["indicator"].values[names.index(other)]


def second_axes(result: pk.Result) -> list[str]:
    """What the second axis may be."""
    name, _ = chosen_indicator(result)
    others = [str(c) for c in result.dataset["case"].values if str(c) != name]
    asked = np.isfinite(result.dataset["written"].values).any()
    return [*(["probability of repeating it"] if asked else []), *reversed(others)]


def scatter(result: pk.Result, other: str, groups: dict[str, np.ndarray]) -> plots.Figure:
    """The vocabulary by two quantities; each point is a token."""
    name, values = chosen_indicator(result)
    ys, shown = second(result, other), result.dataset["shown"].values
    n = int((result.dataset["candidate"].values > 0).sum())
    return plots.scatter(
        {group: (values[ids], ys[ids]) for group, ids in groups.items()},
        title="The vocabulary by its weights", unit="1", x_quantity=name, y_quantity=other,
        hover={group: [f"{plots.visible(str(shown[i]))} [{i}]" for i in ids] for group, ids in groups.items()},
        caption=f"{result.provenance.get('model', {}).get('name', '')}. {n:,} candidates lie up to {name} = "
        f"{float(result.dataset['cut']):.3g}; of groups with more than {MOST:,} tokens the {MOST:,} most suspicious are drawn, of "
        f"ordinary ones an even sample of {SAMPLE:,}.",
        alt=f"Scatter of tokens by {name} and {other}; candidates lie on the left.",
    )  # fmt: skip


def sticky(result: pk.Result) -> pd.DataFrame:
    """Validated tokens by the share of pairs that they bring nearer, largest first."""
    data = result.dataset
    asked = data["asked"].values
    ids = np.flatnonzero(asked > 0)
    p = data["p"].values
    ids = ids[np.argsort(-p[ids], kind="stable")]
    kinds: dict[int, str] = {1: "candidate", 2: "random (null)", 3: "named"}
    verdicts: list[Any] = [
        "sticky" if data["sticky"].values[i] else "above the published cut" if data["published"].values[i] else ""
        for i in ids
    ]
    return pd.DataFrame({
        "token": [plots.visible(str(s)) for s in data["shown"].values[ids]], "id": ids, "verdict": verdicts,
        "pairs brought nearer": p[ids], "score": data["score"].values[ids],
        "drawn as": [kinds.get(int(asked[i]), "other") for i in ids], "stays a token": data["survival"].values[ids],
    })  # fmt: skip
