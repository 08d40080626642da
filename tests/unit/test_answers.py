"""What a right answer says, from a record, a file or the command line to the prompts that run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_model

import probekit as pk
from probekit.batches import make_batch
from probekit.cli import _texts
from probekit.core import Batch, InputError, TokenText
from probekit.engine import run_pass
from probekit.engine.store import load_trace, save_trace
from probekit.reduce import Norm
from probekit.texts import read_texts

A, B = "w5 w6 w7", "w8 w9"


def batch_of(texts: Any) -> Batch:
    return make_batch(tiny_model("llama-grouped").model, (), texts, "model", None)


def test_records_say_what_is_right() -> None:
    batch = batch_of([{"text": A, "answer": "18"}, B, {"text": B, "answer": 7}])
    assert [t.answer for t in batch] == ["18", "", "7"] and batch.texts[1].ids == batch.texts[2].ids
    assert batch.texts[0].ids == batch_of(A).texts[0].ids
    assert batch_of({"text": A, "answer": "x", "domain": "d"}).texts[0].domain == "d"
    assert batch.windows(2).texts[0].answer == "18" and batch.select([2]).texts[0].answer == "7"


def test_a_saved_trace_keeps_answers(tmp_path: Path) -> None:
    request = pk.Forward((pk.Capture("resid_post", Norm()),))
    batch = Batch((TokenText((5, 6), ("a", "b"), "", "18"),))
    found = run_pass(tiny_model("llama-grouped").model, request, batch)[0]
    assert load_trace(save_trace(found, tmp_path / "trace")).batch.texts[0].answer == "18"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([{"text": A, "answr": "18"}], "Text 0 is a record with answr='18'"),
        ([{"text": A, "answer": True}], "answer=True"),
        ([{"text": A, "answer": ["18"]}], r"answer=\['18'\]"),
        ([{"text": A, "domain": 3}], "domain=3"),
        ([{"text": A, "domain": "a"}, B], "Text 1 names no domain and others do"),
    ],
)
def test_records_that_do_not_fit_are_refused(texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        batch_of(texts)


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def test_lines_of_a_file_name_answers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": A, "answer": 18}, {"text": B})
    assert read_texts(path) == [{"text": A, "answer": "18"}, {"text": B, "answer": ""}]
    path = jsonl(tmp_path / "a.jsonl", {"text": A, "answer": "x", "domain": "d"})
    assert read_texts(path) == [{"text": A, "answer": "x", "domain": "d"}]
    with pytest.raises(InputError, match=r"line 1: expected the answer as a string or a number, found \[1\]"):
        read_texts(jsonl(tmp_path / "b.jsonl", {"text": A, "answer": [1]}))


def test_answers_and_domains_of_several_files_come_together(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "1.jsonl", {"text": A, "answer": "1", "domain": "x"})
    two = jsonl(tmp_path / "2.jsonl", {"text": B, "domain": "y"})
    found = _texts((), (one, two))
    assert found == [{"text": A, "answer": "1", "domain": "x"}, {"text": B, "domain": "y"}]
    assert batch_of(found).domains == ("x", "y")
