"""Layer ablation and direct logit attribution on SmolLM2: what is known of its blocks is found, and parts add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import assert_close, run

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("threads")]
TEXTS = (
    "The keeper of the lighthouse wrote down the weather every evening, whether or not anything had happened. On most "
    "days the wind came from the west and smelled of salt and cut grass.",
    "Her brother kept an orchard a day's walk inland. He grew apples, plums and a few stubborn pears, and he sold them "
    "at the market on Saturdays from the back of a cart.",
)


def test_deletion_hurts_at_both_ends_and_at_the_writer_of_the_massive_activation(smol: Any) -> None:
    """Every eleventh block: 0 is indispensable, 11 (the writer) stands out, 22 is missed little."""
    result = run("layer-ablation", smol, smol.tokenize(TEXTS), stride=11)["layer-ablation"]
    assert float(result["identity_kl_nats"].max()) < 1e-5
    later = result["pos"].values > 0
    kl, same = (
        result[name].sel(case="delete").isel(layer=[0, 11, 22]).values[:, later].mean(axis=1)
        for name in ("kl_nats", "same_top")
    )
    assert 6 < kl[0] < 10 and 1.5 < kl[1] < 4 and 0.1 < kl[2] < 0.8, kl
    assert same[0] < 0.1 and 0.15 < same[1] < 0.4 and same[2] > 0.6, same
    writer = np.argmax(np.diff(result["largest"].max("token").values, prepend=0.0))
    assert writer == 11
    swapped = result["kl_nats"].sel(case="swap").values[[0, 22]][:, later].mean(axis=1)
    assert swapped[0] > 4 * swapped[1]


def test_contributions_add_up(smol: Any) -> None:
    """Within 1e-4 logits of the model's own differences at every token, massive activations and all."""
    for pair in ("top", "target"):
        result = run("direct-logit-attribution", smol, smol.tokenize(TEXTS), pair=pair)["direct-logit-attribution"]
        data = result.dataset
        parts = data["attention_logits"].sum("layer", skipna=False) + data["mlp_logits"].sum("layer", skipna=False)
        parts = parts + data["embedding_logits"] + data["bias_logits"]
        assert_close(parts.values, data["difference_logits"].values, atol=1e-4)
        assert data.attrs["sum_error_logits"] < 1e-4 and not data["bias_logits"].sum()
