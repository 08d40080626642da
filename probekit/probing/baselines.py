"""What a probe's accuracy has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .collected import Collected
from .logistic import LogisticProbe, standardised
from .measuring import auroc, balanced_accuracy

MOST_IDS = 2000
Folds = Sequence[tuple[np.ndarray, np.ndarray]]


def bag_of_tokens(collected: Collected, rows: np.ndarray, *, own_token: bool) -> np.ndarray:
    """Token ids as features, for the probe that sees no activation; axes row, id.

    For labels of texts: 1 for each id among the tokens up to and including the row's, which is what the model had read.
    For labels of tokens: 1 for the id of the row's own token. The 2,000 ids that occur in most rows' features.

    Args:
        collected: the rows.
        rows: which of them.
        own_token: whether labels belong to tokens.
    """
    about = collected.about
    starts = np.concatenate([[0], np.cumsum(about.lengths)])
    if own_token:
        seen = [about.numbers["token_id"][[i]] for i in rows]
    else:
        text, pos = about.numbers["text"][rows], about.numbers["pos"][rows]
        seen = [np.unique(about.text_ids[starts[t] : starts[t] + p + 1]) for t, p in zip(text, pos, strict=True)]
    ids, column = np.unique(np.concatenate(seen), return_inverse=True)
    row = np.repeat(np.arange(len(rows)), [len(s) for s in seen])
    common = np.argsort(-np.bincount(column), kind="stable")[:MOST_IDS]
    place = np.full(len(ids), -1)
    place[common] = np.arange(len(common))
    kept = place[column] >= 0
    found = np.zeros((len(rows), len(common)), dtype=np.float32)
    found[row[kept], place[column[kept]]] = 1.0
    return found


def random_directions(X: np.ndarray, y: np.ndarray, folds: Folds, *, n: int, seed: int) -> np.ndarray:
    """Held-out AUROC of random directions of the standardised features, their sign chosen on the training rows.

    Args:
        X: rows, axes row, feature.
        y: booleans.
        folds: train and test rows of each fold.
        n: directions.
        seed: of the directions (isotropic Gaussian).
    """
    directions = np.random.default_rng(seed).normal(size=(X.shape[1], n))
    scores = np.zeros((len(y), n))
    for train, test in folds:
        Z, mean, scale = standardised(X[train].astype(np.float64))
        fitted = Z @ directions
        sign = np.sign(fitted[y[train]].mean(axis=0) - fitted[~y[train]].mean(axis=0))
        scores[test] = ((X[test] - mean) / scale) @ directions * np.where(sign == 0, 1.0, sign)
    tests = [test for _, test in folds]
    return np.array([auroc(s, y, tests)[0] for s in scores.T])


def control_labels(keys: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """A random label for each distinct key, the same wherever it occurs, drawn from the labels' own distribution.

    Args:
        keys: what is given a label: token ids, or texts.
        y: labels, whose shares the draw follows.
        seed: of the draw.
    """
    distinct, member = np.unique(keys, return_inverse=True)
    return np.random.default_rng(seed).choice(y, size=len(distinct))[member]


def control_task(
    X: np.ndarray, y: np.ndarray, keys: np.ndarray, groups: np.ndarray, folds: Folds | None, *, C: float, seed: int
) -> tuple[float, float]:
    """Balanced accuracy in the task and in its control task (Hewitt and Liang 2019, arXiv 1909.03368).

    With `folds`, on held-out rows: for labels of tokens, the control label being that of the token's id. Without, on the
    rows of the fit: a random label of a whole text cannot carry over to other texts, so that held-out accuracy would be
    chance whatever the probe; on the rows of the fit it says how much of the task's accuracy there memory could give. Both
    probes have the same strength C.

    Args:
        X: rows, axes row, feature.
        y: booleans.
        keys: what has a control label of its own.
        groups: prompt of each row.
        folds: train and test rows of each fold; None for the rows of the fit.
        C: strength of the probe.
        seed: of the control labels.
    """
    control = control_labels(keys, y, seed)
    if len(np.unique(control)) < 2:
        return float("nan"), float("nan")
    found = []
    every = np.arange(len(y))
    for target in (y, control):
        right = np.zeros(len(y), dtype=bool)
        for train, test in [(every, every)] if folds is None else folds:
            if len(np.unique(target[train])) < 2:
                right[test] = target[test] == target[train][0]
                continue
            probe = LogisticProbe(Cs=(C,), cv=1).fit(X[train], target[train])
            right[test] = told(probe.decision_function(X[test]), target[train]) == target[test]
        found.append(float(balanced_accuracy(right, target)[0]))
    return found[0], found[1]


def told(scores: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Whether log-odds say positive: the probability exceeds the training rows' share of positives."""
    share = np.clip(train.mean(), 1e-9, 1 - 1e-9)
    return scores > np.log(share / (1 - share))
