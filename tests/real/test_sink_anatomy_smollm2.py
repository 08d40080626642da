"""What SmolLM2's sinks lose with the massive entries that blocks 2 and 11 write: the drained value, not all attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import run

from probekit.core import Batch, TokenText
from probekit.demo import demo_texts

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("threads")]
LENGTH = 64  # tokens of each text: seven passes


@pytest.fixture(scope="module")
def anatomy(smol: Any) -> Any:
    texts = smol.tokenize([demo_texts()[i] for i in (1, 3)])
    batch = Batch(tuple(TokenText(t.ids[:LENGTH], t.strings[:LENGTH]) for t in texts))
    return run("sink-anatomy", smol, batch, ratio=300.0)["sink-anatomy"]


def mean(result: Any, name: str, case: str, first: int, last: int) -> float:
    """Over blocks and texts."""
    return float(np.nanmean(result[name].sel(case=case).values[first : last + 1]))


def test_two_phases_of_dimension_507(anatomy: Any) -> None:
    """Written by blocks 2 and 11, read up to blocks 9 and 29; sinks and drained values are where the entries are."""
    assert sorted(set(anatomy["writer"].values.tolist())) == [-1, 2, 11]
    rate = anatomy["sink_rate"].values[0].mean(axis=1)
    assert rate[:2].max() < 0.1 and rate[3:9].min() > 0.5 and rate[10:12].max() < 0.2 and rate[12:29].min() > 0.5
    channel = next(f for f in anatomy.findings if "dim" in f.where)
    assert channel.where["dim"] == 507 and channel.value > 0.9
    overlap = next(f for f in anatomy.findings if "back" in f.where)
    assert overlap.value > 0.9 and overlap.null < 0.1


@pytest.mark.parametrize(("writer", "last"), [(2, 9), (11, 29)])
def test_without_the_entries_part_of_the_sinks_stays_and_the_value_is_no_longer_drained(
    anatomy: Any, writer: int, last: int
) -> None:
    own, removed, average, control = (
        {
            name: mean(anatomy, name, case, writer + 1, last)
            for name in ("sink_rate", "value_ratio", "key_ratio", "stream_ratio")
        }
        for case in ("as it is", *(f"{edit} after block {writer}" for edit in ("removed", "mean", "control")))
    )
    assert own["sink_rate"] > 0.75 and own["value_ratio"] < 0.35 and own["key_ratio"] < 0.6
    assert 0.3 < removed["sink_rate"] < own["sink_rate"] - 0.1, removed
    assert removed["value_ratio"] > 0.8 and removed["key_ratio"] > 0.75, removed
    assert 2 < removed["stream_ratio"] < own["stream_ratio"] / 2, removed
    for same in (average, control):
        assert same["sink_rate"] == pytest.approx(own["sink_rate"], abs=0.05), same
        assert same["value_ratio"] == pytest.approx(own["value_ratio"], abs=0.05), same


def test_the_last_sinks_of_each_phase_are_gone(anatomy: Any) -> None:
    removed = {w: anatomy["sink_rate"].sel(case=f"removed after block {w}").values.mean(axis=1) for w in (2, 11)}
    assert removed[2][9] < 0.2 and removed[11][29] < 0.2
    assert removed[2][3] > 0.5 and removed[11][12] > 0.5, "but the first blocks still attend to position 0"


def test_loss_needs_the_entries_and_not_their_exact_value(anatomy: Any) -> None:
    by_case = anatomy["loss_nats"].values.mean(axis=1).tolist()
    loss = dict(zip(anatomy["case"].values.tolist(), by_case, strict=True))
    own = loss["as it is"]
    assert loss["removed after block 2"] > own + 1 and loss["removed after block 11"] > own + 8
    for edit in ("mean", "control"):
        assert loss[f"{edit} after block 11"] == pytest.approx(own, abs=0.1)
        assert loss[f"{edit} after block 2"] == pytest.approx(own, abs=0.3)
