"""Sink levels of SmolLM2-135M-Instruct: early companions of the primary sink, none in the middle of its depth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import run

from analyses.corpora import python_texts
from probekit.analysis import Result
from probekit.core import Batch, TokenText

pytestmark = pytest.mark.real
N_TOKENS = 64


@pytest.fixture(scope="module")
def found(smol: Any) -> Result:
    """Windows of 64 tokens of the licence of Python."""
    texts = smol.tokenize(python_texts(10, 600)["licence"]).texts
    batch = Batch(tuple(TokenText(t.ids[:N_TOKENS], t.strings[:N_TOKENS]) for t in texts))
    assert len(batch) == 10 and set(batch.lengths) == {N_TOKENS}
    return run("secondary-sinks", smol, batch)["secondary-sinks"]


def test_two_windows_of_which_the_published_rule_sees_the_second(found: Result) -> None:
    windows = found.findings[2]
    assert windows.value == 2 and windows.where["published"] == "11 to 27"
    first, second = windows.where["windows"]
    assert first in ("1 to 8", "2 to 8") and second == "11 to 29"


def test_sink_like_tokens_per_layer(found: Result) -> None:
    """About two per text after blocks 4 and 8, of |cosine| 0.9; after blocks 9 to 29 none, far from it to block 27."""
    later = found["pos"].values > 0
    cosine = np.abs(found["cosine"].values[:, later])
    per_text = (cosine > 0.9).sum(axis=1) / 10
    assert 1 < per_text[4] < 4 and 1 < per_text[8] < 4, per_text
    assert not per_text[9:].any()
    assert 0.6 < cosine[12:28].max() < 0.85


def test_companions_are_made_by_block_2_and_live_through_the_first_window(found: Result) -> None:
    """Primary-like, well above an ordinary token in the primary's place; block 2's MLP writes along the primary."""
    secondary, like, *_ = found.findings
    assert secondary.value <= max(secondary.null, 0.3)
    assert 1 < like.value < 4 and like.ci95 is not None and like.ci95[0] > like.null
    level = like.where["levels"][0]
    assert (level["layer"], level["lifetime"]) == (2, 7) and level["share"] > 0.8
    (written,) = [f for f in found.findings if "primary-like" in f.claim and "MLP" in f.claim]
    assert written.value > 0.5 and written.where["times_norm"] > 5
    assert written.ci95 is not None and written.ci95[0] > 0.4


def test_the_primary_does_not_weaken_midway(found: Result) -> None:
    """No mid-depth secondary sinks, and no dip of the primary: a negative control of the published picture."""
    change = found.findings[3]
    assert change.value > 0 and change.ci95 is not None and change.ci95[0] > 0
