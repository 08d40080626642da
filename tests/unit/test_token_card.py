"""The card of a token: what it says, how tokens are named, what stored runs add, and that nothing of it is interpreted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vocabulary_toy as toy
from click.testing import CliRunner

import probekit as pk
from probekit.cli import cli
from probekit.core import InputError

PLANTED = (toy.id_of("bam"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with one planted row, saved."""
    where = tmp_path_factory.mktemp("toy")
    toy.random_llama(toy.rows_with(PLANTED)).module.save_pretrained(where)
    toy.toy_tokenizer().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("runs") / "run"
    names = ["undertrained-tokens", "glitch-tokens"]
    how = {"share": 0.1, "n_verify": 2, "n_controls": 2, "steps": 1, "trials": 1, "n_suspects": 4, "n_random": 4}
    pk.report(pk.run(names, folder, progress=False, competence=0.0, **how), where)  # type: ignore[arg-type]
    return where


def card_of(model: Any, token: Any, **how: Any) -> pk.TokenCard:
    card = pk.token_card(model, token, **how)
    assert isinstance(card, pk.TokenCard)
    return card


def test_numbers_by_hand(folder: Path) -> None:
    """Norms, percentiles among ordinary tokens and neighbours, from the rows themselves; no weights are loaded."""
    model: Any = pk.open_model(folder, lazy=True)
    token = toy.id_of("dem")
    card, rows = card_of(model, token, n_neighbours=5), toy.rows_with(PLANTED).unembedding
    assert not model.loaded
    norms = np.linalg.norm(rows, axis=1)
    assert card.numbers["row norm"].value == pytest.approx(norms[token], rel=1e-5)
    assert card.numbers["row norm"].percentile == pytest.approx(100 * (norms[6:] <= norms[token]).mean())
    cosine = rows @ rows[token] / norms / norms[token]
    cosine[token] = -2
    best = np.argsort(-cosine)[:5]
    assert [n.token for n in card.neighbours] == best.tolist()
    assert [n.cosine for n in card.neighbours] == pytest.approx(cosine[best], abs=1e-5)
    assert card.category == "ok" and card.bytes_hex == "64 65 6d" and card.encodes_to == (token,)
    assert card.written is None and card.stored == () and "3 tokens in brackets" in card.reference


def test_a_planted_token_stands_out(folder: Path) -> None:
    planted, other = card_of(folder, PLANTED[0]), card_of(folder, "dem")
    assert planted.numbers["cosine"].percentile < 1 and planted.numbers["cosine"].value < 0.01
    assert other.numbers["cosine"].percentile > 1
    assert {n.token for n in planted.neighbours[:3]} == set(toy.RESERVED)


def test_untied_rows_have_two_norms() -> None:
    card = card_of(toy.Copier(weights=toy.rows_with(PLANTED, tied=False)), PLANTED[0])
    assert {"embedding norm", "unembedding norm"} <= set(card.numbers) and "row norm" not in card.numbers
    assert card.numbers["embedding norm"].percentile < 1


def test_a_token_is_an_id_its_exact_text_or_a_text_of_several(folder: Path) -> None:
    token = toy.id_of("dem")
    assert card_of(folder, token).token == card_of(folder, "dem").token == card_of(folder, np.int64(token)).token
    several = pk.token_card(folder, "dembam")
    assert isinstance(several, pk.TokenCards) and [c.token for c in several] == [token, PLANTED[0]]
    one = pk.token_card(folder, ["dem"])
    assert isinstance(one, pk.TokenCards) and len(one) == 1
    mixed = pk.token_card(folder, ["dem", 7, "<r1>"])
    assert isinstance(mixed, pk.TokenCards) and [c.token for c in mixed] == [token, 7, toy.id_of("<r1>")]
    assert mixed[2].special and mixed[2].category == "ok, special"


@pytest.mark.parametrize(
    ("token", "message"),
    [(-1, "go from 0 to 175; found -1"), (176, "found 176"), ("", "an id or a text"), (True, "an id or a text"), ([], "No token")],
)  # fmt: skip
def test_what_is_no_token_is_refused(token: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pk.token_card(toy.Copier(), token)


def test_verification_on_request() -> None:
    """The copier writes all but the planted token; nothing is asked unless wanted."""
    model = toy.Copier(PLANTED, weights=toy.rows_with(PLANTED))
    assert card_of(model, "bam").written is None and model.asked == 0
    cards = pk.token_card(model, ["bam", "dem"], verify=True)
    assert isinstance(cards, pk.TokenCards)
    bad, good = cards
    assert bad.written is not None and good.written is not None
    assert max(bad.written.values()) < 1e-6 and min(good.written.values()) > 0.99
    assert "not written (" in str(bad) and "not written (" not in str(good)


def test_stored_runs_tell_what_they_hold(folder: Path, stored: Path) -> None:
    glitch, undertrained = sorted(card_of(folder, PLANTED[0], results=[stored]).stored, key=lambda s: s.analysis)
    assert (undertrained.analysis, glitch.analysis) == ("undertrained-tokens", "glitch-tokens")
    result = pk.load_result(stored, "undertrained-tokens")
    assert undertrained.facts["candidate"] == undertrained.facts["asked"] == 1
    written = [v for k, v in undertrained.facts.items() if k.startswith("written")]
    assert written == pytest.approx(result["written"].values[:, PLANTED[0]])
    assert glitch.facts["scanned"] == 1 and glitch.facts["glitch"] == 1
    assert glitch.facts["passed [repetition]"] == 0
    unasked = int(np.flatnonzero(result["asked"].values == 0)[-1])
    other = next(s for s in card_of(folder, unasked, results=[stored]).stored if s.analysis == undertrained.analysis)
    assert not [k for k in other.facts if k.startswith("written")], "NaN is left out"


def test_a_run_of_another_tokenizer_is_refused(stored: Path, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="tokenizer differs"):
        pk.token_card(tiny_folder, 5, results=[stored])


def test_nothing_of_a_token_is_interpreted() -> None:
    """Markup, control characters and terminal escapes are shown, in the terminal and in the page."""
    model = toy.Copier()
    table = model.vocabulary()
    evil = "<script>alert('x')</script>\x1b[31m\u202e"
    pieces = (*table.pieces[:7], evil, *table.pieces[8:])
    changed = type(table)(pieces, pieces, pieces, table.encoded, table.special)
    model.vocabulary = lambda: changed  # type: ignore[method-assign]
    card = card_of(model, 7)
    page, text = card._repr_html_(), str(card)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not {"\x1b", "\u202e"} & set(page + text)
    assert "<script>" in text
    assert pk.TokenCards((card, card))._repr_html_() == page * 2


def test_a_card_is_plain_data() -> None:
    card = card_of(toy.Copier(), "dem", verify=True)
    told = json.loads(json.dumps(card.as_dict()))
    assert told["token"] == card.token and told["numbers"]["cosine"]["value"] == card.numbers["cosine"].value


def test_a_model_without_rows_has_a_card() -> None:
    model = toy.Copier()
    model.vocabulary_weights = None  # type: ignore[assignment, method-assign]
    card = card_of(model, "dem")
    assert not card.numbers and not card.neighbours and "neighbours" not in str(card)


def test_command_line(folder: Path, stored: Path) -> None:
    def say(*args: str) -> str:
        done = CliRunner().invoke(cli, ["token", *args, "--model", str(folder)])
        assert done.exit_code == 0, done.output
        return done.output

    shown = say("bam", "--results", str(stored), "--neighbours", "2")
    assert f"{PLANTED[0]} ‘bam’" in shown and "undertrained-tokens" in shown and "glitch-tokens" in shown
    assert "‘dem’" in say(str(toy.id_of("dem")))
    both = json.loads(say("dembam", "--json"))
    assert [card["token"] for card in both] == [toy.id_of("dem"), PLANTED[0]]
    digit = json.loads(say("7", "--as-text", "--json"))
    assert digit[0]["text"] == "7"
    assert "verification" in say("bam", "--verify")
    refused = CliRunner().invoke(cli, ["token", "999999", "--model", str(folder)])
    assert refused.exit_code == 2 and "go from 0 to 175; found 999999" in refused.output


def test_a_book_gives_the_same_cards_without_reading_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = pk.TokenBook(folder)
    monkeypatch.setattr("probekit.cards.answer", None)  # nothing is looked up any more
    token = toy.id_of("dem")
    cards = [book.card(i) for i in (token, PLANTED[0])]
    monkeypatch.undo()
    assert cards == [card_of(folder, i) for i in (token, PLANTED[0])]
    assert book.ids("dembam") == [token, PLANTED[0]] and book.texts([token]) == ["dem"]
    assert len(book) == len(toy.rows_with(PLANTED).unembedding) and book.nbytes > 0
    with pytest.raises(InputError, match="ids"):
        book.card(10**6)
