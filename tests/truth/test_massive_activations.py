"""Massive activations: planted entries are located, with their writer and erasers; Gaussian entries are not massive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import assert_close, run, scripted, texts_of

from probekit.analysis import Result
from probekit.backends.scripted import Script, planted, random_play
from probekit.core import Batch, TokenText
from probekit.methods.extremes import gaussian_ratio

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
    largest, written, erased, carriers, layers = result.findings
    assert (largest.where["pos"], largest.where["dim"], largest.where["magnitude"]) == (pos, dim, 2000)
    medians = [np.median(np.abs(m)) for m in _residuals(result)]
    assert largest.value == pytest.approx(2000 / np.mean(medians), rel=0.05)
    assert written.where == {"layer": 3, "part": "attention"} and written.value == pytest.approx(2000, rel=2e-3)
    assert erased.where == {"layers": [7]} and erased.value == pytest.approx(1, abs=2e-3)
    assert layers.where == {"strict": [3, 4, 5, 6], "loose": [3, 4, 5, 6]} and layers.value == 4
    assert result["n_massive"].values.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert set(result["peak_pos"].values) == {pos} and set(result["peak_dim"].values) == {dim}
    assert set(result["writer"].values) == {3}
    assert_close(result["peak_path"].values[3:7], np.full((4, 6), sign * 2000.0))
    role = "first position" if pos == 0 else "other"
    assert (carriers.where[role], carriers.where["dims"]) == (6, [dim]) and carriers.value == float(pos == 0)
    assert carriers.null == pytest.approx(np.mean(1 / np.array(LENGTHS))) and carriers.n == 6
    at = result["pos"].values == pos
    assert_close(result["times_median"].values[3, at], 2000 / result["median"].values[3], rtol=1e-6)
    assert (result["massive_layers"].values == 4 * at).all() and set(result["role"].values[at]) == {role}
    assert result["dim_texts"].values.tolist() == [6 * (d == dim) for d in range(D_MODEL)]
    assert (result["value"].values[3:7, at, 0] == sign * 2000).all() and (result["dim"].values[3:7, at, 0] == dim).all()
    assert largest.ci95 is not None and largest.ci95[0] > 100 * largest.null


def _residuals(result: Result) -> list[np.ndarray]:
    batch = texts_of(LENGTHS)
    return [NULL(text).resid[3] for text in batch]


@pytest.mark.parametrize("part", ["MLP", "attention"])
def test_the_part_of_the_block_that_writes_is_told(part: str) -> None:
    """2000 added by block 3's MLP, or by its attention: the share of the norms is nearly 1, or nearly 0."""

    def plant(text: TokenText, script: Script) -> Script:
        script.resid[3:7, 0, 37] = 2000.0
        if part == "MLP":
            assert script.mlp is not None
            script.mlp[3, 0, 37] = 2000.0
        return script

    result = find(planted(NULL, plant))
    shares = result["writer_mlp_share"].values
    assert (shares > 0.99).all() if part == "MLP" else (shares < 0.01).all()
    written = result.findings[1]
    assert written.where["part"] == part and f"with its {part} rather than" in written.claim


def test_roles_of_a_hand_made_text() -> None:
    """First position, first and further delimiters, a special token told by its spelling: each is counted and named."""
    strings = ("Summer", " is", ".", "\n", " Winter", " is", "<|im_end|>", ".", " cold")
    batch = Batch(tuple(TokenText(tuple(range(5 + i, 14 + i)), strings) for i in range(2)))

    def plant(text: TokenText, script: Script) -> Script:
        script.resid[4, [0, 2, 3, 6], 7] = 3000.0
        if text.ids[0] == 5:
            script.resid[4, 5, 9] = -3000.0
        return script

    model = scripted(play=planted(NULL, plant), n_layers=N_LAYERS, n_heads=1, d_model=D_MODEL)
    result = run("massive-activations", model, batch)["massive-activations"]
    roles = [
        "first position",
        "other",
        "first delimiter",
        "delimiter",
        "other",
        "other",
        "special",
        "delimiter",
        "other",
    ]
    assert result["role"].values.tolist() == 2 * roles
    (carriers,) = (f for f in result.findings if "other" in f.where)
    assert carriers.where == {
        "first position": 2, "special": 2, "first delimiter": 2, "delimiter": 2, "other": 1, "dims": [7, 9]
    }  # fmt: skip
    assert carriers.value == pytest.approx((1 / 5 + 1 / 4) / 2) and carriers.null == pytest.approx(1 / 9)
    assert "the first delimiter in 2 texts ('.'); a further delimiter in 2 texts ('\\n')" in carriers.claim
    assert "another token in 1 text (' is'); in dimensions (texts) 7 (2), 9 (1)." in carriers.claim
    assert result["dim_texts"].values[[7, 9]].tolist() == [2, 1] and result["dim_texts"].values.sum() == 3


def test_carriers_are_those_of_the_looser_multiple_where_none_is_strict() -> None:
    carriers = find(planted(NULL, entry({2: 450.0}))).findings[3]
    assert "loosely massive entries lie at the first position in 6 texts" in carriers.claim
    assert carriers.where["first position"] == 6


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


def test_the_loss_comes_with_the_only_pass() -> None:
    """Next to token-uncertainty it is looked at once, and it is that analysis' surprisal."""
    model = scripted(n_layers=N_LAYERS, n_heads=1, d_model=D_MODEL)
    both = run(["massive-activations", "token-uncertainty"], model, texts_of(LENGTHS))
    massive, own = both["massive-activations"], both["token-uncertainty"]["surprisal_nats"].values
    (plan,) = massive.provenance["plan"]
    assert sum(key.startswith("logits:") for key in plan["captures"]) == 1
    assert massive["case"].values.tolist() == ["as it is"]
    assert_close(massive["loss_nats"].values[0], own)
    assert_close(massive["perplexity"].values, [np.exp(np.nanmean(own))], rtol=1e-6)


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
    assert abs(gaussian_ratio(n) - np.mean(ratios)) < 3 * error + 0.01 * np.mean(ratios)


def test_gaussian_null_matches_the_statistic() -> None:
    """On Gaussian streams the largest entry's mean excess over its null is within three standard errors of zero."""
    excess = []
    for seed in range(40):
        largest = find(random_play(N_LAYERS, 1, D_MODEL, seed=seed), (30, 30)).findings[0]
        excess.append(largest.value - largest.null)
    assert abs(np.mean(excess)) < 3 * np.std(excess, ddof=1) / len(excess) ** 0.5
