"""Activation patching of SmolLM2-135M-Instruct on capitals: what is known of factual recall in decoders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import run

from probekit.analysis import Result
from probekit.core import Batch

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("threads")]
CAPITALS = (
    "The capital of France is Paris",
    "The capital of Italy is Rome",
    "The capital of Germany is Berlin",
    "The capital of England is London",
)


@pytest.fixture(scope="module")
def batch(smol: Any) -> Batch:
    batch = smol.tokenize(CAPITALS)
    assert batch.lengths == (6,) * 4  # one token per country and capital
    return batch


@pytest.fixture(scope="module")
def streams(smol: Any, batch: Batch) -> Result:
    params = {"sites": "resid_pre", "direction": "denoising"}
    return run("activation-patching", smol, batch, **params)["activation-patching"]


def test_the_model_knows_the_capitals(streams: Result) -> None:
    own = streams["run_logit_diff"].values
    assert (own[::2] > 3).all() and (own[1::2] < -3).all()
    assert (streams["run_prob"].values[::2] > 0.3).all()


def test_the_country_carries_the_answer_until_late_blocks_and_then_the_last_token(streams: Result) -> None:
    """At the input the country is everything; at the last block the last token is; in between it moves once."""
    data = streams.dataset
    effect, mine = data["effect"].sel(case="resid_pre").values, data["run"].values == "corrupted"
    country, last = (effect[:, mine & (data["role"].values == role)].mean(axis=1) for role in ("changed", "last"))
    assert country[0] == pytest.approx(1, abs=1e-3) and last[0] == 0
    assert abs(country[-1]) < 0.05 and last[-1] > 0.9
    travel = streams.findings[0]
    assert 20 <= travel.value <= 27 and travel.null == 30 and travel.n == 2


def test_attribution_ranks_streams_nearly_as_patching_does(streams: Result) -> None:
    ranks = streams["rank_correlation"].sel(case="resid_pre").values[1::2]
    assert (ranks > 0.6).all() and np.isnan(streams["rank_correlation"].sel(case="attn_out")).all()


def test_the_sweep_takes_few_passes(streams: Result) -> None:
    """Many places run in one pass, each in a row of its own."""
    assert sum(p["passes"] for p in streams.provenance["plan"]) <= 4
