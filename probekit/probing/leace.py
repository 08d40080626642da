"""Concept erasure in closed form."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from .saving import Saved


class LeaceEraser(Saved, TransformerMixin, BaseEstimator):
    """LEACE: the least change of the features after which no linear probe can tell the concept on the rows of the fit.

    r(x) = x − W⁺ U Uᵀ W (x − μ), with W = Σ_xx^{−1/2} (pseudo-inverse) and U the left singular vectors of W Σ_xz whose
    singular value exceeds `svd_tol` (Belrose et al. 2023, arXiv 2306.03819). z is one-hot for classes and a column for
    numbers, each column standardised, since singular values have the unit of z. Covariances are divided by the number of
    rows. Total variance never grows: where W whitens S = (1 − a) Σ_xx + a l I, erasing adds at most
    (a l · rank − tr C (Cᵀ S⁻¹ C)⁻¹ Cᵀ) / (1 − a) ≤ 0 with C = Σ_xz. On fresh rows erasure is approximate, and probes that
    are not linear may still succeed.

    Args:
        svd_tol: singular values up to this count as 0.
        shrinkage: weight of the multiple of the identity that Σ_xx is mixed with; "auto" is Ledoit and Wolf's. Any value
            erases the concept; it decides how little else changes. (The released code shrinks by random matrix theory,
            and mixes in an orthogonal projection where variance would grow.)

    Attributes:
        mean_: μ, axis feature.
        removed_: W⁺U, axes feature, rank.
        read_: UᵀW, axes rank, feature.
        shrinkage_: the weight that was used.
    """

    def __init__(self, *, svd_tol: float = 0.01, shrinkage: float | str = "auto") -> None:
        self.svd_tol = svd_tol
        self.shrinkage = shrinkage

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on rows X with the concept y: classes, numbers, or a matrix with a row for each."""
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        if y is None:
            raise ValueError(
                "This LeaceEraser requires y to be passed, but the target y is None: it holds the concept."
            )
        z = _concept(y)
        if len(z) != len(X):
            raise ValueError(f"Found {len(z)} values of the concept for {len(X)} rows.")
        self.mean_ = X.mean(axis=0)
        rows = X - self.mean_
        covariance = rows.T @ rows / len(X)
        own = ledoit_wolf_shrinkage(rows, assume_centered=True) if self.shrinkage == "auto" else self.shrinkage
        self.shrinkage_ = float(own)
        level = np.trace(covariance) / len(covariance)
        shrunk = (1 - self.shrinkage_) * covariance + self.shrinkage_ * level * np.eye(len(covariance))
        values, vectors = np.linalg.eigh(shrunk)
        used = values > max(float(values.max(initial=0.0)), 0.0) * len(values) * np.finfo(np.float64).eps
        root = np.sqrt(np.where(used, values, 1.0))
        whiten = (vectors * np.where(used, 1 / root, 0.0)) @ vectors.T
        unwhiten = (vectors * np.where(used, root, 0.0)) @ vectors.T
        cross = rows.T @ z / len(X)
        left, singular, _ = np.linalg.svd(whiten @ cross, full_matrices=False)
        left = left[:, singular > self.svd_tol]
        self.removed_, self.read_ = unwhiten @ left, left.T @ whiten
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The rows without what a linear probe could tell of the concept."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X - (X - self.mean_) @ self.read_.T @ self.removed_.T

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def _concept(y: Any) -> np.ndarray:
    """The concept as standardised columns, axes row, column; constant ones are left out."""
    y = np.asarray(y)
    if y.ndim == 1 and type_of_target(y, input_name="y") != "continuous":
        y = (y[:, None] == np.unique(y)[None]).astype(np.float64)
    z = check_array(y.reshape(len(y), -1), dtype=np.float64, input_name="y")
    z = z - z.mean(axis=0)
    scale = z.std(axis=0)
    return z[:, scale > 1e-12] / scale[scale > 1e-12]
