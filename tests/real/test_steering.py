"""Sentiment steering on the real SmolLM2-135M-Instruct: the direction between praise and blame moves both ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import run

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("one_thread")]
STEMS = (
    "I saw the new film last night and thought it was",
    "The soup they served us at the restaurant was",
    "We stayed three nights in that hotel and it was",
    "Her speech at the wedding was",
    "The service in this shop is",
    "My first day at the new job was",
    "The book that you lent me was",
    "Our holiday by the lake was",
)
PRAISE = ("wonderful", "delicious", "lovely", "beautiful", "excellent", "great", "brilliant", "perfect")
BLAME = ("terrible", "disgusting", "horrible", "awful", "poor", "bad", "dreadful", "miserable")
NEUTRAL = (
    "The train leaves from platform four at ten past nine and arrives in the afternoon.",
    "Water boils at one hundred degrees Celsius at sea level and at a lower temperature in the mountains.",
)


def test_sentiment_steers_with_both_signs(smol: Any) -> None:
    """No pair shares its words with another, so that the direction that moves a pair is one of sentiment."""
    contrast = [f"{s} {w}" for s, good, bad in zip(STEMS, PRAISE, BLAME, strict=True) for w in (good, bad)]
    batch = smol.tokenize([*contrast, *NEUTRAL])
    result = run("steering", smol, batch, layers="15", doses="0.3", n_neutral=2, n_controls=2)["steering"]
    at = result.dataset.isel(layer=0)
    first = result.findings[0]
    low, _, high = at["change"].mean("case").values
    # Measured: -4.6 and +5.0 nats per token; controls within 1.5; slope 16 per dose, interval 11 to 21.
    assert -7 < low < -2 and 2 < high < 7
    assert first.where["steers"] and 8 < first.value < 24
    assert np.abs(at["control_change"].values).max() < 0.5 * min(-low, high)
    assert (np.diff(at["change"].values, axis=0) > 0).mean() > 0.9
    assert at["agreement"].values.min() > 0.2
    assert 0.2 < float(at["length"]) < 0.8  # measured 0.39 median norms
    assert np.abs(at["cost"].values).max() < 1.5 and (at["kl_nats"].values < 2).all()
