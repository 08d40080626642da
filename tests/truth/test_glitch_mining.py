"""Mining: one step by hand, a walk on a plain model by torch alone, planted neighbourhoods, and nulls without any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vocabulary_toy as toy
from helpers import assert_quantities, run
from mining_toy import Graded, World, driven, far_out

import probekit as pk
from probekit.analysis import Result
from probekit.core import Batch, CapabilityError, Forward
from probekit.methods.glitch import repetition
from probekit.methods.mining import (
    EMBED,
    LAST,
    Budget,
    directions,
    entropy_nats,
    mine,
    mining_passes,
    nearest,
    never_written,
    promised,
)
from probekit.methods.repeating import Prompts
from probekit.methods.token_categories import OK, categories
from probekit.plots import figure_json
from probekit.stats import wilson

QUIET: dict[str, Any] = {"n_suspects": 4, "n_random": 1000, "tasks": "repetition", "min_cluster": 4}


def planted_world(seed: int, n: int = 600) -> World:
    """A ball of tokens, of which the twenty farthest along the first dimension are broken."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, 6))
    rows[1] *= 0.05  # the start, in the middle
    return World(rows, frozenset(np.argsort(-rows[:, 0])[:20].tolist()), steep=1.5)


def until(found: np.ndarray, broken: frozenset[int], n: int, tried: int) -> float:
    """Tokens evaluated until half of the broken ones were; all of them if that never happened."""
    at = np.sort(found[list(broken)])[len(broken) // 2 - 1]
    return n if np.isnan(at) else 1 + tried * float(at)


def test_the_gradient_leads_to_planted_tokens_sooner_than_a_walk_without_it() -> None:
    """Over twelve worlds: half of the planted tokens after far fewer evaluations, and all calls are planted."""
    how, cost = {"iterations": 60, "near": 32, "tried": 4}, []
    for seed in range(12):
        world = planted_world(seed)
        seen = world.mined(Budget(**how, seed=seed))
        n = len(world.rows)
        cost.append([until(f, world.broken, n, 4) for f in (seen.mined, seen.walked, seen.drawn)])
        assert set(seen.called.tolist()) <= world.broken
    mined, walked, drawn = np.array(cost).T
    assert mined.mean() < 0.8 * walked.mean() and (mined < walked).sum() >= 9
    assert mined.mean() < 0.5 * drawn.mean() and (mined < drawn).all()


def test_a_slope_that_says_nothing_is_no_better_than_the_walk_without_it() -> None:
    """Entropy is the same everywhere, and broken tokens are strewn: all three searches find the same share."""
    shares = []
    for seed in range(20):
        world = planted_world(seed)
        strewn = frozenset(np.random.default_rng(1000 + seed).choice(np.arange(2, 600), 120, replace=False).tolist())
        seen = World(world.rows, strewn, steep=0.0).mined(Budget(25, near=32, tried=4, seed=seed))
        shares.append([np.isfinite(f[list(strewn)]).sum() / np.isfinite(f).sum() for f in (seen.mined, seen.drawn)])
    mined, drawn = np.array(shares).T
    error = np.sqrt(2 * 0.2 * 0.8 / (20 * 101))
    assert abs(mined.mean() - 0.2) < 3 * error and abs(mined.mean() - drawn.mean()) < 3 * error


def test_without_broken_tokens_nothing_is_called() -> None:
    world = planted_world(0)
    seen = World(world.rows, steep=1.5).mined(Budget(30))
    assert not seen.called.size and np.isfinite(seen.mined).sum() == 241


# --- one step by hand ---------------------------------------------------------------------------------------------

# Five tokens in the plane. 1 is the shortest; by direction, 2, 3 and 4 lie nearest to it in this order, 0 is opposite.
BY_HAND = np.array([[-1.0, 0.0], [0.1, 0.0], [2.0, 0.2], [0.2, 0.1], [3.0, 3.0]])


def test_one_step_by_hand() -> None:
    """Near are 2, 3 and 4 (0 is opposite); by slope 4 promises most, then 2; the two are evaluated, the higher is next."""
    world = World(BY_HAND)
    ids = nearest(directions(BY_HAND), 1, np.ones(5, dtype=bool), 3)
    assert ids.tolist() == [2, 3, 4]
    assert promised(BY_HAND, 1, ids, np.array([0.5, -0.1])) == pytest.approx([0.93, 0.04, 1.15])
    assert nearest(directions(BY_HAND), 1, np.array([True, True, False, True, True]), 9).tolist() == [3, 4, 0]
    seen = world.mined(Budget(1, near=3, tried=2))
    assert seen.mined[[1, 2, 4]].tolist() == [0, 1, 1] and np.isnan(seen.mined[[0, 3]]).all()
    slope = world.slope(1)[0]
    assert slope > 0
    assert seen.estimated[[2, 4]] == pytest.approx([world.entropy(1) + d * slope for d in (1.9, 2.9)])
    assert np.isnan(seen.estimated[[0, 1, 3]]).all()
    looked = np.flatnonzero(seen.wrote >= 0)
    assert seen.entropy[looked] == pytest.approx([world.entropy(int(t)) for t in looked])


def test_the_walk_goes_on_from_the_highest_entropy_and_evaluates_nothing_twice() -> None:
    world = planted_world(3)
    seen = world.mined(Budget(20, near=16, tried=4))
    assert len(world.looked) == len(set(world.looked)) and world.slopes[0] == 1
    for i in range(1, 20):
        here = np.flatnonzero(seen.mined == i)
        assert len(here) == 4 and world.slopes[i] == max(here, key=world.entropy)
    for f in (seen.mined, seen.walked, seen.drawn):
        assert np.bincount(f[np.isfinite(f)].astype(int)).tolist() == [1] + [4] * 20, "the same budget"


def test_only_valid_tokens_are_visited_until_none_is_left() -> None:
    world, valid = planted_world(1), np.zeros(600, dtype=bool)
    valid[1:30] = True
    seen = world.mined(Budget(50, near=8, tried=4), valid)
    for f in (seen.mined, seen.walked, seen.drawn):
        assert np.flatnonzero(np.isfinite(f)).tolist() == list(range(1, 30))
    assert world.mined(Budget(0)).wrote.max() == -1
    assert world.mined(Budget(5), np.zeros(600, dtype=bool)).wrote.max() == -1


def test_the_same_seed_goes_the_same_ways() -> None:
    one, two, other = (planted_world(2).mined(Budget(10, seed=s)) for s in (4, 4, 5))
    assert all(np.array_equal(getattr(one, f), getattr(two, f), equal_nan=True) for f in vars(one))
    assert np.array_equal(one.mined, other.mined, equal_nan=True), "along the gradient nothing is drawn"
    assert not np.array_equal(one.walked, other.walked, equal_nan=True)


def test_slopes_of_all_its_places_are_summed() -> None:
    """A prompt that holds the token twice, and beside them an id that it happens to be."""
    prompt = Prompts(((3, 2, 3),), stand_in=3)
    assert prompt.places == [(0, 2)] and prompt.of(2) == [(2, 2, 2)]
    value = np.arange(6.0).reshape(3, 2)
    asked = []

    def answer(request: Forward) -> Any:
        asked.append(request)
        if request.gradient_of is not None:
            return {EMBED: {"value": SimpleNamespace(values=value)}}
        return {LAST: {"value": SimpleNamespace(values=np.eye(5)[[ids[0] for ids in request.inputs or ()]])}}

    seen = driven(mine(prompt, BY_HAND, np.ones(5, dtype=bool), Budget(1, near=1, tried=1)), answer)
    gain = float((BY_HAND[2] - BY_HAND[1]) @ (value[0] + value[2]))
    assert seen.estimated[2] - seen.entropy[1] == pytest.approx(gain)


def test_entropy_of_logits() -> None:
    assert entropy_nats(np.zeros((2, 8)) + 900) == pytest.approx([np.log(8)] * 2)
    assert entropy_nats(np.array([0.0, np.log(3)])) == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75))
    assert entropy_nats(np.array([0.0, -2000.0])) == 0.0


def test_the_strict_check_needs_all_prompts_to_fail() -> None:
    """Token 1 fails everywhere, 2 in two of three, 3 in one; what was written once is not asked again."""
    made, asked = Prompts(((9, 8), (9, 7), (9, 6)), stand_in=9), []
    fails = {8: {1, 2, 3}, 7: {1, 2}, 6: {1}}

    def answer(request: Forward) -> Any:
        asked.append([ids[0] for ids in request.inputs or ()])
        wrote = [0 if t in fails[ids[1]] else t for t, ids in ((i[0], i) for i in request.inputs or ())]
        return {LAST: {"value": SimpleNamespace(values=np.eye(10)[wrote])}}

    assert driven(never_written(made, [1, 2, 3, 4]), answer).tolist() == [True, False, False, False]
    assert asked == [[1, 2, 3, 4], [1, 2, 3], [1, 2]]


# --- on models ----------------------------------------------------------------------------------------------------


def plain_walk(module: Any, prompt: Prompts, rows: np.ndarray, valid: np.ndarray, steps: int) -> list[set[int]]:
    """The walk by torch alone, in float64, with plain loops: what each step evaluates."""
    module = module.double().eval()
    at = prompt.ids[0].index(prompt.stand_in)

    def entropy(token: int, want: bool) -> Any:
        ids = torch.tensor([[token if i == prompt.stand_in else i for i in prompt.ids[0]]])
        x = module.get_input_embeddings()(ids).detach().requires_grad_()
        h = torch.distributions.Categorical(logits=module(inputs_embeds=x).logits[0, -1]).entropy()
        return (float(h.detach()), torch.autograd.grad(h, x)[0][0, at].numpy()) if want else float(h.detach())

    left = set(np.flatnonzero(valid).tolist())
    current = min(left, key=lambda t: float(np.linalg.norm(rows[t])))
    left -= {current}
    unit, steps_made = rows / np.linalg.norm(rows, axis=1, keepdims=True), [{current}]
    for _ in range(steps):
        h, g = entropy(current, True)
        near = sorted(left, key=lambda t: float(np.linalg.norm(unit[t] - unit[current])))[:6]
        tried = sorted(near, key=lambda t: -(h + float((rows[t] - rows[current]) @ g)))[:2]
        current = max(tried, key=lambda t: entropy(t, False))
        left -= set(tried)
        steps_made.append(set(tried))
    return steps_made


def test_the_walk_on_a_real_model_is_that_of_plain_torch() -> None:
    """A random model with untied embeddings: prompts, gradients, neighbours and entropies, step by step."""
    weights = toy.rows_with(tied=False)
    model = toy.random_llama(weights)
    how = {"n_suspects": 4, "n_random": 6, "competence": 0.0, "n_mining": 8, "n_near": 6, "n_tried": 2}
    result = run("glitch-tokens", model, Batch(()), tasks="repetition", **how)["glitch-tokens"]
    kinds = categories(toy.TABLE)
    prompt = driven(repetition(toy.TABLE, kinds), lambda r: toy.Copier().ids_of(r.texts, special=r.special))
    expected = plain_walk(toy.random_llama(weights).module, prompt, weights.embedding.astype(float), kinds == OK, 8)
    mined = result["mined"].values
    assert [set(np.flatnonzero(mined == i).tolist()) for i in range(9)] == expected
    called = (result["wrote"].values >= 0) & (result["wrote"].values != np.arange(toy.V))
    assert np.isfinite(result["strict"].values[called]).all() and np.isnan(result["strict"].values[~called]).all()
    made = sum(p["passes"] for p in result.provenance["plan"])
    assert made <= result.analysis.passes(result.params, model.info, Batch(()))


PLANTED = tuple(toy.id_of(w) for w in ("bam", "dem", "fon", "lun", "kim", "gan", "ban", "fam"))
MINING: dict[str, Any] = {**QUIET, "n_mining": 12, "n_near": 16, "n_tried": 3}


@pytest.fixture(scope="module")
def found() -> Result:
    return run("glitch-tokens", Graded(PLANTED, far_out(PLANTED)), Batch(()), **MINING)["glitch-tokens"]


def claims(result: Result, start: str) -> Any:
    return next((f for f in result.findings if start in f.claim), None)


def test_planted_tokens_are_mined_and_counted_by_hand(found: Result) -> None:
    """Every number of the findings, from the variables; mining comes by all eight, fewer lie on the other ways."""
    assert_quantities(found.findings)
    visited = {s: np.flatnonzero(np.isfinite(found[s].values)) for s in ("mined", "walked", "drawn")}
    held = {s: len(set(PLANTED) & set(ids.tolist())) for s, ids in visited.items()}
    assert held["mined"] == 8 > max(held["walked"], held["drawn"])
    assert {len(ids) for ids in visited.values()} == {37}
    random, walk = claims(found, "drawn at random."), claims(found, "A walk of the same rules")
    for finding, search in ((random, "drawn"), (walk, "walked")):
        assert (finding.value, finding.null, finding.n) == (8 / 37, held[search] / 37, 37)
        assert finding.ci95[0] < finding.value < finding.ci95[1]
    assert "evaluated 37 tokens in 12 steps; 8 of them the model does not repeat (8 in no prompt" in random.claim
    every = claims(found, "ordinary tokens that the model does not repeat")
    if held["drawn"]:
        low, high = wilson(held["drawn"], 37)
        assert every.value == min(1.0, 8 / (170 * held["drawn"] / 37)) and every.null == 37 / 170
        assert every.ci95 == (pytest.approx(8 / 170 / high), min(1.0, 8 / 170 / low)) and every.n == 37
    recall = claims(found, "which judged every ordinary token")
    assert (recall.value, recall.null, recall.n) == (1.0, pytest.approx(37 / 170), 8)
    assert "mining evaluated 8 and found 8 of these not repeated" in recall.claim
    strings = claims(found, "Mined tokens that the model repeats in none")
    assert set(map(int, strings.where["ids"].split(", "))) == set(PLANTED) and "0 of them the scan" in strings.claim
    assert (found["wrote"].values[list(PLANTED)] == toy.id_of(",")).all()
    assert found["strict"].values[list(PLANTED)].tolist() == [1] * 8


def test_recall_says_how_much_was_scanned() -> None:
    model = Graded(PLANTED, far_out(PLANTED))
    result = run("glitch-tokens", model, Batch(()), **{**MINING, "n_random": 60})["glitch-tokens"]
    scanned = np.isfinite(result["glitch"].values)
    recall = claims(result, "which judged 64 of 170 ordinary tokens (")
    bad = set(PLANTED) & set(np.flatnonzero(scanned).tolist())
    assert recall.n == len(bad) < 8 and recall.value == 1.0
    assert recall.null == (scanned & np.isfinite(result["mined"].values)).sum() / 64
    strings = claims(result, "Mined tokens")
    assert f"{8 - len(bad)} of them the scan did not look at" in strings.claim


def test_a_model_that_repeats_everything_has_nothing_to_mine() -> None:
    result = run("glitch-tokens", Graded((), far_out(PLANTED)), Batch(()), **MINING)["glitch-tokens"]
    finding = claims(result, "drawn at random.")
    assert finding.value == finding.null == 0.0 and finding.ci95[0] == 0.0
    assert claims(result, "which judged") is None and claims(result, "Mined tokens").value == 0.0
    assert np.isnan(result["strict"].values).all() and set(result.figures()) >= {"mining", "entropy"}


def test_mining_is_drawn_and_stored(found: Result, tmp_path: Path) -> None:
    figures = found.figures()
    assert {"mining", "entropy"} <= set(figures)
    drawn = str(figure_json(figures["entropy"]))  # type: ignore[arg-type]
    assert "the model writes ," in drawn and "promised" in drawn and "not in three other prompts either" in drawn
    assert "along the gradient" in str(figure_json(figures["mining"]))  # type: ignore[arg-type]
    assert all(f.alt and f.caption for f in figures.values())
    again = pk.load_result(found.save(tmp_path / "r"))
    for name in found.dataset.data_vars:
        np.testing.assert_array_equal(again[str(name)].values, found[str(name)].values)
    for name, measure in found.analysis.measures.items():
        values = found[name].values
        assert values.dtype.kind != "f" or np.isfinite(values).all() or "NaN" in measure.help, name


def test_no_steps_no_mining() -> None:
    result = run("glitch-tokens", toy.Copier(PLANTED), Batch(()), **{**MINING, "n_mining": 0})["glitch-tokens"]
    assert np.isnan(result["mined"].values).all() and (result["wrote"].values == -1).all()
    assert not {"mining", "entropy"} & set(result.figures()) and claims(result, "ining along") is None
    assert mining_passes(Budget(0)) == 0


def test_a_model_without_slopes_is_refused_before_tokens_are_asked() -> None:
    model = toy.Copier(PLANTED)
    with pytest.raises(CapabilityError, match="has no point 'embed'"):
        run("glitch-tokens", model, Batch(()), **MINING)
    assert model.asked <= 1
