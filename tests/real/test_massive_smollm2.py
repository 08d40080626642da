"""Massive activations of SmolLM2-135M-Instruct, and what it loses without them, against values measured beforehand.

Reference values come from an independent script on licence texts in windows of 64 tokens; other texts move them by up to
a fifth, perplexities of broken models by more. The embedded weights went through 4-bit quantisation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import run

import probekit as pk
from probekit.analysis import Result

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("threads")]
NAME, DIM = "massive-activations", 507
LATE, EARLY = 11, 2


@pytest.fixture(scope="module")
def found(smol: Any) -> dict[int, Result]:
    """Interventions at both blocks that write massive entries, the earlier one by a multiple of 300."""
    batch = smol.tokenize(pk.demo_texts()).windows(64)
    batch = batch.select(range(6))
    late = run(NAME, smol, batch, intervene=True, at_block=LATE)[NAME]
    return {LATE: late, EARLY: run(NAME, smol, batch, intervene=True, at_block=EARLY, ratio=300.0)[NAME]}


def test_two_phases_of_massive_entries(found: dict[int, Result]) -> None:
    """Near 790 at the first position after blocks 2 to 8, near 23,600 from block 11 on, down in 28 and 29."""
    data = found[LATE].dataset
    first = data.isel(token=data["pos"].values == 0, rank=0)
    size = abs(first["value"]).mean("token").values
    ratio = first["times_median"].median("token").values
    for layer in range(len(size)):
        print(f"block {layer}: {size[layer]:,.0f}, {ratio[layer]:,.0f} × median")
    assert size[[LATE, 20]] == pytest.approx(23_600, rel=0.2) and size[2:8] == pytest.approx(790, rel=0.2)
    assert 500 < size[8] < 950 and 6_000 < size[28] < 12_000 and 2_500 < size[29] < 6_000
    assert (first["dim"].values[[*range(2, 9), *range(11, 29)]] == DIM).all()
    assert ratio[2:6].min() > 500 and ratio[2:9].max() < 1000 < 5000 < ratio[LATE] < 16_000
    strict = np.flatnonzero((first["times_median"].values > 1000).mean(axis=1) >= 0.5)
    assert strict.tolist() == list(range(11, 28))
    written = found[LATE].findings[1]
    assert written.where == {"layer": LATE, "part": "MLP"}


def test_carriers(found: dict[int, Result]) -> None:
    """The first position of every text in dimension 507; before block 11 also a few other tokens."""
    for result in found.values():
        (carriers,) = (f for f in result.findings if "first position" in f.where)
        print(carriers.claim)
        assert carriers.where["first position"] == len(np.unique(result["text"])) and DIM in carriers.where["dims"]
    assert found[LATE].findings[3].where["dims"][0] == DIM
    assert found[EARLY].dataset.attrs["intervention"]["n_entries"] > len(np.unique(found[EARLY]["text"]))


def test_what_zero_the_mean_and_the_controls_do(found: dict[int, Result], record_property: Any) -> None:
    """Zero after block 11 destroys the model, after block 2 it harms it; the mean and zeros elsewhere do next to nothing."""
    for block, at_least, at_most, mean in ((LATE, 1e4, 1e7, 1.05), (EARLY, 3, 50, 1.2)):
        result = found[block]
        perplexity = {case: float(result["perplexity"].sel(case=case)) for case in result["case"].values}
        print(block, {case: f"{value:,.2f}" for case, value in perplexity.items()})
        record_property(f"block {block}", perplexity)
        plain = perplexity["as it is"]
        assert at_least < perplexity["zero"] / plain < at_most
        assert perplexity["mean"] < mean * plain
        for control in ("other dimension", "other position"):
            assert perplexity[control] == pytest.approx(plain, rel=0.03)
        zero = next(f for f in result.findings if f.where.get("case") == "zero")
        assert zero.where["beyond_controls"] and zero.where["block"] == block
