"""Texts by domain: from a dictionary, a file or the command line to the tokens that run, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_model

import probekit as pk
from probekit.batches import make_batch
from probekit.cli import _texts
from probekit.core import Batch, InputError, TextError, TokenText, token_coords
from probekit.engine import load_trace, run_pass, save_trace
from probekit.reduce import Norm
from probekit.texts import read_texts

A, B, C = "w3 w4 w5 w6 w7", "w8 w9 w10", "w11 w12 w13 w14"


def batch_of(texts: Any, window: int | None = None, bos: Any = "model") -> Batch:
    return make_batch(tiny_model("llama-grouped").model, (), texts, bos, window)


def test_a_dictionary_gives_each_text_its_domain_in_order() -> None:
    batch = batch_of({"code": [A, B], "prose": (C,), "verse": B})
    assert batch.domains == ("code", "code", "prose", "verse")
    assert [t.ids for t in batch] == [(3, 4, 5, 6, 7), (8, 9, 10), (11, 12, 13, 14), (8, 9, 10)]
    assert batch.index == (0, 1, 2, 3)


def test_texts_without_a_dictionary_have_no_domain() -> None:
    assert batch_of([A, B]).domains == ("", "") and batch_of(A).domains == ("",)
    assert "domain" not in token_coords(batch_of([A, B]))


def test_a_domain_changes_no_token() -> None:
    """The same ids, the same digest, the same beginning; with a beginning-of-sequence token too."""
    for bos in ("model", "always"):
        plain, named = batch_of([A, B], bos=bos), batch_of({"x": A, "y": B}, bos=bos)
        assert (plain.digest, plain.begins, plain.bos) == (named.digest, named.begins, named.bos)
        assert [t.strings for t in plain] == [t.strings for t in named]


def test_every_token_says_its_domain() -> None:
    coords = token_coords(batch_of({"code": A, "prose": [B, C]}))
    assert coords["domain"][0] == "token" and coords["domain"][1].tolist() == ["code"] * 5 + ["prose"] * 7


def test_windows_and_selections_keep_the_domain() -> None:
    batch = batch_of({"code": [A, B], "prose": C}, window=2)
    assert batch.domains == ("code", "code", "code", "prose", "prose") and set(batch.lengths) == {2}
    assert batch.select([4, 0]).domains == ("prose", "code")


def test_results_and_saved_traces_keep_the_domain(tmp_path: Path) -> None:
    model, batch = tiny_model("llama-grouped").model, batch_of({"code": A, "prose": B})
    result = pk.run("token-uncertainty", model, {"code": A, "prose": B}, progress=False)
    loaded = pk.load_result(result.save(tmp_path / "result"))
    for found in (result, loaded):
        assert found["domain"].values.tolist() == ["code"] * 5 + ["prose"] * 3
    capture = pk.Capture("resid_post", Norm())
    trace, _ = run_pass(model, pk.Forward((capture,)), batch)
    assert load_trace(save_trace(trace, tmp_path / "trace")).batch.domains == ("code", "prose")


def test_rows_of_a_pass_keep_the_domain_and_made_up_texts_have_none() -> None:
    model, batch = tiny_model("llama-grouped").model, batch_of({"code": A, "prose": B})
    captures = (pk.Capture("resid_post", Norm()),)
    rows = run_pass(model, pk.Forward(captures, rows=(1, 0, 1)), batch)[0]
    assert rows.batch.domains == ("prose", "code", "prose")
    made = run_pass(model, pk.Forward(captures, inputs=((5, 6),)), batch)[0]
    assert made.batch.domains == ("",)


@pytest.mark.real
def test_a_chat_can_have_a_domain() -> None:
    model = pk.open_model("smollm2-135m-instruct", lazy=True)
    talk = [{"role": "user", "content": "One two."}]
    batch = make_batch(model, (), {"kind": ["One two."], "listed": [talk]}, "model", None, True)
    assert batch.domains == ("kind", "listed") and batch.texts[0].ids == batch.texts[1].ids and batch.template


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ({}, TextError, "No text was given"),
        ({"code": []}, InputError, r"The domain 'code' holds \[\]; expected a text or a list of texts"),
        ({"code": [A], "prose": 3}, InputError, "The domain 'prose' holds 3"),
        ({"code": {"more": A}}, InputError, "The domain 'code' holds {'more'"),
        ({"code": None}, InputError, "The domain 'code' holds None"),
        ({3: [A]}, InputError, "the names of their domains as keys; found 3"),
        ({"": [A]}, InputError, "the names of their domains as keys; found ''"),
        ({"code": [A, 4]}, TextError, "Text 1 must be a string"),
        ({"code": A, "prose": " "}, TextError, "Text 1 is empty"),
        (7, InputError, "a dictionary of such lists by domain.* found int"),
    ],
)
def test_dictionaries_that_do_not_fit_are_refused(texts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batch_of(texts)


def test_a_batch_in_a_dictionary_is_refused() -> None:
    """Tokenised texts carry their own domains."""
    with pytest.raises(InputError, match="The domain 'code' holds Batch"):
        batch_of({"code": Batch((TokenText((3, 4), ("a", "b")),))})


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def test_lines_of_a_file_name_their_domains(tmp_path: Path) -> None:
    """Domains in the order of their first line, texts in the order of theirs."""
    records = [{"text": t, "domain": d} for t, d in ((A, "prose"), (B, "code"), (C, "prose"))]
    assert read_texts(jsonl(tmp_path / "a.jsonl", *records)) == {"prose": [A, C], "code": [B]}
    assert list(read_texts(jsonl(tmp_path / "a.jsonl", *records))) == ["prose", "code"]


def test_lines_without_a_domain_stay_a_list(tmp_path: Path) -> None:
    assert read_texts(jsonl(tmp_path / "a.jsonl", {"text": A}, {"text": B, "domain": None})) == [A, B]


def test_chats_of_a_file_have_domains_too(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Zwei ☂"}]
    path = jsonl(tmp_path / "a.jsonl", {"messages": talk, "domain": "chat"}, {"text": A, "domain": "plain"})
    found = read_texts(path, chats=True)
    assert isinstance(found, dict) and json.loads(found["chat"][0]) == talk and found["plain"] == [A]


@pytest.mark.parametrize("domain", [None, "", 3, ["code"]])
def test_a_line_whose_domain_does_not_fit_is_named(tmp_path: Path, domain: Any) -> None:
    """The line is counted with the blank one before it."""
    lines = [json.dumps({"text": A, "domain": "code"}), "", json.dumps({"text": B, "domain": domain})]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=r"line 3: other lines name a domain; found .* as this one's"):
        read_texts(path)


def test_a_line_that_names_no_domain_among_others_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 1: other lines name a domain; found None"):
        read_texts(jsonl(tmp_path / "a.jsonl", {"text": A}, {"text": B, "domain": "code"}))


def test_files_and_texts_of_a_command_come_together(tmp_path: Path) -> None:
    """Domains of several files are joined; plain files and --text are listed, --text first."""
    one = jsonl(tmp_path / "1.jsonl", {"text": A, "domain": "x"}, {"text": B, "domain": "y"})
    two = jsonl(tmp_path / "2.jsonl", {"text": C, "domain": "x"})
    assert _texts((), (one, two)) == {"x": [A, C], "y": [B]}
    plain = tmp_path / "3.txt"
    plain.write_text(C, encoding="utf-8")
    assert _texts((A,), (plain,)) == [A, C]


@pytest.mark.parametrize("given", [("w3 w4",), ()])
def test_a_command_has_domains_for_all_texts_or_for_none(tmp_path: Path, given: tuple[str, ...]) -> None:
    named = jsonl(tmp_path / "1.jsonl", {"text": A, "domain": "x"}, {"text": B, "domain": "y"})
    plain = jsonl(tmp_path / "2.jsonl", {"text": C})
    with pytest.raises(InputError, match=r"Some lines name a domain \(x, y\) and others"):
        _texts(given, (plain, named))
    with pytest.raises(InputError, match="No text was given"):
        _texts((), ())


def test_the_command_line_runs_texts_by_domain(tiny_folder: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from probekit.cli import cli

    texts = jsonl(tmp_path / "a.jsonl", {"text": A, "domain": "x"}, {"text": B, "domain": "y"})
    command = ["run", "token-uncertainty", "--model", tiny_folder, "--texts", texts, "--out", tmp_path / "out"]
    done = CliRunner().invoke(cli, list(map(str, command)))
    assert done.exit_code == 0, done.output
    domains = pk.load_result(tmp_path / "out")["domain"].values
    assert np.unique(domains, return_counts=True)[1].tolist() == [5, 3]
    texts = jsonl(tmp_path / "a.jsonl", {"text": A, "domain": "x"}, {"text": " ", "domain": "y"})
    assert "line 2: the text is empty" in CliRunner().invoke(cli, list(map(str, command))).output
