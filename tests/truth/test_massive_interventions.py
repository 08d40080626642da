"""Massive entries set to zero and to their mean: planted causes give the planted losses; entries without function none."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, run, scripted, texts_of

from probekit.analysis import Result, get_analysis
from probekit.backends.scripted import Script, random_play
from probekit.core import Batch, InputError, Patch, Replace, TokenText
from probekit.plots import Figure

NAME, N_LAYERS, WIDTH = "massive-activations", 6, 64  # the unembedding is the identity: as many dimensions as words
LENGTHS = (30, 41, 25, 36, 30, 28)
BLOCK, DIM, SURE = 2, 37, 4.0
NULL = random_play(N_LAYERS, 1, WIDTH)
SIZES: dict[str, Any] = {"n_layers": N_LAYERS, "n_heads": 1, "d_model": WIDTH, "d_vocab": WIDTH}
CASES = ["as it is", "zero", "mean", "other dimension", "other position"]
Sureness = Callable[[TokenText, Script, tuple[Patch, ...]], Any]


def size(text: TokenText) -> float:
    """The planted entry of a text: negative, and its own in every text."""
    return -2000.0 - 100.0 * (len(text) % 7)


def play(text: TokenText) -> Script:
    """A massive entry at position 0 after blocks 2 to 4, and a last layer that expects the token that follows."""
    script = copy.deepcopy(NULL(text))
    script.resid[BLOCK : BLOCK + 3, 0, DIM] = size(text)
    return expecting(text, script, needed(text, script, ()))


def expecting(text: TokenText, script: Script, sureness: Any) -> Script:
    """The logit of the token that follows is `sureness`, all others are 0: the loss is ln(1 + 63 exp(-sureness))."""
    script.resid[-1] = 0.0
    script.resid[-1, np.arange(len(text) - 1), text.ids[1:]] = sureness
    return script


def loss(sureness: Any) -> Any:
    return np.log1p((WIDTH - 1) * np.exp(-np.asarray(sureness)))


def needed(text: TokenText, script: Script, patches: tuple[Patch, ...]) -> float:
    """How sure the model is: in proportion to the entry, sign included."""
    return SURE * float(script.resid[BLOCK, 0, DIM]) / -2000.0


def model_of(sureness: Sureness = needed, plays: Any = play) -> Any:
    def respond(text: TokenText, script: Script, patches: tuple[Patch, ...]) -> Script:
        script = copy.deepcopy(script)
        for patch in patches:
            assert patch.point.site == "resid_post" and patch.positions is not None and patch.dims is not None
            value = patch.edit.values.array.item() if isinstance(patch.edit, Replace) else 0.0
            script.resid[patch.point.layer, patch.positions[0], patch.dims[0]] = value
        return expecting(text, script, sureness(text, script, patches))

    return scripted(play=plays, respond=respond, unembedding=np.eye(WIDTH), **SIZES)


def remove(model: Any, batch: Batch | None = None, **params: Any) -> Result:
    return run(NAME, model, batch or texts_of(LENGTHS), intervene=True, **params)[NAME]


def means(batch: Batch) -> np.ndarray:
    """Each text's mean entry over the other texts."""
    sizes = np.array([size(t) for t in batch])
    return (sizes.sum() - sizes) / (len(sizes) - 1)


def test_a_planted_cause_gives_exactly_the_planted_losses() -> None:
    """Zero leaves a uniform guess, ln 64; the mean leaves what the mean over the other texts gives; controls nothing."""
    batch = texts_of(LENGTHS)
    result = remove(model_of(), batch)
    assert result["case"].values.tolist() == CASES
    own, mean = (SURE * np.array(x) / -2000 for x in ([size(t) for t in batch], means(batch)))
    expected = {"as it is": loss(own), "zero": np.full(6, np.log(WIDTH)), "mean": loss(mean)}
    expected |= {"other dimension": loss(own), "other position": loss(own)}
    weights = np.array(LENGTHS) - 1
    for case, per_text in expected.items():
        found = result["loss_nats"].sel(case=case).values
        for i, text in enumerate(batch):
            at = slice(batch.starts[i], batch.starts[i] + len(text))
            assert_close(found[at], np.append(np.full(len(text) - 1, per_text[i]), np.nan), rtol=1e-5)
        perplexity = np.exp((weights * per_text).sum() / weights.sum())
        assert float(result["perplexity"].sel(case=case)) == pytest.approx(perplexity, rel=1e-5)
    zero, restored = result.findings[-2:]
    assert zero.value == pytest.approx((weights * (np.log(WIDTH) - loss(own))).sum() / weights.sum(), rel=1e-5)
    assert zero.null == pytest.approx(0, abs=1e-6) and (zero.n, zero.n_unit) == (6, "texts")
    assert zero.where["beyond_controls"] and zero.where["block"] == BLOCK and "the model uses them" in zero.claim
    assert zero.where["perplexity"] == pytest.approx(WIDTH, rel=1e-5)
    assert restored.value == pytest.approx((weights * (loss(mean) - loss(own))).sum() / weights.sum(), rel=1e-4)
    assert abs(restored.value) < 0.01 * zero.value and not restored.where["beyond_controls"]


def test_what_ran_is_told_pass_by_pass() -> None:
    """Five passes, as announced, the later ones each with its reason; without interventions one."""
    analysis, model, batch = get_analysis(NAME), model_of(), texts_of(LENGTHS)
    for intervene, n, texts in ((True, 5, batch), (True, 4, batch.select([0])), (False, 1, batch)):
        params = analysis.Params.parse({"intervene": intervene}, NAME)
        plans = run(NAME, model, texts, intervene=intervene)[NAME].provenance["plan"]
        assert sum(p["passes"] for p in plans) == analysis.passes(params, model.info, texts) == n
        assert [bool(p["why"]) for p in plans] == [False, *[True] * (len(plans) - 1)]


def test_an_entry_without_function_is_not_said_to_have_one() -> None:
    """Every change of the stream moves the losses by the same noise, on twenty models: seldom "the model uses them"."""
    claimed = []
    for seed in range(20):

        def noisy(text: TokenText, script: Script, patches: tuple[Patch, ...], seed: int = seed) -> np.ndarray:
            where = repr((seed, text.ids, [(p.positions, p.dims, p.edit.key) for p in patches]))
            rng = np.random.default_rng(int(hashlib.sha256(where.encode()).hexdigest()[:12], 16))
            return needed(text, play(text), ()) + rng.normal(0, 0.5, len(text) - 1)

        zero, _ = remove(model_of(noisy)).findings[-2:]
        assert np.isfinite(zero.null) and zero.ci95 is not None
        claimed.append(zero.where["beyond_controls"])
        assert ("presence is not function" in zero.claim) != claimed[-1]
    assert sum(claimed) <= 2, "nominally at most one in forty"


def test_a_cost_that_the_controls_have_too_is_no_function() -> None:
    """Whatever is set to zero halves the sureness: a large change, and the null is as large."""
    zero, _ = remove(model_of(lambda text, script, patches: SURE / 2)).findings[-2:]
    assert zero.value == pytest.approx(zero.null, rel=1e-6) and zero.value > 0.5
    assert not zero.where["beyond_controls"] and "presence is not function" in zero.claim


def test_nothing_to_remove_on_gaussian_streams() -> None:
    """No entry is massive: one pass, one case, and a finding that says so; the same at a block that holds none."""
    for plays, params, words in (
        (NULL, {}, "any block"),
        (NULL, {"at_block": 1}, "block 1"),
        (play, {"at_block": 1}, "block 1"),
    ):
        result = remove(model_of(plays=plays), **params)
        assert result["case"].values.tolist() == ["as it is"] and len(result.provenance["plan"]) == 1
        nothing = result.findings[-1]
        assert nothing.claim == f"No entry is massive after {words}: there was nothing to set to zero."
        assert (nothing.value, nothing.null, nothing.ci95) == (0, 0, (0, 0)) and "removal" not in result.figures()


def test_one_text_has_no_mean_and_few_tokens_have_no_interval() -> None:
    """The case is left out and said to be; with a single block of tokens nothing is claimed."""
    batch = texts_of((30,))
    result = remove(model_of(), batch)
    assert result["case"].values.tolist() == [c for c in CASES if c != "mean"]
    zero = result.findings[-1]
    assert zero.where["case"] == "zero" and "there is no mean to set them to" in zero.claim
    assert (zero.ci95, zero.n, zero.where["beyond_controls"]) == (None, 1, False)
    assert isinstance(result.figures()["removal"], Figure)
    longer = remove(model_of(), texts_of((100,))).findings[-1]
    assert longer.where["beyond_controls"] and (longer.n, longer.n_unit) == (4, "blocks of 32 tokens")


def test_the_first_block_is_that_of_most_texts_unless_one_is_given() -> None:
    """One text holds a massive entry a block earlier, of another dimension; four blocks of entries can be asked for."""
    odd = texts_of(LENGTHS).texts[3]

    def early(text: TokenText) -> Script:
        script = play(text)
        if text == odd:
            script.resid[BLOCK - 1, 5, 9] = 5000.0
        return script

    model = model_of(plays=early)
    assert remove(model).findings[-2].where["block"] == BLOCK
    assert remove(model, at_block=BLOCK - 1).dataset.attrs["intervention"] == {
        "block": BLOCK - 1, "n_entries": 1, "n_averaged": 0
    }  # fmt: skip
    later = remove(model, at_block=BLOCK + 1)
    assert later.dataset.attrs["intervention"] == {"block": BLOCK + 1, "n_entries": 6, "n_averaged": 6}
    assert not later.findings[-2].where["beyond_controls"], "the planted cause reads block 2 only"
    with pytest.raises(InputError, match=r"Block 6 is to be changed, and 'scripted' has the blocks 0 to 5"):
        remove(model, at_block=6)


def test_the_criterion_decides_what_is_removed() -> None:
    """Below the magnitude or the multiple nothing is removed, whatever the other says."""
    for params in ({"min_magnitude": 3000.0}, {"ratio": 1e5}):
        assert remove(model_of(), **params).dataset.attrs["intervention"]["n_entries"] == 0
    assert remove(model_of(), min_magnitude=2550.0).dataset.attrs["intervention"]["n_entries"] == 1


def placed(text: TokenText, script: Script, patches: tuple[Patch, ...]) -> float:
    """A sureness that tells which places were changed, and to what."""
    where = repr([(p.positions, p.dims, p.edit.key) for p in patches])
    return int(hashlib.sha256(where.encode()).hexdigest()[:6], 16) / 2**22


def test_text_order_moves_the_losses_and_nothing_else() -> None:
    """The controls' random places are those of the text, whatever texts are beside it."""
    batch, order = texts_of(LENGTHS), [4, 2, 0, 5, 1, 3]
    first, second = (remove(model_of(placed), b) for b in (batch, Batch(tuple(batch.texts[i] for i in order))))
    for place, i in enumerate(order):
        one, other = (r["loss_nats"].values[:, r["text"].values == t] for r, t in ((first, i), (second, place)))
        assert_close(other, one, rtol=1e-6)
    for a, b in zip(first.findings, second.findings, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-5)
