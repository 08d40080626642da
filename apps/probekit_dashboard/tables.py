"""What the pages show, as plain arrays and tables: windows, downsampling, rank changes, rankings. No streamlit here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from probekit import plots
from probekit_dashboard.window import Columns, around, whole

MOST_PLACES = 256  # on either side of an attention map
LENS_WORDS = 24  # columns that leave room for a word in each


def extreme(columns: Columns, values: np.ndarray, how: str = "max") -> tuple[np.ndarray, np.ndarray]:
    """The most extreme value of each column, and the token at which it lies; for "mean" the first token.

    Args:
        columns: stretches of the token axis.
        values: axes row, token (of the whole text); NaN is passed over.
        how: "max", "min" or "mean".

    Returns:
        Values, NaN where a column has none, and tokens; axes row, column.
    """
    every, edges = np.asarray(values, dtype=float), columns.edges.tolist()
    found = np.full((len(every), len(columns)), np.nan)
    where = np.tile(columns.edges[:-1], (len(every), 1))
    for column, (a, b) in enumerate(itertools.pairwise(edges)):
        piece = every[:, a:b]
        known = np.isfinite(piece)
        some = known.any(axis=1)
        if how == "mean":
            found[some, column] = np.where(known, piece, 0)[some].sum(axis=1) / known[some].sum(axis=1)
            continue
        place = np.where(known, piece if how == "max" else -piece, -np.inf).argmax(axis=1)
        found[some, column] = piece[some, place[some]]
        where[some, column] = a + place[some]
    return found, where


def window(n: int, selected: int, width: int, start: int | None = None) -> Columns:
    """A window of a token axis that holds the selected token; it stays where it was as long as that is inside it.

    Args:
        n: tokens of the text.
        selected: the token that must be inside.
        width: columns.
        start: where it began before.
    """
    if start is None or not start <= selected < start + width or start + width > max(n, width):
        return around(selected, n, width)
    return Columns(np.arange(start, min(n, start + width) + 1))


@dataclass(frozen=True)
class LensQuantity:
    """What the lens' grid can be coloured by.

    Args:
        label: in words.
        unit: of the values.
        values: from the lens' dataset; axes layer, token.
        how: which value stands for a column of several tokens.
        scale: how values become colours.
        low: value of the lightest colour.
        high: value of the darkest.
        reads: how to read light and dark.
    """

    label: str
    unit: str
    values: Callable[[Any], np.ndarray]
    how: str
    scale: plots.Scale = "sequential"
    low: float | None = None
    high: float | None = None
    reads: str = ""


def _agreement(lens: Any) -> np.ndarray:
    best = lens["top_id"].isel(rank=0).values
    return (best == best[-1]).astype(float)


LENS_QUANTITIES: dict[str, LensQuantity] = {
    "entropy": LensQuantity(
        "entropy", "nats", lambda d: d["entropy_nats"].values, "max", low=0.0, reads="High: the block is undecided."
    ),
    "logprob": LensQuantity(
        "log-probability of the token that follows", "nats", lambda d: d["logprob_nats"].values, "min", high=0.0,
        reads="Near 0: the block expects the token that really follows.",
    ),
    "rank": LensQuantity(
        "rank of the token that follows", "1", lambda d: d["target_rank"].values + 1.0, "max", "log", low=1.0,
        reads="1: the block finds the token that follows likeliest; high: it puts many others before it.",
    ),
    "kl": LensQuantity(
        "KL(final ‖ block)", "nats", lambda d: d["kl_nats"].values, "max", low=0.0,
        reads="High: far from the final distribution.",
    ),
    "agreement": LensQuantity(
        "agreement with the final top token", "1", _agreement, "mean", low=0.0, high=1.0,
        reads="1: the block's likeliest token is the final one.",
    ),
}  # fmt: skip


def lens_values(lens: Any, name: str) -> np.ndarray:
    """A quantity of the lens; NaN where no token follows. Axes layer, token."""
    values = np.asarray(LENS_QUANTITIES[name].values(lens), dtype=float)
    if name in ("logprob", "rank"):
        values = np.where(np.isfinite(lens["logprob_nats"].values) & (lens["target_rank"].values >= 0), values, np.nan)
    return values


def words_of(lens: Any, ids: Any) -> dict[int, str]:
    """What ids of the lens show as.

    Args:
        lens: dataset of the logit lens.
        ids: some of those that it names.
    """
    wanted = np.unique(np.asarray(ids))
    strings = lens["vocab_str"].sel(vocab=wanted).values
    return {int(i): plots.visible(str(w)) for i, w in zip(wanted, strings, strict=True)}


def top_words(lens: Any, layers: Sequence[int], tokens: np.ndarray) -> list[str]:
    """The likeliest token of each cell, row by row.

    Args:
        lens: dataset of the logit lens.
        layers: rows.
        tokens: the token that each cell stands for; axes row, column.
    """
    best = lens["top_id"].isel(rank=0).values[np.asarray(layers)[:, None], tokens]
    words = words_of(lens, best)
    return [words[i] for i in best.ravel().tolist()]


def rank_changes(lens: Any, layer: int, token: int) -> pd.DataFrame:
    """The likeliest tokens after a token at a layer: probability, and how their rank changed against the layer below.

    Arrows come with words. A token that is not among those kept of the layer below is new to them.
    """
    top = lens["top_id"].values
    words = words_of(lens, top[layer, token])
    share = np.exp(lens["top_logprob"].values[layer, token])
    below = top[layer - 1, token].tolist() if layer > 0 else []
    rows = []
    for rank, i in enumerate(top[layer, token].tolist()):
        rows.append({"rank": rank + 1, "token": words[i], "probability": float(share[rank]),
                     "rank change": _change(i, rank, below, layer)})  # fmt: skip
    return pd.DataFrame(rows)


def _change(i: int, rank: int, below: list[int], layer: int) -> str:
    if layer == 0:
        return "– first block"
    if i not in below:
        return "↑ new"
    moved = below.index(i) - rank
    return f"↑ up {moved}" if moved > 0 else f"↓ down {-moved}" if moved < 0 else "= same"


def pin_label(word: str, i: int) -> str:
    """What a token is called among those that can be pinned; ids tell apart what looks the same."""
    return f"{word} ({i})"


def lens_line(lens: Any, tokens: Sequence[str], token: int) -> str:
    """What the model predicts after a token and since which block, in words; plain text."""
    last = lens.sizes["layer"] - 1
    best, share = int(lens["top_id"].values[last, token, 0]), float(np.exp(lens["top_logprob"].values[last, token, 0]))
    settled = int(lens["settled_layer"].values[token])
    since = "only in the last block" if settled == last else f"from block {settled} of {last} on"
    line = f"After token {token}, {plots.visible(tokens[token])!r}, the model predicts {words_of(lens, [best])[best]!r} ({share:.1%}); "
    line += f"it is the lens' likeliest token {since}."
    if token + 1 < len(tokens):
        logprob, rank = float(lens["logprob_nats"].values[last, token]), int(lens["target_rank"].values[last, token])
        line += f" The text goes on with {plots.visible(tokens[token + 1])!r}: rank {rank + 1}, "
        line += f"probability {np.exp(logprob):.1%}."
    return line


def writes_table(writes: Any, case: str, side: str) -> pd.DataFrame:
    """Promoted or suppressed tokens of one sub-layer, with the change of their logits.

    Args:
        writes: what `Writes.at` gives.
        case: "attention" or "mlp".
        side: "promoted" or "suppressed".
    """
    one = writes.sel(case=case)
    mean = float(one["mean_logits"])
    change = one[f"{side}_logits"].values
    return pd.DataFrame({
        "token": [plots.visible(str(s)) for s in one[f"{side}_str"].values],
        "logits": change - mean,
    })  # fmt: skip


def known_path(lens: Any, token: int, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability and rank of tokens at each layer, as far as the lens kept them: among the likeliest, or the next.

    Args:
        lens: dataset of the logit lens.
        token: after which they are predicted.
        ids: tokens of the vocabulary.

    Returns:
        `logprob_nats` and `rank`; axes layer, id; NaN where a layer did not keep the token.
    """
    top, logprob = lens["top_id"].values[:, token], lens["top_logprob"].values[:, token]
    found, rank = np.full((2, len(top), len(ids)), np.nan)
    following = lens["token_id"].values
    for column, i in enumerate(ids):
        layer, place = np.nonzero(top == i)
        found[layer, column], rank[layer, column] = logprob[layer, place], place
        if token + 1 < len(following) and int(following[token + 1]) == i:
            found[:, column] = lens["logprob_nats"].values[:, token]
            rank[:, column] = lens["target_rank"].values[:, token]
    return found, rank


# What heads are compared by: label, unit and what a large value means. Means are over queries from position 1 on.
HEAD_QUANTITIES: dict[str, tuple[str, str, str]] = {
    "received": ("attention that the selected token receives", "share", "mean over the queries that see it"),
    "first": ("attention on position 0", "share", "mean over queries after position 0"),
    "entropy": ("mean row entropy", "nats", "mean over queries after position 0; low: attention on few tokens"),
    "max": ("largest entry of a row", "share", "mean over queries after position 0"),
}


def head_values(sinks: Any, name: str, token: int) -> np.ndarray:
    """A quantity of every head; axes layer, head.

    Position 0, which can see nothing but itself, is left out of means over queries; a text of one token has only it.

    Args:
        sinks: dataset of attention-sinks.
        name: of `HEAD_QUANTITIES`.
        token: the selected one.
    """
    if name == "received":
        return np.asarray(sinks["received"].values[:, :, token], dtype=float)
    variable = {"first": "first_share", "entropy": "row_entropy_nats", "max": "row_max"}[name]
    values = np.asarray(sinks[variable].transpose("layer", "head", "token").values, dtype=float)
    return (values[:, :, 1:] if values.shape[2] > 1 else values).mean(axis=2)


def place_of(values: np.ndarray, layer: int, head: int) -> tuple[int, int]:
    """The place of a head, largest first, counted from 1 (heads that are level share one), and how many there are."""
    return 1 + int((values > values[layer, head]).sum()), int(values.size)


def ordinal(n: int) -> str:
    """1st, 2nd, 3rd, 4th, …, 11th."""
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def strongest_heads(sinks: Any, name: str, token: int, n: int = 20) -> pd.DataFrame:
    """The heads with the largest values of a quantity, beside the other quantities."""
    every = {key: head_values(sinks, key, token) for key in HEAD_QUANTITIES}
    order = np.argsort(-every[name], axis=None, kind="stable")[:n]
    layers, heads = np.unravel_index(order, every[name].shape)
    rows: dict[str, Any] = {"head": [f"{a}.{b}" for a, b in zip(layers, heads, strict=True)]}
    for key in [name, *(k for k in HEAD_QUANTITIES if k != name)]:
        rows[HEAD_QUANTITIES[key][0]] = every[key][layers, heads]
    return pd.DataFrame(rows).assign(layer=layers, number=heads)


def sink_line(sinks: Any, tokens: Sequence[str], epsilon: float) -> str:
    """Which token is the sink of this text, in words; plain text."""
    received = sinks["received"].transpose("layer", "head", "token").values
    share = np.where(np.isfinite(sinks["sink_share"].values), sinks["sink_share"].values, -1.0).mean(axis=0)
    if share.max() <= 0:
        return f"No token of this text is a sink: none receives more than {epsilon:.0%} of a head's attention."
    top = int(share.argmax())
    rate, mean = share[top], float(received[:, :, top].mean())
    line = (
        f"The sink of this text is token {top}, {plots.visible(tokens[top])!r}: {rate:.0%} of the heads give it more than "
        f"{epsilon:.0%} of their attention, and on average it receives {mean:.0%}."
    )
    others = np.delete(np.arange(len(share)), top)
    if len(others) and share[others].max() > 0:
        second = int(others[share[others].argmax()])
        line += f" Next comes token {second}, {plots.visible(tokens[second])!r}, for {share[second]:.1%} of the heads."
    return line


@dataclass(frozen=True)
class LayerMaps:
    """The attention maps of a block's heads, the larger ones downsampled.

    Args:
        values: largest attention of each pair of stretches; axes head, query, key; NaN where no query sees a key.
        queries: token at which that lies; same axes.
        keys: likewise.
        columns: the stretches.
    """

    values: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    columns: Columns

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.values.nbytes + self.queries.nbytes + self.keys.nbytes


def layer_maps(pattern: np.ndarray, most: int = MOST_PLACES) -> LayerMaps:
    """Attention maps in at most so many stretches of tokens a side, each pair shown by its largest entry.

    Args:
        pattern: axes head, query, key; zero where a query does not see a key.
        most: stretches.
    """
    n_heads, n, _ = pattern.shape
    columns = whole(n, most)
    size, pairs = len(columns), list(itertools.pairwise(columns.edges.tolist()))
    values = np.full((n_heads, size, size), np.nan, dtype=np.float32)
    at = np.zeros((2, n_heads, size, size), dtype=np.int32)
    for row, (q, q_stop) in enumerate(pairs):
        for column, (k, k_stop) in enumerate(pairs[: row + 1]):  # a later key is not seen
            flat = pattern[:, q:q_stop, k:k_stop].reshape(n_heads, -1)
            place = flat.argmax(axis=1)
            values[:, row, column] = flat[np.arange(n_heads), place]
            at[0, :, row, column] = q + place // (k_stop - k)
            at[1, :, row, column] = k + place % (k_stop - k)
    return LayerMaps(values, at[0], at[1], columns)
