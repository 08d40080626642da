"""The logistic probe, and what it is solved with."""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from .saving import Saved
from .splits import group_folds

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
_PATIENCE = 2  # values of C after the best one before the path is left


def standardised(X: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns with mean 0 and standard deviation 1, their means and deviations; constant columns are only centred."""
    mean = X.mean(axis=0)
    scale = X.std(axis=0)
    scale[scale <= 10 * np.finfo(X.dtype).eps * np.maximum(np.abs(mean), 1e-12)] = 1.0
    return (X - mean) / scale, mean, scale


def rotated(Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows in their principal axes, and these axes; fewer columns where there are fewer rows than features.

    An L2-penalised linear model does not change under a rotation of its features, its weights lie in the span of the
    rows, and along principal axes it is solved in few steps.

    Returns:
        Coordinates (axes row, axis) and axes (axes axis, feature), with Z = coordinates · axes.
    """
    if Z.shape[0] < Z.shape[1]:
        values, vectors = np.linalg.eigh(Z @ Z.T)
        keep = values > values.max(initial=0.0) * 1e-12
        root = np.sqrt(values[keep])
        return vectors[:, keep] * root, (vectors[:, keep] / root).T @ Z
    vectors = np.linalg.eigh(Z.T @ Z)[1]
    return Z @ vectors, vectors.T


class LogisticProbe(Saved, ClassifierMixin, BaseEstimator):
    """L2-penalised logistic regression on standardised features, with its strength chosen by grouped cross-validation.

    Features are standardised on the training rows. C minimises the mean log-loss of held-out groups over `cv` folds
    inside the training rows; a path of C is left after two values without an improvement. Minimised is
    ‖w‖² / 2 + C · Σ log-loss. Where there are fewer rows than features the same problem is solved in the span of the
    rows. Groups come through `fit(X, y, groups=…)`, in model selection by metadata routing (`set_fit_request`); without
    groups each row is one of its own in the choice of C.

    Args:
        Cs: values of C that are tried, ascending.
        cv: inner folds; fewer where there are fewer groups. Where no inner fold has all classes on both sides, the
            middle value of C is taken.
        random_state: seed of the inner split.

    Attributes:
        classes_: the classes.
        coef_: weights in units of the features as given (axes class, feature; one row for two classes).
        intercept_: with them, the decision function is X @ coef_.T + intercept_.
        C_: the value of C that was chosen.
        held_out_loss_: mean inner held-out log-loss in nats of each C; inf where it was not tried.
        temperature_: what the decision function is divided by for calibrated probabilities: it minimises the log-loss of
            the inner held-out rows at C_ (Guo et al. 2017, arXiv 1706.04599), with Platt's targets for two classes; 1 where
            there were none.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X = rng.normal(size=(60, 5))
        >>> LogisticProbe().fit(X, X[:, 0] > 0).direction_.shape
        (5,)
    """

    def __init__(self, *, Cs: Any = STRENGTHS, cv: int = 5, random_state: int = 0) -> None:
        self.Cs = Cs
        self.cv = cv
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit on rows X with classes y; rows of one group stay together in the choice of C."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, target = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"A probe needs two classes; found one class only: {self.classes_.tolist()}.")
        groups = np.arange(len(y)) if groups is None else np.asarray(groups)
        if len(groups) != len(y):
            raise ValueError(f"Found {len(groups)} groups for {len(y)} rows.")
        Z, mean, scale = standardised(X)
        Z, basis = rotated(Z)
        self.held_out_loss_, held = self._search(Z, target, groups)
        Cs = np.asarray(self.Cs, dtype=float)
        best = int(self.held_out_loss_.argmin()) if np.isfinite(self.held_out_loss_).any() else len(Cs) // 2
        self.C_ = float(Cs[best])
        model = _solver(len(self.classes_), self.C_).fit(Z, target)
        self.coef_ = model.coef_ @ basis / scale
        self.intercept_ = model.intercept_ - self.coef_ @ mean
        scores, places = held.get(best, (np.zeros((0, 1)), np.zeros(0, dtype=int)))
        self.temperature_ = temperature(scores, target[places])
        return self

    def _search(self, Z: np.ndarray, y: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, dict[int, Any]]:
        """Mean held-out loss of each C, and the held-out scores and their rows for each C that was tried."""
        losses = np.full(len(self.Cs), np.inf)
        held: dict[int, Any] = {}
        n_folds = min(self.cv, len(np.unique(groups)))
        if n_folds < 2:
            return losses, held
        folds = [
            (train, test)
            for train, test in group_folds(groups, n_folds, self.random_state)
            if len(np.unique(y[train])) == len(self.classes_)
        ]
        if not folds:
            return losses, held
        models = [_solver(len(self.classes_), 1.0) for _ in folds]
        parts = [(Z[a], y[a], Z[b]) for a, b in folds]
        rows = np.concatenate([b for _, b in folds])
        for i, C in enumerate(self.Cs):
            scores = [
                m.set_params(C=C).fit(a, b).decision_function(c) for m, (a, b, c) in zip(models, parts, strict=True)
            ]
            seen = np.concatenate(scores).reshape(len(rows), -1)
            losses[i], held[i] = log_loss(seen, y[rows]), (seen, rows)
            if i - int(losses.argmin()) >= _PATIENCE:
                break
        return losses, held

    def decision_function(self, X: Any) -> np.ndarray:
        """Log-odds of the second class, axis row; for more classes, a score for each."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities, axes row, class; without temperature."""
        return probabilities(self.decision_function(X))

    def predict(self, X: Any) -> np.ndarray:
        """The likelier class."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]

    @property
    def direction_(self) -> np.ndarray:
        """The direction of the second class at unit length (axis feature), or of each class for more than two."""
        return unit(self.coef_[0] if len(self.classes_) == 2 else self.coef_)


def _solver(n_classes: int, C: float) -> Any:
    """What fits one value of C, starting from where it was before."""
    return _Binary(C) if n_classes == 2 else _Quiet(C=C, solver="lbfgs", max_iter=1000, warm_start=True)


class _Binary:
    """Two classes: the mean log-loss + ‖w‖² / (2 C n) by L-BFGS, in columns scaled to like curvature."""

    def __init__(self, C: float) -> None:
        self.C, self.coef_, self.intercept_ = C, np.zeros((1, 0)), np.zeros(1)

    def set_params(self, C: float) -> _Binary:
        self.C = C
        return self

    def fit(self, Z: np.ndarray, y: np.ndarray) -> _Binary:
        n, sign, penalty = len(y), 2.0 * y - 1, 1 / (self.C * len(y))
        steps = 1 / np.sqrt((Z**2).mean(axis=0) / 4 + penalty)
        rows = Z * steps

        def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
            weights = at[:-1] * steps
            margin = sign * (rows @ at[:-1] + at[-1])
            pull = -sign * expit(-margin) / n
            value = float(np.logaddexp(0, -margin).mean() + penalty / 2 * (weights @ weights))
            return value, np.append(rows.T @ pull + penalty * weights * steps, pull.sum())

        before = self.coef_[0] if self.coef_.size else np.zeros(Z.shape[1])
        start = np.append(before / steps, self.intercept_)
        options = {"maxiter": 500, "gtol": 1e-5, "ftol": 1e-9}
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
        self.coef_, self.intercept_ = (found[:-1] * steps)[None], found[-1:]
        return self

    def decision_function(self, Z: np.ndarray) -> np.ndarray:
        return Z @ self.coef_[0] + self.intercept_[0]


class _Quiet(LogisticRegression):
    """Says nothing where a path ends at data that can be separated: the held-out loss decides there."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return super().fit(X, y, sample_weight)


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Probabilities of each class (axes row, class) of log-odds, or of one score for each class."""
    if scores.ndim == 1 or scores.shape[1] == 1:
        p = expit(scores.ravel())
        return np.stack([1 - p, p], axis=1)
    return softmax(scores, axis=1)


def log_loss(scores: np.ndarray, y: np.ndarray) -> float:
    """Mean -ln p of the true class, in nats; y holds class numbers."""
    if scores.ndim == 1 or scores.shape[1] == 1:
        return float(np.logaddexp(0, -(2.0 * y - 1) * scores.ravel()).mean())
    shifted = scores - scores.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]).mean())


def temperature(scores: np.ndarray, y: np.ndarray) -> float:
    """The T in [0.05, 20] for which scores / T have the least log-loss; 1 without rows of two classes.

    For two classes against Platt's targets, (n₊ + 1) / (n₊ + 2) and 1 / (n₋ + 2) in place of 1 and 0: a few rows that happen
    to be told apart do not make a probe certain.
    """
    if len(np.unique(y)) < 2:
        return 1.0
    if scores.ndim == 1 or scores.shape[1] == 1:
        margin, n = scores.ravel(), np.bincount(y, minlength=2)
        target = np.where(y == 1, (n[1] + 1) / (n[1] + 2), 1 / (n[0] + 2))
        found = minimize_scalar(_smoothed, bounds=(-3.0, 3.0), method="bounded", args=(margin, target))
    else:
        found = minimize_scalar(lambda t: log_loss(scores * np.exp(-t), y), bounds=(-3.0, 3.0), method="bounded")
    return float(np.exp(found.x))


def _smoothed(log_t: float, margin: np.ndarray, target: np.ndarray) -> float:
    scaled = margin * np.exp(-log_t)
    return float((np.logaddexp(0, scaled) - target * scaled).mean())


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1 along the last axis."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-300)
