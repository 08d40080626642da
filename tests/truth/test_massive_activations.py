"""Massive activations: planted entries are located, with their writer and erasers; Gaussian entries are not massive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import assert_close, run, scripted, texts_of

from probekit.analysis import Result
from probekit.backends.scripted import Script, planted, random_play
from probekit.core import TokenText
from probekit.phenomena.massive_activations import _gaussian_ratio

N_LAYERS, D_MODEL = 10, 48
LENGTHS = (30, 41, 25, 36, 30, 28)
NULL = random_play(N_LAYERS, 1, D_MODEL)


def entry(path: dict[int, float], pos: int = 0, dim: int = 37) -> Any:
    """Set one entry of the residual stream after some blocks."""

    def plant(text: TokenText, script: Script) -> Script:
        for layer, value in path.items():
            script.resid[layer, pos, dim] = value
        return script

    return plant


def find(play: Any, lengths: tuple[int, ...] = LENGTHS, **params: Any) -> Result:
    model = scripted(play=play, n_layers=N_LAYERS, n_heads=1, d_model=D_MODEL)
    return run("massive-activations", model, texts_of(lengths), **params)["massive-activations"]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("pos", "dim"), [(0, 37), (11, 0)])
def test_planted_entry_is_located_with_writer_and_eraser(pos: int, dim: int, sign: int) -> None:
    """2000 after blocks 3 to 6: written by block 3, taken down by block 7, at its token and dimension."""
    result = find(planted(NULL, entry({layer: sign * 2000.0 for layer in range(3, 7)}, pos, dim)))
    largest, written, erased, layers = result.findings
    assert (largest.where["pos"], largest.where["dim"], largest.where["magnitude"]) == (pos, dim, 2000)
    medians = [np.median(np.abs(m)) for m in _residuals(result)]
    assert largest.value == pytest.approx(2000 / np.mean(medians), rel=0.05)
    assert written.where == {"layer": 3} and written.value == pytest.approx(2000, rel=2e-3)
    assert erased.where == {"layers": [7]} and erased.value == pytest.approx(1, abs=2e-3)
    assert layers.where == {"strict": [3, 4, 5, 6], "loose": [3, 4, 5, 6]} and layers.value == 4
    assert result["n_massive"].values.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert set(result["peak_pos"].values) == {pos} and set(result["peak_dim"].values) == {dim}
    assert set(result["writer"].values) == {3}
    assert_close(result["peak_path"].values[3:7], np.full((4, 6), sign * 2000.0))
    at = result["pos"].values == pos
    assert (result["value"].values[3:7, at, 0] == sign * 2000).all() and (result["dim"].values[3:7, at, 0] == dim).all()
    assert largest.ci95 is not None and largest.ci95[0] > 100 * largest.null


def _residuals(result: Result) -> list[np.ndarray]:
    batch = texts_of(LENGTHS)
    return [NULL(text).resid[3] for text in batch]


def test_strict_and_loose_counts_differ_where_they_should() -> None:
    """About 600 medians pass the looser multiple only; 99 is no massive entry however small the median."""
    play = planted(NULL, entry({2: 450.0, 3: 2000.0, 4: 2000.0}))
    result = find(play)
    assert result.findings[-1].where == {"strict": [3, 4], "loose": [2, 3, 4]}
    assert "after blocks 3 to 4; above 500 × also after 2" in result.findings[-1].claim
    assert find(play, loose_ratio=1000.0).findings[-1].where == {"strict": [3, 4], "loose": [3, 4]}

    def small(text: TokenText, script: Script) -> Script:
        script.resid[:] *= 0.001
        script.resid[3, 0, 5] = 99.0
        return script

    result = find(planted(NULL, small))
    assert result.findings[-1].where == {"strict": [], "loose": []}
    assert result["times_median"].values.max() > 1000
    assert find(planted(NULL, small), min_magnitude=98.0).findings[-1].where["strict"] == [3]


def test_the_median_is_that_of_the_whole_layer_of_the_text() -> None:
    """A token with large entries throughout raises its own median, not the layer's: the entry stays massive."""

    def plant(text: TokenText, script: Script) -> Script:
        script.resid[4, 0] = 50.0
        script.resid[4, 0, 37] = 2000.0
        return script

    result = find(planted(NULL, plant))
    assert result.findings[-1].where["strict"] == [4]


def test_two_erasers_and_none() -> None:
    """Taken down in two steps: both blocks are named; a stream that keeps it has no eraser."""
    steps = {layer: 2000.0 for layer in range(3, 7)} | {7: 1200.0, 8: 300.0, 9: 250.0}
    erased = find(planted(NULL, entry(steps))).findings[2]
    assert erased.where == {"layers": [7, 8]} and erased.value == pytest.approx(1 - 250 / 2000)
    kept = find(planted(NULL, entry({layer: 2000.0 for layer in range(3, 10)}))).findings[2]
    assert kept.where == {"layers": []} and kept.value == 0 and kept.claim.startswith("No block takes it down")


def test_each_text_is_followed_at_its_own_place() -> None:
    """Texts whose entry lies elsewhere are found elsewhere."""

    def plant(text: TokenText, script: Script) -> Script:
        return entry({4: 3000.0}, pos=len(text) % 5, dim=len(text) % 7)(text, script)

    result = find(planted(NULL, plant))
    assert result["peak_pos"].values.tolist() == [n % 5 for n in LENGTHS]
    assert result["peak_dim"].values.tolist() == [n % 7 for n in LENGTHS]


def test_gaussian_entries_are_not_massive() -> None:
    """The matched null on twenty models: nothing massive, no writer is claimed."""
    for seed in range(20):
        findings = find(random_play(N_LAYERS, 1, D_MODEL, seed=seed), (40, 30)).findings
        assert len(findings) == 2, "writer and erasers belong to a massive entry"
        assert "is not massive" in findings[0].claim and findings[1].where == {"strict": [], "loose": []}
        assert findings[1].value == findings[1].null == 0


@pytest.mark.parametrize("n", [500, 5_000, 50_000])
def test_gaussian_null_ratio_is_that_of_a_simulation(n: int) -> None:
    """Expected largest over median magnitude of n Gaussian entries: within 1 % and three standard errors."""
    rng = np.random.default_rng(n)
    ratios = []
    for _ in range(400 if n < 50_000 else 100):
        magnitudes = np.abs(rng.normal(size=n))
        ratios.append(magnitudes.max() / np.median(magnitudes))
    error = float(np.std(ratios, ddof=1)) / len(ratios) ** 0.5
    assert abs(_gaussian_ratio(n) - np.mean(ratios)) < 3 * error + 0.01 * np.mean(ratios)


def test_gaussian_null_matches_the_statistic() -> None:
    """On Gaussian streams the largest entry's mean excess over its null is within three standard errors of zero."""
    excess = []
    for seed in range(40):
        largest = find(random_play(N_LAYERS, 1, D_MODEL, seed=seed), (30, 30)).findings[0]
        excess.append(largest.value - largest.null)
    assert abs(np.mean(excess)) < 3 * np.std(excess, ddof=1) / len(excess) ** 0.5
