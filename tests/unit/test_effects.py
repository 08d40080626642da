"""What patches do to one text: KL, loss and next tokens against the model's own logits; directions against means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import tiny_model

import probekit as pk
from probekit.core import Batch

TEXT = tuple(range(3, 14))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama").model


def batch_of(model: Any, *texts: tuple[int, ...]) -> Batch:
    from probekit.core import TokenText

    return Batch(tuple(TokenText(t, tuple(model.decode(t))) for t in texts))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_effect_is_that_of_two_passes(model: Any) -> None:
    batch, patch = batch_of(model, TEXT), pk.Patch(("mlp_out", 0), 0.0, (2,))
    found = pk.effect(model, batch, [patch], position=5, top_k=3, progress=False)
    before, after = (
        log_softmax(pk.cache(model, batch, "logits", patches=some).logits.values) for some in ((), (patch,))
    )
    kl = float((np.exp(before[5]) * (before[5] - after[5])).sum())
    assert kl > 1e-8 and np.isclose(found.kl_nats, kl, rtol=1e-3)
    rows = np.arange(len(TEXT) - 1)
    losses = [-row[rows, list(TEXT[1:])] for row in (before, after)]
    np.testing.assert_allclose(found.data["loss_nats"].values[:, :-1], losses, rtol=1e-4)
    assert np.isnan(found.data["loss_nats"].values[:, -1]).all()
    np.testing.assert_allclose(found.loss_nats, [x.mean() for x in losses], rtol=1e-4)
    ids = found.data["vocab"].values
    assert set(ids) == set(np.argsort(-before[5])[:3]) | set(np.argsort(-after[5])[:3])
    np.testing.assert_allclose(found.data["logprob_nats"].values, [before[5][ids], after[5][ids]], rtol=1e-4)
    assert (np.diff(found.data["logprob_nats"].sel(case="before").values) <= 0).all()
    np.testing.assert_allclose(losses[0][:1], losses[1][:1], rtol=1e-5)  # what comes before the patch is untouched


def test_no_patch_has_no_effect(model: Any) -> None:
    found = pk.effect(model, batch_of(model, TEXT), [], progress=False)
    assert found.position == len(TEXT) - 1 and found.kl_nats == 0.0 and found.loss_nats[0] == found.loss_nats[1]
    assert "KL 0 nats after token 10" in repr(found) and found.nbytes > 0


def test_direction_is_the_difference_of_means(model: Any) -> None:
    texts = [model.tokenize([t]) for t in ("w3 w4 w5", "w6 w7", "w8 w9 w10")]
    for point, head in (("resid_post.1", None), ("z.1", 1)):
        last = [pk.cache(model, t, point)[point].values[-1] for t in texts]
        expected = (last[0] + last[1]) / 2 - last[2]
        found = pk.difference_of_means(model, point, ["w3 w4 w5", "w6 w7"], ["w8 w9 w10"])
        assert found.dims == (("d_model",) if head is None else ("head", "d_head"))
        np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_done_is_said(model: Any) -> None:
    batch = batch_of(model, TEXT)
    for call, said in (
        (lambda: pk.effect(model, batch, [], position=99), "Position 99 is outside the text of 11 tokens, 0 to 10"),
        (lambda: pk.effect(model, batch_of(model, TEXT, TEXT), []), "one text; found 2"),
        (lambda: pk.effect(model, batch, [], top_k=0), "at least 1"),
        (lambda: pk.effect(model, batch, [pk.Patch("router.0", 0.0)]), "no point 'router'"),
        (lambda: pk.effect(model, batch_of(model, ()), []), "Text 0 is empty"),
        (lambda: pk.difference_of_means(model, "resid_post.0", [], ["w3"]), "found 0 and 1"),
        (lambda: pk.difference_of_means(model, "resid_post", ["w3"], ["w4"]), "in one layer"),
        (lambda: pk.difference_of_means(model, "pattern.0", ["w3"], ["w4"]), "a row per token"),
        (lambda: pk.difference_of_means(model, "resid_post.0", ["w3"], ["w4"], position=5), "Position 5"),
    ):
        with pytest.raises(pk.ProbekitError, match=said):
            call()


def test_a_listener_can_end_it(model: Any) -> None:
    def stop(step: pk.Step) -> None:
        raise pk.Cancelled("enough")

    with pytest.raises(pk.Cancelled):
        pk.effect(model, batch_of(model, TEXT), [], progress=stop)
