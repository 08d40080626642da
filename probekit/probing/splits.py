"""Splits that keep every group whole."""

from __future__ import annotations

import numpy as np

from probekit.core import InputError


def group_folds(groups: np.ndarray, n_folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train and test rows of each fold; every group is tested once, and never in the training rows of its own fold.

    The split knows nothing of labels. Groups are shuffled, then each goes to the fold with the fewest rows so far.

    Args:
        groups: group of each row.
        n_folds: folds; at most as many as groups.
        seed: of the shuffle.

    Raises:
        InputError: there are fewer groups than folds, or fewer than two folds.
    """
    distinct, member = np.unique(groups, return_inverse=True)
    if n_folds < 2 or len(distinct) < n_folds:
        raise InputError(
            f"Found {len(distinct)} group{'s' * (len(distinct) != 1)} (prompts) for {n_folds} folds. Give more different "
            "prompts, or fewer folds (at least 2)."
        )
    sizes = np.bincount(member)
    order = np.random.default_rng(seed).permutation(len(distinct))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold, rows = np.zeros(len(distinct), dtype=np.int64), np.zeros(n_folds)
    for g in order:
        fold[g] = rows.argmin()
        rows[fold[g]] += sizes[g]
    return [(np.flatnonzero(fold[member] != k), np.flatnonzero(fold[member] == k)) for k in range(n_folds)]


def shuffled_labels(y: np.ndarray, groups: np.ndarray, texts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels that have nothing to do with the rows, exchanged between groups.

    Where all rows of a group have one label, groups exchange their labels. Where texts do but groups do not (minimal
    pairs), texts exchange labels within their group, and groups of one label with each other. Where labels belong to
    tokens, a group takes the sequence of labels of another one, begun at a random place, repeated or cut to its length.
    The first two leave any statistic exchangeable if labels and activations are independent; the last one nearly.

    Args:
        y: label of each row.
        groups: group of each row.
        texts: text of each row.
        rng: source of chance.
    """
    by_text, first = _constant(y, texts)
    if not by_text:
        return _exchanged_sequences(y, groups, rng)
    text_group = groups[first]
    label = y[first].copy()
    pure, group_first = _pure_groups(label, text_group)
    chosen = np.flatnonzero(pure)
    donors = label[group_first[chosen]][rng.permutation(len(chosen))]
    for g, donor in zip(chosen, donors, strict=True):
        label[text_group == g] = donor
    for g in np.flatnonzero(~pure):
        own = np.flatnonzero(text_group == g)
        label[own] = label[own][rng.permutation(len(own))]
    return label[np.unique(texts, return_inverse=True)[1]]


def _constant(y: np.ndarray, member: np.ndarray) -> tuple[bool, np.ndarray]:
    """Whether labels are the same within each member, and the first row of each."""
    _, first, place = np.unique(member, return_index=True, return_inverse=True)
    return bool((y == y[first][place]).all()), first


def _pure_groups(label: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By group number: whether its texts have one label, and its first text."""
    n = int(group.max()) + 1
    first = np.zeros(n, dtype=np.int64)
    distinct, where = np.unique(group, return_index=True)
    first[distinct] = where
    pure = np.zeros(n, dtype=bool)
    pure[distinct] = True
    pure[group[label != label[first[group]]]] = False
    return pure, first


def _exchanged_sequences(y: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    donors = rng.permutation(len(rows))
    done = np.empty_like(y)
    for own, donor in zip(rows, donors, strict=True):
        sequence = y[rows[donor]]
        done[own] = np.resize(np.roll(sequence, int(rng.integers(len(sequence)))), len(own))
    return done
