"""Under-trained tokens: planted rows are the top candidates, planted silence is verified, and the nulls stay silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vocabulary_toy as toy
from helpers import assert_quantities, run

import probekit as pk
from probekit.analysis import Result
from probekit.core import Batch, InputError, VocabularyTable, VocabularyWeights
from probekit.methods.repeating import Prompts, prompts
from probekit.methods.token_categories import categories
from probekit.methods.undertrained import ReferenceSet, chosen, indicators, reference_from, reference_set
from probekit.plots import figure_json

PLANTED = tuple(toy.id_of(w) for w in ("bam", "dem", "fon", "lun"))
QUICK = {"n_verify": 10, "n_controls": 8, "steps": 2, "trials": 2, "share": 0.1}


def find(model: Any, **params: Any) -> Result:
    return run("undertrained-tokens", model, Batch(()), **{**QUICK, **params})["undertrained-tokens"]


def ranking(result: Result) -> list[int]:
    """Ordinary tokens, the reference left out, the most suspicious first."""
    values = result["indicator"].values[int(result["chosen"])]
    out = np.isin(result["category"].values, (0, 1)) & (result["reference"].values == 0)
    return [int(i) for i in np.argsort(np.where(out, values, np.inf), kind="stable")]


def table_of(decoded: list[str], encoded: list[tuple[int, ...]] | None = None, special: int = 0) -> VocabularyTable:
    """A table whose pieces are its texts; the first ids are special."""
    ids = [(i,) for i in range(len(decoded))] if encoded is None else encoded
    return VocabularyTable(
        tuple(decoded), tuple(decoded), tuple(decoded), tuple(ids), np.arange(len(decoded)) < special
    )


# --- planted and null ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_planted_rows_are_exactly_the_top_candidates(tied: bool) -> None:
    """In a random model; by the cosine of tied rows and by the norm of untied inputs."""
    result = find(toy.random_llama(toy.rows_with(PLANTED, tied=tied)), n_verify=4, n_controls=4, steps=1)
    assert set(ranking(result)[:4]) == set(PLANTED)
    assert np.flatnonzero(result["reference"].values).tolist() == list(toy.RESERVED)
    assert result["reference_why"].item() == "3 tokens in brackets whose rows are alike"
    assert float(result["reference_cosine"]) > 0.99
    assert set(np.flatnonzero(result["asked"].values == 1)) == set(PLANTED)
    assert set(PLANTED) <= set(np.flatnonzero(result["candidate"].values))
    name = result["case"].values[int(result["chosen"])]
    assert name == ("cosine" if tied else "input norm")


def test_without_planted_rows_candidates_behave_like_controls() -> None:
    """A random model writes nothing on purpose: the share of candidates is that of the controls, over seeds."""
    excess = []
    for seed in range(4):
        finding = find(toy.random_llama(toy.rows_with(seed=seed), seed), n_verify=8, steps=1, threshold=0.005).findings[
            0
        ]
        assert finding.ci95 is not None
        excess.append(finding.value - finding.null)
    assert abs(np.mean(excess)) < 3 * 0.5 / np.sqrt(4 * 8), excess


def test_exactly_the_tokens_that_cannot_be_copied_are_verified() -> None:
    model = toy.Copier(PLANTED, weights=toy.rows_with(PLANTED))
    result = find(model)
    assert_quantities(result.findings)
    behaviour, strings, _ = result.findings
    assert (behaviour.value, behaviour.null, behaviour.n) == (0.4, 0.0, 10)
    assert strings.value == 4 and sorted(map(int, strings.where["ids"].split(", "))) == sorted(PLANTED)
    written = result["written"].values
    asked = np.flatnonzero(result["asked"].values)
    assert len(asked) == 18 and np.isnan(np.delete(written, asked, axis=1)).all()
    assert written[:, list(PLANTED)].max() < 1e-6
    assert written[:, [i for i in asked if i not in PLANTED]].min() > 0.99
    assert "'bam'" in strings.claim and "strip these" in strings.claim


def test_a_model_that_copies_everything_has_none() -> None:
    """Rows at the untrained point alone do not make a token under-trained."""
    behaviour, strings, _ = find(toy.Copier(weights=toy.rows_with(PLANTED))).findings
    assert (behaviour.value, behaviour.null) == (0.0, 0.0) and strings.value == 0


def test_what_weights_do_not_foretell_shows_among_controls() -> None:
    """All tokens broken but the comma, which it writes in their place: candidates and controls fail alike."""
    broken = set(range(toy.V)) - {toy.id_of(",")}
    behaviour = find(toy.Copier(broken), n_verify=20, n_controls=20).findings[0]
    assert behaviour.value >= 0.9 and behaviour.null >= 0.9


def test_nothing_runs_where_nothing_is_verified() -> None:
    model = toy.Copier(PLANTED, weights=toy.rows_with(PLANTED))
    result = find(model, n_verify=0, n_controls=0)
    assert model.asked == 0 and "plan" in result.provenance and not result.provenance["plan"]
    strings, _ = result.findings
    assert "Suspicious by weights alone" in strings.claim and strings.value == result["candidate"].values.sum()
    assert set(result.figures()) == {"top", "histogram"}


def test_without_controls_the_null_says_so() -> None:
    behaviour = find(toy.Copier(PLANTED, weights=toy.rows_with(PLANTED)), n_controls=0).findings[0]
    assert behaviour.null_meaning == "a model that can write every token" and "other tokens" not in behaviour.claim


# --- weights off the files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("toy")
    model = toy.random_llama(toy.rows_with(PLANTED))
    model.module.save_pretrained(where)
    toy.toy_tokenizer().save_pretrained(where)
    return where


def test_the_model_is_not_loaded_where_its_files_tell(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = pk.open_model(folder, lazy=True)
    monkeypatch.setattr(model, "_loader", lambda: pytest.fail("the weights were loaded"))
    result = pk.run("undertrained-tokens", model, n_verify=0, n_controls=0, share=0.1, progress=False)
    assert not model.loaded and set(ranking(result)[:4]) == set(PLANTED)
    assert result.provenance["weights_hash"].startswith("sha256-headers:")
    assert result.provenance["weights"].startswith("not loaded")
    monkeypatch.undo()
    loaded = pk.run("undertrained-tokens", folder, n_verify=2, n_controls=1, share=0.1, progress=False)
    assert loaded.provenance["weights_hash"].startswith("sha256:")
    np.testing.assert_array_equal(loaded["indicator"].values, result["indicator"].values)


def test_the_hash_of_headers_sees_names_and_shapes(folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from probekit.backends.transformers.vocabulary import headers_hash

    assert headers_hash(tmp_path) is None and headers_hash(None) is None
    hashes = []
    for arrays in ({"a": np.zeros(4)}, {"a": np.ones(4)}, {"a": np.zeros(5)}, {"b": np.zeros(4)}):
        save_file(arrays, tmp_path / "model.safetensors")
        hashes.append(headers_hash(tmp_path))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    assert headers_hash(folder) == headers_hash(folder)


# --- the reference ------------------------------------------------------------------------------------------------


def test_each_kind_of_reference_in_turn() -> None:
    """Bytes outside UTF-8, ids without a token, unreachable tokens, alike brackets, near-duplicates; then refusal."""
    n = 30
    texts = [f"word{i}" for i in range(n)]
    rows = np.random.default_rng(0).normal(size=(n, 8))

    def found(decoded: list[str], encoded: Any = None, matrix: np.ndarray = rows) -> tuple[list[int], str]:
        table = table_of(decoded, encoded)
        reference = reference_set(table, categories(table), matrix)
        return reference.ids.tolist(), reference.why

    bytes_ = ["<0xF5>", "<0xC0>", "<0xFF>", *texts[3:]]
    broken: list[Any] = [(0, 1)] * 3 + [(i,) for i in range(3, n)]
    holes = [*texts[:10], "", "", "", *texts[13:]]
    brackets = [*texts[:20], "<a>", "[b]", "<c>", "<d>", *texts[24:]]
    alike = rows.copy()
    alike[20:23] = alike[20] + 0.01 * rows[20:23]
    dense = rows.copy()
    dense[5:14] = dense[5] + 0.001 * rows[5:14]
    assert found([*bytes_[:10], "", "", "", *bytes_[13:]]) == ([0, 1, 2], "bytes that UTF-8 never uses")
    assert found(holes, [*broken[:10], (), (), (), *broken[13:]]) == ([10, 11, 12], "ids without a token")
    assert found(brackets, broken, alike) == ([0, 1, 2], "tokens that no text brings about")
    assert found(brackets, None, alike) == ([20, 21, 22], "tokens in brackets whose rows are alike")
    assert found(brackets, None, dense) == (list(range(5, 14)), "the densest cluster of near-duplicate rows")
    with pytest.raises(InputError, match="No token of this vocabulary is known to be untrained"):
        found(texts)


def test_a_given_reference_is_checked() -> None:
    table, rows = toy.TABLE, toy.rows_with().unembedding
    kinds = categories(table)
    given = reference_from(" 7, 5,7", table, kinds, rows)
    assert given.ids.tolist() == [5, 7] and given.why == "given ids"
    with pytest.raises(InputError, match="separated by commas, such as 5,7,8; found 'a'"):
        reference_from("a", table, kinds, rows)
    with pytest.raises(InputError, match=f"ids from 0 to {toy.V - 1}; found '999999'"):
        reference_from("999999", table, kinds, rows)


# --- indicators and prompts by hand -------------------------------------------------------------------------------


def test_indicators_by_hand() -> None:
    """Rows (2,0), (0,1), (-2,0), (0,3): mean (0,1), first component along x; reference the first row."""
    rows = np.array([[2, 0], [0, 1], [-2, 0], [0, 3]], dtype=np.float32)
    inputs = np.array([[3, 4], [0, 0], [1, 0], [0, 2]], dtype=np.float32)
    weights = VocabularyWeights(inputs, rows, np.array([0.5, -1, 0.5, 2], dtype=np.float32), False)
    found = indicators(weights, ReferenceSet(np.array([0]), "", 1.0))
    assert found["cosine"] == pytest.approx([0, 1, 2, 1])
    # Centred: (2,-1), (0,0), (-2,-1), (0,2) against (2,-1).
    assert found["centred cosine"] == pytest.approx([0, 1, 1 + 3 / 5, 1 + 2 / (5**0.5 * 2)])
    # Without x the reference's mean vanishes: nothing points its way.
    assert found["cosine without first component"] == pytest.approx([1, 1, 1, 1])
    assert found["distance"] == pytest.approx([0, 5**0.5, 4, 13**0.5])
    assert found["input norm"] == pytest.approx([5, 0, 1, 2])
    assert found["bias"] == pytest.approx([0, 1.5, 0, 1.5])
    tied = indicators(VocabularyWeights(rows, rows, None, True), ReferenceSet(np.array([1]), "", 1.0))
    assert "input norm" not in tied and "bias" not in tied
    # Reference (0,1): without x only the sign of y is left.
    assert tied["cosine without first component"] == pytest.approx([1, 0, 1, 0])


def test_which_indicator_ranks() -> None:
    tied, untied = {"cosine": np.zeros(2)}, {"cosine": np.zeros(2), "input norm": np.zeros(2)}
    assert (chosen("auto", tied), chosen("auto", untied), chosen("cosine", untied)) == (
        "cosine",
        "input norm",
        "cosine",
    )
    with pytest.raises(InputError, match="no indicator 'input norm': its embeddings are tied"):
        chosen("input norm", tied)


def _prompts(trials: int = 2, table: VocabularyTable = toy.TABLE) -> Prompts:
    flow = prompts(table, categories(table), trials)
    ids = toy.Copier().ids_of
    asked: Any = next(flow)
    asked = flow.send(ids(asked.texts, special=asked.special))
    try:
        flow.send(ids(asked.texts, special=asked.special))
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError("the prompts want more")


def test_prompts_hold_the_exact_id_in_each_place() -> None:
    made, token = _prompts(), toy.id_of("<r1>")
    assert made.stand_in == toy.id_of(toy.STAND_IN)
    counts = [ids.count(token) for ids in made.of(token)]
    assert counts == [1, 1, 50] and all(made.stand_in not in ids for ids in made.of(token))
    assert sum(ids == toy.id_of("«") for ids in made.of(token)[0]) == 2 * 2 + 2
    letters = table_of(["12", "«", "-"])
    with pytest.raises(InputError, match="no ordinary token of letters"):
        next(prompts(letters, categories(letters), 1))


def test_a_stand_in_that_falls_apart_is_refused() -> None:
    flow = prompts(toy.TABLE, categories(toy.TABLE), 1)
    next(flow)
    flow.send(((7, 7), (7,)))
    with pytest.raises(InputError, match=r"holds the stand-in 'blacksmith' .* 0 times as one token; expected 1"):
        flow.send(((7,),))


# --- results ------------------------------------------------------------------------------------------------------


def test_result_survives_the_store_and_draws(tmp_path: Path) -> None:
    result = find(toy.Copier(PLANTED, weights=toy.rows_with(PLANTED)))
    again = pk.load_result(result.save(tmp_path / "r"))
    for name in result.dataset.data_vars:
        np.testing.assert_array_equal(again[str(name)].values, result[str(name)].values)
    figures = result.figures()
    assert set(figures) == {"top", "histogram", "behaviour"}
    assert all(figure_json(f) and f.alt and f.title for f in figures.values())  # type: ignore[arg-type]
    assert "bam" in str(figure_json(figures["top"]))  # type: ignore[arg-type]


def test_published_preset_verifies_every_candidate() -> None:
    values = {"preset": "published", "share": 0.05, "n_controls": 0}
    (job,) = pk.api.make_jobs("undertrained-tokens", values)
    assert (job.params.trials, job.params.n_verify, job.params.steps) == (20, 1000000, 3)  # type: ignore[attr-defined]
    result = find(toy.Copier(), n_verify=1000000, steps=1, trials=1, share=0.05)
    assert (result["asked"].values == 1).sum() == result["candidate"].values.sum()
