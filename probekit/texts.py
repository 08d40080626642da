"""Reading the user's texts: a .txt file is one text, a .jsonl file one a line, a .csv file two a line, in pairs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from probekit.core import InputError, TextError


def read_texts(path: str | Path, *, chats: bool = False) -> list[str] | list[dict[str, str]] | dict[str, list[str]]:
    """The texts of a file.

    By domain, where every line of a .jsonl file names one in `domain`; a .csv file of pairs gives the domains
    `sentence1` and `sentence2`, as its columns are called. Where lines name what a right answer to their
    prompt says in `answer`, a list of records with `text`, `answer` and `domain`.

    Args:
        path: a .txt file (one text), a .jsonl file (an object with a string `text` on each line), or a .csv file whose
            first line names columns, two of them `sentence1` and `sentence2`.
        chats: whether a line may have `messages` in place of `text`: a list of objects with `role` and `content`,
            which becomes a text that spells this list in JSON.

    Raises:
        InputError: the file does not exist, is of another kind, is not UTF-8, or has a malformed line, which is named.
        TextError: the file, or the text of a line, is empty.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl", ".csv"):
        raise InputError(
            f"{path} must end in .txt (one text) or .jsonl (one text a line, in 'text'), or .csv for pairs of sentences."
        )
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}. Save it as UTF-8."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    if not content.strip():
        raise TextError(f"{path} is empty.")
    if path.suffix == ".txt":
        return [content]
    if path.suffix == ".csv":
        return _pairs_of(path, content)
    lines = [(n, line) for n, line in enumerate(content.splitlines(), start=1) if line.strip()]
    texts = [text_of_line(path, number, line, chats) for number, line in lines]
    domains = [json.loads(line).get("domain") for _, line in lines]
    answers = [_answer_of(json.loads(line), f"{path}, line {number}") for number, line in lines]
    if any(domains):
        for (number, _), domain in zip(lines, domains, strict=True):
            if not isinstance(domain, str) or not domain:
                raise InputError(f"{path}, line {number}: other lines name a domain; found {domain!r} as this one's.")
    if any(answers):
        named = zip(texts, answers, domains, strict=True)
        return [{"text": t, "answer": a} | ({"domain": d} if d else {}) for t, a, d in named]
    if not any(domains):
        return texts
    return {d: [t for t, own in zip(texts, domains, strict=True) if own == d] for d in dict.fromkeys(domains)}


def text_of_line(path: Path, number: int, line: str, chats: bool) -> str:
    """The text of one line of a .jsonl file, or its messages in JSON.

    Raises:
        InputError: names the line and what is wrong with it.
        TextError: the text is empty.
    """
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg} at column {error.colno}).") from None
    if isinstance(record, dict) and isinstance(record.get("messages"), list) and "text" not in record:
        if not chats:
            raise InputError(
                f"{where}: found 'messages' in place of 'text'; they are read with a chat template (chat)."
            )
        return json.dumps(record["messages"], ensure_ascii=False)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InputError(f"{where}: expected an object with a string 'text', found {line.strip()[:60]!r}.")
    if not record["text"].strip():
        raise TextError(f"{where}: the text is empty.")
    return record["text"]


def _pairs_of(path: Path, content: str) -> dict[str, list[str]]:
    columns = ("sentence1", "sentence2")
    rows = list(csv.DictReader(io.StringIO(content)))
    if not rows or not set(columns) <= set(rows[0]):
        found = ", ".join(map(repr, rows[0])) if rows else "no line below the first"
        raise InputError(f"{path}: expected the columns 'sentence1' and 'sentence2'; found {found}.")
    for number, row in enumerate(rows, start=1):
        if not all((row[c] or "").strip() for c in columns):
            raise TextError(f"{path}, pair {number}: a sentence is empty.")
    return {c: [row[c] for row in rows] for c in columns}


def _answer_of(record: dict[str, object], where: str) -> str:
    answer = record.get("answer")
    if answer is None or isinstance(answer, str):
        return answer or ""
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return str(answer)
    raise InputError(f"{where}: expected the answer as a string or a number, found {answer!r}.")
