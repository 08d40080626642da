"""Dormant heads of the real SmolLM2-135M-Instruct, on windows of prose and of code."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probekit.api import run
from probekit.batches import make_batch
from probekit.core import Batch

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("threads")]


def windows(model: Any, n_texts: int = 8, n_tokens: int = 64) -> Batch:
    """The first tokens of texts of two kinds that the Python installation carries."""
    path = Path(__file__).resolve().parents[2] / "analyses" / "corpora.py"
    spec = importlib.util.spec_from_file_location("corpora", path)
    assert spec is not None and spec.loader is not None
    corpora = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corpora)
    texts = corpora.python_texts(n_texts, 600)
    batch = make_batch(model, (), {name: texts[name] for name in ("prose", "code")}, "model", None)
    cut = tuple(replace(t, ids=t.ids[:n_tokens], strings=t.strings[:n_tokens]) for t in batch)
    return Batch(cut, batch.bos, begins=batch.begins)


def test_few_heads_rest_on_the_first_token_alone_and_none_only_in_one_domain(smol: Any, record_property: Any) -> None:
    """Three of 270 heads removed: that which differs most, another of its block, and the most dormant one."""
    batch = windows(smol)
    assert set(batch.lengths) == {64} and batch.domains == ("prose",) * 8 + ("code",) * 8
    result = run("dormant-heads", smol, batch, n_heads=3, progress=False)
    for finding in result.findings:
        record_property(finding.claim, finding.value)
        print(f"{finding.claim}\n  {finding.evidence}")
    code, prose = dormancy = result["domain_dormancy"].values
    dormant, active = (dormancy > 0.9).sum((1, 2)), (dormancy < 0.5).sum((1, 2))
    assert (dormant >= 1).all() and (dormant <= 15).all() and (active > 80).all() and (active < 180).all()
    assert (dormancy[:, 18, 8] > 0.85).all(), "the most dormant head has moved"
    assert dormancy[:, :2].mean() < 0.1, "no head rests before there is anything to rest on"
    assert (code - prose)[2:10].mean() > 0.05, "heads of blocks 2 to 9 rest more on code"
    assert result["switches"].values.sum() <= 2 and result["spread"].values.max() < 0.5
    assert result["picked_as"].values[18, 8] == "dormant"
    assert (np.abs(result["domain_loss_change_nats"].values[:, 18, 8]) < 0.05).all(), (
        "removing it costs next to nothing"
    )
    assert np.isfinite(result["loss_change_nats"].values).sum() == 3 * 16
