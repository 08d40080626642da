"""Secondary sinks: planted levels are found exactly, in the right window; Gaussian streams have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import assert_close, run, scripted, texts_of

from probekit.analysis import Result
from probekit.backends.scripted import Play, Script, planted, random_play
from probekit.core import Batch, TokenText
from probekit.methods.sink_levels import NOISE, PRIMARY_LIKE, SECONDARY, Labels, Levels, Table, published_window, runs

N_LAYERS, D_MODEL = 20, 48
LENGTHS = (30, 41, 25, 36, 30, 28)
NULL = random_play(N_LAYERS, 2, D_MODEL)
U = np.eye(D_MODEL)[5]
ONE_PHASE = {layer: 300.0 for layer in range(3, 18)}
TWO_PHASES = {layer: 300.0 for layer in range(2, 7)} | {layer: 1000.0 for layer in range(11, 19)}


def sink(norms: dict[int, float], pos: int = 0, sign: int = 1, write: bool = False) -> Any:
    """The stream at a position is `norms[layer]` along U; with `write`, the first of these blocks' MLP writes it."""

    def plant(text: TokenText, script: Script) -> Script:
        assert script.mlp is not None
        for layer, norm in norms.items():
            script.resid[layer, pos] = sign * norm * U
        if write:
            script.mlp[min(norms), pos] = sign * norms[min(norms)] * U
        return script

    return plant


def play_of(*changes: Any, null: Play = NULL) -> Play:
    for change in changes:
        null = planted(null, change)
    return null


def find(play: Play, batch: Batch | None = None, **params: Any) -> Result:
    model = scripted(play=play, n_layers=N_LAYERS, n_heads=2, d_model=D_MODEL)
    return run("secondary-sinks", model, batch or texts_of(LENGTHS), **params)["secondary-sinks"]


def ends(result: Result, case: str) -> set[tuple[int, int]]:
    of_case = result.dataset.sel(case=case)
    return set(zip(of_case["start"].values.tolist(), of_case["end"].values.tolist(), strict=True))


@pytest.mark.parametrize("sign", [1, -1])
def test_planted_level_is_found_exactly(sign: int) -> None:
    """From block 8 for 5 of the window's 15 layers, along the primary or against it, written by block 8's MLP."""
    result = find(play_of(sink(ONE_PHASE), sink({a: 300.0 for a in range(8, 13)}, 11, sign, write=True)))
    secondary, like, windows, _, written, *_ = result.findings
    assert (secondary.value, secondary.null, secondary.ci95, secondary.n) == (1, 0, (1, 1), 6)
    (level,) = secondary.where["levels"]
    assert (level["layer"], level["lifetime"], level["tokens"]) == (8, 5, 6)
    assert level["depth"] == pytest.approx(8 / 19) and level["share"] == pytest.approx(5 / 15)
    assert like.value == like.null == 0 and "No text has primary-like tokens" in like.claim
    assert windows.where == {"windows": ["3 to 17"], "published": "3 to 17"}
    at = result["pos"].values == 11
    for name, there in (("created", 8), ("lifetime", 5), ("kind", SECONDARY)):
        values = result[name].values
        assert (values[:, at] == there).all() and (values[:, ~at] == (-1 if name == "created" else 0)).all(), name
    # The other tokens' MLP outputs are Gaussian: E|cos| = sqrt(2 / (pi d)) up to 1/d.
    assert written.value == pytest.approx(1 - np.sqrt(2 / np.pi / D_MODEL), abs=0.02) and written.n == 6
    assert written.where["times_norm"] == pytest.approx(300 / np.sqrt(D_MODEL), rel=0.05)


def test_without_a_written_direction_the_mlp_is_not_aligned() -> None:
    """The stream is planted, the MLP's output stays Gaussian: the contrast is within its interval of zero."""
    changes, batch = (sink(ONE_PHASE), sink({8: 300.0, 9: 300.0, 10: 300.0}, 11)), texts_of((20,) * 5)
    found = [find(play_of(*changes, null=_null(seed)), batch).findings[4] for seed in range(20)]
    excess = [f.value for f in found]
    assert abs(np.mean(excess)) < 3 * np.std(excess, ddof=1) / 20**0.5
    assert sum(f.ci95[0] > 0 or f.ci95[1] < 0 for f in found if f.ci95) <= 4


def _null(seed: int) -> Play:
    return random_play(N_LAYERS, 2, D_MODEL, seed=seed)


def test_two_phases_are_two_windows() -> None:
    """A primary in blocks 2 to 6 and 11 to 18: tokens of each phase in their window; the published rule sees one."""
    early = sink({a: 300.0 for a in range(2, 7)}, 7)
    late = sink({a: 1000.0 for a in range(13, 16)}, 9)
    result = find(play_of(sink(TWO_PHASES), early, late))
    assert list(result["case"].values) == ["window 1", "window 2", "published"]
    assert ends(result, "window 1") == {(2, 7)} and ends(result, "window 2") == ends(result, "published") == {(11, 19)}
    secondary, like, windows, *_ = result.findings
    assert [(x["layer"], x["lifetime"], x["share"]) for x in like.where["levels"]] == [(2, 5, 1.0)]
    assert [(x["layer"], x["lifetime"], x["share"]) for x in secondary.where["levels"]] == [(13, 3, 3 / 8)]
    assert windows.value == 2 and windows.where["windows"] == ["2 to 6", "11 to 18"]
    kind = result["kind"].values
    pos = result["pos"].values
    assert (kind[:, pos == 7] == [[PRIMARY_LIKE], [0], [0]]).all()
    assert (kind[:, pos == 9] == [[0], [SECONDARY], [SECONDARY]]).all()


def test_a_primary_at_another_position_and_in_some_texts_only() -> None:
    """The primary is each text's own; earlier tokens do not count, whatever their direction."""

    def plant(text: TokenText, script: Script) -> Script:
        if len(text) > 28:
            script = sink(ONE_PHASE, pos=2)(text, script)
            script = sink({a: 200.0 for a in range(8, 13)}, pos=1)(text, script)
            script = sink({a: 200.0 for a in range(6, 11)}, pos=8)(text, script)
        return script

    result = find(planted(NULL, plant), n_first=3)
    has = [n > 28 for n in LENGTHS]
    assert result["n_secondary"].values.tolist() == has
    assert [p for p, h in zip(result["primary_pos"].values, has, strict=True) if h] == [2, 2, 2, 2]
    assert result["start"].sel(case="window 1").values.tolist() == [3 if h else -1 for h in has]
    assert find(planted(NULL, plant)).findings[0].value == 0, "the primary is not among the first two"


@pytest.mark.parametrize(("cosine", "there"), [(0.8999, False), (0.9001, True), (-0.9001, True), (-0.8999, False)])
def test_cosines_near_the_threshold(cosine: float, there: bool) -> None:
    """A token at exactly this cosine is sink-like or not."""
    v = np.eye(D_MODEL)[6]

    def plant(text: TokenText, script: Script) -> Script:
        script.resid[8:13, 11] = 20 * (cosine * U + np.sqrt(1 - cosine**2) * v)
        return script

    result = find(play_of(sink(ONE_PHASE), plant))
    assert result.findings[0].value == there
    assert_close(np.abs(result["cosine"].values[10, result["pos"].values == 11]), np.full(6, abs(cosine)), atol=1e-6)
    assert find(play_of(sink(ONE_PHASE), plant), cosine=0.85).findings[0].value == 1
    names = ("n_by_cosine", "null_by_cosine")
    swept, null = (result[name].sel(threshold=[0.85, 0.95]).values.tolist() for name in names)
    assert swept == [1, 0] and null == [0, 0]


@pytest.mark.parametrize(
    ("layers", "kind"),
    [
        (range(5, 7), SECONDARY),  # 2 of 20: the least share and the fewest layers
        (range(5, 6), NOISE),
        (range(2, 7), NOISE),  # begun with the window
        (range(5, 16), SECONDARY),
        (range(5, 17), PRIMARY_LIKE),  # 12 of 20
        (range(2, 22), PRIMARY_LIKE),
        (range(0, 2), 0),
        ((4, 6, 9), SECONDARY),  # layers count, not runs
    ],
    ids=str,
)
def test_labels_at_their_bounds(layers: Any, kind: int) -> None:
    """In a window of twenty layers, 2 to 21."""
    hit = np.zeros((24, 1), dtype=bool)
    hit[list(layers)] = True
    level = Levels.of(hit, (2, 22), Labels())
    inside = [a for a in layers if a >= 2]
    assert level.kind.tolist() == [kind] and level.lifetime.tolist() == [len(inside)]
    assert level.created.tolist() == [min(inside, default=-1)]


@pytest.mark.parametrize(
    ("norm", "window"),
    [
        ([1, 2, 10, 11, 11, 4, 3], (2, 5)),  # D = 1 8 1 0 -7 -1
        ([1, 2, 3, 10], (3, 4)),  # the last step is the largest
        ([1, 10, 11, 13], (1, 2)),  # never taken down: the smallest rise ends it, as published
        ([9, 10, 800, 800, 147, 24_000, 24_000, 9_000], (5, 7)),  # the first of two phases is lost
        ([5], (0, 1)),
    ],
    ids=str,
)
def test_published_window_on_hand_made_norms(norm: list[float], window: tuple[int, int]) -> None:
    assert published_window(np.array(norm, dtype=float)) == window


def test_runs_have_two_layers_or_more() -> None:
    assert runs(np.array([1, 1, 0, 1, 0, 1, 1, 1], dtype=bool)) == [(0, 2), (5, 8)]
    assert runs(np.zeros(4, dtype=bool)) == []


def test_windows_are_where_the_norm_exceeds_the_multiple_of_the_median() -> None:
    """A primary of 3.1 medians has no window, one of 3.4 has; a lower factor finds both."""

    def plant(factor: float) -> Any:
        def change(text: TokenText, script: Script) -> Script:
            median = np.median(np.linalg.norm(script.resid[:, 1:], axis=-1), axis=-1)
            script.resid[3:18, 0] = factor * median[3:18, None] * U
            return script

        return change

    assert find(play_of(plant(3.1))).findings[2].value == 0
    assert ends(find(play_of(plant(3.3))), "window 1") == {(3, 18)}
    assert find(play_of(plant(3.1)), stands_out=3.0).findings[2].value == 1


def test_gaussian_streams_have_neither_windows_nor_sinks() -> None:
    """Twenty models without, and twenty with a primary that nothing follows."""
    for seed in range(20):
        result = find(_null(seed), texts_of((40,)))
        findings = result.findings
        assert [f.value for f in findings[:3]] == [0, 0, 0] and len(findings) == 4
        assert findings[0].claim == "No text has secondary sinks."
        assert not result["kind"].values.any()
        findings = find(play_of(sink(ONE_PHASE), null=_null(seed)), texts_of((40,))).findings
        assert [f.value for f in findings[:3]] == [0, 0, 1] and len(findings) == 4
        assert "largest |cosine| with the primary is 0." in findings[0].claim


def test_where_all_tokens_are_parallel_the_null_is_as_large() -> None:
    """Anisotropy alone: every token is primary-like, and would be with any token as the primary."""

    def parallel(text: TokenText, script: Script) -> Script:
        script.resid[:] += 60 * U
        return script

    like = find(play_of(parallel, sink(ONE_PHASE))).findings[1]
    assert like.value == pytest.approx(np.mean(LENGTHS) - 1) and like.null == pytest.approx(like.value)
    assert "no more than with an ordinary token" in like.claim


def test_repeats_of_an_ordinary_token_do_not_make_the_null() -> None:
    """The last token occurs four times with the same stream; two other tokens share its direction."""
    v = np.eye(D_MODEL)[7]
    ids = (*range(3, 30), 40, 40, 40, 30, 31, 32, 33, 34, 40)
    batch = Batch((TokenText(ids, tuple(f" w{i}" for i in ids)),))

    def plant(text: TokenText, script: Script) -> Script:
        alike = np.array([i in (40, 10, 11) for i in text.ids])
        script.resid[5:9, alike] = 7 * v
        return script

    secondary = find(play_of(sink(ONE_PHASE), plant), batch).findings[0]
    assert secondary.value == 0
    assert secondary.null == pytest.approx(2 * 35 / 31 / 3)  # one of three references; 35 tokens, 31 no repeats


def test_the_same_ids_elsewhere_are_compared_at_the_layer_of_creation() -> None:
    ids = (*range(3, 14), 50, *range(20, 28), 50, *range(30, 40))  # 50 at positions 11 and 20
    batch = Batch((TokenText(ids, tuple(f" w{i}" for i in ids)),))
    half = np.cos(1.2) * U + np.sin(1.2) * np.eye(D_MODEL)[6]

    def plant(text: TokenText, script: Script) -> Script:
        script.resid[8, 20] = 9 * half
        return script

    result = find(play_of(sink(ONE_PHASE), sink({a: 300.0 for a in range(8, 13)}, 11), plant), batch)
    assert result.findings[5].value == pytest.approx(1 - np.cos(1.2), abs=1e-6)


def test_attention_on_primary_and_secondary_over_depth() -> None:
    """Planted shares come out as column means; the middle third of the window is the planted one; the tail is left out."""

    def attend(text: TokenText, script: Script) -> Script:
        n = len(text)
        for layer in range(N_LAYERS):
            on_first = 0.3 if 8 <= layer < 13 else 0.7
            pattern = np.eye(n) * (1 - on_first)
            pattern[:, 0] += on_first
            late = np.arange(n) > 11
            pattern[late] = 0.0
            pattern[late, 0], pattern[late, 11] = on_first, 1 - on_first
            pattern[24] = np.eye(n)[24]
            script.pattern[layer] = pattern
        return script

    late_sink = sink({a: 300.0 for a in range(8, 13)}, 24)  # seen by eight queries or more in two texts
    result = find(play_of(sink(ONE_PHASE), sink({a: 300.0 for a in range(8, 13)}, 11), late_sink, attend))
    n = np.array(LENGTHS)
    first = (1 + (n - 2) * 0.7) / n
    assert_close(result["primary_received"].values[4], first, rtol=1e-6)
    change = result.findings[3]
    assert change.value == pytest.approx(np.mean(-0.4 * (n - 2) / n), rel=1e-5)
    assert change.ci95 is not None and change.ci95[1] < 0
    own = (n - 12) * 0.7 / (n - 11)  # at layer 8; itself and the queries after it but one
    seen = np.where(n - 24 >= 8, 1 / (n - 24), 0)
    assert_close(result["secondary_received"].values[8], own + seen, rtol=1e-6)
    assert not result["primary_like_received"].values.any()
    assert result["n_secondary"].values.tolist() == [2.0] * 6


def test_thirds_of_the_longest_window() -> None:
    """Eight layers split 3, 3, 2; a text without a window uses every layer, ten, split 4, 3, 3."""
    start, end = np.array([[0, -1], [8, -1], [9, 9]]), np.array([[8, -1], [10, -1], [10, 10]])
    table = Table(xr.Dataset({"start": (("case", "text"), start), "end": (("case", "text"), end)}))
    path = np.arange(10.0)
    middle, outer = table.thirds(np.stack([path**2, path], axis=1))
    assert_close(middle, [(9 + 16 + 25) / 3, np.mean([4, 5, 6])])
    assert_close(outer, [np.mean([0, 1, 4, 36, 49]), np.mean([0, 1, 2, 3, 7, 8, 9])])
