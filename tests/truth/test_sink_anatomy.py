"""Sink anatomy: sinks that need an entry go with it, sinks that do not stay, and what is unrelated looks unrelated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, run, scripted, see, texts_of, tiny_model
from scipy.stats import spearmanr

from probekit.analysis import Result, analyses
from probekit.backends.scripted import Script, planted, random_play
from probekit.core import Batch, Capture, Patch, Replace, Scale, TokenText
from probekit.methods.sink_cases import dims_by_layer, largest_dims, overlap, rank_correlations
from probekit.phenomena.sink_anatomy import SinkAnatomyParams
from probekit.reduce import AttentionStats, Norm

N_LAYERS, N_HEADS, D_MODEL = 8, 3, 48
LENGTHS = (30, 24, 27, 35, 22, 26)
FIRST, LAST, DIM, SIZE = 2, 4, 7, 2000.0  # the entry is in the stream after blocks 2 to 4, so blocks 3 to 5 read it
SINKS = range(FIRST + 1, LAST + 2)
NULL = random_play(N_LAYERS, N_HEADS, D_MODEL)
Value = Callable[[TokenText], float]


def write(script: Script, value: float, *, sinks: range | None, layers: range = range(FIRST, LAST + 1)) -> Script:
    """An entry at position 0 of some layers; in those with sinks, 0.7 of all attention on it, small value, smaller key."""
    for layer in layers:
        script.resid[layer, 0, DIM] = value
    for layer in sinks or ():
        script.pattern[layer] *= 0.3
        script.pattern[layer, :, :, 0] += 0.7
    script.pattern[-1, :, -1] = np.eye(len(script.resid[0]))[-1]  # a last token that attends to itself is no sink
    assert script.key is not None and script.value is not None
    for rows, scale in ((script.key, 0.25), (script.value, 0.5)):
        rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
        for layer in sinks or ():
            rows[layer, 0] *= scale
    return script


def world(needed: bool, value: Value = lambda _: SIZE, log: list[Any] | None = None) -> dict[str, Any]:
    """A script whose sinks need the entry to be above 500, or do not; and what patches make of it."""

    def build(text: TokenText, size: float) -> Script:
        sinks = SINKS if size > 500 or not needed else None
        return planted(NULL, lambda _, script: write(script, size, sinks=sinks))(text)

    def respond(text: TokenText, script: Script, patches: tuple[Patch, ...]) -> Script:
        for patch in patches:
            assert (patch.point.layer, patch.positions) == (FIRST, (0,))
            if log is not None:
                log.append(patch)
            if patch.dims == (DIM,):
                new = patch.edit.values.array.item() if isinstance(patch.edit, Replace) else 0.0
                script = build(text, new)
        return script

    return {"play": lambda text: build(text, value(text)), "respond": respond}


def find(
    batch: Batch | None = None, *, horizon: int = 16, tail: int = 4, scripts: dict[str, Any], **params: Any
) -> Result:
    model = scripted(**scripts, n_layers=N_LAYERS, n_heads=N_HEADS, d_model=D_MODEL)
    batch = batch or texts_of(LENGTHS)
    return run("sink-anatomy", model, batch, horizon=horizon, tail=tail, **params)["sink-anatomy"]


def test_sinks_that_need_the_entry_go_with_it() -> None:
    """All heads of three blocks, as it is, with the mean and in the control; none without the entry."""
    result = find(scripts=world(True))
    assert result["case"].values.tolist() == [
        "as it is",
        "removed after block 2",
        "mean after block 2",
        "control after block 2",
    ]
    expected = np.isin(np.arange(N_LAYERS), SINKS) * 1.0
    for case, rate in enumerate(result["sink_rate"].values):
        assert_close(rate, np.broadcast_to(0 * expected if case == 1 else expected, (len(LENGTHS), N_LAYERS)).T)
    removed, mean, value, stream, loss = result.findings[:5]
    assert stream.value < 2 and stream.null > 100
    assert (removed.value, removed.null, removed.ci95, removed.n) == (0, 1, (0, 0), len(LENGTHS))
    assert "in blocks 3 to 5, 0% to 0% block by block (100.0% as it is, 100.0% in the control)" in removed.claim
    further = " After these it is one of 0.0% (0.0% as it is)."
    assert removed.claim.endswith(": 100% of the sinks go with them." + further)
    assert removed.where["layer"] == FIRST and removed.where["blocks"] == [3, 5] and removed.where["entries"] == 6
    assert removed.where["received_control"] > 0.7 > 0.2 > removed.where["received_removed"]
    assert (mean.value, mean.null) == (1, 1) and "(6 entries)" in mean.claim
    assert value.value == pytest.approx(1) and value.null == pytest.approx(0.5)
    assert loss.value == pytest.approx(loss.null) and loss.unit == "nats per token"


def test_sinks_that_do_not_need_it_stay() -> None:
    result = find(scripts=world(False))
    removed, mean, value, _ = result.findings[:4]
    assert (removed.value, removed.null, mean.value) == (1, 1, 1) and ": the sinks stay. After" in removed.claim
    assert "in blocks 3 to 5, 100% to 100% block by block" in removed.claim
    assert value.value == pytest.approx(0.5)
    assert (result["largest"].sel(case="removed after block 2").values[3:6] < 10).all(), "but the entry is gone"
    assert np.isnan(result["sink_share"].values[:, result["pos"].values > 30]).all()
    assert np.isnan(result["at_sinks"].values[:, -1]).all() and np.isfinite(result["at_sinks"].values[:, 3:6]).all()
    assert_close(result["key_ratio"].values[:, 3:6], np.full((4, 3, 6), 0.25), atol=1e-6)


def test_the_mean_is_that_of_the_other_texts_and_the_control_is_elsewhere() -> None:
    log: list[Patch] = []
    batch = texts_of(LENGTHS)
    sizes = {text.ids: 2000.0 + 100 * i for i, text in enumerate(batch)}
    find(batch, scripts=world(True, lambda text: sizes[text.ids], log))
    means = {p.texts: p.edit.values.array.item() for p in log if isinstance(p.edit, Replace)}
    assert means == {(i,): pytest.approx((13500 - 2000 - 100 * i) / 5) for i in range(6)}
    zero = [p for p in log if isinstance(p.edit, Scale) and p.edit.factor == 0]
    assert sorted(p.texts for p in zero if p.dims == (DIM,)) == [(i,) for i in range(6)]
    assert sorted(p.texts for p in zero if p.dims != (DIM,)) == [(i,) for i in range(6)], "as many in the control"
    assert len(log) == 18


def test_texts_without_the_entry_do_not_count() -> None:
    """Half of the texts hold it: the sinks of these are compared, with three texts in the interval."""
    batch = texts_of(LENGTHS)
    without = {text.ids for text in batch.texts[:3]}
    result = find(batch, scripts=world(True, lambda text: 1.0 if text.ids in without else SIZE))
    removed = result.findings[0]
    assert (removed.value, removed.null, removed.n, removed.where["entries"]) == (0, 1, 3, 3)
    assert np.isnan(result["sink_rate"].values[1:, :, :3]).all() and np.isfinite(result["sink_rate"].values[0]).all()


def test_one_text_has_no_mean_case() -> None:
    batch, analysis = texts_of((30,)), analyses()["sink-anatomy"]
    result = find(batch, scripts=world(True))
    assert result["edit"].values.tolist() == ["as it is", "removed", "control"]
    assert result.findings[0].value == 0 and result.findings[0].ci95 is None
    info = tiny_model("llama-grouped").model.info
    assert analysis.passes(SinkAnatomyParams(phases=2), info, batch) == 5
    assert analysis.passes(SinkAnatomyParams(phases=2), info, texts_of((30, 30))) == 7


def test_without_massive_entries_the_joint_view_remains() -> None:
    result = find(scripts={"play": planted(NULL, lambda _, script: write(script, 1.0, sinks=SINKS))})
    assert result["case"].values.tolist() == ["as it is"]
    claim = "No entry that a later block reads is above 100 and 1000 × median; position 0 is a sink of 37.5% of heads."
    assert result.findings[0].claim == claim and result.findings[0].value == 3 / 8
    only = find(scripts=world(True), phases=0).findings[0]
    assert only.claim.startswith("Nothing was changed; position 0 is a sink of 37.5%")


def test_entries_of_a_block_belong_to_sinks_of_the_next() -> None:
    """Blocks 3 to 5 read what leaves 2 to 4: sinks there are all on the entry; sinks of blocks 2 to 4 by two thirds."""
    result = find(scripts=world(True), phases=0)
    at = result["pos"].values == 0
    assert np.flatnonzero(result["massive"].values[:, at].any(axis=1)[1:]).tolist() == [2, 3, 4], "counted from block 1"
    assert np.isnan(result["massive"].values[0]).all() and (result["dim"].values[3:6, at] == DIM).all()
    overlaps = [f for f in result.findings if f.unit == "share of sinks"]
    tokens = np.mean([1 / (n - 4) for n in LENGTHS])
    assert overlaps[0].value == 1 and overlaps[0].null == pytest.approx(tokens) and overlaps[0].where["back"] == 1
    assert overlaps[1].value == 1 and overlaps[1].where == {"dim": DIM} and overlaps[1].null < 0.1
    shifted = planted(NULL, lambda _, script: write(script, SIZE, sinks=range(FIRST, LAST + 1)))
    by_same = find(scripts={"play": shifted}, phases=0)
    overlaps = [f for f in by_same.findings if f.unit == "share of sinks"]
    assert overlaps[0].value == pytest.approx(2 / 3) and overlaps[0].where["back"] == pytest.approx(2 / 3)
    drain = result.findings[-1]
    assert drain.value == pytest.approx(0.5) and drain.null == 1
    gap = result["gap_nats"].values[3:6]
    assert (gap > 1).all() and abs(result["gap_nats"].values[:3]).max() < 1e-6


def test_phases_their_writers_and_which_are_chosen() -> None:
    """A weak run counts only if `ratio` allows it; the writer is where the entry grew most; the last block's is unread."""

    def plant(text: TokenText, script: Script) -> Script:
        sizes = {0: 300.0, 1: 500.0, 4: 3000.0, 5: 3100.0, 7: 5000.0}
        for layer, size in sizes.items():
            script.resid[layer, 0, DIM] = size
        return script

    def chosen(**params: Any) -> list[tuple[int, int]]:
        result = find(scripts={"play": planted(NULL, plant), "respond": lambda _, script, __: script}, **params)
        return sorted(set(zip(result["writer"].values.tolist(), result["last"].values.tolist(), strict=True)))[1:]

    assert chosen() == [(4, 6)]
    assert chosen(ratio=400.0) == [(0, 2), (4, 6)] and chosen(ratio=400.0, phases=1) == [(4, 6)]
    assert chosen(ratio=100.0, loose_ratio=500.0) == [(0, 2), (4, 6)]
    assert chosen(min_magnitude=3500.0) == []


def test_planted_associations_and_their_alignment() -> None:
    """Small values and large entries where attention is received: rank correlation -1 and +1 at the right blocks."""

    def plant(text: TokenText, script: Script) -> Script:
        received = script.pattern.sum(axis=2) / np.arange(len(text), 0, -1)  # layer, head, token
        assert script.value is not None
        script.value[:] = 0
        script.value[..., 0] = 1 / received.transpose(0, 2, 1)
        script.value[:, 0, :, 0] = 1000.0  # position 0 does not follow
        script.resid[:-1, :, 5] = 1000 * received[1:].mean(axis=1)
        return script

    play = planted(random_play(N_LAYERS, 1, D_MODEL, sharpness=1.0), plant)
    result = run("sink-anatomy", scripted(play=play, n_layers=N_LAYERS, n_heads=1, d_model=D_MODEL), texts_of(LENGTHS),
                 horizon=16, tail=4, phases=0)["sink-anatomy"]  # fmt: skip
    assert_close(result["rho_value_rest"].values, np.full((N_LAYERS, 1, 6), -1.0), atol=1e-6)
    assert result["rho_value"].values.max() > -0.9 and np.isnan(result["rho_entry"].values[0]).all()
    assert_close(result["rho_entry"].values[1:], np.ones((N_LAYERS - 1, 1, 6)), atol=1e-6)
    by_name = {f.where.get("quantity"): f for f in result.findings}
    assert by_name["value"].value == pytest.approx(-1) and by_name["entry"].value == pytest.approx(1)
    assert abs(by_name["key"].value) < 0.2


def test_heads_are_held_against_the_keys_of_their_group() -> None:
    """Grouped-query heads on a real architecture, against scipy, text by text."""
    model, batch = tiny_model("llama-grouped").model, texts_of((20, 17))
    stats, keys = see(model, [Capture("pattern", AttentionStats()), Capture("k", Norm())], batch)
    result = run("sink-anatomy", model, batch, horizon=16, tail=4, phases=0)["sink-anatomy"]
    for text, n in enumerate(batch.lengths):
        at = slice(batch.starts[text] + 1, batch.starts[text] + n - 4)
        for layer in range(3):
            for head in range(4):
                x = stats["received"].isel(layer=layer, head=head).values[at]
                expected = spearmanr(x, keys["norm"].isel(layer=layer, head=head // 2).values[at]).statistic
                assert result["rho_key_rest"].values[layer, head, text] == pytest.approx(expected, abs=1e-6)


def test_rank_correlation_with_ties_and_without_spread() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (3, 20)), rng.integers(0, 5, (3, 20))
    found = rank_correlations(x, y)
    assert_close(found, [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)], atol=1e-12)
    assert np.isnan(rank_correlations(np.ones(5), np.arange(5.0)))


def test_overlap_by_hand() -> None:
    """Two texts of three tokens, two layers; the last token of each is in the tail."""
    nan, pos = np.nan, np.array([0, 1, 2, 0, 1, 2])
    share = np.array([[1.0, 0.5, nan, 1.0, 0.0, nan], [0.5, 0.0, nan, 0.0, 0.5, nan]])
    massive = np.array([[1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    it, chance, back = overlap(share, massive, pos)
    assert it.value == pytest.approx(2.5 / 3.5) and (it.n, it.n_unit) == (2, "texts")
    assert chance == pytest.approx((1.5 / 2 + 1.0 / 2 + 0.5 / 2 + 0) / 3.5) and back == pytest.approx(2.5 / 3)
    rest, chance, _ = overlap(share, massive, pos, 1)
    assert (rest.value, chance) == (0, 0)


def test_dimensions_by_hand() -> None:
    """Sinks weigh by their heads; the tail and unknown dimensions do not count."""
    share = np.array([[0.5, 0.5, 0.0], [1.0, 0.5, np.nan]])
    dim = np.array([[-1, -1, -1], [2, 0, 1]])
    text = np.array([5, 5, 5])
    at_sinks, elsewhere = largest_dims(share, dim, text)
    assert_close(at_sinks, [[1 / 3, 0, 2 / 3]])
    assert np.isnan(elsewhere).all()
    assert_close(dims_by_layer(share, dim, text, np.array([0, 2])), [[0, 0], [1 / 3, 2 / 3]])


@pytest.fixture(scope="module")
def nulls() -> list[Result]:
    """Forty models without any relation, with loose criteria so that sinks and large entries both occur."""
    params = {"epsilon": 0.15, "min_magnitude": 0.0, "ratio": 3.0, "phases": 0}
    sizes = {"n_layers": 3, "n_heads": 2, "d_model": 16}
    return [
        run("sink-anatomy", scripted(play=random_play(**sizes, seed=seed, sharpness=1.0), **sizes),
            texts_of((24,) * 6, seed=seed), horizon=16, tail=4, **params)["sink-anatomy"]
        for seed in range(40)
    ]  # fmt: skip


def test_null_overlap_is_the_expected_one(nulls: list[Result]) -> None:
    """Excess over chance within three standard errors of zero, and most intervals hold the null."""
    found = [next(f for f in r.findings if f.unit == "share of sinks") for r in nulls]
    excess = np.array([f.value - f.null for f in found])
    assert 0.1 < np.mean([f.null for f in found]) < 0.8
    assert abs(excess.mean()) < 3 * excess.std(ddof=1) / len(excess) ** 0.5
    missed = sum(not f.ci95[0] <= f.null <= f.ci95[1] for f in found if f.ci95)
    assert missed <= 40 * 0.05 + 3 * (40 * 0.05 * 0.95) ** 0.5, missed


@pytest.mark.parametrize("quantity", ["entry", "stream", "key", "value"])
def test_null_associations_have_nominal_intervals(nulls: list[Result], quantity: str) -> None:
    found = [f for r in nulls for f in r.findings if f.where.get("quantity") == quantity]
    values = np.array([f.value for f in found])
    assert len(found) == 40 and abs(values.mean()) < 3 * values.std(ddof=1) / 40**0.5
    missed = sum(not f.ci95[0] <= 0 <= f.ci95[1] for f in found if f.ci95)
    assert missed <= 40 * 0.05 + 3 * (40 * 0.05 * 0.95) ** 0.5, missed


def test_figures_show_what_the_findings_say() -> None:
    result = find(scripts=world(True))
    drawn = result.figures()
    removed = result.findings[0]
    assert drawn["sink_rate after 2"].title == removed.claim
    curves = {t.name: np.array(t.y) for t in drawn["sink_rate after 2"].plot.data if t.name}
    assert set(curves) == {"as it is", "removed", "mean", "control"}
    assert_close(curves["removed"], np.zeros(N_LAYERS))
    assert_close(curves["as it is"], np.isin(np.arange(N_LAYERS), SINKS) * 1.0)
