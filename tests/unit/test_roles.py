"""Analyses that compare models: every role is filled, and token ids mean the same to all."""

from __future__ import annotations

from typing import Any

import pytest
import xarray as xr
from helpers import assert_close, scripted, texts_of

from probekit.analysis import Analysis, Measure, Params
from probekit.backends.scripted import random_play
from probekit.core import Capture, Forward, InputError
from probekit.engine import Job, run_jobs
from probekit.reduce import Norm

NORM = Capture("resid_post", Norm())


class Compares(Analysis):
    """Do they differ?"""

    name, title = "compares", "Compares"
    roles = ("base",)
    measures = {
        "own": Measure(("layer", "token"), "activation", "norm"),
        "base": Measure(("layer", "token"), "activation", "norm in the base model"),
    }

    def flow(self, params: Any, info: Any) -> Any:
        own = yield Forward((NORM,))
        base = yield Forward((NORM,), model="base")
        return xr.Dataset({"own": own[NORM]["norm"], "base": base[NORM]["norm"]})


JOB = Job(Compares(), Params())


def test_each_role_is_served_by_its_model() -> None:
    one, two, batch = scripted(), scripted(play=random_play(seed=1)), texts_of((5, 4))
    found = run_jobs([JOB], one, batch, others={"base": two})["compares"]
    for name, model in (("own", one), ("base", two)):
        alone = run_jobs([JOB], model, batch, others={"base": model})["compares"]
        assert_close(found[name], alone["own"].values)
    assert not (found["own"] == found["base"]).any()
    assert found.provenance["other models"]["base"]["model"]["name"] == "scripted"


def test_a_missing_role_is_named() -> None:
    with pytest.raises(InputError, match="in the role 'base'"):
        run_jobs([JOB], scripted(), texts_of((5,)))


def test_models_that_read_ids_differently_are_refused() -> None:
    with pytest.raises(InputError, match="different tokenizers"):
        run_jobs([JOB], scripted(), texts_of((5,)), others={"base": scripted(d_vocab=65)})
