"""Corpora of tiny texts for the tests of streaming, and what it means that two streamed runs end alike."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import tiny_model

import probekit as pk
from probekit.analysis import Result, analyses

NAMES = tuple(n for n, a in analyses().items() if a.only_looks() and a.statistics)
PARAMS: dict[str, Any] = {"horizon": 8, "tail": 2, "top_k": 3, "progress": False}


def texts_of(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(3, 128)}" for _ in range(rng.randint(8, 24))) for _ in range(n)]


def corpus(path: Path, texts: list[str], end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts) + end)
    return path


def stream(path: Path, store: Path, names: Any = NAMES, **how: Any) -> pk.Results:
    """Stream a corpus through the tiny model, with the parameters that the analyses have."""
    chosen = [names] if isinstance(names, str) else names
    known = {"progress"}.union(*(analyses()[name].Params.specs() for name in chosen))
    own = {k: v for k, v in PARAMS.items() if k in known}
    return pk.stream(names, tiny_model("llama-grouped").model, path, store, **{**own, **how})


def assert_same_summary(found: xr.Dataset, expected: xr.Dataset, rtol: float, what: str) -> None:
    """Whole numbers and dictionaries of them are equal, other sums to `rtol`, 0 to all bits."""
    assert set(found.variables) == set(expected.variables)
    for name, array in expected.variables.items():
        a, b = found[name].values, array.values
        if b.dtype == object and b.ndim == 0:
            one, other = a.item(), b.item()
            assert list(one) == list(other), (what, name)  # also the order, which decides between ties
            assert all(one[k] == (pytest.approx(v, rel=rtol) if isinstance(v, float) else v) for k, v in other.items())
        elif b.dtype.kind in "iuO" or rtol == 0 or not (b % 1).any():
            np.testing.assert_array_equal(a, b, err_msg=f"{what} {name}")
        else:
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.nanmax(np.abs(b)), err_msg=f"{what} {name}")


def assert_same_result(found: Result, expected: Result, rtol: float = 1e-6) -> None:
    assert_same_summary(found.summary, expected.summary, rtol, found.name)
    assert len(found.findings) == len(expected.findings)
    for a, b in zip(found.findings, expected.findings, strict=True):
        assert (a.n, a.n_unit, a.unit, a.null_meaning) == (b.n, b.n_unit, b.unit, b.null_meaning)
        for x, y in ((a.value, b.value), (a.null, b.null), *zip(a.ci95 or (), b.ci95 or (), strict=True)):
            assert x == pytest.approx(y, rel=10 * rtol, abs=10 * rtol), (a, b)
