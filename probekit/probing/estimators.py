"""Linear probes that need no search over weights, as scikit-learn estimators."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, TransformerMixin
from sklearn.utils import ClassifierTags
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from .logistic import probabilities, standardised, unit
from .saving import Saved
from .splits import group_folds


def _two_classes(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two classes, and whether each row is of the second.

    Raises:
        ValueError: there are not exactly two.
    """
    check_classification_targets(y)
    kind = type_of_target(y)
    classes = np.unique(y)
    if kind == "multiclass" or len(classes) > 2:
        raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
    if len(classes) < 2:
        raise ValueError(f"A difference of means needs two classes; found one class only: {classes.tolist()}.")
    return classes, y == classes[1]


class DifferenceOfMeans(Saved, TransformerMixin, BaseEstimator):
    """The direction from one class's mean to the other's: θ = μ₊ − μ₋, and how far rows lie along it.

    Attributes:
        classes_: negative and positive class.
        difference_: θ, axis feature; in the features' unit.
        mean_: mean of all training rows, axis feature.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on rows X with two classes y."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        self.classes_, positive = _two_classes(y)
        self.difference_ = X[positive].mean(axis=0) - X[~positive].mean(axis=0)
        self.mean_ = X.mean(axis=0)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Coordinate of each row along the unit direction, from the mean; axes row, one column."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return ((X - self.mean_) @ self.direction_)[:, None]

    @property
    def direction_(self) -> np.ndarray:
        """θ at unit length, axis feature."""
        return unit(self.difference_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.classifier_tags = ClassifierTags(multi_class=False)  # what it wants of y, though it is no classifier
        return tags


class MassMeanProbe(Saved, ClassifierMixin, BaseEstimator):
    """Mass-mean probe (Marks and Tegmark 2023, arXiv 2310.06824): nothing is optimised.

    With θ = μ₊ − μ₋ and rows centred on the training mean, p(positive) = σ(θᵀx), or with `iid` σ(xᵀΣ⁺θ), where Σ is the
    pooled covariance within classes (sum of squares divided by the number of rows), its pseudo-inverse leaving out
    eigenvalues up to `atol`. There is no bias, hence the centring. The first form is meant for data unlike that of the
    fit, the second one for data like it.

    Args:
        iid: whether directions are weighted by the inverse covariance.
        atol: eigenvalues of Σ up to this are taken as 0, in squared units of the features.

    Attributes:
        classes_: negative and positive class.
        mean_: training mean, axis feature.
        coef_: θ or Σ⁺θ, axes 1, feature.
        intercept_: −coef · mean.
    """

    def __init__(self, *, iid: bool = False, atol: float = 1e-3) -> None:
        self.iid = iid
        self.atol = atol

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on rows X with two classes y."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        self.classes_, positive = _two_classes(y)
        self.mean_ = X.mean(axis=0)
        means = X[~positive].mean(axis=0), X[positive].mean(axis=0)
        theta = means[1] - means[0]
        if self.iid:
            within = X - np.where(positive[:, None], means[1], means[0])
            values, vectors = np.linalg.eigh(within.T @ within / len(X))
            inverse = np.divide(1.0, values, out=np.zeros_like(values), where=values > self.atol)
            theta = vectors @ (inverse * (vectors.T @ theta))
        self.coef_ = theta[None]
        self.intercept_ = -self.coef_ @ self.mean_
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Log-odds of the positive class, axis row."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return (X - self.mean_) @ self.coef_[0]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities, axes row, class."""
        return probabilities(self.decision_function(X))

    def predict(self, X: Any) -> np.ndarray:
        """The likelier class."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]

    @property
    def direction_(self) -> np.ndarray:
        """The weights at unit length, axis feature."""
        return unit(self.coef_[0])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class RidgeProbe(Saved, RegressorMixin, BaseEstimator):
    """Ridge regression on standardised features in closed form, its strength chosen by grouped cross-validation.

    Minimised is ‖y − Xw − b‖² + alpha ‖w‖²; alpha has the least squared error on held-out groups inside the training
    rows. Groups as in `LogisticProbe`.

    Args:
        alphas: values that are tried.
        cv: inner folds; fewer where there are fewer groups. With fewer than two groups the middle value is taken.
        random_state: seed of the inner split.

    Attributes:
        coef_: weights in units of the features as given, axis feature.
        intercept_: with them, a prediction is X @ coef_ + intercept_.
        alpha_: the value that was chosen.
        held_out_loss_: mean inner held-out squared error of each alpha.
    """

    def __init__(
        self, *, alphas: Any = (1e-1, 1.0, 10.0, 1e2, 1e3, 1e4, 1e5), cv: int = 5, random_state: int = 0
    ) -> None:
        self.alphas = alphas
        self.cv = cv
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit on rows X with numbers y; rows of one group stay together in the choice of alpha."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        groups = np.arange(len(y)) if groups is None else np.asarray(groups)
        if len(groups) != len(y):
            raise ValueError(f"Found {len(groups)} groups for {len(y)} rows.")
        alphas = np.asarray(self.alphas, dtype=float)
        Z, mean, scale = standardised(X)
        self.held_out_loss_ = np.full(len(alphas), np.inf)
        n_folds = min(self.cv, len(np.unique(groups)))
        if n_folds >= 2:
            losses = np.zeros(len(alphas))
            for train, test in group_folds(groups, n_folds, self.random_state):
                weights, offset, centre = _ridge_path(Z[train], y[train], alphas)
                losses += ((y[test, None] - (Z[test] - centre) @ weights - offset) ** 2).sum(axis=0)
            self.held_out_loss_ = losses / len(y)
        best = int(self.held_out_loss_.argmin()) if n_folds >= 2 else len(alphas) // 2
        self.alpha_ = float(alphas[best])
        weights, offset, centre = _ridge_path(Z, y, alphas[best : best + 1])
        self.coef_ = weights[:, 0] / scale
        self.intercept_ = float(offset - centre @ weights[:, 0] - self.coef_ @ mean)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predicted numbers, axis row."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X @ self.coef_ + self.intercept_

    @property
    def direction_(self) -> np.ndarray:
        """The weights at unit length, axis feature."""
        return unit(self.coef_)


def _ridge_path(Z: np.ndarray, y: np.ndarray, alphas: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Ridge weights for each alpha (axes feature, alpha), the mean of y, and the mean of the rows they are for."""
    centre, offset = Z.mean(axis=0), float(y.mean())
    rows, target = Z - centre, y - offset
    if len(rows) < rows.shape[1]:
        values, vectors = np.linalg.eigh(rows @ rows.T)
        inner = (vectors.T @ target)[:, None] / (np.maximum(values, 0)[:, None] + alphas)
        return rows.T @ (vectors @ inner), offset, centre
    values, vectors = np.linalg.eigh(rows.T @ rows)
    inner = (vectors.T @ (rows.T @ target))[:, None] / (np.maximum(values, 0)[:, None] + alphas)
    return vectors @ inner, offset, centre
