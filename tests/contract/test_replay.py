"""Stored traces give back what was captured; scripted models play what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import EVERYTHING, assert_close, assert_same, scripted, see, texts_of, tiny_model

from probekit.backends.replay import ReplayModel
from probekit.backends.scripted import ScriptedModel
from probekit.core import SITES, CapabilityError, Capture, Forward, Patch, StoreError
from probekit.engine import load_trace, run_pass, save_trace
from probekit.reduce import AttentionStats, Keep, MedianMagnitude, Norm

LENGTHS = (21, 1, 13, 40)


def test_scripted_model_serves_its_sites_and_refuses_the_others() -> None:
    model, batch = scripted(), texts_of((6, 4))
    for site in SITES:
        capture = Capture(site, AttentionStats() if site == "pattern" else Keep())
        if site in model.info.sites:
            assert see(model, [capture], batch)[0].data_vars
        else:
            with pytest.raises(CapabilityError, match=f"no point '{site}'"):
                model.execute(Forward((capture,)), batch)
    with pytest.raises(CapabilityError, match="without patches"):
        model.execute(Forward((Capture("logits", Norm()),), (Patch("resid_pre.0", 0.0),)), batch)
    pre, post = see(model, [Capture("resid_pre", Keep()), Capture("resid_post", Keep())], batch)
    assert np.array_equal(pre["value"].values[1:], post["value"].values[:-1])
    logits = see(model, [Capture("logits", Keep())], batch)[0]["value"].values
    assert_close(logits, post["value"].values[-1] @ model.weight.numpy().T, atol=1e-5)


@pytest.mark.parametrize("source", ["scripted", "llama-grouped"])
def test_trace_round_trip_and_replay(source: str, tmp_path: Path) -> None:
    """A trace loads as it was saved, and a replayed pass over its texts, in any order, is the pass, bit for bit."""
    model: Any = scripted() if source == "scripted" else tiny_model(source).model
    captures = tuple(c for c in EVERYTHING if c.point.site in model.info.sites)
    batch = texts_of(LENGTHS)
    trace, _ = run_pass(model, Forward(captures), batch)
    loaded = load_trace(save_trace(trace, tmp_path / "trace.zarr"))
    assert (loaded.batch, loaded.info, dict(loaded.vocab)) == (trace.batch, trace.info, dict(trace.vocab))
    assert list(loaded.data) == list(trace.data)
    for key, dataset in trace.data.items():
        assert_same(loaded.data[key], dataset, what=key)
    replay = ReplayModel(loaded)
    again, _ = run_pass(replay, Forward(captures), replay.batch)
    for key, dataset in trace.data.items():
        assert_same(again.data[key], dataset, what=key)
    some = batch.select([2, 0])
    for capture, data in zip(captures, see(replay, captures, some), strict=True):
        assert_same(data, see(model, [capture], some, [[0], [1]] if source == "scripted" else [])[0], rtol=1e-5)


def test_replay_refuses_what_was_not_traced(tmp_path: Path) -> None:
    trace, _ = run_pass(scripted(), Forward((Capture("resid_post", Norm()),)), texts_of((6, 4)))
    replay = ReplayModel(trace)
    with pytest.raises(CapabilityError, match="no resid_post:median_magnitude"):
        replay.execute(Forward((Capture("resid_post", MedianMagnitude()),)), replay.batch)
    with pytest.raises(CapabilityError, match="Text 0 is not the text that was traced"):
        replay.execute(Forward((Capture("resid_post", Norm()),)), texts_of((6, 4), seed=1))
    with pytest.raises(CapabilityError, match="no tokenizer"):
        replay.tokenize(["w1"])
    with pytest.raises(CapabilityError, match="without patches"):
        replay.execute(Forward((Capture("resid_post", Norm()),), (Patch("resid_pre.0", 0.0),)), replay.batch)
    with pytest.raises(StoreError, match="No trace at"):
        load_trace(tmp_path / "nothing.zarr")


def test_scripted_models_and_plays_are_deterministic() -> None:
    """A text's script depends on its tokens alone."""
    batch = texts_of((6, 4))
    first, second = (see(scripted(), [Capture("pattern", AttentionStats())], b)[0] for b in (batch, batch))
    assert_same(first, second)
    assert isinstance(scripted().with_block(3), ScriptedModel)
