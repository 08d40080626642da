"""Glitch tokens: a scripted model that fails for planted tokens, clusters that hold them, and nulls without either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vocabulary_toy as toy
from helpers import run
from scipy.stats import binom

import probekit as pk
from probekit.analysis import Result
from probekit.core import Batch, InputError
from probekit.methods.glitch import Question, clusters, lower_bound, probe, questions, word_of
from probekit.methods.token_categories import categories
from probekit.plots import figure_json

PLANTED = tuple(toy.id_of(w) for w in ("bam", "dem", "fon", "lun", "kim", "gan", "ban", "fam"))
ALL: dict[str, Any] = {"n_suspects": 8, "n_random": 1000, "min_cluster": 4, "density": 0.05, "n_mining": 0}


def find(model: Any, **params: Any) -> Result:
    return run("glitch-tokens", model, Batch(()), **{**ALL, **params})["glitch-tokens"]


@pytest.fixture(scope="module")
def planted() -> Result:
    """Everything scanned; eight words at the untrained point, which the model can neither repeat nor spell nor count."""
    return find(toy.Copier(PLANTED, weights=toy.rows_with(PLANTED)))


def named(result: Result, start: str) -> Any:
    return next(f for f in result.findings if start in f.claim)


def test_exactly_the_planted_tokens_are_found(planted: Result) -> None:
    ordinary = np.isin(np.arange(toy.V), np.flatnonzero(categories(toy.TABLE) == "ok"))
    assert np.flatnonzero(planted["glitch"].values == 1).tolist() == sorted(PLANTED)
    assert np.flatnonzero(planted["scanned"].values).tolist() == np.flatnonzero(ordinary).tolist()
    assert planted["competence"].values.tolist() == [1.0, 1.0, 1.0] and planted["counts"].values.all()
    suspects = planted.findings[0]
    assert (suspects.value, suspects.null, suspects.n) == (1.0, 0.0, 8)
    strings = named(planted, "Glitch tokens that were found")
    assert sorted(map(int, strings.where["ids"].split(", "))) == sorted(PLANTED)
    share = named(planted, "were found in the 170 ordinary")
    assert share.value == pytest.approx(8 / 170) and share.ci95 is None, "all were scanned: nothing is estimated"


def test_what_is_written_instead_and_where_tasks_apply(planted: Result) -> None:
    """The comma, in each task; single letters and marks are repeated, but not spelt."""
    passed, instead = planted["passed"].values, planted["instead"].values
    assert (instead[:, PLANTED[0]] == toy.id_of(",")).all()
    letter, word = toy.id_of("q"), toy.id_of("ben")
    assert passed[:, word].tolist() == [1, 1, 1] and instead[:, word].tolist() == [-1, -1, -1]
    assert passed[0, letter] == 1 and np.isnan(passed[1:, letter]).all()
    assert planted["prob"].values[0, word] > 0.99 and planted["prob"].values[0, PLANTED[0]] < 1e-6


def test_clusters_hold_the_planted_tokens(planted: Result) -> None:
    finding = named(planted, "Clustering flags 1 of")
    assert finding.value == 1.0 and finding.null == pytest.approx(8 / 170)
    assert np.flatnonzero(planted["flagged"].values).tolist() == sorted(PLANTED)
    indicator = named(planted, "most suspicious tokens by cosine hold 8")
    assert indicator.value == 1.0 and indicator.null == pytest.approx(8 / 170)


def test_a_model_that_can_do_everything_has_no_glitch_token() -> None:
    """The cluster at the untrained point is still there, and is not flagged."""
    result = find(toy.Copier(weights=toy.rows_with(PLANTED)))
    assert result["cluster"].values.max() >= 0 and not result["flagged"].values.any()
    assert not (result["glitch"].values == 1).any()
    assert result.findings[0].value == result.findings[0].null == 0.0
    assert named(result, "Clustering flags 0").value == 0.0


def test_glitch_tokens_all_over_the_place_are_not_found_by_neighbourhoods() -> None:
    """Broken tokens whose rows are like any other's: the scan finds them, the searches find no more than chance."""
    result = find(toy.Copier(PLANTED, weights=toy.rows_with()))
    assert np.flatnonzero(result["glitch"].values == 1).tolist() == sorted(PLANTED)
    assert not result["flagged"].values[list(PLANTED)].any()
    assert named(result, "most suspicious tokens").value <= 0.25


def test_a_task_that_the_model_cannot_do_does_not_count() -> None:
    """Nobody is a glitch token for that; in the published rule everybody with letters is."""
    result = find(toy.Copier(PLANTED, cannot=("Letters",), weights=toy.rows_with(PLANTED)))
    assert result["counts"].values.tolist() == [1, 1, 0]
    assert np.flatnonzero(result["glitch"].values == 1).tolist() == sorted(PLANTED)
    assert "length" not in result.findings[0].claim
    suspects = result["scanned"].values == 1
    assert np.isnan(result["passed"].values[2, suspects]).all(), "what does not count is not asked of suspects"
    advice = named(result, "Glitch tokens that were found").claim
    assert advice.endswith("; keep these strings out of input and output.")
    strict = find(toy.Copier(cannot=("Letters",)), competence=0.0)
    words = [i for i in np.flatnonzero(strict["scanned"].values) if word_of(toy.TABLE, int(i))]
    assert np.flatnonzero(strict["glitch"].values == 1).tolist() == words
    assert "of random tokens fail, too, so that failing alone is no reason" in named(strict, "Glitch tokens").claim
    nothing = find(toy.Copier(cannot=("Letters",)), tasks="length")
    (only,) = nothing.findings
    assert only.value == 0 and "No task counts" in only.claim and set(nothing.figures()) == {"tasks"}


def test_a_sample_estimates_the_whole() -> None:
    """Half of the words broken, a third of the vocabulary drawn: the interval holds the truth; suspects are not drawn."""
    broken = {toy.id_of(w) for w in toy.WORDS[::2]}
    inside = 0
    for seed in range(12):
        result = find(toy.Copier(broken), n_suspects=10, n_random=50, tasks="repetition", seed=seed)
        scanned = result["scanned"].values
        assert ((scanned == 1).sum(), (scanned == 2).sum()) == (10, 50)
        share = named(result, "are estimated for the 170 ordinary")
        inside += share.ci95[0] <= len(broken) / 170 <= share.ci95[1]
    assert inside >= 10


def test_text_in_other_tokens_counts_as_repeated() -> None:
    """A model that writes words letter by letter, in capitals, repeats them; one that stops short does not."""

    class Speller(toy.Copier):
        short: bool = False

        def _answer(self, ids: Any, before: Any) -> int:
            text = "".join(toy.TABLE.decoded[i] for i in ids)
            front, _, said = text.rpartition("«")
            word = front.rpartition("«")[2].partition("»")[0]
            rest = word.upper()[len(said) : 2 if self.short else None]
            return toy.id_of(rest[0]) if rest else toy.id_of(" ")

        def _can(self, token: int) -> int:
            word = toy.TABLE.decoded[token]
            return toy.id_of(word[0].upper()) if token in self.broken else token

    words = {toy.id_of(w) for w in toy.WORDS}
    assert not (find(Speller(words), tasks="repetition")["glitch"].values == 1).any()
    stops = Speller(words)
    stops.short = True
    assert set(np.flatnonzero(find(stops, tasks="repetition")["glitch"].values == 1)) == words


# --- methods by hand ----------------------------------------------------------------------------------------------


def test_lower_bound_is_exact() -> None:
    """At the bound, k or more successes have exactly the level's probability; none gives no evidence."""
    for k, n in ((1, 10), (7, 10), (10, 10)):
        assert binom.sf(k - 1, n, lower_bound(k, n, 0.05)) == pytest.approx(0.05)
    assert lower_bound(0, 10, 0.05) == 0.0
    assert lower_bound(10, 10, 0.05) == pytest.approx(0.05 ** (1 / 10))


def test_clusters_are_flagged_by_mistake_at_most_at_the_nominal_rate() -> None:
    """Glitch tokens strewn at random over five clusters of 40, at the expected share."""
    labels, wrong, seeds = np.repeat(np.arange(5), 40), 0, 400
    for seed in range(seeds):
        glitch = np.random.default_rng(seed).random(200) < 0.2
        wrong += probe(labels, glitch, 0.2, n=10, seed=seed).flagged.any()
    assert wrong / seeds <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / seeds)


def test_probing_looks_at_no_more_than_it_may() -> None:
    labels = np.array([-1] * 5 + [0] * 20 + [1] * 20)
    glitch = labels == 1
    found = probe(labels, glitch, 0.1, n=6, seed=0)
    assert found.probed.sum() == 12 and not found.probed[:5].any()
    assert found.found.tolist() == [[0, 6], [6, 6]] and (found.flagged == glitch).all()
    assert not probe(np.full(9, -1), np.ones(9, bool), 0.0, n=3, seed=0).flagged.any()


def test_clusters_of_planted_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 16))
    rows[:10] = rows[0] + 0.01 * rows[:10]
    labels = clusters(rows, 5, 0.15)
    assert labels[0] >= 0 and set(np.flatnonzero(labels == labels[0])) == set(range(10))
    assert (clusters(rows[:3], 5, 0.15) == -1).all()


def _questions(task: str, tokens: list[int]) -> list[Question | None]:
    flow = questions(task, toy.TABLE, categories(toy.TABLE), tokens)
    asked: Any = next(flow)
    try:
        flow.send(toy.Copier().ids_of(asked.texts, special=asked.special))
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError("more is asked")


def test_questions_hold_the_id_and_the_answer() -> None:
    token = toy.id_of("dem")
    texts = {}
    for task in ("repetition", "spelling", "length"):
        (question,) = _questions(task, [token])
        assert question is not None and question.prompt.count(token) == 1
        texts[task] = "".join(toy.TABLE.decoded[i] for i in question.answer)
    assert texts == {"repetition": "dem", "spelling": " d-e-m\n", "length": " 3\n"}
    assert _questions("spelling", [toy.id_of("q"), toy.id_of("<r0>")]) == [None, None]
    assert _questions("repetition", [toy.id_of("<r0>")]) != [None]


def test_wrong_tasks_are_refused() -> None:
    with pytest.raises(InputError, match=r"tasks are some of repetition, spelling, length.*found 'repetition,song'"):
        find(toy.Copier(), tasks="repetition,song")


def test_result_survives_the_store_and_draws(planted: Result, tmp_path: Path) -> None:
    again = pk.load_result(planted.save(tmp_path / "r"))
    for name in planted.dataset.data_vars:
        np.testing.assert_array_equal(again[str(name)].values, planted[str(name)].values)
    figures = planted.figures()
    assert set(figures) == {"tasks", "map", "clusters"}
    assert all(figure_json(f) and f.alt and f.caption for f in figures.values())  # type: ignore[arg-type]
    assert "the model writes ," in str(figure_json(figures["map"]))  # type: ignore[arg-type]


def test_plan_bounds_the_passes(planted: Result) -> None:
    made = sum(p["passes"] for p in planted.provenance["plan"])
    assert made <= planted.analysis.passes(planted.params, toy.Copier().info, Batch(()))
