"""Probes keep scikit-learn's promises."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from probekit.probing import DifferenceOfMeans, LeaceEraser, LogisticProbe, MassMeanProbe, RidgeProbe

EVERY = [LogisticProbe(), MassMeanProbe(), MassMeanProbe(iid=True), DifferenceOfMeans(), RidgeProbe(), LeaceEraser()]


@pytest.mark.filterwarnings("ignore")  # the checks themselves warn
@parametrize_with_checks(EVERY)
def test_scikit_learn_accepts_it(estimator: Any, check: Any) -> None:
    check(estimator)
