"""Dormant heads: planted heads are found where they switch and at what they cost; labels that mean nothing find none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import N_HEADS, N_LAYERS, assert_close, run, scripted, texts_of, tiny_model
from scipy.special import log_softmax

from probekit.analysis import Result
from probekit.backends.scripted import Script, ScriptedModel
from probekit.core import Batch, InputError, Patch, Scale, TextError, TokenText
from probekit.methods.domains import Rule, find_switching, smallest_p
from probekit.methods.removals import sample_heads

NAME = "dormant-heads"
LAYERS, HEADS, VOCAB = 4, 3, 32
SWITCHING, DORMANT, ACTIVE = (2, 1), (0, 0), (1, 2)  # the planted heads
COSTS = {(SWITCHING, "b"): 0.5, (ACTIVE, "a"): 0.1, (ACTIVE, "b"): 0.1}  # nats per token
PLANTED = {(SWITCHING, "a"): 0.98, (SWITCHING, "b"): 0.2, **{(DORMANT, d): 0.95 for d in "abc"}}
PLANTED |= {(ACTIVE, d): 0.3 for d in "abc"} | {(SWITCHING, "c"): 0.7}
RULE = Rule(0.9, 0.5, 0.05)

Level = Callable[[str, tuple[int, int], np.random.Generator], float]


def text_of(domain: str, number: int, n: int = 12) -> TokenText:
    """The second token tells the script the domain, the third and fourth which text it is."""
    ids = ("abc".index(domain), 10 + number % 20, 10 + number // 20, *range(3, n))
    return TokenText((5, *ids)[:n], tuple(f" w{i}" for i in (5, *ids)[:n]), domain)


def batch_of(counts: dict[str, int], seed: int = 0) -> Batch:
    return Batch(tuple(text_of(d, 20 * seed % 400 + i) for d, n in counts.items() for i in range(n)))


def planted(domain: str, place: tuple[int, int], rng: np.random.Generator) -> float:
    noise = float(rng.uniform(-0.01, 0.01))
    return PLANTED.get((place, domain), 0.7 + 5 * noise) + noise


def logit(logprob: float) -> float:
    """The logit of one token, the others having 0, that gives it a log-probability."""
    p = np.exp(logprob)
    return float(np.log(p * (VOCAB - 1) / (1 - p)))


def model_of(level: Level, sizes: tuple[int, int] = (LAYERS, HEADS), seed: int = 0) -> ScriptedModel:
    """Rows put `level` on position 0 and the rest evenly on the others; surprisal is 2 nats, more without a head."""

    def domain_of(text: TokenText) -> str:
        return "abc"[text.ids[1]]

    def stream(text: TokenText, logprob: float) -> np.ndarray:
        resid = np.zeros((sizes[0], len(text), VOCAB))
        resid[-1, np.arange(len(text) - 1), text.ids[1:]] = logit(logprob)
        return resid

    def play(text: TokenText) -> Script:
        n, rng = len(text), np.random.default_rng((seed, *text.ids))
        pattern = np.zeros((*sizes, n, n))
        pattern[..., 0, 0] = 1
        for place in itertools.product(*map(range, sizes)):
            first = level(domain_of(text), place, rng)
            for i in range(1, n):
                pattern[(*place, i)][: i + 1] = [first, *[(1 - first) / i] * i]
        return Script(stream(text, -2.0), pattern)

    def respond(text: TokenText, script: Script, patches: tuple[Patch, ...]) -> Script:
        (patch,) = patches
        assert patch.point.site == "z" and patch.edit == Scale(0.0) and patch.positions is None and patch.heads
        cost = COSTS.get(((patch.point.layer, patch.heads[0]), domain_of(text)), 0.0)
        return replace(script, resid=stream(text, -2.0 - cost))

    how: dict[str, Any] = {"n_layers": sizes[0], "n_heads": sizes[1], "d_model": VOCAB, "d_vocab": VOCAB}
    return scripted(play=play, respond=respond, unembedding=np.eye(VOCAB), **how)


def dormant(model: Any, batch: Batch, **params: Any) -> Result:
    return run(NAME, model, batch, **{"n_permutations": 999, **params})[NAME]


@pytest.fixture(scope="module")
def whole() -> Result:
    return dormant(model_of(planted), batch_of({"a": 5, "b": 6}), heads="all")


def test_the_planted_head_and_no_other_switches(whole: Result) -> None:
    """Dormant in a, active in b, p near the 1 / 462 that 5 and 6 texts allow, as strong as planted."""
    assert np.argwhere(whole["switches"].values == 1).tolist() == [list(SWITCHING)]
    first = whole.findings[0]
    (head,) = first.where["heads"]
    assert (head["layer"], head["head"], head["dormant_in"], head["active_in"]) == (*SWITCHING, ["a"], ["b"])
    assert head["p"] == whole["p_value"].values[SWITCHING] < 0.01
    assert (np.delete(whole["p_value"].values.ravel(), 7) > 0.05).all()
    assert first.value == 1 and first.null < 0.02 and first.ci95 == (1, 1) and first.n == 11
    assert "1 of 12 heads switch" in first.claim and "2.1, dormant in a, active in b" in first.claim
    assert_close(whole["domain_dormancy"].values[(slice(None), *SWITCHING)], [0.98, 0.2], atol=0.01)
    assert np.abs(whole["spread"].values[SWITCHING] - 0.78) < 0.02


def test_costs_are_those_that_were_planted(whole: Result) -> None:
    """Hand-made: the switching head 0.5 in b, the active one 0.1; per text the mean over the heads of a kind."""
    cost = whole["domain_loss_change_nats"].values
    expected = np.zeros((2, LAYERS, HEADS))
    for (place, domain), nats in COSTS.items():
        expected[("ab".index(domain), *place)] = nats
    assert_close(cost, expected, atol=1e-5)
    assert_close(np.nanmean(whole["loss_nats"].values), 2.0, atol=1e-5)
    assert whole.findings[0].where["heads"][0]["loss_change_nats"] == pytest.approx({"a": 0, "b": 0.5}, abs=1e-5)
    switching, share, resting, working, order = whole.findings[1:]
    assert (switching.value, switching.null, switching.n) == (pytest.approx(0.5), pytest.approx(0, abs=1e-5), 6)
    assert (
        share.value == pytest.approx((2 * 5 + 1 * 6) / 11 / 12) and "a 2 dormant, 1 active; b 1 dormant" in share.claim
    )
    assert (resting.value, resting.null) == (pytest.approx(0, abs=1e-5), 0.0)
    assert working.value == pytest.approx((5 * 0.1 + 6 * (0.1 + 0.5) / 2) / 11)
    assert working.null == resting.value and working.where["largest_nats"] == pytest.approx(0.5)
    assert order.value < -0.2 and order.ci95 is not None


def test_a_sample_has_a_candidate_a_control_and_a_dormant_head() -> None:
    """The switching head, another of its block, and the most dormant of the rest."""
    result = dormant(model_of(planted), batch_of({"a": 5, "b": 6}), n_heads=3)
    picked = result["picked_as"].values
    assert picked[SWITCHING] == "difference" and picked[DORMANT] == "dormant"
    assert sorted(picked[2].tolist()) == ["", "control", "difference"] and (picked == "").sum() == LAYERS * HEADS - 3
    known = np.isfinite(result["loss_change_nats"].values)
    assert (known == (picked != "")[..., None]).all()
    assert result.findings[1].where["control"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 24, 40, 500])
def test_samples_have_the_size_that_was_asked_for(n: int) -> None:
    mean = np.random.default_rng(0).random((10, 4))
    for choice in (np.arange(40)[::-1], np.zeros(0, int)):
        picked = sample_heads(choice, mean, n, seed=0)
        assert (picked != "").sum() == min(n, 40)
        assert (picked == "difference").sum() == (-(-min(n, 40) // 3) if choice.size else 0)
    top = np.argsort(mean.ravel())[40 - (min(n, 40) + 1) // 2 :]
    assert set(picked.flat[top]) <= {"dormant"} and (picked == "dormant").sum() == len(top)


def test_three_domains_are_compared_with_one_another() -> None:
    """Between two thresholds in c, dormant in a, active in b."""
    result = dormant(model_of(planted), batch_of({"c": 3, "a": 4, "b": 4}), n_heads=1)
    (head,) = result.findings[0].where["heads"]
    assert (head["layer"], head["head"], head["dormant_in"], head["active_in"]) == (*SWITCHING, ["a"], ["b"])
    assert result["case"].values.tolist() == ["a", "b", "c"]
    assert result["text_case"].values.tolist() == [2] * 3 + [0] * 4 + [1] * 4


@pytest.mark.parametrize(("in_a", "in_b"), [(0.75, 0.65), (0.96, 0.7), (0.7, 0.3)])
def test_a_difference_within_the_thresholds_is_significant_and_no_switch(in_a: float, in_b: float) -> None:
    """One head differs reliably: by little; dormant in a but not active in b; active in b but not dormant in a."""

    def level(domain: str, place: tuple[int, int], rng: np.random.Generator) -> float:
        return {"a": in_a, "b": in_b}[domain] + float(rng.uniform(0, 0.004)) if place == SWITCHING else 0.7

    result = dormant(model_of(level), batch_of({"a": 5, "b": 5}), n_heads=1)
    assert result["p_value"].values[SWITCHING] < 0.02 and result["picked_as"].values[SWITCHING] == "difference"
    assert not result["switches"].values.any() and "None of 12 heads switches" in result.findings[0].claim
    assert "0 would by their means alone. The dormancy of 1 differs at that level, most that of 2.1: 0." in (
        result.findings[0].claim
    )


def bimodal(domain: str, place: tuple[int, int], rng: np.random.Generator) -> float:
    """Dormant in some texts and active in others, whatever their domain."""
    return 0.98 if rng.random() < 0.5 else 0.2


def test_labels_that_mean_nothing_seldom_find_a_switch() -> None:
    """Over 40 null models, any switching head in about 5 %; the thresholds alone would find one far more often."""
    found, alone, expected = [], [], []
    for seed in range(40):
        result = dormant(
            model_of(bimodal, (4, 6), seed), batch_of({"a": 5, "b": 5}, seed), n_heads=1, n_permutations=199
        )
        mean = result["domain_dormancy"].values
        found.append(result["switches"].values.any())
        alone.append(((mean.max(0) > 0.9) & (mean.min(0) < 0.5)).any())
        expected.append(result.findings[0].null)
    assert np.mean(found) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 40)
    assert np.mean(alone) > 0.15, np.mean(alone)
    assert np.mean(expected) < 0.1


def test_the_rule_holds_its_error_rate() -> None:
    """The same over 400 draws, without models between; and with thresholds that every head passes."""
    rates = {}
    for name, rule in {"rule": RULE, "difference alone": Rule(-1.0, 2.0, 0.05)}.items():
        hits = 0
        for seed in range(400):
            rng = np.random.default_rng(seed)
            values = np.where(rng.random((10, 24)) < 0.5, 0.98, 0.2) + rng.normal(0, 1e-3, (10, 24))
            hits += find_switching(values, np.repeat([0, 1], 5), rule, n_draws=99, seed=seed).switches.any()
        rates[name] = hits / 400
    error = 3 * np.sqrt(0.05 * 0.95 / 400)
    assert rates["rule"] <= 0.05 + error, rates
    assert 0.05 - error <= rates["difference alone"] <= 0.05 + error, rates


def test_p_is_that_of_all_labellings() -> None:
    """Against every one of the 70 ways to part eight texts into two fours."""
    rng = np.random.default_rng(1)
    values, labels = rng.normal(size=(8, 3)), np.repeat([0, 1], 4)
    values[:4, 2] += 1.5
    found = find_switching(values, labels, RULE, n_draws=4000, seed=0)
    largest = []
    for some in itertools.combinations(range(8), 4):
        mine = np.isin(np.arange(8), some)
        largest.append(np.abs(values[mine].mean(axis=0) - values[~mine].mean(axis=0)).max())
    own = np.abs(values[:4].mean(axis=0) - values[4:].mean(axis=0))
    exact = np.mean(np.array(largest)[:, None] >= own - 1e-12, axis=0)
    assert_close(found.p, exact, atol=0.025)
    assert_close(found.spread, own, atol=1e-12)
    assert found.p.min() >= smallest_p([4, 4]) - 0.01


@pytest.mark.parametrize(
    ("sizes", "p"), [([4, 4], 2 / 70), ([3, 3], 0.1), ([3, 4], 1 / 35), ([2, 2, 2], 6 * 8 / 720), ([5], 1.0)]
)
def test_smallest_p_by_hand(sizes: list[int], p: float) -> None:
    assert smallest_p(sizes) == pytest.approx(p)


def test_too_few_texts_are_told(whole: Result) -> None:
    """Three and three: the planted head passes the thresholds, and cannot pass the test."""
    result = dormant(model_of(planted), batch_of({"a": 3, "b": 3}), n_heads=2)
    claim = result.findings[0].claim
    assert not result["switches"].values.any() and result["p_value"].values.min() >= 0.08
    assert (
        "cannot be told from 3 and 3 texts: p is at least 0.1" in claim and "1 of 12 heads are dormant in one" in claim
    )
    assert result.findings[0].where["smallest_p"] == pytest.approx(0.1) and "cannot" not in whole.findings[0].claim


@pytest.mark.parametrize("named", [True, False])
def test_one_domain_has_dormancy_and_costs_and_no_test(named: bool) -> None:
    texts = [replace(text_of("b", i), domain="b" if named else "") for i in range(5)]
    result = dormant(model_of(planted), Batch(tuple(texts)), n_heads=12)
    assert result["case"].values.tolist() == ["b" if named else "all texts"]
    assert not result["switches"].values.any() and (result["p_value"].values == 1).all()
    assert "needs texts of two domains at least" in result.findings[0].claim
    assert [f.unit for f in result.findings] == ["share of heads", "nats", "nats", "rank correlation"]
    assert_close(result["domain_loss_change_nats"].values[0][SWITCHING], 0.5, atol=1e-5)
    picked = result["picked_as"].values
    assert (picked == "range").sum() == (picked == "dormant").sum() == 6 and picked[DORMANT] == "dormant"
    assert set(result.figures()) == {"dormancy_0", "cost", "removed"}


def test_uniform_attention_is_not_dormant_and_has_full_entropy() -> None:
    """Row i puts 1 / (i + 1) on position 0; its entropy is ln(i + 1)."""
    result = dormant(scripted(sharpness=0.0, respond=lambda text, script, patches: script), texts_of((12, 30)))
    expected = [np.mean([1 / (i + 1) for i in range(8, n)]) for n in (12, 30)]
    assert_close(result["dormancy"].values, np.broadcast_to(expected, (4, 3, 2)), atol=1e-6)
    assert_close(result["row_entropy"].values, np.ones((4, 3, 2)), atol=1e-6)
    assert_close(result["domain_loss_change_nats"].values, np.zeros((1, 4, 3)), atol=1e-6)
    share, active, order = (*result.findings, None)[:3]
    assert share is not None and share.value == 0
    assert active is not None and "Removing an active head" in active.claim and active.null == 0 and order is None


@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2"])
@pytest.mark.parametrize("removal", ["zero", "first"])
def test_every_number_equals_a_naive_reference(kind: str, removal: str) -> None:
    """One head's slice of what enters the output projection, overwritten in the plain model; eager attention."""
    tiny, batch = tiny_model(kind), texts_of((20, 14, 17))
    result = dormant(tiny.model, batch, heads="all", removal=removal)
    first, entropy = _attention(tiny.reference, batch)
    assert_close(result["dormancy"].values, first, atol=1e-5)
    assert_close(result["row_entropy"].values, entropy, atol=1e-5)
    for place in itertools.product(range(N_LAYERS), range(N_HEADS)):
        expected = [_loss(tiny.reference, t.ids, kind, place, removal) - _loss(tiny.reference, t.ids) for t in batch]
        assert_close(result["loss_change_nats"].values[place], expected, atol=5e-5, what=str(place))
    assert np.abs(result["loss_change_nats"].values).min(axis=-1).max() > 0.01


def _attention(module: Any, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    first, entropy = [], []
    for text in batch:
        with torch.no_grad():
            maps = torch.stack(module(torch.tensor([text.ids]), output_attentions=True).attentions)[:, 0].double()
        first.append(maps[..., 8:, 0].mean(-1).numpy())
        rows = torch.special.entr(maps).sum(-1)[..., 8:] / torch.arange(9, len(text) + 1).log()
        entropy.append(rows.mean(-1).numpy())
    return np.stack(first, axis=-1), np.stack(entropy, axis=-1)


def _loss(
    module: Any, ids: Sequence[int], kind: str = "", place: tuple[int, int] | None = None, removal: str = ""
) -> float:
    hooks = []
    if place is not None:
        block = module.transformer.h[place[0]] if kind == "gpt2" else module.model.layers[place[0]]
        projection = block.attn.c_proj if kind == "gpt2" else block.self_attn.o_proj

        def overwrite(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            z = args[0].clone()
            own = z.unflatten(-1, (N_HEADS, -1))[:, :, place[1]]
            own[:] = 0.0 if removal == "zero" else own[:, :1].clone()
            return (z, *args[1:])

        hooks.append(projection.register_forward_pre_hook(overwrite))
    try:
        with torch.no_grad():
            logits = module(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return float(-log_softmax(logits, axis=-1)[np.arange(len(ids) - 1), list(ids[1:])].mean())


def test_what_does_not_fit_is_refused() -> None:
    model, batch = model_of(planted), batch_of({"a": 2, "b": 2})
    with pytest.raises(InputError, match="would be both"):
        dormant(model, batch, active=0.95)
    with pytest.raises(TextError, match="Text 0 has 12 tokens; dormant-heads needs at least 13"):
        dormant(model, batch, first_query=12)
