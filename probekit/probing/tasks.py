"""One layer of a sweep: the probe, its figures and its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probekit.core import InputError

from .baselines import control_task, random_directions, told
from .codelength import online_code
from .estimators import MassMeanProbe, RidgeProbe
from .logistic import LogisticProbe
from .measuring import (
    Interval,
    auroc,
    balanced_accuracy,
    calibration,
    interval,
    permutation_p,
    r_squared,
    rare_groups,
    resampled,
    share_interval,
)
from .splits import group_folds, shuffled_labels

MOST_DRAWN = 20_000_000  # resampling counts that are held at once


@dataclass(frozen=True)
class Settings:
    """How a sweep is made.

    Args:
        n_folds: outer folds.
        n_permutations: of the labels, for p-values.
        n_shuffles: shuffled-label probes for each layer.
        n_random: random directions for each layer.
        seed: of splits, resampling and controls.
    """

    n_folds: int = 5
    n_permutations: int = 1000
    n_shuffles: int = 3
    n_random: int = 20
    seed: int = 0


@dataclass
class Fitted:
    """One layer: held-out predictions, what chose between layers inside the folds, and figures by name.

    Args:
        scores: held-out log-odds or predictions, axis row.
        inner: mean loss of each fold's inner held-out rows; axis fold.
        figures: numbers by name.
        curves: arrays over bins by name.
    """

    scores: np.ndarray
    inner: np.ndarray
    figures: dict[str, float] = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=dict)


class Task:
    """A target on some rows, split once; every layer is probed with the same split.

    Args:
        y: booleans or numbers, axis row.
        groups: prompt of each row, from the collection.
        texts: text of each row.
        keys: what a control task labels: the row's token id or its text.
        of_text: whether labels belong to texts.
        settings: how the sweep is made.
        name: the case, for messages.
    """

    value: str

    def __init__(
        self, y: np.ndarray, groups: np.ndarray, texts: np.ndarray, keys: np.ndarray, *, of_text: bool, settings: Settings,
        name: str,
    ) -> None:  # fmt: skip
        self.y, self.groups, self.texts, self.keys = y, groups, texts, keys
        self.of_text, self.settings = of_text, settings
        try:
            self.folds = group_folds(groups, settings.n_folds, settings.seed)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        for train, _ in self.folds:
            if len(np.unique(y[train])) < 2:
                raise InputError(
                    f"{name}: the training rows of a fold are all {y[train][0]!r}. Give more prompts of the other class, or "
                    "fewer folds."
                )
        self.tests = [test for _, test in self.folds]
        n = min(1000, max(100, MOST_DRAWN // len(y)))
        self.weights = resampled(groups, settings.seed + 1, n)
        rng = np.random.default_rng(settings.seed + 2)
        n_shuffled = max(settings.n_permutations, settings.n_shuffles)
        self.shuffled = np.stack([shuffled_labels(y, groups, texts, rng) for _ in range(n_shuffled)])
        self.units = self._units()

    def _units(self) -> int:
        return len(np.unique(self.groups))

    def fit(self, X: np.ndarray) -> Fitted:
        """The probe alone."""
        raise NotImplementedError

    def examine(self, X: np.ndarray) -> Fitted:
        """The probe with its figures and controls."""
        raise NotImplementedError

    def score(self, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """The main figure of held-out scores; one value for each draw."""
        raise NotImplementedError

    def bounds(self, scores: np.ndarray) -> Interval:
        """The main figure with its interval."""
        return interval(lambda w: self.score(scores, w), self.weights)

    def beyond(self, scores: np.ndarray, other: np.ndarray) -> Interval:
        """By how much scores beat others on the same rows, with the interval of the paired difference.

        Where an interval of its own was extended because hardly anything is wrong, it extends this one too.
        """
        one, two = self.bounds(scores), self.bounds(other)
        found = interval(lambda w: self.score(scores, w) - self.score(other, w), self.weights)
        if (1 - one.value) * self.units >= 1:
            return found
        reach = float(np.hypot(one.value - one.low, two.high - two.value))
        return Interval(found.value, min(found.low, found.value - reach), found.high)

    def _p(self, X: np.ndarray, figures: dict[str, float]) -> None:
        figures["p_value"] = permutation_p(X, self.y, self.shuffled[: self.settings.n_permutations], self.folds)[0]


class Classes(Task):
    """Two classes."""

    value = "auroc"

    def _units(self) -> int:
        return rare_groups(self.y, self.groups)

    def score(self, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """AUROC within folds."""
        return auroc(scores, self.y, self.tests, weights)

    def bounds(self, scores: np.ndarray) -> Interval:
        """AUROC with its interval."""
        return share_interval(lambda w: self.score(scores, w), self.weights, self.units)

    def fit(self, X: np.ndarray) -> Fitted:
        """Held-out log-odds of a `LogisticProbe`, and beside them those at the temperature, and the threshold's verdict."""
        scores, calibrated, positive = np.zeros(len(X)), np.zeros(len(X)), np.zeros(len(X), dtype=bool)
        inner, strengths = [], []
        for train, test in self.folds:
            probe = LogisticProbe(random_state=self.settings.seed)
            probe.fit(X[train], self.y[train], groups=self.groups[train])
            scores[test] = probe.decision_function(X[test])
            calibrated[test] = scores[test] / probe.temperature_
            positive[test] = told(scores[test], self.y[train])
            inner.append(float(probe.held_out_loss_.min()))
            strengths.append(probe.C_)
        figures = {"strength": float(np.median(strengths))}
        return Fitted(scores, np.array(inner), figures, {"calibrated": calibrated, "told": positive})

    def examine(self, X: np.ndarray) -> Fitted:
        """The probe with its figures and controls."""
        found = self.fit(X)
        calibrated, positive = found.curves["calibrated"], found.curves["told"]
        own = found.figures
        right = positive == self.y
        accuracy = share_interval(lambda w: balanced_accuracy(right, self.y, w), self.weights, self.units)
        for name, it in (("auroc", self.bounds(found.scores)), ("balanced_accuracy", accuracy)):
            own[name], own[f"{name}_low"], own[f"{name}_high"] = it.value, it.low, it.high
        before, after = calibration(found.scores, self.y), calibration(calibrated, self.y)
        own |= {"ece": before.ece, "brier": before.brier, "ece_calibrated": after.ece, "brier_calibrated": after.brier}
        self._p(X, own)
        self._controls(X, own)
        code = online_code(X, self.y.astype(int), self.groups, seed=self.settings.seed)
        own |= {"codelength_bits": code.bits, "compression": code.compression}
        bins = {"predicted": before.predicted, "observed": before.observed, "count": before.count.astype(float)}
        after_bins = {"predicted_calibrated": after.predicted, "observed_calibrated": after.observed}
        return Fitted(found.scores, found.inner, own, bins | after_bins)

    def _controls(self, X: np.ndarray, own: dict[str, float]) -> None:
        how, C = self.settings, own["strength"]
        held = np.zeros(len(X))
        for train, test in self.folds:
            held[test] = MassMeanProbe().fit(X[train], self.y[train]).decision_function(X[test])
        own["mass_mean_auroc"] = float(self.score(held)[0])
        chance = [self._shuffled(X, labels, C) for labels in self.shuffled[: how.n_shuffles]]
        own["shuffled_auroc"] = float(np.mean(chance)) if chance else float("nan")
        random = random_directions(X, self.y, self.folds, n=how.n_random, seed=how.seed)
        own |= {"random_auroc": float(random.mean()), "random_auroc_high": float(random.max())}
        folds = None if self.of_text else self.folds
        task, control = control_task(X, self.y, self.keys, self.groups, folds, C=C, seed=how.seed)
        own |= {"task_accuracy": task, "control_accuracy": control, "selectivity": task - control}

    def _shuffled(self, X: np.ndarray, y: np.ndarray, C: float) -> float:
        scores = np.zeros(len(y))
        for train, test in self.folds:
            if len(np.unique(y[train])) == 2:
                scores[test] = LogisticProbe(Cs=(C,), cv=1).fit(X[train], y[train]).decision_function(X[test])
        return float(auroc(scores, y, self.tests)[0])


class Numbers(Task):
    """Numbers, by ridge regression."""

    value = "r2"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._means = np.zeros(len(self.y))
        for train, test in self.folds:
            self._means[test] = self.y[train].mean()

    def score(self, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """R² against the mean of the training rows."""
        return r_squared(scores, self.y, self._means, weights)

    def fit(self, X: np.ndarray) -> Fitted:
        """Held-out predictions of a `RidgeProbe`."""
        return self._fit(X, self.y, None)

    def _fit(self, X: np.ndarray, y: np.ndarray, alpha: float | None) -> Fitted:
        scores, inner, strengths = np.zeros(len(X)), [], []
        for train, test in self.folds:
            probe = RidgeProbe(random_state=self.settings.seed)
            if alpha is not None:
                probe.set_params(alphas=(alpha,), cv=1)
            probe.fit(X[train], y[train], groups=self.groups[train])
            scores[test] = probe.predict(X[test])
            inner.append(float(probe.held_out_loss_.min()))
            strengths.append(probe.alpha_)
        return Fitted(scores, np.array(inner), {"strength": float(np.median(strengths))})

    def examine(self, X: np.ndarray) -> Fitted:
        """The probe with its figures and controls."""
        found, how = self.fit(X), self.settings
        own, it = found.figures, self.bounds(found.scores)
        own |= {"r2": it.value, "r2_low": it.low, "r2_high": it.high}
        self._p(X, own)
        chance = []
        for labels in self.shuffled[: how.n_shuffles]:
            held = self._fit(X, labels, own["strength"]).scores
            means = np.concatenate([np.full(len(test), labels[train].mean()) for train, test in self.folds])
            order = np.concatenate(self.tests)
            chance.append(float(r_squared(held[order], labels[order], means)[0]))
        own["shuffled_r2"] = float(np.mean(chance)) if chance else float("nan")
        random = self._random(X)
        own |= {"random_r2": float(random.mean()), "random_r2_high": float(random.max())}
        return found

    def _random(self, X: np.ndarray) -> np.ndarray:
        directions = np.random.default_rng(self.settings.seed).normal(size=(X.shape[1], self.settings.n_random))
        projected = (X - X.mean(axis=0)) / np.maximum(X.std(axis=0), 1e-12) @ directions
        held = np.zeros_like(projected)
        for train, test in self.folds:
            x, y = projected[train], self.y[train]
            slope = ((x - x.mean(axis=0)) * (y - y.mean())[:, None]).sum(axis=0) / ((x - x.mean(axis=0)) ** 2).sum(
                axis=0
            )
            held[test] = y.mean() + (projected[test] - x.mean(axis=0)) * slope
        return np.array([self.score(column)[0] for column in held.T])


def chosen_inside(fitted: Sequence[Fitted], tests: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Held-out scores of the layer that each fold's inner rows choose, and the place of that layer for each fold.

    Args:
        fitted: one for each layer.
        tests: test rows of each fold.
    """
    place = np.stack([f.inner for f in fitted]).argmin(axis=0)
    scores = np.zeros(len(fitted[0].scores))
    for k, test in zip(place, tests, strict=True):
        scores[test] = fitted[k].scores[test]
    return scores, place
