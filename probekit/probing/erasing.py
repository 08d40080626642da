"""Whether a concept is gone after LEACE: a probe fitted again, on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from probekit.analysis import Result
from probekit.core import InputError

from .causal_study import ConceptErasure
from .collected import Collected
from .leace import LeaceEraser
from .logistic import LogisticProbe
from .measuring import Interval, auroc, rare_groups, resampled, share_interval
from .splits import group_folds
from .sweeping import provenance_of
from .targets import Case, cases_of, target_of


def erase(
    collected: Collected,
    labels: Sequence[Any] | None = None,
    *,
    points: Any = None,
    positive: Any = None,
    n_folds: int = 5,
    seed: int = 0,
) -> Result:
    """Erase a concept by `LeaceEraser` and look for it again with fresh probes, at every layer of a collection.

    Args:
        collected: the rows.
        labels: two classes, as in `sweep`.
        points: as in `sweep`.
        positive: as in `sweep`.
        n_folds: folds by prompt.
        seed: of the splits and the resampling.

    Returns:
        A result of `concept-erasure`.

    Raises:
        InputError: labels do not fit or are numbers, there is one class, or there are fewer prompts than folds.
    """
    import xarray as xr

    target = target_of(collected, labels, positive)
    if not target.classes:
        raise InputError("Erasure is checked for two classes; these labels are numbers. Name one class as positive=….")
    analysis = ConceptErasure()
    params = analysis.Params.parse({"n_folds": n_folds, "seed": seed}, analysis.name)
    cases = cases_of(collected, points, by_position=False)
    layers = sorted({layer for case in cases for layer in case.layers})
    found = {name: np.full((len(cases), len(layers)), np.nan) for name in analysis.measures}
    for c, case in enumerate(cases):
        for layer in case.layers:
            X = case.matrix(collected, layer)
            at = (c, layers.index(layer))
            for name, value in _layer(X, target.values, collected.groups, n_folds, seed, case).items():
                found[name][at] = value
    coords: dict[str, Any] = {"case": np.asarray([c.name for c in cases], dtype=object), "layer": layers}
    data = xr.Dataset({n: (m.dims, found[n]) for n, m in analysis.measures.items()}, coords=coords)
    data.attrs |= {"positive": target.positive, "negative": target.negative}
    return Result(analysis, params, analysis.check(data), provenance_of(collected))


def _layer(X: np.ndarray, y: np.ndarray, groups: np.ndarray, n_folds: int, seed: int, case: Case) -> dict[str, float]:
    """Figures of one layer."""
    X = X.astype(np.float64)
    folds = group_folds(groups, n_folds, seed)
    before, refit, moved = np.zeros(len(y)), np.zeros(len(y)), np.zeros(len(y))
    largest = []
    for train, test in folds:
        if len(np.unique(y[train])) < 2:
            raise InputError(
                f"{case.name}: the training rows of a fold are of one class. Give more prompts or fewer folds."
            )
        probe = LogisticProbe(random_state=seed).fit(X[train], y[train], groups=groups[train])
        before[test] = probe.decision_function(X[test])
        eraser = LeaceEraser().fit(X[train], y[train])
        erased, held = eraser.transform(X[train]), eraser.transform(X[test])
        again = LogisticProbe(Cs=(probe.C_,), cv=1).fit(erased, y[train])
        refit[test] = again.decision_function(held)
        largest.append(float(np.abs(again.coef_ * X[train].std(axis=0)).max()))
        moved[test] = np.linalg.norm(held - X[test], axis=1) / np.linalg.norm(X[test] - X[train].mean(axis=0), axis=1)
    tests = [test for _, test in folds]
    fresh, fresh_tests = _fresh(X, y, groups, n_folds, seed)
    weights, units = resampled(groups, seed + 1), rare_groups(y, groups)
    figures = {"coefficient": max(largest), "change": float(moved.mean()), "n_groups": float(len(np.unique(groups)))}
    for name, scores, parts in (("before", before, tests), ("refit", refit, tests), ("fresh", fresh, fresh_tests)):
        it = _bounds(scores, y, parts, weights, units)
        figures |= {f"{name}_auroc": it.value, f"{name}_low": it.low, f"{name}_high": it.high}
    return figures


def _bounds(
    scores: np.ndarray, y: np.ndarray, tests: Sequence[np.ndarray], weights: np.ndarray, units: int
) -> Interval:
    return share_interval(lambda w: auroc(scores, y, tests, w), weights, units)


def _fresh(
    X: np.ndarray, y: np.ndarray, groups: np.ndarray, n_folds: int, seed: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Scores of probes that are fitted and tested on prompts whose rows the eraser has not seen, half by half."""
    scores, tests = np.zeros(len(y)), []
    for fitted, rest in group_folds(groups, 2, seed + 3):
        if len(np.unique(y[fitted])) < 2:
            continue
        erased = LeaceEraser().fit(X[fitted], y[fitted]).transform(X[rest])
        own, labels = groups[rest], y[rest]
        for train, test in group_folds(own, min(n_folds, len(np.unique(own))), seed):
            if len(np.unique(labels[train])) < 2:
                continue
            probe = LogisticProbe(random_state=seed).fit(erased[train], labels[train], groups=own[train])
            scores[rest[test]] = probe.decision_function(erased[test])
            tests.append(rest[test])
    return scores, tests
