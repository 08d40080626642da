"""Heads removed one at a time, each of each text in a row of its own, and what the loss makes of it."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from probekit.core import Batch, Capture, Forward, Patch, Replace, Request, Trace
from probekit.methods.sweeps import MOST_ROWS, TOKENS
from probekit.reduce import AtPosition, NextToken

NEXT = Capture("logits", NextToken(1))
FIRST = Capture("z", AtPosition(0))  # position 0 sees nothing else: a head's output there is its value there
REMOVALS = ("zero", "first")  # the head writes nothing, or at every position its value at position 0


def looks(removal: str) -> tuple[Capture, ...]:
    """What has to be seen of the texts as they are."""
    return (NEXT, FIRST) if removal == "first" else (NEXT,)


def n_passes(n_heads: int, batch: Batch) -> int:
    """Passes that it takes to remove so many heads from every text."""
    return -(-n_heads * len(batch) // _rows_per_pass(batch))


def _rows_per_pass(batch: Batch) -> int:
    return max(1, min(MOST_ROWS, TOKENS // max(batch.lengths)))


def text_losses(trace: Trace) -> np.ndarray:
    """Mean surprisal, in nats, of the tokens of each text, its first one apart; axis text."""
    surprisal, batch = -trace[NEXT]["logprob_nats"].values.astype(float), trace.batch
    return np.array([surprisal[s : s + n - 1].mean() for s, n in zip(batch.starts, batch.lengths, strict=True)])


def remove_heads(seen: Trace, heads: np.ndarray, removal: str = "zero") -> Generator[Request, Trace, np.ndarray]:
    """Change of each text's mean surprisal when one head is removed at every position.

    Args:
        seen: the texts as they are, with `looks`.
        heads: layer and head; axes head, 2.
        removal: one of `REMOVALS`.

    Returns:
        Removed minus as it is, in nats; axes layer, head, text; NaN for heads that are not removed.
    """
    batch, own = seen.batch, text_losses(seen)
    change = np.full((seen.info.n_layers, seen.info.n_heads, len(batch)), np.nan)
    cells = [(int(layer), int(head), text) for layer, head in heads for text in range(len(batch))]
    size = _rows_per_pass(batch)
    for some in (cells[a : a + size] for a in range(0, len(cells), size)):
        rows = tuple(batch.index[text] for *_, text in some)
        trace = yield Forward((NEXT,), _patches(some, seen, removal), rows=rows, why="one head removed in each row")
        for (layer, head, text), loss in zip(some, text_losses(trace), strict=True):
            change[layer, head, text] = loss - own[text]
    return change


def _patches(cells: list[tuple[int, int, int]], seen: Trace, removal: str) -> tuple[Patch, ...]:
    if removal == "zero":
        rows_of: dict[tuple[int, int], list[int]] = {}
        for row, (layer, head, _) in enumerate(cells):
            rows_of.setdefault((layer, head), []).append(row)
        return tuple(Patch(("z", layer), 0.0, heads=(head,), texts=rows) for (layer, head), rows in rows_of.items())
    values = seen[FIRST]["value"].transpose("layer", "head", "text", "d_head").values
    return tuple(
        Patch(("z", layer), Replace(values[layer, head, text]), heads=(head,), texts=(row,))
        for row, (layer, head, text) in enumerate(cells)
    )


def sample_heads(first_choice: np.ndarray, mean: np.ndarray, n_heads: int, *, seed: int) -> np.ndarray:
    """Which heads to remove, and why.

    Args:
        first_choice: heads as places in the raveled axes layer, head, those to be removed first at the front; may be
            empty.
        mean: dormancy; axes layer, head.
        n_heads: how many to remove; a third are of the first choice ("difference").
        seed: of the random heads, one of the same layer for each of these while there is one ("control").

    Returns:
        The reason, "" for heads that stay; axes layer, head. What the first choice and its controls leave goes to the
        most dormant heads ("dormant") and to even steps through the order of the others ("range"), half each.
    """
    picked, rng = np.full(mean.shape, "", dtype=object), np.random.default_rng(seed)
    total = min(n_heads, mean.size)
    candidates = [divmod(int(i), mean.shape[1]) for i in first_choice[: -(-total // 3)]]
    for place in candidates:
        picked[place] = "difference"
    for layer, _ in candidates[: total - len(candidates)]:
        free = np.flatnonzero(picked[layer] == "")
        if free.size:
            picked[layer, rng.choice(free)] = "control"
    order = np.argsort(mean.round(9).ravel(), kind="stable")
    order, left = order[picked.ravel()[order] == ""], total - int((picked != "").sum())
    order, top = np.split(order, [len(order) - (left - left // 2)])
    picked.flat[top] = "dormant"
    picked.flat[order[np.linspace(0, max(len(order) - 1, 0), left // 2).round().astype(int)]] = "range"
    return picked
