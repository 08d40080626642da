"""Residual peaks: planted ones are found with their block and sub-layer; Gaussian streams have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, run, scripted, texts_of

from probekit.analysis import Result
from probekit.backends.scripted import Script, planted, random_play
from probekit.core import Batch, TokenText
from probekit.phenomena.residual_peaks import _gaussian_ratio

N_LAYERS, N_HEADS, D_MODEL = 8, 3, 48
LENGTHS = (30, 41, 25, 36, 30, 28)
NULL = random_play(N_LAYERS, N_HEADS, D_MODEL)
SIZE = 300.0
Change = Callable[[TokenText, Script], Script]


def peak(path: dict[int, float], pos: int = 0, mlp: bool = True) -> Change:
    """Add a vector of some length to the stream after some blocks; the MLP's work, or else attention's."""

    def plant(text: TokenText, script: Script) -> Script:
        assert script.mlp is not None
        before = 0.0
        for layer in range(N_LAYERS):
            size = path.get(layer, 0.0)
            script.resid[layer, pos, 5] += size
            if mlp:
                script.mlp[layer, pos, 5] += size - before
            before = size
        return script

    return plant


def find(played: Any, lengths: tuple[int, ...] = LENGTHS, batch: Batch | None = None, **params: Any) -> Result:
    model = scripted(play=played, n_layers=N_LAYERS, n_heads=N_HEADS, d_model=D_MODEL)
    return run("residual-peaks", model, batch or texts_of(lengths), **params)["residual-peaks"]


def test_ratio_is_the_norm_over_the_mean_of_later_others() -> None:
    """Norms 12, 1, 2, 3, … by hand: position 0 is in nobody's mean, and no token is in its own."""

    def plant(text: TokenText, script: Script) -> Script:
        script.resid[:] = 0
        script.resid[:, :, 3] = [12.0, *range(1, len(text))]
        return script

    result = find(planted(NULL, plant), (10,))
    later = np.arange(1.0, 10)
    expected = [12 / later.mean(), *(x / (later.sum() - x) * 8 for x in later)]
    assert_close(result["ratio"].values, np.tile(expected, (N_LAYERS, 1)), rtol=1e-6)
    assert_close(result["start_norm"].values, np.zeros(10))


@pytest.mark.parametrize("mlp", [True, False], ids=["MLP", "attention"])
@pytest.mark.parametrize("pos", [0, 11])
def test_planted_peak_is_found_with_its_writer_and_eraser(pos: int, mlp: bool) -> None:
    """300 long after blocks 3 to 6: token, block, sub-layer and eraser."""
    result = find(planted(NULL, peak(dict.fromkeys(range(3, 7), SIZE), pos, mlp)))
    first, largest, written, erased, blocks, *_ = result.findings
    assert set(result["peak_pos"].values) == {pos} and set(result["writer"].values) == {3}
    assert written.where == {"layer": 3, "sublayer": "MLP" if mlp else "attention"}
    assert abs(written.value - (0.96 if mlp else 0.02)) < 0.02
    assert abs(written.null - 1 / (1 + 3**0.5)) < 0.01, "attention is what is left of two streams and an MLP"
    assert erased.where == {"layers": [7], "sublayer": "MLP" if mlp else "attention"}
    assert "Block 7 takes the peak down by its" in erased.claim and erased.value == pytest.approx(
        1 - 7 / SIZE, abs=0.02
    )
    assert blocks.where == {"layers": [3, 4, 5, 6]} and (blocks.value, blocks.null) == (4, 0)
    assert "blocks 3 to 6" in blocks.claim
    ratios = [np.linalg.norm(NULL(text).resid[3:7], axis=-1) for text in texts_of(LENGTHS)]
    size = np.mean([SIZE / r[:, 1:].mean() for r in ratios])
    assert largest.value == pytest.approx(size, rel=0.05) and largest.null < 2
    if pos == 0:
        assert first.value == pytest.approx(size, rel=0.05) and first.where["layer"] in range(3, 7)
        assert largest.where == {"roles": {"position 0": 6}}
    else:
        assert first.value < 1.5 and largest.where == {"roles": {"another later token": 6}}


def test_peak_from_the_first_block_on_is_written_by_it() -> None:
    """What precedes the first block counts as its start: block 0 is the writer, and no block takes it down."""
    result = find(planted(NULL, peak(dict.fromkeys(range(N_LAYERS), SIZE))))
    _, _, written, erased, blocks, *_ = result.findings
    assert written.where == {"layer": 0, "sublayer": "MLP"}
    assert erased.where == {"layers": []} and erased.claim.startswith("No block takes the peak down")
    assert erased.value < 0.02 and blocks.value == N_LAYERS


def test_two_erasers_and_two_phases() -> None:
    """A peak that comes, goes, and comes back larger: the second one's writer and its two erasers."""
    path = {1: 60.0, 2: 60.0, 4: SIZE, 5: SIZE, 6: 180.0, 7: 60.0}
    result = find(planted(NULL, peak(path)))
    _, _, written, erased, blocks, *_ = result.findings
    assert written.where["layer"] == 4 and erased.where["layers"] == [6, 7]
    assert erased.value == pytest.approx(1 - 60 / SIZE, abs=0.02)
    assert blocks.where == {"layers": [1, 2, 4, 5, 6, 7]} and "1 to 2 and 4 to 7" in blocks.claim
    assert find(planted(NULL, peak(path)), least=20.0).findings[4].where == {"layers": [4, 5, 6]}


def test_roles_of_peak_tokens() -> None:
    """Each text's own place: at position 0, at a full stop, at a newline, at a word."""
    strings = [" the"] * 20
    places = {3: (0, " the"), 4: (6, "."), 5: (9, "\n"), 6: (9, " word")}
    texts = []
    for first, (pos, string) in places.items():
        own = [*strings[:pos], string, *strings[pos + 1 :]]
        texts.append(TokenText((first, *range(7, 26)), tuple(own)))

    def plant(text: TokenText, script: Script) -> Script:
        return peak({4: SIZE}, places[text.ids[0]][0])(text, script)

    result = find(planted(NULL, plant), batch=Batch(tuple(texts)))
    assert result["peak_pos"].values.tolist() == [0, 6, 9, 9]
    assert result.findings[1].where == {"roles": {"position 0": 1, "a later delimiter": 2, "another later token": 1}}


def test_peaks_are_set_beside_the_sinks_of_the_next_block() -> None:
    """A peak after blocks 3 to 5, sinks at its token in two of three heads of blocks 4 to 6: two thirds against none."""

    def plant(text: TokenText, script: Script) -> Script:
        for layer in range(4, 7):
            rows = script.pattern[layer, :2, 1:]
            rows *= 0.4 / rows.sum(-1, keepdims=True)
            rows[..., 0] += 0.6
        return peak(dict.fromkeys(range(3, 6), SIZE))(text, script)

    result = find(planted(NULL, plant))
    beside = result.findings[-1]
    assert beside.unit == "share of heads" and beside.value == pytest.approx(2 / 3) and beside.null == 0
    first = result["sink_share"].values[:, result["pos"].values == 0]
    assert_close(first[:, 0], [0, 0, 0, 0, *[2 / 3] * 3, 0], rtol=1e-6)
    none = find(planted(NULL, peak(dict.fromkeys(range(3, 6), SIZE)))).findings[-1]
    assert none.unit == "share of heads" and none.value == 0


def test_gaussian_streams_have_no_peak() -> None:
    """Sixty null models: 95 % of the intervals of position 0 hold 1, and the largest ratio averages to its null.

    Tolerances: three standard errors of the share of 60 intervals, and of the mean excess over the models.
    """
    seeds, covered, errors = 60, 0, []
    for seed in range(seeds):
        findings = find(random_play(N_LAYERS, N_HEADS, D_MODEL, seed=seed)).findings
        assert len(findings) == 3, "writer, erasers and sinks belong to a peak"
        first, largest, blocks = findings
        assert first.ci95 is not None and largest.claim.startswith("No token stands out")
        covered += first.ci95[0] <= first.null <= first.ci95[1]
        errors.append((first.value - first.null, largest.value - largest.null))
        assert blocks.value == blocks.null == 0 and blocks.where == {"layers": []}
    assert seeds * 0.95 - 3 * (seeds * 0.95 * 0.05) ** 0.5 <= covered < seeds
    error = np.array(errors)
    assert (np.abs(error.mean(axis=0)) < 3 * error.std(axis=0, ddof=1) / seeds**0.5).all(), error.mean(axis=0)


@pytest.mark.parametrize(("d_model", "n"), [(16, 200), (48, 240), (576, 2000)])
def test_gaussian_ratio_is_that_of_a_simulation(d_model: int, n: int) -> None:
    """Expected largest over mean norm of n Gaussian streams: within 0.5 % and three standard errors."""
    rng = np.random.default_rng(n)
    ratios = []
    for _ in range(200):
        norms = np.sqrt(rng.chisquare(d_model, n))
        ratios.append(norms.max() / norms.mean())
    error = float(np.std(ratios, ddof=1)) / len(ratios) ** 0.5
    assert abs(_gaussian_ratio(d_model, n) - np.mean(ratios)) < 3 * error + 0.005 * np.mean(ratios)
