"""Probes against hand-computed values and scikit-learn's own solvers; saved without pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import probekit as pk
from probekit.probing import DifferenceOfMeans, LeaceEraser, LogisticProbe, MassMeanProbe, RidgeProbe

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 6)) * np.array([1, 5, 0.2, 1, 1, 1]) + 3
Y = X[:, 0] + RNG.normal(size=120) > 3
GROUPS = np.repeat(np.arange(30), 4)


@pytest.mark.parametrize("n", [120, 5])
@pytest.mark.parametrize("C", [0.01, 1.0])
def test_logistic_probe_solves_its_problem(n: int, C: float) -> None:
    """With more rows than features and with fewer, in the units of the features as given."""
    rows = np.concatenate([np.flatnonzero(Y)[: n // 2 + 1], np.flatnonzero(~Y)[: n // 2]])
    probe = LogisticProbe(Cs=(C,), cv=1).fit(X[rows], Y[rows])
    scaler = StandardScaler().fit(X[rows])
    reference = LogisticRegression(C=C, tol=1e-10, max_iter=10000).fit(scaler.transform(X[rows]), Y[rows])
    np.testing.assert_allclose(probe.coef_ * scaler.scale_, reference.coef_, rtol=2e-3, atol=2e-4)
    expected = reference.decision_function(scaler.transform(X))
    np.testing.assert_allclose(probe.decision_function(X), expected, rtol=5e-3, atol=2e-3)
    np.testing.assert_allclose(probe.predict_proba(X)[:, 1], expit(expected), atol=2e-3)
    assert (probe.predict(X) == (expected > 0)).mean() > 0.99


def test_three_classes_are_told_apart() -> None:
    y = np.array(["a", "b", "c"])[np.digitize(X[:, 1], [0, 6])]
    probe = LogisticProbe().fit(X, y)
    assert probe.score(X, y) > 0.9 and probe.predict_proba(X).shape == (120, 3) and probe.direction_.shape == (3, 6)


def test_strength_is_chosen_on_held_out_groups() -> None:
    """Rows of a group are near copies with a label of the group: by rows any fit looks right, by groups none does."""
    rng = np.random.default_rng(1)
    rows = np.repeat(rng.normal(size=(40, 30)), 5, axis=0) + 1e-3 * rng.normal(size=(200, 30))
    y, groups = np.repeat(rng.random(40) < 0.5, 5), np.repeat(np.arange(40), 5)
    by_group, by_row = LogisticProbe().fit(rows, y, groups=groups), LogisticProbe().fit(rows, y)
    assert by_group.C_ <= 1e-2 and by_row.C_ >= 1
    assert np.nanmin(by_group.held_out_loss_) > 0.6 and by_row.held_out_loss_.min() < 0.1
    assert by_group.temperature_ > 0


def test_probes_work_in_pipelines_and_model_selection() -> None:
    pipe = make_pipeline(StandardScaler(), LogisticProbe())
    scores = cross_validate(pipe, X, Y, groups=GROUPS, cv=GroupKFold(5), scoring="roc_auc")["test_score"]
    assert scores.mean() > 0.7
    chained = make_pipeline(StandardScaler(), DifferenceOfMeans(), LogisticRegression()).fit(X, Y)
    assert chained.score(X, Y) > 0.6 and "LogisticProbe" in pipe._repr_html_()
    with sklearn.config_context(enable_metadata_routing=True):
        probe = LogisticProbe().set_fit_request(groups=True)
        routed = cross_validate(probe, X, Y, params={"groups": GROUPS}, cv=GroupKFold(5), return_estimator=True)
    expected = LogisticProbe()
    train = next(GroupKFold(5).split(X, Y, GROUPS))[0]
    expected.fit(X[train], Y[train], groups=GROUPS[train])
    np.testing.assert_array_equal(routed["estimator"][0].held_out_loss_, expected.held_out_loss_)


def test_mass_mean_by_hand() -> None:
    """θ = (2, 1) − (0, −1) = (2, 2), mean (1, 0); Σ = diag(1, 0.5) within classes, so Σ⁺θ = (2, 4)."""
    rows = np.array([[1.0, -1], [-1, -1], [0, -2], [0, 0], [3, 1], [1, 1], [2, 0], [2, 2]])
    rows[:, 0] = [1, -1, 1, -1, 3, 1, 3, 1]
    rows[:, 1] = [-1 + s for s in (0.5**0.5, 0.5**0.5, -(0.5**0.5), -(0.5**0.5))] + [
        1 + s for s in (0.5**0.5, 0.5**0.5, -(0.5**0.5), -(0.5**0.5))
    ]
    y = [0] * 4 + [1] * 4
    plain, iid = MassMeanProbe().fit(rows, y), MassMeanProbe(iid=True).fit(rows, y)
    np.testing.assert_allclose(plain.coef_, [[2, 2]])
    np.testing.assert_allclose(iid.coef_, [[2, 4]])
    np.testing.assert_allclose(plain.predict_proba([[2, 1]])[0, 1], expit(2 * (2 - 1) + 2 * 1))
    np.testing.assert_allclose(iid.decision_function([[1, 0], [2, 1]]), [0, 2 + 4], atol=1e-12)
    direction = DifferenceOfMeans().fit(rows, y)
    np.testing.assert_allclose(direction.direction_, [0.5**0.5, 0.5**0.5])
    np.testing.assert_allclose(direction.transform([[2, 1]]), [[2**0.5]])


def test_covariance_without_spread_is_left_out() -> None:
    """A feature whose variance within classes is below atol has no weight, instead of an infinite one."""
    rows = np.stack([RNG.normal(size=40), np.repeat([0.0, 1.0], 20)], axis=1)
    iid = MassMeanProbe(iid=True).fit(rows, np.repeat([0, 1], 20))
    assert abs(iid.coef_[0, 1]) < 1e-9 < abs(iid.coef_[0, 0])


@pytest.mark.parametrize("n", [120, 4])
def test_ridge_is_scikit_learns(n: int) -> None:
    y = X[:, 1] * 2 + RNG.normal(size=120)
    probe = RidgeProbe(alphas=(3.0,), cv=1).fit(X[:n], y[:n])
    scaler = StandardScaler().fit(X[:n])
    reference = Ridge(alpha=3.0).fit(scaler.transform(X[:n]), y[:n])
    np.testing.assert_allclose(probe.predict(X), reference.predict(scaler.transform(X)), rtol=1e-8)
    chosen = RidgeProbe().fit(X, y, groups=GROUPS)
    assert chosen.alpha_ <= 10 and chosen.held_out_loss_.argmin() == list(chosen.alphas).index(chosen.alpha_)


def test_leace_by_hand() -> None:
    """x = (z, z + e) with var z = var e = 1: Σ = [[1, 1], [1, 2]], Σ_xz = (1, 1), so P = Σ_xz Σ_xzᵀ Σ⁻¹ / 1 = [[1, 0], [1, 0]]."""
    z, e = np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, -1])
    rows = np.stack([z, z + e], axis=1)
    eraser = LeaceEraser(shrinkage=0.0).fit(rows + 5, z > 0)
    np.testing.assert_allclose(eraser.removed_ @ eraser.read_, [[1, 0], [1, 0]], atol=1e-12)
    np.testing.assert_allclose(eraser.transform(rows + 5), np.stack([0 * z, e], axis=1) + 5, atol=1e-12)


@pytest.mark.parametrize(("n", "d", "shrinkage"), [(200, 10, "auto"), (200, 10, 0.0), (40, 90, "auto")])
def test_nothing_linear_is_left_on_the_rows_of_the_fit(n: int, d: int, shrinkage: Any) -> None:
    rng = np.random.default_rng(3)
    y = rng.integers(0, 3, n)
    rows = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    rows[:, 0] += 2 * y
    erased = LeaceEraser(shrinkage=shrinkage).fit(rows, y).transform(rows)
    for k in range(3):
        own = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(erased / rows.std(axis=0), y == k)
        assert np.abs(own.coef_).max() < 1e-4
        before = LogisticRegression(C=1.0, max_iter=1000).fit(rows / rows.std(axis=0), y == k)
        assert np.abs(before.coef_).max() > 0.05
    assert np.trace(np.cov(erased.T)) <= np.trace(np.cov(rows.T)) * (1 + 1e-9)
    np.testing.assert_allclose(erased.mean(axis=0), rows.mean(axis=0), atol=1e-8)


def test_the_unit_of_a_number_does_not_matter() -> None:
    """Standardised z: a concept in thousandths is erased as well as in thousands."""
    z = X[:, 0] * 1e-4
    small, large = (LeaceEraser().fit(X, z * unit).transform(X) for unit in (1, 1e8))
    np.testing.assert_allclose(small, large, atol=1e-8)
    assert abs(np.corrcoef(small[:, 0], z)[0, 1]) < 1e-6
    constant = LeaceEraser().fit(X, np.ones(120))
    np.testing.assert_array_equal(constant.transform(X), X)


@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 0.3, 1.0, "auto"])
def test_erasing_never_adds_variance(shrinkage: Any) -> None:
    """Nor does it leave a covariance with the concept, whatever the shrinkage: columns of very different size."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        z = rng.normal(size=(100, 2))
        rows = (
            rng.normal(size=(100, 5)) @ (rng.normal(size=(5, 5)) * np.logspace(0, 2, 5))
            + z @ rng.normal(size=(2, 5)) * 3
        )
        erased = LeaceEraser(shrinkage=shrinkage).fit(rows, z).transform(rows)
        assert np.var(erased, axis=0).sum() <= np.var(rows, axis=0).sum() * (1 + 1e-9)
        assert np.abs((erased - erased.mean(axis=0)).T @ (z - z.mean(axis=0))).max() < 1e-6


@pytest.mark.parametrize(
    "probe",
    [
        LogisticProbe(Cs=(0.1, 1.0)),
        MassMeanProbe(iid=True),
        DifferenceOfMeans(),
        RidgeProbe(cv=3),
        LeaceEraser(svd_tol=0.02),
    ],
)
def test_saved_and_loaded_it_is_the_same(probe: Any, tmp_path: Path) -> None:
    y: Any = np.where(Y, "yes", "no") if not isinstance(probe, RidgeProbe) else X[:, 2]
    fitted = probe.fit(X, y)
    path = fitted.save(tmp_path / "probe.npz")
    again = type(probe).load(path)
    assert again.get_params() == {k: list(v) if isinstance(v, tuple) else v for k, v in probe.get_params().items()}
    for method in ("predict", "predict_proba", "transform"):
        if hasattr(fitted, method):
            np.testing.assert_array_equal(getattr(again, method)(X), getattr(fitted, method)(X))
    assert again.n_features_in_ == 6 and path.read_bytes()[:2] == b"PK"


def test_what_is_no_probe_is_refused(tmp_path: Path) -> None:
    path = MassMeanProbe().fit(X, Y).save(tmp_path / "a.npz")
    with pytest.raises(pk.ProbekitError, match="holds 'MassMeanProbe'; expected 'LogisticProbe'"):
        LogisticProbe.load(path)
    np.savez(tmp_path / "b.npz", x=1)
    (tmp_path / "c.npz").write_bytes(path.read_bytes()[:50])
    for name in ("b.npz", "c.npz", "none.npz"):
        with pytest.raises(pk.ProbekitError, match="holds no estimator"):
            LogisticProbe.load(tmp_path / name)
    with pytest.raises(pk.ProbekitError, match="not fitted"):
        LogisticProbe().save(tmp_path / "d.npz")
    with pytest.raises(ValueError, match="one class only"):
        LogisticProbe().fit(X, np.ones(120))
    with pytest.raises(ValueError, match="3 groups for 120 rows"):
        LogisticProbe().fit(X, Y, groups=[1, 2, 3])
    with pytest.raises(ValueError, match="NaN"):
        LogisticProbe().fit(np.where(X > 5, np.nan, X), Y)
