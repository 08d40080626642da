"""Reading the user's files: what is wrong is named, with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from probekit.core import InputError, TextError
from probekit.texts import read_texts


def test_a_txt_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One.\n\nTwo.\n", encoding="utf-8")
    assert read_texts(path) == ["One.\n\nTwo.\n"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfOne.")
    assert read_texts(path) == ["One."]


def test_a_jsonl_file_is_one_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "One."}\n\n{"text": "Zwei ☂", "id": 3}\n', encoding="utf-8")
    assert read_texts(path) == ["One.", "Zwei ☂"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "One."', "line 2: not valid JSON"),
        ('["One."]', "line 2: expected an object with a string 'text'"),
        ('{"txt": "One."}', "line 2: expected an object with a string 'text'"),
        ('{"text": 3}', "line 2: expected an object with a string 'text'"),
        ('{"text": "  "}', "line 2: the text is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_texts(path)


def test_what_is_not_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Fünf".encode("latin-1"))
    with pytest.raises(InputError, match=r"not UTF-8: byte 1 is 0xfc"):
        read_texts(path)


def test_missing_empty_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_texts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(TextError, match="is empty"):
        read_texts(tmp_path / "empty.txt")
    with pytest.raises(InputError, match=r"must end in .txt .* or .jsonl"):
        read_texts(tmp_path / "a.pdf")
