"""Logit lens: a prediction planted from a block on is read from that block on; random streams settle nowhere early.

The unembedding is the identity, so that a residual row is its own logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import assert_close, run, scripted, texts_of
from reference import readout

from probekit.analysis import Result
from probekit.backends.scripted import Play, Script, planted, random_play
from probekit.core import TokenText

N_LAYERS, V = 8, 64
LENGTHS = (30, 41, 25, 36, 30, 28)
NULL = random_play(N_LAYERS, 1, V)


def find(play: Play, lengths: tuple[int, ...] = LENGTHS, **params: Any) -> Result:
    model = scripted(play=play, n_layers=N_LAYERS, n_heads=1, d_model=V, d_vocab=V, unembedding=np.eye(V))
    return run("logit-lens", model, texts_of(lengths, V), **params)["logit-lens"]


def readable_from(block: int, height: float = 12.0) -> Any:
    """Before `block` the token that follows is unlikely and another is named; from it on it is nearly certain."""

    def plant(text: TokenText, script: Script) -> Script:
        for pos in range(len(text)):
            target = text.ids[pos + 1] if pos + 1 < len(text) else 0
            script.resid[:block, pos, target] = -5.0
            script.resid[:block, pos, (target + 7) % V] = height
            script.resid[block:, pos] = 0.0
            script.resid[block:, pos, target] = height
        return script

    return planted(NULL, plant)


@pytest.mark.parametrize("block", range(N_LAYERS))
def test_planted_prediction_is_read_from_its_block_on(block: int) -> None:
    """Settled layer, agreement and the informative block are exactly the planted one."""
    result = find(readable_from(block))
    assert set(result["settled_layer"].values) == {block}
    assert result["agreement"].values.tolist() == [0.0] * block + [1.0] * (N_LAYERS - block)
    informative, settled, agree = result.findings
    assert informative.where["layer"] == informative.value == block
    assert settled.value == block and settled.null == N_LAYERS - 1
    late = agree.where["layer"]
    assert (late, agree.value) == (6, float(late >= block))
    known = np.isfinite(result["logprob_nats"].values[-1])
    exact = 12 - np.log(np.exp(12) + V - 1)
    assert_close(
        result["logprob_nats"].values[block:, known], np.full((N_LAYERS - block, known.sum()), exact), atol=1e-5
    )
    assert (result["target_rank"].values[block:, known] == 0).all()
    assert (result["target_rank"].values[:block, known] > 0).all()
    assert np.abs(result["kl_nats"].values[block:]).max() < 1e-5
    assert not block or result["kl_nats"].values[:block].min() > 5


def test_every_number_equals_the_naive_one() -> None:
    """Random streams: all per-token numbers against float64."""
    result, batch = find(NULL), texts_of(LENGTHS, V)
    final = np.concatenate([NULL(t).resid[-1] for t in batch])
    for layer in range(N_LAYERS):
        logits = np.concatenate([NULL(t).resid[layer] for t in batch])
        for name, expected in readout(logits, batch.next_ids, 10, final).items():
            if name in result.dataset:
                assert_close(result[name].values[layer], expected, atol=1e-5, what=f"{name} of layer {layer}")


def test_random_streams_settle_late_and_agree_by_chance_only() -> None:
    """The matched null: layers are independent, so agreement is chance and settling is where chance puts it."""
    result = find(NULL, (200,) * 6)
    informative, settled, agree = result.findings
    assert informative.where["layer"] == N_LAYERS and "no better than a uniform guess" in informative.claim
    chance = 1 / V
    expected = (N_LAYERS - 1) - sum(chance**k for k in range(1, N_LAYERS))
    assert settled.ci95 is not None and agree.ci95 is not None
    assert settled.ci95[0] < expected < settled.ci95[1]
    assert agree.null == pytest.approx(chance, abs=2e-3)
    assert agree.ci95[0] <= agree.null <= agree.ci95[1]


def test_agreement_interval_covers_its_null_at_the_nominal_rate() -> None:
    """Over 60 null models the 95 % interval of the agreement holds its null in at least 85 %."""
    covered = 0
    for seed in range(60):
        play = random_play(N_LAYERS, 1, V, seed=seed)
        agree = find(play, (60,) * 8).findings[2]
        assert agree.ci95 is not None
        covered += agree.ci95[0] <= agree.null <= agree.ci95[1]
    assert covered >= 51, covered


def test_agreement_null_counts_all_pairings_of_different_positions() -> None:
    """Against brute force over pairs, with predictions that repeat."""
    rng = np.random.default_rng(0)
    best = rng.integers(0, 4, (N_LAYERS, 60))

    def plant(text: TokenText, script: Script) -> Script:
        for pos in range(len(text)):
            script.resid[np.arange(N_LAYERS), pos, best[:, pos]] = 20.0
        return script

    found = find(planted(NULL, plant), (60,))["agreement_null"].values
    differ = ~np.eye(60, dtype=bool)
    brute = [(layer[:, None] == best[-1][None])[differ].mean() for layer in best]
    assert_close(found, brute, rtol=1e-12)


def test_a_prediction_that_is_lost_again_does_not_count_as_settled() -> None:
    """Named by block 2, lost by block 4, named from block 6 on: settled at 6."""

    def plant(text: TokenText, script: Script) -> Script:
        script.resid[:, :, 9] = 20.0
        script.resid[4:6, :, 5] = 40.0
        return script

    result = find(planted(NULL, plant))
    assert set(result["settled_layer"].values) == {6}
    assert result["agreement"].values.tolist() == [1, 1, 1, 1, 0, 0, 1, 1]


def test_informative_only_where_every_later_block_is_too() -> None:
    """A block that beats the uniform guess by accident, before one that does not, does not count."""

    def plant(text: TokenText, script: Script) -> Script:
        for pos in range(len(text) - 1):
            script.resid[1, pos, text.ids[pos + 1]] = 12.0
        return script

    assert find(planted(readable_from(5), plant)).findings[0].where["layer"] == 5
