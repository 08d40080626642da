"""The study that sets lenses beside one another, on a model whose blocks write in a basis of their own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run, scripted, texts_of
from lens_files import named

import probekit as pk
from probekit.analysis.registry import temporary_registrations
from probekit.backends.scripted import Script
from probekit.core import TokenText

ANALYSES = str(Path(__file__).parents[2] / "analyses")
N_LAYERS, D, V = 4, 8, 8


@pytest.fixture
def study() -> Iterator[Any]:
    """The study's tables; what they register is forgotten afterwards."""
    before = set(sys.modules)
    with temporary_registrations(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ANALYSES)
        yield importlib.import_module("lens_comparison_tables")
    for name in set(sys.modules) - before:
        if name.startswith(("lens_comparison", "corpora")):
            del sys.modules[name]


def shifted(text: TokenText) -> Script:
    """All blocks but the last hold the final row with its entries moved on by one."""
    final = 9.0 * np.eye(V)[list(text.ids)]
    return Script(
        np.stack([*[np.roll(final, 1, -1)] * (N_LAYERS - 1), final]), np.zeros((N_LAYERS, 1, len(text), len(text)))
    )


def compared(study: Any, folder: Path) -> pk.Result:
    model = scripted(play=shifted, n_layers=N_LAYERS, n_heads=1, d_model=D, d_vocab=V, unembedding=np.eye(V))
    back = {i: np.roll(np.eye(D), -1, 0) - np.eye(D) for i in range(N_LAYERS - 1)}
    pk.lenses.save_lens(folder / "right", "tuned", back, model=named(N_LAYERS, D, name="scripted"))
    texts = texts_of((20, 30, 25, 22, 21, 40), V)
    results = [run("logit-lens", model, texts, lens=lens)["logit-lens"] for lens in ("", str(folder / "right"))]
    return pk.result_of("lens-comparison", study.table_of([study.row_of(r) for r in results]), results[0].provenance)


def test_the_lens_that_fits_is_nearer_at_every_block(study: Any, tmp_path: Path) -> None:
    result = compared(study, tmp_path)
    assert result["case"].values.tolist() == ["logit lens", "tuned lens right"]
    p = np.exp(9) / (np.exp(9) + V - 1)
    rest = (1 - p) / (V - 1)
    kl = (p - rest) * (np.log(p) - np.log(rest))  # two distributions whose peaks have changed places
    np.testing.assert_allclose(result["kl_nats"].sel(case="logit lens").values[:-1], kl, rtol=1e-4)
    np.testing.assert_allclose(result["kl_nats"].sel(case="tuned lens right").values, 0.0, atol=1e-4)
    nearer, earlier = result.findings
    assert nearer.value == pytest.approx(kl, rel=1e-4) and "nearer at 3 of 3 blocks" in nearer.claim
    assert earlier.value == pytest.approx(N_LAYERS - 1) and "3.0 blocks earlier" in earlier.claim
    assert nearer.n == earlier.n == 6 and nearer.n_unit == "texts"


def test_a_lens_is_no_nearer_than_itself(study: Any, tmp_path: Path) -> None:
    """The null: the same readings twice."""
    one = compared(study, tmp_path).dataset.sel(case="logit lens")
    result = pk.result_of("lens-comparison", study.table_of([("logit lens", one), ("twin", one)]), {})
    nearer, earlier = result.findings
    assert nearer.value == earlier.value == 0.0 and "nearer at 0 of 3 blocks" in nearer.claim


def test_its_report_shows_three_figures(study: Any, tmp_path: Path) -> None:
    result = compared(study, tmp_path)
    assert set(result.figures()) == {"kl", "agreement", "settled"}
    page = pk.report(result, tmp_path / "report").read_text()
    assert "tuned lens right" in page and "Lenses beside one another" in page
